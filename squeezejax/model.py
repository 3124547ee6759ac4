"""What squeezejax asks of a model: a pytree of weights with these methods, whatever it is written in.

`squeezejax.models.Llama` is one. A model from elsewhere that has them is squeezed and asked like it; nothing has to be
inherited or registered (docs/adding.md).
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import jax

Carry = TypeVar("Carry")
# attend(carry, layer i32[], q [B T N H], k [B T K H], v [B T K H]) -> (carry, out [B T N H]); q and k after RoPE.
Attend = Callable[[Carry, jax.Array, jax.Array, jax.Array, jax.Array], tuple[Carry, jax.Array]]


class ModelConfig(Protocol):
    """Sizes, static and hashable."""

    vocab_size: int
    model_dim: int  # D
    mlp_dim: int  # for estimates of time and memory only
    num_layers: int  # L
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H
    tie_embeddings: bool  # for `plan` only
    fingerprint: str | None  # of the weights: a tree of another model is refused; None = unknown


class Model(Protocol):
    """A decoder whose attention is a function argument; `params` in the public functions."""

    config: ModelConfig

    def embed(self, tokens: jax.Array) -> jax.Array:
        """tokens i32[B T] -> hidden states x [B T D]."""

    def run_layers(
        self, x: jax.Array, positions: jax.Array, attend: Attend[Carry], carry: Carry
    ) -> tuple[jax.Array, Carry]:
        """All layers in turn over x [B T D] at `positions` i32[B T], the carry going through every layer's `attend`."""

    def layer(self, index) -> Any:
        """The weights of one layer, a pytree; for `squeeze`, which reads a context layer by layer."""

    def apply_layer(self, layer: Any, x: jax.Array, positions: jax.Array, attend: Callable) -> tuple[jax.Array, Any]:
        """One layer over x [B T D], where attend(q, k, v) -> (carry, out [B T N H]): (x, carry)."""

    def unembed(self, x: jax.Array) -> jax.Array:
        """x [B T D] -> logits f32[B T V]."""


class KnowsItsRope(Protocol):
    """What a model may have besides: the clustering then knows which dimensions are noise of positions."""

    def key_frequencies(self):
        """How fast RoPE turns each dimension of a key, f32[H] in radians a token; 0 where it does not."""
