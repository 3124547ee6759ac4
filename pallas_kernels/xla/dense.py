"""Dense attention in plain XLA: causal over whole sequences, causal over a cache, and over every row of a layer."""

import functools
import math
from typing import TypeVar

import jax
import jax.numpy as jnp

from squeezejax.pallas_kernels.keys_values import KeysValues
from squeezejax.pallas_kernels.layout import from_lanes, split_heads, to_lanes
from squeezejax.pallas_kernels.xla.softmax import MASKED, Softmax, map_over, partial_attention

AnyRows = TypeVar("AnyRows")


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


def attend_cached(q, k, v, start, *, before=None, chunk: int = 512):
    """Causal attention of q [1 T N H], tokens from position `start` on, over k, v [1 T' K H] -> f32[1 T N H].

    Keys are read in chunks up to the last one that q may see, so the work grows with `start`, which may be traced, and
    scores are kept for one chunk only. `before` is a partial result, (out [1 T K G H], lse), over keys that come before
    these. Head by head on the CPU, where XLA runs batched products at a quarter of the speed of single ones.
    """
    _, T, N, H = q.shape
    R, K = k.shape[1:3]
    chunk = min(chunk, R)
    rows = to_lanes(split_heads(q, K))[0]
    rows = (rows.astype(jnp.float32) / math.sqrt(H)).astype(q.dtype)
    row = jnp.repeat(start + jnp.arange(T), N // K)

    def one_head(operands):
        q, head, state = operands

        def step(i, state: Softmax, *, masked: bool) -> Softmax:
            # The last chunk is moved back to end with the cache; rows already seen are masked.
            first = jnp.minimum(i * chunk, R - chunk)
            take = lambda cache: jax.lax.dynamic_slice(cache, (0, first, head, 0), (1, chunk, 1, H))[0, :, 0]
            k_here, v_here = (read_rows(take, cache, i).astype(q.dtype) for cache in (k, v))
            scores = jnp.einsum("MH,JH->MJ", q, k_here, preferred_element_type=jnp.float32)
            if masked:
                column = first + jnp.arange(chunk)
                mask = (column[None, :] <= row[:, None]) & (column >= i * chunk)[None, :]
                scores = jnp.where(mask, scores, MASKED)
            return state.add_scores(scores, v_here)

        # Chunks that every token of q sees whole need no mask; on a CPU it costs as much as a product.
        whole, all_chunks = start // chunk, (start + T + chunk - 1) // chunk
        state = jax.lax.fori_loop(0, whole, functools.partial(step, masked=False), state)
        return jax.lax.fori_loop(whole, all_chunks, functools.partial(step, masked=True), state).end()

    if before is None:
        state = Softmax.start(K, rows.shape[1], H)
    else:
        out, lse = (to_lanes(x)[0] for x in before)
        state = Softmax(lse, jnp.where(lse > MASKED, 1.0, 0.0), out)
    out, _ = map_over(one_head, (rows, jnp.arange(K), state))
    return from_lanes(out[None], N // K).reshape(1, T, N, H)


def attend_all(q, cache: KeysValues, valid, layer, *, chunk: int = 512):
    """Dense attention over every valid row of one layer -> (out f32[B K M H], lse f32[B K M]).

    q [B K M H]; cache, leading axes [L K]; valid bool[K R]; layer i32[]. Rows are read in contiguous chunks.
    """
    B, K, M, H = q.shape
    R = cache.keys.shape[2]
    chunk = min(chunk, R)
    q = q.transpose(1, 0, 2, 3).reshape(K, B * M, H)

    def step(i, state: Softmax) -> Softmax:
        # The last chunk is moved back to end with the cache; rows already seen are masked.
        first = jnp.minimum(i * chunk, R - chunk)
        at = lambda array: [jnp.asarray(x, jnp.int32) for x in (layer, 0, first, *(0,) * (array.ndim - 3))]
        take = lambda array: jax.lax.dynamic_slice(array, at(array), (1, K, chunk, *array.shape[3:]))[0]
        mask = jax.lax.dynamic_slice_in_dim(valid, first, chunk, axis=1)
        mask = mask & (first + jnp.arange(chunk) >= i * chunk)[None, :]
        return state.add(q, read_rows(take, cache, i), mask)

    # Gradients then need no scores: each chunk's are computed anew.
    step = jax.checkpoint(step)
    out, lse = jax.lax.fori_loop(0, -(-R // chunk), step, Softmax.start(K, B * M, H)).end()
    return out.reshape(K, B, M, H).swapaxes(0, 1), lse.reshape(K, B, M).swapaxes(0, 1)


def read_rows(take, cache: AnyRows, step) -> AnyRows:
    """Some rows of a cache, or of one array, as it holds them, inside a loop that counts `step`.

    take(array) gives the rows of an array [… R] or [… R H].
    """
    return jax.tree.map(lambda array: _read_array(take, array, step), cache)


def _read_array(take, array, step):
    if array.dtype.itemsize != 2:
        return take(array)

    def as_integers(array):
        # Before JAX 0.11 XLA's CPU backend widens all of a 16-bit float cache before the loop that reads rows of it, at
        # many times the cost of the loop. It leaves integers alone, and the barrier keeps it from making them early.
        array, _ = jax.lax.optimization_barrier((array, step))
        return jax.lax.bitcast_convert_type(take(jax.lax.bitcast_convert_type(array, jnp.uint16)), array.dtype)

    return jax.lax.platform_dependent(array, cpu=as_integers, default=take)
