"""`squeeze` is a plain dense prefill, then `build_tree` and `calibrate`, whatever the chunks."""

import dataclasses
import hashlib
import itertools
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import squeezejax
from squeezejax import SqueezeConfig, build_tree, calibrate, squeeze

module = sys.modules["squeezejax.offline.squeeze"]  # the package's attribute of that name is the function


@pytest.fixture(scope="module")
def params():
    return oracle.make_model()


def context(length, seed=0):
    return np.random.default_rng([seed, length]).integers(0, 31, length)


@pytest.fixture
def ordered_clusters(monkeypatch):
    """Cuts a head's keys into five clusters in their order, so that what is tested is the prefill alone."""

    def build_layer(keys, values, config, *_, real, **__):
        keys, values = (x[:, : int(real.num_tokens)] for x in (keys, values))
        S = keys.shape[1] - config.observation_window
        labels = np.broadcast_to(np.arange(S) * 5 // S, (1, keys.shape[0], S))
        return build_tree(keys[None], values[None], config, labels=(labels,)).layer(0)

    monkeypatch.setattr(module, "build_layer", build_layer)


FLAT = SqueezeConfig.paper(cluster_fractions=(0.2,), observation_window=6)


@pytest.mark.parametrize(
    ("length", "window"),
    [(511, 6), (512, 6), (513, 6), (1025, 100)],
    ids=["one short of a chunk", "a chunk", "one more", "window over two chunks"],
)
def test_chunked_prefill_equals_a_plain_forward_pass(params, ordered_clusters, length, window):
    """Keys, values, and the window's queries, which show in the thresholds."""
    assert module.CHUNK == 512
    tokens = context(length)
    tree = squeeze(params, tokens, dataclasses.replace(FLAT, observation_window=window))
    q, k, v, _ = oracle.plain_forward(params, tokens)
    S = length - window
    chex.assert_trees_all_close(
        (tree.keys, tree.values, tree.window_keys, tree.window_values),
        (k[:, :, :S], v[:, :, :S], k[:, :, S:], v[:, :, S:]),
        atol=2e-4,
    )
    chex.assert_trees_all_close(tree.thresholds, calibrate(tree, q[:, :, -window:]).thresholds, atol=1e-3)
    other = calibrate(tree, q[:, :, -window - 1 : -1]).thresholds  # the test sees a window that is off by one
    assert np.max(np.abs(tree.thresholds - other)) > 5e-3


def test_without_a_window_the_last_queries_calibrate(params, ordered_clusters):
    tokens = context(130)
    tree = squeeze(params, tokens, dataclasses.replace(FLAT, observation_window=0))
    q, _, _, _ = oracle.plain_forward(params, tokens)
    chex.assert_shape(tree.window_keys, (2, 2, 0, 6))
    chex.assert_trees_all_close(tree.thresholds, calibrate(tree, q[:, :, -100:]).thresholds, atol=1e-3)


CONFIG = SqueezeConfig.paper(cluster_fractions=(0.07, 0.2), observation_window=6)


@pytest.fixture(scope="module")
def squeezed(params):
    """66 tokens: sizes and configuration as in test_tree.py, one compiled program of K-means."""
    return squeeze(params, context(66), CONFIG, key=jax.random.key(3))


def original(tree):
    """keys, values [L K S+W H] in the order of the context."""
    back = np.argsort(tree.order, axis=-1)[..., None]
    pairs = ((tree.keys, tree.window_keys), (tree.values, tree.window_values))
    return [np.concatenate([np.take_along_axis(np.asarray(x), back, 2), window], 2) for x, window in pairs]


def test_squeeze_is_build_tree_and_calibrate_on_a_plain_forward_pass(params, squeezed):
    q, k, v, _ = oracle.plain_forward(params, context(66))
    keys, values = original(squeezed)
    chex.assert_trees_all_close((keys, values), (np.asarray(k), np.asarray(v)), atol=1e-4)
    # From bit-equal keys: K-means may answer to the last bit.
    tree = calibrate(build_tree(keys, values, CONFIG, key=jax.random.key(3)), q[:, :, -6:])
    chex.assert_trees_all_equal((tree.order, tree.keys), (squeezed.order, squeezed.keys))
    chex.assert_trees_all_close(tree.levels, squeezed.levels, rtol=1e-6)
    for p in (0.2, 0.5, 0.9):
        chex.assert_trees_all_close(
            squeezejax.log_thresholds(tree, p), squeezejax.log_thresholds(squeezed, p), atol=1e-3
        )


def test_same_key_same_tree_bit_for_bit(params, squeezed):
    chex.assert_trees_all_equal(squeeze(params, context(66), CONFIG, key=jax.random.key(3)), squeezed)
    assert not np.array_equal(squeeze(params, context(66), CONFIG, key=jax.random.key(4)).order, squeezed.order)


def test_the_tree_knows_its_model_and_its_context(params, squeezed):
    tokens = context(66).astype(np.int32)
    assert bytes(np.asarray(squeezed.context_hash)) == hashlib.sha256(tokens.tobytes()).digest()
    assert squeezed.context_length == 66
    assert squeezed.fingerprint == params.config.fingerprint
    assert squeezed.config == CONFIG


def test_documents_of_one_length_give_trees_of_one_shape(params, squeezed):
    other = squeeze(params, context(66, seed=1), CONFIG)
    chex.assert_trees_all_equal_shapes_and_dtypes(other, squeezed)
    assert jax.tree.structure(other) == jax.tree.structure(squeezed)


def test_progress_rises_to_the_end(params, squeezed):
    seen = []
    tree = squeeze(params, context(66), CONFIG, key=jax.random.key(3), progress=seen.append)
    chex.assert_trees_all_equal(tree, squeezed)
    assert len(seen) > 2
    assert all(a.done <= b.done and a.elapsed <= b.elapsed for a, b in itertools.pairwise(seen))
    assert seen[-1].done == seen[-1].total
    assert seen[-1].remaining == 0
    assert all(0 < p.done <= p.total and p.stage for p in seen)
    spent = seen[-1].seconds
    assert set(spent) == {"prefill", "clustering", "calibration"}
    assert 0 < sum(spent.values()) <= seen[-1].elapsed


def test_memory_is_the_tree_the_hidden_states_and_one_layer(ordered_clusters):
    """What is alive at every report, over what was before: as many layers again as one layer needs, however many."""
    params = oracle.make_model(num_layers=6)
    size = lambda arrays: sum(leaf.nbytes for leaf in jax.tree.leaves(arrays) if isinstance(leaf, jax.Array))
    before, seen = size(jax.live_arrays()), []
    tree = squeeze(params, context(1025), FLAT, progress=lambda _: seen.append(size(jax.live_arrays())))
    hidden = 3 * 512 * 16 * 4  # x [1 T' D] in float32, whole chunks
    assert max(seen) - before <= size(tree) + hidden + 3 * size(tree) / 6
    assert max(seen) - before > size(tree)  # the measure sees the tree


def test_progress_true_draws_a_bar(params, squeezed, capsys):
    squeeze(params, context(66), CONFIG, key=jax.random.key(3), progress=True)
    printed = capsys.readouterr()
    assert "100%" in printed.err
    assert printed.err.endswith("\n")
    assert not printed.out


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "the context is empty"),
        (np.zeros(100, np.int32), "nothing is left to cluster"),
        (np.zeros((2, 200), np.int32), "one context"),
        (np.zeros(200), "integers"),
        (np.full(200, 31), r"\[0, 31\)"),
        (np.full(200, -1), r"\[0, 31\)"),
    ],
)
def test_what_does_not_fit_is_refused(params, tokens, message):
    with pytest.raises(ValueError, match=message):
        squeeze(params, tokens)


def test_a_model_gone_bad_is_refused(params, ordered_clusters):
    bad = jax.tree.map(lambda weight: jnp.full_like(weight, jnp.nan), params)
    with pytest.raises(ValueError, match="keys or values of layer 0 are not finite"):
        squeeze(bad, context(66), FLAT)
