"""The decode kernels in NumPy and float64, a loop at a time: what their tests compare with.

Same signatures and layouts as the kernels' wrappers, no helper shared with them.
"""

import numpy as np

from squeezejax.pallas_kernels.hopper.work_list import Kept


def attend(q, in_order, listed, step):
    """As `sparse_decode.attend`: (out f64[B K G H], lse f64[B K G])."""
    B, K, G, H = q.shape
    out, lse = np.zeros((B, K, G, H)), np.full((B, K, G), -1e30)
    layer, everything = int(step.layer[0]), bool(np.all(np.asarray(step.thresholds) == -np.inf))
    for b in range(B):
        for k in range(K):
            keys, values = [np.zeros((0, H))], [np.zeros((0, H))]
            for source in in_order:
                n = min(int(step.start[b]) + 1, int(step.lengths[b])) if source.own else source.num_rows
                n = 0 if source.if_all and not everything else n
                for found, cache in ((keys, source.keys), (values, source.values)):
                    rows = cache[b, :n, k] if source.own else cache[layer, k, :n]
                    found.append(np.asarray(rows, np.float64))
            if listed is not None and not (listed.may_skip and everything):
                rows = rows_of(listed.kept, b * K + k)
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


def rows_of(kept, lane: int) -> np.ndarray:
    """The rows of the runs that a lane keeps (`work_list.Kept`), in their order, the head beginning with a granule."""
    tiles = kept.starts.shape[1] // 64 if kept.num_read is None else -(-int(kept.num_read[lane]) // 8)
    starts, stops = (np.asarray(x)[lane, : 64 * tiles] for x in (kept.starts, kept.stops))
    return np.concatenate([np.zeros(0, int), *(np.arange(*run) for run in zip(starts, stops, strict=True))])


def keep(masks, rng) -> Kept:
    """What marking would leave of rows bool[lanes R] that are kept: their runs, in any order, among clusters that are
    not; some lanes have fewer tiles than others."""
    lanes, R = masks.shape
    edges = np.diff(np.pad(masks, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    runs = [np.stack([np.flatnonzero(lane == 1), np.flatnonzero(lane == -1)]) for lane in edges]
    tiles = [-(-2 * lane.shape[1] // 64) + rng.integers(0, 2) for lane in runs]  # half of the clusters or more are not
    P = 64 * max(1, *tiles)
    starts = rng.integers(0, R, (lanes, P)).astype(np.int32)
    stops, counts = starts.copy(), np.zeros((lanes, P), np.int32)
    for u, (begins, ends) in enumerate(runs):
        at = rng.permutation(64 * tiles[u])[: len(begins)]
        starts[u, at], stops[u, at] = begins, ends
        for tile in range(tiles[u]):
            taken = set()
            for i in sorted(at[at // 64 == tile], key=lambda i: starts[u, i]):
                granules = set(range(starts[u, i] // 8, (stops[u, i] - 1) // 8 + 1))
                counts[u, i] = len(granules - taken)
                taken |= granules
    by_tile = lambda x: x.reshape(lanes, -1, 64)
    positions = (np.cumsum(by_tile(counts), axis=2) - by_tile(counts)).reshape(lanes, P).astype(np.int32)
    items = np.full((-(-P // 64 // 64) * 64, -(-lanes // 8) * 8), 12345, np.int32)  # what nobody has means nothing
    items[: P // 64, :lanes] = by_tile(counts).sum(axis=2).T
    tile_rows = by_tile(stops - starts).sum(axis=2).astype(np.int32)
    read = np.pad(np.array([8 * n - (n > 0) * rng.integers(0, 8) for n in tiles], np.int32), (0, -lanes % 8))
    return Kept(starts, stops, counts, positions, items, tile_rows, read)


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
    """The rows of the runs of one head's kept clusters, ascending: what a lane that keeps them attends to."""
    runs = [np.arange(s, s + n) for keep, s, n in zip(kept, starts, counts, strict=True) if keep]
    return np.sort(np.concatenate([np.zeros(0, int), *runs]))
