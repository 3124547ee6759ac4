"""The iterations of K-means in either metric: k-means++ in batches, swap rounds against poor local optima, Lloyd steps.

Letters as in kmeans.py; M candidates are drawn at once. Both metrics look for the centre of the highest score, and
half the squared distance of a row is what its score lacks of the highest that a centre could have:

    cosine     score = x·c           unit rows, centres the directions of their sums     highest = 1
    euclidean  score = x·c − ½|c|²   rows within the unit ball, centres their means      highest = ½|x|²

Scores are laid out [C rows], because XLA:CPU vectorises a maximum over the leading axis, and exist for one chunk of
rows at a time.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from squeezejax.pallas_kernels.xla.segment_sums import segment_sum

_SEED_BATCH = 16  # k-means++ centres drawn at once: more are faster and start worse
_KERNEL_SEED_BATCH = 128  # a tile of the kernel: every batch reads all rows once, and that decides there
_MOVE_SHARE = 2  # at most C / 2 centres move in one swap round
_MOVE_GAIN = 2.0  # a move must promise this many times what it costs: the gains of several moves overlap
_SCORE_DTYPE = jnp.bfloat16  # a quarter faster than float32 on a CPU, no consistent loss seen (benchmarks/notes)
_CHUNK_SCORES = 1 << 20  # scores held at once, so that they stay in cache
_DRAW_BLOCK = 128
_ABSENT = -1.75  # the score of a centre that is not there: below −1.5, the lowest of either metric, and above −2


class Rows(NamedTuple):
    """What the iterations read: rows as the metric sees them, also in chunks, and how much each counts."""

    points: jax.Array  # f32[S H]: rows / max(norm, 1e-12), or centred, dimensions weighted, in the unit ball
    chunks: jax.Array  # bf16[chunks rows H], the same, padded to whole chunks
    weights: jax.Array  # f32[S], 0 for rows without a direction
    highest: jax.Array | float  # f32[S] or 1, the score of a centre at the row itself
    scale: jax.Array | None  # f32[], what Euclidean points were divided by; None: the metric is cosine
    kernel: Callable | None  # finds the nearest centres on a GPU; None: plain XLA, a chunk at a time


class _Fit(NamedTuple):
    """Each row's best and second best centre."""

    labels: jax.Array  # i32[S]
    best: jax.Array  # f32[S], score of the nearest centre
    fallback: jax.Array | None  # i32[S], the next one
    second: jax.Array | None  # f32[S], score of that


class _Lloyd(NamedTuple):
    """State of the Lloyd loop."""

    step: jax.Array  # i32[]
    centres: jax.Array  # f32[C H]
    labels: jax.Array  # i32[S], that gave these centres
    before: jax.Array  # f32[], Σ weight · half the squared distance at the last assignment but one
    now: jax.Array  # f32[], at the last one


def cosine_rows(raw, weights, num_clusters, kernel) -> Rows:
    """Rows for clusters by direction; raw f32[S H], of rows of weight 0 zeros."""
    norm = jnp.linalg.norm(raw, axis=1)
    unit = raw / jnp.maximum(norm, 1e-12)[:, None]
    weights = jnp.where(norm > 1e-12, weights, 0.0)
    return Rows(unit, _chunks(unit, num_clusters, kernel), weights, 1.0, None, kernel)


def euclidean_rows(raw, weights, num_clusters, dimension_weights) -> Rows:
    """Rows for clusters by distance; raw f32[S H], weights f32[S] ≥ 0, dimension_weights f32[H]."""
    total = jnp.maximum(jnp.sum(weights), jnp.finfo(jnp.float32).tiny)
    # Distances do not change by it, but what is far from the origin loses its differences to rounding.
    mean = jnp.einsum("S,SH->H", weights, raw) / total
    points = jnp.where((weights > 0)[:, None], (raw - mean[None]) * dimension_weights[None], 0.0)
    norm = jnp.linalg.norm(points, axis=1)
    scale = jnp.maximum(jnp.max(norm), 1e-12)  # scores are packed as numbers between −2 and 2
    points = points / scale
    highest = 0.5 * jnp.sum(points * points, axis=1)
    return Rows(points, _chunks(points, num_clusters, None), weights, highest, scale, None)


def _chunks(points, num_clusters, kernel):
    S, H = points.shape
    # The kernel takes all rows at once, and would pad them to its blocks at every call.
    size = S + -S % 256 if kernel else min(S, max(64, min(512, _CHUNK_SCORES // num_clusters)))
    return jnp.pad(points.astype(_SCORE_DTYPE), ((0, -S % size), (0, 0))).reshape(-1, size, H)


def partition(rows: Rows, num_clusters, key, rounds, steps, tolerance, present=None):
    """Labels i32[S] of num_clusters clusters, some perhaps empty, and how many Lloyd steps ran, i32[].

    rounds of a Lloyd step and swaps, then at most `steps` Lloyd steps; `present` i32[] ≥ 1: only so many clusters, the
    first ones, exist; None = all.
    """
    seed_key, swap_key = jax.random.split(key)
    with jax.named_scope("seed"):
        centres = _seed(rows, seed_key, num_clusters)
    with jax.named_scope("swap"):
        centres = jax.lax.fori_loop(
            0, rounds, lambda i, c: _swap_round(rows, c, jax.random.fold_in(swap_key, i), present), centres
        )
    with jax.named_scope("lloyd"):
        labels, ran = _lloyd(rows, centres, steps, tolerance, present)
    return labels, rounds + ran


def centres_of(rows: Rows, labels, num_clusters):
    """Centres f32[C H] of clusters: unit means, or means; zero for an empty cluster."""
    sums = segment_sum(rows.points * rows.weights[:, None], labels, num_clusters)
    if rows.scale is None:
        return sums / jnp.maximum(jnp.linalg.norm(sums, axis=1), 1e-12)[:, None]
    total = segment_sum(rows.weights, labels, num_clusters)
    return sums / jnp.where(total > 0, total, 1.0)[:, None]


def half_distances(rows: Rows, labels, num_clusters):
    """Half the squared distance f32[S] of every row from its centre, in units of `scale`."""
    centres = centres_of(rows, labels, num_clusters)[labels]
    if rows.scale is None:
        return 1 - jnp.einsum("SH,SH->S", rows.points, centres)
    difference = rows.points - centres
    return 0.5 * jnp.sum(difference * difference, axis=1)


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


def _seed(rows: Rows, key, num_clusters):
    """k-means++ (Arthur and Vassilvitskii 2007), a batch of centres drawn at each step -> f32[C H]."""
    C, H = num_clusters, rows.points.shape[1]
    batch = max(1, min(_KERNEL_SEED_BATCH if rows.kernel else _SEED_BATCH, C // 8))
    steps = -(-C // batch)

    def step(i, state):
        centres, mass = state
        drawn = rows.points[_draw(jax.random.fold_in(key, i), mass, batch)]
        if rows.kernel:
            nearest = _assign(rows, drawn).best
        else:
            scores = jnp.einsum("MH,SH->MS", drawn, rows.points)
            bias = _bias(rows, drawn)
            nearest = jnp.max(scores if bias is None else scores + bias[:, None], axis=0)
        mass = jnp.minimum(mass, _potential(rows, nearest))
        return jax.lax.dynamic_update_slice_in_dim(centres, drawn, i * batch, axis=0), mass

    centres = jnp.zeros((steps * batch, H), jnp.float32)
    return jax.lax.fori_loop(0, steps, step, (centres, rows.weights))[0][:C]


def _bias(rows: Rows, centres):
    """What is added to the products of a centre, f32[C]; None = nothing."""
    return None if rows.scale is None else -0.5 * jnp.sum(centres * centres, axis=1)


def _assign(rows: Rows, centres, with_second: bool = False, present=None) -> _Fit:
    """Nearest two of centres f32[C H] for every row; with one centre, the second has a score of −2.

    The second may be missing unless `with_second`: plain XLA drops what nobody reads, a kernel has to be told.
    """
    C = centres.shape[0]
    if rows.kernel and present is None:
        found = rows.kernel(rows.chunks[0], centres.astype(_SCORE_DTYPE), with_second=with_second)
        return _Fit(*(None if a is None else a[: rows.points.shape[0]] for a in found))
    bits = max(1, math.ceil(math.log2(C)))  # of a centre's number
    scale = 2.0 ** (30 - bits)
    centres = centres.astype(_SCORE_DTYPE)
    # Of the rounded centres: a row is with the nearest of these, and its score is never above `highest`.
    bias = _bias(rows, centres.astype(jnp.float32))

    def one(chunk):
        scores = jnp.einsum("CH,SH->CS", centres, chunk, preferred_element_type=jnp.float32)
        if bias is not None:
            scores = scores + bias[:, None]
        number = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
        if present is not None:
            scores = jnp.where(number < present, scores, _ABSENT)
        # Score and centre packed into one integer, the low bits counting down so that ties go to the first centre:
        # one maximum finds both. What is cut off is below the rounding of the scores.
        rank = C - 1 - number
        packed = ((scores * scale).astype(jnp.int32) << bits) | rank
        best = jnp.max(packed, axis=0)
        return best, jnp.max(jnp.where(packed == best[None], jnp.iinfo(jnp.int32).min, packed), axis=0)

    best, second = (a.reshape(-1)[: rows.points.shape[0]] for a in jax.lax.map(one, rows.chunks))
    (best, labels), (second, fallback) = (
        ((packed >> bits).astype(jnp.float32) / scale, C - 1 - (packed & ((1 << bits) - 1)))
        for packed in (best, second)
    )
    return _Fit(labels, best, fallback, second)


def _potential(rows: Rows, score):
    """Weight times half the squared distance, f32[S], of rows from centres of score f32[S]."""
    return rows.weights * jnp.maximum(rows.highest - score, 0.0)


def _swap_round(rows: Rows, centres, key, present=None):
    """A Lloyd step, then moves of centres that cost least to where they gain most -> centres f32[C H].

    Cost: what the rows of a cluster lose when each goes to its second best centre. Gain: what rows win by a
    candidate, each row counted for its best candidate only.
    """
    C = centres.shape[0]
    moves = max(1, C // _MOVE_SHARE)
    fit = _assign(rows, centres, with_second=True, present=present)
    centres = centres_of(rows, fit.labels, C)
    potential = _potential(rows, fit.best)
    drawn = rows.points[_draw(key, potential, moves)]
    offer = _assign(rows, drawn)
    gain = segment_sum(jnp.maximum(potential - _potential(rows, offer.best), 0.0), offer.labels, moves)
    cost = segment_sum(_potential(rows, fit.second) - potential, fit.labels, C)
    if present is not None:
        cost = jnp.where(jnp.arange(C) < present, cost, jnp.inf)
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


def _lloyd(rows: Rows, centres, steps, tolerance, present=None):
    """At most `steps` Lloyd steps -> labels i32[S] of the last one, and how many ran."""
    C = centres.shape[0]
    if steps == 0:
        return _assign(rows, centres, present=present).labels, jnp.int32(0)

    def going(state: _Lloyd):
        improving = state.before - state.now > tolerance * state.before
        return (state.step < steps) & (improving | (state.step < 2))

    def step(state: _Lloyd):
        fit = _assign(rows, state.centres, present=present)
        centres = centres_of(rows, fit.labels, C)
        return _Lloyd(state.step + 1, centres, fit.labels, state.now, jnp.sum(_potential(rows, fit.best)))

    zero = jnp.float32(0)
    end = jax.lax.while_loop(
        going, step, _Lloyd(jnp.int32(0), centres, jnp.zeros(rows.points.shape[0], jnp.int32), zero, zero)
    )
    return end.labels, end.step
