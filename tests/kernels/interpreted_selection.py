"""Looking up the kept clusters by the kernels, interpreted, against float64: a program with the name of one check."""

import sys
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from squeezejax.pallas_kernels.hopper import centroid_scores, decode, mosaic
from squeezejax.pallas_kernels.oracle import decode as reference_decode


class RandomLevel(NamedTuple):
    """The fields of the tree's `Level` that kernels read, [L K C …]."""

    centroids: Any
    counts: Any
    starts: Any
    child_starts: Any = None
    child_counts: Any = None

    def of_head(self, layer: int, head: int) -> "RandomLevel":
        return RandomLevel(*(None if x is None else np.asarray(x)[layer, head] for x in self))


def random_runs(rng, shape, C: int, total: int, dead: float):
    """Sizes i32[… C] that sum to total, some 0."""
    weights = np.where(rng.random((*shape, C)) < dead, 0, rng.random((*shape, C)) + 0.02)
    weights[..., -1] += 0.02
    ends = np.floor(np.cumsum(weights, axis=-1) / weights.sum(-1, keepdims=True) * total + 1e-6).astype(np.int32)
    return np.diff(ends, axis=-1, prepend=0)


def random_levels(rng, L, K, H, sizes, S, dead=0.1, unit=1) -> list[RandomLevel]:
    """A hierarchy over S keys, sizes = clusters of each level, coarse → fine; the finest end at multiples of unit."""
    levels, below = [], S
    for C in reversed(sizes):
        rows = 1 if levels else unit
        members = rows * random_runs(rng, (L, K), C, below // rows, dead)
        starts = np.cumsum(members, axis=-1, dtype=np.int32) - members
        centroids = rng.standard_normal((L, K, C, H)).astype(np.float32)
        if levels:
            edges = np.pad(np.cumsum(levels[0].counts, axis=-1, dtype=np.int32), ((0, 0), (0, 0), (1, 0)))
            rows, ends = (np.take_along_axis(edges, at, axis=-1) for at in (starts, starts + members))
            levels.insert(0, RandomLevel(centroids, ends - rows, rows, starts, members))
        else:
            levels.insert(0, RandomLevel(centroids, members, starts))
        centroids[levels[0].counts == 0] = 50.0  # however high a dead cluster scores
        below = C
    return levels


def thresholds(q, levels, layer: int, fraction: float):
    """log T f32[levels] at which every level keeps about `fraction` of what reaches it, no score near one."""
    log_T = []
    for depth in range(len(levels)):
        scores = [
            reference_decode.descend(q[b, k], [x.of_head(layer, k) for x in levels[: depth + 1]], [*log_T, 0.0])[-1][0]
            for b, k in np.ndindex(q.shape[:2])
        ]
        scores = np.sort(np.concatenate(scores))
        scores = scores[np.isfinite(scores)]
        wanted = int((1 - fraction) * (len(scores) - 1))
        near = range(max(0, wanted - 4), min(len(scores) - 1, wanted + 5))
        at = max(near, key=lambda i: scores[i + 1] - scores[i]) if near else 0
        log_T.append(float(scores[at : at + 2].mean()) if scores.size else 0.0)
    return log_T


def step_of(active, layer: int, log_T) -> decode.Step:
    """A step of users of whom those not active take no part."""
    start = jnp.where(active, 0, 1).astype(jnp.int32)
    return decode.Step(jnp.full(1, layer, jnp.int32), jnp.asarray(log_T, jnp.float32), start, jnp.ones_like(start))


def rows_kept(found, lane: int) -> np.ndarray:
    """The rows of the runs that a lane keeps, in their order; what is said of their items is held against them."""
    kept = found.kept
    read = kept.most_tiles if kept.num_read is None else -(-int(kept.num_read[lane]) // 8)
    starts, stops, counts, positions = (np.asarray(x)[lane, : 64 * read].reshape(-1, 64) for x in kept[:4])
    items = np.asarray(kept.tile_items)[:read, lane]
    for tile, number in zip(zip(starts, stops, strict=True), items, strict=True):
        rows = np.concatenate([np.arange(*run) for run in zip(*tile, strict=True)])
        assert number == len(np.unique(rows // 8))  # a granule once, however many runs of a tile meet in it
    np.testing.assert_array_equal(counts.sum(axis=1), items)
    np.testing.assert_array_equal(positions, np.cumsum(counts, axis=1) - counts)
    return reference_decode.rows_of(kept, lane)


def check(sizes, B=1, K=2, G=4, H=64, L=2, S=800, fraction=0.4, dead=0.1, seed=0, unit=1):
    """Exactly the rows of the reference are listed, and of lower levels nothing is read but children of survivors."""
    rng = np.random.default_rng(seed)
    R = -(-S // 8) * 8
    levels, layer = random_levels(rng, L, K, H, sizes, S, dead, unit), L - 1
    q = np.asarray(jnp.asarray(2 * rng.standard_normal((B, K, G, H)), jnp.bfloat16))
    log_T = thresholds(q.astype(np.float64), levels, layer, fraction)
    active = np.arange(B) != 1  # a second user who takes no part
    granules = np.zeros((len(sizes), B * K), int)
    whole = all(L * K * size % 8 == 0 for size in sizes)  # else a layer is copied, heads then beginning on granules
    touched = [np.zeros(level.counts.shape, bool) for level in levels]
    wanted = []
    for b, k in np.ndindex(B, K):
        heads = [level.of_head(layer, k) for level in levels]
        found = reference_decode.descend(q[b, k].astype(np.float64), heads, log_T)
        wanted.append(reference_decode.kept_rows(found[-1][1], heads[-1].starts, heads[-1].counts) if active[b] else [])
        for depth in range(1, len(levels)):
            above = heads[depth - 1]
            children = reference_decode.kept_rows(found[depth - 1][1], above.child_starts, above.child_counts)
            children = children if active[b] else children[:0]
            touched[depth][layer, k, children] = True
            before = (layer * K + k) * sizes[depth] % 8 if whole else 0
            granules[depth, b * K + k] = len(np.unique((children + before) // 8))
    for depth in range(1, len(levels)):
        levels[depth].centroids[~touched[depth]] = np.nan
    with mosaic.interpret():
        run = jax.jit(lambda q, levels, active: decode.select(q, levels, step_of(active, layer, log_T), R))
        found = run(q, levels, active)
    for lane, rows in enumerate(wanted):
        np.testing.assert_array_equal(np.sort(rows_kept(found, lane)), rows)  # heads begin with a granule of rows
        assert int(found.num_kept.reshape(-1)[lane]) == len(rows)
    np.testing.assert_array_equal(found.num_read[0], np.full(K, -(-sizes[0] // 8)))
    for depth in range(1, len(levels)):
        read = np.asarray(found.num_read[depth])
        assert (read >= granules[depth]).all()
        assert (read <= granules[depth] + -(-(sizes[depth - 1] + 7) // 64)).all(), (read, granules[depth])
    return found


def flat():
    check((130,))
    check((70,), B=3, K=1, G=9, L=1)
    check((40,), G=1, H=256)  # fewer clusters than a tile
    check((64,), K=1, G=16, H=96, S=120)  # many clusters to a granule
    check((70,), K=1, L=1, unit=8)  # whole granules
    check((65,), K=1, S=4000, fraction=1.0)  # nearly everything kept, long runs
    check((3,), K=1, L=1, S=40, dead=0.0)  # fewer clusters than a granule


def two_levels():
    """One survivor in ten: a fraction of the fine centroids is read."""
    found = check((100, 500), K=2, S=4000, fraction=0.1, dead=0.05)
    assert (np.asarray(found.num_read[1]) < 0.4 * 500 / 8).all()
    check((20, 133), B=3, S=700, seed=1)


def three_levels():
    check((6, 31, 150), B=2, K=3, L=1, S=900)  # planes that begin inside granules
    check((5, 40, 131), K=1, L=3, S=800, fraction=0.15, seed=2)


def deep():
    """Buffers and blocks of items that are used again and again: 30 tiles a CTA, at both levels."""
    count_ctas, centroid_scores.count_ctas = centroid_scores.count_ctas, lambda per_multiprocessor: 1
    try:
        check((1000, 1300), K=2, L=1, S=2600, fraction=0.8, dead=0.0)
    finally:
        centroid_scores.count_ctas = count_ctas


def no_survivor():
    """A lane that keeps nothing at the first level reads and lists nothing; another goes on."""
    rng = np.random.default_rng(0)
    levels = random_levels(rng, 1, 1, 64, (9, 60), 300)
    q = jnp.asarray(rng.standard_normal((2, 1, 4, 64)), jnp.bfloat16)
    with mosaic.interpret():
        active = np.array([True, False])
        run = jax.jit(lambda log_T: decode.select(q, levels, step_of(active, 0, log_T), 304))
        low, high = run(jnp.full(2, -jnp.inf)), run(jnp.array([jnp.inf, -jnp.inf]))
    np.testing.assert_array_equal(low.num_kept, [[300], [0]])
    np.testing.assert_array_equal(high.num_kept, [[0], [0]])
    np.testing.assert_array_equal(high.num_read[1], [0, 0])


def many_clusters():
    check((16500,), K=1, G=2, L=1, S=20000, fraction=0.02)  # more tiles than a block of statistics holds


def drawn():
    """Hypothesis draws hierarchies, within its own time limit."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    @settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def selection(data):
        sizes = sorted(data.draw(st.lists(st.integers(1, 100), min_size=1, max_size=3)))
        check(
            tuple(sizes), B=data.draw(st.integers(1, 2)), K=data.draw(st.integers(1, 2)),
            G=data.draw(st.integers(1, 16)), L=data.draw(st.integers(1, 2)),
            S=sizes[-1] + data.draw(st.integers(8, 900)), fraction=data.draw(st.floats(0.05, 0.9)),
            dead=data.draw(st.floats(0, 0.5)), seed=data.draw(st.integers(0, 99)),
        )  # fmt: skip

    selection()


if __name__ == "__main__":
    warnings.simplefilter("error")
    globals()[sys.argv[1]]()
