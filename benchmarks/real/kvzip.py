"""KVzip (Kim et al., arXiv 2505.23416): keys by the attention that they get when the model repeats the context.

As in the paper's algorithm 1: the context is repeated in chunks, each after a prompt that asks for it; every key is
scored by the largest attention to it of any query of its chunk's repetition and of any head of its group, in a softmax
over the chunk's keys and those of the repetition itself (and, as in the authors' code, the first tokens). One ranking
over all layers and heads, so that heads get budgets of their own. The scores know no question.
"""

import functools

import jax
import jax.numpy as jnp

from benchmarks.real.passes import BLOCK, HIDDEN, SINKS, Read
from squeezejax.pallas_kernels.xla.softmax import merge

CHUNK = 2048  # tokens repeated at once, the paper's
ASK = "\n\nRepeat the previous context exactly."
ASK_ON = "\n\nRepeat the part of the previous context exactly, starting with `{}`"
OVERLAP = 8  # tokens of the chunk before that the prompt names


def scores(params, tokenizer_ids, tokenizer_text, context: Read, ids: list[int]):
    """Log of the score of every key of the context, f32[L K n]; tokenizer_ids: text -> ids, tokenizer_text: back."""
    n = len(ids)
    longest = params.config.max_positions or 2 * n + CHUNK
    room = longest - n - 64  # for prompts
    if room < 64:
        raise ValueError(f"a context of {n} tokens leaves no positions of {longest} in which to repeat it")
    size = min(CHUNK, n, room)
    found = []
    for first in range(0, n, size):
        # The last chunk is moved back to be as long as the others: one length compiles once.
        start = min(first, n - size)
        before = tokenizer_text(ids[max(start - OVERLAP, 0) : start])
        prompt = tokenizer_ids(ASK_ON.format(before) if start else ASK)[:64]
        tokens = prompt + ids[start : start + size]
        valid = len(tokens)
        tokens = tokens + [0] * (size + 64 - valid)
        part = _repeat(params, context, jnp.array([tokens]), jnp.int32(valid), jnp.int32(start), size)
        found.append(part[:, :, first - start :])
    return jnp.concatenate(found, axis=2)


@functools.partial(jax.jit, static_argnames="size")
def _repeat(params, context: Read, tokens, valid, start, size: int):
    """Log scores f32[L K size] of the keys from `start` on, from tokens i32[1 T] after the context, `valid` of them."""
    config, T = params.config, tokens.shape[1]
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    n = context.keys.shape[2]

    def attend(carry, layer, q, k, v):
        heads = lambda x: x[0].swapaxes(0, 1).astype(jnp.float32)
        q, k, v = heads(q), heads(k), heads(v)
        keys, values = context.keys[layer], context.values[layer]
        part = jax.lax.dynamic_slice_in_dim(keys, start, size, axis=1)
        blocks = -(-T // BLOCK)
        rows = jnp.pad(q, ((0, 0), (0, -T % BLOCK), (0, 0))).reshape(N, blocks, BLOCK, H) / jnp.sqrt(jnp.float32(H))

        def one(lane):
            head, at = lane
            q, here = rows[head, at], head // (N // K)
            row = at * BLOCK + jnp.arange(BLOCK)
            own = jnp.where(jnp.arange(T)[None, :] <= row[:, None], q @ k[here].T, HIDDEN)
            out = merge(_softmax(q @ keys[here].T, values[here]), _softmax(own, v[here]))[0]
            chunk = q @ part[here].T
            total = functools.reduce(
                jnp.logaddexp,
                [jax.nn.logsumexp(x, axis=1) for x in (q @ keys[here, :SINKS].T, chunk, own)],
            )
            shares = jnp.where((row < valid)[:, None], chunk - total[:, None], HIDDEN)
            return out, jnp.max(shares, axis=0)

        lanes = tuple(x.ravel() for x in jnp.meshgrid(jnp.arange(N), jnp.arange(blocks), indexing="ij"))
        out, found = jax.lax.map(one, lanes)
        out = out.reshape(N, -1, H)[:, :T].swapaxes(0, 1)[None]
        return carry.at[layer].set(jnp.max(found.reshape(K, -1, size), axis=1)), out

    carry = jnp.zeros((config.num_layers, K, size))
    return params.run_layers(params.embed(tokens), n + jnp.arange(T)[None], attend, carry)[1]


def _softmax(logits, values):
    """(out, lse) of attention by logits [t S] over values [S H]."""
    lse = jax.nn.logsumexp(logits, axis=1)
    return jnp.exp(logits - lse[:, None]) @ values, lse
