"""Checks of what users pass in, made before any expensive work; values still on a device or traced are left alone.

What comes from the host is put on the device explicitly, so that calls work under `jax.transfer_guard("disallow")`.
"""

import functools
import operator
from collections.abc import Set

import jax
import jax.numpy as jnp
import numpy as np


def concrete(value) -> bool:
    """Whether a number can be looked at without waiting for a device."""
    return not isinstance(value, jax.Array)


def on_device(value, dtype) -> jax.Array:
    """An array of this dtype: one that JAX holds already, or a value of the host, sent explicitly."""
    if isinstance(value, jax.Array):
        return value.astype(dtype)
    return jax.device_put(np.asarray(value, dtype))


def check_number(name: str, value, least=-np.inf, most=np.inf, wanted="a number", per_user=False) -> jax.Array:
    """f32[], or with per_user f32[B], from a number of the host, the device or a trace.

    Raises ValueError for what is no number, or (unless it is on a device) NaN or outside [least, most]; `wanted` says
    in the sentence what it should be.
    """
    one = "one number" if not per_user else "one number, or one a user [B]"
    if isinstance(value, jax.Array):
        if not jnp.issubdtype(value.dtype, jnp.floating) and not jnp.issubdtype(value.dtype, jnp.integer):
            raise ValueError(f"{name} must be {wanted}, got an array of {value.dtype}")
        if value.ndim > per_user:
            raise ValueError(f"{name} must be {one}, got shape {value.shape}")
        return value.astype(jnp.float32)
    array = _host_array(name, value, wanted)
    if not (np.issubdtype(array.dtype, np.floating) or np.issubdtype(array.dtype, np.integer)):
        raise ValueError(f"{name} must be {wanted}, got {_brief(value)}")
    if array.ndim > per_user or array.size == 0:
        raise ValueError(f"{name} must be {one}, got shape {array.shape}")
    if np.isnan(array).any():
        raise ValueError(f"{name} must be {wanted}, got NaN")
    if array.min() < least or array.max() > most:
        raise ValueError(f"{name} must be {wanted}, got {_brief(value)}")
    return on_device(array, jnp.float32)


def check_whole(name: str, value, least: int = 0) -> int:
    """A whole number of at least `least`, from Python, NumPy or a device; it decides about shapes.

    Raises ValueError for anything else, and for 2³¹ and more.
    """
    if isinstance(value, jax.core.Tracer):
        raise ValueError(f"{name} must be a whole number known when compiling, not a traced value")
    if isinstance(value, jax.Array) and value.ndim == 0 and jnp.issubdtype(value.dtype, jnp.integer):
        value = int(jax.device_get(value))
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        whole = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {_brief(value)}") from None
    if whole < least:
        raise ValueError(f"{name} must be at least {least}, got {_brief(whole)}")
    if whole >= 2**31:
        raise ValueError(f"{name} must be below 2³¹, got {_brief(whole)}")
    return whole


def check_key(key) -> jax.Array:
    """A random key of JAX's, [] or [B]; the raw ones of `jax.random.PRNGKey` become typed. Raises ValueError else."""
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.ndim <= 1:
            return key
    elif isinstance(key, jax.Array | np.ndarray) and key.dtype == np.uint32 and 1 <= key.ndim <= 2:
        raw = raw_key_shape()
        if key.shape[-1:] == raw:
            return jax.random.wrap_key_data(on_device(key, jnp.uint32))
    raise ValueError(f"key must be a random key, such as jax.random.key(0), or one a user [B], got {_brief(key)}")


def raw_key_shape() -> tuple[int, ...]:
    """The shape of what is inside a random key."""
    return _raw_key_shape(str(jax.config.jax_default_prng_impl))


@functools.cache
def _raw_key_shape(kind: str) -> tuple[int, ...]:
    return jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=kind))).shape


def check_stop_tokens(stop_tokens) -> jax.Array | np.ndarray:
    """[1 n], or [B n] for different ones a user, where they were given: None, one id, or any collection of them."""
    if stop_tokens is None:
        stop_tokens = ()
    elif isinstance(stop_tokens, Set):
        stop_tokens = sorted(stop_tokens, key=str)
    wanted = "token ids (integers), as in stop_tokens=(2,)"
    array = stop_tokens if isinstance(stop_tokens, jax.Array) else _host_array("stop_tokens", stop_tokens, wanted)
    if array.size == 0 and not isinstance(array, jax.Array):
        array = array.astype(np.int32)
    if not jnp.issubdtype(array.dtype, jnp.integer) or array.ndim > 2:
        raise ValueError(f"stop_tokens must be {wanted}, got {_brief(stop_tokens)}")
    if not isinstance(array, jax.Array) and array.size and (array.min() < -(2**31) or array.max() >= 2**31):
        raise ValueError(f"stop_tokens must be {wanted}, below 2³¹, got {_brief(stop_tokens)}")
    return array if array.ndim == 2 else array.reshape(1, -1)


def _host_array(name: str, value, wanted: str) -> np.ndarray:
    if isinstance(value, str | bytes | dict):
        raise ValueError(f"{name} must be {wanted}, got {_brief(value)}")
    try:
        return np.asarray(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{name} must be {wanted}, got {_brief(value)}") from error


def _brief(value) -> str:
    """A value for a sentence, on one line and not longer than one."""
    if isinstance(value, int) and abs(value) >= 10**30:
        return f"a number of about {value.bit_length() * 0.30103:.0f} digits"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}…"


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


def check_tokens(tokens, vocab_size: int) -> jax.Array | np.ndarray:
    """tokens [B T], where they were given, from [B T] or [T]: checked for dtype, rank and, on the host, range."""
    on_host = not isinstance(tokens, jax.Array)
    if hasattr(tokens, "keys"):
        raise ValueError(
            "tokens must be integers [B T] or [T], got what a tokenizer returns: give its input_ids, "
            "tokenizer(text).input_ids"
        )
    tokens = _host_array("tokens", tokens, "integers [B T] or [T]") if on_host else tokens
    if tokens.ndim == 1:
        tokens = tokens[None]
    if tokens.size == 0:
        raise ValueError("there are no user tokens: a question needs at least one")
    if tokens.dtype == object:
        raise ValueError(
            "tokens must be integers [B T] or [T], all questions of one length: pad them, and give lengths"
        )
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers [B T] or [T], got {tokens.dtype} of shape {tokens.shape}")
    if on_host and (tokens.min() < 0 or tokens.max() >= vocab_size):
        raise ValueError(f"token ids must lie in [0, {vocab_size}), got {tokens.min()} to {tokens.max()}")
    return tokens.astype(np.int32) if on_host else tokens


def check_context(tokens, vocab_size: int) -> jax.Array:
    """tokens i32[1 T] of one fixed context, from i32[T] or i32[1 T], after the checks of `check_tokens`."""
    if isinstance(tokens, jax.core.Tracer):
        raise ValueError("a context is squeezed outside jit: its tokens must be known")
    if not hasattr(tokens, "keys"):
        tokens = _host_array("tokens", tokens, "integers [T]")
    if not hasattr(tokens, "keys") and tokens.size == 0:
        raise ValueError("the context is empty: give its tokens, i32[T]")
    tokens = check_tokens(tokens, vocab_size)
    if tokens.shape[0] != 1:
        raise ValueError(f"one context at a time, tokens i32[T], not {list(tokens.shape)}")
    return on_device(tokens, jnp.int32)


def check_lengths(lengths, B: int, T: int) -> jax.Array:
    """lengths as i32[B], each in [1, T] where known on the host; None means T for everyone."""
    if lengths is None:
        return on_device(np.full(B, T), jnp.int32)
    on_host = not isinstance(lengths, jax.Array)
    lengths = _host_array("lengths", lengths, f"integers [B={B}]") if on_host else lengths
    if lengths.shape != (B,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(f"lengths must be integers [B={B}], got {lengths.dtype} of shape {lengths.shape}")
    if on_host and (lengths.min() < 1 or lengths.max() > T):
        raise ValueError(f"lengths must lie in [1, T={T}], got {lengths.tolist()}")
    return on_device(lengths, jnp.int32)
