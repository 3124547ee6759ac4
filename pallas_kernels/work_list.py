"""From kept clusters to the attention kernel's list of items, for Hopper.

An item is `granule · 256 + mask`: 8 rows of the cache that TMA fetches together, and which of them are attended. A
cluster is a run of rows that may begin and end inside granules. Clusters of one chunk that meet in a granule share its
item, the mask telling all their rows; only at the border of two chunks is a granule listed twice, with disjoint masks.

Positions in the list are prefix sums. A kernel has no scan and no scatter, but chunks are small: everything is
comparisons of 64 list positions with 64 clusters in registers, then a copy of exactly the entries that count.
"""

from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from squeezejax.pallas_kernels.mosaic import ALONG, DOWN, GRANULE, MATRIX, columns, compiler_params, load, rows

CHUNK = 64  # clusters of one CTA


def pad_clusters(x):
    """[… C] -> [… C']: a chunk of zeros before cluster 0, and zeros up to whole chunks after the last one."""
    C = x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(CHUNK, -C % CHUNK)])


def list_items(kept, starts, counts, chunk_items, num_rows: int):
    """The items of every lane's kept clusters: i32[B K J], of which the first `sum(chunk_items)` of a lane count.

    kept, counts i32[B K C'] and starts i32[K C'] padded by `pad_clusters`; chunk_items i32[B K chunks], items of each
    chunk; num_rows R of a head. J = R / 8 + C' always suffices.
    """
    B, K, padded_C = kept.shape
    chunks = chunk_items.shape[2]
    U = B * K
    capacity = num_rows // GRANULE + padded_C
    padded_chunks = -(-chunks // CHUNK) * CHUNK
    totals = jnp.pad(chunk_items.reshape(U, chunks), ((0, 0), (0, padded_chunks - chunks)))
    shape = (CHUNK, CHUNK)  # list positions or clusters down, clusters along

    def body(kept_gm, starts_gm, counts_gm, totals_gm, items_gm, *, items_sm, turn_sm):
        chunk, lane = lax.axis_index("chunk"), lax.axis_index("lane")
        head = lax.rem(lane, jnp.int32(K))
        here = pl.ds(CHUNK + chunk * CHUNK, CHUNK)
        total = totals_gm[lane, chunk]

        def before(block, base):
            index = plgpu.broadcasted_iota(jnp.int32, (CHUNK,), 0, layout=DOWN) + block * CHUNK
            found = load(totals_gm.at[lane, pl.ds(block * CHUNK, CHUNK)], DOWN)
            return base + jnp.sum(jnp.where(index < chunk, found, 0))

        @pl.when(total > 0)
        def _():
            base = lax.fori_loop(0, padded_chunks // CHUNK, before, jnp.int32(0))
            down = Runs(
                *(
                    load(ref, DOWN)
                    for ref in (starts_gm.at[head, here], counts_gm.at[lane, here], kept_gm.at[lane, here])
                )
            )
            along = turn(down, turn_sm)
            items_down, _ = count_items(down, along, result=DOWN)
            items_along, granule = count_items(down, along, result=ALONG)
            row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=MATRIX)
            column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=MATRIX)
            position = plgpu.layout_cast(jnp.sum(jnp.where(row < column, rows(items_down, shape), 0), axis=0), ALONG)
            position, items_of, granule = (columns(x, shape) for x in (position, items_along, granule))
            start, end = columns(along.start, shape), columns(along.start + along.count * along.kept, shape)

            one = plgpu.layout_cast(jnp.full(shape, 1, jnp.int32), MATRIX)

            def write(block, _):
                slot = row + block * CHUNK
                owned = jnp.logical_and(slot >= position, slot < position + items_of)
                of_slot = plgpu.layout_cast(jnp.sum(jnp.where(owned, granule + slot - position, 0), axis=1), DOWN)
                first = rows(of_slot * GRANULE, shape)
                low = jnp.clip(start - first, 0, GRANULE)
                high = jnp.clip(end - first, 0, GRANULE)
                bits = lax.shift_left(one, high) - lax.shift_left(one, low)
                items_sm[...] = of_slot * 256 + plgpu.layout_cast(jnp.sum(bits, axis=1), DOWN)

                def copy(i, _):
                    items_gm[lane, base + block * CHUNK + i] = items_sm[i]

                lax.fori_loop(0, jnp.minimum(total - block * CHUNK, CHUNK), copy, None)

            lax.fori_loop(0, lax.div(total + (CHUNK - 1), jnp.int32(CHUNK)), write, None)

    flat = lambda x: x.reshape(U, padded_C)
    items = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((U, capacity), jnp.int32),
        scratch_types={
            "items_sm": plgpu.SMEM((CHUNK,), jnp.int32),
            "turn_sm": plgpu.SMEM((3, CHUNK), jnp.int32),
        },
        grid=(chunks, U),
        grid_names=("chunk", "lane"),
        compiler_params=compiler_params(),
        kernel_name="list_items",
    )(flat(kept), starts, flat(counts), totals)
    return items.reshape(B, K, capacity)


class Runs(NamedTuple):
    """In a kernel: the clusters of a chunk, each i32[CHUNK] in one layout."""

    start: jax.Array
    count: jax.Array
    kept: jax.Array  # 0 or 1


def turn(runs: Runs, scratch) -> Runs:
    """In a kernel: the same clusters along a matrix's columns instead of down its rows; scratch i32[3 CHUNK] in SMEM.

    Reading GPU memory in both layouts instead fails to compile: the two reads become one.
    """
    for i, vector in enumerate(runs):
        scratch[i] = vector
    return Runs(*(load(scratch.at[i], ALONG) for i in range(len(runs))))


def count_items(down: Runs, along: Runs, *, result):
    """In a kernel: how many items each cluster adds, and the granule of its first one, both i32[CHUNK].

    `result` is the layout wanted, DOWN or ALONG. A kept cluster adds the granules that it touches, but for the first
    if an earlier kept one ends there.
    """
    shape = (CHUNK, CHUNK)
    if result is DOWN:
        own, other, spread, spread_other, axis = down, along, rows, columns, 1
    else:
        own, other, spread, spread_other, axis = along, down, columns, rows, 0
    granule = lambda row: lax.shift_right_logical(row, 3)
    first, last = granule(own.start), granule(own.start + jnp.maximum(own.count, 1) - 1)
    other_last = granule(other.start + jnp.maximum(other.count, 1) - 1)
    # Clusters of no key have no last granule; they are never kept.
    earlier = spread_other(other.start, shape) < spread(own.start, shape)
    meets = spread_other(other_last, shape) == spread(first, shape)
    meeting = jnp.where(jnp.logical_and(earlier, meets), spread_other(other.kept, shape), 0)
    shared = jnp.minimum(plgpu.layout_cast(jnp.sum(meeting, axis=axis), result), 1)
    return own.kept * (last - first + 1 - shared), first + shared
