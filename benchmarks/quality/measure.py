"""One context, many questions, one method: which replies come out right, and what attention lost on the way.

The right reply is fed token by token, and counts as given where every one of its tokens has the largest logit after the
ones before: that is so exactly when greedy decoding gives it to the last token. Keys are chosen as in generation, once
for a question's tokens and anew for every token of the reply.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.quality import tasks
from benchmarks.quality.methods import CONFIG, Fixed, Method
from squeezejax import add_value_centroids, build_tree, calibrate
from squeezejax.models.embedded import text
from squeezejax.models.embedded.batches import Encoder
from squeezejax.partial import causal_attention, merge

HIDDEN = -1e30


# ---- The context


def context_ids(encoder: Encoder, sample: tasks.Sample, num_tokens: int) -> list[int]:
    """The context as exactly num_tokens + 1 ids, <bos> included: one length compiles once.

    What is missing is filled with headings of the chronicle before it, which hold no word that a task asks for.
    """
    ids = encoder.ids(sample.context)[:num_tokens]
    filler = encoder.ids("\n\n".join(text.HEADINGS) + "\n\n")
    missing = num_tokens - len(ids)
    filler = filler * (missing // len(filler) + 1)
    return [encoder.bos, *filler[len(filler) - missing :], *ids]


def read(params, ids: list[int]) -> Fixed:
    """Reads a context densely and builds its trees: the default two levels, and the finest of them alone."""
    keys, values, queries = read_context(params, jnp.asarray(ids, jnp.int32)[None])
    tree = add_value_centroids(calibrate(build_tree(keys, values, CONFIG), queries))
    level = dataclasses.replace(tree.levels[-1], parents=jnp.zeros_like(tree.levels[-1].parents))
    alone = dataclasses.replace(CONFIG, cluster_fractions=CONFIG.cluster_fractions[-1:])
    flat = calibrate(dataclasses.replace(tree, levels=(level,), config=alone), queries)
    S = tree.num_keys
    return Fixed(keys[:, :, :S], values[:, :, :S], keys[:, :, S:], values[:, :, S:], queries, tree, flat)


@jax.jit
def read_context(params, tokens):
    """keys, values [L K S+W H] and the window's queries [L N W H] of tokens i32[1 S+W], by dense attention."""
    config, T, W = params.config, tokens.shape[1], CONFIG.observation_window
    shape = lambda heads, length: jnp.zeros((config.num_layers, heads, length, config.head_dim))

    def attend(carry, layer, q, k, v):
        found = (x[0].swapaxes(0, 1) for x in (k, v, q[:, T - W :]))
        carry = tuple(whole.at[layer].set(part) for whole, part in zip(carry, found, strict=True))
        return carry, causal_attention(q, k, v)

    K, N = config.num_kv_heads, config.num_heads
    carry = (shape(K, T), shape(K, T), shape(N, W))
    positions = jnp.arange(T)[None]
    return params.run_layers(params.embed(tokens), positions, attend, carry)[1]


# ---- The questions


class Asked(NamedTuple):
    """Questions with their right replies, B rows of `num_question` tokens, then the reply's; both padded at the end."""

    tokens: np.ndarray  # i32[B T]
    valid: np.ndarray  # bool[B T]
    answers: np.ndarray  # bool[B T], tokens of the reply that have to be found in the context
    num_question: int


def ask(encoder: Encoder, sample: tasks.Sample) -> Asked:
    """A sample's questions as arrays; lengths are rounded up, so that few shapes are compiled."""
    turns = [tasks.encode_turn(encoder.tokenizer, question, encoder.eos) for question in sample.questions]
    up = lambda lengths, to: -(-max(lengths) // to) * to
    num_question = up([len(turn.question) for turn in turns], 24)
    T = num_question + up([len(turn.reply) for turn in turns], 18)
    tokens, valid, answers = np.zeros((len(turns), T), np.int32), *np.zeros((2, len(turns), T), bool)
    for row, turn in enumerate(turns):
        for start, ids in ((0, turn.question), (num_question, turn.reply)):
            tokens[row, start : start + len(ids)] = ids
            valid[row, start : start + len(ids)] = True
        answers[row, num_question : num_question + len(turn.answers)] = turn.answers
    return Asked(tokens, valid, answers, num_question)


class Lost(NamedTuple):
    """What a layer's attention was without keys that were not chosen, for R reply tokens of every user."""

    mass: jax.Array  # f32[B R N], of dense attention's mass, the part that was attended to
    error: jax.Array  # f32[B R N], ‖out − dense out‖ / ‖dense out‖
    kept: jax.Array  # f32[B R K], chosen keys / S
    read: jax.Array  # f32[B R K], vectors read of keys, values and index / those of all keys and values


@functools.partial(jax.jit, static_argnames=("method", "num_question"))
def answer(params, fixed: Fixed, index, knob, tokens, valid, *, method: Method, num_question: int):
    """Most likely next tokens i32[B T] after tokens i32[B T] that follow the context, and `Lost` [L …]."""
    B, T = tokens.shape
    config, S = params.config, fixed.keys.shape[2]
    context = S + fixed.window_keys.shape[2]
    position = context + jnp.cumsum(valid.astype(jnp.int32), axis=1) - 1
    sizes = (config.num_heads, config.num_heads, config.num_kv_heads, config.num_kv_heads)
    lost = Lost(*(jnp.zeros((config.num_layers, B, T - num_question, size)) for size in sizes))

    def attend(lost, layer, q, k, v):
        # One user at a time, so that scores stay small.
        one_user = lambda user: _attend(fixed, index, knob, layer, *user, method, num_question)
        out, here = jax.lax.map(one_user, (q, k, v, valid))
        return jax.tree.map(lambda whole, part: whole.at[layer].set(part), lost, here), out

    x, lost = params.run_layers(params.embed(tokens), position, attend, lost)
    return jnp.argmax(params.unembed(x), axis=-1), lost


def _attend(fixed: Fixed, index, knob, layer, q, k, v, valid, method: Method, num_question: int):
    """One layer for one user: q [T N H], k, v [T K H] -> (out [T N H], Lost without B)."""
    T, N, H = q.shape
    K = k.shape[1]
    S, Q, R, G = fixed.keys.shape[2], num_question, T - num_question, N // K
    q = q.reshape(T, K, G, H).transpose(1, 0, 2, 3)  # [K T G H]
    k, v = k.swapaxes(0, 1), v.swapaxes(0, 1)  # [K T H]
    here = lambda x: x[layer]
    dots = lambda keys: jnp.einsum("KTGH,KSH->KTGS", q, keys) / jnp.sqrt(jnp.float32(H))
    seen = jnp.tril(jnp.ones((T, T), bool)) & valid[None, :]
    always = _softmax(
        jnp.concatenate([dots(here(fixed.window_keys)), jnp.where(seen[None, :, None], dots(k), HIDDEN)], axis=-1),
        jnp.concatenate([here(fixed.window_values), v], axis=1),
    )
    logits, values = dots(here(fixed.keys)), here(fixed.values)

    choose = jax.vmap(method.choose, in_axes=(0, 0, None, None))  # over heads
    each_token = jax.vmap(choose, in_axes=(None, 1, None, None), out_axes=1)
    of_layer = jax.tree.map(here, index)
    asking = choose(of_layer, q[:, :Q].reshape(K, Q * G, H), jnp.repeat(valid[:Q], G), knob)
    replying = each_token(of_layer, q[:, Q:], jnp.ones(G, bool), knob)

    mask = jnp.concatenate([jnp.broadcast_to(asking.mask[:, None], (K, Q, S)), replying.mask], axis=1)
    read = merge(_softmax(jnp.where(mask[:, :, None], logits, HIDDEN), values), always)
    dense = merge(_softmax(logits, values), always)
    out = read[0]
    if asking.rest is not None:
        pairs = zip(asking.rest, replying.rest, strict=True)
        rest = (jnp.concatenate([x.reshape(K, Q, G, *x.shape[2:]), y], axis=1) for x, y in pairs)
        out = merge(read, tuple(rest))[0]

    heads = lambda x: x[:, Q:].swapaxes(0, 1).reshape(R, N)
    length = lambda x: jnp.linalg.norm(x, axis=-1)
    kept = jnp.mean(replying.mask.astype(jnp.float32), axis=2).T
    lost = Lost(
        mass=heads(jnp.exp(read[1] - dense[1])),
        error=heads(length(out - dense[0]) / length(dense[0])),
        kept=kept,
        read=kept + replying.index_read.T / (2 * S),
    )
    return out.transpose(1, 0, 2, 3).reshape(T, N, H), lost


def _softmax(logits, values):
    """Attention (out [K T G H], lse [K T G]) from logits [K T G S], where HIDDEN excludes, and values [K S H]."""
    top = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=-1)
    out = jnp.einsum("KTGS,KSH->KTGH", weights, values) / total[..., None]
    # Where everything is hidden, out is a mean of all values, which the merge gives no weight.
    return out, top[..., 0] + jnp.log(total)


# ---- The outcome


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One method at one setting on the questions of one context."""

    exact: list[bool]  # a question: the whole reply was right
    found: list[float]  # a question: share of the tokens that had to be found in the context
    mass: np.ndarray  # f32[L N], means over the tokens of replies
    error: np.ndarray  # f32[L N]
    kept: np.ndarray  # f32[L K]
    read: np.ndarray  # f32[L K]


def run(params, fixed: Fixed, index, method: Method, setting: float, asked: Asked) -> Outcome:
    """Asks every question of one context; `index` is method.build(fixed)."""
    predicted, lost = answer(
        params,
        fixed,
        index,
        method.knob(fixed, setting),
        asked.tokens,
        asked.valid,
        method=method,
        num_question=asked.num_question,
    )
    Q, reply = asked.num_question, asked.valid[:, asked.num_question :]
    # The first token of a reply follows the question's last one, the others their neighbours.
    last = asked.valid[:, :Q].sum(axis=1) - 1
    before = np.concatenate([np.take_along_axis(np.asarray(predicted), last[:, None], 1), predicted[:, Q:-1]], axis=1)
    right = before == asked.tokens[:, Q:]
    answers = asked.answers[:, Q:]
    # The token that a row predicts is what its attention serves: replies' rows but the last.
    weights = reply / reply.sum()
    mean = lambda x: np.einsum("lbrn,br->ln", np.asarray(x), weights)
    return Outcome(
        exact=np.all(right | ~reply, axis=1).tolist(),
        found=(np.sum(right & answers, axis=1) / answers.sum(axis=1)).tolist(),
        **{name: mean(getattr(lost, name)) for name in Lost._fields},
    )
