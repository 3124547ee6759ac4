"""Decode attention over listed granules, for Hopper: one query token a user, any subset of the fixed context's rows.

A *lane* is a user and a key/value head; U = B·K of them. Each lane has a list of *items*, `granule · 256 + mask`: 8
rows of the cache and a bit for each row that is attended. The lists of all lanes, joined end to end, are cut into equal
shares, one a CTA, from `offsets = cumsum(num_items)` alone, on the device: heads that keep much get more CTAs, and the
host never waits to know. A share may cover several lanes, and a lane several shares. CTA c leaves its partial result
for lane u in slot c + u (no two coincide); a second kernel merges each lane's slots.

In a CTA, two producer warpgroups fetch K and V tile by tile (8 items = 64 rows, one TMA box an item) through a ring
of stages, and one consumer warpgroup computes transposed: scores Sᵀ = K qᵀ, output Oᵀ = Vᵀ Pᵀ, keys and head entries
in the 64 rows of a wgmma and the group's few queries in its columns.
"""

import dataclasses
import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from squeezejax.pallas_kernels.mosaic import (
    ALONG,
    GRANULE,
    MATRIX,
    columns,
    compiler_params,
    full,
    interpreting,
    load,
    swizzled,
)

TILE = 64  # key rows of one wgmma
LOG2E = math.log2(math.e)
MASKED = -1e30  # finite: a lane without keys ends with out 0 and lse MASKED, never NaN
FLOOR = -1e20  # maxima start here, above MASKED, so that a masked score has weight exp2(MASKED − FLOOR) = 0
HEAD_DIMS = (64, 96, 128, 192, 256)
MAX_GROUP = 16


@dataclasses.dataclass(frozen=True)
class Config:
    """Tuning of the attention kernel."""

    stages: int  # tiles of K and of V in flight
    num_ctas: int  # shares of work: a whole number for each of the 132 multiprocessors
    granule: int = GRANULE  # rows of an item: 8, or 64 for items whose low byte says how many rows count, not which
    min_rows: int = 64  # a smaller share would not fill one tile
    merge_unroll: int = 4  # partial results that the merge reads at once

    def __post_init__(self):
        if self.granule not in (GRANULE, TILE):
            raise ValueError(f"granule must be {GRANULE} or {TILE}, got {self.granule}")


def default_config(head_dim: int, group: int, granule: int = GRANULE) -> Config:
    """Two CTAs a multiprocessor, each with some 96 KB in flight, where registers allow; else one with 192 KB."""
    if interpreting():  # whose time grows with the number of CTAs
        return Config(stages=2, num_ctas=3, granule=granule)
    if group <= 8 and head_dim <= 128:
        return Config(stages={64: 6, 96: 3, 128: 3}[head_dim], num_ctas=264, granule=granule)
    return Config(stages={64: 8, 96: 6, 128: 6, 192: 4, 256: 3}[head_dim], num_ctas=132, granule=granule)


def attend_items(q, keys, values, items, num_items, layer, *, config: Config | None = None):
    """Attention of q over the listed rows: (out f32[B K G H], lse f32[B K G]); a lane without items gives 0, MASKED.

    q [B K G H]; keys, values [L K R H] of the same 16-bit dtype; items i32[B K J], granule · 256 + mask of rows, the
    first num_items i32[B K] of which count; layer i32[], may be traced. Rows of a listed granule are all read, so they
    must be finite; those whose bit is 0 have no weight. Raises NotImplementedError for what the kernel cannot do.
    """
    B, K, G, H = q.shape
    L, _, R, _ = keys.shape
    check(q.dtype, keys.dtype, G, H, R)
    config = config or default_config(H, G)
    U, M = B * K, -(-G // 8) * 8
    lanes = jnp.pad(q.reshape(U, G, H), ((0, 0), (0, M - G), (0, 0)))
    counts = num_items.reshape(U)
    # A sum of masked counts, not cumsum: XLA makes one small kernel of it.
    before = jnp.arange(U + 1)[:, None] > jnp.arange(U)[None, :]
    offsets = jnp.sum(jnp.where(before, counts[None, :], 0), axis=1, dtype=jnp.int32)
    flat = lambda cache: cache.reshape(L * K, R, H)
    partials = _attend_shares(
        lanes, flat(keys), flat(values), items.reshape(U, -1), offsets, jnp.reshape(layer, 1), K, config
    )
    out, lse = _merge_shares(*partials, offsets, config)  # [U H' M], [U M]
    return out[:, :H, :G].swapaxes(1, 2).reshape(B, K, G, H), lse[:, :G].reshape(B, K, G)


def check(q_dtype, cache_dtype, G: int, H: int, R: int):
    """Raises NotImplementedError, with the reason, for shapes and dtypes that the kernel cannot take."""
    if cache_dtype not in (jnp.bfloat16, jnp.float16) or q_dtype != cache_dtype:
        raise NotImplementedError(f"the kernels take bfloat16 or float16 throughout, got {q_dtype} and {cache_dtype}")
    if H not in HEAD_DIMS:
        raise NotImplementedError(f"the kernels take head sizes {HEAD_DIMS}, got {H}")
    if G > MAX_GROUP:
        raise NotImplementedError(f"the kernels take up to {MAX_GROUP} query heads a key/value head, got {G}")
    if R % GRANULE:
        raise NotImplementedError(f"the kernels take caches of a multiple of {GRANULE} rows, got {R}")


def _share(total, config: Config):
    """Items of one CTA's share."""
    return jnp.maximum(
        lax.div(total + (config.num_ctas - 1), jnp.int32(config.num_ctas)), config.min_rows // config.granule
    )


def _first_lane(offsets, position, U: int):
    """The last lane that starts at or before a position of the joined list: the one that the position lies in."""
    if U <= 32:  # as many independent loads: one latency
        return sum((offsets[u] <= position).astype(jnp.int32) for u in range(1, U)) + jnp.int32(0)

    def halve(_, bounds):
        low, high = bounds
        middle = lax.div(low + high, jnp.int32(2))
        inside = offsets[middle] <= position
        return jnp.where(inside, middle, low), jnp.where(inside, high, middle)

    return lax.fori_loop(0, math.ceil(math.log2(U)) + 1, halve, (jnp.int32(0), jnp.int32(U)))[0]


def _attended(row, items, granule: int):
    """In a kernel: which rows of a tile its items attend to; row i32[TILE M]."""
    item = plgpu.layout_cast(jnp.full(row.shape, items[0]), MATRIX)
    for i in range(1, len(items)):
        item = jnp.where(row >= i * granule, items[i], item)
    if granule == GRANULE:
        return (lax.shift_right_logical(item, row & (GRANULE - 1)) & 1) > 0
    return row < (item & 255)


def _attend_shares(q, keys, values, items, offsets, layer, num_heads: int, config: Config):
    """Every CTA's share: q [U M H], keys, values [L·K R H] -> out f32[slots H' M] and (max, sum) f32[slots 2 M].

    `out` is not divided by the sum yet. H' is H rounded up to whole wgmma rows. Maxima are in units of log2.
    """
    U, M, H = q.shape
    padded_H = -(-H // TILE) * TILE
    granule, stages = config.granule, config.stages
    per_tile = TILE // granule
    scale = LOG2E / math.sqrt(H)

    def body(q_gm, k_gm, v_gm, items_gm, off_gm, layer_gm, out_gm, stats_gm, *, q_sm, k_sm, v_sm, p_sm, out_sm,
             stats_sm, k_full, v_full, k_free, v_free, q_full):  # fmt: skip
        cta, warpgroup = lax.axis_index("cta"), lax.axis_index("warpgroup")
        total = off_gm[U]
        share = _share(total, config)
        start = jnp.minimum(cta * share, total)
        stop = jnp.minimum(start + share, total)
        first_lane = _first_lane(off_gm, start, U)

        def for_lanes(visit):
            """visit(lane, its items from, to, tiles so far) -> tiles so far, for every lane of this share."""

            def step(state):
                lane, position, tiles = state
                lane_start = off_gm[lane]
                end = jnp.minimum(stop, off_gm[lane + 1])
                tiles = lax.cond(
                    end > position, lambda: visit(lane, position - lane_start, end - lane_start, tiles), lambda: tiles
                )
                return lane + 1, jnp.maximum(position, end), tiles

            return lax.while_loop(lambda state: state[1] < stop, step, (first_lane, start, jnp.int32(0)))[2]

        def tile_items(lane, low, high, tile):
            """The items of a tile; past the end, the last one again with no row attended."""
            at = [low + tile * per_tile + i for i in range(per_tile)]
            found = [items_gm[lane, jnp.minimum(i, high - 1)] for i in at]
            return tuple(jnp.where(i < high, item, item & ~255) for i, item in zip(at, found, strict=True))

        def num_tiles(low, high):
            return lax.div(high - low + (per_tile - 1), jnp.int32(per_tile))

        def produce(cache_gm, ring, ring_full, ring_free):
            def visit(lane, low, high, tiles):
                plane = layer_gm[0] * num_heads + lax.rem(lane, jnp.int32(num_heads))

                def step(tile, state):
                    tiles, current = state
                    following = tile_items(lane, low, high, tile + 1)  # in flight while this tile waits
                    slot = lax.rem(tiles, jnp.int32(stages))

                    @pl.when(tiles >= stages)
                    def _():
                        plgpu.barrier_wait(ring_free.at[slot])

                    for i, item in enumerate(current):
                        rows = pl.ds(lax.shift_right_logical(item, 8) * granule, granule)
                        target = ring.at[slot, pl.ds(i * granule, granule), pl.ds(0, H)]
                        plgpu.copy_gmem_to_smem(cache_gm.at[plane, rows], target, ring_full.at[slot])
                    return tiles + 1, following

                return lax.fori_loop(0, num_tiles(low, high), step, (tiles, tile_items(lane, low, high, 0)))[0]

            tiles = for_lanes(visit)

            def drain(tile, _):  # stages released last, for which no later tile waited
                plgpu.barrier_wait(ring_free.at[lax.rem(tile, jnp.int32(stages))])

            lax.fori_loop(jnp.maximum(tiles - stages, 0), tiles, drain, None)

        pl.when(warpgroup == 1)(lambda: produce(k_gm, k_sm, k_full, k_free))
        pl.when(warpgroup == 2)(lambda: produce(v_gm, v_sm, v_full, v_free))

        def consume(lane, low, high, tiles):
            plgpu.copy_gmem_to_smem(q_gm.at[lane], q_sm, q_full)
            plgpu.barrier_wait(q_full)

            def step(tile, state):
                tiles, current, top, weights_sum, out = state
                following = tile_items(lane, low, high, tile + 1)
                slot = lax.rem(tiles, jnp.int32(stages))
                plgpu.barrier_wait(k_full.at[slot])

                def score(acc):
                    plgpu.wgmma(acc, k_sm.at[slot], q_sm.T)
                    return acc[...]

                scores = pl.run_scoped(score, plgpu.ACC((TILE, M), jnp.float32))
                plgpu.barrier_arrive(k_free.at[slot])
                row = plgpu.broadcasted_iota(jnp.int32, (TILE, M), 0, layout=MATRIX)
                attended = _attended(row, current, granule)
                scores = jnp.where(attended, scores * scale, MASKED)
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
            begin = (tiles, tile_items(lane, low, high, 0), *nothing)
            tiles, _, top, weights_sum, out = lax.fori_loop(0, num_tiles(low, high), step, begin)
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
            for_lanes(consume)

    ring = lambda columns: plgpu.SMEM((stages, TILE, columns), keys.dtype, transforms=swizzled(H))
    scratch = {
        "q_sm": plgpu.SMEM((M, H), q.dtype, transforms=swizzled(H)),
        "k_sm": ring(H),
        "v_sm": ring(padded_H),
        "p_sm": plgpu.SMEM((M, TILE), q.dtype, transforms=swizzled(H)),
        "out_sm": plgpu.SMEM((padded_H, M), jnp.float32),
        "stats_sm": plgpu.SMEM((2, M), jnp.float32),
        "k_full": plgpu.Barrier(num_arrivals=per_tile, num_barriers=stages),
        "v_full": plgpu.Barrier(num_arrivals=per_tile, num_barriers=stages),
        "k_free": plgpu.Barrier(num_barriers=stages),
        "v_free": plgpu.Barrier(num_barriers=stages),
        "q_full": plgpu.Barrier(),
    }
    slots = config.num_ctas + U
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
    )(q, keys, values, items, offsets, layer)


def _merge_shares(outs, stats, offsets, config: Config):
    """Each lane's slots into one result: (out f32[U H' M], lse f32[U M])."""
    _, H, M = outs.shape
    U = offsets.shape[0] - 1
    unroll = config.merge_unroll

    def body(outs_gm, stats_gm, off_gm, out_gm, lse_gm):
        lane = lax.axis_index("lane")
        start, stop = off_gm[lane], off_gm[lane + 1]
        share = _share(off_gm[U], config)
        first = lax.div(start, share)
        end = jnp.where(stop > start, lax.div(stop - 1, share) + 1, first)  # CTAs [first, end) worked on this lane

        def step(block, state):
            top, total, out = state
            ctas = [first + block * unroll + i for i in range(unroll)]
            slots = [jnp.minimum(cta, end - 1) + lane for cta in ctas]
            past_end = [jnp.where(cta < end, 0.0, MASKED) for cta in ctas]
            tops = [load(stats_gm.at[slot, 0], ALONG) + mask for slot, mask in zip(slots, past_end, strict=True)]
            totals = [load(stats_gm.at[slot, 1], ALONG) for slot in slots]
            parts = [load(outs_gm.at[slot], MATRIX) for slot in slots]
            new_top = functools.reduce(jnp.maximum, tops, top)
            keep = jnp.exp2(top - new_top)
            weights = [jnp.exp2(part_top - new_top) for part_top in tops]
            total = total * keep + sum(weight * part for weight, part in zip(weights, totals, strict=True))
            out = out * columns(keep, out.shape)
            for weight, part in zip(weights, parts, strict=True):
                out = out + part * columns(weight, part.shape)
            return new_top, total, out

        nothing = (full((M,), FLOOR, ALONG), full((M,), 0.0, ALONG), full((H, M), 0.0, MATRIX))
        blocks = lax.div(end - first + (unroll - 1), jnp.int32(unroll))
        top, total, out = lax.fori_loop(0, blocks, step, nothing)
        safe = jnp.maximum(total, 1e-30)
        out_gm[lane] = out / columns(safe, out.shape)
        lse_gm[lane] = jnp.where(total > 0, top * (1 / LOG2E) + jnp.log(safe), MASKED)

    return plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((U, H, M), jnp.float32), jax.ShapeDtypeStruct((U, M), jnp.float32)],
        grid=(U,),
        grid_names=("lane",),
        compiler_params=compiler_params(),
        kernel_name="sparse_decode_merge",
    )(outs, stats, offsets)
