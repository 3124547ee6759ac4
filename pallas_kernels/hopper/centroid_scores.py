"""Scores of the clusters that matter to decode queries, for Hopper, and the softmax's statistics.

At the coarsest level every lane (a user and a key/value head) looks at every cluster, below it at the children of what
it kept. With the paper's rule a level's softmax runs over what the lane looks at, with ours over the coarsest level.
"""

from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from squeezejax.pallas_kernels.hopper.mosaic import ALONG, MASKED, MATRIX, TILE, columns, load, rows
from squeezejax.pallas_kernels.hopper.scores import Config, Query, score_tiles
from squeezejax.pallas_kernels.hopper.step import Step
from squeezejax.pallas_kernels.hopper.work_list import PER_TILE, Lists, gather, in_masks, tiles_in_order

AT_ONCE = 4  # blocks of 64 numbers read together, so that their latencies overlap


class Terms(NamedTuple):
    """What our rule adds to a lane's dot products and denominators, each f32[lanes M]."""

    offset: jax.Array  # the query times what was left out of the codes
    half_square: jax.Array  # ½·|q|²/H, by which a cluster's spread counts
    sinks: jax.Array  # log Σ exp of the sinks' scores
    shift: jax.Array  # a and b: the log denominator counts as a + b times what was found
    slope: jax.Array


class Scores(NamedTuple):
    """What scoring leaves behind, by position in the lists; what a lane does not have was never written."""

    dots: jax.Array  # f32[lanes P M], q·c/√H; MASKED for a cluster that takes no part
    stats: jax.Array  # f32[lanes 2 tiles M]: of each tile, max of scores and Σ n·exp(scores − max)


def score_clusters(
    query: Query, level, terms: Terms | None, lists: Lists, step: Step, *, config: Config | None = None
) -> Scores:
    """Scores clusters of one level, those that each lane's list names; M is G rounded up to a multiple of 8.

    level has the fields of the tree's `Level`, L·K·C a multiple of 8. Clusters of count 0 take no part. terms are those
    of our rule, and None for the paper's.
    """
    lanes, G, _ = query.plain.shape
    M = -(-G // 8) * 8
    coded = level.centroids is None
    tiles = tiles_in_order(level.counts.shape[2]) if lists.items is None else lists.items.shape[1] // PER_TILE
    ours = [level.spreads.reshape(-1), terms.half_square] if terms else []
    code = [level.steps.reshape(-1), terms.offset] if coded else []

    def finish(tile, asked):
        shape = (TILE, M)
        counts_gm, *refs = tile.refs
        dots_gm, stats_gm = refs[-2:]
        row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=MATRIX)
        of_row = lambda ref: rows(gather(ref, tile.granules), shape)
        of_lane = lambda ref: columns(load(ref.at[tile.lane], ALONG), shape)
        number, dots = of_row(counts_gm), tile.dots
        if coded:
            dots = dots * of_row(refs[len(ours)]) + of_lane(refs[len(ours) + 1])
        scores = dots + of_row(refs[0]) * of_lane(refs[1]) if ours else dots
        alive = jnp.logical_and(in_masks(row, tile.items), number > 0)
        dots_gm[tile.lane, pl.ds(tile.tile * TILE, TILE)] = jnp.where(alive, dots, MASKED)
        scores = jnp.where(alive, scores, MASKED)
        top = jnp.max(scores, axis=0)
        weights = jnp.where(alive, number.astype(jnp.float32) * jnp.exp(scores - columns(top, shape)), 0.0)
        stats_gm[tile.lane, 0, tile.tile] = top
        stats_gm[tile.lane, 1, tile.tile] = jnp.sum(weights, axis=0)

    stats_tiles = -(-tiles // (AT_ONCE * TILE)) * AT_ONCE * TILE  # they are read in blocks of so many
    found = score_tiles(
        "centroid_scores", query, level.codes if coded else level.centroids, lists, step, finish,
        [level.counts.reshape(-1), *ours, *code],
        [((lanes, tiles * TILE, M), jnp.float32), ((lanes, 2, stats_tiles, M), jnp.float32)],
        config=config,
    )  # fmt: skip
    return Scores(*found)
