"""Scores of centroids, level by level: the one computation behind calibration and selection (spec.md, 4 and 5).

Both must agree to the last bit, since a threshold often equals a cluster's score exactly; so both call `descend`.
"""

import math

import jax
import jax.numpy as jnp

from squeezejax.pallas_kernels import reference
from squeezejax.tree import Level


def layer_level(level: Level, layer) -> Level:
    """One layer of a level: arrays [K …]; `layer` may be traced."""
    return jax.tree.map(lambda leaf: leaf[layer], level)


def centroid_dots(level: Level, q) -> jax.Array:
    """s(q, c) = q·c/√H in float32: q [T K G H], centroids [K C H] -> f32[K T·G C]."""
    # HIGHEST: accelerators would otherwise round both operands, which moves scores by up to 3 % (spec.md, traps).
    dots = jnp.einsum("TKGH,KCH->KTGC", q.astype(jnp.float32), level.centroids, precision=jax.lax.Precision.HIGHEST)
    return dots.reshape(dots.shape[0], -1, dots.shape[-1]) / math.sqrt(q.shape[-1])


def descend(levels: list[Level], dots: list[jax.Array], valid, log_T):
    """Scores one layer from coarse to fine: (log A f32[K C], kept bool[K C]) of the last of `levels`.

    levels without the axis L; dots f32[K M C] a level; valid bool[M], the query rows that take part;
    log_T f32[≥ levels]. A cluster is kept iff log A > log T strictly. Below the coarsest level only children of kept
    clusters are alive, and their denominators count nothing else.
    """
    kept = None
    for depth, (level, dot) in enumerate(zip(levels, dots, strict=True)):
        alive = level.counts > 0
        if kept is not None:
            alive &= jnp.take_along_axis(kept, level.parents, axis=1)
        log_A = jax.vmap(reference.log_mean_scores, in_axes=(0, 0, 0, None))(dot, level.counts, alive, valid)
        kept = log_A > log_T[depth]
    return log_A, kept
