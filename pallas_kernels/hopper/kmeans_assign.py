"""K-means assignment for Hopper: each row's nearest centres, without the matrix of all scores.

A CTA holds some rows in shared memory for good, and a producer warpgroup streams the centres of their head past them,
tile by tile. Two consumer warpgroups multiply (wgmma, float32 sums) and keep, a row, the best score so far; only that
is written. All heads go in one launch.

A score and its centre's number within the tile travel in one float: cosines lie in [−1, 1], so score + 3 lies in
[2, 4), where floats are a fixed-point grid and compare like integers; the low 7 of its 23 bits are replaced by the
number, counting down. One maximum over a tile then finds both, and ties go to the first centre. What is cut off is
2^-15, well below the rounding of bfloat16 rows and centres.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from squeezejax.pallas_kernels.hopper.mosaic import DOWN, MATRIX, check_heads, full, products, rows, swizzled
from squeezejax.pallas_kernels.hopper.ring import CONSUMERS, LAUNCH, Ring, run_roles

TILE = 128  # centres that meet the rows at once
NUMBER = TILE - 1  # the bits of a packed score that hold a centre's number
OFFSET = 3.0
NOTHING = 1.0  # packed score of no centre: a cosine of −2


class Nearest(NamedTuple):
    """Each row's nearest centre and, where asked for, the next one; a cosine of −2 where there is none."""

    labels: jax.Array  # i32[… S]
    best: jax.Array  # f32[… S], cosine to it
    fallback: jax.Array | None  # i32[… S], the second nearest
    second: jax.Array | None  # f32[… S], cosine to that


@dataclasses.dataclass(frozen=True)
class Config:
    """Tuning: both fill about 192 KB of shared memory, and the accumulator of `rows` × 128 fits in registers."""

    rows: int  # of each consumer warpgroup
    stages: int  # tiles of centres in flight

    def __post_init__(self):
        if self.rows not in (64, 128):
            raise ValueError(f"rows must be 64 or 128, got {self.rows}")


# More rows a CTA read the centres less often from L2: 256 rows of 128 make it 1.6 TB/s at 400 TFLOP/s.
CONFIGS = {
    64: Config(128, 6), 96: Config(128, 5), 128: Config(128, 4), 192: Config(64, 3), 256: Config(64, 2),
}  # fmt: skip


def nearest(rows, centres, *, with_second: bool = False, config: Config | None = None) -> Nearest:
    """The nearest of centres bf16[… C H] for each of rows bf16[… S H], by dot product; both unit vectors or zero.

    Under `jax.vmap` the mapped axis joins the leading ones, so that all heads share one launch. Equal scores, to
    2^-15, go to the centre of lowest number. Raises NotImplementedError for what the kernel cannot take.
    """
    check_heads(rows.shape[-1])
    config = config or CONFIGS[rows.shape[-1]]

    @jax.custom_batching.custom_vmap
    def every_head(rows, centres):
        *lead, S, _ = rows.shape
        heads = lambda x: x.reshape(-1, *x.shape[-2:])
        found = _nearest(heads(rows), heads(centres), with_second, config)
        return [x[:, :S].reshape(*lead, S) for x in found]

    @every_head.def_vmap
    def _(size, mapped, rows, centres):
        spread = lambda x, is_mapped: x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
        found = every_head(spread(rows, mapped[0]), spread(centres, mapped[1]))
        return found, [True] * len(found)

    return Nearest(*every_head(rows, centres), *([] if with_second else [None, None]))


def _nearest(x, centres, with_second: bool, config: Config):
    """x [U S H], centres [U C H] -> [labels i32[U S'], best f32[U S']] and the same of the second; S' pads S."""
    U, S, H = x.shape
    C = centres.shape[1]
    held = CONSUMERS * config.rows
    x = jnp.pad(x, ((0, 0), (0, -S % held), (0, 0)))
    centres = jnp.pad(centres, ((0, 0), (0, -C % TILE), (0, 0)))
    full_tiles, tiles = C // TILE, -(-C // TILE)
    stages = min(config.stages, tiles)
    outputs = 2 if with_second else 1
    shape = (config.rows, TILE)

    def body(x_gm, centres_gm, *refs, x_sm, ring_sm, number_sm, score_sm, x_full, ring_full, ring_free):
        written = list(zip(refs[::2], refs[1::2], strict=True))
        head, block, warpgroup = (lax.axis_index(name) for name in ("head", "block", "warpgroup"))
        ring = Ring(ring_full, ring_free, stages)

        def produce():
            def step(tile, _):
                slot = ring.slot(tile)
                ring.await_free(tile)
                here = pl.ds(tile * TILE, TILE)
                plgpu.copy_gmem_to_smem(centres_gm.at[head, here], ring_sm.at[slot], ring.full.at[slot])

            lax.fori_loop(0, tiles, step, None)
            ring.drain(tiles)

        def consume():
            mine = pl.ds(block * held + warpgroup * config.rows, config.rows)
            plgpu.copy_gmem_to_smem(x_gm.at[head, mine], x_sm.at[warpgroup], x_full.at[warpgroup])
            plgpu.barrier_wait(x_full.at[warpgroup])
            number = NUMBER - plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=MATRIX)

            def step(tile, state, last=False):
                slot = ring.slot(tile)
                plgpu.barrier_wait(ring.full.at[slot])
                scores = products(shape, (x_sm.at[warpgroup], ring_sm.at[slot].T)) + OFFSET
                plgpu.barrier_arrive(ring.free.at[slot])
                if last:  # centres past C are padding
                    scores = jnp.where(number > NUMBER - C % TILE, scores, NOTHING)
                packed = _float((_bits(scores) & ~NUMBER) | number)
                best = plgpu.layout_cast(jnp.max(packed, axis=1), DOWN)
                found = [(best, tile)]
                if with_second:  # packed scores of a row are all different
                    others = jnp.where(packed == rows(best, shape), NOTHING, packed)
                    found.append((plgpu.layout_cast(jnp.max(others, axis=1), DOWN), tile))
                return _best(state, found)

            nobody = (full((config.rows,), NOTHING, DOWN), plgpu.layout_cast(jnp.zeros(config.rows, jnp.int32), DOWN))
            state = lax.fori_loop(0, full_tiles, step, (nobody,) * outputs)
            if tiles > full_tiles:
                state = step(jnp.int32(full_tiles), state, last=True)
            for i, (packed, tile) in enumerate(state):
                centre = tile * TILE + (NUMBER - (_bits(packed) & NUMBER))
                number_sm[warpgroup, i] = jnp.minimum(centre, C - 1)  # not a number: any centre
                score_sm[warpgroup, i] = _float(_bits(packed) & ~NUMBER) - OFFSET
            plgpu.commit_smem()
            for i, (number_gm, score_gm) in enumerate(written):
                plgpu.copy_smem_to_gmem(number_sm.at[warpgroup, i], number_gm.at[head, mine])
                plgpu.copy_smem_to_gmem(score_sm.at[warpgroup, i], score_gm.at[head, mine])
            plgpu.wait_smem_to_gmem(0)

        run_roles(warpgroup, produce, consume)

    number, score = (jax.ShapeDtypeStruct(x.shape[:2], dtype) for dtype in (jnp.int32, jnp.float32))
    return plgpu.kernel(
        body,
        out_type=[number, score] * outputs,
        scratch_types={
            "x_sm": plgpu.SMEM((CONSUMERS, config.rows, H), x.dtype, transforms=swizzled(H)),
            "ring_sm": plgpu.SMEM((stages, TILE, H), x.dtype, transforms=swizzled(H)),
            "number_sm": plgpu.SMEM((CONSUMERS, outputs, config.rows), jnp.int32),
            "score_sm": plgpu.SMEM((CONSUMERS, outputs, config.rows), jnp.float32),
            "x_full": plgpu.Barrier(num_barriers=CONSUMERS),
            "ring_full": plgpu.Barrier(num_barriers=stages),
            "ring_free": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
        },
        grid=(U, x.shape[1] // held),
        grid_names=("head", "block"),
        kernel_name="kmeans_assign",
        **LAUNCH,
    )(x, centres)


def _best(state, found):
    """In a kernel: the best one or two of (packed score, tile) pairs, both descending; on a tie the earlier tile's."""
    above = lambda new, old: (_bits(new) & ~NUMBER) > (_bits(old) & ~NUMBER)  # centres' numbers are of their tiles
    pick = lambda first, new, old: tuple(jnp.where(first, a, b) for a, b in zip(new, old, strict=True))
    wins = above(found[0][0], state[0][0])
    best = pick(wins, found[0], state[0])
    if len(state) == 1:
        return (best,)
    # Behind a new winner comes the old one or the new second; behind the old winner, the old second or the new best.
    behind_new = pick(above(found[1][0], state[0][0]), found[1], state[0])
    behind_old = pick(above(found[0][0], state[1][0]), found[0], state[1])
    return best, pick(wins, behind_new, behind_old)


def _bits(x):
    return lax.bitcast_convert_type(x, jnp.int32)


def _float(x):
    return lax.bitcast_convert_type(x, jnp.float32)
