"""The decode kernels in NumPy and float64, a loop at a time: what their tests compare with.

Same signatures and layouts as the kernels' wrappers, no helper shared with them.
"""

import numpy as np


def attend_items(q, keys, values, items, num_items, layer):
    """As `sparse_decode.attend_items`: (out f64[B K G H], lse f64[B K G])."""
    q, keys, values = (np.asarray(x, np.float64) for x in (q, keys, values))
    items, num_items = np.asarray(items), np.asarray(num_items)
    B, K, G, H = q.shape
    out, lse = np.zeros((B, K, G, H)), np.full((B, K, G), -1e30)
    for b in range(B):
        for k in range(K):
            rows = rows_of(items[b, k, : num_items[b, k]])
            if rows.size:
                out[b, k], lse[b, k] = attend_rows(q[b, k], keys[layer, k, rows], values[layer, k, rows])
    return out, lse


def attend_rows(q, keys, values):
    """Softmax attention of q [G H] over keys, values [S H]: (out f64[G H], lse f64[G])."""
    scores = q @ keys.T / np.sqrt(q.shape[1])
    top = scores.max(axis=1, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(axis=1, keepdims=True)
    return weights @ values / total, (top + np.log(total))[:, 0]


def rows_of(items) -> np.ndarray:
    """The rows that a list of items attends to, in its order."""
    return np.array([(item >> 8) * 8 + bit for item in items for bit in range(8) if item >> bit & 1], int)


def log_scores(q, centroids, counts):
    """log A f64[C] of one head's clusters for q [G H], centroids [C H]; −∞ for those of count 0."""
    q, centroids, counts = (np.asarray(x, np.float64) for x in (q, centroids, counts))
    alive = counts > 0
    log_A = np.full(len(counts), -np.inf)
    if not alive.any():
        return log_A
    dots = q @ centroids[alive].T / np.sqrt(q.shape[1])
    top = dots.max(axis=1, keepdims=True)
    log_scores = dots - top - np.log(np.sum(counts[alive] * np.exp(dots - top), axis=1, keepdims=True))
    log_A[alive] = np.log(np.mean(np.exp(log_scores), axis=0))
    return log_A


def keep_clusters(q, centroids, counts, log_T, layer):
    """As `centroid_scores.keep_clusters`, on arrays without padding: bool[B K C] for counts i32[B K C]."""
    centroids, counts = np.asarray(centroids), np.asarray(counts)
    B, K = counts.shape[:2]
    scores = [[log_scores(q[b, k], centroids[layer, k], counts[b, k]) for k in range(K)] for b in range(B)]
    return np.array(scores) > float(log_T)


def kept_rows(kept, starts, counts) -> np.ndarray:
    """The rows of one head's kept clusters, ascending: what `work_list.list_items` lists."""
    runs = [np.arange(s, s + n) for keep, s, n in zip(kept, starts, counts, strict=True) if keep]
    return np.sort(np.concatenate([np.zeros(0, int), *runs]))
