"""What a backend does for the library, and the values in which the two speak.

A backend computes attention through a squeezed context: it selects, attends and merges. What it is handed is the tree
(squeezejax/tree.py has its fields; nothing here imports it), the users' own tokens, and a `Reading`, which says how
the fixed context is to be read. A new backend is a class with these methods, entered by `registry.register`; the XLA
backend (xla/backend.py) does everything on every device and is what a backend falls back to where it raises
NotImplementedError.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp


@functools.partial(jax.tree_util.register_dataclass)
@dataclasses.dataclass(frozen=True)
class Reading:
    """How a fixed context is read: what decides which keys, what is estimated of the others, and by whom."""

    # f32[levels], log thresholds coarse → fine, or [B levels], a user's own; None = every key, unless min_mass.
    log_T: jax.Array | None = None
    # The same for W query tokens that select together; between one and W tokens, in proportion to the log of their
    # number. None: `log_T` whatever their number.
    block_log_T: jax.Array | None = None
    min_mass: jax.Array | None = None  # f32[], keep the fewest clusters with this estimated mass instead
    tail: bool = dataclasses.field(default=False, metadata={"static": True})  # add the estimate of what is not read
    missed_mass: bool = dataclasses.field(default=False, metadata={"static": True})  # say how much that was
    implementation: str = dataclasses.field(default="xla", metadata={"static": True})  # from `registry.resolve`

    @property
    def per_user(self) -> bool:
        """Whether every user has thresholds of their own."""
        return self.log_T is not None and self.log_T.ndim == 2

    def log_T_of_users(self, B: int) -> jax.Array:
        """log T f32[B levels]."""
        return jnp.broadcast_to(jnp.atleast_2d(self.log_T), (B, self.log_T.shape[-1]))

    def log_T_of(self, num_tokens, W: int) -> jax.Array:
        """log T f32[B levels] for selections of num_tokens f32[B] query tokens; W, tokens behind `block_log_T`."""
        if self.block_log_T is None:
            return self.log_T_of_users(len(num_tokens))
        share = (jnp.log(jnp.clip(num_tokens, 1.0, W)) / math.log(max(W, 2)))[:, None]
        one, block = jnp.atleast_2d(self.log_T), jnp.atleast_2d(self.block_log_T)
        # −∞ and +∞ stand in both or in none, and would give NaN.
        both = (1 - share) * jnp.where(jnp.isinf(one), 0.0, one) + share * jnp.where(jnp.isinf(block), 0.0, block)
        return jnp.where(jnp.isinf(one), one, jnp.where(jnp.isinf(block) & (share > 0), block, both))

    @property
    def dense_blocks(self) -> jax.Array:
        """bool[]: whether blocks of tokens read every key."""
        return jnp.all((self.log_T if self.block_log_T is None else self.block_log_T) == -jnp.inf)

    @property
    def estimates(self) -> bool:
        """Whether anything is estimated from centroids."""
        return self.tail or self.missed_mass or self.min_mass is not None


class Own(NamedTuple):
    """One layer of the users' own tokens: a cache with room, in which the queries' own rows are already written."""

    keys: jax.Array  # [B T' K H]
    values: jax.Array  # [B T' K H]
    start: jax.Array  # i32[B], row of the first query token
    lengths: jax.Array  # i32[B], rows in use; later ones are padding, neither attended nor counted in any mean


class Attended(NamedTuple):
    """One layer's attention, and how much of the fixed context it read."""

    out: jax.Array  # f32[B T K G H]
    lse: jax.Array  # f32[B T K G], log of the softmax's denominator
    kept: jax.Array  # f32[B], kept clustered keys / S, averaged over key/value heads and valid query tokens
    missed: jax.Array | None = None  # f32[B], estimated missed mass, averaged likewise; None where not asked for


class Layout(NamedTuple):
    """How a backend wants the rows of a cache to lie."""

    granule: int  # clusters end, where they are large enough, at multiples of so many rows
    row_multiple: int  # a head's rows are filled up to a multiple of so many


class Backend(Protocol):
    """One way of computing everything; a method that cannot take its arguments raises NotImplementedError first."""

    name: str  # what `implementation=` calls it
    checked: str  # how it is known to be right, for people

    def missing(self) -> str | None:
        """Why it cannot run on this machine, as the end of a sentence ("needs a …"); None if it can."""

    def layout(self, dtype) -> Layout:
        """How the rows of a cache of this dtype should lie."""

    def check(self, task: str, *arguments) -> Any:
        """Raises NotImplementedError, with the reason, unless it can do a task: the name of a method below.

        Gives the sizes that matter for `prove`, hashable, or None where nothing needs to be proved.
        """

    def prove(self, task: str, sizes):
        """Raises unless a small run of the task comes out right on this machine; called once for each `sizes`."""

    def decode(self, tree, q, own: Own, layer, reading: Reading, context: str | None) -> Attended:
        """Selects and attends for one token a user: q [B 1 K G H], after RoPE; layer i32[], may be traced.

        `context` is the axis of an enclosing shard_map over which the fixed context is distributed, None if whole.
        """

    def prefill(self, tree, q, own: Own, layer, reading: Reading, context: str | None) -> Attended:
        """The same for T tokens a user, q [B T K G H]: `tree.config.query_block` of them share one selection."""

    def attend_chunk(self, q, k, v, start, before) -> jax.Array:
        """Dense causal attention of a context's tokens q [1 T N H] from position `start` on over k, v [1 T' K H].

        `before` is a partial result (out [1 T K G H], lse) over keys that come before these, or None. -> f32[1 T N H].
        """

    def nearest(self, rows, centres, *, with_second: bool):
        """K-means assignment: the nearest of unit centres [C H] to unit rows [S H] (hopper/kmeans_assign.py)."""
