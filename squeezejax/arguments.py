"""Checks of what users pass in, made before any expensive work; values still on a device or traced are left alone."""

import jax
import jax.numpy as jnp
import numpy as np


def concrete(value) -> bool:
    """Whether a number can be looked at without waiting for a device."""
    return not isinstance(value, jax.Array)


def check_model(params, tree):
    """Raises ValueError unless the tree was made by this model."""
    config = params.config
    ours = (config.num_layers, config.num_kv_heads, config.head_dim)
    L, K, _, H = tree.keys.shape
    if ours != (L, K, H):
        raise ValueError(
            f"the tree is for another model: it has {L} layers, {K} key/value heads of {H}; this model has "
            f"{ours[0]}, {ours[1]} of {ours[2]}"
        )
    if None not in (tree.fingerprint, config.fingerprint) and tree.fingerprint != config.fingerprint:
        raise ValueError(
            f"the tree was made by another model (fingerprint {tree.fingerprint}, this model {config.fingerprint}): "
            "build it again with squeezejax.squeeze"
        )


def check_tokens(tokens, vocab_size: int) -> jax.Array:
    """tokens i32[B T] from i32[B T] or i32[T], after checks of dtype, rank and, for values on the host, range."""
    on_host = not isinstance(tokens, jax.Array)
    tokens = np.asarray(tokens) if on_host else tokens
    if tokens.ndim == 1:
        tokens = tokens[None]
    if tokens.size == 0:
        raise ValueError("there are no user tokens: a question needs at least one")
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers [B T] or [T], got {tokens.dtype} of shape {tokens.shape}")
    if on_host and (tokens.min() < 0 or tokens.max() >= vocab_size):
        raise ValueError(f"token ids must lie in [0, {vocab_size}), got {tokens.min()} to {tokens.max()}")
    return jnp.asarray(tokens, jnp.int32)


def check_context(tokens, vocab_size: int) -> jax.Array:
    """tokens i32[1 T] of one fixed context, from i32[T] or i32[1 T], after the checks of `check_tokens`."""
    tokens = np.asarray(tokens)
    if tokens.size == 0:
        raise ValueError("the context is empty: give its tokens, i32[T]")
    tokens = check_tokens(tokens, vocab_size)
    if tokens.shape[0] != 1:
        raise ValueError(f"one context at a time, tokens i32[T], not {list(tokens.shape)}")
    return tokens


def check_lengths(lengths, B: int, T: int) -> jax.Array:
    """lengths as i32[B], each in [1, T] where known on the host; None means T for everyone."""
    if lengths is None:
        return jnp.full(B, T, jnp.int32)
    on_host = not isinstance(lengths, jax.Array)
    lengths = np.asarray(lengths) if on_host else lengths
    if lengths.shape != (B,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(f"lengths must be integers [B={B}], got {lengths.dtype} of shape {lengths.shape}")
    if on_host and (lengths.min() < 1 or lengths.max() > T):
        raise ValueError(f"lengths must lie in [1, T={T}], got {lengths.tolist()}")
    return jnp.asarray(lengths, jnp.int32)
