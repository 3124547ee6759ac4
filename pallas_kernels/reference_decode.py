"""The decode kernels in NumPy and float64, a loop at a time: what their tests compare with.

Same signatures and layouts as the kernels' wrappers, no helper shared with them.
"""

import numpy as np


def attend(q, in_order, listed, layer):
    """As `sparse_decode.attend`: (out f64[B K G H], lse f64[B K G])."""
    B, K, G, H = q.shape
    out, lse = np.zeros((B, K, G, H)), np.full((B, K, G), -1e30)
    for b in range(B):
        for k in range(K):
            keys, values = [np.zeros((0, H))], [np.zeros((0, H))]
            for source in in_order:
                n = int(source.num_rows[b, k])
                for found, cache in ((keys, source.keys), (values, source.values)):
                    rows = cache[b, :n, k] if source.own else cache[layer, k, :n]
                    found.append(np.asarray(rows, np.float64))
            if listed is not None:
                rows = rows_of(np.asarray(listed.items)[b * K + k, : int(listed.num_items[b * K + k])])
                for found, cache in ((keys, listed.keys), (values, listed.values)):
                    found.append(np.asarray(cache[layer, k], np.float64)[rows])
            if sum(map(len, keys)):
                query = np.asarray(q[b, k], np.float64)
                out[b, k], lse[b, k] = attend_rows(query, np.concatenate(keys), np.concatenate(values))
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


def descend(q, levels, log_T):
    """One head from coarse to fine, q [G H]: for every level (log A f64[C], kept bool[C]).

    levels as for `decode.select`, of one layer and head: arrays without L and K. Below the coarsest only children of
    kept clusters are alive, and their denominators count nothing else.
    """
    found, alive = [], None
    for level, log_t in zip(levels, log_T, strict=True):
        counts = np.asarray(level.counts) if alive is None else np.where(alive, level.counts, 0)
        log_A = log_scores(q, level.centroids, counts)
        kept = log_A > float(log_t)
        found.append((log_A, kept))
        if level.child_starts is not None:
            children = kept_rows(kept, np.asarray(level.child_starts), np.asarray(level.child_counts))
            alive = np.zeros(np.asarray(level.child_counts).sum(), bool)
            alive[children] = True
    return found


def kept_rows(kept, starts, counts) -> np.ndarray:
    """The rows of the runs of one head's kept clusters, ascending: what `work_list.list_items` lists."""
    runs = [np.arange(s, s + n) for keep, s, n in zip(kept, starts, counts, strict=True) if keep]
    return np.sort(np.concatenate([np.zeros(0, int), *runs]))
