"""Spherical K-means of one head's keys: k-means++ in batches, swap rounds that leave poor local optima, Lloyd steps.

Letters: S rows (keys), C clusters, H head dimension, M candidates drawn at once. Everything is written for one head;
callers `vmap` it over heads and layers. Scores are laid out [C rows], because XLA:CPU vectorises a maximum over the
leading axis, and exist for one chunk of rows at a time.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from squeezejax.pallas_kernels import registry
from squeezejax.pallas_kernels.xla.segment_sums import segment_sum

_SEED_BATCH = 16  # k-means++ centres drawn at once: more are faster and start worse
_KERNEL_SEED_BATCH = 128  # a tile of the kernel: every batch reads all rows once, and that decides there
_MOVE_SHARE = 2  # at most C / 2 centres move in one swap round
_MOVE_GAIN = 2.0  # a move must promise this many times what it costs: the gains of several moves overlap
_SCORE_DTYPE = jnp.bfloat16  # a quarter faster than float32 on a CPU, no consistent loss seen (benchmarks/NOTES.md)
_CHUNK_SCORES = 1 << 20  # scores held at once, so that they stay in cache
_DRAW_BLOCK = 128


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["centroids", "labels", "counts", "inertia", "iterations"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class KMeans:
    """The clusters of S rows."""

    centroids: jax.Array  # f32[C H], weighted means of the raw rows
    labels: jax.Array  # i32[S], cluster of each row
    counts: jax.Array  # i32[C], rows in each cluster, rows of weight 0 included; never 0
    inertia: jax.Array  # f32[], weighted mean over rows of 1 − cosine to the mean of the cluster's normalised rows
    iterations: jax.Array  # i32[], Lloyd steps that ran, those of the swap rounds included


class _Rows(NamedTuple):
    """What the iterations read: unit rows, also in chunks, and how much each counts."""

    unit: jax.Array  # f32[S H], rows / max(norm, 1e-12)
    chunks: jax.Array  # bf16[chunks rows H], the same, padded to whole chunks
    weights: jax.Array  # f32[S], 0 for rows without a direction
    kernel: Callable | None  # finds the nearest centres on a GPU; None: plain XLA, a chunk at a time


class _Fit(NamedTuple):
    """Each row's best and second best centre."""

    labels: jax.Array  # i32[S]
    best: jax.Array  # f32[S], cosine to the nearest centre
    fallback: jax.Array | None  # i32[S], the next one
    second: jax.Array | None  # f32[S], cosine to that


class _Lloyd(NamedTuple):
    """State of the Lloyd loop."""

    step: jax.Array  # i32[]
    centres: jax.Array  # f32[C H], unit
    labels: jax.Array  # i32[S], that gave these centres
    before: jax.Array  # f32[], Σ weight · (1 − cosine) at the last assignment but one
    now: jax.Array  # f32[], at the last one


def kmeans(
    x,
    num_clusters,
    *,
    key,
    weights=None,
    max_iterations=7,
    swap_rounds=5,
    tolerance=0.0,
    implementation: str | None = None,
) -> KMeans:
    """Cluster rows by direction and average the raw rows (arXiv 2411.09688, offline clustering of the keys).

    Args:
      x: f32 or bf16[S H], the rows of one head; `jax.vmap` for more.
      num_clusters: C, static, 1 ≤ C ≤ S.
      key: a JAX random key; equal keys and rows give equal results, bit for bit.
      weights: f32[S] or None: how often each row counts. A row of weight ≤ 0 influences nothing and gets a valid
        label all the same. With fewer than C rows of positive weight, surplus clusters hold rows of weight 0 and a
        zero centroid.
      max_iterations: Lloyd steps at most, static, ≥ 0; 0 assigns the rows to the k-means++ seeds.
      swap_rounds: how many of these steps, the first ones, are followed by swaps: centres that are cheap to remove
        move to where they gain at least twice that. They lower the inertia below that of Lloyd steps to convergence.
      tolerance: stop when a Lloyd step (after the swap rounds) lowers the inertia by no more than this fraction.
      implementation: "mosaic" assigns rows by the Hopper kernel, "xla" and None by plain XLA; see registry.py.

    Every cluster has a row, also where rows repeat. Rows of norm below 1e-12 have no direction: they go to any cluster
    and count in its mean. Non-finite rows are not looked for: they make centroids and inertia NaN, in clusters that
    are otherwise arbitrary but valid.

    Raises:
      ValueError: wrong rank or dtype, C outside 1 … S, a negative number of steps.
      NotImplementedError: a named implementation that cannot run here, or cannot take rows of this head size.
    """
    _check(x, num_clusters, weights, max_iterations, swap_rounds)
    weights = jnp.ones(x.shape[0], jnp.float32) if weights is None else jnp.asarray(weights, jnp.float32)
    rounds = min(swap_rounds, max(max_iterations - 1, 0))  # a swap without a step after it would stay unassigned
    backend = registry.choose(registry.resolve(implementation), "nearest", x.shape[1])
    kernel = None if backend.name == "xla" else backend.nearest
    return _kmeans(x, weights, key, tolerance, num_clusters, rounds, max_iterations - rounds, kernel)


def _check(x, num_clusters, weights, max_iterations, swap_rounds):
    shape, dtype = getattr(x, "shape", ()), getattr(x, "dtype", type(x))
    if len(shape) != 2 or dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(
            f"kmeans takes float32 or bfloat16 rows [S H], not {dtype} {list(shape)}; use jax.vmap for several heads."
        )
    if not 1 <= num_clusters <= x.shape[0]:
        raise ValueError(f"kmeans needs 1 to {x.shape[0]} clusters for {x.shape[0]} rows, not {num_clusters}.")
    if weights is not None and jnp.shape(weights) != x.shape[:1]:
        raise ValueError(f"kmeans takes one weight a row, [{x.shape[0]}], not {jnp.shape(weights)}.")
    if max_iterations < 0 or swap_rounds < 0:
        raise ValueError(f"max_iterations and swap_rounds are at least 0, not {max_iterations} and {swap_rounds}.")


@partial(jax.jit, static_argnames=("num_clusters", "rounds", "steps", "kernel"))
def _kmeans(x, weights, key, tolerance, num_clusters, rounds, steps, kernel):
    live = weights > 0
    weights = jnp.where(live, weights, 0.0)
    raw = jnp.where(live[:, None], x.astype(jnp.float32), 0.0)
    rows = _rows(raw, weights, num_clusters, kernel)
    seed_key, swap_key = jax.random.split(key)
    with jax.named_scope("seed"):
        centres = _seed(rows, seed_key, num_clusters)
    with jax.named_scope("swap"):
        centres = jax.lax.fori_loop(
            0, rounds, lambda i, c: _swap_round(rows, c, jax.random.fold_in(swap_key, i)), centres
        )
    with jax.named_scope("lloyd"):
        labels, ran = _lloyd(rows, centres, steps, tolerance)
    with jax.named_scope("finish"):
        labels = _fill_empty(rows, live, labels, num_clusters)
        directions = _directions(rows, labels, num_clusters)
        cosine = jnp.einsum("SH,SH->S", rows.unit, directions[labels])
        inertia = jnp.sum(weights * (1 - cosine)) / jnp.maximum(jnp.sum(weights), jnp.finfo(jnp.float32).tiny)
        counts = jax.ops.segment_sum(jnp.ones_like(labels), labels, num_clusters)
        return KMeans(
            _raw_means(raw, live, weights, labels, num_clusters),
            labels,
            counts,
            jnp.maximum(inertia, 0.0),
            rounds + ran,
        )


def _rows(raw, weights, num_clusters, kernel) -> _Rows:
    S, H = raw.shape
    norm = jnp.linalg.norm(raw, axis=1)
    unit = raw / jnp.maximum(norm, 1e-12)[:, None]
    # The kernel takes all rows at once, and would pad them to its blocks at every call.
    size = S + -S % 256 if kernel else min(S, max(64, min(512, _CHUNK_SCORES // num_clusters)))
    chunks = jnp.pad(unit.astype(_SCORE_DTYPE), ((0, -S % size), (0, 0))).reshape(-1, size, H)
    return _Rows(unit, chunks, jnp.where(norm > 1e-12, weights, 0.0), kernel)


def _draw(key, mass, num):
    """Row numbers i32[num], one from each of `num` equal strata of mass f32[S]; of mass 0 only if all are."""
    blocks = jnp.pad(mass, (0, -mass.shape[0] % _DRAW_BLOCK)).reshape(-1, _DRAW_BLOCK)
    # Two levels, because a cumulative sum over all rows costs more on a CPU than the distances do.
    ends = jnp.cumsum(jnp.sum(blocks, axis=1))
    strata = jnp.arange(num, dtype=jnp.float32) + jax.random.uniform(key, (num,))
    target = strata * (ends[-1] / num)
    block = _first_above(jnp.broadcast_to(ends, (num, ends.shape[0])), target)
    start = jnp.where(block > 0, ends[block - 1], 0.0)
    within = _first_above(jnp.cumsum(blocks[block], axis=1), target - start)
    return jnp.minimum(block * _DRAW_BLOCK + within, mass.shape[0] - 1)


def _first_above(ends, target):
    """First position of ends [M n] above target [M]; if rounding leaves none, the first that reaches the end value."""
    limit = jnp.where(target < ends[:, -1], target, jnp.nextafter(ends[:, -1], jnp.float32(-1)))
    return jnp.sum(ends <= limit[:, None], axis=1, dtype=jnp.int32)


def _seed(rows: _Rows, key, num_clusters):
    """k-means++ (Arthur and Vassilvitskii 2007), a batch of centres drawn at each step -> f32[C H]."""
    C, H = num_clusters, rows.unit.shape[1]
    batch = max(1, min(_KERNEL_SEED_BATCH if rows.kernel else _SEED_BATCH, C // 8))
    steps = -(-C // batch)

    def step(i, state):
        centres, mass = state
        drawn = rows.unit[_draw(jax.random.fold_in(key, i), mass, batch)]
        if rows.kernel:
            nearest = _assign(rows, drawn).best
        else:
            nearest = jnp.max(jnp.einsum("MH,SH->MS", drawn, rows.unit), axis=0)
        mass = jnp.minimum(mass, rows.weights * jnp.maximum(1 - nearest, 0.0))
        return jax.lax.dynamic_update_slice_in_dim(centres, drawn, i * batch, axis=0), mass

    centres = jnp.zeros((steps * batch, H), jnp.float32)
    return jax.lax.fori_loop(0, steps, step, (centres, rows.weights))[0][:C]


def _assign(rows: _Rows, centres, with_second: bool = False) -> _Fit:
    """Nearest two of centres f32[C H] for every row; with one centre, the second is a cosine of −2.

    The second may be missing unless `with_second`: plain XLA drops what nobody reads, a kernel has to be told.
    """
    C = centres.shape[0]
    if rows.kernel:
        found = rows.kernel(rows.chunks[0], centres.astype(_SCORE_DTYPE), with_second=with_second)
        return _Fit(*(None if a is None else a[: rows.unit.shape[0]] for a in found))
    bits = max(1, math.ceil(math.log2(C)))  # of a centre's number
    scale = 2.0 ** (30 - bits)
    centres = centres.astype(_SCORE_DTYPE)

    def one(chunk):
        scores = jnp.einsum("CH,SH->CS", centres, chunk, preferred_element_type=jnp.float32)
        # Score and centre packed into one integer, the low bits counting down so that ties go to the first centre:
        # one maximum finds both. What is cut off is below the rounding of the scores.
        rank = C - 1 - jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
        packed = ((scores * scale).astype(jnp.int32) << bits) | rank
        best = jnp.max(packed, axis=0)
        return best, jnp.max(jnp.where(packed == best[None], jnp.iinfo(jnp.int32).min, packed), axis=0)

    best, second = (a.reshape(-1)[: rows.unit.shape[0]] for a in jax.lax.map(one, rows.chunks))
    (best, labels), (second, fallback) = (
        ((packed >> bits).astype(jnp.float32) / scale, C - 1 - (packed & ((1 << bits) - 1)))
        for packed in (best, second)
    )
    return _Fit(labels, best, fallback, second)


def _directions(rows: _Rows, labels, num_clusters):
    """Unit means of each cluster's unit rows, f32[C H]; zero for an empty cluster."""
    sums = segment_sum(rows.unit * rows.weights[:, None], labels, num_clusters)
    return sums / jnp.maximum(jnp.linalg.norm(sums, axis=1), 1e-12)[:, None]


def _potential(rows: _Rows, best):
    """Weighted distance f32[S], half the squared Euclidean one, of rows at cosine best f32[S] from their centres."""
    return rows.weights * jnp.maximum(1 - best, 0.0)


def _swap_round(rows: _Rows, centres, key):
    """A Lloyd step, then moves of centres that cost least to where they gain most -> centres f32[C H].

    Cost: what the rows of a cluster lose when each goes to its second best centre. Gain: what rows win by a
    candidate, each row counted for its best candidate only.
    """
    C = centres.shape[0]
    moves = max(1, C // _MOVE_SHARE)
    fit = _assign(rows, centres, with_second=True)
    centres = _directions(rows, fit.labels, C)
    potential = _potential(rows, fit.best)
    drawn = rows.unit[_draw(key, potential, moves)]
    offer = _assign(rows, drawn)
    gain = segment_sum(jnp.maximum(potential - _potential(rows, offer.best), 0.0), offer.labels, moves)
    cost = segment_sum(_potential(rows, fit.second) - potential, fit.labels, C)
    gain, best = jax.lax.top_k(gain, moves)
    loss, cheapest = jax.lax.top_k(-_alone(fit, cost, moves), moves)
    accepted = (gain > 0) & (gain >= -_MOVE_GAIN * loss)
    return centres.at[jnp.where(accepted, cheapest, C)].set(drawn[best], mode="drop")


def _alone(fit: _Fit, cost, moves):
    """cost f32[C] among the `moves` cheapest, infinite where a cheaper one's rows fall back on this one or vice versa.

    Two centres that share a tight cluster are both cheap to remove, but not both at once.
    """
    C = cost.shape[0]
    order = jnp.argsort(cost)
    rank = jnp.zeros(C, jnp.int32).at[order].set(jnp.minimum(jnp.arange(C, dtype=jnp.int32), moves))
    own, other = rank[fit.labels], rank[fit.fallback]
    later = jnp.where(own > other, fit.labels, fit.fallback)
    barred = (rank == moves).at[jnp.where(jnp.maximum(own, other) < moves, later, C)].set(True, mode="drop")
    return jnp.where(barred, jnp.inf, cost)


def _lloyd(rows: _Rows, centres, steps, tolerance):
    """At most `steps` Lloyd steps -> labels i32[S] of the last one, and how many ran."""
    C = centres.shape[0]
    if steps == 0:
        return _assign(rows, centres).labels, jnp.int32(0)

    def going(state: _Lloyd):
        improving = state.before - state.now > tolerance * state.before
        return (state.step < steps) & (improving | (state.step < 2))

    def step(state: _Lloyd):
        fit = _assign(rows, state.centres)
        centres = _directions(rows, fit.labels, C)
        return _Lloyd(state.step + 1, centres, fit.labels, state.now, jnp.sum(_potential(rows, fit.best)))

    zero = jnp.float32(0)
    end = jax.lax.while_loop(
        going, step, _Lloyd(jnp.int32(0), centres, jnp.zeros(rows.unit.shape[0], jnp.int32), zero, zero)
    )
    return end.labels, end.step


def _fill_empty(rows: _Rows, live, labels, num_clusters):
    """Labels i32[S] with a row in every cluster: the worst-fitting rows that are not alone move to the empty ones."""
    S, C = labels.shape[0], num_clusters
    number = jnp.arange(S, dtype=jnp.int32)
    # The first live row of each cluster stays, so that no other cluster is emptied.
    first = jax.ops.segment_min(jnp.where(live, number, S), labels, C)
    cosine = jnp.einsum("SH,SH->S", rows.unit, _directions(rows, labels, C)[labels])
    misfit = jnp.where(live, 1 - cosine, -1.0)  # dead rows move when no live one is left
    misfit = jnp.where(first[labels] == number, -2.0, misfit)
    _, movers = jax.lax.top_k(misfit, C)
    empty = first >= S  # segment_min of nothing is the largest integer
    mover = movers[jnp.cumsum(empty, dtype=jnp.int32) - 1]
    return labels.at[jnp.where(empty, mover, S)].set(jnp.arange(C, dtype=jnp.int32), mode="drop")


def _raw_means(raw, live, weights, labels, num_clusters):
    """Weighted means of raw [S H] f32[C H]: the first live row plus the mean difference from it.

    Equal rows then give exactly that row, and calibration's ties stay ties.
    """
    S, C = labels.shape[0], num_clusters
    first = jax.ops.segment_min(jnp.where(live, jnp.arange(S, dtype=jnp.int32), S - 1), labels, C)
    base = raw[jnp.minimum(first, S - 1)]
    sums = segment_sum((raw - base[labels]) * weights[:, None], labels, C)
    total = segment_sum(weights, labels, C)
    return base + sums / jnp.where(total > 0, total, 1.0)[:, None]
