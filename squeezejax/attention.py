"""Exact attention in pieces: partial results over disjoint sets of keys, and their merge by log-sum-exp.

Letters: B batch, T query tokens, S keys, N query heads, K key/value heads, G = N/K, H head dimension. A partial result
is `(out, lse)`: out the attention over its own keys, lse the log of its softmax's denominator, both float32.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from squeezejax.pallas_kernels import dispatch, reference
from squeezejax.select import check_queries, resolve_thresholds, select_lanes, split_heads
from squeezejax.tree import Tree

# Finite, so that a fully masked row stays free of NaN: its lse is about MASKED, and merging gives it no weight.
MASKED = -1e30


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


def attend_context(tree: Tree, q, layer):
    """Attention of q [B T N H] to the whole fixed context, window included -> (out f32[B T K G H], lse)."""
    partials, _ = _attend_fixed(tree, split_heads(q, tree.num_kv_heads), None, layer, None, "xla")
    return merge(*partials)


class Attended(NamedTuple):
    """One layer's attention, and how much of the fixed context it read."""

    out: jax.Array  # f32[B T N H]
    lse: jax.Array  # f32[B T N]
    kept: jax.Array  # f32[B], kept clustered keys / S, averaged over key/value heads and valid query tokens


def attend(
    tree: Tree,
    q,
    k,
    v,
    *,
    layer,
    start=None,
    lengths=None,
    sparsity=None,
    log_thresholds=None,
    implementation: str | None = None,
):
    """Attention of user tokens over kept keys ∪ window ∪ user tokens so far (spec.md, Online 6; paper section 3.2).

    q [B T N H] are consecutive user tokens of layer `layer` (may be traced), after RoPE; k, v [B T' K H] the cache of
    user tokens, possibly with unused room; q's first token lies in row `start` i32[B] of it (default T' − T), and rows
    from `lengths` i32[B] on (default T') are padding: they are neither attended nor counted in any mean. Every
    `tree.config.query_block` tokens, counted from q's first, share one selection. `sparsity` (default the tree's) or
    `log_thresholds` f32[levels] may be traced. Where no implementation is named, a sparsity at which selecting cannot
    pay keeps every key (fallback.py).

    Gives (out f32[B T N H], lse f32[B T N]), lse being the log of the softmax's denominator. Raises ValueError for
    shapes that do not fit, NotImplementedError for an implementation that cannot run here.
    """
    check_queries(tree, q, "B T N H")
    B, T, _, H = q.shape
    if k.shape != v.shape or k.ndim != 4 or k.shape[0] != B or k.shape[2:] != (tree.num_kv_heads, H) or k.shape[1] < T:
        raise ValueError(
            f"k and v must both be [B={B} T'≥{T} K={tree.num_kv_heads} H={H}], got {k.shape} and {v.shape}"
        )
    start = jnp.full(B, k.shape[1] - T, jnp.int32) if start is None else _per_user(start, B, "start")
    lengths = jnp.full(B, k.shape[1], jnp.int32) if lengths is None else _per_user(lengths, B, "lengths")
    log_T = resolve_thresholds(tree, sparsity, log_thresholds, implementation)
    attended = _attend_user(tree, q, k, v, layer, start, lengths, log_T, dispatch.resolve(implementation))
    return attended.out, attended.lse


def attend_user(tree: Tree, q, k, v, layer, start, lengths, log_T, implementation: str) -> Attended:
    """`attend` with every argument resolved; log_T None attends to every fixed key (dense attention)."""
    B, T, N, H = q.shape
    block = min(tree.config.query_block or T, T)
    num_blocks = -(-T // block)
    groups = split_heads(q, tree.num_kv_heads)
    groups = jnp.pad(groups, ((0, 0), (0, num_blocks * block - T), (0, 0), (0, 0), (0, 0)))

    def attend_block(index):
        first = index * block
        token = first + jnp.arange(block)[None, :]
        row = start[:, None] + token
        valid = (row < lengths[:, None]) & (token < T)
        part = jax.lax.dynamic_slice_in_dim(groups, first, block, axis=1)
        fixed, kept = _attend_fixed(tree, part, valid, layer, log_T, implementation)
        with jax.named_scope("attend_user_tokens"):
            column = jnp.arange(k.shape[1])[None, None, :]
            mask = (column <= row[:, :, None]) & (column < lengths[:, None, None])
            own = partial_attention(part, k, v, mask)
        out, lse = merge(*fixed, own)
        return out, lse, kept, jnp.sum(valid.astype(jnp.float32), axis=1)

    if num_blocks == 1:
        out, lse, kept, _ = attend_block(0)
    else:
        out, lse, kept, tokens = jax.lax.map(attend_block, jnp.arange(num_blocks))
        out, lse = (jnp.moveaxis(x, 0, 1).reshape(B, num_blocks * block, *x.shape[3:]) for x in (out, lse))
        kept = jnp.sum(kept * tokens, axis=0) / jnp.maximum(jnp.sum(tokens, axis=0), 1.0)
    return Attended(out[:, :T].reshape(B, T, N, H), lse[:, :T].reshape(B, T, N), kept)


# Without jit every call would compile its loops again: their bodies are new functions each time.
_attend_user = jax.jit(attend_user, static_argnames="implementation")


def _attend_fixed(tree: Tree, q, valid, layer, log_T, implementation: str):
    """q [B T K G H], one selection a user, over the fixed context -> ([(out, lse), …], kept fraction f32[B])."""
    B, T, K, G, H = q.shape
    rows = q.transpose(0, 2, 1, 3, 4).reshape(B, K, T * G, H)

    def every_key():
        with jax.named_scope("attend_every_key"):
            return *reference.attend_all(rows, tree.keys, tree.values, tree.order[layer] >= 0, layer), jnp.ones(B)

    def kept_keys():
        runs = select_lanes(tree, q, valid, layer, log_T).runs
        with jax.named_scope("attend_kept_keys"):
            flat = lambda x: x.reshape(-1, *x.shape[2:])
            head = jnp.tile(layer * K + jnp.arange(K), B)
            out, lse = reference.attend_runs(
                flat(rows), flat(tree.keys), flat(tree.values), jax.tree.map(flat, runs), head
            )
        kept = jnp.mean(runs.num_rows.astype(jnp.float32), axis=1) / tree.num_keys
        return out.reshape(rows.shape), lse.reshape(rows.shape[:-1]), kept

    kernels = dispatch.decode_kernels(implementation, q[:, 0], tree.keys, tree.levels) if T == 1 else None
    if kernels:
        out, lse, kept = _decode_fixed(kernels, tree, q[:, 0], valid[:, 0], layer, log_T)
    elif log_T is None:
        out, lse, kept = every_key()
    else:
        # A threshold of −∞ keeps every key, and reading them in order costs half of reading them by list.
        out, lse, kept = jax.lax.cond(jnp.all(log_T == -jnp.inf), every_key, kept_keys)
    partials = [(out, lse)]
    if tree.window_keys.shape[2]:
        with jax.named_scope("attend_window"):
            everything = jnp.ones((K, tree.window_keys.shape[2]), bool)
            partials.append(reference.attend_all(rows, tree.window_keys, tree.window_values, everything, layer))
    back = lambda x: x.reshape(B, K, T, G, *x.shape[3:]).swapaxes(1, 2)
    return [(back(out), back(lse)) for out, lse in partials], kept


def _decode_fixed(kernels, tree: Tree, q, active, layer, log_T):
    """By the decode kernels: q [B K G H], one token a user -> (out f32[B K G H], lse, kept fraction f32[B])."""
    if log_T is None:
        return *kernels.attend_all(q, tree.keys, tree.values, tree.num_keys, layer), jnp.ones(q.shape[0])
    found = kernels.attend_kept(q, tree.keys, tree.values, tree.levels, active, layer, log_T)
    return found.out, found.lse, jnp.mean(found.num_kept.astype(jnp.float32), axis=1) / tree.num_keys


def _per_user(value, B: int, name: str):
    value = jnp.asarray(value, jnp.int32)
    if value.shape not in ((), (B,)):
        raise ValueError(f"{name} must be i32[B={B}], got shape {value.shape}")
    return jnp.broadcast_to(value, (B,))
