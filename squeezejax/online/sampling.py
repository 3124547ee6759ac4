"""Choosing the next token: greedy, temperature, top-k, top-p."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from squeezejax.arguments import concrete


@functools.partial(jax.tree_util.register_dataclass)
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; every number may be traced, only None or not is part of the compiled program."""

    key: jax.Array  # PRNG key
    temperature: jax.Array  # f32[]; ≤ 0 = greedy
    top_k: jax.Array | None  # i32[], keep the k most likely tokens
    top_p: jax.Array | None  # f32[], keep the fewest tokens whose probability reaches p
    stop_tokens: jax.Array  # i32[n], ids after which a user is done


def sampling_of(temperature, top_k, top_p, key, stop_tokens) -> Sampling:
    """Checks the arguments and gathers them.

    Raises ValueError for top_k < 1, top_p outside (0, 1], a temperature that is NaN or that needs a key and has none.
    """
    if concrete(temperature) and math.isnan(temperature):
        raise ValueError("temperature must be a number, got NaN")
    if key is None:
        if not concrete(temperature) or temperature > 0:
            raise ValueError("temperature above 0 draws at random: give a key, such as key=jax.random.key(0)")
        key = jax.random.key(0)
    if top_k is not None:
        if concrete(top_k) and top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        top_k = jnp.asarray(top_k, jnp.int32)
    if top_p is not None:
        if concrete(top_p) and not 0 < top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {top_p}")
        top_p = jnp.asarray(top_p, jnp.float32)
    stop_tokens = jnp.asarray(stop_tokens, jnp.int32).reshape(-1)
    return Sampling(key, jnp.asarray(temperature, jnp.float32), top_k, top_p, stop_tokens)


def sample(logits, sampling: Sampling, key) -> jax.Array:
    """Next tokens i32[B] from logits f32[B V]."""
    draw = lambda: jax.random.categorical(key, _restrict(logits, sampling), axis=-1).astype(jnp.int32)
    greedy = lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.lax.cond(sampling.temperature > 0, draw, greedy)


def _restrict(logits, sampling: Sampling):
    """logits f32[B V] over the temperature, with −∞ for tokens outside top-k and then top-p."""
    logits = logits / jnp.maximum(sampling.temperature, jnp.finfo(jnp.float32).tiny)
    if sampling.top_k is None and sampling.top_p is None:
        return logits
    ordered = jnp.sort(logits, axis=-1, descending=True)
    V = logits.shape[-1]
    kept = jnp.ones(ordered.shape, bool)
    if sampling.top_k is not None:
        kept = jnp.broadcast_to((jnp.arange(V) < sampling.top_k)[None, :], ordered.shape)
    if sampling.top_p is not None:
        probabilities = jax.nn.softmax(jnp.where(kept, ordered, -jnp.inf), axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        kept &= before < sampling.top_p  # the token that crosses p stays, so one always does
    least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)
