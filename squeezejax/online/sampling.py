"""Choosing the next token: greedy, temperature, top-k, top-p."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from squeezejax import buckets
from squeezejax.arguments import (
    check_key,
    check_number,
    check_stop_tokens,
    concrete,
    on_device,
    raw_key_shape,
)


@functools.partial(jax.tree_util.register_dataclass)
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; every number may be traced, only None or not is part of the compiled program.

    Each is one for all users, or one a user: [B].
    """

    key: jax.Array  # PRNG keys: one [], from which every user's is made, or [B]
    temperature: jax.Array  # f32[] or [B]; ≤ 0 or NaN = greedy
    top_k: jax.Array | None  # i32[] or [B], keep the k most likely tokens; below 1 = 1
    top_p: jax.Array | None  # f32[] or [B], keep the fewest tokens whose probability reaches p; ≤ 0 or NaN = the first
    repetition_penalty: jax.Array | None  # f32[] or [B], above 0; 1 = none
    stop_tokens: jax.Array  # i32[1 n] or [B n], ids after which a user is done; −1 = none


def sampling_of(temperature, top_k, top_p, key, stop_tokens, repetition_penalty=None) -> Sampling:
    """Checks the arguments and gathers them.

    Raises ValueError for what is no number, top_k < 1, top_p outside (0, 1], a penalty that is not above 0, a
    temperature that is NaN or that needs a key and has none, and stop tokens that are no token ids. Of arrays on a
    device only top_k and top_p are looked at.
    """
    greedy = concrete(temperature)
    temperature_ = check_number("temperature", temperature, per_user=True)
    if key is None:
        if not greedy or np.any(np.asarray(temperature) > 0):
            raise ValueError("temperature above 0 draws at random: give a key, such as key=jax.random.key(0)")
        key = jax.random.wrap_key_data(on_device(np.zeros(raw_key_shape()), jnp.uint32))
    key = check_key(key)
    if top_k is not None:
        top_k, wanted = _known(top_k), "a whole number of at least 1"
        check_number("top_k", top_k, 1, wanted=wanted, per_user=True)
        top_k = top_k if isinstance(top_k, jax.Array) else np.asarray(top_k)
        if not jnp.issubdtype(top_k.dtype, jnp.integer):
            raise ValueError(f"top_k must be {wanted}, got {top_k.dtype}")
        top_k = on_device(top_k if isinstance(top_k, jax.Array) else np.minimum(top_k, 2**31 - 1), jnp.int32)
    if top_p is not None:
        wanted = "in (0, 1]"
        top_p = check_number("top_p", _known(top_p), np.finfo(np.float32).tiny, 1, wanted=wanted, per_user=True)
    if repetition_penalty is not None:
        least = np.finfo(np.float32).tiny
        repetition_penalty = check_number(
            "repetition_penalty", repetition_penalty, least, wanted="a number above 0", per_user=True
        )
    return Sampling(key, temperature_, top_k, top_p, repetition_penalty, _stop_tokens(stop_tokens))


def _stop_tokens(stop_tokens) -> jax.Array:
    """i32[1 n] or [B n], in the columns of their bucket: −1 is no token."""
    found = check_stop_tokens(stop_tokens)
    width = buckets.round_up(found.shape[1], buckets.STOP_TOKENS)
    return on_device(buckets.pad_columns(found, width, fill=-1), jnp.int32)


def _known(value):
    """A number as the host has it, if it is not traced: what users set is read, so that nonsense can be refused."""
    on_device = isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer)
    return jax.device_get(value) if on_device and value.is_fully_addressable else value


def check_users(sampling: Sampling, B: int):
    """Raises ValueError unless what is given one a user is given for B users."""
    stop = sampling.stop_tokens.shape[0]
    sizes = {name: getattr(sampling, name) for name in ("key", "temperature", "top_k", "top_p", "repetition_penalty")}
    counts = {name: value.shape[0] for name, value in sizes.items() if value is not None and value.ndim}
    for name, count in (counts | ({"stop_tokens": stop} if stop > 1 else {})).items():
        if count != B:
            raise ValueError(f"{name} is given for {count} users, and there are {B}: give one, or one a user")


def user_keys(key, B: int) -> jax.Array:
    """A key a user [B]: those given, or from one key user b's is `jax.random.fold_in(key, b)` (of one user: itself)."""
    if key.ndim:
        return key
    return key[None] if B == 1 else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(B))


def sample(logits, sampling: Sampling, key, step=None) -> jax.Array:
    """Next tokens i32[B] from logits f32[B V], with a key [] (see `user_keys`) or keys [B].

    With `step` i32[], each user's key is folded with it: one key then serves for any number of steps.
    """
    greedy = lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw():
        keys = user_keys(key, len(logits))
        keys = keys if step is None else jax.vmap(jax.random.fold_in, (0, None))(keys, step)
        drawn = jax.vmap(jax.random.categorical)(keys, _restrict(logits, sampling)).astype(jnp.int32)
        return jnp.where(jnp.broadcast_to(sampling.temperature > 0, drawn.shape), drawn, greedy())

    return jax.lax.cond(jnp.any(sampling.temperature > 0), draw, greedy)


def penalized(logits, said, penalty):
    """logits f32[B V] with those of the tokens said bool[B V] made less likely, by penalty f32[] or [B] (CTRL, 2019).

    Nothing changes where there is no penalty: None.
    """
    if penalty is None:
        return logits
    penalty = penalty.reshape(-1, 1)
    return jnp.where(said, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def log_probability(logits, tokens) -> jax.Array:
    """f32[B], of tokens i32[B] by logits f32[B V] as they are: no temperature, no top-k, no top-p."""
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=1)


def _restrict(logits, sampling: Sampling):
    """logits f32[B V] over the temperature, with −∞ for tokens outside top-k and then top-p."""
    of_user = lambda value: value.reshape(-1, 1)  # [1 1] or [B 1]
    logits = logits / of_user(jnp.maximum(sampling.temperature, jnp.finfo(jnp.float32).tiny))
    if sampling.top_k is None and sampling.top_p is None:
        return logits
    ordered = jnp.sort(logits, axis=-1, descending=True)
    V = logits.shape[-1]
    first = jnp.arange(V)[None, :] == 0
    kept = jnp.ones(ordered.shape, bool)
    if sampling.top_k is not None:
        kept = jnp.broadcast_to(first | (jnp.arange(V)[None, :] < of_user(sampling.top_k)), ordered.shape)
    if sampling.top_p is not None:
        probabilities = jax.nn.softmax(jnp.where(kept, ordered, -jnp.inf), axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        kept &= first | (before < of_user(sampling.top_p))  # the token that crosses p stays, so one always does
    least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)
