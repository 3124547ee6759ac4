"""Items of a work list on their way from the warpgroup that lists them to the others of its CTA, 64 at a time.

Blocks are counted through all lanes of the CTA's share, and every warpgroup counts them alike. Of two blocks' room in
shared memory one is read while the other is filled.
"""

import dataclasses

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from squeezejax.pallas_kernels.hopper.mosaic import TILE
from squeezejax.pallas_kernels.hopper.work_list import PER_TILE, Lister

ROOM = 2  # blocks


@dataclasses.dataclass(frozen=True)
class ItemRing:
    """In a kernel: the room for items, and who may use which half of it."""

    items: object  # i32[ROOM TILE], shared memory
    full: object  # barriers, ROOM of them
    free: object

    @staticmethod
    def scratch(readers: int) -> dict:
        """What it needs of shared memory, for so many warpgroups that read."""
        return {
            "items": plgpu.SMEM((ROOM * TILE,), jnp.int32),
            "full": plgpu.Barrier(num_barriers=ROOM),
            "free": plgpu.Barrier(num_arrivals=readers, num_barriers=ROOM),
        }

    def item_at(self, block, first):
        """A function of positions in a lane's list, of which `first` is where block number `block` begins."""
        return lambda position: self.items[lax.rem(block * TILE + position - first, jnp.int32(ROOM * TILE))]

    def list_block(self, block, lister: Lister, lane, first):
        """For the warpgroup that lists: a lane's items from position `first` on."""
        slot = lax.rem(block, jnp.int32(ROOM))
        items = lister.items(lane, first)
        pl.when(block >= ROOM)(lambda: plgpu.barrier_wait(self.free.at[slot]))
        self.items[pl.ds(slot * TILE, TILE)] = items
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.full.at[slot])

    def take_block(self, block):
        """For the others: the next block, instead of the one before."""
        self._release(block)
        plgpu.barrier_wait(self.full.at[lax.rem(block, jnp.int32(ROOM))])

    def end(self, blocks, *, lists: bool):
        """When there were so many blocks, and no more will be."""
        if not lists:
            self._release(blocks)
            return
        drain = lambda block, _: plgpu.barrier_wait(self.free.at[lax.rem(block, jnp.int32(ROOM))])
        lax.fori_loop(jnp.maximum(blocks - ROOM, 0), blocks, drain, None)

    def _release(self, block):
        """Block number `block` − 1 is done with."""
        plgpu.commit_smem()  # a barrier: no warp reads it any more
        pl.when(block >= 1)(lambda: plgpu.barrier_arrive(self.free.at[lax.rem(block - 1, jnp.int32(ROOM))]))


def is_block(listed_tile, first):
    """Whether a block begins with a lane's listed tile, the CTA's first one of the lane being `first`."""
    return jnp.logical_and(listed_tile >= 0, lax.rem(listed_tile - first, jnp.int32(PER_TILE)) == 0)
