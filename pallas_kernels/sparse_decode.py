"""Decode attention, for Hopper: one query token a user, over listed rows of the cache and over rows that lie in order.

A lane (a user and a key/value head) attends to the rows of its list (`work_list.Lists`) and to the first rows of any
number of arrays: the window, the user's own tokens, or the whole cache. All of it is cut into tiles of 64 rows, split
evenly over CTAs (`shares`), and each CTA's parts of lanes are merged in the end (`merge_shares`).

In a CTA, two producer warpgroups fetch K and V tile by tile (8 TMA boxes of 8 rows) through a ring of stages, and one
consumer warpgroup computes transposed: scores Sᵀ = K qᵀ, output Oᵀ = Vᵀ Pᵀ, keys and head entries in the 64 rows of a
wgmma and the group's few queries in its columns.
"""

import dataclasses
import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from squeezejax.pallas_kernels import merge_shares
from squeezejax.pallas_kernels.mosaic import (
    ALONG,
    MASKED,
    MATRIX,
    MULTIPROCESSORS,
    TILE,
    columns,
    compiler_params,
    full,
    interpreting,
    swizzled,
)
from squeezejax.pallas_kernels.shares import Shares, offsets_of
from squeezejax.pallas_kernels.sources import InOrder, Listed, Reader, extents, operands
from squeezejax.pallas_kernels.work_list import PER_TILE, in_masks

LOG2E = math.log2(math.e)
FLOOR = -1e20  # maxima start here, above MASKED, so that a masked score has weight exp2(MASKED − FLOOR) = 0
HEAD_DIMS = (64, 96, 128, 192, 256)
MAX_GROUP = 16


@dataclasses.dataclass(frozen=True)
class Config:
    """Tuning of the attention kernel."""

    stages: int  # tiles of K and of V in flight
    num_ctas: int  # shares of work: a whole number for each of the multiprocessors

    def __post_init__(self):
        if min(self.stages, self.num_ctas) < 1:
            raise ValueError(f"stages and num_ctas must be positive, got {self}")


def default_config(head_dim: int, group: int) -> Config:
    """Two CTAs a multiprocessor, each with some 96 KB in flight, where registers allow; else one with 192 KB."""
    if interpreting():  # whose time grows with the number of CTAs
        return Config(stages=2, num_ctas=3)
    if group <= 8 and head_dim <= 128:
        return Config(stages={64: 6, 96: 3, 128: 3}[head_dim], num_ctas=2 * MULTIPROCESSORS)
    return Config(stages={64: 8, 96: 6, 128: 6, 192: 4, 256: 3}[head_dim], num_ctas=MULTIPROCESSORS)


def attend(q, in_order: tuple[InOrder, ...], listed: Listed | None, layer, *, config: Config | None = None):
    """Attention of q [B K G H] over the union: (out f32[B K G H], lse f32[B K G]); a lane without rows: 0 and MASKED.

    Everything has one 16-bit dtype; layer i32[], may be traced, belongs to arrays [L K R H]. Granules are read whole,
    and where nothing is listed whole tiles, so what they hold must be finite; only rows that count have weight.
    Raises NotImplementedError for what the kernel cannot do.
    """
    B, K, G, H = q.shape
    sources = (*in_order, *([] if listed is None else [listed]))
    for source in sources:
        check(q.dtype, source.keys.dtype, G, H)
    config = config or default_config(H, G)
    lanes, M = B * K, -(-G // 8) * 8
    q = jnp.pad(q.reshape(lanes, G, H), ((0, 0), (0, M - G), (0, 0)))
    ends, tiles = extents(sources, layer, B, K)
    offsets = offsets_of(tiles)
    parts = _attend_shares(q, sources, ends, offsets, jnp.reshape(layer, 1), K, config)
    out, lse = merge_shares.merge(*parts, offsets, config.num_ctas)  # [lanes H' M], [lanes M]
    return out[:, :H, :G].swapaxes(1, 2).reshape(B, K, G, H), lse[:, :G].reshape(B, K, G)


def check(q_dtype, cache_dtype, G: int, H: int):
    """Raises NotImplementedError, with the reason, for shapes and dtypes that the kernel cannot take."""
    if cache_dtype not in (jnp.bfloat16, jnp.float16) or q_dtype != cache_dtype:
        raise NotImplementedError(f"the kernels take bfloat16 or float16 throughout, got {q_dtype} and {cache_dtype}")
    if H not in HEAD_DIMS:
        raise NotImplementedError(f"the kernels take head sizes {HEAD_DIMS}, got {H}")
    if G > MAX_GROUP:
        raise NotImplementedError(f"the kernels take up to {MAX_GROUP} query heads a key/value head, got {G}")


def _attend_shares(q, sources, ends, offsets, layer, num_heads: int, config: Config):
    """Every CTA's share: f32[slots H' M] and (max, sum) f32[slots 2 M], not divided by the sum, max in units of log2.

    q [lanes M H]; sources, the one that is listed last; ends i32[sources lanes], offsets i32[lanes + 1] tiles. H' is H
    rounded up to whole wgmma rows.
    """
    lanes, M, H = q.shape
    padded_H = -(-H // TILE) * TILE
    stages = config.stages
    # With nothing but rows in order a tile is one copy.
    copies = PER_TILE if isinstance(sources[-1], Listed) else 1
    copied = TILE // copies
    scale = LOG2E / math.sqrt(H)

    def body(q_gm, ends_gm, off_gm, layer_gm, *refs, q_sm, k_sm, v_sm, p_sm, out_sm, stats_sm,
             k_full, v_full, k_free, v_free, q_full):  # fmt: skip
        *arrays, out_gm, stats_gm = refs
        cta, warpgroup = lax.axis_index("cta"), lax.axis_index("warpgroup")
        shares = Shares(off_gm, lanes, config.num_ctas)
        reader = Reader(sources, arrays, ends_gm, layer_gm[0], num_heads)

        def produce(which, ring, ring_full, ring_free):
            """Fetches keys (which = 0) or values (1) of the share's tiles."""

            def visit(lane, first, end, tiles):
                find = reader.finder(lane)

                def fetch(s, slot, granules):
                    for i in range(copies):
                        target = ring.at[slot, pl.ds(i * copied, copied), pl.ds(0, H)]
                        source = reader.rows(s, which, lane, granules[i], copied)
                        plgpu.copy_gmem_to_smem(source, target, ring_full.at[slot])

                def step(tile, state):
                    tiles, (kind, granules, _) = state
                    following = find(tile + 1)  # in flight while this tile waits
                    slot = lax.rem(tiles, jnp.int32(stages))

                    @pl.when(tiles >= stages)
                    def _():
                        plgpu.barrier_wait(ring_free.at[slot])

                    for s in range(len(sources)):
                        pl.when(kind == s)(functools.partial(fetch, s, slot, granules))
                    return tiles + 1, following

                return lax.fori_loop(first, end, step, (tiles, find(first)))[0]

            tiles = shares.visit(cta, visit)

            def drain(tile, _):  # stages released last, for which no later tile waited
                plgpu.barrier_wait(ring_free.at[lax.rem(tile, jnp.int32(stages))])

            lax.fori_loop(jnp.maximum(tiles - stages, 0), tiles, drain, None)

        pl.when(warpgroup == 1)(lambda: produce(0, k_sm, k_full, k_free))
        pl.when(warpgroup == 2)(lambda: produce(1, v_sm, v_full, v_free))

        def consume(lane, first, end, tiles):
            plgpu.copy_gmem_to_smem(q_gm.at[lane], q_sm, q_full)
            plgpu.barrier_wait(q_full)
            find = reader.finder(lane)

            def step(tile, state):
                tiles, masks, top, weights_sum, out = state
                following = find(tile + 1)[2]
                slot = lax.rem(tiles, jnp.int32(stages))
                plgpu.barrier_wait(k_full.at[slot])

                def score(acc):
                    plgpu.wgmma(acc, k_sm.at[slot], q_sm.T)
                    return acc[...]

                scores = pl.run_scoped(score, plgpu.ACC((TILE, M), jnp.float32))
                plgpu.barrier_arrive(k_free.at[slot])
                row = plgpu.broadcasted_iota(jnp.int32, (TILE, M), 0, layout=MATRIX)
                scores = jnp.where(in_masks(row, masks), scores * scale, MASKED)
                new_top = jnp.maximum(top, jnp.max(scores, axis=0))
                keep = jnp.exp2(top - new_top)
                weights = jnp.exp2(scores - columns(new_top, scores.shape))
                weights_sum = weights_sum * columns(keep, weights.shape) + weights
                p_sm.T[...] = plgpu.layout_cast(weights.astype(q.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
                plgpu.commit_smem()
                out = out * columns(keep, out.shape)
                plgpu.barrier_wait(v_full.at[slot])

                def weigh(acc):
                    plgpu.wgmma(acc, v_sm.at[slot].T, p_sm.T)
                    return acc[...]

                out = out + pl.run_scoped(weigh, plgpu.ACC((padded_H, M), jnp.float32))
                plgpu.barrier_arrive(v_free.at[slot])
                return tiles + 1, following, new_top, weights_sum, out

            nothing = (full((M,), FLOOR, ALONG), full((TILE, M), 0.0, MATRIX), full((padded_H, M), 0.0, MATRIX))
            begin = (tiles, find(first)[2], *nothing)
            tiles, _, top, weights_sum, out = lax.fori_loop(first, end, step, begin)
            out_sm[...] = out
            stats_sm[0] = top
            stats_sm[1] = jnp.sum(weights_sum, axis=0)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_sm, out_gm.at[cta + lane])
            plgpu.copy_smem_to_gmem(stats_sm, stats_gm.at[cta + lane])
            plgpu.wait_smem_to_gmem(0)
            return tiles

        @pl.when(warpgroup == 0)
        def _():
            shares.visit(cta, consume)

    ring = lambda width: plgpu.SMEM((stages, TILE, width), q.dtype, transforms=swizzled(H))
    scratch = {
        "q_sm": plgpu.SMEM((M, H), q.dtype, transforms=swizzled(H)),
        "k_sm": ring(H),
        "v_sm": ring(padded_H),
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
        # Every shared buffer is written and read across barriers that the body states itself.
        compiler_params=compiler_params(unsafe_no_auto_barriers=True),
        kernel_name="sparse_decode",
    )(q, ends, offsets, layer, *operands(sources))
