"""Scores of centroids, level by level: the one computation behind calibration and selection (spec.md, 4 and 5).

A threshold often equals a cluster's score exactly, so both call `descend`. Only below the coarsest level, where there
are hundreds of sets of thresholds, calibration sums otherwise, and sets its thresholds higher by the rounding.
"""

import jax
import jax.numpy as jnp

from squeezejax.pallas_kernels.xla import attend as reference
from squeezejax.tree import Level


def layer_level(level: Level, layer) -> Level:
    """One layer of a level: arrays [K …]; `layer` may be traced."""
    return jax.tree.map(lambda leaf: leaf[layer], level)


def map_over(function, xs):
    """`function` over the leading axis of xs: one by one on the CPU, all at once on accelerators.

    XLA's CPU backend runs batched products and their reductions at a sixth of the speed of single ones.
    """
    one_by_one = lambda xs: jax.lax.map(function, xs)
    return jax.lax.platform_dependent(xs, cpu=one_by_one, default=lambda xs: jax.vmap(function)(xs))


def score_heads(levels: tuple[Level, ...], layer, q, valid, log_T, context: str | None = None):
    """Scores one layer from coarse to fine: (log A f32[K C], kept bool[K C]) of the last of `levels`.

    q [T K G H]; valid bool[T], the query tokens that take part; log_T f32[≥ levels]; `layer` may be traced.
    `context` is the axis of an enclosing shard_map over which the clusters are distributed.
    """
    T, K, G, H = q.shape
    rows = q.transpose(1, 0, 2, 3).reshape(K, T * G, H)

    def one_head(head):
        # Sliced here, not before: only one head's centroids are ever copied out of the stack.
        here = jax.tree.map(lambda leaf: leaf[layer, head], levels)
        return descend(here, rows[head], jnp.repeat(valid, G), log_T, context)

    return map_over(one_head, jnp.arange(K))


def descend(levels: tuple[Level, ...], q, valid, log_T, context: str | None = None):
    """One head from coarse to fine: (log A f32[C], kept bool[C]) of the last of `levels`.

    levels without the axes L and K; q [M H], query rows of the group; valid bool[M]; log_T f32[≥ levels]. A cluster is
    kept iff log A > log T strictly. Below the coarsest level only children of kept clusters are alive, and their
    denominators count nothing else.
    """
    kept = None
    for depth, level in enumerate(levels):
        alive = level.counts > 0
        if kept is not None:
            alive &= kept[level.parents]
        log_A = reference.score_clusters(q, level.centroids, level.counts, alive, valid, context=context)
        kept = log_A > log_T[depth]
    return log_A, kept
