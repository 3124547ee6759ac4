"""Prefill attention over listed granules, for Hopper: blocks of query rows, each with its own kept rows of the cache.

A *lane* is a block of query tokens of one user and one key/value head: the tokens of a block, times the group's query
heads, are its rows, and one list of items, `granule · 256 + mask`, says what all of them attend to: 8 rows of the
cache and a bit for each one that counts. Rows go by 128; 128 rows of a lane are a *unit* of work, as long as the
lane's list. Units differ much in length, so their tiles of keys, joined end to end, are cut into equal shares, one a
CTA, on the device (shares.py): no unit is waited for, and one block of one user fills the machine as many do. A CTA
leaves its partial result for unit u in slot c + u; a second kernel merges each unit's slots.

In a CTA a producer warpgroup fetches K and V, one TMA box an item, through a ring of stages, and writes what the
masks mean as a bias for each key. Two consumer warpgroups hold 64 rows each: S = q Kᵀ, softmax, O += P V. Outputs of
heads over 128 do not fit in registers so: there both hold the same 64 rows, a unit being no more, and half of O each.
"""

import dataclasses
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from squeezejax.pallas_kernels.hopper.mosaic import (
    ALONG,
    DOWN,
    FLOOR,
    GRANULE,
    LOG2E,
    MASKED,
    MATRIX,
    check_heads,
    check_rows,
    columns,
    compiler_params,
    count_ctas,
    full,
    load,
    products,
    rows,
    swizzled,
)
from squeezejax.pallas_kernels.hopper.ring import CONSUMERS, LAUNCH, Ring, run_roles
from squeezejax.pallas_kernels.hopper.shares import Shares, offsets_of
from squeezejax.pallas_kernels.hopper.work_list import granule_of, in_masks, listed_items

HEIGHT = 64  # query rows of a consumer warpgroup


@dataclasses.dataclass(frozen=True)
class Config:
    """Tuning of the attention kernel."""

    keys: int  # of a tile
    stages: int  # tiles of K and of V in flight
    split: bool = False  # both consumers take the same rows, and half of a head's entries each
    in_registers: bool = False  # probabilities go from registers into the product; the interpreter cannot
    registers: tuple[int, int] = (104, 200)  # of a producer's and of a consumer's thread; 512 with two of these

    def __post_init__(self):
        if self.keys not in (64, 128):
            raise ValueError(f"keys must be 64 or 128, got {self.keys}")

    @property
    def unit(self) -> int:
        """Query rows of a unit of work."""
        return HEIGHT if self.split else CONSUMERS * HEIGHT


CONFIGS = {
    64: Config(128, 4), 96: Config(128, 2), 128: Config(128, 2),
    192: Config(64, 3, split=True), 256: Config(64, 2, split=True),
}  # fmt: skip


def check(q_dtype, cache_dtype, head_dim: int, num_rows: int):
    """Raises NotImplementedError, with the reason, for what the kernel cannot take."""
    check_heads(head_dim, q_dtype, cache_dtype)
    check_rows(num_rows)


def attend_items(q, keys, values, items, num_items, layer, *, config: Config | None = None):
    """Attention of each lane over its listed rows: (out f32[U M H], lse f32[U M]); without items 0 and MASKED.

    q [U M H], lane u of key/value head u mod K; keys, values [L K R H] of the same 16-bit dtype; items i32[U J], of
    which the first num_items i32[U] count; layer i32[], may be traced. Rows of a listed granule are all read, so they
    must be finite; those whose bit is 0 have no weight. Raises NotImplementedError for what the kernel cannot do.
    """
    U, M, H = q.shape
    L, K, R, _ = keys.shape
    check(q.dtype, keys.dtype, H, R)
    config = config or CONFIGS[H]
    units = -(-M // config.unit)  # of a lane
    q = jnp.pad(q, ((0, 0), (0, units * config.unit - M), (0, 0))).reshape(U * units, config.unit, H)
    per_tile = config.keys // GRANULE
    offsets = offsets_of(jnp.repeat((num_items + (per_tile - 1)) // per_tile, units))
    planes = lambda cache: cache.reshape(L * K, R, H)
    partials = _attend_shares(
        q, planes(keys), planes(values), items, num_items, offsets, jnp.reshape(layer, 1), K, config
    )
    out, lse = _merge_shares(*partials, offsets)
    return out.reshape(U, -1, H)[:, :M], lse.reshape(U, -1)[:, :M]


def _attend_shares(q, keys, values, items, num_items, offsets, layer, num_heads: int, config: Config):
    """Every CTA's share: q [units M H], keys, values [L·K R H] -> out f32[slots M H], (max, sum) f32[slots 2 M].

    `out` is not divided by the sum yet. Maxima are in units of log2.
    """
    num_units, _, H = q.shape
    per_lane = num_units // items.shape[0]
    per_tile, stages = config.keys // GRANULE, config.stages
    parts = CONSUMERS if config.split else 1  # of a head's entries
    scale = LOG2E / math.sqrt(H)
    num_ctas = count_ctas(1)
    width = 128  # of a bias in shared memory: what a warpgroup writes at once

    def body(q_gm, k_gm, v_gm, items_gm, count_gm, off_gm, layer_gm, out_gm, stats_gm, *, q_sm, k_sm, v_sm, bias_sm,
             p_sm, q_full, k_full, v_full, k_free, v_free):  # fmt: skip
        cta, warpgroup = lax.axis_index("cta"), lax.axis_index("warpgroup")
        shares = Shares(off_gm, num_units, num_ctas)
        k_ring, v_ring = Ring(k_full, k_free, stages), Ring(v_full, v_free, stages)

        def fetch_tiles(unit, first, end, tiles):
            lane = lax.div(unit, jnp.int32(per_lane))
            plane = layer_gm[0] * num_heads + lax.rem(lane, jnp.int32(num_heads))
            count = count_gm[lane]
            key = plgpu.broadcasted_iota(jnp.int32, (width,), 0, layout=plgpu.Layout.WG_STRIDED((width,), 1))
            find = lambda tile: listed_items(items_gm, count, lane, tile, per_tile)

            def fetch(cache_gm, ring, arrived, current):
                """Into a ring's stage [parts keys H/parts]."""
                parts, _, size = ring.shape
                for part in range(parts):
                    for i, item in enumerate(current):
                        here = pl.ds(granule_of(item) * GRANULE, GRANULE)
                        source = cache_gm.at[plane, here, pl.ds(part * size, size)]
                        plgpu.copy_gmem_to_smem(source, ring.at[part, pl.ds(i * GRANULE, GRANULE)], arrived)

            def step(tile, state):
                tiles, current = state
                following = find(tile + 1)  # in flight while this tile waits
                slot = k_ring.slot(tiles)
                k_ring.await_free(tiles)
                fetch(k_gm, k_sm.at[slot], k_ring.full.at[slot], current)
                bias_sm[slot] = jnp.where(in_masks(key, current), 0.0, MASKED)
                plgpu.barrier_arrive(k_ring.full.at[slot])
                v_ring.await_free(tiles)
                fetch(v_gm, v_sm.at[slot], v_ring.full.at[slot], current)
                return tiles + 1, following

            return lax.fori_loop(first, end, step, (tiles, find(first)))[0]

        def produce():
            tiles = shares.visit(cta, fetch_tiles)
            k_ring.drain(tiles)
            v_ring.drain(tiles)

        def attend_tiles(unit, first, end, tiles):
            mine = pl.ds(0 if config.split else warpgroup * HEIGHT, HEIGHT)
            part = warpgroup if config.split else 0
            plgpu.commit_smem()  # a barrier: all warps are done with the queries of the unit before
            plgpu.copy_gmem_to_smem(q_gm.at[unit, mine], q_sm.at[warpgroup], q_full.at[warpgroup])
            plgpu.barrier_wait(q_full.at[warpgroup])

            def step(tile, state):
                tiles, top, total, out = state
                slot = k_ring.slot(tiles)
                plgpu.barrier_wait(k_ring.full.at[slot])
                scores = products((HEIGHT, config.keys), (q_sm.at[warpgroup], k_sm.at[slot, 0].T))
                bias = load(bias_sm.at[slot, pl.ds(0, config.keys)], ALONG)
                scores = scores * scale + columns(bias, scores.shape)
                plgpu.barrier_arrive(k_ring.free.at[slot])
                new_top = jnp.maximum(top, plgpu.layout_cast(jnp.max(scores, axis=1), DOWN))
                keep = jnp.exp2(top - new_top)
                weights = jnp.exp2(scores - rows(new_top, scores.shape))
                total = total * keep + plgpu.layout_cast(jnp.sum(weights, axis=1), DOWN)
                weights = weights.astype(q.dtype)
                if not config.in_registers:
                    p_sm[warpgroup] = weights
                    plgpu.commit_smem()
                plgpu.barrier_wait(v_ring.full.at[slot])
                weights = weights if config.in_registers else p_sm.at[warpgroup]
                out = out * rows(keep, out.shape) + products(out.shape, (weights, v_sm.at[slot, part]))
                plgpu.barrier_arrive(v_ring.free.at[slot])
                return tiles + 1, new_top, total, out

            shape = (HEIGHT, H // parts)
            nothing = (full((HEIGHT,), FLOOR, DOWN), full((HEIGHT,), 0.0, DOWN), full(shape, 0.0, MATRIX))
            tiles, top, total, out = lax.fori_loop(first, end, step, (tiles, *nothing))
            slot = cta + unit
            out_gm[slot, mine, pl.ds(part * shape[1], shape[1])] = out

            @pl.when(part == 0)  # where both have the same rows they have the same statistics, too
            def _():
                stats_gm[slot, 0, mine] = top
                stats_gm[slot, 1, mine] = total

            return tiles

        run_roles(warpgroup, produce, lambda: shares.visit(cta, attend_tiles), config.registers)

    ring = lambda parts: plgpu.SMEM(
        (stages, parts, config.keys, H // parts), keys.dtype, transforms=swizzled(H // parts)
    )
    per_stage = lambda arrivals: plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages)
    scratch = {
        "q_sm": plgpu.SMEM((CONSUMERS, HEIGHT, H), q.dtype, transforms=swizzled(H)),
        "k_sm": ring(1),
        "v_sm": ring(parts),
        "bias_sm": plgpu.SMEM((stages, width), jnp.float32),
        "p_sm": plgpu.SMEM((CONSUMERS, HEIGHT, config.keys), q.dtype, transforms=swizzled(H // parts)),
        "q_full": plgpu.Barrier(num_barriers=CONSUMERS),
        "k_full": per_stage(per_tile + 1),  # its items, and the bias
        "v_full": per_stage(per_tile * parts),
        "k_free": per_stage(CONSUMERS),
        "v_free": per_stage(CONSUMERS),
    }
    slots = num_ctas + num_units
    return plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((slots, config.unit, H), jnp.float32),
            jax.ShapeDtypeStruct((slots, 2, config.unit), jnp.float32),
        ],
        scratch_types=scratch,
        grid=(num_ctas,),
        grid_names=("cta",),
        kernel_name="sparse_prefill",
        **LAUNCH,
    )(q, keys, values, items, num_items, offsets, layer)


def _merge_shares(outs, stats, offsets):
    """Each unit's slots into one result: (out f32[units M H], lse f32[units M])."""
    _, M, H = outs.shape
    units = offsets.shape[0] - 1
    num_ctas = outs.shape[0] - units
    shape = (HEIGHT, H)

    result = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)

    def body(outs_gm, stats_gm, off_gm, out_gm, lse_gm):
        unit, part = lax.axis_index("unit"), lax.axis_index("part")
        mine = pl.ds(part * HEIGHT, HEIGHT)
        first, end = Shares(off_gm, units, num_ctas).owners(unit)

        def step(cta, state):
            top, total, out = state
            slot = cta + unit
            part_top = load(stats_gm.at[slot, 0, mine], DOWN)
            part_total = load(stats_gm.at[slot, 1, mine], DOWN)
            part = load(outs_gm.at[slot, mine], MATRIX)
            new_top = jnp.maximum(top, part_top)
            keep, weight = jnp.exp2(top - new_top), jnp.exp2(part_top - new_top)
            out = out * rows(keep, shape) + part * rows(weight, shape)
            return new_top, total * keep + part_total * weight, out

        nothing = (full((HEIGHT,), FLOOR, DOWN), full((HEIGHT,), 0.0, DOWN), full(shape, 0.0, MATRIX))
        top, total, out = lax.fori_loop(first, end, step, nothing)
        safe = jnp.maximum(total, 1e-30)
        out_gm[unit, mine] = out / rows(safe, shape)
        lse_gm[unit, mine] = jnp.where(total > 0, top * (1 / LOG2E) + jnp.log(safe), MASKED)

    return plgpu.kernel(
        body,
        out_type=[result(units, M, H), result(units, M)],
        grid=(units, M // HEIGHT),
        grid_names=("unit", "part"),
        compiler_params=compiler_params(),
        kernel_name="sparse_prefill_merge",
    )(outs, stats, offsets)
