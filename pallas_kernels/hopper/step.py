"""What a decode step is asked, as every kernel takes it: XLA computes nothing of these few numbers."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Step(NamedTuple):
    """The small operands of a step; in a kernel, references to them.

    A user's token lies in row `start` of the user's own rows, of which `lengths` are in use; a user whose start is not
    below that takes no part, and keeps nothing of the fixed context.
    """

    layer: jax.Array  # i32[1]
    thresholds: jax.Array  # f32[levels], log T
    start: jax.Array  # i32[B]
    lengths: jax.Array  # i32[B]

    def everything(self):
        """In a kernel: whether every threshold is −∞."""
        return functools.reduce(
            jnp.logical_and, [self.thresholds[d] == -jnp.inf for d in range(self.thresholds.shape[0])]
        )

    def threshold(self, depth: int, user):
        """In a kernel: log T of a level for a user."""
        return jnp.where(self.start[user] < self.lengths[user], self.thresholds[depth], jnp.inf)

    def own_rows(self, user):
        """In a kernel: how many of the user's own rows are attended."""
        return jnp.minimum(self.start[user] + 1, self.lengths[user])
