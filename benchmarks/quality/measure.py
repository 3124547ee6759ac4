"""One context, many questions, one method: which replies come out right, and what attention lost on the way.

The right reply is fed token by token, and counts as given where every one of its tokens has the largest logit after the
ones before: that is so exactly when greedy decoding gives it to the last token. Keys are chosen as in generation, once
for a question's tokens and anew for every token of the reply. Several values of one name count in any order, as RULER
counts them: in each value's place, every one that was not given yet is right.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.embedded.batches import Encoder
from benchmarks.quality import tasks
from benchmarks.quality.methods import CONFIG, Cache, Fixed, Method
from squeezejax import SqueezeConfig
from squeezejax.models.embedded import text
from squeezejax.offline.build import dimension_weights
from squeezejax.pallas_kernels.xla.dense import causal_attention
from squeezejax.pallas_kernels.xla.softmax import merge

HIDDEN = -1e30
LONGEST_WINDOW = 200  # tokens whose queries are kept


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


class Read(NamedTuple):
    """What dense reading of a context leaves."""

    keys: jax.Array  # [L K S+W H]
    values: jax.Array  # [L K S+W H]
    queries: jax.Array  # [L N LONGEST_WINDOW H], of the last tokens


def read(params, ids: list[int]) -> Read:
    """Reads a context densely."""
    return _read(params, jnp.asarray(ids, jnp.int32)[None])


@jax.jit
def _read(params, tokens) -> Read:  # tokens i32[1 S+W]
    config, T, W = params.config, tokens.shape[1], LONGEST_WINDOW
    shape = lambda heads, length: jnp.zeros((config.num_layers, heads, length, config.head_dim))

    def attend(carry, layer, q, k, v):
        found = (x[0].swapaxes(0, 1) for x in (k, v, q[:, T - W :]))
        carry = Read(*(whole.at[layer].set(part) for whole, part in zip(carry, found, strict=True)))
        return carry, causal_attention(q, k, v)

    K, N = config.num_kv_heads, config.num_heads
    carry = Read(shape(K, T), shape(K, T), shape(N, W))
    positions = jnp.arange(T)[None]
    return params.run_layers(params.embed(tokens), positions, attend, carry)[1]


def divide(context: Read, config: SqueezeConfig, weights=None) -> Fixed:
    """A context with a configuration's sinks and window; where that is empty, those of the usual one calibrate."""
    W, sinks = config.observation_window, config.sinks
    last = context.keys.shape[2] - W
    clustered = lambda x: x[:, :, sinks:last]
    always = lambda x: jnp.concatenate([x[:, :, :sinks], x[:, :, last:]], axis=2)
    keys, values = context.keys, context.values
    cache = Cache(clustered(keys), clustered(values), always(keys), always(values))
    return Fixed(cache, context.queries[:, :, -(W or CONFIG.observation_window) :], config, weights)


def weights_of(params, num_tokens: int) -> tuple[float, ...]:
    """How much each dimension of a key counts in the metric "slow", in a context of so many tokens."""
    return dimension_weights(params.key_frequencies(), num_tokens)


# ---- The questions


class Asked(NamedTuple):
    """Questions with their right replies, B rows of `num_question` tokens, then the reply's; both padded at the end."""

    tokens: np.ndarray  # i32[B T]
    valid: np.ndarray  # bool[B T]
    answers: np.ndarray  # bool[B T], tokens of the reply that have to be found in the context
    accepted: np.ndarray  # i32[B T A], tokens that are right there
    num_question: int


def ask(encoder: Encoder, sample: tasks.Sample) -> Asked:
    """A sample's questions as arrays; lengths are rounded up, so that few shapes are compiled."""
    turns = [tasks.encode_turn(encoder.tokenizer, question, encoder.eos) for question in sample.questions]
    up = lambda lengths, to: -(-max(lengths) // to) * to
    num_question = up([len(turn.question) for turn in turns], 24)
    T = num_question + up([len(turn.reply) for turn in turns], 18)
    tokens, valid, answers = np.zeros((len(turns), T), np.int32), *np.zeros((2, len(turns), T), bool)
    accepted = np.zeros((len(turns), T, tasks.VALUES), np.int32)
    for row, turn in enumerate(turns):
        for start, ids in ((0, turn.question), (num_question, turn.reply)):
            tokens[row, start : start + len(ids)] = ids
            valid[row, start : start + len(ids)] = True
        answers[row, num_question : num_question + len(turn.answers)] = turn.answers
        for place, some in enumerate(turn.accepted, num_question):
            accepted[row, place] = some[-1]  # the same one again where there are fewer
            accepted[row, place, : len(some)] = some
    return Asked(tokens, valid, answers, accepted, num_question)


class Lost(NamedTuple):
    """What a layer's attention was without keys that were not chosen, for R reply tokens of every user."""

    mass: jax.Array  # f32[B R N], of dense attention's mass, the part that was attended to
    error: jax.Array  # f32[B R N], ‖out − dense out‖ / ‖dense out‖
    kept: jax.Array  # f32[B R K], chosen keys / S
    read: jax.Array  # f32[B R K], vectors read of keys, values and index / those of all keys and values
    asked: jax.Array  # f32[B R K], keys that one selection of the question's tokens chose / S, for every R the same


class Way(NamedTuple):
    """What of a method makes the program of a run: methods that agree in it share what is compiled."""

    choose: Callable
    question_block: int | None
    steps: int
    longer: int  # tokens by which sinks and window exceed the usual window: they count as chosen keys

    @classmethod
    def of(cls, method: Method) -> "Way":
        """A method's."""
        longer = method.config.always_read - CONFIG.always_read
        return cls(method.choose, method.question_block, method.steps, longer)


@functools.partial(jax.jit, static_argnames=("way", "num_question"))
def answer(params, cache: Cache, index, knob, tokens, valid, *, way: Way, num_question: int):
    """Most likely next tokens i32[B T] after tokens i32[B T] that follow the context, and `Lost` [L …]."""
    B, T = tokens.shape
    config = params.config
    context = cache.keys.shape[2] + cache.window_keys.shape[2]
    position = context + jnp.cumsum(valid.astype(jnp.int32), axis=1) - 1
    N, K = config.num_heads, config.num_kv_heads
    lost = Lost(*(jnp.zeros((config.num_layers, B, T - num_question, size)) for size in (N, N, K, K, K)))

    def attend(lost, layer, q, k, v):
        here = jax.tree.map(lambda x: x[layer], (cache, index, knob))
        # One user at a time, so that scores stay small.
        out, found = jax.lax.map(lambda user: _attend(*here, *user, way, num_question), (q, k, v, valid))
        return jax.tree.map(lambda whole, part: whole.at[layer].set(part), lost, found), out

    x, lost = params.run_layers(params.embed(tokens), position, attend, lost)
    return jnp.argmax(params.unembed(x), axis=-1), lost


def _attend(cache: Cache, index, knob, q, k, v, valid, way: Way, num_question: int):
    """One layer for one user: q [T N H], k, v [T K H] -> (out [T N H], Lost without B)."""
    T, N, H = q.shape
    K = k.shape[1]
    S, Q, R, G = cache.keys.shape[1], num_question, T - num_question, N // K
    q = q.reshape(T, K, G, H).transpose(1, 0, 2, 3)  # [K T G H]
    k, v = k.swapaxes(0, 1), v.swapaxes(0, 1)  # [K T H]
    dots = lambda keys: jnp.einsum("KTGH,KSH->KTGS", q, keys) / jnp.sqrt(jnp.float32(H))
    seen = jnp.tril(jnp.ones((T, T), bool)) & valid[None, :]
    always = _softmax(
        jnp.concatenate([dots(cache.window_keys), jnp.where(seen[None, :, None], dots(k), HIDDEN)], axis=-1),
        jnp.concatenate([cache.window_values, v], axis=1),
    )
    logits, values = dots(cache.keys), cache.values

    in_head = jax.vmap(way.choose, in_axes=(None, 0, 0, None))  # over blocks of tokens
    choose = jax.vmap(in_head, in_axes=(0, 0, None, 0))  # over heads
    block = way.question_block or Q
    asking = q[:, :Q].reshape(K, Q // block, block * G, H)
    asking_valid = jnp.repeat(valid[:Q], G).reshape(Q // block, block * G)
    asked = choose(index, asking, asking_valid, knob)
    replied = choose(index, q[:, Q :: way.steps], jnp.ones((R // way.steps, G), bool), knob)
    both = ((asked, Q, block), (replied, R, way.steps))

    mask = jnp.concatenate([jnp.repeat(choice.mask, tokens, axis=1) for choice, _, tokens in both], axis=1)
    read = merge(_softmax(jnp.where(mask[:, :, None], logits, HIDDEN), values), always)
    dense = merge(_softmax(logits, values), always)
    out = read[0]
    if asked.rest is not None:
        every_token = lambda *parts: [
            x.reshape(K, n, G, *x.shape[3:]) for x, (_, n, _) in zip(parts, both, strict=True)
        ]
        rest = (jnp.concatenate(every_token(*parts), axis=1) for parts in zip(asked.rest, replied.rest, strict=True))
        out = merge(read, tuple(rest))[0]

    heads = lambda x: x[:, Q:].swapaxes(0, 1).reshape(R, N)
    length = lambda x: jnp.linalg.norm(x, axis=-1)
    share = lambda number: number.astype(jnp.float32).T / (S + way.longer)
    kept = share(jnp.sum(mask[:, Q:], axis=2) + way.longer)
    index_read = jnp.repeat(replied.index_read, way.steps, axis=1) / way.steps
    asking = jnp.any(asking_valid, axis=1)  # selections that are not padding alone
    lost = Lost(
        mass=heads(jnp.exp(read[1] - dense[1])),
        error=heads(length(out - dense[0]) / length(dense[0])),
        kept=kept,
        read=kept + share(index_read) / 2,
        asked=jnp.broadcast_to(
            share(jnp.sum(asked.mask & asking[None, :, None], axis=(1, 2))) / jnp.sum(asking.astype(jnp.float32)),
            kept.shape,
        ),
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
    asked: np.ndarray  # f32[L K]


def run(params, fixed: Fixed, index, method: Method, setting: float, asked: Asked) -> Outcome:
    """Asks every question of one context; `index` is method.build(fixed)."""
    predicted, lost = answer(
        params,
        fixed.cache,
        index,
        method.knob(fixed, index, setting),
        asked.tokens,
        asked.valid,
        way=Way.of(method),
        num_question=asked.num_question,
    )
    Q, reply = asked.num_question, asked.valid[:, asked.num_question :]
    # The first token of a reply follows the question's last one, the others their neighbours.
    last = asked.valid[:, :Q].sum(axis=1) - 1
    before = np.concatenate([np.take_along_axis(np.asarray(predicted), last[:, None], 1), predicted[:, Q:-1]], axis=1)
    right = np.any(before[..., None] == asked.accepted[:, Q:], axis=2)
    answers = asked.answers[:, Q:]
    # The token that a row predicts is what its attention serves: replies' rows but the last.
    weights = reply / reply.sum()
    mean = lambda x: np.einsum("lbrn,br->ln", np.asarray(x), weights)
    return Outcome(
        exact=np.all(right | ~reply, axis=1).tolist(),
        found=(np.sum(right & answers, axis=1) / answers.sum(axis=1)).tolist(),
        **{name: mean(getattr(lost, name)) for name in Lost._fields},
    )
