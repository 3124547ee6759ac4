"""Scores of centroids, level by level: the one computation behind calibration and selection (spec.md, 4 and 5).

Both must agree to the last bit, since a threshold often equals a cluster's score exactly; so both call `descend`.
"""

import jax
import jax.numpy as jnp

from squeezejax.pallas_kernels import reference
from squeezejax.tree import Level

MOST_SCORES = 2**22  # scores alive at once: on the CPU, temporaries above 32 MB cost page faults at every call


def layer_level(level: Level, layer) -> Level:
    """One layer of a level: arrays [K …]; `layer` may be traced."""
    return jax.tree.map(lambda leaf: leaf[layer], level)


def score_heads(levels: list[Level], q, valid, log_T):
    """Scores one layer from coarse to fine: (log A f32[K C], kept bool[K C]) of the last of `levels`.

    levels without the axis L; q [T K G H]; valid bool[T], the query tokens that take part; log_T f32[≥ levels].
    """
    T, K, G, H = q.shape
    rows = q.transpose(1, 0, 2, 3).reshape(K, T * G, H)
    # Head by head: XLA's CPU backend runs batched products and their reductions at a sixth of the speed, and the scores
    # of one head are all that has to be alive.
    return jax.lax.map(lambda head: descend(head[0], head[1], jnp.repeat(valid, G), log_T), (levels, rows))


def descend(levels: list[Level], q, valid, log_T):
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
        log_A = reference.score_clusters(q, level.centroids, level.counts, alive, valid)
        kept = log_A > log_T[depth]
    return log_A, kept
