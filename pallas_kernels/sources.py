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

from squeezejax.pallas_kernels.mosaic import GRANULE, TILE
from squeezejax.pallas_kernels.work_list import PER_TILE, first_granule, in_order_granules, listed_granules


class InOrder(NamedTuple):
    """Rows that every lane reads from the first one on, the first num_rows of them."""

    keys: jax.Array  # [L K R H]; of a user's own rows [B R K H]
    values: jax.Array
    num_rows: jax.Array  # i32[B K]
    own: bool = False


class Listed(NamedTuple):
    """Listed rows of the cache."""

    keys: jax.Array  # [L K R H]
    values: jax.Array
    items: jax.Array  # i32[B·K J], granule · 256 + mask of its rows
    num_items: jax.Array  # i32[B·K], those that count

    @property
    def own(self) -> bool:
        """No: the cache is every user's."""
        return False


def extents(sources, layer, B: int, K: int):
    """Where each source ends i32[sources lanes], and the tiles of every lane i32[lanes].

    Rows are counted from the beginning of the head's first granule; a source that is listed ends with its items.
    """
    plane = jnp.asarray(layer, jnp.int32) * K + jnp.tile(jnp.arange(K, dtype=jnp.int32), B)
    ends, tiles = [], 0
    for source in sources:
        if isinstance(source, Listed):
            end, per_tile = source.num_items, PER_TILE
        else:
            before = 0 if source.own else first_granule(plane, source.keys.shape[2])[1]
            num_rows = source.num_rows.reshape(B * K)
            end, per_tile = jnp.where(num_rows > 0, before + num_rows, 0), TILE
        ends.append(end)
        tiles = tiles + (end + (per_tile - 1)) // per_tile
    return jnp.stack(ends), tiles


def operands(sources) -> list:
    """The arrays of all sources as a kernel takes them: keys and values of each, and items of one that is listed."""
    caches = [_whole_granules(cache, source.own) for source in sources for cache in (source.keys, source.values)]
    return caches + [source.items for source in sources if isinstance(source, Listed)]


def _whole_granules(cache, own: bool):
    """[L K R H] -> rows of all heads [L·K·R H]; own rows stay [B R K H]."""
    cache = cache if own else cache.reshape(-1, cache.shape[-1])
    axis = 1 if own else 0
    missing = -cache.shape[axis] % GRANULE
    widths = [(0, missing) if i == axis else (0, 0) for i in range(cache.ndim)]
    return jnp.pad(cache, widths) if missing else cache


@dataclasses.dataclass(frozen=True)
class Reader:
    """In a kernel: the sources of one layer, the one that is listed last, with references to `operands`, `extents`."""

    sources: tuple
    arrays: list
    ends: object
    layer: object  # i32[]
    num_heads: int

    def finder(self, lane):
        """A function of a lane's tile: (its source, 8 granules, counted from the head's first one, 8 masks)."""
        last = len(self.sources) - 1
        listed = isinstance(self.sources[-1], Listed)
        end_of = [self.ends[s, lane] for s in range(last + 1)]
        begin_of = [self._first_granule(s, lane)[1] for s in range(last + 1)]

        def find(tile):
            kind, at = jnp.int32(0), tile
            begin, end = begin_of[0], end_of[0]
            for s in range(last):
                tiles = lax.div(end_of[s] + (TILE - 1), jnp.int32(TILE))
                beyond = jnp.logical_and(kind == s, at >= tiles)
                kind, at = jnp.where(beyond, s + 1, kind), jnp.where(beyond, at - tiles, at)
                begin, end = jnp.where(beyond, begin_of[s + 1], begin), jnp.where(beyond, end_of[s + 1], end)
            granules, masks = in_order_granules(at, begin, end)
            if listed:
                listed_here = listed_granules(self.arrays[-1].at[lane], end_of[last], at)
                choose = lambda x, y: [jnp.where(kind == last, a, b) for a, b in zip(x, y, strict=True)]
                granules, masks = choose(listed_here[0], granules), choose(listed_here[1], masks)
            return kind, tuple(granules), tuple(masks)

        return find

    def rows(self, s: int, which: int, lane, granule, num_rows: int):
        """Reference to num_rows rows of a source's keys (which = 0) or values (1), from a lane's granule on."""
        cache = self.arrays[2 * s + which]
        if self.sources[s].own:
            user, head = lax.div(lane, jnp.int32(self.num_heads)), lax.rem(lane, jnp.int32(self.num_heads))
            return cache.at[user, pl.ds(granule * GRANULE, num_rows), head]
        return cache.at[pl.ds((self._first_granule(s, lane)[0] + granule) * GRANULE, num_rows)]

    def _first_granule(self, s: int, lane):
        if self.sources[s].own:
            return jnp.int32(0), jnp.int32(0)
        plane = self.layer * self.num_heads + lax.rem(lane, jnp.int32(self.num_heads))
        return first_granule(plane, self.sources[s].keys.shape[2])
