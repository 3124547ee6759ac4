"""The softmax in pieces: partial results over disjoint sets of keys, a running one, and their merges.

A partial result is `(out, lse)`: out the attention over its own keys, lse the log of its softmax's denominator, both
float32. A row without a key gives out 0 and lse MASKED.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Finite, so that a fully masked row stays free of NaN: its lse is about MASKED, and a merge gives it no weight.
MASKED = -1e30


def partial_attention(q, k, v, mask):
    """Attention of q [B T K G H] over k, v [B S K H] where mask bool[B T S] -> (out f32[B T K G H], lse f32[B T K G]).

    Keys and values are read in the dtype of q.
    """
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    scores = jnp.einsum("BTKGH,BSKH->BTKGS", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    mask = mask[:, :, None, None, :]
    scores = jnp.where(mask, scores, MASKED)
    top = jnp.max(scores, axis=-1, initial=MASKED)
    weights = jnp.where(mask, jnp.exp(scores - top[..., None]), 0.0)
    out = jnp.einsum("BTKGS,BSKH->BTKGH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return Softmax(top, jnp.sum(weights, axis=-1), out).end()


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


def map_over(function, xs):
    """`function` over the leading axis of xs: one by one on the CPU, all at once on accelerators.

    XLA's CPU backend runs batched products and their reductions at a sixth of the speed of single ones.
    """
    one_by_one = lambda xs: jax.lax.map(function, xs)
    return jax.lax.platform_dependent(xs, cpu=one_by_one, default=lambda xs: jax.vmap(function)(xs))


class Softmax(NamedTuple):
    """A softmax over keys seen so far, not yet divided."""

    top: jax.Array  # f32[…]
    total: jax.Array  # f32[…]
    out: jax.Array  # f32[… H]

    @classmethod
    def start(cls, U: int, M: int, H: int) -> "Softmax":
        """No key yet, for U lanes of M rows."""
        zeros = lambda *shape: jnp.zeros(shape, jnp.float32)
        return cls(jnp.full((U, M), MASKED, jnp.float32), zeros(U, M), zeros(U, M, H))

    def add(self, q, k, v, mask) -> "Softmax":
        """With keys k, values v [U J H] where mask bool[U J], for queries q [U M H]."""
        scores = jnp.einsum("UMH,UJH->UMJ", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
        scores = jnp.where(mask[:, None, :], scores, MASKED)
        top = jnp.maximum(self.top, jnp.max(scores, axis=-1))
        weights = jnp.where(mask[:, None, :], jnp.exp(scores - top[:, :, None]), 0.0)
        keep = jnp.exp(self.top - top)
        out = jnp.einsum("UMJ,UJH->UMH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return Softmax(top, self.total * keep + jnp.sum(weights, axis=-1), self.out * keep[:, :, None] + out)

    def add_scores(self, scores, v) -> "Softmax":
        """With keys of scores f32[M J], MASKED where there is none, and values v [J H]; for one lane of M rows.

        Every row has a key in what it has seen before or in these, or its result means nothing.
        """
        top = jnp.maximum(self.top, jnp.max(scores, axis=-1))
        # Rounded before they are summed: XLA then writes them once, in the dtype in which the product reads them.
        weights = jnp.exp(scores - top[:, None]).astype(v.dtype)
        keep = jnp.exp(self.top - top)
        out = jnp.einsum("MJ,JH->MH", weights, v, preferred_element_type=jnp.float32)
        total = jnp.sum(weights.astype(jnp.float32), axis=-1)
        return Softmax(top, self.total * keep + total, self.out * keep[:, None] + out)

    def add_parts(self, part: "Softmax", lane) -> "Softmax":
        """With partial softmaxes, each over some keys of lane[i]."""
        member = lane[None, :] == jnp.arange(lane.shape[0])[:, None]  # [lane part]
        tops = jnp.where(member[:, :, None], part.top[None], MASKED)
        top = jnp.maximum(self.top, jnp.max(tops, axis=1))
        keep = jnp.exp(self.top - top)
        # A sum over one-hot weights, not a scatter: its order is fixed, so results repeat bit for bit on every device.
        weights = jnp.where(member[:, :, None], jnp.exp(tops - top[:, None]), 0.0)
        add = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)  # accelerators would round factors
        total = self.total * keep + add("UPM,PM->UM", weights, part.total)
        out = self.out * keep[:, :, None] + add("UPM,PMH->UMH", weights, part.out)
        return Softmax(top, total, out)

    def end(self):
        """(out f32[… H], lse f32[…]); where there was no key, 0 and MASKED."""
        safe = jnp.maximum(self.total, jnp.finfo(jnp.float32).tiny)
        return self.out / safe[..., None], jnp.where(self.total > 0, self.top + jnp.log(safe), MASKED)
