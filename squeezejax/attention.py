"""Exact attention in pieces: partial results over disjoint sets of keys, and their merge by log-sum-exp.

Letters: B batch, T query tokens, S keys, N query heads, K key/value heads, G = N/K, H head dimension. A partial result
is `(out, lse)`: out the attention over its own keys, lse the log of its softmax's denominator, both float32.
"""

import math

import jax
import jax.numpy as jnp

# Finite, so that a fully masked row stays free of NaN: its lse is about MASKED, and merging gives it no weight.
MASKED = -1e30


def partial_attention(q, k, v, mask):
    """Attention of q [B T K G H] over k, v [B S K H] where mask bool[B T S] -> (out f32[B T K G H], lse f32[B T K G]).

    A row with no key gives out 0 and lse MASKED.
    """
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


def split_heads(q, num_kv_heads: int):
    """q [B T N H] -> [B T K G H]: query heads grouped under the key/value head that they share."""
    B, T, N, H = q.shape
    return q.reshape(B, T, num_kv_heads, N // num_kv_heads, H)


def causal_attention(q, k, v, *, block: int = 256):
    """Dense causal attention of q [B T N H] over k, v [B T K H] -> f32[B T N H], in blocks of query tokens.

    Memory for scores is N · block · T floats a sequence, not N · T².
    """
    B, T, N, H = q.shape
    groups = split_heads(q, k.shape[2])
    block = min(block, T)
    padded = jnp.pad(groups, ((0, 0), (0, -T % block), (0, 0), (0, 0), (0, 0)))

    def one(start):
        rows = start + jnp.arange(block)
        mask = jnp.broadcast_to(jnp.arange(T) <= rows[:, None], (B, block, T))
        return partial_attention(jax.lax.dynamic_slice_in_dim(padded, start, block, axis=1), k, v, mask)[0]

    out = jax.lax.map(jax.checkpoint(one), jnp.arange(0, padded.shape[1], block))  # [blocks B block K G H]
    return jnp.moveaxis(out, 0, 1).reshape(B, -1, N, H)[:, :T]
