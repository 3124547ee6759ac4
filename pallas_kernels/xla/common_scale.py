"""Our rule: every level on the common scale of one denominator, down to single keys (docs/method.md, The index).

A cluster of n keys with centroid c and mean variance v a dimension scores s = q·c/√H + ½·|q|²/H·v for query q: the log
of what one of its keys weighs on average, were they normally distributed. One sum over the coarsest clusters and the
sinks (the first tokens, by their exact scores) gives the denominator, for every level below as well; so a level is one
pass over what the level above left, and no level's thresholds depend on another's. Below the finest clusters come the
keys themselves, each as its cluster's centroid plus a residual in a few bits.

Lanes as in layout.py: U lanes of M query rows. Scores are laid out [… M], so that what is known of a cluster, for all
rows, can be gathered as a row.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from squeezejax.pallas_kernels import codes
from squeezejax.pallas_kernels.xla.lists import Found, Rows, Runs, expand_owned, kept_runs
from squeezejax.pallas_kernels.xla.softmax import MASKED, Softmax, map_over

BLOCK = 1024  # listed clusters or keys scored at once by a lane: their codes and scores stay in cache


class Query(NamedTuple):
    """The rows of every lane, in the forms that scores need."""

    plain: jax.Array  # f32[U M H], over √H
    turned: jax.Array  # the same, turned as codes are
    half_square: jax.Array  # f32[U M], ½·|q|²/H
    valid: jax.Array  # bool[U M], rows that enter the means
    head: jax.Array  # i32[U], the lane's index in L·K


def select(tree, q, valid, layer, log_T, *, context: str | None = None, estimate: bool = False, tail: bool = False):
    """One selection a user for rows q [B K M H], of which valid bool[B M] take part -> `Found`.

    A cluster is kept iff log A > its level's log T, of log_T f32[B levels (+ 1 for keys)], strictly and its parent is
    kept, a key likewise. `estimate` asks for the mass of all that is not kept, `tail` for its attention, too, by mean
    values.
    """
    B, K, M, H = q.shape
    query = query_of(q, valid, layer)
    by_lane = lambda leaf: leaf.reshape(leaf.shape[0] * leaf.shape[1], *leaf.shape[2:])
    levels = jax.tree.map(by_lane, tree.levels)
    values = [_value_table(level, H, tail) for level in levels]
    log_T = jnp.repeat(log_T, K, axis=0).T[:, :, None]  # [levels U 1]
    dots, log_A, lse = score_coarsest(tree, levels[0], query, context)
    counts = levels[0].counts[query.head]
    kept = (log_A > log_T[0]) & (counts > 0)
    left = _left_of(dots, levels[0], values[0], query, (counts > 0) & ~kept) if estimate else None
    for depth, level in enumerate(levels[1:], 1):
        runs = _runs_below(levels[depth - 1], kept, query.head, children=True)
        dots, kept, left = _score_listed(level, values[depth], query, lse, log_T[depth], runs, left)
    runs = _runs_below(levels[-1], kept, query.head, children=False)
    if tree.key_codes is None:
        lists = runs
    else:
        key_codes = codes.Codes(by_lane(tree.key_codes), by_lane(tree.key_steps))
        lists, left = _keep_keys(key_codes, dots, values[-1], query, lse, log_T[-1], runs, left)
    rest = []
    if estimate:
        out, left_lse = left.end()
        if context:
            left_lse = _sum_logs(left_lse, context)
        rest = [(out.reshape(B, K, M, H) if tail else None, left_lse.reshape(B, K, M))]
    return Found(lists, lists.num_rows.reshape(B, K), kept.reshape(B, K, -1), rest)


def _value_table(level, H: int, tail: bool):
    """Mean values f32[L·K C H] of clusters; where no tail is asked for, of no dimension, so that nothing is summed."""
    return level.value_centroids if tail else jnp.zeros((*level.counts.shape, 0), jnp.float32)


def query_of(q, valid, layer) -> Query:
    """The lanes of rows q [B K M H], of which valid bool[B M] take part; layer i32[]."""
    B, K, M, H = q.shape
    plain = q.reshape(B * K, M, H).astype(jnp.float32) / math.sqrt(H)
    half_square = jnp.sum(plain * plain, axis=-1) / 2
    head = jnp.tile(layer * K + jnp.arange(K), B)
    return Query(plain, codes.rotate(plain), half_square, jnp.repeat(valid, K, axis=0), head)


def cluster_dots(level, plain, turned):
    """q·c f32[… M] of clusters, for rows plain f32[M H] (over √H) and the same turned; level's arrays [… C (H)]."""
    dot = lambda numbers, q: jnp.einsum("CH,MH->CM", numbers, q, precision=jax.lax.Precision.HIGHEST)
    if level.codes is None:
        return dot(level.centroids.astype(jnp.float32), plain)
    rounded = codes.dots(level.codes, turned).T * level.steps.astype(jnp.float32)[:, None]
    return rounded + dot(level.offset[None], turned)


def log_mean(scores, lse, valid):
    """log A f32[J]: the mean over valid bool[M] of exp(score − lse), for scores f32[J M], lse f32[M]; −∞ if none."""
    shares = jnp.where(valid[None, :], scores - lse[None, :], MASKED)
    top = jnp.max(shares, axis=1)
    total = jnp.sum(jnp.where(valid[None, :], jnp.exp(shares - top[:, None]), 0.0), axis=1)
    num_rows = jnp.sum(valid.astype(jnp.float32))
    return jnp.where(
        num_rows > 0, top + jnp.log(jnp.maximum(total, 1.0)) - jnp.log(jnp.maximum(num_rows, 1.0)), -jnp.inf
    )


def exceeds(scores, lse, valid, log_t):
    """bool[J]: whether `log_mean` of scores f32[M J] exceeds log_t f32[], without a logarithm a column."""
    # A mean above exp(log T) is one above 1 where every share is taken over exp(log T); infinite log T come out right.
    shares = jnp.exp(scores - (lse + log_t)[:, None])
    return jnp.sum(jnp.where(valid[:, None], shares, 0.0), axis=0) > jnp.sum(valid.astype(jnp.float32))


def correct(lse, denominators):
    """The log denominators f32[… G] as calibration corrected them, by (a, b) f32[… G 2]: a + b · lse."""
    return denominators[..., 0] + denominators[..., 1] * lse


def denominator(scores, counts, sink_scores, context: str | None = None):
    """lse f32[M] of scores f32[C M] of clusters with counts i32[C], and of the sinks' scores f32[s M]."""
    mass = jnp.where((counts > 0)[:, None], scores + _log(counts)[:, None], MASKED)
    lse = _sum_logs(jax.nn.logsumexp(mass, axis=0), context)
    return jnp.logaddexp(lse, jax.nn.logsumexp(sink_scores, axis=0)) if sink_scores.shape[0] else lse


def score_coarsest(tree, level, query: Query, context: str | None):
    """(dots f32[U C M], log A f32[U C], lse f32[U M]) of the coarsest level."""
    by_lane = lambda leaf: leaf.reshape(leaf.shape[0] * leaf.shape[1], *leaf.shape[2:])
    sinks = by_lane(tree.window_keys[:, :, : tree.config.sinks])

    def one_lane(lane):
        u, head = lane
        counts, dots, scores = _score_lane(level, query, u, head)
        sink_scores = jnp.einsum(
            "sH,MH->sM", sinks[head].astype(jnp.float32), query.plain[u], precision=jax.lax.Precision.HIGHEST
        )
        lse = denominator(scores, counts, sink_scores, context)
        if tree.denominators is not None:
            G = tree.denominators.shape[2]
            lse = correct(lse.reshape(-1, G), by_lane(tree.denominators)[head][None]).reshape(-1)
        return dots, log_mean(scores, lse, query.valid[u]), lse

    return map_over(one_lane, (jnp.arange(len(query.head)), query.head))


def score_all(level, query: Query, lse):
    """(dots f32[U C M], log A f32[U C]) of every cluster of a finer level, whether its parent is kept or not."""

    def one_lane(lane):
        u, head = lane
        _, dots, scores = _score_lane(level, query, u, head)
        return dots, log_mean(scores, lse[u], query.valid[u])

    return map_over(one_lane, (jnp.arange(len(query.head)), query.head))


def _score_lane(level, query: Query, u, head):
    """(counts i32[C], dots f32[C M], scores f32[C M]) of one lane, of a level with leading axis L·K."""
    # Sliced in here: only one head's centroids are ever copied out of the stack.
    here = jax.tree.map(lambda leaf: leaf[head], level)
    dots = cluster_dots(here, query.plain[u], query.turned[u])
    return here.counts, dots, dots + here.spreads.astype(jnp.float32)[:, None] * query.half_square[u][None, :]


def _runs_below(level, kept, head, children: bool) -> Runs:
    """The runs of what lies below the kept clusters bool[U C]: clusters of the next level, or rows."""
    starts, counts = (level.child_starts, level.child_counts) if children else (level.starts, level.counts)
    return jax.vmap(kept_runs)(kept, starts[head], counts[head])


def _blocks(runs: Runs, block: int):
    return (jnp.max(runs.num_rows) + block - 1) // block


def _listed(runs: Runs, i, block: int):
    """The i-th block of every lane's list: (numbers i32[U block], their owners, which of them are in the list)."""
    first = i * block
    numbers, owners = jax.vmap(lambda runs: expand_owned(runs, first, block))(runs)
    listed = (first + jnp.arange(block))[None, :] < runs.num_rows[:, None]
    return jnp.where(listed, numbers, 0), jnp.where(listed, owners, 0), listed


def _score_listed(level, values, query: Query, lse, log_t, runs: Runs, left: Softmax | None):
    """The clusters of a level that are listed: (dots f32[U C M], kept bool[U C], `left` with those dropped)."""
    U, M, _ = query.plain.shape
    C = level.counts.shape[1]
    block, lane = min(BLOCK, C), jnp.arange(U)[:, None]

    def step(i, state):
        all_dots, all_kept, left = state
        ids, _, listed = _listed(runs, i, block)
        take = lambda leaf: leaf.at[query.head[:, None], ids].get(mode="promise_in_bounds")
        here = jax.tree.map(take, _rows_of(level))
        here = here._replace(offset=None if level.offset is None else level.offset[query.head])
        dots = jax.vmap(cluster_dots)(here, query.plain, query.turned)
        scores = dots + here.spreads.astype(jnp.float32)[:, :, None] * query.half_square[:, None, :]
        alive = listed & (here.counts > 0)
        kept = alive & (jax.vmap(log_mean)(scores, lse, query.valid) > log_t)
        slot = jnp.where(listed, ids, C)
        all_dots = all_dots.at[lane, slot].set(dots, mode="drop")
        all_kept = all_kept.at[lane, slot].set(kept, mode="drop")
        if left is not None:
            left = _leave(left, scores + _log(here.counts)[:, :, None], alive & ~kept, take(values))
        return all_dots, all_kept, left

    start = (jnp.zeros((U, C, M), jnp.float32), jnp.zeros((U, C), bool), left)
    return jax.lax.fori_loop(0, _blocks(runs, block), step, start)


class _Clusters(NamedTuple):
    """What scoring reads of clusters."""

    centroids: jax.Array | None
    codes: jax.Array | None
    steps: jax.Array | None
    spreads: jax.Array
    counts: jax.Array
    offset: jax.Array | None = None


def _rows_of(level) -> _Clusters:
    return _Clusters(level.centroids, level.codes, level.steps, level.spreads, level.counts)


def _keep_keys(key_codes: codes.Codes, dots, values, query: Query, lse, log_t, runs: Runs, left: Softmax | None):
    """Of the listed rows those whose keys are kept: (Rows, `left` with the others).

    key_codes, leading axes [L·K R]; dots f32[U C M] of the finest clusters, values of the same; runs of rows.
    """
    U = len(query.head)
    R = key_codes.packed.shape[1]
    block, lane = min(BLOCK, R), jnp.arange(U)[:, None]

    def step(i, state):
        found, used, left = state
        rows, owners, listed = _listed(runs, i, block)
        take = lambda leaf, numbers=rows: leaf.at[query.head[:, None], numbers].get(mode="promise_in_bounds")
        of_cluster = dots.at[lane, owners].get(mode="promise_in_bounds")
        scores = score_keys(jax.tree.map(take, key_codes), of_cluster, query.turned)
        kept = listed & jax.vmap(exceeds)(scores, lse, query.valid, log_t[:, 0])
        slot = jnp.where(kept, used[:, None] + jnp.cumsum(kept, axis=1) - 1, R)
        found = found.at[lane, slot].set(rows, mode="drop")
        if left is not None:
            left = _leave(left, jnp.swapaxes(scores, 1, 2), listed & ~kept, take(values, owners))
        return found, used + jnp.sum(kept, axis=1, dtype=jnp.int32), left

    start = (jnp.zeros((U, R), jnp.int32), jnp.zeros(U, jnp.int32), left)
    found, used, left = jax.lax.fori_loop(0, _blocks(runs, block), step, start)
    return Rows(found, used), left


def score_keys(key_codes: codes.Codes, of_cluster, turned):
    """Scores f32[U M J] of J keys a lane: their codes [U J …], their clusters' dots f32[U J M], turned f32[U M H]."""
    residual = codes.dots(key_codes.packed, turned)  # [U M J]
    return jnp.swapaxes(of_cluster, 1, 2) + key_codes.steps.astype(jnp.float32)[:, None, :] * residual


def _left_of(dots, level, values, query: Query, which) -> Softmax:
    """What is left to the clusters `which` bool[U C] of the coarsest level, given their dots f32[U C M]."""

    def one_lane(lane):
        dots, which, half_square, head = lane
        spread, counts = level.spreads[head].astype(jnp.float32), level.counts[head]
        mass = dots + spread[:, None] * half_square[None, :] + _log(counts)[:, None]
        nothing = Softmax.start(1, dots.shape[1], values.shape[-1])
        left = _leave(nothing, mass[None], which[None], values[head][None])
        return jax.tree.map(lambda leaf: leaf[0], left)

    return map_over(one_lane, (dots, which, query.half_square, query.head))


def _leave(left: Softmax, mass, which, values) -> Softmax:
    """`left` with the clusters or keys `which` bool[U J] of log mass f32[U J M], whose mean values are f32[U J H]."""
    mass = jnp.where(which[:, :, None], mass, MASKED)
    top = jnp.maximum(left.top, jnp.max(mass, axis=1))
    weights = jnp.where(which[:, :, None], jnp.exp(mass - top[:, None, :]), 0.0)
    keep = jnp.exp(left.top - top)
    out = jnp.einsum("UJM,UJH->UMH", weights, values, preferred_element_type=jnp.float32)
    return Softmax(top, left.total * keep + jnp.sum(weights, axis=1), left.out * keep[:, :, None] + out)


def _log(counts):
    return jnp.log(jnp.maximum(counts, 1).astype(jnp.float32))


def _sum_logs(lse, context: str | None):
    """log Σ exp over the devices along an axis of the enclosing shard_map."""
    if context is None:
        return lse
    top = jax.lax.pmax(lse, context)
    return top + jnp.log(jax.lax.psum(jnp.exp(lse - top), context))
