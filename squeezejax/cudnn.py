"""Dense causal attention of one chunk of a context over the keys so far: by cuDNN on a GPU, else by plain XLA.

cuDNN is reached through `jax.nn.dot_product_attention`. Its causal mask wants as many queries as keys, so a chunk
attends to itself, causally, and to the keys before it, by their number; the two are merged by their log-sum-exps.
"""

import functools

import jax
import jax.numpy as jnp

from squeezejax.pallas_kernels import dispatch
from squeezejax.partial import MASKED, attend_cached, merge
from squeezejax.select import split_heads

MOST_HEAD_DIM = 128  # cuDNN takes multiples of 8 up to this everywhere
TOLERANCE = 2e-2


def attend_chunk(q, k, v, start, *, before=None):
    """`attend_cached` of q [1 T N H] over k, v [1 T' K H], by cuDNN where this machine has one that proves itself."""
    H, group = q.shape[3], q.shape[2] // k.shape[2]
    usable = q.dtype in (jnp.bfloat16, jnp.float16) and k.dtype == q.dtype and H % 8 == 0 and H <= MOST_HEAD_DIM
    if jax.default_backend() == "gpu" and usable and dispatch.proved(agrees, H, group, str(q.dtype)):
        return attend_fused(q, k, v, start, before=before)
    return attend_cached(q, k, v, start, before=before)


def attend_fused(q, k, v, start, *, before=None, implementation: str = "cudnn"):
    """`attend_cached` by `jax.nn.dot_product_attention`; only the rows of k, v before `start` + T are read."""
    T = q.shape[1]
    attend = functools.partial(jax.nn.dot_product_attention, implementation=implementation, return_residual=True)
    own = [jax.lax.dynamic_slice_in_dim(cache, start, T, axis=1) for cache in (k, v)]
    out, lse = attend(q, *own, is_causal=True)
    # At least one key, since a softmax over none is not defined; where there is none, the result is not used.
    count = jnp.maximum(jnp.asarray(start, jnp.int32), 1)
    earlier, earlier_lse = attend(q, k, v, key_value_seq_lengths=count[None])
    earlier_lse = jnp.where(start > 0, earlier_lse.astype(jnp.float32), MASKED)
    by_group = lambda x: split_heads(x.astype(jnp.float32), k.shape[2])
    by_head = lambda x: x.astype(jnp.float32).reshape(*x.shape[:2], k.shape[2], -1)
    parts = [(by_group(out), by_head(lse)), (by_group(earlier), by_head(earlier_lse))]
    return merge(*parts, *([] if before is None else [before]))[0].reshape(q.shape)


def agrees(head_dim: int, group: int, dtype: str):
    """Raises ArithmeticError unless cuDNN gives what plain XLA gives on this machine."""
    error = _largest_error(head_dim, group, dtype)
    if not error < TOLERANCE:
        raise ArithmeticError(f"outputs differ by {error}")


def _largest_error(head_dim: int, group: int, dtype: str, implementation: str = "cudnn") -> float:
    """Of the first, a middle and the last chunk of a small context."""
    keys = jax.random.split(jax.random.key(0), 3)
    T, rows = 64, 256
    q = jax.random.normal(keys[0], (1, T, 2 * group, head_dim), dtype)
    k, v = (jax.random.normal(key, (1, rows, 2, head_dim), dtype) for key in keys[1:])
    fused = jax.jit(functools.partial(attend_fused, implementation=implementation))
    plain = jax.jit(attend_cached)
    starts = jnp.array([0, 100, rows - T])
    return max(float(jnp.max(jnp.abs(fused(q, k, v, start) - plain(q, k, v, start)))) for start in starts)
