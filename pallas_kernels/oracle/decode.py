"""The decode kernels in NumPy and float64, a loop at a time: what their tests compare with.

Same signatures and layouts as the kernels' wrappers, no helper shared with them.
"""

import numpy as np

from squeezejax.pallas_kernels.hopper.work_list import Lists


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
            if listed is not None:
                rows = rows_of(listed.lists, b * K + k)
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


def rows_of(lists, lane: int) -> np.ndarray:
    """The rows that a lane's list names (`work_list.Lists`), in its order, the head beginning with a granule."""
    items = np.asarray(lists.items)[lane, : int(lists.num_items[lane])]
    named = (items[:, None] >> np.arange(8) & 1).astype(bool)
    return ((items[:, None] >> 8) * 8 + np.arange(8))[named]


def lists_of(masks, rng) -> Lists:
    """Lists of rows bool[lanes R] that are kept, their granules in any order and some of them cut in two."""
    lanes, R = masks.shape
    bits = (masks.reshape(lanes, -1, 8) << np.arange(8)).sum(axis=2)
    found = []
    for lane in bits:
        part = np.where(rng.random(len(lane)) < 0.1, rng.integers(0, 256, len(lane)), 255)
        both = np.concatenate([lane & part, lane & ~part])
        items = np.tile(np.arange(R // 8), 2) * 256 + both
        found.append(rng.permutation(items[both > 0]))
    num_items = np.array([len(items) for items in found], np.int32)
    items = np.full((lanes, R // 4), 12345, np.int32)  # what nobody has means nothing
    for row, some in zip(items, found, strict=True):
        row[: len(some)] = some
    offsets = np.concatenate([[0], np.cumsum(-(-num_items // 8))]).astype(np.int32)
    return Lists(offsets, num_items, items)


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


def descend_codes(q, levels, keys, sinks, line, log_T, turn):
    """One head by our rule, q [G H]: for every level, and then for keys, (log A f64, kept bool).

    levels as for `descend`, with codes, steps, offset and spreads; keys (u8[R …], steps [R]) or None; sinks [s H]; line
    (a, b) f64[G 2]; turn [H H] is how codes' rows were turned.
    """
    q = np.asarray(q, np.float64) / np.sqrt(q.shape[1])
    turned, half_square = q @ np.asarray(turn, np.float64).T, (q * q).sum(axis=1) / 2
    found, alive, lse = [], True, None
    mean = lambda scores: np.log(np.mean(np.exp(scores - lse), axis=1))
    for level, log_t in zip(levels, log_T, strict=False):
        counts = np.where(alive, level.counts, 0)
        dots = (rounded(level.codes, level.steps, q.shape[1]) + level.offset) @ turned.T
        scores = dots + np.asarray(level.spreads, np.float64)[:, None] * half_square
        if lse is None:
            mass = counts @ np.exp(scores) + np.exp(np.asarray(sinks, np.float64) @ q.T).sum(axis=0)
            lse = line[:, 0] + line[:, 1] * np.log(mass)
        log_A = np.where(counts > 0, mean(scores), -np.inf)
        found.append((log_A, log_A > float(log_t)))
        if level.child_starts is not None:
            alive = np.zeros(np.asarray(level.child_counts).sum(), bool)
            alive[kept_rows(found[-1][1], np.asarray(level.child_starts), np.asarray(level.child_counts))] = True
    if keys is not None:
        scores = np.full((len(keys[0]), len(q)), -np.inf)
        for c in np.flatnonzero(found[-1][1]):
            rows = slice(levels[-1].starts[c], levels[-1].starts[c] + levels[-1].counts[c])
            scores[rows] = rounded(keys[0][rows], keys[1][rows], q.shape[1]) @ turned.T + dots[c]
        with np.errstate(divide="ignore"):
            log_A = mean(scores)
        found.append((log_A, log_A > float(log_T[-1])))
    return found


def rounded(packed, steps, H: int) -> np.ndarray:
    """The rows f64[… H] of codes u8[… bits·H/8], as codes.py has them."""
    bits = 8 * packed.shape[-1] // H
    parts = [packed >> shift & 2**bits - 1 for shift in range(0, 8, bits)]
    levels = np.concatenate(parts, axis=-1).astype(np.float64) - (2**bits - 1) / 2
    return levels * np.asarray(steps, np.float64)[..., None]


def kept_rows(kept, starts, counts) -> np.ndarray:
    """The rows of the runs of one head's kept clusters, ascending: what a lane that keeps them attends to."""
    runs = [np.arange(s, s + n) for keep, s, n in zip(kept, starts, counts, strict=True) if keep]
    return np.sort(np.concatenate([np.zeros(0, int), *runs]))
