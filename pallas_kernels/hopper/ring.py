"""Rings of stages in shared memory, for Hopper: what a producer warpgroup fetches, consumer warpgroups use in turn."""

import dataclasses

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from squeezejax.pallas_kernels.hopper.mosaic import compiler_params

CONSUMERS = 2  # warpgroups beside one producer: while one multiplies, the other one does what follows
REGISTERS = 40, 232  # of a producer's and of a consumer's thread, 504 with two of these
LAUNCH = {
    "num_threads": CONSUMERS + 1,
    "thread_name": "warpgroup",
    # Every shared buffer is written and read across barriers that the bodies state themselves.
    "compiler_params": compiler_params(unsafe_no_auto_barriers=True),
}


def run_roles(warpgroup, produce, consume, registers: tuple[int, int] = REGISTERS):
    """In a kernel: the last warpgroup runs produce(), the others consume()."""

    @pl.when(warpgroup == CONSUMERS)
    def _():
        plgpu.set_max_registers(registers[0], action="decrease")
        produce()

    @pl.when(warpgroup < CONSUMERS)
    def _():
        plgpu.set_max_registers(registers[1], action="increase")
        consume()


@dataclasses.dataclass(frozen=True)
class Ring:
    """In a kernel: the barriers of a ring, a pair for each stage. Tiles are numbered from 0 as they go through it."""

    full: object  # a producer's copies have arrived
    free: object  # all consumers are done
    stages: int

    def slot(self, tile):
        """The stage that a tile goes through."""
        return lax.rem(tile, jnp.int32(self.stages))

    def await_free(self, tile):
        """Before a tile is fetched: until the one before it in its stage is no longer used."""

        @pl.when(tile >= self.stages)
        def _():
            plgpu.barrier_wait(self.free.at[self.slot(tile)])

    def drain(self, tiles):
        """After so many tiles: until the last ones are no longer used, for which no later tile waited."""
        await_last = lambda tile, _: plgpu.barrier_wait(self.free.at[self.slot(tile)])
        lax.fori_loop(jnp.maximum(tiles - self.stages, 0), tiles, await_last, None)
