"""Dot products of decode queries with the centroids that matter to them, for Hopper, and the softmax's statistics.

At the coarsest level every lane (a user and a key/value head) looks at every cluster, and a tile of 64 centroids is
read once for all users. Below it each lane reads the children of what it kept, and nothing else; their list is made
here, by each CTA as far as it needs it (`work_list.Lister`), and left for marking. Either way the tiles are split
evenly over CTAs, each of which fetches the next one by TMA while it computes: 64 centroids in shared memory, a granule
of 8 a copy.

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

from squeezejax.pallas_kernels.hopper.mosaic import (
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
from squeezejax.pallas_kernels.hopper.shares import Even, Shares
from squeezejax.pallas_kernels.hopper.step import Step
from squeezejax.pallas_kernels.hopper.work_list import (
    AT_ONCE,
    PER_TILE,
    Kept,
    Lister,
    Lists,
    first_granule,
    gather,
    in_masks,
    in_order_granules,
    listed_granules,
    padded,
    tiles_in_order,
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


def score_clusters(
    q, level, above: Kept | None, step: Step, may_skip: bool, *, config: Config | None = None
) -> tuple[Scores, Lists | None]:
    """Scores clusters of one level for q [B K G H]; M is G rounded up to a multiple of 8.

    level has the fields of the tree's `Level`, L·K·C a multiple of 8. `above`, what is kept of the next coarser level,
    says which clusters each of the B·K lanes reads; None is all in order, and then no list is given back. Clusters of
    count 0 take no part. With may_skip, nothing is read where every threshold is −∞.
    """
    B, K, G, H = q.shape
    C = level.centroids.shape[2]
    config = config or Config()
    M, lanes, in_order = -(-G // 8) * 8, B * K, above is None
    users = B if in_order else 1  # that share what is read
    num_lists = K if in_order else lanes
    # Runs are disjoint: sorted, each shares at most one granule with the next. The first granule may belong to others.
    most_items = 0 if in_order else -(-(-(-C // GRANULE) + 1 + above.starts.shape[1]) // TILE) * TILE
    tiles = tiles_in_order(C) if in_order else most_items // PER_TILE
    num_ctas = count_ctas(config.ctas_a_multiprocessor)
    pieces = [(h, min(config.columns, H - h)) for h in range(0, H, config.columns)]
    together = -(-G // -(-G // config.heads))
    scale = 1 / math.sqrt(H)
    kept_operands = [] if in_order else [x for x in above if x is not None]

    def body(q_gm, centroids_gm, counts_gm, *refs, centroids_sm, arrived, **listing):
        asked, refs = Step(*refs[: len(step)]), refs[len(step) :]
        kept, (dots_gm, stats_gm, *lists) = refs[: len(kept_operands)], refs[len(kept_operands) :]
        cta = lax.axis_index("cta")
        skip = asked.everything() if may_skip else jnp.bool_(False)
        if in_order:
            offsets = Even(jnp.where(skip, 0, jnp.int32(tiles)))
        else:
            items_gm, num_items_gm, offsets_gm = lists
            offsets, items_sm = listing.pop("offsets_sm"), listing.pop("items_sm")
            lister = Lister(Kept(*kept, *[None] * (len(above) - len(kept))), skip, lanes, **listing)
            plan(lister, cta, offsets, num_items_gm, offsets_gm)

        def visit(index, first, end, fetched):
            """Tiles [first, end) of one list; fetched counts the tiles of the whole share."""
            base, before = first_granule(asked.layer[0] * K + lax.rem(index, jnp.int32(K)), C)
            num_items = None if in_order else lister.num_items(index)

            def list_items(tile):
                """Once in 8 tiles the next 64 items, to one half of the shared memory for them, and for marking."""
                begin = tile * PER_TILE

                @pl.when(lax.rem(tile - first, jnp.int32(PER_TILE)) == 0)
                def _():
                    items = lister.items(index, begin)
                    plgpu.commit_smem()  # a barrier: all warps are done with what lay there
                    items_sm[pl.ds(lax.rem(begin - first * PER_TILE, jnp.int32(2 * TILE)), TILE)] = items
                    items_gm[index, pl.ds(begin, TILE)] = items
                    plgpu.commit_smem()

            def find(tile):
                if in_order:
                    granules, masks = in_order_granules(tile, before, before + C)
                else:
                    item_at = lambda at: items_sm[lax.rem(at - first * PER_TILE, jnp.int32(2 * TILE))]
                    granules, masks = listed_granules(item_at, num_items, tile)
                return [base + granule for granule in granules], masks

            def fetch(tile, slot):
                plgpu.commit_smem()  # the slot was read by loads, after which TMA, which overwrites it, needs a fence
                if not in_order:
                    list_items(tile)
                for i, granule in enumerate(find(tile)[0]):
                    target = centroids_sm.at[slot, pl.ds(i * GRANULE, GRANULE)]
                    source = centroids_gm.at[pl.ds(granule * GRANULE, GRANULE)]
                    plgpu.copy_gmem_to_smem(source, target, arrived.at[slot])

            def step(tile, fetched):
                slot = lax.rem(fetched, jnp.int32(2))
                granules, masks = find(tile)
                pl.when(tile + 1 < end)(lambda: fetch(tile + 1, 1 - slot))
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

        Shares(offsets, num_lists, num_ctas).visit(cta, visit)

    stats_tiles = -(-tiles // (AT_ONCE * TILE)) * AT_ONCE * TILE  # they are read in blocks of so many
    outputs = [((lanes, tiles * TILE, M), jnp.float32), ((lanes, 2, stats_tiles, M), jnp.float32)]
    scratch = {
        "centroids_sm": plgpu.SMEM((2, TILE, H), jnp.float32, transforms=swizzled(H, 4)),
        "arrived": plgpu.Barrier(num_arrivals=TILE // GRANULE, num_barriers=2),
    }
    if not in_order:
        # The last 64 items listed may begin anywhere.
        outputs += [((lanes, most_items + TILE), jnp.int32), ((padded(lanes),), jnp.int32), ((lanes + 1,), jnp.int32)]
        scratch |= Lister.scratch(above) | {
            "offsets_sm": plgpu.SMEM((padded(lanes + 1),), jnp.int32), "items_sm": plgpu.SMEM((2 * TILE,), jnp.int32)
        }  # fmt: skip
    dots, stats, *lists = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(*output) for output in outputs],
        scratch_types=scratch,
        grid=(num_ctas,),
        grid_names=("cta",),
        compiler_params=compiler_params(across_warps=True),
        kernel_name="centroid_scores",
    )(q.reshape(lanes, G, H), level.centroids.reshape(-1, H), level.counts.reshape(-1), *step, *kept_operands)
    return Scores(dots, stats), None if in_order else Lists(*lists)


def plan(lister: Lister, cta, offsets_sm, num_items_gm, offsets_gm):
    """In a kernel: how the lists of all lanes are split, in shared memory and, for others, from the first CTA."""
    lister.prepare()

    def add(lane, total):
        offsets_sm[lane] = total
        num_items = lister.num_items(lane)

        @pl.when(cta == 0)
        def _():
            num_items_gm[lane] = num_items
            offsets_gm[lane] = total

        return total + lax.div(num_items + (PER_TILE - 1), jnp.int32(PER_TILE))

    total = lax.fori_loop(0, lister.lanes, add, jnp.int32(0))
    offsets_sm[lister.lanes] = total

    @pl.when(cta == 0)
    def _():
        offsets_gm[lister.lanes] = total

    plgpu.commit_smem()
