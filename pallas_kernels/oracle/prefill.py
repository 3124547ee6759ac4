"""The prefill kernels in NumPy and float64, a lane at a time: what their tests compare with."""

import numpy as np


def attend_items(q, keys, values, items, num_items, layer):
    """As `sparse_prefill.attend_items`: (out f64[U M H], lse f64[U M])."""
    lists = [rows_of(lane[:number]) for lane, number in zip(items, num_items, strict=True)]
    return attend_rows(q, keys, values, lists, layer)


def attend_rows(q, keys, values, lists, layer):
    """Softmax attention of each lane of q [U M H] over its list of rows; without rows 0 and −1e30."""
    U, M, H = q.shape
    K = keys.shape[1]
    out, lse = np.zeros((U, M, H)), np.full((U, M), -1e30)
    for u, rows in enumerate(lists):
        if len(rows):
            k, v = (np.asarray(cache[layer, u % K][rows], np.float64) for cache in (keys, values))
            scores = np.asarray(q[u], np.float64) @ k.T / np.sqrt(H)
            top = scores.max(axis=1)
            weights = np.exp(scores - top[:, None])
            out[u] = weights @ v / weights.sum(axis=1)[:, None]
            lse[u] = top + np.log(weights.sum(axis=1))
    return out, lse


def rows_of(items) -> np.ndarray:
    """The rows that a list of items names, in its order."""
    return np.array([(item >> 8) * 8 + bit for item in items for bit in range(8) if item >> bit & 1], int)


def kept_rows(kept, starts, counts) -> np.ndarray:
    """The rows of one head's kept clusters, ascending: what `prefill.list_granules` lists."""
    runs = [np.arange(s, s + n) for keep, s, n in zip(kept, starts, counts, strict=True) if keep]
    return np.sort(np.concatenate([np.zeros(0, int), *runs]))


def kept_clusters(q, valid, levels, log_T):
    """The clusters of every level that one block keeps: [(log A f64[C], kept bool[C]), …], coarse → fine.

    q [M H], of which valid bool[M] enter the means; levels of one layer and head, with centroids [C H], counts and
    parents [C]; log_T one a level. log A is −∞ for clusters that take no part.
    """
    q, found = np.asarray(q, np.float64)[valid], []
    for level, threshold in zip(levels, log_T, strict=True):
        counts = np.asarray(level.counts)
        alive = counts > 0 if not found else (counts > 0) & found[-1][1][level.parents]
        log_A = np.full(len(counts), -np.inf)
        if len(q) and alive.any():
            scores = q @ np.asarray(level.centroids, np.float64)[alive].T / np.sqrt(q.shape[1])
            log_S = scores - _log_sum_exp(scores + np.log(counts[alive]), axis=1)[:, None]
            log_A[alive] = _log_sum_exp(log_S, axis=0) - np.log(len(q))
        found.append((log_A, log_A > threshold))
    return found


def _log_sum_exp(x, axis: int):
    top = x.max(axis=axis)
    return top + np.log(np.exp(x - np.expand_dims(top, axis)).sum(axis=axis))
