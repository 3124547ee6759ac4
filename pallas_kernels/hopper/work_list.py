"""Lists of what a kernel reads next, for Hopper: made of what an earlier one kept, read by granules of 8 rows.

An item is `granule · 256 + mask`: 8 neighbouring rows that TMA fetches together, and which of them count. Rows are
keys of the cache, or clusters of the next finer level: both lie in runs, and what is kept of one level is a set of
runs of the next. Runs of one tile (64 clusters) that meet in a granule share its item, the mask telling all their
rows; only where runs of two tiles meet is a granule listed twice, with disjoint masks.

Marking leaves runs behind, tile by tile, and how many items each makes (`Kept`). Who reads them makes the items, 64 at
a time, when it gets there (`Lister`), so that listing is no launch of its own. A kernel has no scan and no scatter, but
tiles are small: positions come from comparing 64 numbers with 64 in registers.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from squeezejax.pallas_kernels.hopper.mosaic import ALONG, DOWN, GRANULE, MATRIX, TILE, columns, load, rows

PER_TILE = TILE // GRANULE
AT_ONCE = 4  # blocks of 64 numbers read together, so that their latencies overlap


class Lists(NamedTuple):
    """What every lane reads of a level, tile by tile (8 items, 64 rows)."""

    items: jax.Array  # i32[lanes J], of which the first num_items count
    num_items: jax.Array  # i32[lanes'], lanes' = lanes rounded up to whole granules
    offsets: jax.Array  # i32[lanes + 1] tiles, exclusive sums


class Kept(NamedTuple):
    """What the clusters kept of one level lead to, by position in what the lanes read; what they do not have was
    never written. A tile are 64 of them."""

    starts: jax.Array  # i32[lanes P], first row of a cluster's run, counted from the head's first granule
    stops: jax.Array  # i32[lanes P], the row after its last; as `starts` if the cluster is not kept
    counts: jax.Array  # i32[lanes P], items that the cluster adds
    positions: jax.Array  # i32[lanes P], items that the tile's clusters before it add
    tile_items: jax.Array  # i32[tiles' lanes'], items of a tile, tiles' = tiles rounded up to 64
    tile_rows: jax.Array  # i32[lanes tiles'], rows of a tile
    num_read: jax.Array | None  # i32[lanes'], clusters' granules that a lane read, 8 a tile; None: all, in order

    @property
    def most_tiles(self) -> int:
        """The most tiles that a lane can have."""
        return self.starts.shape[1] // TILE

    def num_rows(self, lanes: int):
        """i32[lanes], rows that each lane keeps; outside kernels."""
        tiles = self.most_tiles if self.num_read is None else -(-self.num_read[:lanes, None] // PER_TILE)
        has = jnp.arange(self.most_tiles)[None, :] < tiles
        return jnp.sum(jnp.where(has, self.tile_rows, 0), axis=1, dtype=jnp.int32)


def tiles_in_order(num_rows: int) -> int:
    """Tiles of a head's rows in order: the first row may be the last one of its granule."""
    return -(-(num_rows + GRANULE - 1) // TILE)


def padded(lanes: int) -> int:
    """Numbers of lanes are kept in arrays of whole granules, which a kernel can read at once."""
    return -(-lanes // GRANULE) * GRANULE


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


def listed_granules(item_at, num_items, tile):
    """In a kernel: (granules, masks) of a lane's tile, item_at(position) being its items.

    Past the end it is the last one again, with masks 0.
    """
    granules, masks = [], []
    for i in range(PER_TILE):
        at = tile * PER_TILE + i
        item = item_at(jnp.clip(at, 0, jnp.maximum(num_items - 1, 0)))
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
    """In a kernel: runs of rows, those of a tile's clusters, i32[TILE] in one layout."""

    start: jax.Array
    length: jax.Array  # 0: not kept


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


def before_each(numbers):
    """In a kernel: sums of the numbers before each one, i32[TILE] down the rows -> along the columns."""
    shape = (TILE, TILE)
    row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=MATRIX)
    column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=MATRIX)
    return plgpu.layout_cast(jnp.sum(jnp.where(row < column, rows(numbers, shape), 0), axis=0), ALONG)


def sums_to_each(numbers):
    """In a kernel: sums of the numbers before each one, and with it, i32[TILE] along the columns -> down the rows.

    Each of the two is reduced within warps (`Lister`).
    """
    shape = (TILE, TILE)
    row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=MATRIX)
    column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=MATRIX)
    spread = columns(numbers, shape)
    add = lambda which: plgpu.layout_cast(jnp.sum(jnp.where(which, spread, 0), axis=1), DOWN)
    return add(column < row), add(column <= row)


@dataclasses.dataclass(frozen=True)
class Lister:
    """In a kernel: what lanes keep as items; one warpgroup has to `prepare`, after which all can ask for numbers.

    A sum across the warps of a warpgroup goes through shared memory that Mosaic reserves once a CTA: two warpgroups
    that reduce so at once overwrite each other's sums, which no barrier of either prevents. `prepare` does that;
    `items`, called while other warpgroups work, sums within warps only. `benchmarks.gpu.mosaic_code` finds violations.
    """

    kept: Kept  # references
    skip: object  # bool[]: nothing was marked, and nothing is listed
    lanes: int
    sums_sm: object  # scratch, as `scratch` makes it
    begins_sm: object

    @staticmethod
    def scratch(kept: Kept) -> dict:
        """What it needs of shared memory."""
        chunks, lanes = kept.tile_items.shape[0] // TILE, kept.tile_items.shape[1]
        return {"sums_sm": plgpu.SMEM((chunks, lanes), jnp.int32), "begins_sm": plgpu.SMEM((3, TILE), jnp.int32)}

    @property
    def _chunks(self) -> int:
        return self.kept.tile_items.shape[0] // TILE

    def prepare(self):
        """Sums up the items of every 64 tiles, a chunk, of every lane."""
        shape = (TILE, GRANULE)
        row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=MATRIX)
        eights = self.kept.tile_items.shape[1] // GRANULE

        def add(i):
            chunk, eight = lax.div(i, jnp.int32(eights)), lax.rem(i, jnp.int32(eights))
            here = pl.ds(eight * GRANULE, GRANULE)
            if self.kept.num_read is None:
                tiles = self.kept.most_tiles
            else:
                read = load(self.kept.num_read.at[here], ALONG)
                tiles = columns(lax.shift_right_logical(read + (PER_TILE - 1), 3), shape)
            has = jnp.logical_and(row + chunk * TILE < tiles, jnp.logical_not(self.skip))
            found = load(self.kept.tile_items.at[pl.ds(chunk * TILE, TILE), here], MATRIX)
            return chunk, here, jnp.where(has, found, 0)

        def add_some(first, number):
            for chunk, here, found in [add(first + i) for i in range(number)]:
                self.sums_sm[chunk, here] = jnp.sum(found, axis=0)

        blocks = self._chunks * eights
        lax.fori_loop(0, blocks // AT_ONCE, lambda block, _: add_some(block * AT_ONCE, AT_ONCE), None)
        add_some(jnp.int32(blocks - blocks % AT_ONCE), blocks % AT_ONCE)
        plgpu.commit_smem()  # a barrier: what one warp wrote others read

    def num_items(self, lane):
        """Items of a lane."""
        return lax.fori_loop(0, self._chunks, lambda chunk, total: total + self.sums_sm[chunk, lane], jnp.int32(0))

    def items(self, lane, first):
        """A lane's items at positions first to first + 64, i32[TILE] down the rows; 0 past its end."""

        def add(chunk, state):
            base, items = state
            number = self.sums_sm[chunk, lane]
            meets = jnp.logical_and(base < first + TILE, base + number > first)
            listed = lambda _, items: self._add_chunk(lane, chunk, base - first, items)
            return base + number, lax.fori_loop(0, jnp.where(meets, 1, 0), listed, items)

        nothing = plgpu.layout_cast(jnp.full((TILE,), 0, jnp.int32), DOWN)
        return lax.fori_loop(0, self._chunks, add, (jnp.int32(0), nothing))[1]

    def _add_chunk(self, lane, chunk, base, items):
        """Adds the items of 64 tiles, whose first has position `base` here."""
        index = plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=DOWN)
        if self.kept.num_read is None:
            tiles = self.kept.most_tiles
        else:
            tiles = lax.shift_right_logical(self.kept.num_read[lane] + (PER_TILE - 1), 3)
        numbers = load(self.kept.tile_items.at[pl.ds(chunk * TILE, TILE), lane], DOWN)
        plgpu.commit_smem()  # a barrier: all warps are done with the chunk before
        self.begins_sm[2] = jnp.where(index + chunk * TILE < tiles, numbers, 0)
        plgpu.commit_smem()
        for i, sums in enumerate(sums_to_each(load(self.begins_sm.at[2], ALONG))):
            self.begins_sm[i] = sums + base
        plgpu.commit_smem()
        begins, ends = (load(self.begins_sm.at[i], ALONG) for i in range(2))
        first = jnp.sum(jnp.where(ends <= 0, 1, 0))
        end = jnp.sum(jnp.where(begins < TILE, 1, 0))

        def add_tile(tile, items):
            begin, stop = self.begins_sm[0, tile], self.begins_sm[1, tile]
            expand = lambda _, items: items + self._expand(lane, chunk * TILE + tile, begin, stop)
            return lax.fori_loop(0, jnp.minimum(stop - begin, 1), expand, items)

        return lax.fori_loop(first, end, add_tile, items)

    def _expand(self, lane, tile, begin, end):
        """The items of a tile in the positions that they have here, [begin, end) and within 64; 0 elsewhere."""
        shape = (TILE, TILE)  # positions down, clusters along
        here = pl.ds(tile * TILE, TILE)
        kept = self.kept
        start, stop, count, position = (
            load(ref.at[lane, here], ALONG) for ref in (kept.starts, kept.stops, kept.counts, kept.positions)
        )
        granule = lax.shift_right_logical(stop + (GRANULE - 1), 3) - count  # of a cluster's first item
        slot = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=MATRIX) - begin
        owned = jnp.logical_and(slot >= columns(position, shape), slot < columns(position + count, shape))
        granules = jnp.where(owned, columns(granule - position, shape) + slot, 0)
        of_slot = plgpu.layout_cast(jnp.sum(granules, axis=1), DOWN)
        first = rows(of_slot * GRANULE, shape)
        low, high = (jnp.clip(columns(edge, shape) - first, 0, GRANULE) for edge in (start, stop))
        one = plgpu.layout_cast(jnp.full(shape, 1, jnp.int32), MATRIX)
        bits = lax.shift_left(one, high) - lax.shift_left(one, low)
        item = of_slot * 256 + plgpu.layout_cast(jnp.sum(bits, axis=1), DOWN)
        index = plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=DOWN)
        return jnp.where(jnp.logical_and(index >= begin, index < end), item, 0)
