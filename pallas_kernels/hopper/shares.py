"""Splitting lists of very different lengths evenly over the CTAs of a kernel, on the device, with no host to ask.

A *lane* is a user and a key/value head, and every lane has a list of tiles of work. Their lengths are known on the
device only, as `offsets` i32[lanes + 1], exclusive sums. The lists, joined end to end, are cut into equal shares, one a
CTA: a share may cover several lanes, and a lane several shares. What CTA c leaves for lane u goes to slot c + u; no two
coincide, so no atomics are needed, and results repeat bit for bit.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class Shares:
    """In a kernel: the split of `lanes` lists over `num_ctas` CTAs."""

    offsets: object  # reference to i32[lanes + 1]
    lanes: int
    num_ctas: int

    @property
    def total(self):
        """Tiles of all lanes."""
        return self.offsets[self.lanes]

    @property
    def workers(self):
        """CTAs with a share: all, or as many as there are tiles."""
        return jnp.clip(self.total, 1, self.num_ctas)

    def start(self, cta):
        """First tile of a CTA's share, counted through all lanes; that of the next one is its end."""
        workers = self.workers
        cta = jnp.minimum(cta, workers)
        # cta · total / workers, of which the product alone could overflow.
        return cta * lax.div(self.total, workers) + lax.div(cta * lax.rem(self.total, workers), workers)

    def owners(self, lane):
        """[first, end) of the CTAs that work on a lane."""
        first, stop = self.offsets[lane], self.offsets[lane + 1]
        return self._owner(first), jnp.where(stop > first, self._owner(stop - 1) + 1, self._owner(first))

    def visit(self, cta, work, carry=0):
        """work(lane, first, end, carry) -> carry for every lane of a CTA's share, with the tiles of it to work on.

        Gives the last carry; `carry`, of integers, is the first.
        """
        carry = jax.tree.map(jnp.int32, carry)
        start, stop = self.start(cta), self.start(cta + 1)

        def step(state):
            lane, position, carry = state
            begin = self.offsets[lane]
            end = jnp.minimum(stop, self.offsets[lane + 1])
            carry = lax.cond(end > position, lambda: work(lane, position - begin, end - begin, carry), lambda: carry)
            return lane + 1, jnp.maximum(position, end), carry

        return lax.while_loop(lambda state: state[1] < stop, step, (self._lane_at(start), start, carry))[2]

    def _owner(self, tile):
        """The CTA that works on a tile, counted through all lanes."""
        # tile · workers / total or one more; a float32 of it is less than 1 off.
        share = self.workers.astype(jnp.float32) / jnp.maximum(self.total, 1).astype(jnp.float32)
        near = (tile.astype(jnp.float32) * share).astype(jnp.int32)
        return near - 1 + sum((self.start(near + i) <= tile).astype(jnp.int32) for i in range(3))

    def _lane_at(self, tile):
        """The last lane that starts at or before a tile: the one that it lies in."""
        if self.lanes <= 32:  # as many independent loads: one latency
            return sum((self.offsets[u] <= tile).astype(jnp.int32) for u in range(1, self.lanes)) + jnp.int32(0)

        return _last(self.lanes, lambda u: self.offsets[u] <= tile)


def _last(n: int, holds):
    """In a kernel: the last of 0 … n − 1 for which holds(i) is true, which it is up to there, and for 0."""

    def halve(_, bounds):
        low, high = bounds
        middle = lax.div(low + high, jnp.int32(2))
        return jnp.where(holds(middle), middle, low), jnp.where(holds(middle), high, middle)

    return lax.fori_loop(0, math.ceil(math.log2(n)) + 1 if n > 1 else 0, halve, (jnp.int32(0), jnp.int32(n)))[0]


def offsets_of(numbers):
    """i32[… n + 1], exclusive sums of numbers i32[… n] along the last axis."""
    n = numbers.shape[-1]
    # A sum of masked numbers, not cumsum: XLA makes one small kernel of it.
    before = jnp.arange(n + 1)[:, None] > jnp.arange(n)[None, :]
    return jnp.sum(jnp.where(before, jnp.expand_dims(numbers, -2), 0), axis=-1, dtype=jnp.int32)
