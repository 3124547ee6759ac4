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
