"""Merging the parts of an attention whose work was split over CTAs (`shares`), for Hopper: some CTAs a lane."""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from squeezejax.pallas_kernels.hopper.mosaic import (
    ALONG,
    DOWN,
    FLOOR,
    LOG2E,
    MASKED,
    MATRIX,
    TILE,
    columns,
    compiler_params,
    full,
    interpreting,
    load,
)
from squeezejax.pallas_kernels.hopper.shares import Shares


def merge(outs, stats, offsets, num_ctas: int, group: int, first_column):
    """Each lane's parts into one result: (out f32[lanes G H'], lse f32[lanes G]); a lane without work: 0 and MASKED.

    outs f32[slots H' M], sums of values weighted by exp2(score − max); stats f32[slots 2 M], that max and the sum of
    weights; the part of CTA c of lane u lies in slot c + u, the lane's G queries in the columns from first_column(u)
    on. offsets i32[lanes + 1], as the work was split.
    """
    _, H, M = outs.shape
    lanes = offsets.shape[0] - 1
    at_once = 4 if interpreting() else 128 // M  # parts read together, so that their latencies overlap

    def body(outs_gm, stats_gm, off_gm, out_gm, lse_gm):
        lane, number = lax.axis_index("lane"), lax.axis_index("piece")
        piece = pl.ds(number * TILE, TILE)
        first, end = Shares(off_gm, lanes, num_ctas).owners(lane)

        def step(block, state):
            top, total, out = state
            ctas = [first + block * at_once + i for i in range(at_once)]
            slots = [jnp.minimum(cta, end - 1) + lane for cta in ctas]
            past_end = [jnp.where(cta < end, 0.0, MASKED) for cta in ctas]
            tops = [load(stats_gm.at[slot, 0], ALONG) + mask for slot, mask in zip(slots, past_end, strict=True)]
            totals = [load(stats_gm.at[slot, 1], ALONG) for slot in slots]
            parts = [load(outs_gm.at[slot, piece], MATRIX) for slot in slots]
            new_top = functools.reduce(jnp.maximum, tops, top)
            keep = jnp.exp2(top - new_top)
            weights = [jnp.exp2(part_top - new_top) for part_top in tops]
            total = total * keep + sum(weight * part for weight, part in zip(weights, totals, strict=True))
            out = out * columns(keep, out.shape)
            for weight, part in zip(weights, parts, strict=True):
                out = out + part * columns(weight, part.shape)
            return new_top, total, out

        nothing = (full((M,), FLOOR, ALONG), full((M,), 0.0, ALONG), full((TILE, M), 0.0, MATRIX))
        blocks = lax.div(end - first + (at_once - 1), jnp.int32(at_once))
        top, total, out = lax.fori_loop(0, blocks, step, nothing)
        safe = jnp.maximum(total, 1e-30)
        out = out / columns(safe, out.shape)
        lse = jnp.where(total > 0, top * (1 / LOG2E) + jnp.log(safe), MASKED)
        column = plgpu.broadcasted_iota(jnp.int32, out.shape, 1, layout=MATRIX)
        index = plgpu.broadcasted_iota(jnp.int32, (M,), 0, layout=ALONG)
        # A query is a column here and a row outside: a sum with everything else 0 turns it.
        for g in range(group):
            here = first_column(lane) + g
            out_gm[lane, g, piece] = plgpu.layout_cast(jnp.sum(jnp.where(column == here, out, 0.0), axis=1), DOWN)
            lse_here = jnp.sum(jnp.where(index == here, lse, 0.0))

            @pl.when(number == 0)  # all pieces know it
            def _(g=g, lse_here=lse_here):
                lse_gm[lane, g] = lse_here

    return plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((lanes, group, H), jnp.float32),
            jax.ShapeDtypeStruct((lanes, group), jnp.float32),
        ],
        grid=(lanes, H // TILE),
        grid_names=("lane", "piece"),
        compiler_params=compiler_params(across_warps=True),
        kernel_name="merge_shares",
    )(outs, stats, offsets)
