"""Which single keys a decode query keeps of those in kept clusters, for Hopper: by their codes, in one pass.

A key scores as its cluster did, by the dot product alone, plus the query times its code. Denominators are known by
then, so that nothing but the kept rows leaves the kernel: of every granule read, a mask.
"""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from squeezejax.pallas_kernels.hopper.keep_clusters import log_mean
from squeezejax.pallas_kernels.hopper.mosaic import (
    ALONG,
    DOWN,
    GRANULE,
    MATRIX,
    TILE,
    columns,
    full,
    load,
    rows,
)
from squeezejax.pallas_kernels.hopper.scores import Config, Query, score_tiles
from squeezejax.pallas_kernels.hopper.step import Step
from squeezejax.pallas_kernels.hopper.work_list import PER_TILE, Kept, Lists, gather, in_masks


def keep_keys(
    query: Query, key_codes, key_steps, cluster_dots, lse, lists: Lists, step: Step, depth: int,
    *, config: Config | None = None,
) -> Kept:  # fmt: skip
    """Keeps the listed rows whose log A exceeds log T strictly (docs/method.md, Selection).

    key_codes u8[L K R …] and key_steps bf16[L K R]; cluster_dots f32[lanes P M] by position, to which the lists'
    owners point; lse f32[lanes M], log denominators; `depth` is the threshold's number. R is a multiple of 8.
    """
    lanes, G, _ = query.plain.shape
    K, M = key_codes.shape[1], cluster_dots.shape[2]
    shape, tiles = (TILE, M), lists.items.shape[1] // PER_TILE

    def finish(tile, asked):
        steps_gm, dots_gm, lse_gm, owners_gm, num_items_gm, items_gm, tile_items_gm, tile_rows_gm = tile.refs
        lane = tile.lane
        row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=MATRIX)
        last = num_items_gm[lane] - 1
        of_cluster = full(shape, 0.0, MATRIX)
        for i in range(PER_TILE):
            owner = owners_gm[lane, jnp.minimum(tile.tile * PER_TILE + i, last)]
            found = columns(load(dots_gm.at[lane, owner], ALONG), shape)
            of_cluster = jnp.where(lax.shift_right_logical(row, 3) == i, found, of_cluster)
        scores = tile.dots * rows(gather(steps_gm, tile.granules), shape) + of_cluster
        log_A = log_mean(scores - columns(load(lse_gm.at[lane], ALONG), shape), G)
        index = plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=DOWN)
        above = log_A > asked.threshold(depth, lax.div(lane, jnp.int32(K)))
        kept = jnp.where(jnp.logical_and(above, in_masks(index, tile.items)), 1, 0)
        # A mask is the sum of its rows' bits, each granule in a column of its own.
        eight = (TILE, GRANULE)
        row, column = (plgpu.broadcasted_iota(jnp.int32, eight, i, layout=MATRIX) for i in range(2))
        bits = lax.shift_left(rows(kept, eight), row & (GRANULE - 1))
        masks = jnp.sum(jnp.where(lax.shift_right_logical(row, 3) == column, bits, 0), axis=0)
        masks = plgpu.layout_cast(masks, ALONG)
        column = plgpu.broadcasted_iota(jnp.int32, (GRANULE,), 0, layout=ALONG)
        items = jnp.where(column < 0, 1, 0)
        for i, item in enumerate(tile.items):
            items = jnp.where(column == i, item & ~255, items)
        items_gm[lane, pl.ds(tile.tile * PER_TILE, PER_TILE)] = items + masks
        tile_items_gm[lane, tile.tile] = jnp.sum(jnp.minimum(masks, 1))
        tile_rows_gm[lane, tile.tile] = jnp.sum(kept)

    items, tile_items, tile_rows = score_tiles(
        "keep_keys", query, key_codes, lists, step, finish,
        [key_steps.reshape(-1), cluster_dots, lse, lists.owners, lists.num_items],
        [((lanes, tiles * PER_TILE), jnp.int32), *[((lanes, tiles), jnp.int32)] * 2],
        config=config,
    )  # fmt: skip
    # From here on 64 items are a tile, 8 tiles of rows.
    has = jnp.arange(tiles)[None, :] < lists.num_tiles[:, None]
    add = lambda x: jnp.sum(jnp.where(has, x, 0).reshape(lanes, -1, PER_TILE), axis=2, dtype=jnp.int32)
    items = jnp.where(jnp.repeat(has, PER_TILE, axis=1), items, 0)
    return Kept((items,), add(tile_items), add(tile_rows))
