"""Dot products of decode queries with the centroids that matter to them, for Hopper, and the softmax's statistics.

At the coarsest level every lane (a user and a key/value head) looks at every cluster, and a tile of 64 centroids is
read once for all users. Below it each lane has a list of the children of what it kept (`work_list.Lists`), and nothing
else is read. Either way the tiles are split evenly over CTAs, each of which fetches the next one by TMA while it
computes: 64 centroids in shared memory, a granule of 8 a copy.

Precision: centroids, dot products and statistics are float32 throughout, on the ordinary units, not the tensor cores.
A query is a vector, so the work is bound by reading centroids: 2·G·H operations for 4·H bytes is a quarter of what an
H200 can do meanwhile at G = 4. Rounding centroids to bf16 would halve the bytes and move scores by up to 3 %.
"""

import dataclasses
import math
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
    MASKED,
    MATRIX,
    TILE,
    columns,
    compiler_params,
    count_ctas,
    full,
    load,
    rows,
    swizzled,
)
from squeezejax.pallas_kernels.shares import Shares
from squeezejax.pallas_kernels.work_list import (
    AT_ONCE,
    Lists,
    first_granule,
    gather,
    in_masks,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Tuning of the kernel."""

    columns: int = 64  # head entries of a tile of centroids in registers at once
    heads: int = 4  # query heads, at most, for which these are used before they are read again
    ctas_a_multiprocessor: int = 2

    def __post_init__(self):
        if self.columns % 32:
            raise ValueError(f"columns must be a multiple of 32, got {self.columns}")


class Scores(NamedTuple):
    """What scoring leaves behind, by position in the lists; what a lane does not have was never written."""

    dots: jax.Array  # f32[lanes P M], s(q, c); MASKED for a cluster that takes no part
    stats: jax.Array  # f32[lanes 2 tiles M]: of each tile, max of dots and Σ n·exp(dots − max)


def score_clusters(q, level, lists: Lists, layer, *, config: Config | None = None) -> Scores:
    """Scores the listed clusters of one level for q [B K G H]; M is G rounded up to a multiple of 8.

    level has the fields of the tree's `Level`, L·K·C a multiple of 8; lists are those of the B·K lanes, or of the K
    heads where all users read everything in order; layer i32[]. Clusters of count 0 take no part.
    """
    B, K, G, H = q.shape
    C = level.centroids.shape[2]
    config = config or Config()
    M, lanes, in_order = -(-G // 8) * 8, B * K, lists.items is None
    users = B if in_order else 1  # that share a list
    tiles = lists.num_tiles(C)
    num_ctas = count_ctas(config.ctas_a_multiprocessor)
    pieces = [(h, min(config.columns, H - h)) for h in range(0, H, config.columns)]
    together = -(-G // -(-G // config.heads))
    scale = 1 / math.sqrt(H)

    def body(q_gm, centroids_gm, counts_gm, off_gm, layer_gm, *refs, centroids_sm, arrived):
        *listed, dots_gm, stats_gm = refs

        def visit(index, first, end, fetched):
            """Tiles [first, end) of one list; fetched counts the tiles of the whole share."""
            base, before = first_granule(layer_gm[0] * K + lax.rem(index, jnp.int32(K)), C)

            def find(tile):
                granules, masks = lists.granules(listed, index, tile, before, C)
                return [base + granule for granule in granules], masks

            def fetch(tile, slot):
                for i, granule in enumerate(find(tile)[0]):
                    target = centroids_sm.at[slot, pl.ds(i * GRANULE, GRANULE)]
                    source = centroids_gm.at[pl.ds(granule * GRANULE, GRANULE)]
                    plgpu.copy_gmem_to_smem(source, target, arrived.at[slot])

            def step(tile, fetched):
                slot = lax.rem(fetched, jnp.int32(2))
                pl.when(tile + 1 < end)(lambda: fetch(tile + 1, 1 - slot))
                granules, masks = find(tile)
                count = gather(counts_gm, granules)
                plgpu.barrier_wait(arrived.at[slot])

                lax.fori_loop(0, users, lambda user, _: score_tile(index + user * K, tile, slot, masks, count), None)
                return fetched + 1

            fetch(first, lax.rem(fetched, jnp.int32(2)))
            return lax.fori_loop(first, end, step, fetched)

        def score_tile(lane, tile, slot, masks, count):
            shape = (TILE, M)
            row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=MATRIX)
            column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=MATRIX)

            def score_heads(block, dots):
                heads = [jnp.minimum(block * together + i, G - 1) for i in range(together)]
                dot = [full((TILE,), 0.0, DOWN) for _ in heads]
                for h, width in pieces:
                    part = load(centroids_sm.at[slot, pl.ds(0, TILE), pl.ds(h, width)], MATRIX)
                    for i, g in enumerate(heads):
                        query = load(q_gm.at[lane, g, pl.ds(h, width)], ALONG).astype(jnp.float32)
                        dot[i] = dot[i] + jnp.sum(part * columns(query, part.shape), axis=1)
                for i, g in enumerate(heads):
                    dots = jnp.where(column == g, rows(dot[i] * scale, shape), dots)
                return dots

            dots = lax.fori_loop(0, -(-G // together), score_heads, full(shape, MASKED, MATRIX))
            number = rows(count, shape)
            alive = jnp.logical_and(in_masks(row, masks), number > 0)
            dots = jnp.where(alive, dots, MASKED)
            dots_gm[lane, pl.ds(tile * TILE, TILE)] = dots
            top = jnp.max(dots, axis=0)
            weights = jnp.where(alive, number.astype(jnp.float32) * jnp.exp(dots - columns(top, shape)), 0.0)
            stats_gm[lane, 0, tile] = top
            stats_gm[lane, 1, tile] = jnp.sum(weights, axis=0)

        Shares(off_gm, lists.num_items.shape[0], num_ctas).visit(lax.axis_index("cta"), visit)

    operands = (
        q.reshape(lanes, G, H), level.centroids.reshape(-1, H), level.counts.reshape(-1),
        lists.offsets, jnp.reshape(layer, 1), *lists.operands(),
    )  # fmt: skip
    stats_tiles = -(-tiles // (AT_ONCE * TILE)) * AT_ONCE * TILE  # they are read in blocks of so many
    return Scores(
        *plgpu.kernel(
            body,
            out_type=[
                jax.ShapeDtypeStruct((lanes, tiles * TILE, M), jnp.float32),
                jax.ShapeDtypeStruct((lanes, 2, stats_tiles, M), jnp.float32),
            ],
            scratch_types={
                "centroids_sm": plgpu.SMEM((2, TILE, H), jnp.float32, transforms=swizzled(H, 4)),
                "arrived": plgpu.Barrier(num_arrivals=TILE // GRANULE, num_barriers=2),
            },
            grid=(num_ctas,),
            grid_names=("cta",),
            compiler_params=compiler_params(),
            kernel_name="centroid_scores",
        )(*operands)
    )
