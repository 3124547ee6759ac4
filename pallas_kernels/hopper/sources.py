"""Where the keys and values of a decode step lie, and finding them in a kernel: listed rows, and rows in order.

The rows of all heads of an array [L K R H] lie one behind the other, and TMA fetches whole granules of 8 rows, counted
through all of them. A head may begin inside a granule; the rows of others are masked.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from squeezejax.pallas_kernels.hopper.mosaic import GRANULE, TILE
from squeezejax.pallas_kernels.hopper.shares import offsets_of
from squeezejax.pallas_kernels.hopper.step import Step
from squeezejax.pallas_kernels.hopper.work_list import Lists, first_granule, in_order_items, listed_items


class InOrder(NamedTuple):
    """Rows that every lane reads from the first one on."""

    keys: jax.Array  # [L K R H]; of a user's own rows [B R K H]
    values: jax.Array
    num_rows: int | None  # as many; None: the user's own rows, as many as the step says
    if_all: bool = False  # only where every threshold is −∞

    @property
    def own(self) -> bool:
        """Whether every user has rows of its own."""
        return self.num_rows is None


class Listed(NamedTuple):
    """Rows of the cache that a lane keeps."""

    keys: jax.Array  # [L K R H]
    values: jax.Array
    lists: Lists  # never in order

    own = False


def operands(sources) -> list:
    """The arrays of all sources as a kernel takes them: keys and values of each, and the list of one listed."""
    caches = [_whole_granules(cache, source.own) for source in sources for cache in (source.keys, source.values)]
    lists = [source.lists for source in sources if isinstance(source, Listed)]
    return caches + [x for one in lists for x in (one.num_items, one.items)]


def _whole_granules(cache, own: bool):
    """[L K R H] -> rows of all heads [L·K·R H]; own rows stay [B R K H]."""
    cache = cache if own else cache.reshape(-1, cache.shape[-1])
    axis = 1 if own else 0
    missing = -cache.shape[axis] % GRANULE
    widths = [(0, missing) if i == axis else (0, 0) for i in range(cache.ndim)]
    return jnp.pad(cache, widths) if missing else cache


@dataclasses.dataclass(frozen=True)
class Reader:
    """In a kernel: the sources of one layer, the one that is listed last, with references to their `operands`.

    Outside a kernel, with a step of arrays, it knows how many tiles there are.
    """

    sources: tuple
    arrays: list  # references
    step: Step  # references too
    num_heads: int

    @property
    def listed(self) -> bool:
        """Whether the last source is listed."""
        return isinstance(self.sources[-1], Listed)

    @property
    def in_order(self) -> tuple:
        """The other sources."""
        return self.sources[:-1] if self.listed else self.sources

    def tiles_in_order(self, lane):
        """Tiles of 64 rows of a lane's sources in order, i32[]: they come before those listed."""
        return sum((_tiles(self._end(s, lane)) for s in range(len(self.in_order))), jnp.int32(0))

    def offsets(self, lanes: int):
        """Outside kernels: i32[lanes + 1], exclusive sums of the lanes' tiles."""
        tiles = jax.vmap(self.tiles_in_order)(jnp.arange(lanes))
        return offsets_of(tiles + self.sources[-1].lists.num_tiles if self.listed else tiles)

    def finder(self, lane):
        """A function of a lane's tile: (its source, its 8 items, granules counted from the head's first one)."""
        last = len(self.in_order)
        end_of = [self._end(s, lane) for s in range(last)]
        begin_of = [self._first_granule(s, lane)[1] for s in range(last)]
        if self.listed:
            num_items_gm, items_gm = self.arrays[-2:]
            num_items = num_items_gm[lane]

        def find(tile):
            kind, at = jnp.int32(0), tile
            begin, end = (begin_of[0], end_of[0]) if last else (jnp.int32(0), jnp.int32(0))
            for s in range(len(self.sources) - 1):
                tiles = _tiles(end_of[s])
                beyond = jnp.logical_and(kind == s, at >= tiles)
                kind, at = jnp.where(beyond, s + 1, kind), jnp.where(beyond, at - tiles, at)
                if s + 1 < last:
                    begin, end = jnp.where(beyond, begin_of[s + 1], begin), jnp.where(beyond, end_of[s + 1], end)
            in_order = lambda: in_order_items(at, begin, end)
            listed = lambda: listed_items(items_gm, num_items, lane, at)
            if not self.listed:
                return kind, in_order()
            return kind, lax.cond(kind == last, listed, in_order) if last else listed()

        return find

    def rows(self, s: int, which: int, lane, granule, num_rows: int):
        """Reference to num_rows rows of a source's keys (which = 0) or values (1), from a lane's granule on."""
        cache = self.arrays[2 * s + which]
        if self.sources[s].own:
            user, head = lax.div(lane, jnp.int32(self.num_heads)), lax.rem(lane, jnp.int32(self.num_heads))
            return cache.at[user, pl.ds(granule * GRANULE, num_rows), head]
        return cache.at[pl.ds((self._first_granule(s, lane)[0] + granule) * GRANULE, num_rows)]

    def _end(self, s: int, lane):
        """The row at which a lane's rows in order end, counted from the beginning of the head's first granule."""
        source = self.sources[s]
        if source.own:
            return self.step.own_rows(lax.div(lane, jnp.int32(self.num_heads)))
        end = self._first_granule(s, lane)[1] + source.num_rows
        return jnp.where(self.step.everything(), end, 0) if source.if_all else end

    def _first_granule(self, s: int, lane):
        if self.sources[s].own:
            return jnp.int32(0), jnp.int32(0)
        plane = self.step.layer[0] * self.num_heads + lax.rem(lane, jnp.int32(self.num_heads))
        return first_granule(plane, self.sources[s].keys.shape[2])


def _tiles(end):
    return lax.div(end + (TILE - 1), jnp.int32(TILE))
