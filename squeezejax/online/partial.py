"""Exact attention in pieces: partial results over disjoint sets of keys, and their merge by log-sum-exp.

Letters: B batch, T query tokens, S keys, N query heads, K key/value heads, G = N/K, H head dimension. A partial result
is `(out, lse)`: out the attention over its own keys, lse the log of its softmax's denominator, both float32.
"""

import math

import jax
import jax.numpy as jnp

from squeezejax.online.select import split_heads
from squeezejax.pallas_kernels.xla.attend import MASKED


def partial_attention(q, k, v, mask):
    """Attention of q [B T K G H] over k, v [B S K H] where mask bool[B T S] -> (out f32[B T K G H], lse f32[B T K G]).

    A row with no key gives out 0 and lse MASKED. Keys and values are read in the dtype of q.
    """
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    scores = jnp.einsum("BTKGH,BSKH->BTKGS", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    mask = mask[:, :, None, None, :]
    scores = jnp.where(mask, scores, MASKED)
    top = jnp.max(scores, axis=-1, initial=MASKED)
    weights = jnp.where(mask, jnp.exp(scores - top[..., None]), 0.0)
    total = jnp.sum(weights, axis=-1)
    out = jnp.einsum("BTKGS,BSKH->BTKGH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    safe = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    return out / safe[..., None], jnp.where(total > 0, top + jnp.log(safe), MASKED)


def merge(*partials):
    """Attention over the union of disjoint sets of keys, from each set's (out f32[... H], lse f32[...])."""
    outs, lses = zip(*partials, strict=True)
    top = jnp.max(jnp.stack(lses), axis=0)
    weights = [jnp.exp(lse - top) for lse in lses]
    total = sum(weights)
    out = sum(out * (weight / total)[..., None] for out, weight in zip(outs, weights, strict=True))
    return out, top + jnp.log(total)


def merge_shards(out, lse, axis: str):
    """`merge` of one (out, lse) a device along an axis of the enclosing shard_map."""
    top = jax.lax.pmax(lse, axis)
    weight = jnp.exp(lse - top)
    total = jax.lax.psum(weight, axis)
    return jax.lax.psum(out * (weight / total)[..., None], axis), top + jnp.log(total)


def causal_attention(q, k, v, *, block: int = 256):
    """Dense causal attention of q [B T N H] over k, v [B T K H] -> f32[B T N H], in blocks of query tokens.

    Memory for scores is N · block · T floats a sequence, not N · T².
    """
    B, T, N, H = q.shape
    block = min(block, T)
    padded = jnp.pad(q, ((0, 0), (0, -T % block), (0, 0), (0, 0)))

    def one(start):
        rows = start + jnp.arange(block)
        mask = jnp.broadcast_to(jnp.arange(T)[None, :] <= rows[:, None], (B, block, T))
        part = jax.lax.dynamic_slice_in_dim(padded, start, block, axis=1)
        return partial_attention(split_heads(part, k.shape[2]), k, v, mask)[0]

    out = jax.lax.map(jax.checkpoint(one), jnp.arange(0, padded.shape[1], block))  # [blocks B block K G H]
    return jnp.moveaxis(out, 0, 1).reshape(B, -1, N, H)[:, :T]


def attend_cached(q, k, v, start, *, before=None, chunk: int = 1024):
    """Causal attention of q [1 T N H], tokens from position `start` on, over k, v [1 T' K H] -> f32[1 T N H].

    Keys are read in chunks up to the last one that q may see, so the work grows with `start`, which may be traced.
    `before` is a partial result, (out [1 T K G H], lse), over keys that come before these.
    """
    _, T, N, H = q.shape
    R, K = k.shape[1:3]
    chunk = min(chunk, R)
    groups = split_heads(q, K)
    row = start + jnp.arange(T)

    def step(i, partial):
        # The last chunk is moved back to end with the cache; rows already seen are masked.
        first = jnp.minimum(i * chunk, R - chunk)
        column = first + jnp.arange(chunk)
        mask = (column[None, :] <= row[:, None]) & (column >= i * chunk)[None, :]
        part = [jax.lax.dynamic_slice_in_dim(cache, first, chunk, axis=1) for cache in (k, v)]
        return merge(partial, partial_attention(groups, *part, mask[None]))

    nothing = (jnp.zeros(groups.shape, jnp.float32), jnp.full(groups.shape[:-1], MASKED))
    out, _ = jax.lax.fori_loop(0, (start + T + chunk - 1) // chunk, step, before or nothing)
    return out.reshape(1, T, N, H)
