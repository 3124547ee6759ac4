"""Looking up the kept clusters by the kernels, interpreted, against float64: a program with the name of one check."""

import contextlib
import sys
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from squeezejax.pallas_kernels import codes
from squeezejax.pallas_kernels.hopper import decode, mosaic, scores
from squeezejax.pallas_kernels.oracle import decode as reference_decode


class RandomLevel(NamedTuple):
    """The fields of the tree's `Level` that kernels read, [L K C …]."""

    centroids: Any
    counts: Any
    starts: Any
    child_starts: Any = None
    child_counts: Any = None
    codes: Any = None
    steps: Any = None
    offset: Any = None
    spreads: Any = None

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


def threshold_near(scores, quantile: float) -> float:
    """A number near a quantile of the scores that are finite, in the widest gap there."""
    scores = np.sort(scores[np.isfinite(scores)])
    wanted = int(quantile * (len(scores) - 1))
    near = range(max(0, wanted - 4), min(len(scores) - 1, wanted + 5))
    at = max(near, key=lambda i: scores[i + 1] - scores[i]) if near else 0
    return float(scores[at : at + 2].mean()) if scores.size else 0.0


def thresholds(q, levels, layer: int, fraction: float):
    """log T f32[levels] at which every level keeps about `fraction` of what reaches it, no score near one."""
    log_T = []
    for depth in range(len(levels)):
        scores = [
            reference_decode.descend(q[b, k], [x.of_head(layer, k) for x in levels[: depth + 1]], [*log_T, 0.0])[-1][0]
            for b, k in np.ndindex(q.shape[:2])
        ]
        log_T.append(threshold_near(np.concatenate(scores), 1 - fraction))
    return log_T


def random_codes(rng, bits: int, *shape, size=1.0):
    """(codes u8[… bits·H/8], steps bf16[…]) of rows of about such a size, shape [… H]."""
    *lead, H = shape
    packed = rng.integers(0, 256, (*lead, bits * H // 8)).astype(np.uint8)
    return packed, np.array(jnp.asarray(size * rng.uniform(0.5, 1.5, lead) / 2**bits, jnp.bfloat16))


def check_codes(
    sizes, B=1, K=2, G=4, H=64, L=2, S=800, bits=(4, 2), sinks=4, fraction=0.4, dead=0.1, seed=0, unit=8, spread=0.3
):
    """By our rule, exactly the reference's keys are listed; codes of other clusters' keys are not read."""
    rng = np.random.default_rng(seed)
    R, layer, turn = -(-S // 8) * 8, L - 1, codes.rotation(H)
    levels = []
    for level in random_levels(rng, L, K, H, sizes, S, dead, unit):
        packed, steps = random_codes(rng, bits[0], *level.centroids.shape, size=2.0)
        offset = rng.standard_normal((L, K, H)).astype(np.float32)
        spreads = np.array(jnp.asarray(spread * rng.random(level.counts.shape), jnp.bfloat16))
        levels.append(level._replace(centroids=None, codes=packed, steps=steps, offset=offset, spreads=spreads))
    key_codes, key_steps = random_codes(rng, bits[1], L, K, R, H) if bits[1] else (None, None)
    sink_keys = rng.standard_normal((L, K, sinks, H)).astype(np.float32)
    lines = np.stack([rng.uniform(-1, 1, (L, K, G)), rng.uniform(0.9, 1.1, (L, K, G))], axis=-1).astype(np.float32)
    q = np.asarray(jnp.asarray(2 * rng.standard_normal((B, K, G, H)), jnp.bfloat16))
    active = np.arange(B) != 1

    def descend(b, k, log_T):
        keys = None if key_codes is None else (key_codes[layer, k], key_steps[layer, k])
        heads = [level.of_head(layer, k) for level in levels]
        return reference_decode.descend_codes(
            q[b, k].astype(np.float64),
            heads,
            keys,
            sink_keys[layer, k],
            lines[layer, k].astype(np.float64),
            log_T,
            turn,
        )

    log_T = []
    for depth in range(len(sizes) + (bits[1] > 0)):
        found = [descend(b, k, [*log_T, *[0.0] * (9 - depth)])[depth][0] for b, k in np.ndindex(B, K)]
        log_T.append(threshold_near(np.concatenate(found), 1 - fraction))
    wanted = []
    for b, k in np.ndindex(B, K):
        found = descend(b, k, log_T)
        finest = levels[-1].of_head(layer, k)
        rows = reference_decode.kept_rows(found[len(sizes) - 1][1], finest.starts, finest.counts)
        wanted.append(np.sort(np.flatnonzero(found[-1][1])) if bits[1] else rows)
        if B == 1 and bits[1]:
            key_steps[layer, k, np.setdiff1d(np.arange(R), rows)] = np.nan
    index = decode.Index(tuple(levels), key_codes, key_steps, sink_keys, lines)
    with mosaic.interpret():
        run = jax.jit(lambda q, index, active: decode.select(q, index, step_of(active, layer, log_T), R))
        found = run(q, index, active)
    for lane, rows in enumerate(wanted):
        rows = rows if active[lane // K] else rows[:0]
        np.testing.assert_array_equal(np.sort(reference_decode.rows_of(found.lists, lane)), rows)
        assert int(found.num_kept.reshape(-1)[lane]) == len(rows)
    return found


def step_of(active, layer: int, log_T) -> decode.Step:
    """A step of users of whom those not active take no part."""
    start = jnp.where(active, 0, 1).astype(jnp.int32)
    return decode.Step(jnp.full(1, layer, jnp.int32), jnp.asarray(log_T, jnp.float32), start, jnp.ones_like(start))


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
            starts, counts = (
                np.asarray(x)[found[depth - 1][1] & active[b]] for x in (above.child_starts, above.child_counts)
            )
            first, last = (starts + before) // 8, (starts + before + counts - 1) // 8
            granules[depth, b * K + k] = (last - first + 1)[counts > 0].sum()
    for depth in range(1, len(levels)):
        levels[depth].centroids[~touched[depth]] = np.nan
    with mosaic.interpret():
        index = lambda levels: decode.Index(tuple(levels))
        run = jax.jit(lambda q, levels, active: decode.select(q, index(levels), step_of(active, layer, log_T), R))
        found = run(q, levels, active)
    for lane, rows in enumerate(wanted):
        # Heads begin with a granule of rows.
        np.testing.assert_array_equal(np.sort(reference_decode.rows_of(found.lists, lane)), rows)
        assert int(found.num_kept.reshape(-1)[lane]) == len(rows)
    for depth in range(1, len(levels)):
        np.testing.assert_array_equal(found.num_read[depth].reshape(-1), -(-granules[depth] // 8))
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
    assert (np.asarray(found.num_read[1]) < 0.5 * 500 / 64).all()
    check((20, 133), B=3, S=700, seed=1)


def three_levels():
    check((6, 31, 150), B=2, K=3, L=1, S=900)  # planes that begin inside granules
    check((5, 40, 131), K=1, L=3, S=800, fraction=0.15, seed=2)


def deep():
    """Buffers that are used again and again: 30 tiles a CTA, at both levels."""
    with one_cta():
        check((1000, 1300), K=2, L=1, S=2600, fraction=0.8, dead=0.0)


@contextlib.contextmanager
def one_cta():
    """Scoring is one CTA's work."""
    count_ctas, scores.count_ctas = scores.count_ctas, lambda per_multiprocessor: 1
    try:
        yield
    finally:
        scores.count_ctas = count_ctas


def codes_flat():
    """The default index; other numbers of bits; no codes of keys, no sinks; clusters of any size; all heads."""
    check_codes((70,), unit=1)
    check_codes((40,), bits=(8, 4), H=128, G=9, L=1, K=1)
    check_codes((40,), bits=(4, 0), L=1, K=1)
    check_codes((64,), B=3, G=1, bits=(8, 1), H=256, K=1, sinks=0)


def codes_levels():
    check_codes((20, 90), B=2, unit=1)


def codes_deep():
    """Buffers that are used again and again: 30 tiles a CTA, of codes of clusters and of keys."""
    with one_cta():
        check_codes((1300,), K=1, L=1, S=2600, unit=1, fraction=0.8, dead=0.0)


def no_survivor():
    """A lane that keeps nothing at the first level reads and lists nothing; another goes on."""
    rng = np.random.default_rng(0)
    levels = random_levels(rng, 1, 1, 64, (9, 60), 300)
    q = jnp.asarray(rng.standard_normal((2, 1, 4, 64)), jnp.bfloat16)
    with mosaic.interpret():
        active = np.array([True, False])
        run = jax.jit(lambda log_T: decode.select(q, decode.Index(tuple(levels)), step_of(active, 0, log_T), 304))
        low, high = run(jnp.full(2, -jnp.inf)), run(jnp.array([jnp.inf, -jnp.inf]))
    np.testing.assert_array_equal(low.num_kept, [[300], [0]])
    np.testing.assert_array_equal(high.num_kept, [[0], [0]])
    np.testing.assert_array_equal(high.num_read[1], [[0], [0]])


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
