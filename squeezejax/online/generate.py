"""Online: from a question's tokens to an answer's, over a squeezed context, as one jitted program.

`generate` is `prefill` then `decode`. The state between them holds the users' own tokens only; the fixed context stays
in the tree, once, whatever the number of users. Every forward pass runs the model's own layers and hands each one an
`attend` that writes the new keys and values to the cache and attends through the tree.
"""

import dataclasses
import functools
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from squeezejax import buckets
from squeezejax.arguments import check_lengths, check_model, check_tokens, check_whole, on_device
from squeezejax.memory import check_state_fits
from squeezejax.mesh import sharding
from squeezejax.online.attention import attend_user, prepared
from squeezejax.online.reading import Estimate, check_reading, dense_reading, fell_back, reading_of
from squeezejax.online.sampling import Sampling, check_users, log_probability, penalized, sample, sampling_of
from squeezejax.pallas_kernels.interface import Own, Reading
from squeezejax.tree import Tree

DEFAULT_ROOM = 128  # rows that a state keeps free for later tokens, unless told otherwise


@functools.partial(jax.tree_util.register_dataclass)
@dataclasses.dataclass(frozen=True)
class State:
    """A conversation so far: the user's and the model's tokens that follow the fixed context."""

    keys: jax.Array  # [L B T' K H], after RoPE, T' rows of room
    values: jax.Array  # [L B T' K H]
    lengths: jax.Array  # i32[B], rows in use
    logits: jax.Array  # f32[B V], for the token that comes next
    kept_fraction: jax.Array  # f32[B], kept clustered keys / S of the prefill that came last
    tokens: jax.Array  # i32[B T'], what the rows hold the keys of

    # Axes by attribute; what `squeezejax.shardings` splits a state by.
    AXES: ClassVar[dict[str, str]] = {
        "keys": "LBTKH",
        "values": "LBTKH",
        "lengths": "B",
        "logits": "BV",
        "kept_fraction": "B",
        "tokens": "BT",
    }

    @property
    def room(self) -> int:
        """T', rows of the cache."""
        return self.keys.shape[2]


@functools.partial(jax.tree_util.register_dataclass)
@dataclasses.dataclass(frozen=True)
class Generation:
    """Generated tokens, and how much of the fixed context they needed."""

    tokens: jax.Array  # i32[B n], padded after a stop token with that token
    lengths: jax.Array  # i32[B], generated tokens, the stop token counted
    kept_fraction: jax.Array  # f32[B], kept clustered keys / S, mean over layers, key/value heads and decode steps
    prefill_kept_fraction: jax.Array  # f32[B], the same for the user's tokens
    log_probabilities: jax.Array  # f32[B n], of each token by the model, before temperature, top-k and top-p; then 0
    missed_mass: jax.Array | None = None  # f32[B], estimated attention to keys not kept, of all attention; mean over
    # layers, heads and decode steps (estimate.py); None without an `Estimate`
    fell_back: jax.Array | None = None  # bool[B]: keys were to be chosen, and all were read, since that is faster
    # (fallback.py); None where this was not for the library to decide

    @property
    def dense_because(self) -> str | None:
        """Why every key was read though a sparsity was asked for; None where keys were chosen. Waits for the device."""
        fell_back = self.fell_back is not None and bool(np.any(np.asarray(self.fell_back)))
        return "choosing keys would take longer than reading all" if fell_back else None


def generate(
    params,
    tree: Tree,
    tokens,
    *,
    max_new_tokens: int = 128,
    lengths=None,
    sparsity=None,
    estimate: Estimate | None = None,
    temperature=0.0,
    top_k=None,
    top_p=None,
    repetition_penalty=None,
    key=None,
    stop_tokens=(),
    implementation: str | None = None,
) -> Generation:
    """Answers user input that follows the fixed context of `tree` (paper section 3; docs/method.md, Selection).

    tokens i32[B T] or i32[T]; `lengths` i32[B] for ragged, right-padded batches: every user gets the tokens that their
    input gives alone. `sparsity` (default the tree's; ≤ 0 keeps every key, ≥ 1 none but the window), one number or [B],
    may be traced and compiles nothing again. Greedy unless `temperature` > 0, which needs `key`: keys [B] are the
    users' own, and each draws what it draws alone with its key; of one key, user b draws with
    `jax.random.fold_in(key, b)`. `temperature`, `top_k`, `top_p` and
    `repetition_penalty` are one number, or [B]; the last, as in transformers, divides the positive logits of tokens
    that the user said or got before, and multiplies the negative ones. A user is done after any of
    `stop_tokens` (ids, or [B n] for different ones a user). `implementation`: None (the best, and dense attention where
    selecting cannot pay), "xla" or "mosaic".

    `estimate`: what centroids are to tell of the keys that are not read, `Estimate(...)`; `missed_mass` of the answer
    then says how much that was.

    One jitted program from user tokens to generated tokens, with no host sync, usable under the caller's own `jit` and
    `jax.export` (exporting.py shows how). Outside of them the lengths of questions, max_new_tokens and the number of
    stop tokens are rounded up by themselves (buckets.py), so that a few programs answer all questions.
    Raises ValueError for a tree of another model or not calibrated, for arguments out of range, and for what surely
    does not fit in memory.
    """
    options = {"sparsity": sparsity, "estimate": estimate, "implementation": implementation}
    reading = reading_of(tree, **options)
    sampling = sampling_of(temperature, top_k, top_p, key, stop_tokens, repetition_penalty)
    found = _generate(params, tree, tokens, lengths, reading, sampling, max_new_tokens)
    return dataclasses.replace(found, fell_back=fell_back(tree, len(found.lengths), **options))


def dense_generate(
    params,
    tree: Tree,
    tokens,
    *,
    max_new_tokens: int = 128,
    lengths=None,
    sparsity=None,
    temperature=0.0,
    top_k=None,
    top_p=None,
    repetition_penalty=None,
    key=None,
    stop_tokens=(),
    implementation: str | None = None,
) -> Generation:
    """`generate` with attention to every fixed key: the baseline, over the same cache. `sparsity` is ignored."""
    del sparsity
    sampling = sampling_of(temperature, top_k, top_p, key, stop_tokens, repetition_penalty)
    return _generate(params, tree, tokens, lengths, dense_reading(implementation), sampling, max_new_tokens)


def prefill(
    params,
    tree: Tree,
    tokens,
    *,
    state: State | None = None,
    capacity: int | None = None,
    lengths=None,
    sparsity=None,
    estimate: Estimate | None = None,
    implementation: str | None = None,
) -> State:
    """Reads user input and returns the state from which `decode` goes on.

    tokens, lengths, sparsity, estimate, implementation as for `generate`. `state` continues a conversation: the
    tokens then follow what it holds. `capacity` is the least room for later tokens, in tokens, beyond these (default
    128); outside `jit` it is rounded up (buckets.py).
    Reverse-mode gradients of the state's logits, keys and values reach `params`, as in `attend`.
    Raises ValueError as `generate` does, and for a state of another batch size.
    """
    check_model(params, tree)
    tokens = check_tokens(tokens, params.config.vocab_size)
    B, T = tokens.shape
    lengths = check_lengths(lengths, B, T)
    sharding.check_users(tree, B)
    reading = reading_of(tree, sparsity=sparsity, estimate=estimate, implementation=implementation)
    check_reading(reading, B)
    extra = DEFAULT_ROOM if capacity is None else check_whole("capacity", capacity)
    in_room = buckets.in_room(tree, reading.implementation)
    if state is None:
        room = buckets.round_up(T + extra, buckets.ROOM)
        check_state_fits(params, tree, B, room)
        state = empty_state(params, in_room, B, room)
    else:
        if state.lengths.shape[0] != B:
            raise ValueError(f"the state holds {state.lengths.shape[0]} users, tokens has {B}")
        state = _with_room(state, T + extra)
    tokens = on_device(buckets.pad_tokens(tokens), jnp.int32)
    return _prefill(params, in_room, state, tokens, lengths, reading)


def decode(
    params,
    tree: Tree,
    state: State,
    num_tokens: int,
    *,
    sparsity=None,
    estimate: Estimate | None = None,
    temperature=0.0,
    top_k=None,
    top_p=None,
    repetition_penalty=None,
    key=None,
    stop_tokens=(),
    implementation: str | None = None,
) -> tuple[Generation, State]:
    """Generates up to num_tokens more tokens for every user of a state, and the state after them.

    Small num_tokens stream; arguments as for `generate`. A state without room for them grows first. Under the caller's
    `jit`, where lengths are unknown, room cannot be checked: give `prefill` enough `capacity`, or a user whose room is
    used up ends there, with fewer tokens and nothing overwritten.
    """
    check_model(params, tree)
    num_tokens = check_whole("the number of tokens to generate", num_tokens, 1)
    sampling = sampling_of(temperature, top_k, top_p, key, stop_tokens, repetition_penalty)
    check_users(sampling, state.lengths.shape[0])
    options = {"sparsity": sparsity, "estimate": estimate, "implementation": implementation}
    reading = reading_of(tree, **options)
    check_reading(reading, state.lengths.shape[0])
    state = _with_room(state, num_tokens)
    steps = buckets.round_up(num_tokens, buckets.ANSWER)
    limit, in_room = on_device(num_tokens, jnp.int32), buckets.in_room(tree, reading.implementation)
    found, state = _decode(params, in_room, state, reading, sampling, steps, limit)
    found = dataclasses.replace(found, fell_back=fell_back(tree, len(found.lengths), **options))
    return _first_tokens(found, num_tokens), state


def _generate(params, tree, tokens, lengths, reading: Reading, sampling: Sampling, max_new_tokens: int):
    """Both kinds of generate, after it is known how they read."""
    check_model(params, tree)
    tokens = check_tokens(tokens, params.config.vocab_size)
    lengths = check_lengths(lengths, *tokens.shape)
    sharding.check_users(tree, tokens.shape[0])
    max_new_tokens = check_whole("max_new_tokens, the number of tokens to generate,", max_new_tokens, 1)
    check_users(sampling, tokens.shape[0])
    check_reading(reading, tokens.shape[0])
    tokens = on_device(buckets.pad_tokens(tokens), jnp.int32)
    steps = buckets.round_up(max_new_tokens, buckets.ANSWER)
    check_state_fits(params, tree, tokens.shape[0], tokens.shape[1] + steps)
    limit, tree = on_device(max_new_tokens, jnp.int32), buckets.in_room(tree, reading.implementation)
    found = _prefill_and_decode(params, tree, tokens, lengths, reading, sampling, steps, limit)
    return _first_tokens(found, max_new_tokens)


def _first_tokens(found: Generation, num_tokens: int) -> Generation:
    """What was generated, without the columns that its bucket has beyond num_tokens."""
    if found.tokens.shape[1] == num_tokens:
        return found
    columns = {name: getattr(found, name) for name in ("tokens", "log_probabilities")}
    return dataclasses.replace(found, **buckets.cut_columns(columns, num_tokens))


@functools.partial(jax.jit, static_argnames="num_tokens")
def _prefill_and_decode(params, tree, tokens, lengths, reading, sampling, num_tokens, limit) -> Generation:
    state = empty_state(params, tree, tokens.shape[0], tokens.shape[1] + num_tokens)
    state = _prefill(params, tree, state, tokens, lengths, reading)
    return _decode(params, tree, state, reading, sampling, num_tokens, limit)[0]


@jax.jit
def _prefill(params, tree, state: State, tokens, lengths, reading: Reading) -> State:
    """Reads tokens i32[B T], lengths i32[B] of them real, after what the state holds."""
    tree = prepared(tree, reading)
    with jax.named_scope("prefill"):
        x, cache, (kept, _) = forward(params, tree, state, tokens, lengths, reading)
        last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)  # [B 1 D]
        logits = params.unembed(last)[:, 0]
    # Tokens that found no room (only under a caller's jit) were dropped, and must not count later, when there is some.
    total = jnp.minimum(state.lengths + lengths, state.room)
    said = _write_tokens(tree, state, tokens, lengths)
    return State(*cache, lengths=total, logits=logits, kept_fraction=kept, tokens=said)


def read_one(params, tree: Tree, state: State, tokens, reading: Reading) -> State:
    """The state after one more token a user, i32[B], for which it has room: `decode` where somebody else draws."""
    tree = buckets.in_room(tree, reading.implementation)
    return _prefill(params, tree, state, tokens[:, None], on_device(np.ones(len(tokens)), jnp.int32), reading)


@jax.jit
def draw(state: State, sampling: Sampling, step) -> jax.Array:
    """Token `step` of the users' replies, i32[B], after what the state holds: what `decode` would draw then."""
    said = None if sampling.repetition_penalty is None else _tokens_of(state)
    return sample(penalized(state.logits, said, sampling.repetition_penalty), sampling, sampling.key, step)


class _Loop(NamedTuple):
    """What one decode step hands to the next."""

    step: jax.Array  # i32[]
    state: State
    tokens: jax.Array  # i32[B n]
    log_probabilities: jax.Array  # f32[B n]
    newest: jax.Array  # i32[B], the token generated last
    active: jax.Array  # bool[B], not stopped
    lengths: jax.Array  # i32[B], tokens generated
    kept: jax.Array  # f32[B], sum of kept fractions over steps
    missed: jax.Array | None  # f32[B], sum of missed masses over steps; None where nothing is estimated
    said: jax.Array | None  # bool[B V], tokens that the state holds; None where no repetition is penalised


@functools.partial(jax.jit, static_argnames="num_tokens")
def _decode(params, tree, state: State, reading: Reading, sampling: Sampling, num_tokens: int, limit):
    """Up to limit i32[] of num_tokens tokens a user; the loop ends early when every user has stopped."""
    tree = prepared(tree, reading)
    B = state.lengths.shape[0]

    def step(loop: _Loop) -> _Loop:
        state = loop.state
        active = loop.active & (state.lengths < state.room)
        logits = penalized(state.logits, loop.said, sampling.repetition_penalty)
        token = jnp.where(active, sample(logits, sampling, sampling.key, loop.step), loop.newest)
        count = active.astype(jnp.int32)
        x, cache, shares = forward(params, tree, state, token[:, None], count, reading)
        add = lambda total, share: total + jnp.where(active, share, 0.0)
        kept, missed = jax.tree.map(add, (loop.kept, loop.missed), shares)
        logits = jnp.where(active[:, None], params.unembed(x)[:, 0], state.logits)
        stopped = jnp.any(token[:, None] == sampling.stop_tokens, axis=1)
        return _Loop(
            step=loop.step + 1,
            state=State(
                *cache,
                lengths=state.lengths + count,
                logits=logits,
                kept_fraction=state.kept_fraction,
                tokens=_write_tokens(tree, state, token[:, None], count),
            ),
            tokens=loop.tokens.at[:, loop.step].set(token),
            log_probabilities=loop.log_probabilities.at[:, loop.step].set(
                jnp.where(active, log_probability(state.logits, token), 0.0)
            ),
            newest=token,
            active=active & ~stopped,
            lengths=loop.lengths + count,
            kept=kept,
            missed=missed,
            said=None if loop.said is None else loop.said | _one_hot(token, logits.shape[1]),
        )

    zeros = jnp.zeros(B, jnp.int32)
    start = _Loop(
        step=jnp.int32(0),
        state=state,
        tokens=jnp.zeros((B, num_tokens), jnp.int32),
        log_probabilities=jnp.zeros((B, num_tokens), jnp.float32),
        newest=zeros,
        active=jnp.ones(B, bool),
        lengths=zeros,
        kept=jnp.zeros(B, jnp.float32),
        missed=jnp.zeros(B, jnp.float32) if reading.estimates else None,
        said=None if sampling.repetition_penalty is None else _tokens_of(state),
    )
    with jax.named_scope("decode"):
        loop = jax.lax.while_loop(lambda loop: (loop.step < limit) & jnp.any(loop.active), step, start)
    steps = jnp.maximum(loop.lengths, 1).astype(jnp.float32)
    done = Generation(
        # Steps that never ran are padding too: every user repeats its stop token.
        tokens=jnp.where(jnp.arange(num_tokens)[None, :] < loop.step, loop.tokens, loop.newest[:, None]),
        lengths=loop.lengths,
        log_probabilities=loop.log_probabilities,
        kept_fraction=loop.kept / steps,
        prefill_kept_fraction=state.kept_fraction,
        missed_mass=None if loop.missed is None else loop.missed / steps,
    )
    return done, loop.state


def forward(params, tree: Tree, state: State, tokens, counts, reading: Reading, observe=None):
    """All layers over tokens i32[B T], the first counts i32[B] of them real, which follow what the state holds.

    The tree has `local_numbers`. Gives x [B T D], the cache (keys, values [L B T' K H]) with the real tokens written,
    and (kept fraction f32[B], missed mass f32[B] or None). An observer, `observe = (start, see)`, sees every layer's
    reading: seen = see(seen, layer, q [B T N H], LayerOutput) from `start` on, and what was seen last comes fourth.
    """
    B, T = tokens.shape
    token = jnp.arange(T)[None, :]
    row = state.lengths[:, None] + token
    # Padding is written past the end of the cache, where the scatter drops it.
    slot = jnp.where(token < counts[:, None], row, state.room)
    start, end = state.lengths, state.lengths + counts  # out here, since XLA would add them again for every layer

    seen, see = observe or (None, lambda seen, *_: seen)

    def attend(carry, layer, q, k, v):
        keys, values, shares, seen = carry
        keys, values = (_write(tree, *pair, layer, slot) for pair in ((keys, k), (values, v)))
        found = attend_user(tree, q, Own(keys[layer], values[layer], start, end), layer, reading)
        shares = jax.tree.map(jnp.add, shares, (found.kept, found.missed))
        return (keys, values, shares, see(seen, layer, q, found)), found.out

    zeros = jnp.zeros(B, jnp.float32)
    shares = zeros, zeros if reading.estimates else None
    x = sharding.constrain(tree, params.embed(tokens), "BTD")
    carry = (state.keys, state.values, shares, seen)
    x, (keys, values, shares, seen) = params.run_layers(x, tree.context_length + row, attend, carry)
    found = x, (keys, values), jax.tree.map(lambda share: share / tree.num_layers, shares)
    return found if observe is None else (*found, seen)


def _write(tree: Tree, cache, new, layer, slot):
    """The cache [L B T' K H] with new [B T K H] in the rows slot i32[B T] of one layer."""

    def write_here(cache, new, layer, slot):
        user = jnp.arange(new.shape[0])[:, None]
        return cache.at[layer, user, slot].set(new.astype(cache.dtype), mode="drop")

    mesh = sharding.mesh_of(tree)
    if mesh is None:
        return write_here(cache, new, layer, slot)
    # GSPMD would bring all users' new keys to every device: it cannot know that each writes to its own rows only.
    of_cache, of_new, of_slot = (sharding.spec(mesh, letters) for letters in ("LBTKH", "BTKH", "BT"))
    in_specs = (of_cache, of_new, sharding.spec(mesh, ""), of_slot)
    return sharding.map_shards(write_here, mesh, in_specs, of_cache)(cache, new, layer, slot)


def _write_tokens(tree: Tree, state: State, tokens, counts):
    """The state's tokens i32[B T'] with the first counts i32[B] of tokens i32[B T] after those that it holds."""

    def write_here(said, tokens, lengths, counts):
        user, token = jnp.arange(tokens.shape[0])[:, None], jnp.arange(tokens.shape[1])[None, :]
        # Padding goes past the end, where the scatter drops it.
        slot = jnp.where(token < counts[:, None], lengths[:, None] + token, said.shape[1])
        return said.at[user, slot].set(tokens, mode="drop")

    mesh = sharding.mesh_of(tree)
    arguments = state.tokens, tokens, state.lengths, counts
    if mesh is None:
        return write_here(*arguments)
    by_user, one = sharding.spec(mesh, "BT"), sharding.spec(mesh, "B")
    return sharding.map_shards(write_here, mesh, (by_user, by_user, one, one), by_user)(*arguments)


def _tokens_of(state: State):
    """bool[B V]: the tokens that every user's rows hold."""
    B, V = state.logits.shape
    held = jnp.arange(state.room)[None, :] < state.lengths[:, None]
    user = jnp.arange(B)[:, None]
    return jnp.zeros((B, V), bool).at[user, jnp.where(held, state.tokens, V)].set(True, mode="drop")


def _one_hot(tokens, V: int):
    """bool[B V] of tokens i32[B]."""
    return jnp.arange(V)[None, :] == tokens[:, None]


# Also called from outside programs, where it is `jit` that makes every device hold its share alone; devices are known
# from the arguments, used or not.
@functools.partial(jax.jit, static_argnames=("B", "room"), keep_unused=True)
def empty_state(params, tree: Tree, B: int, room: int) -> State:
    """The state of B users with room tokens each who have said nothing yet."""
    config = params.config
    shape = (config.num_layers, B, room, config.num_kv_heads, config.head_dim)
    state = State(
        keys=jnp.zeros(shape, tree.dtype),
        values=jnp.zeros(shape, tree.dtype),
        lengths=jnp.zeros(B, jnp.int32),
        logits=jnp.zeros((B, config.vocab_size), jnp.float32),
        kept_fraction=jnp.zeros(B, jnp.float32),
        tokens=jnp.zeros((B, room), jnp.int32),
    )
    return sharding.constrain(tree, state)


def _with_room(state: State, num_tokens: int) -> State:
    """The state with at least num_tokens free rows for every user."""
    if isinstance(state.lengths, jax.core.Tracer):
        return state  # lengths are not known: whoever traces decides the capacity
    # NumPy's maximum: JAX's would be traced where a caller's jit closes over the state.
    missing = int(np.asarray(state.lengths).max()) + num_tokens - state.room
    if missing <= 0:
        return state
    rows = buckets.round_up(state.room + missing, buckets.ROOM) - state.room
    return _grow(state, rows)


@functools.partial(jax.jit, static_argnames="rows")  # an eager pad would send its zero to the device
def _grow(state: State, rows: int) -> State:
    """The state with so many more rows of room."""
    widths = {name: [(0, rows if axis == "T" else 0) for axis in axes] for name, axes in State.AXES.items()}
    return State(**{name: jnp.pad(getattr(state, name), width) for name, width in widths.items()})
