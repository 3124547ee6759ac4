"""Lists of what a kernel reads next, for Hopper: made of what an earlier one kept, read by granules of 8 rows.

An item is `granule · 256 + mask`: 8 neighbouring rows that TMA fetches together, and which of them count. Rows are
keys of the cache, or clusters of the next finer level: both lie in runs, and what is kept of one level is a set of
runs of the next. Every kept run adds the granules that it touches, so that an item belongs to one cluster; where two
runs meet inside a granule it is listed twice, with disjoint masks.

Marking leaves runs behind, or items of which some are empty, and says how many each tile adds; `list_items` writes
what is not empty one behind the other. A kernel has no scan and no scatter, but tiles are small: positions come from
comparing 64 numbers with 64 in registers.
"""

from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from squeezejax.pallas_kernels.hopper.mosaic import (
    ALONG,
    DOWN,
    GRANULE,
    MATRIX,
    TILE,
    columns,
    compiler_params,
    count_ctas,
    load,
    rows,
)
from squeezejax.pallas_kernels.hopper.shares import Shares, offsets_of

PER_TILE = TILE // GRANULE  # items of a tile of rows


class Lists(NamedTuple):
    """What every lane reads of a level, or of the cache, tile by tile (8 items, 64 rows)."""

    offsets: jax.Array  # i32[lanes + 1] tiles, exclusive sums
    num_items: jax.Array | None = None  # i32[lanes]; None: all rows, in order
    items: jax.Array | None = None  # i32[lanes J], of which the first num_items count
    owners: jax.Array | None = None  # i32[lanes J], the position of the cluster that each item belongs to

    @property
    def num_tiles(self):
        """i32[lanes], outside kernels."""
        return self.offsets[1:] - self.offsets[:-1]


class Kept(NamedTuple):
    """What marking leaves, 64 positions a tile; of tiles that a lane does not have, nothing was ever written."""

    found: tuple  # (starts, stops) i32[lanes P] of runs, the same if not kept; or (items,) i32[lanes P], mask 0 if not
    tile_items: jax.Array  # i32[lanes P/64], items that a tile adds
    tile_rows: jax.Array  # i32[lanes P/64], rows that they count

    def num_rows(self, num_tiles):
        """i32[lanes], rows that lanes of num_tiles i32[lanes] tiles keep; outside kernels."""
        has = jnp.arange(self.tile_rows.shape[1])[None, :] < num_tiles[:, None]
        return jnp.sum(jnp.where(has, self.tile_rows, 0), axis=1, dtype=jnp.int32)


def tiles_in_order(num_rows: int) -> int:
    """Tiles of a head's rows in order: the first row may be the last one of its granule."""
    return -(-(num_rows + GRANULE - 1) // TILE)


def in_order(lanes: int, num_rows: int, skip) -> Lists:
    """Lists of all of a head's num_rows rows, or of none where bool[] `skip` says so."""
    return Lists(offsets_of(jnp.where(skip, 0, jnp.full(lanes, tiles_in_order(num_rows)))))


def first_granule(plane, num_rows: int):
    """(granule, rows of it that belong to the plane before) at which a plane of num_rows rows begins.

    Planes lie one behind the other, and granules are counted through all of them, since TMA places nothing else.
    """
    row = plane * num_rows
    return lax.shift_right_logical(row, 3), row & (GRANULE - 1)


def in_order_items(tile, begin, end):
    """In a kernel: the items of a tile that covers some of the rows [begin, end); masks past the end are 0."""
    items = []
    for i in range(PER_TILE):
        granule = tile * PER_TILE + i
        low = jnp.clip(begin - granule * GRANULE, 0, GRANULE)
        high = jnp.clip(end - granule * GRANULE, low, GRANULE)
        mask = lax.shift_left(jnp.int32(1), high) - lax.shift_left(jnp.int32(1), low)
        granule = jnp.minimum(granule, lax.shift_right_logical(jnp.maximum(end - 1, 0), 3))
        items.append(granule * 256 + mask)
    return tuple(items)


def listed_items(items_gm, num_items, lane, tile, per_tile: int = PER_TILE):
    """In a kernel: the items of a lane's tile; past the end of the list it is the last one again, with mask 0."""
    at = [tile * per_tile + i for i in range(per_tile)]
    found = [items_gm[lane, jnp.clip(i, 0, jnp.maximum(num_items - 1, 0))] for i in at]
    return tuple(jnp.where(i < num_items, item, item & ~255) for i, item in zip(at, found, strict=True))


def granule_of(item):
    """In a kernel: which 8 rows an item names."""
    return lax.shift_right_logical(item, 8)


def in_masks(row, items):
    """In a kernel: which rows of a tile its items name; row i32[TILE …] counts them."""
    mask = jnp.where(row >= 0, items[0], 0)
    for i in range(1, len(items)):
        mask = jnp.where(row >= i * GRANULE, items[i], mask)
    return (lax.shift_right_logical(mask & 255, row & (GRANULE - 1)) & 1) > 0


def gather(numbers, granules):
    """In a kernel: [TILE] down the rows, numbers of the rows of a tile's 8 granules, out of those of all planes."""
    shape = (TILE, GRANULE)
    dtype = jnp.int32 if numbers.dtype == jnp.int32 else jnp.float32
    row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=MATRIX)
    column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=MATRIX)
    found = plgpu.layout_cast(jnp.full(shape, 0, dtype), MATRIX)
    for i, granule in enumerate(granules):
        eight = load(numbers.at[pl.ds(granule * GRANULE, GRANULE)], ALONG).astype(dtype)
        found = jnp.where(lax.shift_right_logical(row, 3) == i, columns(eight, shape), found)
    mine = column == (row & (GRANULE - 1))
    return plgpu.layout_cast(jnp.sum(jnp.where(mine, found, jnp.zeros((), dtype)), axis=1), DOWN)


def granules_touched(start, stop):
    """How many granules the runs [start, stop) touch; the same start and stop, none."""
    touched = lax.shift_right_logical(stop + (GRANULE - 1), 3) - lax.shift_right_logical(start, 3)
    return jnp.where(stop > start, touched, 0)


def before_each(numbers):
    """In a kernel: sums of the numbers before each one, i32[TILE] down the rows -> along the columns."""
    shape = (TILE, TILE)
    row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=MATRIX)
    column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=MATRIX)
    return plgpu.layout_cast(jnp.sum(jnp.where(row < column, rows(numbers, shape), 0), axis=0), ALONG)


def list_items(kept: Kept, offsets, below: int, *, owned: bool = False) -> Lists:
    """Lists of what the lanes' tiles of `kept` add, in their order, of at most `below` rows a head.

    offsets i32[lanes + 1] are exclusive sums of the lanes' tiles. With `owned`, the lists say whose each item is.
    """
    lanes, P = kept.found[0].shape
    tiles = kept.tile_items.shape[1]
    runs = len(kept.found) == 2
    has = jnp.arange(tiles)[None, :] < (offsets[1:] - offsets[:-1])[:, None]
    bases = offsets_of(jnp.where(has, kept.tile_items, 0))
    # Runs are disjoint: sorted, each shares at most one granule with the next. The first granule may belong to others.
    J = -(-(-(-below // GRANULE) + 1 + P if runs else P) // TILE) * TILE
    num_ctas = count_ctas(3)
    shape = (TILE, TILE)  # positions in the list down, clusters or items along

    def body(*refs, found_sm, items_sm):
        found_gm, (offsets_gm, bases_gm, *lists_gm) = refs[: len(kept.found)], refs[len(kept.found) :]

        def list_tile(lane, tile, base, number):
            down = [load(ref.at[lane, pl.ds(tile * TILE, TILE)], DOWN) for ref in found_gm]
            counts = granules_touched(*down) if runs else jnp.minimum(down[0] & 255, 1)
            positions = before_each(counts)
            plgpu.commit_smem()  # a barrier: all warps are done with the tile before
            # Reading GPU memory in both layouts instead fails to compile: the two reads become one.
            for i, vector in enumerate(down):
                found_sm[i] = vector
            plgpu.commit_smem()
            along = [load(found_sm.at[i], ALONG) for i in range(len(down))]

            def list_some(block, _):
                begin = block * TILE
                slot = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=MATRIX) + begin
                column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=MATRIX)
                ends = positions + (granules_touched(*along) if runs else jnp.minimum(along[0] & 255, 1))
                mine = jnp.logical_and(slot >= columns(positions, shape), slot < columns(ends, shape))
                if runs:
                    start, stop = along
                    granule = columns(lax.shift_right_logical(start, 3) - positions, shape) + slot
                    low, high = (
                        jnp.clip(columns(edge, shape) - granule * GRANULE, 0, GRANULE) for edge in (start, stop)
                    )
                    one = plgpu.layout_cast(jnp.full(shape, 1, jnp.int32), MATRIX)
                    item = granule * 256 + lax.shift_left(one, high) - lax.shift_left(one, low)
                else:
                    item = columns(along[0], shape)
                pick = lambda x: plgpu.layout_cast(jnp.sum(jnp.where(mine, x, 0), axis=1), DOWN)
                plgpu.commit_smem()  # a barrier: all warps are done with the items before
                items_sm[0] = pick(item)
                if owned:
                    items_sm[1] = pick(column + tile * TILE)
                plgpu.commit_smem()

                def write(i, _):  # one by one, since what follows may be another CTA's
                    for which, ref in enumerate(lists_gm):
                        ref[lane, base + begin + i] = items_sm[which, i]

                lax.fori_loop(0, jnp.minimum(number - begin, TILE), write, None)

            lax.fori_loop(0, lax.div(number + (TILE - 1), jnp.int32(TILE)), list_some, None)

        def visit(lane, first, end, carry):
            def step(tile, _):
                base = bases_gm[lane, tile]
                number = bases_gm[lane, tile + 1] - base
                pl.when(number > 0)(lambda: list_tile(lane, tile, base, number))

            lax.fori_loop(first, end, step, None)
            return carry

        Shares(offsets_gm, lanes, num_ctas).visit(lax.axis_index("cta"), visit)

    lists = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((lanes, J), jnp.int32)] * (1 + owned),
        scratch_types={
            "found_sm": plgpu.SMEM((len(kept.found), TILE), jnp.int32),
            "items_sm": plgpu.SMEM((1 + owned, TILE), jnp.int32),
        },
        grid=(num_ctas,),
        grid_names=("cta",),
        compiler_params=compiler_params(across_warps=True),
        kernel_name="list_items",
    )(*kept.found, offsets, bases)
    num_items = bases[:, -1]
    return Lists(offsets_of((num_items + (PER_TILE - 1)) // PER_TILE), num_items, *lists)
