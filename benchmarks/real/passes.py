"""Forward passes that measure: reading a context densely, and tokens after it that attend to chosen keys only.

All tokens of a reply are given at once, each choosing keys for itself, as one after the other in decoding: attention to
the fixed context is dense and masked, so a pass over 256 tokens takes seconds where a loop over them takes minutes.
XLA's CPU backend wants plain matrix products whose results stay in cache, hence the loops over heads and blocks.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.quality.methods import Cache, Fixed
from squeezejax import SqueezeConfig
from squeezejax.pallas_kernels.keys_values import KeysValues, in_8_bits
from squeezejax.pallas_kernels.xla.softmax import merge

HIDDEN = -1e30
BLOCK = 128  # query tokens whose scores are held at once
SINKS = 4  # first tokens whose share of attention is reported
SEGMENTS = 4  # of a context: queries of one see no keys of later ones, not even masked


class Read(NamedTuple):
    """What dense reading of a context of n tokens leaves."""

    keys: jax.Array  # [L K n H]
    values: jax.Array  # [L K n H]
    queries: jax.Array  # [L N W H], of the last tokens


def read(params, ids, window: int) -> Read:
    """Reads a context densely, keeping the queries of its last `window` tokens."""
    return _read(params, jnp.asarray(ids, jnp.int32)[None], min(window, len(ids)))


@functools.partial(jax.jit, static_argnames="window")
def _read(params, tokens, window: int) -> Read:
    config, n = params.config, tokens.shape[1]
    shape = lambda heads, length: jnp.zeros((config.num_layers, heads, length, config.head_dim))

    def attend(carry, layer, q, k, v):
        q, k, v = (x[0].swapaxes(0, 1).astype(jnp.float32) for x in (q, k, v))  # heads first
        found = (k, v, q[:, n - window :])
        carry = Read(*(whole.at[layer].set(part) for whole, part in zip(carry, found, strict=True)))
        return carry, causal(q, k, v).swapaxes(0, 1)[None]

    K, N = config.num_kv_heads, config.num_heads
    carry = Read(shape(K, n), shape(K, n), shape(N, window))
    return params.run_layers(params.embed(tokens), jnp.arange(n)[None], attend, carry)[1]


def causal(q, k, v):
    """Causal attention of q [N n H] over k, v [K n H] -> [N n H]."""
    N, n, H = q.shape
    K = k.shape[0]
    step = -(-n // (SEGMENTS * BLOCK)) * BLOCK
    parts = []
    for first in range(0, n, step):
        last = min(first + step, n)
        block = min(BLOCK, last - first)
        rows = jnp.pad(q[:, first:last], ((0, 0), (0, -(last - first) % block), (0, 0)))
        rows = rows.reshape(N, -1, block, H)
        starts = first + block * jnp.arange(rows.shape[1])

        def one(lane, rows=rows, starts=starts, last=last, block=block):
            head, at = lane
            keys, values = k[head // (N // K), :last], v[head // (N // K), :last]
            seen = jnp.arange(last)[None, :] <= (starts[at] + jnp.arange(block))[:, None]
            scores = jnp.where(seen, rows[head, at] @ keys.T / jnp.sqrt(jnp.float32(H)), HIDDEN)
            return jax.nn.softmax(scores, axis=-1) @ values

        lanes = (x.ravel() for x in jnp.meshgrid(jnp.arange(N), jnp.arange(rows.shape[1]), indexing="ij"))
        out = jax.lax.map(one, tuple(lanes))
        parts.append(out.reshape(N, -1, H)[:, : last - first])
    return jnp.concatenate(parts, axis=1)


def divide(context: Read, config: SqueezeConfig, sinks: int = 0, weights=None) -> Fixed:
    """A context with its first `sinks` tokens and its last ones, the window, as what everybody attends to.

    The other keys and values are rounded as the configuration says.
    """
    W = config.observation_window
    last = context.keys.shape[2] - W
    ends = lambda x: jnp.concatenate([x[:, :, :sinks], x[:, :, last:]], axis=2)
    clustered = lambda x: x[:, :, sinks:last]
    rows = KeysValues(clustered(context.keys), clustered(context.values))
    if config.cache_bits == 8:
        rows = in_8_bits(rows).wide()
    cache = Cache(rows.keys, rows.values, ends(context.keys), ends(context.values))
    return Fixed(cache, context.queries[:, :, -W:], config, weights)


# ---- Tokens after the context


class Chosen(NamedTuple):
    """What R query tokens, each by itself, attend to in one layer, and what finding it took."""

    mask: jax.Array  # bool[K R S], of the clustered keys in their order
    # Bytes of the index that were read, less those that chosen keys spare by having fewer bits than 16, as a share of
    # those of all keys and values in 16 bits.
    read: jax.Array  # f32[K R]
    rest: tuple | None = None  # (out f32[K R G H], lse f32[K R G]) over keys not in the mask, where that is estimated
    missed: jax.Array | None = None  # f32[K R G], estimated log of the mass of keys not in the mask


class Lost(NamedTuple):
    """What a layer's attention was without the keys that were not chosen, for every token."""

    kept: jax.Array  # f32[R K], chosen keys / S
    read: jax.Array  # f32[R K], bytes read of keys, values and index / those of all keys and values in 16 bits
    missed: jax.Array  # f32[R N], of dense attention's mass, the part that was not attended to
    estimated: jax.Array  # f32[R N], the same as the index estimates it; NaN where it does not
    error: jax.Array  # f32[R N], ‖out − dense out‖ / ‖dense out‖
    sinks: jax.Array  # f32[R N], share of dense attention on the first rows of what everybody attends to


class Asked(NamedTuple):
    """B rows of T tokens that follow a context, padded at the end, and where a prediction is wanted."""

    tokens: jax.Array  # i32[B T]
    valid: jax.Array  # bool[B T]
    at: jax.Array  # i32[P], row · T + column of the tokens after which predictions are measured
    gold: jax.Array  # i32[P], what does follow
    probes: jax.Array  # i32[P'], some of `at`, whose dense queries find settings for budgets


class Told(NamedTuple):
    """What one pass gives."""

    log_probabilities: jax.Array  # f32[P V]
    lost: Lost  # with a leading axis L, at `at`
    queries: jax.Array  # f32[L P' N H], at `probes`


def everything(index, knob, layer, q) -> Chosen:
    """The choice of dense attention: q [R N H] attends to every key."""
    S, K = index.shape[2], index.shape[1]
    return Chosen(jnp.ones((K, len(q), S), bool), jnp.zeros((K, len(q))))


@functools.partial(jax.jit, static_argnames="choose")
def tell(params, cache: Cache, index, knob, asked: Asked, *, choose) -> Told:
    """Feeds `asked` after the context; choose(index, knob, layer, q [R N H]) -> Chosen."""
    config = params.config
    (B, T), P = asked.tokens.shape, len(asked.at)
    L, N, K, H = config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim
    length = cache.keys.shape[2] + cache.window_keys.shape[2]
    position = length + jnp.maximum(jnp.cumsum(asked.valid.astype(jnp.int32), axis=1) - 1, 0)
    lost = Lost(*(jnp.zeros((L, P, size)) for size in (K, K, N, N, N, N)))
    queries = jnp.zeros((L, len(asked.probes), N, H))

    def attend(carry, layer, q, k, v):
        lost, queries = carry
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        flat = q.reshape(B * T, N, H)
        chosen = choose(index, knob, layer, flat)
        out, found = _attend(jax.tree.map(lambda x: x[layer], cache), chosen, q, k, v, asked.valid)
        lost = jax.tree.map(lambda whole, part: whole.at[layer].set(part[asked.at]), lost, found)
        return (lost, queries.at[layer].set(flat[asked.probes])), out.reshape(B, T, N, H)

    x, (lost, queries) = params.run_layers(params.embed(asked.tokens), position, attend, (lost, queries))
    x = x.reshape(1, B * T, -1)[:, asked.at]
    return Told(jax.nn.log_softmax(params.unembed(x)[0], axis=-1), lost, queries)


def _attend(cache: Cache, chosen: Chosen, q, k, v, valid):
    """One layer: q [B T N H], k, v [B T K H] -> (out [B·T N H], Lost without L, of all B·T tokens)."""
    B, T, N, H = q.shape
    K = k.shape[2]
    G = N // K
    block = min(BLOCK, T)
    padding, blocks = -T % block, -(-T // block)
    # Lanes: a head, a user, a block of its tokens.
    cut = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, padding), *[(0, 0)] * (x.ndim - 3))).reshape(
        K, B, blocks, block, *x.shape[3:]
    )
    tokens = lambda x: cut(x.reshape(K, B, T, *x.shape[2:]))
    queries = cut(q.reshape(B, T, K, G, H).transpose(2, 0, 1, 3, 4))
    own = k.transpose(2, 0, 1, 3), v.transpose(2, 0, 1, 3)  # [K B T H]
    parts = jax.tree.map(tokens, chosen)
    lanes = [x.ravel() for x in jnp.meshgrid(*(jnp.arange(size) for size in (K, B, blocks)), indexing="ij")]

    def one(lane):
        head, user, at = lane
        q = queries[head, user, at]  # [t G H]
        dots = lambda keys: (q.reshape(-1, H) @ keys.T / jnp.sqrt(jnp.float32(H))).reshape(block, G, -1)
        here = jax.tree.map(lambda x: x[head, user, at], parts)
        seen = (jnp.arange(T)[None, :] <= (at * block + jnp.arange(block))[:, None]) & valid[user][None, :]
        fixed = dots(cache.window_keys[head])
        new = jnp.where(seen[:, None], dots(own[0][head, user]), HIDDEN)
        always = _softmax(
            jnp.concatenate([fixed, new], axis=2), jnp.concatenate([cache.window_values[head], own[1][head, user]])
        )
        logits = dots(cache.keys[head])
        some = merge(_softmax(jnp.where(here.mask[:, None], logits, HIDDEN), cache.values[head]), always)
        dense = merge(_softmax(logits, cache.values[head]), always)
        out = some[0] if here.rest is None else merge(some, here.rest)[0]
        length = lambda x: jnp.linalg.norm(x, axis=-1)
        nothing = jnp.full(some[1].shape, jnp.nan)
        share = jnp.mean(here.mask.astype(jnp.float32), axis=1)
        lost = Lost(
            kept=share,
            read=share + here.read,
            missed=-jnp.expm1(jnp.minimum(some[1] - dense[1], 0.0)),
            estimated=nothing if here.missed is None else jax.nn.sigmoid(here.missed - some[1]),
            error=length(out - dense[0]) / jnp.maximum(length(dense[0]), 1e-30),
            sinks=jnp.exp(jax.nn.logsumexp(fixed[:, :, :SINKS], axis=2) - dense[1]),
        )
        return out, lost

    out, lost = jax.lax.map(one, tuple(lanes))
    # [lanes t …] -> [B·T heads …]
    whole = lambda x: x.reshape(K, B, blocks * block, *x.shape[2:])[:, :, :T].reshape(K, B * T, *x.shape[2:])
    out, lost = jax.tree.map(whole, (out, lost))
    heads = lambda x: jnp.moveaxis(x, 0, 1).reshape(B * T, -1)
    return jnp.moveaxis(out, 0, 1).reshape(B * T, N, H), jax.tree.map(heads, lost)


def _softmax(logits, values):
    """Attention (out [t G H], lse [t G]) from logits [t G S], where HIDDEN excludes, and values [S H]."""
    top = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=-1)
    out = (weights.reshape(-1, weights.shape[-1]) @ values).reshape(*total.shape, -1) / total[..., None]
    # Where everything is hidden, out is a mean of all values, which the merge gives no weight.
    return out, top[..., 0] + jnp.log(total)


@functools.partial(jax.jit, static_argnames="choose")
def spend(index, knob, queries, *, choose):
    """(kept, read) as in `Lost`, means over layers, heads and queries [L P' N H]."""

    def one(layer):
        chosen = choose(index, knob, layer, queries[layer])
        kept = jnp.mean(chosen.mask.astype(jnp.float32))
        return kept, kept + jnp.mean(chosen.read)

    return jax.tree.map(jnp.mean, jax.lax.map(one, jnp.arange(len(queries))))


class Compared(NamedTuple):
    """Predictions next to dense attention's, at P places."""

    kl: jax.Array  # f32[P], of the next-token distribution, from dense attention's
    same: jax.Array  # bool[P], the most likely token is dense attention's
    loss: jax.Array  # f32[P], log-likelihood of the gold token that was lost
    right: jax.Array  # bool[P], the most likely token is the gold one


@jax.jit
def compare(dense, found, gold) -> Compared:
    """Log-probabilities f32[P V] of dense attention and of what is measured; gold i32[P]."""
    likely = jnp.argmax(found, axis=1)
    of_gold = lambda x: jnp.take_along_axis(x, gold[:, None], axis=1)[:, 0]
    return Compared(
        kl=jnp.maximum(jnp.sum(jnp.exp(dense) * (dense - found), axis=1), 0.0),
        same=likely == jnp.argmax(dense, axis=1),
        loss=of_gold(dense) - of_gold(found),
        right=likely == gold,
    )
