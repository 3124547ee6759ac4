"""Looking up the kept clusters of a few query rows, coarse to fine, reading only what survives: the XLA path of decode.

Every cluster of the coarsest level is scored. Below it, the children of kept clusters form one list per lane, and
nothing else is read or computed, so that with enough levels the cost grows with the logarithm of the context.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from squeezejax.pallas_kernels import codes
from squeezejax.pallas_kernels.xla.lists import Runs, expand
from squeezejax.pallas_kernels.xla.softmax import MASKED

BLOCK = 1024  # clusters scored at once by a lane: its chunk of centroids stays in cache


class _Scored(NamedTuple):
    """What scoring a list of clusters leaves behind, block by block."""

    ids: jax.Array  # i32[U J], clusters
    dots: jax.Array  # f32[U M J]
    top: jax.Array  # f32[U M], maximum of dots over live clusters
    total: jax.Array  # f32[U M], Σ n exp(dot − top)


def look_up(levels, q, valid, layer, log_T, children: Runs, context: str | None = None):
    """The kept clusters of the finest level, for q [B K M H], valid bool[B M], below the coarsest level.

    `levels` and log_T f32[B levels] are those below the coarsest; children, leading axes [B K], are runs of clusters
    of the first of them: the children of kept ones. A level has the fields of `squeezejax.tree.Level`, leading axes
    [L K].
    `context` is the axis of an enclosing shard_map over which the clusters are distributed, children with parents.
    Gives (Runs of rows, leading axes [B K], and the kept ids i32[B K C], the unused end being C).
    """
    B, K = q.shape[:2]
    lanes = lambda x: x.reshape(B * K, *x.shape[2:])
    row_valid = jnp.repeat(valid, K, axis=0)  # [U M]
    head = jnp.tile(layer * K + jnp.arange(K), B)
    runs = jax.tree.map(lanes, children)
    for level, log_t in zip(levels, jnp.repeat(log_T, K, axis=0).T[:, :, None], strict=True):  # log_t [U 1]
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), level)
        scored = _score_listed(flat, lanes(q), head, runs)
        scored = _combine(scored, context) if context else scored
        runs, ids = _keep_listed(flat, row_valid, head, runs, scored, log_t)
    return jax.tree.map(lambda x: x.reshape(B, K, *x.shape[1:]), (runs, ids))


def _next_runs(level):
    """starts, counts of what a kept cluster leads to: its children, or at the finest level its rows."""
    is_finest = level.child_starts is None
    return (level.starts, level.counts) if is_finest else (level.child_starts, level.child_counts)


def _blocks(children: Runs, size: int):
    """Steps that cover the longest list."""
    return (jnp.max(children.num_rows) + size - 1) // size


def _score_listed(level, q, head, children: Runs) -> _Scored:
    U, M, H = q.shape
    C = level.counts.shape[1]
    block = min(BLOCK, C)
    padded = -(-C // block) * block
    turned = q.astype(jnp.float32) if level.codes is None else codes.rotate(q)

    def step(i, scored: _Scored) -> _Scored:
        first = i * block
        ids = jax.vmap(functools.partial(expand, size=block), in_axes=(0, None))(children, first)
        listed = (first + jnp.arange(block))[None, :] < children.num_rows[:, None]
        ids = jnp.where(listed, ids, 0)
        take = lambda x: x.at[head[:, None], ids].get(mode="promise_in_bounds")
        counts = jnp.where(listed, take(level.counts), 0)
        if level.codes is None:
            numbers = take(level.centroids).astype(jnp.float32)
        else:
            numbers = level.offset[head][:, None] + codes.decode(codes.Codes(take(level.codes), take(level.steps)), H)
        dots = jnp.einsum("UMH,UCH->UMC", turned, numbers, precision=jax.lax.Precision.HIGHEST) / math.sqrt(H)
        dots = jnp.where((counts > 0)[:, None, :], dots, MASKED)
        top = jnp.maximum(scored.top, jnp.max(dots, axis=2))
        shifted = counts.astype(jnp.float32)[:, None, :] * jnp.exp(dots - top[:, :, None])
        total = scored.total * jnp.exp(scored.top - top) + jnp.sum(shifted, axis=2)
        return _Scored(
            ids=jax.lax.dynamic_update_slice_in_dim(scored.ids, jnp.where(counts > 0, ids, C), first, axis=1),
            dots=jax.lax.dynamic_update_slice_in_dim(scored.dots, dots, first, axis=2),
            top=top,
            total=total,
        )

    start = _Scored(
        ids=jnp.full((U, padded), C, jnp.int32),
        dots=jnp.zeros((U, M, padded), jnp.float32),
        top=jnp.full((U, M), MASKED, jnp.float32),
        total=jnp.zeros((U, M), jnp.float32),
    )
    return jax.lax.fori_loop(0, _blocks(children, block), step, start)


def _combine(scored: _Scored, context: str) -> _Scored:
    """With the maximum and the sum over all devices along an axis of the enclosing shard_map."""
    top = jax.lax.pmax(scored.top, context)
    return scored._replace(top=top, total=jax.lax.psum(scored.total * jnp.exp(scored.top - top), context))


def _keep_listed(level, valid, head, children: Runs, scored: _Scored, log_t):
    U, C = valid.shape[0], level.counts.shape[1]
    block = min(BLOCK, C)
    starts_of, lengths_of = _next_runs(level)
    num_valid = jnp.sum(valid.astype(jnp.float32), axis=1)[:, None]
    lane = jnp.arange(U)[:, None]

    def step(i, carry):
        runs, kept_ids, used = carry
        first = i * block
        ids = jax.lax.dynamic_slice_in_dim(scored.ids, first, block, axis=1)
        dots = jax.lax.dynamic_slice_in_dim(scored.dots, first, block, axis=2)
        live = ids < C
        # As in log_scores: (s − max) − log Σ n exp(s − max), then log-mean-exp over valid rows.
        log_scores = (dots - scored.top[:, :, None]) - jnp.log(jnp.maximum(scored.total, 1.0))[:, :, None]
        log_scores = jnp.where(valid[:, :, None] & live[:, None, :], log_scores, MASKED)
        top = jnp.max(log_scores, axis=1)
        mean = jnp.sum(jnp.where(valid[:, :, None], jnp.exp(log_scores - top[:, None, :]), 0.0), axis=1)
        log_A = top + (jnp.log(mean) - jnp.log(num_valid))
        kept = live & (num_valid > 0) & (log_A > log_t)

        safe = jnp.where(kept, ids, 0)
        take = lambda x: x.at[head[:, None], safe].get(mode="promise_in_bounds")
        lengths = jnp.where(kept, take(lengths_of), 0)
        kept = lengths > 0
        slot = jnp.where(kept, used[:, None] + jnp.cumsum(kept, axis=1, dtype=jnp.int32) - 1, C)
        offsets = runs.num_rows[:, None] + jnp.cumsum(lengths, axis=1, dtype=jnp.int32) - lengths
        runs = Runs(
            starts=runs.starts.at[lane, slot].set(take(starts_of), mode="drop"),
            offsets=runs.offsets.at[lane, slot].set(offsets, mode="drop"),
            num_rows=runs.num_rows + jnp.sum(lengths, axis=1, dtype=jnp.int32),
            owners=runs.owners.at[lane, slot].set(ids, mode="drop"),
        )
        kept_ids = kept_ids.at[lane, slot].set(ids, mode="drop")
        return runs, kept_ids, used + jnp.sum(kept, axis=1, dtype=jnp.int32)

    nothing = Runs(
        starts=jnp.zeros((U, C), jnp.int32),
        offsets=jnp.full((U, C), jnp.iinfo(jnp.int32).max, jnp.int32),
        num_rows=jnp.zeros(U, jnp.int32),
        owners=jnp.zeros((U, C), jnp.int32),
    )
    start = (nothing, jnp.full((U, C), C, jnp.int32), jnp.zeros(U, jnp.int32))
    runs, kept_ids, _ = jax.lax.fori_loop(0, _blocks(children, block), step, start)
    return runs, kept_ids
