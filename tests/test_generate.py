"""From a question's tokens to an answer's: generate, its parts, conversations, ragged batches, and how it compiles."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import squeezejax
from squeezejax import SqueezeConfig, dense_generate, log_thresholds, select
from squeezejax.models import logits

# Named, because without a name a cost rule may fall back to dense attention, which small trees would always do.
# Two stop tokens that are none, and one room for every state: shapes, and so compiled programs, are shared.
generate = functools.partial(squeezejax.generate, implementation="xla", stop_tokens=(-1, -1))
decode = functools.partial(squeezejax.decode, implementation="xla", stop_tokens=(-1, -1))
ROOM = 24


def prefill(params, tree, tokens, *, state=None, capacity=None, **options):
    """`squeezejax.prefill` into ROOM rows, or into those of a state."""
    if capacity is None:
        capacity = ROOM - np.shape(tokens)[-1] if state is None else 0
    return squeezejax.prefill(params, tree, tokens, state=state, capacity=capacity, implementation="xla", **options)


S, W, T, NEW = 44, 6, 5, 6
# One query token a selection: then nothing depends on how a conversation is cut into calls.
CONFIG = SqueezeConfig.paper(cluster_fractions=(0.1, 0.3), observation_window=W, query_block=1, sparsity=0.6)
RNG = np.random.default_rng(7)
CONTEXT = RNG.integers(0, 31, S + W)
QUESTIONS = RNG.integers(0, 31, (2, T)).astype(np.int32)


@pytest.fixture(scope="module")
def params():
    return oracle.make_model()


@pytest.fixture(scope="module")
def tree(params):
    return oracle.model_tree(params, CONTEXT, CONFIG)


@pytest.fixture(scope="module")
def answer(params, tree):
    """The squeezed answer at the tree's own sparsity, which most tests compare with."""
    found = generate(params, tree, QUESTIONS, max_new_tokens=NEW)
    assert np.all((found.kept_fraction > 0.02) & (found.kept_fraction < 0.9))
    return found


@functools.cache
def dense_greedy(params_of, *, context=tuple(CONTEXT), new=NEW):
    """Greedy tokens and the logits before the first, by `models.logits` of the whole sequence again and again."""
    params = params_of()
    rows = np.concatenate([np.tile(context, (2, 1)), QUESTIONS, np.zeros((2, new), int)], axis=1)
    start = len(context) + T
    first = np.asarray(logits(params, rows))[:, start - 1]
    for end in range(start, start + new):  # later tokens are there, but causality hides them
        rows[:, end] = np.argmax(logits(params, rows)[:, end - 1], axis=-1)
    return rows[:, start:], first


def test_sparsity_0_is_dense_attention(params, tree):
    tokens, first = dense_greedy(oracle.make_model)
    state = prefill(params, tree, QUESTIONS, sparsity=0.0)
    np.testing.assert_allclose(state.logits, first, atol=1e-4)
    found = generate(params, tree, QUESTIONS, max_new_tokens=NEW, sparsity=0.0)
    np.testing.assert_array_equal(found.tokens, tokens)
    np.testing.assert_array_equal(found.lengths, [NEW, NEW])
    np.testing.assert_allclose([found.kept_fraction, found.prefill_kept_fraction], 1.0)


def test_dense_generate_is_the_baseline(params, tree):
    tokens, _ = dense_greedy(oracle.make_model)
    uncalibrated = dataclasses.replace(tree, thresholds=None, sparsities=None)
    for sparsity in (None, 0.9):
        found = dense_generate(params, uncalibrated, QUESTIONS, max_new_tokens=NEW, sparsity=sparsity)
        np.testing.assert_array_equal(found.tokens, tokens)
        np.testing.assert_allclose([found.kept_fraction, found.prefill_kept_fraction], 1.0)


def test_dense_generate_over_padded_rows(params, tree):
    tokens, _ = dense_greedy(oracle.make_model)
    found = dense_generate(params, oracle.spread_rows(tree), QUESTIONS, max_new_tokens=NEW)
    np.testing.assert_array_equal(found.tokens, tokens)


def by_hand(params, tree, tokens, sparsity):
    """Logits [B V] after tokens [B T] and the kept fraction [B]: layer by layer, by the public attend and select."""
    B, T = tokens.shape
    x, positions = params.embed(tokens), tree.context_length + jnp.tile(jnp.arange(T)[None], (B, 1))
    kept = []
    for i in range(params.config.num_layers):

        def one(q, k, v, layer=i):
            return q, oracle.attend_jit(tree, q, k, v, layer=layer, sparsity=sparsity, implementation="xla")[0]

        x, q = params.apply_layer(params.layer(i), x, positions, one)
        counts = [[select_num(tree, q[b, t][None], i, sparsity) for t in range(T)] for b in range(B)]
        kept.append(np.mean(counts, axis=(1, 2)) / tree.num_keys)
    return params.unembed(x)[:, -1], np.mean(kept, axis=0)


select_num = jax.jit(
    lambda tree, q, layer, p: select(tree, q, layer=layer, log_thresholds=log_thresholds(tree, p)).num_kept(tree)
)


@pytest.mark.parametrize("sparsity", [0.3, 0.8])
def test_prefill_runs_attend_in_every_layer(params, tree, sparsity):
    state = prefill(params, tree, QUESTIONS, sparsity=sparsity)
    expected, kept = by_hand(params, tree, QUESTIONS, jnp.float32(sparsity))
    np.testing.assert_allclose(state.logits, expected, atol=1e-4)
    np.testing.assert_allclose(state.kept_fraction, kept, rtol=1e-5)
    np.testing.assert_array_equal(state.lengths, [T, T])


def test_every_decode_step_is_a_prefill_of_what_came_before(params, tree, answer):
    """With a selection a token, greedy decoding is the prefill of the question and the answer so far."""
    whole = np.concatenate([QUESTIONS, answer.tokens], axis=1)
    for end in range(T, T + NEW):
        lengths = np.full(2, end, np.int32)
        state = prefill(params, tree, whole, lengths=lengths)
        np.testing.assert_array_equal(np.argmax(state.logits, axis=-1), answer.tokens[:, end - T])


def test_kept_fraction_is_the_mean_over_decode_steps(params, tree, answer):
    whole = np.concatenate([QUESTIONS, answer.tokens], axis=1)
    question = prefill(params, tree, QUESTIONS)
    everything = prefill(params, tree, whole)
    decoded = ((T + NEW) * everything.kept_fraction - T * question.kept_fraction) / NEW
    np.testing.assert_allclose(answer.kept_fraction, decoded, rtol=1e-4)
    np.testing.assert_allclose(answer.prefill_kept_fraction, question.kept_fraction, rtol=1e-6)


@pytest.mark.parametrize("sparsity", [1.0, 2.0])
def test_sparsity_1_attends_to_window_and_user_tokens_only(params, tree, sparsity):
    found = generate(params, tree, QUESTIONS, max_new_tokens=NEW, sparsity=sparsity)
    np.testing.assert_array_equal([found.kept_fraction, found.prefill_kept_fraction], 0.0)
    blank = dataclasses.replace(tree, keys=tree.keys * 0 + 7, values=tree.values * 0 + 7)
    np.testing.assert_array_equal(
        generate(params, blank, QUESTIONS, max_new_tokens=NEW, sparsity=sparsity).tokens, found.tokens
    )


def test_sparsity_changes_the_answer(params, tree, answer):
    """Or else the tests above would say little."""
    dense, none = (generate(params, tree, QUESTIONS, max_new_tokens=NEW, sparsity=p).tokens for p in (0.0, 1.0))
    assert np.any(dense != none)
    assert np.any(answer.tokens != none)


@pytest.mark.parametrize("query_block", [1, None])
def test_a_question_in_a_ragged_batch_gives_the_tokens_it_gives_alone(params, tree, query_block):
    tree = dataclasses.replace(tree, config=dataclasses.replace(CONFIG, query_block=query_block))
    lengths = np.array([2, 5], np.int32)
    padded = np.where(np.arange(T) < lengths[:, None], QUESTIONS, 9)
    batch = generate(params, tree, padded, max_new_tokens=NEW, lengths=lengths)
    alone = generate(params, tree, QUESTIONS[0, :2], max_new_tokens=NEW)  # one question may leave out the batch
    chex.assert_shape([alone.lengths, alone.kept_fraction, alone.prefill_kept_fraction], (1,))
    full = generate(params, tree, QUESTIONS, max_new_tokens=NEW)
    for user, expected in [(0, jax.tree.map(lambda x: x[0], alone)), (1, jax.tree.map(lambda x: x[1], full))]:
        np.testing.assert_array_equal(batch.tokens[user], expected.tokens)
        np.testing.assert_allclose(batch.kept_fraction[user], expected.kept_fraction, rtol=1e-5)
        np.testing.assert_allclose(batch.prefill_kept_fraction[user], expected.prefill_kept_fraction, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# States
# ---------------------------------------------------------------------------------------------------------------------
def assert_same_state(state, expected):
    """Equal up to room and rounding; rows in use only."""
    np.testing.assert_array_equal(state.lengths, expected.lengths)
    for user, rows in enumerate(np.asarray(expected.lengths)):
        for name in ("keys", "values"):
            one, other = (getattr(s, name)[:, user, :rows] for s in (state, expected))
            np.testing.assert_allclose(one, other, atol=1e-4)
    np.testing.assert_allclose(state.logits, expected.logits, atol=1e-4)


def test_generate_is_prefill_then_decode(params, tree, answer):
    state = prefill(params, tree, QUESTIONS)
    found, after = decode(params, tree, state, NEW)
    np.testing.assert_array_equal(found.tokens, answer.tokens)
    np.testing.assert_array_equal(found.lengths, answer.lengths)
    np.testing.assert_allclose(found.kept_fraction, answer.kept_fraction, rtol=1e-6)
    np.testing.assert_array_equal(after.lengths, [T + NEW, T + NEW])
    assert_same_state(after, prefill(params, tree, np.concatenate([QUESTIONS, answer.tokens], axis=1)))


def test_streaming_is_decode_in_small_steps(params, tree, answer):
    state, streamed = prefill(params, tree, QUESTIONS), []
    for _ in range(NEW):
        part, state = decode(params, tree, state, 1)
        streamed.append(part.tokens)
    np.testing.assert_array_equal(np.concatenate(streamed, axis=1), answer.tokens)
    assert_same_state(state, decode(params, tree, prefill(params, tree, QUESTIONS), NEW)[1])


def test_a_conversation_is_one_question_cut_in_two(params, tree, answer):
    """prefill, then prefill with its state, then decode: as if all had been asked at once."""
    state = prefill(params, tree, QUESTIONS[:, :1])
    state = prefill(params, tree, QUESTIONS[:, 1:], state=state)
    assert_same_state(state, prefill(params, tree, QUESTIONS))
    np.testing.assert_array_equal(decode(params, tree, state, NEW)[0].tokens, answer.tokens)


def test_a_second_turn_follows_the_answer(params, tree):
    """Ragged turns: each user goes on from a length of its own."""
    first, second = np.array([3, 5]), np.array([4, 1])
    said, state = decode(params, tree, prefill(params, tree, QUESTIONS, lengths=first), NEW)
    state = prefill(params, tree, QUESTIONS[:, :4], state=state, lengths=second)
    whole = np.zeros((2, T + NEW + 4), np.int32)
    for user in range(2):
        turns = [QUESTIONS[user, : first[user]], said.tokens[user], QUESTIONS[user, : second[user]]]
        whole[user, : first[user] + NEW + second[user]] = np.concatenate(turns)
    expected = prefill(params, tree, whole, lengths=first + NEW + second)
    assert_same_state(state, expected)
    found, after = (decode(params, tree, s, NEW)[0].tokens for s in (state, expected))
    np.testing.assert_array_equal(found, after)


@pytest.fixture(scope="module")
def narrow(params, tree):
    """A state with room for two more tokens, or four: made under jit, where room is not rounded up."""
    lengths = np.array([T, T - 2])
    return jax.jit(lambda tree: prefill(params, tree, QUESTIONS, capacity=2, lengths=lengths))(tree)


def test_capacity_is_room_for_later_tokens(params, tree, narrow):
    assert narrow.room == T + 2
    np.testing.assert_array_equal(narrow.lengths, [T, T - 2])
    found, after = decode(params, tree, narrow, 2)
    assert after.room == T + 2
    np.testing.assert_array_equal(found.lengths, [2, 2])


def test_a_full_state_grows(params, tree, narrow, answer):
    found, after = decode(params, tree, narrow, NEW)
    np.testing.assert_array_equal(found.tokens[0], answer.tokens[0])
    np.testing.assert_array_equal(after.lengths, [T + NEW, T - 2 + NEW])
    assert after.room >= T + NEW
    chex.assert_trees_all_equal(after.keys[:, 0, :T], narrow.keys[:, 0, :T])


def test_room_that_runs_out_under_jit_ends_the_answer_and_overwrites_nothing(params, tree, narrow, answer):
    program = jax.jit(lambda tree, state: decode(params, tree, state, NEW))
    found, after = program(tree, narrow)
    np.testing.assert_array_equal(found.lengths, [2, 4])
    np.testing.assert_array_equal(found.tokens[0], [*answer.tokens[0, :2], *[answer.tokens[0, 1]] * 4])
    np.testing.assert_array_equal(after.lengths, [T + 2, T + 2])
    for name in ("keys", "values"):
        before, now = (np.asarray(getattr(state, name)) for state in (narrow, after))
        np.testing.assert_array_equal(now[:, 0, :T], before[:, 0, :T])
        np.testing.assert_array_equal(now[:, 1, : T - 2], before[:, 1, : T - 2])
    again, same = program(tree, after)
    np.testing.assert_array_equal(again.lengths, [0, 0])
    chex.assert_trees_all_equal((same.keys, same.values), (after.keys, after.values))


def test_a_prefill_without_room_under_jit_overwrites_nothing(params, tree, narrow):
    after = jax.jit(lambda state: prefill(params, tree, QUESTIONS, state=state))(narrow)
    np.testing.assert_array_equal(after.lengths, [T + 2, T + 2])
    chex.assert_trees_all_equal(after.keys[:, 0, :T], narrow.keys[:, 0, :T])
    chex.assert_trees_all_equal(after.keys[:, 1, : T - 2], narrow.keys[:, 1, : T - 2])


def test_a_state_closed_over_by_jit_is_a_constant(params, tree, answer):
    state = prefill(params, tree, QUESTIONS)
    found = jax.jit(lambda: decode(params, tree, state, NEW)[0])()
    np.testing.assert_array_equal(found.tokens, answer.tokens)


# ---------------------------------------------------------------------------------------------------------------------
# Stop tokens, sampling
# ---------------------------------------------------------------------------------------------------------------------
def stopped(tokens, stops):
    """What `tokens` [n] become with stop tokens: (padded tokens, length)."""
    at = [i for i, token in enumerate(tokens) if token in stops]
    length = at[0] + 1 if at else len(tokens)
    return [*tokens[:length], *[tokens[length - 1]] * (len(tokens) - length)], length


def test_stop_tokens_end_an_answer_and_pad_it(params, tree, answer):
    tokens = np.asarray(answer.tokens).tolist()
    stop_sets = [(tokens[0][2],), (tokens[1][0],), (tokens[0][1], tokens[1][3]), (tokens[0][0], tokens[1][0])]
    for stops in stop_sets:
        found = generate(params, tree, QUESTIONS, max_new_tokens=NEW, stop_tokens=(*stops, -1)[:2])
        expected = [stopped(row, stops) for row in tokens]
        np.testing.assert_array_equal(found.tokens, [row for row, _ in expected])
        np.testing.assert_array_equal(found.lengths, [length for _, length in expected])


def test_kept_fraction_ends_with_the_answer(params, tree, answer):
    stops = (int(answer.tokens[0, 1]),)
    found = generate(params, tree, QUESTIONS, max_new_tokens=NEW, stop_tokens=(*stops, -1))
    state, kept = prefill(params, tree, QUESTIONS), []
    for _ in range(int(found.lengths[0])):
        part, state = decode(params, tree, state, 1)
        kept.append(part.kept_fraction[0])
    np.testing.assert_allclose(found.kept_fraction[0], np.mean(kept), rtol=1e-5)


def test_the_loop_ends_when_everyone_has_stopped(params, tree, answer, monkeypatch):
    steps = []
    module = squeezejax.generate.__globals__
    original = module["sample"]

    def counted(*arguments):
        jax.debug.callback(lambda: steps.append(1))
        return original(*arguments)

    monkeypatch.setitem(module, "sample", counted)
    stops = tuple(int(row[1]) for row in answer.tokens)
    lengths = [stopped(row, stops)[1] for row in np.asarray(answer.tokens).tolist()]
    # More tokens than any other test asks for: a program of its own, or `sample` would not be looked up again.
    found = generate(params, tree, QUESTIONS, max_new_tokens=NEW + 64, stop_tokens=stops)
    jax.block_until_ready(found)
    jax.effects_barrier()
    np.testing.assert_array_equal(found.lengths, lengths)
    assert len(steps) == max(lengths)
    assert np.all(found.tokens[:, max(lengths) - 1 :] == np.asarray(found.tokens)[:, -1:])


def test_a_conversation_goes_on_after_a_stop_token(params, tree, answer):
    """A user that stopped early keeps its place while the others generate."""
    stops = (int(answer.tokens[0, 0]),)
    found, state = decode(params, tree, prefill(params, tree, QUESTIONS), NEW, stop_tokens=(*stops, -1))
    np.testing.assert_array_equal(state.lengths, T + found.lengths)
    went_on, _ = decode(params, tree, state, NEW)
    np.testing.assert_array_equal(went_on.tokens[0, : NEW - 1], answer.tokens[0, 1:])


SAMPLED = {"temperature": 1.5, "top_k": 20, "top_p": 0.9}


def test_sampling_repeats_for_a_key(params, tree):
    ask = lambda seed: generate(params, tree, QUESTIONS, max_new_tokens=NEW, key=jax.random.key(seed), **SAMPLED)
    chex.assert_trees_all_equal(ask(1), ask(1))
    assert np.any(ask(1).tokens != ask(2).tokens)


def test_top_k_of_1_is_greedy_at_any_temperature(params, tree, answer):
    found = generate(params, tree, QUESTIONS, max_new_tokens=NEW, key=jax.random.key(1), **SAMPLED | {"top_k": 1})
    np.testing.assert_array_equal(found.tokens, answer.tokens)


# ---------------------------------------------------------------------------------------------------------------------
# One program
# ---------------------------------------------------------------------------------------------------------------------
def test_generate_under_the_callers_jit_compiles_once(params, tree, answer):
    """Tree, tokens, lengths, sparsity, temperature and key are arguments: none of them compiles anything again."""

    @jax.jit
    def ask(params, tree, tokens, lengths, p, temperature, key):
        options = {"sparsity": p, "temperature": temperature, "key": key}
        return generate(params, tree, tokens, max_new_tokens=NEW, lengths=lengths, **options)

    other = oracle.model_tree(params, CONTEXT[::-1].copy(), CONFIG, seed=1)
    full, key = jnp.full(2, T, jnp.int32), jax.random.key(0)
    other_questions = QUESTIONS[::-1].copy()
    np.testing.assert_array_equal(ask(params, tree, QUESTIONS, full, 0.6, 0.0, key).tokens, answer.tokens)
    for a_tree, p, temperature in [(tree, 0.0, 0.0), (tree, 1.5, 1.0), (other, 0.6, 0.0), (other, -1.0, 2.0)]:
        found = ask(params, a_tree, other_questions, full - 1, p, temperature, key)
        options = {"lengths": full - 1, "sparsity": p, "temperature": temperature, "key": key}
        expected = generate(params, a_tree, other_questions, max_new_tokens=NEW, **options)
        np.testing.assert_array_equal(found.tokens, expected.tokens)
    assert ask._cache_size() == 1


def test_calls_outside_jit_compile_once_per_shape(params, tree):
    other = oracle.model_tree(params, CONTEXT[::-1].copy(), CONFIG, seed=2)
    ask = lambda tree, **options: jax.block_until_ready(
        generate(params, tree, QUESTIONS, max_new_tokens=NEW, **options)
    )
    ask(tree, sparsity=0.3, temperature=1.0, key=jax.random.key(0))
    with oracle.count_compilations() as compiled:
        ask(tree, sparsity=0.7, temperature=0.5, key=jax.random.key(1))
        ask(other, sparsity=0.2, temperature=0.0)
    assert not compiled


def test_no_host_sync(params, tree, answer):
    """Neither a read of a device value around the program, nor a callback within."""
    tokens = jnp.asarray(QUESTIONS)
    sparsity = jnp.float32(0.6)
    with oracle.no_host_sync():
        found = generate(params, tree, tokens, max_new_tokens=NEW, sparsity=sparsity)
        dense_generate(params, tree, tokens, max_new_tokens=NEW)
        with pytest.raises(AssertionError, match="host read"):
            int(found.lengths[0])
    np.testing.assert_array_equal(found.tokens, answer.tokens)
    program = jax.make_jaxpr(lambda tree: generate(params, tree, tokens, max_new_tokens=NEW))(tree)
    assert "callback" not in str(program)


def test_generation_repeats_bit_for_bit(params, tree, answer):
    chex.assert_trees_all_equal(generate(params, tree, QUESTIONS, max_new_tokens=NEW), answer)


def test_a_decode_copies_no_layer_of_keys(params, tree):
    """Temporaries of the compiled loop stay far below one layer's keys, let alone the tree's."""
    rows = 65536
    shape_of = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    resize = lambda x: jax.ShapeDtypeStruct((*x.shape[:2], rows, *x.shape[3:]), x.dtype)
    small = jax.tree.map(shape_of, tree)
    large = dataclasses.replace(
        small, keys=resize(small.keys), values=resize(small.values), order=resize(small.order), num_keys=rows
    )
    state = jax.tree.map(shape_of, prefill(params, tree, QUESTIONS))
    for program in (
        jax.jit(lambda tree, state: decode(params, tree, state, NEW)),
        jax.jit(lambda tree, state: dense_generate(params, tree, QUESTIONS, max_new_tokens=NEW)),
    ):
        memory = program.lower(large, state).compile().memory_analysis()
        assert memory.temp_size_in_bytes < np.prod(large.keys.shape[1:]) * 4 / 3


# ---------------------------------------------------------------------------------------------------------------------
# Sizes and arguments
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("sizes", "window"),
    [
        ({"num_layers": 1, "num_heads": 5, "num_kv_heads": 5, "head_dim": 34}, 1),
        ({"num_layers": 3, "num_heads": 8, "num_kv_heads": 1, "head_dim": 2}, 0),
    ],
    ids=["heads > layers, no groups, window of one", "a group of 8, no window"],
)
def test_other_models_and_windows_reproduce_dense_attention(sizes, window):
    """Also with user input longer than the context."""
    make = functools.partial(oracle.make_model, **sizes)
    params, context = make(), CONTEXT[: 3 + window]
    config = SqueezeConfig.paper(cluster_fractions=(0.5,), observation_window=window)
    tree = oracle.model_tree(params, context, config, clusters=(2,))
    tokens, _ = dense_greedy(make, context=tuple(context), new=3)
    np.testing.assert_array_equal(generate(params, tree, QUESTIONS, max_new_tokens=3, sparsity=0).tokens, tokens)


def test_bfloat16_model():
    """Float32 and bfloat16 weights of one model, over a bfloat16 tree: close logits at sparsity 0."""
    low = oracle.make_model(sharpness=1.0, dtype=jnp.bfloat16)
    high = jax.tree.map(lambda weight: weight.astype(jnp.float32), low)
    low_tree, high_tree = (oracle.model_tree(params, CONTEXT, CONFIG) for params in (low, high))
    chex.assert_type(low_tree.keys, jnp.bfloat16)
    state = prefill(low, low_tree, QUESTIONS, sparsity=0.0)
    chex.assert_type([state.keys, state.logits], [jnp.bfloat16, jnp.float32])
    expected = prefill(high, high_tree, QUESTIONS, sparsity=0.0).logits
    spread = float(jnp.std(expected))
    np.testing.assert_allclose(state.logits, expected, atol=0.15 * spread)
    mixed = prefill(high, low_tree, QUESTIONS, sparsity=0.0)  # a tree saved in bfloat16, a model loaded in float32
    np.testing.assert_allclose(mixed.logits, expected, atol=0.15 * spread)


def test_trees_of_other_models_are_refused(params, tree):
    for sizes in ({"num_layers": 3}, {"num_kv_heads": 4}, {"head_dim": 8}):
        with pytest.raises(ValueError, match="another model"):
            generate(oracle.make_model(**sizes), tree, QUESTIONS)
    named = oracle.make_model(fingerprint="aaaa")
    for call in (generate, dense_generate, prefill):
        with pytest.raises(ValueError, match=r"another model .*bbbb.* aaaa.*squeezejax\.squeeze"):
            call(named, dataclasses.replace(tree, fingerprint="bbbb"), QUESTIONS)


def test_uncalibrated_trees_are_refused(params, tree):
    bare = dataclasses.replace(tree, thresholds=None, sparsities=None)
    for call in (generate, prefill):
        with pytest.raises(ValueError, match=r"squeezejax\.calibrate"):
            call(params, bare, QUESTIONS)


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([], {}, "no user tokens"),
        (np.zeros((2, 0), np.int32), {}, "no user tokens"),
        (QUESTIONS.astype(np.float32), {}, "integers"),
        (QUESTIONS + 31, {}, r"\[0, 31\)"),
        (QUESTIONS, {"lengths": [0, 3]}, "lengths"),
        (QUESTIONS, {"lengths": [3]}, "lengths"),
        (QUESTIONS, {"max_new_tokens": 0}, "at least 1"),
        (QUESTIONS, {"temperature": 0.7}, "give a key"),
        (QUESTIONS, {"top_k": 0}, "top_k"),
        (QUESTIONS, {"top_p": 2.0}, "top_p"),
        (QUESTIONS, {"sparsity": [0.5, 0.6, 0.7]}, "sparsity is given for 3 users, and there are 2"),
        (QUESTIONS, {"sparsity": [[0.5]]}, "one number"),
        (QUESTIONS, {"repetition_penalty": 0.0}, "repetition_penalty must be a number above 0"),
        (QUESTIONS, {"repetition_penalty": [1.0, 1.0, 1.0]}, "repetition_penalty is given for 3 users"),
        (QUESTIONS, {"implementation": "triton"}, "'xla', 'wide', 'mosaic'"),
    ],
)
def test_bad_arguments_are_refused(params, tree, tokens, options, message):
    with pytest.raises(ValueError, match=message):
        generate(params, tree, tokens, **options)


def test_bad_states_are_refused(params, tree):
    state = prefill(params, tree, QUESTIONS)
    with pytest.raises(ValueError, match="2 users"):
        prefill(params, tree, QUESTIONS[:1], state=state)
    with pytest.raises(ValueError, match="capacity"):
        prefill(params, tree, QUESTIONS, capacity=-1)
    with pytest.raises(ValueError, match="at least 1"):
        decode(params, tree, state, 0)
    other = oracle.make_model(num_layers=3)
    with pytest.raises(ValueError, match="another model"):
        decode(other, tree, state, 1)


def test_without_a_named_implementation_answers_are_squeezed_or_dense(params, tree, answer):
    found = squeezejax.generate(params, tree, QUESTIONS, max_new_tokens=NEW, stop_tokens=(-1, -1))
    dense = dense_generate(params, tree, QUESTIONS, max_new_tokens=NEW)
    expected = dense if np.all(found.kept_fraction == 1) else answer
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.prefill_kept_fraction, expected.prefill_kept_fraction, rtol=1e-6)


# ---- The default index


@pytest.fixture(scope="module")
def coded(params):
    """A tree with sinks, clusters in 4 bits and keys in 2; blocks of query tokens."""
    config = SqueezeConfig(cluster_fractions=(0.3,), sinks=4, observation_window=W, query_block=3, sparsity=0.6)
    return oracle.model_tree(params, RNG.integers(0, 31, 4 + S + W), config, clusters=(14,))


def test_default_index_answers_users_as_if_alone(params, coded):
    """Ragged users, in parts, at any sparsity without compiling again; and at 0 the tokens of dense attention."""
    lengths = np.array([T, 3], np.int32)
    answer_all = jax.jit(
        lambda tokens, lengths, sparsity: generate(
            params, coded, tokens, lengths=lengths, sparsity=sparsity, max_new_tokens=NEW
        )
    )
    both = answer_all(QUESTIONS, lengths, np.float32(0.6))
    assert np.all((both.kept_fraction > 0.05) & (both.kept_fraction < 0.9))
    state = prefill(params, coded, QUESTIONS, lengths=lengths, sparsity=0.6)
    parts, _ = decode(params, coded, state, NEW, sparsity=0.6)
    np.testing.assert_array_equal(parts.tokens, both.tokens)
    alone = generate(params, coded, QUESTIONS[1:, :3], max_new_tokens=NEW, sparsity=0.6)
    np.testing.assert_array_equal(alone.tokens[0], both.tokens[1])
    np.testing.assert_allclose(alone.kept_fraction[0], both.kept_fraction[1], rtol=1e-5)
    np.testing.assert_allclose(alone.prefill_kept_fraction[0], both.prefill_kept_fraction[1], rtol=1e-5)
    with oracle.count_compilations() as compiled:
        every, none = (answer_all(QUESTIONS, lengths, np.float32(sparsity)) for sparsity in (0, 1))
        unknown = answer_all(QUESTIONS, lengths, np.float32(np.nan))
    assert not compiled
    assert np.all(every.kept_fraction == 1)
    assert np.all(none.kept_fraction == 0)
    np.testing.assert_array_equal(unknown.tokens, every.tokens)
    dense = dense_generate(params, coded, QUESTIONS, lengths=lengths, max_new_tokens=NEW, implementation="xla")
    np.testing.assert_array_equal(every.tokens, dense.tokens)


def test_default_index_says_what_it_missed(params, coded):
    plain = generate(params, coded, QUESTIONS, max_new_tokens=NEW)
    measured = generate(params, coded, QUESTIONS, max_new_tokens=NEW, estimate=squeezejax.Estimate())
    np.testing.assert_array_equal(measured.tokens, plain.tokens)
    assert np.all((measured.missed_mass > 0.005) & (measured.missed_mass < 0.9))
