"""Decode attention, for Hopper: one query token a user, over listed rows of the cache and over rows that lie in order.

A lane (a user and a key/value head) attends to the rows that it keeps (`work_list.Lists`) and to the first rows of any
number of arrays: the window, the user's own tokens, or the whole cache. All of it is cut into tiles of 64 rows, split
evenly over CTAs (`shares`), and each CTA's parts of lanes are merged in the end (`merge_shares`).

In a CTA, two producer warpgroups fetch K and V tile by tile (8 TMA boxes of 8 rows) through a ring of stages, and one
consumer warpgroup computes transposed: scores Sᵀ = K qᵀ, output Oᵀ = Vᵀ Pᵀ, keys and head entries in the 64 rows of a
wgmma and the group's few queries in its columns. Only the consumer reduces across warps: such a sum goes through shared
memory that Mosaic reserves once a CTA, where two warpgroups would overwrite each other's, which no barrier of either
prevents (`benchmarks.gpu.mosaic_code` finds violations).
"""

import dataclasses
import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from squeezejax.pallas_kernels.hopper import merge_shares
from squeezejax.pallas_kernels.hopper.mosaic import (
    ALONG,
    FLOOR,
    GRANULE,
    LOG2E,
    MASKED,
    MATRIX,
    TILE,
    check_heads,
    columns,
    compiler_params,
    count_ctas,
    full,
    interpreting,
    products,
    swizzled,
)
from squeezejax.pallas_kernels.hopper.ring import Ring
from squeezejax.pallas_kernels.hopper.shares import Shares
from squeezejax.pallas_kernels.hopper.sources import InOrder, Listed, Reader, operands
from squeezejax.pallas_kernels.hopper.step import Step
from squeezejax.pallas_kernels.hopper.work_list import PER_TILE, granule_of, in_masks

MAX_GROUP = 16
SHARED_MEMORY = 227 * 1024  # that a CTA can have


@dataclasses.dataclass(frozen=True)
class Config:
    """Tuning of the attention kernel."""

    stages: int  # tiles of K and of V in flight
    num_ctas: int  # shares of work: a whole number for each of the multiprocessors

    def __post_init__(self):
        if min(self.stages, self.num_ctas) < 1:
            raise ValueError(f"stages and num_ctas must be positive, got {self}")


def default_config(head_dim: int, group: int) -> Config:
    """A CTA a multiprocessor, as registers allow, with as much in flight as there is room for."""
    if interpreting():  # whose time grows with the number of CTAs
        return Config(stages=2, num_ctas=3)
    M, width = -(-group // 8) * 8, -(-head_dim // TILE) * TILE
    stage = 2 * TILE * (head_dim + width)
    fixed = 2 * M * (head_dim + TILE) + 4 * M * (width + 2) + 4096  # queries, weights, results; barriers, alignment
    return Config(stages=min((SHARED_MEMORY - fixed) // stage, 12), num_ctas=count_ctas(1))


def attend(q, in_order: tuple[InOrder, ...], listed: Listed | None, step: Step, *, config: Config | None = None):
    """Attention of q [B K G H] over the union: (out f32[B K G H], lse f32[B K G]); a lane without rows: 0 and MASKED.

    Everything has one 16-bit dtype; the step's layer belongs to arrays [L K R H]. Granules are read whole, and where
    nothing is listed whole tiles, so what they hold must be finite; only rows that count have weight.
    Raises NotImplementedError for what the kernel cannot do.
    """
    B, K, G, H = q.shape
    sources = (*in_order, *([] if listed is None else [listed]))
    for source in sources:
        check(G, H, q.dtype, source.keys.dtype)
    lanes, M = B * K, -(-G // 8) * 8
    config = config or default_config(H, G)
    # TMA fetches 8 queries from a multiple of 8 on: those of a lane among others', whose results nobody looks at.
    pitch = G if lanes * G % 8 == 0 and (8 % G == 0 or G % 8 == 0) else M
    q = jnp.pad(q.reshape(lanes, G, H), ((0, 0), (0, pitch - G), (0, 0))).reshape(lanes * pitch, H)
    offsets = Reader(sources, [], step, K).offsets(lanes)
    parts = _attend_shares(q, pitch, M, sources, offsets, step, lanes, K, config)
    out, lse = merge_shares.merge(*parts, offsets, config.num_ctas, G, lambda lane: lane * pitch & 7)
    return out[:, :, :H].reshape(B, K, G, H), lse.reshape(B, K, G)


def check(G: int, H: int, *dtypes):
    """Raises NotImplementedError, with the reason, for shapes and dtypes that the kernel cannot take."""
    check_heads(H, *dtypes)
    if G > MAX_GROUP:
        raise NotImplementedError(f"the kernels take up to {MAX_GROUP} query heads a key/value head, got {G}")


def _attend_shares(q, pitch: int, M: int, sources, offsets, step: Step, lanes: int, num_heads: int, config: Config):
    """Every CTA's share: f32[slots H' M] and (max, sum) f32[slots 2 M], not divided by the sum, max in units of log2.

    q [lanes·pitch H], of which a lane's M columns are the rows from the multiple of 8 at or before its first one;
    sources, the one that is listed last; offsets i32[lanes + 1], exclusive sums of the lanes' tiles. H' is H rounded up
    to whole wgmma rows.
    """
    H = q.shape[1]
    padded_H = -(-H // TILE) * TILE
    stages = config.stages
    # With nothing but rows in order a tile is one copy.
    copies = PER_TILE if isinstance(sources[-1], Listed) else 1
    copied = TILE // copies
    scale = LOG2E / math.sqrt(H)

    def body(q_gm, offsets_gm, *refs, q_sm, k_sm, v_sm, p_sm, out_sm, stats_sm, k_full, v_full, k_free, v_free, q_full):
        asked, (*arrays, out_gm, stats_gm) = Step(*refs[: len(step)]), refs[len(step) :]
        cta, warpgroup = lax.axis_index("cta"), lax.axis_index("warpgroup")
        reader = Reader(sources, arrays, asked, num_heads)
        shares = Shares(offsets_gm, lanes, config.num_ctas)
        k_ring, v_ring = Ring(k_full, k_free, stages), Ring(v_full, v_free, stages)

        def visit_tiles(lane, first, end, work, state):
            """The last of work((source, items), state) -> state, tile by tile of a lane."""
            find = reader.finder(lane)

            def step(tile, carry):
                place, state = carry
                following = find(jnp.minimum(tile + 1, end - 1))  # in flight while this tile waits
                return following, work(place, state)

            return lax.fori_loop(first, end, step, (find(first), state))[1]

        def produce(which, ring, ring_sm):
            """Fetches keys (which = 0) or values (1) of the share's tiles."""

            def visit(lane, first, end, tiles):
                def fetch(s, slot, items):
                    for i in range(copies):
                        target = ring_sm.at[slot, pl.ds(i * copied, copied), pl.ds(0, H)]
                        source = reader.rows(s, which, lane, granule_of(items[i]), copied)
                        plgpu.copy_gmem_to_smem(source, target, ring.full.at[slot])

                def work(place, tiles):
                    kind, items = place
                    ring.await_free(tiles)
                    for s in range(len(sources)):
                        pl.when(kind == s)(functools.partial(fetch, s, ring.slot(tiles), items))
                    return tiles + 1

                return visit_tiles(lane, first, end, work, tiles)

            ring.drain(shares.visit(cta, visit))

        def consume(lane, first, end, tiles):
            plgpu.commit_smem()  # a barrier: all warps are done with the queries of the lane before
            queries = pl.ds(lax.shift_right_logical(lane * pitch, 3) * GRANULE, M)
            plgpu.copy_gmem_to_smem(q_gm.at[queries], q_sm, q_full)
            plgpu.barrier_wait(q_full)

            def work(place, state):
                tiles, top, weights_sum, out = state
                slot = k_ring.slot(tiles)
                plgpu.barrier_wait(k_ring.full.at[slot])
                scores = products((TILE, M), (k_sm.at[slot], q_sm.T))
                plgpu.barrier_arrive(k_ring.free.at[slot])
                row = plgpu.broadcasted_iota(jnp.int32, (TILE, M), 0, layout=MATRIX)
                scores = jnp.where(in_masks(row, place[1]), scores * scale, MASKED)
                new_top = jnp.maximum(top, jnp.max(scores, axis=0))
                keep = jnp.exp2(top - new_top)
                weights = jnp.exp2(scores - columns(new_top, scores.shape))
                weights_sum = weights_sum * columns(keep, weights.shape) + weights
                p_sm.T[...] = plgpu.layout_cast(weights.astype(q.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
                plgpu.commit_smem()
                out = out * columns(keep, out.shape)
                plgpu.barrier_wait(v_ring.full.at[slot])
                out = out + products((padded_H, M), (v_sm.at[slot].T, p_sm.T))
                plgpu.barrier_arrive(v_ring.free.at[slot])
                return tiles + 1, new_top, weights_sum, out

            nothing = (full((M,), FLOOR, ALONG), full((TILE, M), 0.0, MATRIX), full((padded_H, M), 0.0, MATRIX))
            tiles, top, weights_sum, out = visit_tiles(lane, first, end, work, (tiles, *nothing))
            out_sm[...] = out
            stats_sm[0] = top
            stats_sm[1] = jnp.sum(weights_sum, axis=0)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_sm, out_gm.at[cta + lane])
            plgpu.copy_smem_to_gmem(stats_sm, stats_gm.at[cta + lane])
            plgpu.wait_smem_to_gmem(0)
            return tiles

        pl.when(warpgroup == 1)(lambda: produce(0, k_ring, k_sm))
        pl.when(warpgroup == 2)(lambda: produce(1, v_ring, v_sm))

        @pl.when(warpgroup == 0)
        def _():
            shares.visit(cta, consume)

    cache_ring = lambda width: plgpu.SMEM((stages, TILE, width), q.dtype, transforms=swizzled(H))
    scratch = {
        "q_sm": plgpu.SMEM((M, H), q.dtype, transforms=swizzled(H)),
        "k_sm": cache_ring(H),
        "v_sm": cache_ring(padded_H),
        "p_sm": plgpu.SMEM((M, TILE), q.dtype, transforms=swizzled(H)),
        "out_sm": plgpu.SMEM((padded_H, M), jnp.float32),
        "stats_sm": plgpu.SMEM((2, M), jnp.float32),
        "k_full": plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        "v_full": plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        "k_free": plgpu.Barrier(num_barriers=stages),
        "v_free": plgpu.Barrier(num_barriers=stages),
        "q_full": plgpu.Barrier(),
    }
    slots = config.num_ctas + lanes
    return plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((slots, padded_H, M), jnp.float32),
            jax.ShapeDtypeStruct((slots, 2, M), jnp.float32),
        ],
        scratch_types=scratch,
        grid=(config.num_ctas,),
        grid_names=("cta",),
        num_threads=3,
        thread_name="warpgroup",
        # As `ring.LAUNCH`, but that the consumer reduces across its warps.
        compiler_params=compiler_params(across_warps=True, unsafe_no_auto_barriers=True),
        kernel_name="sparse_decode",
    )(q, offsets, *step, *operands(sources))
