"""A tree in parts of equal size, one for each device that holds a share of the context.

A part holds some of the coarsest clusters of every head, with all that lies below them, and about as many rows as any
other; it is filled up with padding rows (order −1) and dead clusters (count 0). Numbers of rows and clusters go through
all parts, so that the tree reads as before on one device. What goes where is decided on the host, from counts alone.
"""

import dataclasses
import functools
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from squeezejax.mesh import sharding
from squeezejax.tree import Level, Tree, TreeLayer

AnyTree = TypeVar("AnyTree", Tree, TreeLayer)

SPARE = 32  # while a tree is built, a 32nd part more room than its first layer needs: later ones differ a little
GRANULE = 8  # parts hold multiples of so many rows and clusters, so that kernels may read any of them
# Fields of a level that number rows or clusters; all others describe a cluster and move with it.
_NUMBERS = ("starts", "parents", "child_starts", "child_counts")
_OF_HEAD = ("offset",)  # these describe a head, and stay


class Move(NamedTuple):
    """The new order of one axis in one layer: rows, or clusters of a level."""

    old: np.ndarray  # i32[K n], old number, in the new order
    part: np.ndarray  # i32[K n], ascending

    def size(self, parts: int) -> int:
        """Entries of the fullest part of any head."""
        return max(int(np.bincount(part, minlength=parts).max()) for part in self.part)

    def slots(self, parts: int, size: int) -> np.ndarray:
        """The new numbers i32[K n], when every part has room for `size` entries."""
        first = np.stack([np.searchsorted(part, np.arange(parts)) for part in self.part])
        within = np.arange(self.old.shape[1]) - np.take_along_axis(first, self.part, axis=1)
        return (self.part * size + within).astype(np.int32)

    def sources(self, parts: int, size: int) -> np.ndarray:
        """The old number of every new one i32[K parts·size]; −1 = padding."""
        sources = np.full((len(self.old), parts * size), -1, np.int32)
        np.put_along_axis(sources, self.slots(parts, size), self.old, axis=1)
        return sources


def split_context(tree: Tree, parts: int) -> Tree:
    """The tree laid out in `parts` parts, for a mesh whose `context` axis has that many devices, or a divisor of it.

    Attention, selection and files are what they were. Raises ValueError for fewer than one part.
    """
    if parts < 1:
        raise ValueError(f"a tree has at least one part, got {parts}")
    if tree.parts == parts:
        return tree
    return _rearrange(tree, *_lay_out(tree, parts), parts)


def distribute(mesh, tree: Tree) -> Tree:
    """A tree of arrays on the host, which may be memory-mapped, on a mesh; each device is given its share only."""
    parts, rows = sharding.size_of(mesh, "context"), None
    if tree.parts % parts:
        rows, levels = _lay_out(tree, parts)
        arrays = {name: _Rearranged(x, rows, -(name == "order")) for name, x in tree.row_arrays().items()}
        tree = dataclasses.replace(tree, **arrays, levels=levels, parts=parts)

    def put(leaf, wanted):  # copied: a tree must not go on living in the file
        return jax.make_array_from_callback(leaf.shape, wanted, lambda index: np.array(leaf[index]))

    return jax.tree.map(put, tree, sharding.shardings(mesh, tree))


class _Rearranged:
    """Rows of an array on the host, [L K R …], by old number i32[L K R']: gathered as they are asked for."""

    def __init__(self, array, rows, padding):
        self._array, self._rows, self._padding = array, rows, padding
        self.shape, self.dtype = (*rows.shape, *array.shape[3:]), array.dtype

    def __getitem__(self, index):
        layers, heads, rows = (np.arange(n)[part] for n, part in zip(self._rows.shape, index, strict=False))
        old = self._rows[np.ix_(layers, heads, rows)]
        found = np.empty((*old.shape, *self.shape[3:]), self.dtype)
        for at in np.ndindex(len(layers), len(heads)):
            found[at] = self._array[layers[at[0]], heads[at[1]]][np.maximum(old[at], 0)]
        found[old < 0] = self._padding
        return found


def split_layer(tree: Tree | None, layer: TreeLayer, parts: int) -> tuple[Tree | None, TreeLayer]:
    """One layer in parts of the tree's sizes, and the tree, with larger parts if these do not do.

    Without a tree the sizes are those that the layer needs, and a little more for the layers to come.
    """
    levels = sharding.to_host(layer.levels)
    moves = _plan(levels, parts)
    needed = _room(moves, parts)
    ample = [-(-(size + size // SPARE) // GRANULE) * GRANULE for size in needed]
    sizes = ample
    if tree is not None:
        sizes = [rows.shape[2] // parts for rows in (*(level.counts for level in tree.levels), tree.order)]
        if np.any(np.array(needed) > sizes):
            sizes = np.maximum(ample, sizes).tolist()
            tree = _widen(tree, sizes)
    return tree, _rearrange(layer, *_place(levels, moves, sizes, parts), parts)


def _widen(tree: Tree, sizes: list[int]) -> Tree:
    """The tree with parts of the given sizes, none smaller than now, each holding what it held."""

    def stay(total: int) -> Move:
        old = np.broadcast_to(np.arange(total, dtype=np.int32), (tree.num_kv_heads, total))
        return Move(old, old // (total // tree.parts))

    moves = [stay(x.shape[2]) for x in (*(level.counts for level in tree.levels), tree.order)]
    _, levels = _stack(_place(layer, moves, sizes, tree.parts) for layer in _layers(tree))
    return _pad_rows(dataclasses.replace(tree, levels=levels), sizes[-1])


@functools.partial(jax.jit, static_argnames="size")
def _pad_rows(tree: Tree, size: int) -> Tree:
    """With `size` rows in every part."""

    def pad(x, padding=0):
        parts = x.reshape(*x.shape[:2], tree.parts, -1, *x.shape[3:])
        widths = [(0, 0)] * parts.ndim
        widths[3] = (0, size - parts.shape[3])
        return jnp.pad(parts, widths, constant_values=padding).reshape(*x.shape[:2], -1, *x.shape[3:])

    arrays = {name: pad(x, -(name == "order")) for name, x in tree.row_arrays().items()}
    wider = dataclasses.replace(tree, **arrays)
    return sharding.constrain(tree, wider)


def _layers(tree: Tree) -> list[tuple[Level, ...]]:
    """The levels of each layer on the host, arrays [K C …]."""
    on_host = sharding.to_host(tree.levels)
    return [jax.tree.map(lambda leaf, i=i: leaf[i], on_host) for i in range(tree.num_layers)]


def _lay_out(tree: Tree, parts: int) -> tuple[np.ndarray, tuple[Level, ...]]:
    """(old number of each new row i32[L K R'], the levels) of a tree in parts."""
    layers = _layers(tree)
    moves = [_plan(levels, parts) for levels in layers]
    sizes = np.max([_room(layer, parts) for layer in moves], axis=0).tolist()
    return _stack(_place(*layer, sizes, parts) for layer in zip(layers, moves, strict=True))


def _stack(layers):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *layers)


@functools.partial(jax.jit, static_argnames="parts")
def _rearrange(tree: AnyTree, rows, levels: tuple[Level, ...], parts: int) -> AnyTree:
    """The tree, or one layer, with other levels, and rows by their old number i32[… R'], −1 for padding."""

    def take(x, padding=0):
        index = rows.reshape(*rows.shape, *(1,) * (x.ndim - rows.ndim))
        taken = jnp.take_along_axis(x, jnp.maximum(index, 0), axis=rows.ndim - 1)
        return jnp.where(index < 0, jnp.asarray(padding, x.dtype), taken)

    arrays = {name: take(x, -(name == "order")) for name, x in tree.row_arrays().items()}
    return sharding.constrain(tree, dataclasses.replace(tree, **arrays, levels=levels, parts=parts))


def _plan(levels: tuple[Level, ...], parts: int) -> list[Move]:
    """Where the clusters of each level, coarse → fine, and then the rows of one layer go; levels have axes [K C …]."""
    coarsest, finest = levels[0], levels[-1]
    part = _assign(coarsest.counts, parts)
    moves = [_sort(part, part)]
    for level in levels[1:]:
        position = np.argsort(moves[-1].old, axis=1)  # old number -> place in the new order
        of_parent = np.take_along_axis(position, level.parents, axis=1)
        moves.append(_sort(of_parent, np.take_along_axis(moves[-1].part, of_parent, axis=1)))
    rows = []
    for old, part, starts, counts in zip(*moves[-1], finest.starts, finest.counts, strict=True):
        counts, starts = counts[old], starts[old]
        first = np.cumsum(counts) - counts  # of each cluster, in the new order without padding
        rows.append((np.repeat(starts - first, counts) + np.arange(counts.sum()), np.repeat(part, counts)))
    return [*moves, Move(*(np.stack(entry).astype(np.int32) for entry in zip(*rows, strict=True)))]


def _room(moves: list[Move], parts: int) -> list[int]:
    """Entries that a part must have room for: clusters of each level, and rows."""
    *clusters, rows = (move.size(parts) for move in moves)
    return [*clusters, -(-rows // GRANULE) * GRANULE]


def _place(levels: tuple[Level, ...], moves: list[Move], sizes, parts: int) -> tuple[np.ndarray, tuple[Level, ...]]:
    """One layer in parts of the given sizes: (old number of each new row i32[K R'], its levels)."""
    *of_levels, of_rows = moves
    *_, num_rows = sizes
    placed = []
    for level, move, C in zip(levels, of_levels, sizes, strict=False):
        sources = move.sources(parts, C)
        # Numbers of rows and clusters are made anew, what describes a cluster moves with it.
        moved = {
            field.name: _take(getattr(level, field.name), sources)
            for field in dataclasses.fields(level)
            if field.name not in _NUMBERS + _OF_HEAD and getattr(level, field.name) is not None
        }
        part = np.arange(parts * C, dtype=np.int32) // C
        counts = moved["counts"].reshape(-1, parts, C)
        first = (np.cumsum(counts, axis=2) - counts).reshape(-1, parts * C)
        starts = (part * num_rows + np.where(moved["counts"] > 0, first, 0)).astype(np.int32)
        moved |= {name: getattr(level, name) for name in _OF_HEAD} | {"centroids": moved.get("centroids")}
        placed.append(Level(**moved, starts=starts, parents=np.zeros_like(sources)))
    for i in range(1, len(levels)):
        parents = _place_parents(levels[i].parents, moves[i - 1 : i + 1], sizes[i - 1 : i + 1], parts)
        counts = np.stack([np.bincount(p, minlength=parts * sizes[i - 1]) for p in parents]).astype(np.int32)
        starts = np.cumsum(counts, axis=1, dtype=np.int32) - counts
        placed[i - 1] = dataclasses.replace(placed[i - 1], child_starts=starts, child_counts=counts)
        placed[i] = dataclasses.replace(placed[i], parents=parents)
    return of_rows.sources(parts, num_rows), tuple(placed)


def _place_parents(parents, moves, sizes, parts: int) -> np.ndarray:
    """The new numbers of the parents i32[K C], from the moves and sizes of the parents' level and the children's."""
    (above, move), (C_above, C) = moves, sizes
    new_number = np.take_along_axis(above.slots(parts, C_above), np.argsort(above.old, axis=1), axis=1)
    sources = move.sources(parts, C)
    moved = _take(np.take_along_axis(new_number, parents, axis=1), sources)
    # Padding goes to the last parent of its part: children are runs then, with none left out.
    last = (np.arange(parts * C, dtype=np.int32) // C + 1) * C_above - 1
    return np.where(sources < 0, last, moved).astype(np.int32)


def _take(x, sources) -> np.ndarray:
    """Entries of x [K C …] by old number i32[K C'], zeros for −1."""
    index = sources.reshape(*sources.shape, *(1,) * (x.ndim - 2))
    return np.where(index < 0, np.zeros((), x.dtype), np.take_along_axis(x, np.maximum(index, 0), axis=1))


def _sort(by, part) -> Move:
    """Stable, so that runs stay runs: by i32[K n], part i32[K n] of each entry."""
    old = np.argsort(by, axis=1, kind="stable").astype(np.int32)
    return Move(old, np.take_along_axis(part, old, axis=1).astype(np.int32))


def _assign(counts, parts: int) -> np.ndarray:
    """A part for each cluster i32[K C]: the largest first, each to the part that has the fewest rows so far."""
    load, part = np.zeros((len(counts), parts), np.int64), np.zeros(counts.shape, np.int32)
    head = np.arange(len(counts))
    for cluster in np.argsort(-counts, axis=1, kind="stable").T:
        lightest = np.argmin(load, axis=1)
        part[head, cluster] = lightest
        load[head, lightest] += counts[head, cluster]
    return part
