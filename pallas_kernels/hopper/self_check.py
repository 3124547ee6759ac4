"""Whether the kernels compute the right thing on this machine: a run of each, twice, against float64.

Sizes follow from the device: every CTA has some `TILES` tiles to work on, so that each ring in shared memory wraps
several times and stages, waits and releases meet in every order; lanes differ in length from nothing to most of the
rows. A kernel that hangs cannot be caught here; everything else that a new machine or compiler may do wrong can.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from squeezejax.pallas_kernels import codes
from squeezejax.pallas_kernels.hopper import decode, kmeans_assign, prefill, sparse_prefill
from squeezejax.pallas_kernels.hopper.mosaic import GRANULE, TILE, count_ctas
from squeezejax.pallas_kernels.oracle import decode as reference_decode
from squeezejax.pallas_kernels.oracle import kmeans as reference_kmeans
from squeezejax.pallas_kernels.oracle import prefill as reference_prefill

TILES = 30  # of work for each CTA, at the least
CHILDREN, MEMBERS = 5, 11  # of a coarse cluster, and keys of each child
LANES = 6  # three users of two heads
TIES = 48  # counts for which a threshold meets a score exactly
SAMPLE = 8  # lanes, and rows of each, that are compared where there are many
OUT_TOLERANCE, LSE_TOLERANCE, SCORE_TOLERANCE = 2e-2, 2e-3, 1e-4


class _Level(NamedTuple):
    """The fields of the tree's `Level` that kernels read, [1 K C …]."""

    counts: Any
    starts: Any = None
    centroids: Any = None
    parents: Any = None
    child_starts: Any = None
    child_counts: Any = None
    codes: Any = None
    steps: Any = None
    offset: Any = None
    spreads: Any = None

    def of_head(self, head: int) -> "_Level":
        return _Level(*(None if x is None else x[0, head] for x in self))


def decode_step(head_dim: int, group: int, dtype: str, *bits: int):
    """Raises ArithmeticError unless a step over a random two-level tree comes out right, and twice the same.

    bits are those of centroids and of keys by our rule, none for the paper's.
    """
    attention(head_dim, group, dtype)
    if bits:
        selection_by_codes(head_dim, group, dtype, *bits)


def selection_by_codes(head_dim: int, group: int, dtype: str, index_bits: int, key_bits: int):
    """Raises ArithmeticError unless our rule keeps the right keys of a random flat tree, and twice the same."""
    rng = np.random.default_rng(2)
    # Keys whose codes are read: half of the clusters', of three lanes in four, so that every CTA has its tiles.
    B, K, H = 2, 4, head_dim
    C = -(-TILES * 4 * count_ctas(1) * TILE // (B * K * 16 // 2))
    C, length = -(-C // GRANULE) * GRANULE, 16
    random = lambda *shape: rng.standard_normal(shape, dtype=np.float32)
    coded = lambda size, bits, *shape: (
        rng.integers(0, 256, (*shape, bits * H // 8), dtype=np.uint8),
        np.asarray(jnp.asarray(size * rng.uniform(0.5, 1.5, shape) / 2**bits, jnp.bfloat16)),
    )
    packed, steps = coded(2.0, index_bits, 1, K, C)
    spreads = np.asarray(jnp.asarray(0.3 * rng.random((1, K, C)), jnp.bfloat16))
    runs = _runs(K, C, length, ("starts", "counts"))
    level = _Level(**runs, codes=packed, steps=steps, offset=random(1, K, H), spreads=spreads)
    keys = coded(1.0, key_bits, 1, K, C * length) if key_bits else None
    sinks, line = random(1, K, 4, H), np.stack([random(1, K, group), 1 + 0.1 * random(1, K, group)], axis=-1)
    q = jnp.asarray(np.linspace(0.5, 2, B)[:, None, None, None] * random(B, K, group, H), dtype)

    def reference(b, k, log_T):
        of_head = keys and tuple(x[0, k] for x in keys)
        rows = np.asarray(q[b, k], np.float64)
        return reference_decode.descend_codes(
            rows, [level.of_head(k)], of_head, sinks[0, k], line[0, k].astype(np.float64), log_T, codes.rotation(H)
        )

    log_T = []
    for depth in range(1 + (key_bits > 0)):
        found = [reference(b, k, [*log_T, 0.0])[depth][0] for b, k in np.ndindex(B, K)]
        log_T.append(_in_widest_gap(np.concatenate(found)))
    zero = jnp.zeros(B, jnp.int32)
    step = decode.Step(zero[:1], jnp.asarray(log_T, jnp.float32), zero, zero + 1)
    index = decode.Index((level,), *(keys or (None, None)), sinks, line)
    select = jax.jit(lambda q, index: decode.select(q, index, step, C * length).lists)
    first, second = (jax.device_get(select(q, index)) for _ in range(2))
    for b, k in np.ndindex(B, K):
        rows, again = (np.sort(reference_decode.rows_of(lists, b * K + k)) for lists in (first, second))
        _require(np.array_equal(rows, again), "two runs differ")
        log_A, want = reference(b, k, log_T)[-1]
        if not key_bits:
            log_A, want = np.repeat(log_A, length), np.repeat(want, length)
        kept = np.isin(np.arange(C * length), rows)
        near = np.abs(log_A - log_T[-1]) < SCORE_TOLERANCE  # of many scores some are within rounding
        _require(np.array_equal(kept[~near], want[~near]), "the keys kept are wrong")


def attention(head_dim: int, group: int, dtype: str):
    """Raises ArithmeticError unless a step by the paper's rule comes out right, and twice the same."""
    rng = np.random.default_rng(0)
    # Of 5 users one takes no part, and one is so sure of itself that it keeps little; the others keep about a quarter.
    coarse_clusters = max(24, -(-TILES * count_ctas(1) * TILE // (LANES * CHILDREN * MEMBERS // 4)))
    B, K, H, C = 5, LANES // 3, head_dim, coarse_clusters * CHILDREN
    S = C * MEMBERS
    random = lambda *shape: rng.standard_normal(shape, dtype=np.float32)
    coarse = _Level(
        centroids=random(1, K, coarse_clusters, H),
        **_runs(K, coarse_clusters, CHILDREN * MEMBERS, ("starts", "counts")),
        **_runs(K, coarse_clusters, CHILDREN, ("child_starts", "child_counts")),
    )  # fmt: skip
    fine = _Level(centroids=random(1, K, C, H), **_runs(K, C, MEMBERS, ("starts", "counts")))
    sure = np.array([0.5, 6.0, 1.0, 1.5, 1.0], np.float32)[:, None, None, None]
    q = jnp.asarray(sure * random(B, K, group, H), dtype)
    keys, values = (jnp.asarray(random(1, K, -(-S // 8) * 8, H), dtype) for _ in range(2))
    window, own = (jnp.asarray(random(*shape), dtype) for shape in ((1, K, 20, H), (B, 90, K, H)))
    cache = decode.Cache(keys, values, S, window, window, own, own)
    log_T, found = _thresholds(np.asarray(q, np.float64), coarse, fine)

    start = jnp.array([6, 88, 0, 64, 5], jnp.int32)
    lengths = jnp.array([7, 89, 1, 65, 0], jnp.int32)
    step = decode.Step(jnp.zeros(1, jnp.int32), jnp.asarray(log_T, jnp.float32), start, lengths)
    index = decode.Index((coarse, fine))
    attend = jax.jit(lambda q, cache, step: decode.attend_kept(q, cache._replace(num_keys=S), index, step))
    first, second = (jax.device_get(attend(q, cache, step)) for _ in range(2))
    _require(all(map(np.array_equal, first, second)), "two runs differ")
    out, lse, num_kept = first
    fixed, short = ([np.asarray(x, np.float32) for x in pair] for pair in ((keys, values), (window, own)))
    for b in range(B):
        kept = [reference_decode.kept_rows(found[b, k], fine.starts[0, k], fine.counts[0, k]) for k in range(K)]
        if lengths[b] <= start[b]:
            kept = [rows[:0] for rows in kept]
        wanted = sum(map(len, kept))
        _require(int(num_kept[b]) == wanted, f"{num_kept[b]} keys kept instead of {wanted}")
        for k, rows in enumerate(kept):
            beside = short[0][0, k], short[1][b, : lengths[b], k]
            used = [np.concatenate([x[0, k][rows], *beside]) for x in fixed]
            want, want_lse = reference_decode.attend_rows(np.asarray(q[b, k], np.float64), *used)
            _require(np.abs(out[b, k] - want).max() < OUT_TOLERANCE, "outputs are wrong")
            _require(np.abs(lse[b, k] - want_lse).max() < LSE_TOLERANCE, "log-sum-exps are wrong")
    ties(head_dim, group, dtype)


def ties(head_dim: int, group: int, dtype: str):
    """Raises ArithmeticError unless scores that equal a threshold which a CPU worked out are not above it.

    A cluster alone has the share 1/n of its n keys, and calibration makes that a threshold. Trees travel: logarithms
    here must be those of the machine that calibrated, to the last bit.
    """
    differing = differing_ties(head_dim, group, dtype)
    _require(not differing, f"clusters of {differing} keys tie otherwise with thresholds calibrated on a CPU")


def differing_ties(head_dim: int, group: int, dtype: str) -> list[int]:
    """Numbers of keys of a lone cluster for which `select` and a threshold calibrated on a CPU disagree."""
    rng = np.random.default_rng(1)
    numbers = np.unique(np.exp(rng.uniform(0, 13, TIES)).astype(int))
    try:
        cpu = jax.devices("cpu")[0]
    except RuntimeError:  # JAX was told to know none, so there is nothing to compare with
        return []
    with jax.default_device(cpu):
        thresholds = np.asarray(-jnp.log(jnp.asarray(numbers, jnp.float32)))
    q = jnp.asarray(rng.standard_normal((1, 8, group, head_dim)), dtype)
    centroids = jnp.asarray(rng.standard_normal((1, 8, 1, head_dim)), jnp.float32)

    @jax.jit
    def num_kept(count, log_T):
        counts, one = jnp.full((1, 8, 1), count, jnp.int32), jnp.ones((1, 8, 1), jnp.int32)
        # Which rows these are does not matter: one, so that no list is long.
        level = _Level(counts, 0 * one, centroids, child_starts=0 * one, child_counts=one)
        zero = jnp.zeros(1, jnp.int32)
        return decode.select(q, decode.Index((level,)), decode.Step(zero, log_T[None], zero, zero + 1), 8).num_kept

    kept = lambda number, log_T: np.asarray(num_kept(jnp.int32(number), jnp.float32(log_T)))
    return [
        int(n) for n, log_T in zip(numbers, thresholds, strict=True)
        if kept(n, log_T).any() or not kept(n, np.nextafter(log_T, np.float32(-np.inf))).all()
    ]  # fmt: skip


def prefill_blocks(head_dim: int, dtype: str):
    """Raises ArithmeticError unless a few blocks select and attend right, and twice the same."""
    block_attention(head_dim, dtype)
    block_selection(head_dim, dtype)


def block_attention(head_dim: int, dtype: str):
    """The same for attention alone, over random lists."""
    rng = np.random.default_rng(0)
    config = sparse_prefill.CONFIGS[head_dim]
    U, M, K = 6, 200, 2
    parts = np.array([1.0, 0.0, 0.01, 0.6, 0.9, 0.3])  # of the rows that each lane reads
    units = -(-M // config.unit)
    R = config.keys * max(4, -(-TILES * count_ctas(1) // int(units * parts.sum())))
    random = lambda *shape: jnp.asarray(rng.standard_normal(shape, dtype=np.float32), dtype)
    q, keys, values = random(U, M, head_dim), random(1, K, R, head_dim), random(1, K, R, head_dim)
    granules = np.stack([rng.permutation(R // 8) for _ in range(U)])
    items = (granules * 256 + rng.integers(1, 256, granules.shape)).astype(np.int32)
    counts = np.ceil(parts * (R // 8)).astype(np.int32)
    attend = jax.jit(lambda *arguments: sparse_prefill.attend_items(*arguments))
    first, second = (jax.device_get(attend(q, keys, values, items, counts, jnp.int32(0))) for _ in range(2))
    _require(all(map(np.array_equal, first, second)), "two runs differ")
    rows = np.unique(np.concatenate([np.arange(0, M, M // SAMPLE), [M - 1]]))
    out, lse = (x[:, rows] for x in first)
    want, want_lse = reference_prefill.attend_items(
        np.asarray(q)[:, rows], *map(np.asarray, (keys, values)), items, counts, 0
    )
    _require(np.abs(out - want).max() < OUT_TOLERANCE, "outputs are wrong")
    _require(np.abs(lse - want_lse)[counts > 0].max() < LSE_TOLERANCE, "log-sum-exps are wrong")


def block_selection(head_dim: int, dtype: str):
    """Raises ArithmeticError unless blocks keep the right clusters of a random two-level tree, and twice the same."""
    rng = np.random.default_rng(0)
    # Clusters are cut into as many parts as fill the machine: with this many lanes into one, of all tiles.
    lanes = 4 * count_ctas(1)
    K, H, coarse_clusters = 2, head_dim, max(24, TILES * 128 // CHILDREN)
    C = coarse_clusters * CHILDREN
    random = lambda *shape: rng.standard_normal(shape, dtype=np.float32)
    level = lambda counts, parents: _Level(
        counts.astype(np.int32), centroids=random(*counts.shape, H), parents=np.broadcast_to(parents, counts.shape)
    )
    counts = rng.integers(0, 2 * MEMBERS, (1, K, C))
    fine = level(counts, np.arange(C, dtype=np.int32) // CHILDREN)
    coarse = level(counts.reshape(1, K, coarse_clusters, CHILDREN).sum(axis=3), np.int32(0))
    M = 150
    q = jnp.asarray(2 * random(lanes, M, H), dtype)
    valid = np.arange(M)[None, :] < np.where(np.arange(lanes // K) % 2, 70, M)[:, None]
    sample = np.unique(np.concatenate([np.arange(0, lanes, max(1, lanes // SAMPLE)), [1, 2, 3, lanes - 1]]))
    rows = np.asarray(q, np.float64)[sample]

    def reference(i, levels, log_T):
        u = sample[i]
        of_head = [x.of_head(u % K) for x in levels]
        return reference_prefill.kept_clusters(rows[i], valid[u // K], of_head, log_T)[-1]

    log_T = []
    for depth in range(2):
        levels = (coarse, fine)[: depth + 1]
        found = [reference(i, levels, [*log_T, 0.0])[0] for i in range(len(sample))]
        log_T.append(_in_widest_gap(np.concatenate(found)))
    select = jax.jit(lambda q, log_T: prefill.select(q, valid, (coarse, fine), jnp.int32(0), log_T))
    first, second = (jax.device_get(select(q, jnp.asarray(log_T, jnp.float32))) for _ in range(2))
    _require(np.array_equal(first, second), "two runs differ")
    for i, u in enumerate(sample):
        log_A, want = reference(i, (coarse, fine), log_T)
        near = np.abs(log_A - log_T[-1]) < SCORE_TOLERANCE  # of many scores some are within rounding
        _require(np.array_equal(first[u][~near], want[~near]), "the clusters kept are wrong")
    # A share that equals its threshold is not above it.
    one = level(np.full((1, K, 1), 7), np.int32(0))
    kept = jax.jit(lambda q, log_T: prefill.select(q, valid, (one,), jnp.int32(0), log_T))(
        q, -jnp.log(jnp.full(1, 7.0))
    )
    _require(not kept.any(), "a share equal to its threshold was kept")


def assignment(head_dim: int):
    """Raises ArithmeticError unless the nearest two centres of random rows are right, and twice the same."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((TILES * kmeans_assign.TILE + 7, head_dim))  # every CTA meets all of them
    near = np.linspace(0, len(centres) - 1, 700).astype(int)  # of every tile, the last one and its padding as well
    rows = centres[near] + rng.standard_normal((700, head_dim))
    rows, centres = (jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), jnp.bfloat16) for x in (rows, centres))
    nearest = jax.jit(lambda rows, centres: kmeans_assign.nearest(rows, centres, with_second=True))
    first, second = (jax.device_get(nearest(rows, centres)) for _ in range(2))
    _require(all(map(np.array_equal, first, second)), "two runs differ")
    _, best, _, next_best = reference_kmeans.nearest(rows, centres)
    scores = np.asarray(rows, np.float64) @ np.asarray(centres, np.float64).T
    for number, score, want in ((first.labels, first.best, best), (first.fallback, first.second, next_best)):
        chosen = np.take_along_axis(scores, number[:, None], axis=1)[:, 0]
        _require(np.abs(score - want).max() < SCORE_TOLERANCE, "scores are wrong")
        _require((want - chosen).max() < SCORE_TOLERANCE, "centres are wrong")
    _require((first.labels != first.fallback).all(), "one centre is nearest twice")


def _runs(K: int, C: int, length: int, names) -> dict:
    starts = np.broadcast_to(np.arange(C, dtype=np.int32) * length, (1, K, C))
    return dict(zip(names, (starts, np.full((1, K, C), length, np.int32)), strict=True))


def _thresholds(q, coarse, fine):
    """(log T, kept bool[B K C]): half of the coarse clusters, half of their children, in the widest gaps near by."""
    log_T, (B, K) = [], q.shape[:2]
    for depth in range(2):
        heads = [[level.of_head(k) for level in (coarse, fine)[: depth + 1]] for k in range(K)]
        scores = np.stack(
            [[reference_decode.descend(q[b, k], heads[k], [*log_T, 0.0])[-1][0] for k in range(K)] for b in range(B)]
        )
        log_T.append(_in_widest_gap(scores.reshape(-1)))
    return log_T, scores > log_T[-1]


def _in_widest_gap(scores) -> float:
    """A threshold that keeps about half of the scores that are finite, and is near none of them."""
    scores = np.sort(scores[np.isfinite(scores)])
    middle = len(scores) // 2
    near = max(6, len(scores) // 50)
    at = middle + int(np.argmax(np.diff(scores[middle : middle + near])))
    return float(scores[at : at + 2].mean())


def _require(condition, message: str):
    if not condition:
        raise ArithmeticError(message)
