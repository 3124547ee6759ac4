"""Causal attention of consecutive tokens over the keys so far: by cuDNN on a GPU that proves itself, else plain XLA.

cuDNN is reached through `jax.nn.dot_product_attention`. Its causal mask wants as many queries as keys, so tokens attend
to themselves, causally, and to the keys before them, by their number; the two are merged by their log-sum-exps.
"""

import functools

import jax
import jax.numpy as jnp

from squeezejax.pallas_kernels.layout import split_heads
from squeezejax.pallas_kernels.proof import proved
from squeezejax.pallas_kernels.xla.dense import attend_cached
from squeezejax.pallas_kernels.xla.softmax import MASKED, merge

MOST_HEAD_DIM = 128  # cuDNN takes multiples of 8 up to this everywhere
TOLERANCE = 2e-2


def usable(q, k) -> bool:
    """Whether cuDNN takes q [B T N H] over k [B T' K H], and has proved itself on this machine."""
    H, group = q.shape[3], q.shape[2] // k.shape[2]
    takes = q.dtype in (jnp.bfloat16, jnp.float16) and k.dtype == q.dtype and H % 8 == 0 and H <= MOST_HEAD_DIM
    return jax.default_backend() == "gpu" and takes and proved(agrees, H, group, str(q.dtype))


def attend_fused(q, k, v, start, *, before=None, implementation: str = "cudnn"):
    """`attend_cached` by `jax.nn.dot_product_attention`; only the rows of k, v before `start` + T are read."""
    start = jnp.asarray(start, jnp.int32)[None]
    parts = _attend_themselves(q, k, v, start, implementation), _attend_earlier(q, k, v, start, implementation)
    return merge(*parts, *([] if before is None else [before]))[0].reshape(q.shape)


def attend_own(q, k, v, start, *, implementation: str = "cudnn"):
    """Of user tokens q [B T N H], a user's first one in row start i32[B] of k, v [B T' K H], to the rows up to theirs.

    Gives (out f32[B T K G H], lse f32[B T K G]). What tokens past the last row of k, v get means nothing.
    """
    themselves = _attend_themselves(q, k, v, start, implementation)
    with_earlier = lambda: merge(themselves, _attend_earlier(q, k, v, start, implementation))
    return jax.lax.cond(jnp.any(start > 0), with_earlier, lambda: themselves)


def attend_layer(q, keys, values, *, implementation: str = "cudnn"):
    """Of tokens q [B T K G H] to every row of keys, values [K R H]: (out f32[B T K G H], lse f32[B T K G])."""
    B, T, K, G, H = q.shape
    by_head = q.transpose(2, 0, 1, 3, 4).reshape(K, B * T, G, H)  # a head is a batch entry, so that nothing is copied
    out, lse = attend_rows(by_head, keys[:, :, None], values[:, :, None], implementation)
    back = lambda x: jnp.moveaxis(x.reshape(K, B, T, G, *x.shape[4:]), 0, 2)
    return back(out), back(lse)


def _attend_themselves(q, k, v, start, implementation: str):
    """Of every token to those of q up to itself."""
    row = jnp.minimum(start[:, None] + jnp.arange(q.shape[1])[None, :], k.shape[1] - 1)
    keys, values = (jnp.take_along_axis(cache, row[:, :, None, None], axis=1) for cache in (k, v))
    return attend_rows(q, keys, values, implementation, is_causal=True)


def _attend_earlier(q, k, v, start, implementation: str):
    """Of every token to the rows before `start`."""
    # At least one key, since a softmax over none is not defined; where there is none, the result has no weight.
    out, lse = attend_rows(q, k, v, implementation, key_value_seq_lengths=jnp.maximum(start, 1))
    return out, jnp.where((start > 0)[:, None, None, None], lse, MASKED)


def attend_rows(q, k, v, implementation: str, **mask):
    """The library's attention of q [B T N H] to k, v [B T' K H]: (out f32[B T K G H], lse f32[B T K G])."""
    out, lse = jax.nn.dot_product_attention(q, k, v, implementation=implementation, return_residual=True, **mask)
    K = k.shape[2]
    return split_heads(out.astype(jnp.float32), K), lse.astype(jnp.float32).reshape(*lse.shape[:2], K, -1)


def agrees(head_dim: int, group: int, dtype: str):
    """Raises ArithmeticError unless cuDNN gives what plain XLA gives on this machine."""
    error = _largest_error(head_dim, group, dtype)
    if not error < TOLERANCE:
        raise ArithmeticError(f"outputs differ by {error}")


def _largest_error(head_dim: int, group: int, dtype: str, implementation: str = "cudnn") -> float:
    """Of the first, a middle and the last chunk of a small context: one by one, and as three users' tokens."""
    keys = jax.random.split(jax.random.key(0), 3)
    T, rows, starts = 64, 256, jnp.array([0, 100, 192])
    q = jax.random.normal(keys[0], (1, T, 2 * group, head_dim), dtype)
    k, v = (jax.random.normal(key, (1, rows, 2, head_dim), dtype) for key in keys[1:])
    fused = jax.jit(functools.partial(attend_fused, implementation=implementation))
    users = jax.jit(functools.partial(attend_own, implementation=implementation))
    together = users(*(jnp.tile(x, (3, 1, 1, 1)) for x in (q, k, v)), starts)[0]
    plain, errors = jax.jit(attend_cached), []
    for user, start in enumerate(starts):
        want = plain(q, k, v, start)
        errors += [fused(q, k, v, start) - want, together[user].reshape(want.shape) - want]
    return max(float(jnp.max(jnp.abs(error))) for error in errors)
