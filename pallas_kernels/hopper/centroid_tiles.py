"""Tiles of listed centroids that stream past a CTA's query rows, for Hopper: what both passes of `block_scores` share.

Lists are cut into as many parts as fill the machine. A part's tiles come through a ring of stages in shared memory, by
TMA: a box a tile where clusters are read in order, else one for each granule of 8.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from squeezejax.pallas_kernels.hopper.mosaic import GRANULE, count_ctas, swizzled
from squeezejax.pallas_kernels.hopper.ring import Ring


class Read(NamedTuple):
    """The clusters that lanes read: all of C' = P in order, or listed granules of 8. P is a multiple of 128."""

    high: jax.Array  # [K C' H], of the dtype of queries
    low: jax.Array  # the same: centroids less `high`
    weights: jax.Array  # f32[U P], keys of the cluster at each position; 0: takes no part
    granules: jax.Array | None = None  # i32[U P/8], all of them valid; None: in order
    num_granules: jax.Array | None = None  # i32[U], those that count


def split(centroids, dtype):
    """(high, low) of centroids f32[…], each of a 16-bit dtype."""
    kind = jnp.finfo(dtype)
    # XLA takes a conversion there and back for nothing, and would leave no low part.
    high = lax.reduce_precision(centroids, kind.nexp, kind.nmant)
    return high.astype(dtype), (centroids - high).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Walk:
    """A pass over the lanes' clusters: tiles of `size` come one by one through a ring of `stages`."""

    read: Read
    size: int
    stages: int
    with_weights: bool

    @property
    def in_order(self) -> bool:
        """Whether every lane reads all clusters of its head, in order."""
        return self.read.granules is None

    @property
    def most_tiles(self) -> int:
        """The most that a lane can have."""
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

    def produce(self, refs, rings, ring: Ring, lane, first, end):
        """In a kernel: fetches tiles [first, end) of a lane, each as soon as its stage is free."""
        high_gm, low_gm, weights_gm, *lists = refs
        plane = lax.rem(lane, jnp.int32(self.read.high.shape[0]))
        copied = self.size if self.in_order else GRANULE

        def step(tile, _):
            slot = ring.slot(tile - first)
            numbers = [tile if self.in_order else lists[0][lane, tile * (self.size // GRANULE) + i]
                       for i in range(self.size // copied)]  # fmt: skip
            ring.await_free(tile - first)
            for source, name in ((high_gm, "high_sm"), (low_gm, "low_sm")):
                for i, number in enumerate(numbers):
                    target = rings[name].at[slot, pl.ds(i * copied, copied)]
                    here = pl.ds(number * copied, copied)
                    plgpu.copy_gmem_to_smem(source.at[plane, here], target, ring.full.at[slot])
            if self.with_weights:
                here = weights_gm.at[lane, pl.ds(tile * self.size, self.size)]
                plgpu.copy_gmem_to_smem(here, rings["weights_sm"].at[slot], ring.full.at[slot])

        lax.fori_loop(first, end, step, None)
        ring.drain(end - first)
