"""Lists of what a kernel reads next, for Hopper: made of what an earlier one kept, read by granules of 8 rows.

An item is `granule · 256 + mask`: 8 neighbouring rows that TMA fetches together, and which of them count. Rows are
keys of the cache, or clusters of the next finer level: both lie in runs, and what is kept of one level is a set of
runs of the next. Runs of one tile (64 clusters) that meet in a granule share its item, the mask telling all their
rows; only where runs of two tiles meet is a granule listed twice, with disjoint masks.

Positions in the list are prefix sums. A kernel has no scan and no scatter, but tiles are small: everything is
comparisons of 64 list positions with 64 runs in registers, then a copy of exactly the entries that count.
"""

import functools
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from squeezejax.pallas_kernels.mosaic import (
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
from squeezejax.pallas_kernels.shares import Shares, offsets_of

PER_TILE = TILE // GRANULE
AT_ONCE = 4  # blocks of 64 numbers read together, so that their latencies overlap


class Lists(NamedTuple):
    """What every lane reads, tile by tile (8 items, 64 rows)."""

    items: jax.Array | None  # i32[lanes J], of which the first num_items count; None: all rows in order
    num_items: jax.Array  # i32[lanes]
    offsets: jax.Array  # i32[lanes + 1] tiles, exclusive sums

    @classmethod
    def in_order(cls, num_rows: int, lanes: int, skip) -> "Lists":
        """All rows for every lane, or nothing if skip bool[], known on the device."""
        tiles = jnp.where(skip, 0, jnp.int32(_tiles_in_order(num_rows)))
        num_items = jnp.where(skip, 0, jnp.full(lanes, -(-num_rows // GRANULE), jnp.int32))
        return cls(None, num_items, jnp.arange(lanes + 1, dtype=jnp.int32) * tiles)

    def num_tiles(self, num_rows: int) -> int:
        """The most tiles that a lane can have, over num_rows rows."""
        return _tiles_in_order(num_rows) if self.items is None else -(-self.items.shape[1] // PER_TILE)

    def operands(self) -> list:
        """What kernels take besides the offsets: nothing where everything is read in order."""
        return [] if self.items is None else [self.items, self.num_items]

    def granules(self, listed, lane, tile, before, num_rows: int):
        """In a kernel: (granules, masks) of a lane's tile; listed are references to `operands`.

        Granules count from that of the head's first row, which has `before` rows of others; num_rows are the head's.
        """
        if not listed:
            return in_order_granules(tile, before, before + num_rows)
        items, num_items = listed
        return listed_granules(items.at[lane], num_items[lane], tile)


def _tiles_in_order(num_rows: int) -> int:
    return -(-(num_rows + GRANULE - 1) // TILE)  # the first row may be the last one of its granule


def first_granule(plane, num_rows: int):
    """(granule, rows of it that belong to the plane before) at which a plane of num_rows rows begins.

    Planes lie one behind the other, and granules are counted through all of them, since TMA places nothing else.
    """
    row = plane * num_rows
    return lax.shift_right_logical(row, 3), row & (GRANULE - 1)


def in_order_granules(tile, begin, end):
    """In a kernel: (granules, masks) of a tile that covers some of the rows [begin, end); masks past the end are 0."""
    granules, masks = [], []
    for i in range(PER_TILE):
        granule = tile * PER_TILE + i
        low = jnp.clip(begin - granule * GRANULE, 0, GRANULE)
        high = jnp.clip(end - granule * GRANULE, low, GRANULE)
        one = jnp.int32(1)
        masks.append(lax.shift_left(one, high) - lax.shift_left(one, low))
        granules.append(jnp.minimum(granule, lax.shift_right_logical(jnp.maximum(end - 1, 0), 3)))
    return granules, masks


def listed_granules(items, num_items, tile):
    """In a kernel: (granules, masks) of a tile of a lane's items; past the end the last one again, with masks 0."""
    granules, masks = [], []
    for i in range(PER_TILE):
        at = tile * PER_TILE + i
        item = items[jnp.clip(at, 0, jnp.maximum(num_items - 1, 0))]
        granules.append(lax.shift_right_logical(item, 8))
        masks.append(jnp.where(at < num_items, item & 255, 0))
    return granules, masks


def in_masks(row, masks):
    """In a kernel: which rows of a tile its masks name; row i32[TILE …] counts them."""
    mask = jnp.where(row >= 0, masks[0], 0)
    for i in range(1, len(masks)):
        mask = jnp.where(row >= i * GRANULE, masks[i], mask)
    return (lax.shift_right_logical(mask, row & (GRANULE - 1)) & 1) > 0


def gather(numbers, granules):
    """In a kernel: i32[TILE] down the rows, numbers of the rows of a tile's 8 granules, out of those of all planes."""
    shape = (TILE, GRANULE)
    row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=MATRIX)
    column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=MATRIX)
    found = jnp.where(row < 0, 1, 0)
    for i, granule in enumerate(granules):
        eight = columns(load(numbers.at[pl.ds(granule * GRANULE, GRANULE)], ALONG), shape)
        found = jnp.where(lax.shift_right_logical(row, 3) == i, eight, found)
    return plgpu.layout_cast(jnp.sum(jnp.where(column == (row & (GRANULE - 1)), found, 0), axis=1), DOWN)


class Runs(NamedTuple):
    """Runs of rows, one a kept cluster: i32[lanes P], or in a kernel those of a tile, i32[TILE] in one layout."""

    start: jax.Array
    length: jax.Array  # 0: not kept


def list_items(runs: Runs, tile_items, offsets, num_rows: int, most_runs: int) -> Lists:
    """The items of every lane's runs.

    runs i32[lanes P] over P/64 tiles, of which `offsets` i32[lanes + 1] says how many a lane has; tile_items
    i32[lanes ≥ P/64], items of each tile; num_rows and most_runs bound the rows and runs of a lane.
    """
    lanes = runs.start.shape[0]
    # Runs are disjoint: sorted, each shares at most one granule with the next. The first granule may belong to others.
    capacity = -(-num_rows // GRANULE) + 1 + most_runs
    num_ctas = count_ctas(2)
    shape = (TILE, TILE)  # list positions or runs down, runs along

    def body(starts_gm, lengths_gm, tile_items_gm, off_gm, items_gm, *, items_sm, turn_sm):
        row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=MATRIX)
        column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=MATRIX)
        one = plgpu.layout_cast(jnp.full(shape, 1, jnp.int32), MATRIX)

        def visit(lane, first, end, carry):
            def add(block, base):
                for i in range(AT_ONCE):
                    begin = (block * AT_ONCE + i) * TILE
                    index = plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=DOWN) + begin
                    found = load(tile_items_gm.at[lane, pl.ds(begin, TILE)], DOWN)
                    base = base + jnp.sum(jnp.where(index < first, found, 0))
                return base

            blocks = lax.div(first + (AT_ONCE * TILE - 1), jnp.int32(AT_ONCE * TILE))
            base = lax.fori_loop(0, blocks, add, jnp.int32(0))
            lax.fori_loop(first, end, functools.partial(list_tile, lane), base)
            return carry

        def list_tile(lane, tile, base):
            total = tile_items_gm[lane, tile]
            here = pl.ds(tile * TILE, TILE)

            @pl.when(total > 0)
            def _():
                down = Runs(load(starts_gm.at[lane, here], DOWN), load(lengths_gm.at[lane, here], DOWN))
                along = turn(down, turn_sm)
                items_down, _ = count_items(down, along, result=DOWN)
                items_along, granule = count_items(down, along, result=ALONG)
                position = jnp.sum(jnp.where(row < column, rows(items_down, shape), 0), axis=0)
                position = columns(plgpu.layout_cast(position, ALONG), shape)
                items_of, granule = columns(items_along, shape), columns(granule, shape)
                start, stop = columns(along.start, shape), columns(along.start + along.length, shape)

                def write(block, _):
                    slot = row + block * TILE
                    owned = jnp.logical_and(slot >= position, slot < position + items_of)
                    of_slot = plgpu.layout_cast(jnp.sum(jnp.where(owned, granule + slot - position, 0), axis=1), DOWN)
                    first = rows(of_slot * GRANULE, shape)
                    low, high = (jnp.clip(edge - first, 0, GRANULE) for edge in (start, stop))
                    bits = lax.shift_left(one, high) - lax.shift_left(one, low)
                    items_sm[...] = of_slot * 256 + plgpu.layout_cast(jnp.sum(bits, axis=1), DOWN)

                    def copy(i, _):
                        items_gm[lane, base + block * TILE + i] = items_sm[i]

                    lax.fori_loop(0, jnp.minimum(total - block * TILE, TILE), copy, None)

                lax.fori_loop(0, lax.div(total + (TILE - 1), jnp.int32(TILE)), write, None)

            return base + total

        Shares(off_gm, lanes, num_ctas).visit(lax.axis_index("cta"), visit)

    items = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((lanes, capacity), jnp.int32),
        scratch_types={
            "items_sm": plgpu.SMEM((TILE,), jnp.int32),
            "turn_sm": plgpu.SMEM((len(runs), TILE), jnp.int32),
        },
        grid=(num_ctas,),
        grid_names=("cta",),
        compiler_params=compiler_params(),
        kernel_name="list_items",
    )(*runs, tile_items, offsets)
    # Tiles that a lane does not have were never written.
    has = jnp.arange(tile_items.shape[1])[None, :] < jnp.diff(offsets)[:, None]
    num_items = jnp.sum(jnp.where(has, tile_items, 0), axis=1, dtype=jnp.int32)
    return Lists(items, num_items, offsets_of((num_items + (PER_TILE - 1)) // PER_TILE))


def turn(runs: Runs, scratch) -> Runs:
    """In a kernel: the same runs along a matrix's columns instead of down its rows; scratch i32[2 TILE] in SMEM.

    Reading GPU memory in both layouts instead fails to compile: the two reads become one.
    """
    for i, vector in enumerate(runs):
        scratch[i] = vector
    return Runs(*(load(scratch.at[i], ALONG) for i in range(len(runs))))


def count_items(down: Runs, along: Runs, *, result):
    """In a kernel: how many items each run adds, and the granule of its first one, both i32[TILE].

    `result` is the layout wanted, DOWN or ALONG. A run adds the granules that it touches, but for the first if an
    earlier run of the tile ends there.
    """
    shape = (TILE, TILE)
    if result is DOWN:
        own, other, spread, spread_other, axis = down, along, rows, columns, 1
    else:
        own, other, spread, spread_other, axis = along, down, columns, rows, 0
    granule = lambda row: lax.shift_right_logical(row, 3)
    kept = jnp.minimum(own.length, 1)
    first, last = granule(own.start), granule(own.start + jnp.maximum(own.length, 1) - 1)
    other_last = granule(other.start + jnp.maximum(other.length, 1) - 1)
    earlier = spread_other(other.start, shape) < spread(own.start, shape)
    meets = spread_other(other_last, shape) == spread(first, shape)
    meeting = jnp.where(jnp.logical_and(earlier, meets), spread_other(jnp.minimum(other.length, 1), shape), 0)
    shared = jnp.minimum(plgpu.layout_cast(jnp.sum(meeting, axis=axis), result), 1)
    return kept * (last - first + 1 - shared), first + shared
