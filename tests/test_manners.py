"""What a demanding user tries: wrong types and values, one key for many, guards against transfers, other registries."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import torch
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

import squeezejax
from squeezejax import Estimate, SqueezeConfig, dense_generate, generate
from squeezejax.arguments import check_context, check_key, check_stop_tokens, check_tokens, check_whole
from squeezejax.online.sampling import check_users, sample, sampling_of
from squeezejax.storage import files as storage

CONFIG = SqueezeConfig(cluster_fractions=(0.1, 0.3), observation_window=4, sparsity=0.6)
QUESTIONS = np.array([[1, 2, 3]] * 3)
NEW = 6


@pytest.fixture(scope="module")
def params():
    return oracle.make_model()


@pytest.fixture(scope="module")
def tree(params):
    return oracle.model_tree(params, np.random.default_rng(0).integers(0, 31, 40), CONFIG, seed=1)


# ---- Wrong values and types

NAN = float("nan")
WRONG = [
    ({"sparsity": NAN}, "sparsity must be a number, got NaN"),
    ({"sparsity": np.float32(NAN)}, "sparsity must be a number, got NaN"),
    ({"sparsity": "0.9"}, "sparsity must be a number, got '0.9'"),
    ({"sparsity": True}, "sparsity must be a number, got True"),
    ({"sparsity": jnp.array(True)}, "sparsity must be a number, got an array of bool"),
    ({"estimate": Estimate(min_mass=NAN)}, r"min_mass must be in \[0, 1\], got NaN"),
    ({"estimate": Estimate(min_mass=-1)}, r"min_mass must be in \[0, 1\], got -1"),
    ({"estimate": Estimate(min_mass=1.5)}, r"min_mass must be in \[0, 1\], got 1.5"),
    ({"estimate": Estimate(min_mass=[0.5, 0.6])}, "min_mass must be one number"),
    ({"top_k": 0}, "top_k must be a whole number of at least 1, got 0"),
    ({"top_k": jnp.int32(0)}, "top_k must be a whole number of at least 1"),
    ({"top_k": 2.5}, "top_k must be a whole number of at least 1"),
    ({"top_p": jnp.float32(0)}, r"top_p must be in \(0, 1\]"),
    ({"top_p": "0.9"}, r"top_p must be in \(0, 1\], got '0.9'"),
    ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
    ({"temperature": [1.0, 2.0], "key": jax.random.key(0)}, "temperature is given for 2 users, and there are 3"),
    ({"temperature": [[1.0]], "key": jax.random.key(0)}, "one a user"),
    ({"temperature": 1.0, "key": 0}, r"key must be a random key, such as jax.random.key\(0\), .*got 0"),
    ({"temperature": 1.0, "key": jax.random.split(jax.random.key(0))}, "key is given for 2 users, and there are 3"),
    ({"stop_tokens": [466.5]}, r"stop_tokens must be token ids \(integers\).*466.5"),
    ({"stop_tokens": "</s>"}, r"stop_tokens must be token ids \(integers\)"),
    ({"stop_tokens": [10**30]}, r"stop_tokens must be token ids \(integers\)"),
    ({"stop_tokens": {"a"}}, r"stop_tokens must be token ids \(integers\)"),
    ({"stop_tokens": [[1], [2]]}, "stop_tokens is given for 2 users, and there are 3"),
    ({"max_new_tokens": 3.0}, r"max_new_tokens, the number of tokens to generate, must be a whole number, got 3.0"),
    ({"max_new_tokens": "3"}, "must be a whole number, got '3'"),
    ({"max_new_tokens": True}, "must be a whole number, got True"),
    ({"max_new_tokens": 2**40}, "must be below 2³¹"),
    ({"max_new_tokens": 10**400}, "must be below 2³¹, got a number of about 400 digits"),
    ({"max_new_tokens": 2**31 - 1}, "answering 3 users of 2,147,483,680 tokens needs at least"),
    ({"lengths": "3"}, "lengths must be integers"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[str(options)[:40] for options, _ in WRONG])
def test_one_sentence_says_what_was_expected(params, tree, options, message):
    with pytest.raises(ValueError, match=message) as error:
        generate(params, tree, QUESTIONS, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"input_ids": [1, 2]}, "give its input_ids"),
        ([[1, 2], [3]], "tokens must be integers"),
        ("hello", "tokens must be integers"),
        ([10**40], "tokens must be integers"),
    ],
)
def test_tokens_of_other_kinds(tokens, message):
    for check in (check_tokens, check_context):
        with pytest.raises(ValueError, match=message):
            check(tokens, 31)


def test_what_simply_works():
    assert check_whole("n", jnp.int32(3)) == check_whole("n", np.int64(3)) == 3
    for none in (None, (), [], set(), np.zeros(0)):
        assert check_stop_tokens(none).shape == (1, 0)
    for stop in ({3, 5}, frozenset((5, 3)), (3, 5), [3, 5], np.array([3, 5]), jnp.array([3, 5]), range(3, 6, 2)):
        np.testing.assert_array_equal(check_stop_tokens(stop), [[3, 5]])
    np.testing.assert_array_equal(check_stop_tokens(7), [[7]])
    raw = jax.random.PRNGKey(4)
    assert check_key(raw) == jax.random.key(4) == check_key(np.asarray(raw))
    with pytest.raises(ValueError, match="known when compiling"):
        jax.jit(lambda n: check_whole("n", n))(3)


@pytest.mark.parametrize("field", ["sparsity", "coarse_margin", "kmeans_tolerance", "cluster_cap"])
@pytest.mark.parametrize("value", ["0.9", True, [1.0]])
def test_configurations_of_other_kinds(field, value):
    with pytest.raises(ValueError, match=f"{field} must be a number"):
        SqueezeConfig(**{field: value})


def test_nan_under_a_trace_keeps_everything(tree):
    log_T = jax.jit(lambda p: squeezejax.log_thresholds(tree, p))(NAN)
    np.testing.assert_array_equal(log_T, np.full(tree.config.num_thresholds, -np.inf))
    np.testing.assert_array_equal(squeezejax.log_thresholds(tree, jnp.float32(NAN)), log_T)


def test_nan_min_mass_under_a_trace_keeps_everything(params, tree):
    q = jax.random.normal(jax.random.key(0), (1, 2, params.config.num_heads, params.config.head_dim))
    k = jnp.zeros((1, 2, params.config.num_kv_heads, params.config.head_dim))
    attend = jax.jit(lambda **how: squeezejax.attend(tree, q, k, k, layer=0, implementation="xla", **how))
    chex.assert_trees_all_close(attend(estimate=Estimate(min_mass=NAN)), attend(sparsity=0.0), atol=1e-5)


def test_traced_sampling_numbers_out_of_range_are_defined():
    """Under a trace top_k < 1 and top_p ≤ 0 or NaN draw the likeliest token; a NaN temperature is greedy."""
    logits = jnp.tile(jnp.array([0.0, 1.0, 0.9]), (200, 1))
    key = jax.random.key(0)
    draw = jax.jit(lambda t, k, p: sample(logits, sampling_of(t, k, p, key, ()), key))
    assert len(np.unique(draw(1.0, 3, 1.0))) == 3
    for t, k, p in [(1.0, 0, 1.0), (1.0, -5, 1.0), (1.0, 3, 0.0), (1.0, 3, -1.0), (1.0, 3, NAN), (NAN, 3, 1.0)]:
        assert np.all(draw(t, k, p) == 1)


@pytest.mark.parametrize("name", ["values", "window_keys"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_trees_of_no_numbers_are_refused(tree, tmp_path, monkeypatch, name, dtype, bad):
    arrays = ("keys", "values", "window_keys", "window_values")
    tree = dataclasses.replace(tree, **{name: getattr(tree, name).astype(dtype) for name in arrays})
    storage.save(tmp_path / "good", tree)
    broken = dataclasses.replace(tree, **{name: getattr(tree, name).at[1, 0, 2, 1].set(bad)})
    with pytest.raises(ValueError, match=f"cannot save this tree: its {name} are not all finite"):
        storage.save(tmp_path / "a", broken)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "check_finite", lambda *_: None)
        storage.save(tmp_path / "a", broken)
    with pytest.raises(squeezejax.TreeFileError, match=f"not a valid squeezejax tree: its {name} are not all finite"):
        storage.load(tmp_path / "a")
    assert storage.load(tmp_path / "good").keys.dtype == dtype


def test_labelled_keys_that_are_no_numbers_are_refused():
    keys = jnp.ones((1, 1, 8, 4))
    config = SqueezeConfig(cluster_fractions=(0.5,), observation_window=0)
    with pytest.raises(ValueError, match="layer 0 are not finite"):
        squeezejax.build_tree(keys, keys.at[0, 0, 1].set(NAN), config, labels=(np.zeros((1, 1, 8), int),))


# ---- A number a user


def test_users_draw_as_alone():
    """With keys [B]: exactly what each draws alone. With one key: what they draw alone with fold_in(key, b)."""
    logits = jax.random.normal(jax.random.key(1), (1, 50))
    keys, one = jax.random.split(jax.random.key(2), 3), jax.random.key(3)
    draw = lambda B, key: sample(jnp.tile(logits, (B, 1)), sampling_of(3.0, None, None, key, ()), key, jnp.int32(7))
    np.testing.assert_array_equal(draw(3, keys), [draw(1, key)[0] for key in keys])
    folded = [jax.random.fold_in(one, b) for b in range(3)]
    np.testing.assert_array_equal(draw(3, one), [draw(1, key)[0] for key in folded])
    assert len(np.unique(draw(3, one))) > 1


def test_answers_in_a_batch_are_those_alone(params, tree):
    keys = jax.random.split(jax.random.key(5), 3)
    ask = lambda tokens, key: generate(params, tree, tokens, key=key, temperature=2.0, max_new_tokens=NEW).tokens
    batch = ask(QUESTIONS, keys)
    np.testing.assert_array_equal(batch, [ask(QUESTIONS[:1], key)[0] for key in keys])
    assert len(np.unique(np.asarray(batch), axis=0)) > 1


def test_sampling_a_user():
    logits = jnp.tile(jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1])), (400, 1))
    users = np.arange(400) // 100
    options = {
        "temperature": np.array([0.0, 1.0, 1.0, 1.0])[users],
        "top_k": np.array([4, 2, 4, 4])[users],
        "top_p": np.array([1.0, 1.0, 0.65, 1.0])[users],
    }
    sampling = sampling_of(**options, key=jax.random.key(0), stop_tokens=())
    check_users(sampling, 400)
    tokens = np.asarray(sample(logits, sampling, sampling.key)).reshape(4, 100)
    assert [len(np.unique(row)) for row in tokens] == [1, 2, 2, 4]


def test_stop_tokens_a_user(params, tree):
    free = np.asarray(dense_generate(params, tree, QUESTIONS, max_new_tokens=NEW).tokens[0])
    stop = [[free[0], -1], [-1, -1], [-1, free[1]]]
    found = dense_generate(params, tree, QUESTIONS, max_new_tokens=NEW, stop_tokens=stop)
    first = lambda token: int(np.argmax(free == token)) + 1
    np.testing.assert_array_equal(found.lengths, [first(free[0]), NEW, first(free[1])])


PAPER = SqueezeConfig.paper(cluster_fractions=(0.1, 0.3), observation_window=4, sparsity=0.6)
DIFFERENT = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
SPARSITIES = np.array([0.0, 0.6, 1.0])


@pytest.mark.parametrize("estimate", [None, Estimate()], ids=["plain", "estimated"])
@pytest.mark.parametrize("query_block", [1, None])  # few rows, which are looked up, and many, which are not
@pytest.mark.parametrize("config", [CONFIG, PAPER], ids=["codes", "paper"])
def test_a_sparsity_a_user(params, config, query_block, estimate):
    config = dataclasses.replace(config, query_block=query_block)
    tree = oracle.model_tree(params, np.random.default_rng(0).integers(0, 31, 40), config, seed=1)
    options = {"max_new_tokens": NEW, "implementation": "xla", "estimate": estimate}
    together = generate(params, tree, DIFFERENT, sparsity=SPARSITIES, **options)
    for user, sparsity in enumerate(SPARSITIES):
        alone = generate(params, tree, np.tile(DIFFERENT[user], (3, 1)), sparsity=sparsity, **options)
        np.testing.assert_array_equal(together.tokens[user], alone.tokens[user])
        for name in ("kept_fraction", "prefill_kept_fraction", *(["missed_mass"] if estimate else [])):
            ours, theirs = getattr(together, name)[user], getattr(alone, name)[user]
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(together.kept_fraction[np.array([0, 2])], [1, 0])
    assert 0.02 < together.kept_fraction[1] < 0.95


def test_attend_and_select_take_a_sparsity_a_user(params, tree):
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(3, 2, params.config.num_heads, params.config.head_dim)), jnp.float32)
    k, v = jnp.asarray(rng.normal(size=(2, 3, 2, params.config.num_kv_heads, params.config.head_dim)), jnp.float32)
    log_T = squeezejax.log_thresholds(tree, SPARSITIES)
    for user, sparsity in enumerate(SPARSITIES):
        np.testing.assert_array_equal(log_T[user], squeezejax.log_thresholds(tree, sparsity))
    attend = lambda *own, **how: squeezejax.attend(tree, *own, layer=0, implementation="xla", **how)
    found = attend(q, k, v, sparsity=SPARSITIES)
    for user, sparsity in enumerate(SPARSITIES):
        alone = attend(*(x[user : user + 1] for x in (q, k, v)), sparsity=sparsity)
        chex.assert_trees_all_close(jax.tree.map(lambda x: x[user][None], found), alone, atol=1e-5)  # noqa: B023
    chex.assert_trees_all_equal(attend(q, k, v, log_thresholds=log_T)[0].shape, found[0].shape)
    with pytest.raises(ValueError, match="sparsity is given for 3 users, and there are 1"):
        squeezejax.select(tree, q[0], layer=0, sparsity=SPARSITIES)


@pytest.mark.parametrize("penalty", [1.7, 0.5, np.array([1.0, 2.5, 1.3])], ids=["1.7", "0.5", "a user"])
def test_repetition_penalty_is_that_of_transformers(params, tree, penalty):
    """Over the user's own tokens, padding left out, and all that was generated, in this call and those before."""
    lengths = np.array([3, 1, 2])
    options = {"implementation": "xla", "repetition_penalty": penalty}
    found = generate(params, tree, DIFFERENT, lengths=lengths, max_new_tokens=NEW, **options)
    said = [list(row[:length]) for row, length in zip(DIFFERENT, lengths, strict=True)]
    state = squeezejax.prefill(params, tree, DIFFERENT, lengths=lengths, implementation="xla")
    for i in range(NEW):
        wanted = [
            RepetitionPenaltyLogitsProcessor(float(np.broadcast_to(penalty, 3)[user]))(
                torch.tensor([said[user]]), torch.tensor(np.array(state.logits[user : user + 1]))
            ).argmax()
            for user in range(3)
        ]
        np.testing.assert_array_equal(found.tokens[:, i], wanted)
        np.testing.assert_allclose(
            found.log_probabilities[:, i], jax.nn.log_softmax(state.logits)[np.arange(3), np.array(wanted)], atol=1e-5
        )
        part, state = squeezejax.decode(params, tree, state, 1, **options)
        np.testing.assert_array_equal(part.tokens[:, 0], wanted)
        said = [[*tokens, int(token)] for tokens, token in zip(said, wanted, strict=True)]
    plain = generate(params, tree, DIFFERENT, lengths=lengths, max_new_tokens=NEW, implementation="xla")
    assert np.any(plain.tokens != found.tokens)
    if np.ndim(penalty):
        np.testing.assert_array_equal(plain.tokens[0], found.tokens[0])


def test_log_probabilities_are_the_models(params, tree):
    """Each of the tokens that were generated, by the logits of a conversation read token by token; 0 after the end."""
    found = generate(params, tree, QUESTIONS[:1], max_new_tokens=4, implementation="xla")
    state = squeezejax.prefill(params, tree, QUESTIONS[:1], implementation="xla")
    for i, token in enumerate(np.asarray(found.tokens[0])):
        expected = jax.nn.log_softmax(state.logits[0])[token]
        np.testing.assert_allclose(found.log_probabilities[0, i], expected, atol=1e-5)
        state = squeezejax.prefill(params, tree, [[token]], state=state, implementation="xla")
    stopped = generate(params, tree, QUESTIONS[:1], max_new_tokens=4, stop_tokens=found.tokens[0, :1])
    np.testing.assert_array_equal(stopped.log_probabilities[0, 1:], 0)
    assert stopped.log_probabilities[0, 0] < 0


# ---- Other people's machinery


def test_generate_under_a_transfer_guard(params, tree):
    tokens, sparsity, key = jnp.asarray(QUESTIONS), jnp.float32(0.5), jax.random.key(0)
    temperature = jnp.float32(1)
    with jax.transfer_guard("disallow"):
        for options in (
            {},
            {"sparsity": sparsity},
            {"key": key, "temperature": temperature, "implementation": "xla"},
        ):
            found = generate(params, tree, tokens, max_new_tokens=NEW, **options)
        state = squeezejax.prefill(params, tree, tokens, capacity=0)
        squeezejax.decode(params, tree, state, 2)
    assert found.tokens.shape == (3, NEW)


WIDE = """
import jax, jax.numpy as jnp, numpy as np, oracle
from squeezejax import SqueezeConfig, generate, squeeze
assert jax.config.jax_enable_x64
params = oracle.make_model()
config = SqueezeConfig(cluster_fractions=(0.1, 0.3), observation_window=4, kmeans_iterations=1)
tree = squeeze(params, np.random.default_rng(0).integers(0, 31, 40), config)
options = {"temperature": 1.0, "key": jax.random.key(0), "top_k": 5, "top_p": 0.9, "stop_tokens": [3]}
found = generate(params, tree, [[1, 2, 3]], max_new_tokens=4, implementation="xla", **options)
generate(params, tree, [[1, 2, 3]], max_new_tokens=4)
for leaf in jax.tree.leaves((tree, found)):
    assert leaf.dtype.itemsize <= 4, leaf.dtype
"""


def test_numbers_of_64_bits():
    env = {**os.environ, "JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.path.dirname(oracle.__file__)}
    done = subprocess.run(
        [sys.executable, "-c", WIDE], env=env, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_flax_serialization_takes_a_tree(tree):
    data = flax.serialization.to_bytes(tree)
    blank = jax.tree.map(jnp.zeros_like, tree)
    restored = flax.serialization.from_bytes(blank, data)
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    chex.assert_trees_all_equal(restored, tree)
    state = flax.serialization.to_state_dict(tree)
    assert set(state) >= {"keys", "levels"}
    assert isinstance(state["levels"]["0"], dict)


ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("where", ["the repository", "its parent"])
@pytest.mark.parametrize("command", [["-c", "import squeezejax"], ["-m", "squeezejax"]])
def test_a_sentence_where_it_is_not_installed(tmp_path, where, command):
    """Without site-packages nothing is installed; a clone is named like the package, as `git clone` does it."""
    (tmp_path / "squeezejax").symlink_to(ROOT)
    cwd = ROOT if where == "the repository" else tmp_path
    done = subprocess.run(
        [sys.executable, "-S", "-E", *command], cwd=cwd, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "run `pip install -e " in done.stderr.splitlines()[-1]


def test_beside_a_clone_the_installed_one_is_found(tmp_path):
    (tmp_path / "squeezejax").symlink_to(ROOT)
    look = "import squeezejax, squeezejax.pallas_kernels as parts; print(squeezejax.__file__, parts.__name__)"
    done = subprocess.run(
        [sys.executable, "-c", look], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.split() == [squeezejax.__file__, "squeezejax.pallas_kernels"], done.stderr
