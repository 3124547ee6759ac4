"""Shapes that are rounded up by themselves: few programs for any questions, and the same answers as without."""

import collections
import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import squeezejax
from squeezejax import SqueezeConfig, buckets
from squeezejax.offline.build import build_layer, clustering_of, room_for
from squeezejax.pallas_kernels import codes

RNG = np.random.default_rng(3)
CONTEXT = RNG.integers(0, 31, 4 + 40 + 6)
CODED = SqueezeConfig(cluster_fractions=(0.3,), sinks=4, observation_window=6, query_block=3, sparsity=0.6)
PAPER = SqueezeConfig.paper(cluster_fractions=(0.1, 0.3), observation_window=6, query_block=None, sparsity=0.6)


@pytest.fixture(scope="module")
def params():
    return oracle.make_model()


@pytest.fixture(scope="module")
def coded(params):
    return oracle.model_tree(params, CONTEXT, CODED, clusters=(12,))


@pytest.fixture(scope="module")
def paper(params):
    return oracle.model_tree(params, CONTEXT, PAPER, clusters=(4, 12))


def test_the_buckets():
    found = {
        count: buckets.round_up(count, 32) for count in (0, 1, 32, 33, 64, 129, 256, 257, 320, 321, 513, 1000, 1025)
    }
    assert found == {
        **{0: 32, 1: 32, 32: 32, 33: 64, 64: 64, 129: 256, 256: 256},
        **{257: 320, 320: 320, 321: 384, 513: 640, 1000: 1024, 1025: 1280},
    }
    for count in range(257, 20_000, 7):
        assert count <= buckets.round_up(count, 32) <= 1.25 * count
    assert jax.jit(lambda x: x * buckets.round_up(33, 32))(1) == 33


def random_questions(rng, number: int):
    """Arguments of `generate` as users give them: no two alike."""
    for i in range(number):
        tokens = rng.integers(0, 31, rng.integers(1, 65))
        key = (jax.random.key, jax.random.PRNGKey)[i % 2](i)
        options = {"temperature": float(i % 3), "key": key, "sparsity": rng.uniform(-0.1, 1.1)}
        stop_tokens = [(), 3, {5, 6}, np.array([7, 8, 9]), None][i % 5]
        kind = (np.asarray, list, jnp.asarray, lambda x: x[None])[i % 4]
        yield kind(tokens), {"max_new_tokens": int(rng.integers(1, 65)), "stop_tokens": stop_tokens} | options


def names(compiled) -> collections.Counter:
    return collections.Counter(name.removeprefix("jit(").removesuffix(")") for name in compiled)


# Copies of arrays of one size into arrays of another, which take milliseconds to compile.
COPIES = {"cut_columns", "_pad_on_device", "broadcast_in_dim", "convert_element_type", "stage", "_threefry_seed"}


def test_200_questions_compile_two_programs(params, coded):
    rng = np.random.default_rng(0)
    with oracle.count_compilations() as compiled:
        for tokens, options in random_questions(rng, 200):
            found = squeezejax.generate(params, coded, tokens, implementation="xla", **options)
            chex.assert_shape([found.tokens, found.log_probabilities], (1, options["max_new_tokens"]))
    found = names(compiled)
    assert found.pop("_prefill_and_decode") <= 2  # questions of up to 32 tokens, and of up to 64
    assert found.pop("_interpolate", 0) <= 2  # thresholds of a token, and of a block
    assert set(found) <= COPIES | {"_dense_if_cheaper"}


def test_conversations_compile_a_handful_of_programs(params, coded):
    rng = np.random.default_rng(1)
    with oracle.count_compilations() as compiled:
        for _ in range(10):
            state = None
            for tokens, options in random_questions(rng, 3):
                num_tokens, sparsity = options.pop("max_new_tokens"), options["sparsity"]
                how = {"sparsity": sparsity, "implementation": "xla"}
                state = squeezejax.prefill(params, coded, np.atleast_2d(tokens), state=state, **how)
                found, state = squeezejax.decode(params, coded, state, num_tokens, implementation="xla", **options)
                chex.assert_shape(found.tokens, (1, num_tokens))
    found = names(compiled)
    rooms = {256, 320, 384, 448, 512}  # up to 3 · (64 + 64) tokens, and 128 more while a question is read
    assert found.pop("_decode") <= len(rooms)
    assert found.pop("_prefill") <= 2 * len(rooms)
    assert found.pop("_grow", 0) <= 2 * len(rooms)
    assert set(found) <= COPIES | {"_interpolate", "_dense_if_cheaper", "empty_state"}


QUESTIONS = RNG.integers(0, 31, (2, 7)).astype(np.int32)
OPTIONS = {
    "ragged": {"lengths": np.array([3, 7])},
    "sampled": {"temperature": 2.0, "key": jax.random.key(4), "top_k": 20, "stop_tokens": (3, 4, 5)},
    "by their own keys": {"temperature": 2.0, "key": jax.random.split(jax.random.key(5)), "top_p": 0.9},
}


@pytest.mark.parametrize(
    ("tree", "options"), [("coded", "ragged"), ("coded", "sampled"), ("paper", "by their own keys")]
)
def test_answers_are_those_of_the_shapes_as_given(params, tree, options, request):
    """Under the caller's jit nothing is rounded."""
    tree, options = request.getfixturevalue(tree), OPTIONS[options]
    how = {"max_new_tokens": 5, "implementation": "xla"} | options
    found = squeezejax.generate(params, tree, QUESTIONS, **how)
    exact = jax.jit(lambda params, tree, tokens: squeezejax.generate(params, tree, tokens, **how))
    expected = exact(params, tree, QUESTIONS)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    chex.assert_trees_all_equal((found.tokens, found.lengths), (expected.tokens, expected.lengths))
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)
    assert "[2,32]" not in str(exact.lower(params, tree, QUESTIONS).as_text())


def test_draws_do_not_depend_on_the_bucket(params, coded):
    """A longer answer begins like a shorter one of another bucket."""
    ask = lambda n: squeezejax.generate(
        params, coded, QUESTIONS, max_new_tokens=n, temperature=3.0, key=jax.random.key(1), implementation="xla"
    )
    short, long = ask(9).tokens, ask(70).tokens
    np.testing.assert_array_equal(short, long[:, :9])
    assert len(np.unique(short)) > 5


def test_a_state_has_at_least_the_room_asked_for(params, coded):
    room = lambda tokens, **options: squeezejax.prefill(params, coded, tokens, implementation="xla", **options).room
    assert room(QUESTIONS, capacity=2) == 128
    assert jax.jit(lambda tokens: jnp.zeros(room(tokens, capacity=2)))(QUESTIONS).shape == (9,)


def test_a_refusal_speaks_of_the_rows_that_are_allocated(params, coded):
    with pytest.raises(ValueError, match=r"answering 2 users of 1,342,177,312 tokens needs at least"):
        squeezejax.generate(params, coded, QUESTIONS, max_new_tokens=1_100_000_000)


# ---- Contexts


def test_rows_of_a_context():
    found = {count: buckets.round_up_rows(count) for count in (1, 64, 65, 4096, 4097, 131_072, 131_073)}
    assert found == {1: 64, 64: 64, 65: 128, 4096: 4096, 4097: 4224, 131_072: 131_072, 131_073: 135_168}
    for count in range(2049, 20_000, 7):
        assert count <= buckets.round_up_rows(count) <= 1.032 * count


@pytest.mark.parametrize("fractions", [(0.3,), (0.1, 0.3)], ids=["flat", "two levels"])
def test_contexts_of_a_token_more_share_all_programs(params, fractions):
    """From reading to answering, and a second part as well."""
    config = dataclasses.replace(CODED, cluster_fractions=fractions, cluster_segment=40, kmeans_iterations=2)
    rng = np.random.default_rng(2)

    def use(num_tokens: int):
        tree = squeezejax.squeeze(params, rng.integers(0, 31, num_tokens), config)
        assert (tree.num_keys, tree.keys.shape[2]) == (num_tokens - 10, 128)
        grown = squeezejax.append(params, tree, rng.integers(0, 31, num_tokens - 90))
        for of in (tree, grown):
            squeezejax.generate(params, of, QUESTIONS, max_new_tokens=2, implementation="xla")

    use(120)
    with oracle.count_compilations() as compiled:
        for num_tokens in (119, 121, 138):
            use(num_tokens)
    assert set(names(compiled)) <= COPIES


@pytest.mark.parametrize("num_keys", [65, 100, 128])
@pytest.mark.parametrize("fractions", [(0.3,), (0.1, 0.3)], ids=["flat", "two levels"])
def test_room_changes_no_cluster_but_by_chance(fractions, num_keys):
    """All keys in runs of live clusters, as many as without room, whose numbers are those of the keys in them."""
    config = dataclasses.replace(CODED, cluster_fractions=fractions, cluster_segment=50, cache_bits=16)
    clustering = clustering_of(config)
    rows = RNG.normal(size=(2, 2, 160, 8)).astype(np.float32)
    num_rows, real = room_for(4 + num_keys + 6, config, clustering, np.float32)
    layer = build_layer(*rows, config, jax.random.key(0), clustering, num_rows=num_rows, real=real)
    assert num_rows == layer.num_keys == layer.keys.shape[1] == 128
    tokens = np.r_[:4, 4 + num_keys : 10 + num_keys]
    np.testing.assert_array_equal(layer.window_keys, rows[0][:, tokens])
    for head in range(2):
        order = np.asarray(layer.order[head])
        np.testing.assert_array_equal(np.sort(order), np.r_[[-1] * (128 - num_keys), :num_keys])
        live = order >= 0
        for array, of in ((layer.keys, rows[0]), (layer.values, rows[1])):
            np.testing.assert_array_equal(array[head][live], of[head, 4 + order[live]])
            assert not np.any(array[head][~live])
        for level, C in zip(layer.levels, config.num_clusters(num_keys), strict=True):
            counts, starts = np.asarray(level.counts[head]), np.asarray(level.starts[head])
            assert np.sum(counts > 0) == C
            runs = [np.arange(a, a + n) for a, n in zip(starts, counts, strict=True)]
            np.testing.assert_array_equal(np.sort(np.concatenate(runs)), np.flatnonzero(live))
        finest = layer.levels[-1]
        numbers = np.asarray(codes.decode(codes.Codes(finest.codes[head], finest.steps[head]), 8)) + np.asarray(
            finest.offset[head]
        )
        for cluster in np.flatnonzero(finest.counts[head]):
            start, count = int(finest.starts[head, cluster]), int(finest.counts[head, cluster])
            turned = np.asarray(codes.rotate(layer.keys[head, start : start + count]))
            np.testing.assert_allclose(numbers[cluster], turned.mean(axis=0), atol=0.35)
            spread = np.mean((turned - numbers[cluster]) ** 2)
            np.testing.assert_allclose(finest.spreads[head, cluster].astype(np.float32), spread, rtol=0.02, atol=1e-3)


def test_answers_do_not_depend_on_the_room(params):
    """A tree that `squeeze` made, and the same one without its spare rows and clusters."""
    tree = squeezejax.squeeze(params, RNG.integers(0, 31, 110), CODED)
    S, C = tree.num_keys, CODED.num_clusters(100)[0]
    assert (S, tree.keys.shape[2], tree.levels[0].counts.shape[2]) == (100, 128, 38)
    rows = {name: x[:, :, :S] for name, x in tree.row_arrays().items()}
    level = jax.tree.map(lambda x: x[:, :, :C], dataclasses.replace(tree.levels[0], offset=None))
    level = dataclasses.replace(level, offset=tree.levels[0].offset)
    exact = dataclasses.replace(tree, **rows, levels=(level,))
    found = [squeezejax.generate(params, of, QUESTIONS, max_new_tokens=5, implementation="xla") for of in (tree, exact)]
    chex.assert_trees_all_equal(found[0].tokens, found[1].tokens)
    chex.assert_trees_all_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    assert 0.05 < float(found[0].kept_fraction[0]) < 0.95
