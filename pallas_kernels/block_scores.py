"""Scores of blocks of query rows against listed centroids, on the tensor cores of Hopper, no score ever stored.

A *lane* is a key/value head and query rows that read the same clusters: all blocks of all users at the coarsest level,
which everybody reads in order; below it one block, with a list of its own. Two passes over the same products: the
first leaves every row's softmax statistics, the second, knowing them, every cluster's sum over rows of
exp(log S − log T). That is all a threshold needs, and neither underflows where it matters nor needs a maximum:
a mean of S exceeds T iff the sum exceeds the number of rows, and equal scores give exactly that number.

Precision: queries have 16 bits already. A centroid is the sum of two 16-bit numbers, `high` and `low`, and the products
with both go to one float32 accumulator: what is cut off is 2^-17 of a centroid (bfloat16; 2^-22 of float16).

In a CTA a producer warpgroup streams tiles of centroids past query rows that stay in shared memory. Lists of clusters
are cut into as many parts as fill the machine; short and long ones mix, since there are several CTAs a multiprocessor.
"""

import dataclasses
import functools
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
    columns,
    compiler_params,
    count_ctas,
    full,
    load,
    rows,
    swizzled,
)

CONSUMERS = 2
CHUNK = 128  # query rows whose sums are told apart
FIRST, SECOND = 128, 64  # clusters of a tile in the first and in the second pass
FLOOR = -1e20  # maxima start here, above MASKED
LOG2E = math.log2(math.e)
REGISTERS = (40, 232)  # of a producer's and of a consumer's thread
LAUNCH = {
    "grid_names": ("lane", "unit", "part"),
    "num_threads": CONSUMERS + 1,
    "thread_name": "warpgroup",
    # Every shared buffer is written and read across barriers that the body states itself.
    "compiler_params": compiler_params(unsafe_no_auto_barriers=True),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Tuning, within some 220 KB of shared memory."""

    rows: int  # of a consumer warpgroup in the first pass
    stages: int  # tiles of centroids in flight, in the first pass
    chunks: int  # of query rows held in the second pass
    tiles: int  # in flight there

    def __post_init__(self):
        if self.rows not in (64, 128):
            raise ValueError(f"rows must be 64 or 128, got {self.rows}")
        if self.tiles % CONSUMERS:
            raise ValueError(f"consumers take turns: tiles must be a multiple of {CONSUMERS}, got {self.tiles}")


CONFIGS = {64: Config(128, 4, 4, 6), 96: Config(128, 2, 4, 4), 128: Config(128, 2, 4, 2)}


class Read(NamedTuple):
    """The clusters that lanes read, C' a multiple of 8; what is listed is a whole granule of 8 clusters."""

    high: jax.Array  # [K C' H], of the dtype of queries
    low: jax.Array  # the same: centroids less `high`
    weights: jax.Array  # f32[U P], keys of the cluster at each position; 0: takes no part. P is a multiple of 128
    granules: jax.Array | None = None  # i32[U P/8]; None: all clusters in order, C' = P
    num_granules: jax.Array | None = None  # i32[U], those that count


def split(centroids, dtype):
    """(high, low) of centroids f32[…], each of a 16-bit dtype."""
    kind = jnp.finfo(dtype)
    # XLA takes a conversion there and back for nothing, and would leave no low part.
    high = lax.reduce_precision(centroids, kind.nexp, kind.nmant)
    return high.astype(dtype), (centroids - high).astype(dtype)


def sum_scores(q, valid, read: Read, log_T, *, config: Config | None = None):
    """Σ exp(log S − log T) over the valid rows of every chunk of 128: f32[U M/128 P], by position in the lanes' lists.

    q [U M H], lane u of key/value head u mod K, M a multiple of 128; valid bool[U M]; log_T f32[]. log S is s(q, c)
    normalised over the lane's clusters (spec.md, Online 5); positions that take no part hold anything.
    """
    U, M, H = q.shape
    config = config or CONFIGS[H]
    top, total = _row_statistics(q, read, config)
    # As in reference.log_scores; the maximum itself is subtracted in the kernel, exactly.
    bias = -(jnp.log(jnp.maximum(total, 1.0)) + log_T) * LOG2E
    bias = jnp.where(valid, bias, -jnp.inf)
    return _sum_shares(q, read, top, bias, config)


def _row_statistics(q, read: Read, config: Config):
    """Of every row: the maximum of q·c over its lane's clusters, and Σ n exp(s − max), both f32[U M]."""
    U, M, H = q.shape
    height = config.rows if M > CHUNK else CHUNK // CONSUMERS
    held = CONSUMERS * height
    units = -(-M // held)
    q = jnp.pad(q, ((0, 0), (0, units * held - M), (0, 0)))
    walk = _Walk(read, FIRST, config.stages, with_weights=True)
    parts = walk.parts(U * units)
    scale = LOG2E / math.sqrt(H)
    shape = (height, FIRST)

    def body(q_gm, *refs, q_sm, q_full, ring_full, ring_free, **rings):
        *refs, top_gm, total_gm = refs
        lane, unit, part = (lax.axis_index(name) for name in ("lane", "unit", "part"))
        warpgroup = lax.axis_index("warpgroup")
        first, end = walk.tiles(refs, lane, part, parts)

        @pl.when(warpgroup == CONSUMERS)
        def produce():
            plgpu.set_max_registers(REGISTERS[0], action="decrease")
            walk.produce(refs, rings, ring_full, ring_free, lane, first, end)

        @pl.when(warpgroup < CONSUMERS)
        def consume():
            plgpu.set_max_registers(REGISTERS[1], action="increase")
            mine = pl.ds(unit * held + warpgroup * height, height)
            plgpu.copy_gmem_to_smem(q_gm.at[lane, mine], q_sm.at[warpgroup], q_full.at[warpgroup])
            plgpu.barrier_wait(q_full.at[warpgroup])

            def step(tile, state):
                top, total = state
                slot = walk.slot(tile - first)
                plgpu.barrier_wait(ring_full.at[slot])
                both = [rings[name].at[slot] for name in ("high_sm", "low_sm")]
                dots = _add_products([(q_sm.at[warpgroup], part.T) for part in both], shape)
                weights = columns(load(rings["weights_sm"].at[slot], ALONG), shape)
                plgpu.barrier_arrive(ring_free.at[slot])
                dots = jnp.where(weights > 0, dots, MASKED)
                new_top = jnp.maximum(top, plgpu.layout_cast(jnp.max(dots, axis=1), DOWN))
                shares = weights * jnp.exp2((dots - rows(new_top, shape)) * scale)
                total = total * jnp.exp2((top - new_top) * scale)
                return new_top, total + plgpu.layout_cast(jnp.sum(shares, axis=1), DOWN)

            nothing = full((height,), FLOOR, DOWN), full((height,), 0.0, DOWN)
            top_gm[part, lane, mine], total_gm[part, lane, mine] = lax.fori_loop(first, end, step, nothing)

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
    held = -(-chunks // units)
    padding = (0, units * held * CHUNK - M)
    q = jnp.pad(q, ((0, 0), padding, (0, 0)))
    stats = jnp.stack([jnp.pad(x, ((0, 0), padding)).reshape(U, -1, CHUNK) for x in (top, bias)], axis=2)
    walk = _Walk(read, SECOND, config.tiles, with_weights=False)
    parts = walk.parts(U * units)
    scale = LOG2E / math.sqrt(H)
    shape = (SECOND, CHUNK)

    def body(q_gm, stats_gm, *refs, q_sm, stats_sm, q_full, ring_full, ring_free, **rings):
        *refs, out_gm = refs
        lane, unit, part = (lax.axis_index(name) for name in ("lane", "unit", "part"))
        warpgroup = lax.axis_index("warpgroup")
        first, end = walk.tiles(refs, lane, part, parts)

        @pl.when(warpgroup == CONSUMERS)
        def produce():
            plgpu.set_max_registers(REGISTERS[0], action="decrease")
            mine = pl.ds(unit * held, held)
            plgpu.copy_gmem_to_smem(stats_gm.at[lane, mine], stats_sm, q_full)
            for i in range(held):
                chunk = pl.ds((unit * held + i) * CHUNK, CHUNK)
                plgpu.copy_gmem_to_smem(q_gm.at[lane, chunk], q_sm.at[i], q_full)
            walk.produce(refs, rings, ring_full, ring_free, lane, first, end)

        @pl.when(warpgroup < CONSUMERS)
        def consume():
            plgpu.set_max_registers(REGISTERS[1], action="increase")
            plgpu.barrier_wait(q_full)

            def step(turn, _):  # every other tile is this warpgroup's
                tile = first + turn * CONSUMERS + warpgroup
                slot = walk.slot(tile - first)
                plgpu.barrier_wait(ring_full.at[slot])

                both = [rings[name].at[slot] for name in ("high_sm", "low_sm")]

                def sum_chunk(i, _):
                    dots = _add_products([(part, q_sm.at[i].T) for part in both], shape)
                    reference, shift = (columns(load(stats_sm.at[i, j], ALONG), shape) for j in range(2))
                    shares = jnp.exp2((dots - reference) * scale + shift)
                    here = pl.ds(tile * SECOND, SECOND)
                    out_gm[lane, unit * held + i, here] = plgpu.layout_cast(jnp.sum(shares, axis=1), DOWN)

                lax.fori_loop(0, held, sum_chunk, None)
                plgpu.barrier_arrive(ring_free.at[slot])

            turns = lax.div(end - first - warpgroup + (CONSUMERS - 1), jnp.int32(CONSUMERS))
            lax.fori_loop(0, turns, step, None)

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
        kernel_name="score_sums",
        **LAUNCH,
    )(q, stats, *walk.operands())
    return out[:, :chunks]


def _add_products(factors, shape):
    """In a kernel: the sum of a·b over pairs of references, in one float32 accumulator."""

    def multiply(acc):
        for a, b in factors:
            plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


@dataclasses.dataclass(frozen=True)
class _Walk:
    """A pass over the lanes' clusters: tiles of `size` come one by one through a ring of `stages`."""

    read: Read
    size: int
    stages: int
    with_weights: bool

    @property
    def in_order(self) -> bool:
        return self.read.granules is None

    @property
    def most_tiles(self) -> int:
        return self.read.weights.shape[1] // self.size

    def parts(self, units: int) -> int:
        """Into how many parts the clusters are cut, so that each multiprocessor gets four CTAs or more."""
        return max(1, min(self.most_tiles, -(-4 * count_ctas(1) // units)))

    def operands(self) -> list:
        """The arrays that a kernel reads."""
        high, low, weights, *lists = self.read
        return [high, low, weights] + ([] if self.in_order else lists)

    def scratch(self) -> dict:
        """The ring, and a barrier that says what has arrived."""
        high = self.read.high
        H = high.shape[2]
        ring = plgpu.SMEM((self.stages, self.size, H), high.dtype, transforms=swizzled(H))
        copies = 2 * (1 if self.in_order else self.size // GRANULE) + self.with_weights
        weights = {"weights_sm": plgpu.SMEM((self.stages, self.size), jnp.float32)} if self.with_weights else {}
        barrier = plgpu.Barrier(num_arrivals=copies, num_barriers=self.stages)
        return {"high_sm": ring, "low_sm": ring, "ring_full": barrier} | weights

    def tiles(self, refs, lane, part, parts: int):
        """In a kernel: [first, end) of a part's tiles; refs as `operands`."""
        if self.in_order:
            tiles = jnp.int32(self.most_tiles)
        else:
            tiles = lax.div(refs[4][lane] * GRANULE + (self.size - 1), jnp.int32(self.size))
        return lax.div(part * tiles, jnp.int32(parts)), lax.div((part + 1) * tiles, jnp.int32(parts))

    def slot(self, number):
        """In a kernel: the stage that the tile of this number, of those of a part, goes through."""
        return lax.rem(number, jnp.int32(self.stages))

    def produce(self, refs, rings, ring_full, ring_free, lane, first, end):
        """In a kernel: fetches tiles [first, end) of a lane, each as soon as its stage is free."""
        high_gm, low_gm, weights_gm, *lists = refs
        plane = lax.rem(lane, jnp.int32(self.read.high.shape[0]))
        copied = self.size if self.in_order else GRANULE

        def step(tile, _):
            slot = self.slot(tile - first)
            numbers = [tile if self.in_order else lists[0][lane, tile * (self.size // GRANULE) + i]
                       for i in range(self.size // copied)]  # fmt: skip

            @pl.when(tile - first >= self.stages)
            def _():
                plgpu.barrier_wait(ring_free.at[slot])

            for source, ring in ((high_gm, rings["high_sm"]), (low_gm, rings["low_sm"])):
                for i, number in enumerate(numbers):
                    target = ring.at[slot, pl.ds(i * copied, copied)]
                    plgpu.copy_gmem_to_smem(
                        source.at[plane, pl.ds(number * copied, copied)], target, ring_full.at[slot]
                    )
            if self.with_weights:
                here = weights_gm.at[lane, pl.ds(tile * self.size, self.size)]
                plgpu.copy_gmem_to_smem(here, rings["weights_sm"].at[slot], ring_full.at[slot])

        def drain(tile, _):  # stages released last, for which no later tile waited
            plgpu.barrier_wait(ring_free.at[self.slot(tile - first)])

        lax.fori_loop(first, end, step, None)
        lax.fori_loop(jnp.maximum(end - self.stages, first), end, drain, None)
