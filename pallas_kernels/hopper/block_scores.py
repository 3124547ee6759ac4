"""Scores of blocks of query rows against listed centroids, on the tensor cores of Hopper, no score ever stored.

A *lane* is a key/value head and query rows that read the same clusters: all blocks of all users at the coarsest level,
which everybody reads in order; below it one block, with a list of its own. Two passes over the same products: the
first leaves every row's softmax statistics, the second, knowing them, every cluster's sum over rows of
exp(log S − log T). That is all a threshold needs, and neither underflows where it matters nor needs a maximum:
a mean of S exceeds T iff the sum exceeds the number of rows, and equal scores give exactly that number.

Precision: queries have 16 bits already. A centroid is the sum of two 16-bit numbers, `high` and `low`, and the products
with both go to one float32 accumulator: what is cut off is 2^-17 of a centroid (bfloat16; 2^-22 of float16).

In a CTA a producer warpgroup streams tiles of centroids (centroid_tiles.py) past query rows that stay in shared memory,
and two consumer warpgroups multiply (wgmma): while one does, the other one takes exponentials.
"""

import dataclasses
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from squeezejax.pallas_kernels.hopper.centroid_tiles import Read, Walk
from squeezejax.pallas_kernels.hopper.mosaic import (
    ALONG,
    DOWN,
    FLOOR,
    LOG2E,
    MASKED,
    columns,
    full,
    load,
    products,
    rows,
    swizzled,
)
from squeezejax.pallas_kernels.hopper.ring import CONSUMERS, LAUNCH, Ring, run_roles

CHUNK = 128  # query rows whose sums are told apart
SECOND = 64  # clusters of a tile in the second pass
GRID = ("lane", "unit", "part")


@dataclasses.dataclass(frozen=True)
class Config:
    """Tuning, within some 220 KB of shared memory."""

    rows: int  # of a consumer warpgroup in the first pass
    clusters: int  # of a tile there
    stages: int  # tiles in flight there
    chunks: int  # of query rows held in the second pass
    tiles: int  # in flight in that one

    def __post_init__(self):
        if self.rows not in (64, 128):
            raise ValueError(f"rows must be 64 or 128, got {self.rows}")
        if self.tiles % CONSUMERS:
            raise ValueError(f"consumers take turns: tiles must be a multiple of {CONSUMERS}, got {self.tiles}")


CONFIGS = {
    64: Config(128, 128, 4, 4, 6), 96: Config(128, 128, 2, 4, 4), 128: Config(128, 128, 2, 4, 2),
    192: Config(64, 64, 3, 2, 2), 256: Config(64, 64, 2, 1, 2),
}  # fmt: skip


def sum_scores(q, valid, read: Read, log_T, *, config: Config | None = None):
    """Σ exp(log S − log T) over the valid rows of every chunk of 128: f32[U M/128 P], by position in the lanes' lists.

    q [U M H], lane u of key/value head u mod K, M a multiple of 128; valid bool[U M]; log_T f32[]. log S is s(q, c)
    normalised over the lane's clusters (docs/method.md, Selection); positions that take no part hold anything.
    """
    config = config or CONFIGS[q.shape[2]]
    top, total = _row_statistics(q, read, config)
    # As in reference.log_scores; the maximum itself is subtracted in the kernel.
    bias = -(jnp.log(jnp.maximum(total, 1.0)) + log_T) * LOG2E
    bias = jnp.where(valid, bias, -jnp.inf)
    return _sum_shares(q, read, top, bias, config)


def _row_statistics(q, read: Read, config: Config):
    """Of every row: the maximum of q·c over its lane's clusters, and Σ n exp(s − max), both f32[U M]."""
    U, M, H = q.shape
    height = config.rows if M > CHUNK else CHUNK // CONSUMERS
    held = CONSUMERS * height  # query rows of a unit
    units = -(-M // held)
    q = jnp.pad(q, ((0, 0), (0, units * held - M), (0, 0)))
    walk = Walk(read, config.clusters, config.stages, with_weights=True)
    parts = walk.parts(U * units)
    scale = LOG2E / math.sqrt(H)
    shape = (height, config.clusters)

    def body(q_gm, *refs, q_sm, q_full, ring_full, ring_free, **rings):
        *refs, top_gm, total_gm = refs
        lane, unit, part, warpgroup = (lax.axis_index(name) for name in (*GRID, "warpgroup"))
        first, end = walk.tiles(refs, lane, part, parts)
        ring = Ring(ring_full, ring_free, walk.stages)

        def produce():
            walk.produce(refs, rings, ring, lane, first, end)

        def consume():
            mine = pl.ds(unit * held + warpgroup * height, height)
            plgpu.copy_gmem_to_smem(q_gm.at[lane, mine], q_sm.at[warpgroup], q_full.at[warpgroup])
            plgpu.barrier_wait(q_full.at[warpgroup])

            def step(tile, state):
                top, total = state
                slot = ring.slot(tile - first)
                plgpu.barrier_wait(ring.full.at[slot])
                both = [rings[name].at[slot] for name in ("high_sm", "low_sm")]
                dots = products(shape, *((q_sm.at[warpgroup], part.T) for part in both))
                weights = columns(load(rings["weights_sm"].at[slot], ALONG), shape)
                plgpu.commit_smem()  # weights were read by loads, after which TMA, which overwrites them, needs a fence
                plgpu.barrier_arrive(ring.free.at[slot])
                dots = jnp.where(weights > 0, dots, MASKED)
                new_top = jnp.maximum(top, plgpu.layout_cast(jnp.max(dots, axis=1), DOWN))
                shares = weights * jnp.exp2((dots - rows(new_top, shape)) * scale)
                total = total * jnp.exp2((top - new_top) * scale)
                return new_top, total + plgpu.layout_cast(jnp.sum(shares, axis=1), DOWN)

            nothing = full((height,), FLOOR, DOWN), full((height,), 0.0, DOWN)
            top_gm[part, lane, mine], total_gm[part, lane, mine] = lax.fori_loop(first, end, step, nothing)

        run_roles(warpgroup, produce, consume)

    result = jax.ShapeDtypeStruct((parts, U, units * held), jnp.float32)
    tops, totals = plgpu.kernel(
        body,
        out_type=[result, result],
        scratch_types={
            "q_sm": plgpu.SMEM((CONSUMERS, height, H), q.dtype, transforms=swizzled(H)),
            "q_full": plgpu.Barrier(num_barriers=CONSUMERS),
            "ring_free": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=config.stages),
        }
        | walk.scratch(),
        grid=(U, units, parts),
        grid_names=GRID,
        kernel_name="score_statistics",
        **LAUNCH,
    )(q, *walk.operands())
    top = jnp.max(tops, axis=0)
    total = jnp.sum(totals * jnp.exp((tops - top[None]) / math.sqrt(H)), axis=0)
    return top[:, :M], total[:, :M]


def _sum_shares(q, read: Read, top, bias, config: Config):
    """Σ exp2((q·c − top) · log2e/√H + bias) over each chunk's rows: f32[U M/128 P]; top, bias f32[U M]."""
    U, M, H = q.shape
    chunks = M // CHUNK
    units = -(-chunks // config.chunks)
    held = -(-chunks // units)  # chunks of a unit
    padding = (0, units * held * CHUNK - M)
    q = jnp.pad(q, ((0, 0), padding, (0, 0)))
    stats = jnp.stack([jnp.pad(x, ((0, 0), padding)).reshape(U, -1, CHUNK) for x in (top, bias)], axis=2)
    walk = Walk(read, SECOND, config.tiles, with_weights=False)
    parts = walk.parts(U * units)
    scale = LOG2E / math.sqrt(H)
    shape = (SECOND, CHUNK)

    def body(q_gm, stats_gm, *refs, q_sm, stats_sm, q_full, ring_full, ring_free, **rings):
        *refs, out_gm = refs
        lane, unit, part, warpgroup = (lax.axis_index(name) for name in (*GRID, "warpgroup"))
        first, end = walk.tiles(refs, lane, part, parts)
        ring = Ring(ring_full, ring_free, walk.stages)

        def produce():
            mine = pl.ds(unit * held, held)
            plgpu.copy_gmem_to_smem(stats_gm.at[lane, mine], stats_sm, q_full)
            for i in range(held):
                chunk = pl.ds((unit * held + i) * CHUNK, CHUNK)
                plgpu.copy_gmem_to_smem(q_gm.at[lane, chunk], q_sm.at[i], q_full)
            walk.produce(refs, rings, ring, lane, first, end)

        def consume():
            plgpu.barrier_wait(q_full)

            def step(turn, _):  # every other tile is this warpgroup's
                tile = first + turn * CONSUMERS + warpgroup
                slot = ring.slot(tile - first)
                plgpu.barrier_wait(ring.full.at[slot])
                both = [rings[name].at[slot] for name in ("high_sm", "low_sm")]

                def sum_chunk(i, _):
                    dots = products(shape, *((part, q_sm.at[i].T) for part in both))
                    reference, shift = (columns(load(stats_sm.at[i, j], ALONG), shape) for j in range(2))
                    # No score is above its row's maximum, but the first pass may have rounded it otherwise.
                    shares = jnp.exp2(jnp.minimum((dots - reference) * scale, 0.0) + shift)
                    here = pl.ds(tile * SECOND, SECOND)
                    out_gm[lane, unit * held + i, here] = plgpu.layout_cast(jnp.sum(shares, axis=1), DOWN)

                lax.fori_loop(0, held, sum_chunk, None)
                plgpu.barrier_arrive(ring.free.at[slot])

            turns = lax.div(end - first - warpgroup + (CONSUMERS - 1), jnp.int32(CONSUMERS))
            lax.fori_loop(0, turns, step, None)

        run_roles(warpgroup, produce, consume)

    out = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((U, units * held, read.weights.shape[1]), jnp.float32),
        scratch_types={
            "q_sm": plgpu.SMEM((held, CHUNK, H), q.dtype, transforms=swizzled(H)),
            "stats_sm": plgpu.SMEM((held, 2, CHUNK), jnp.float32),
            "q_full": plgpu.Barrier(num_arrivals=held + 1),
            "ring_free": plgpu.Barrier(num_barriers=config.tiles),
        }
        | walk.scratch(),
        grid=(U, units, parts),
        grid_names=GRID,
        kernel_name="score_sums",
        **LAUNCH,
    )(q, stats, *walk.operands())
    return out[:, :chunks]
