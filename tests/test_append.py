"""`append` gives the tree that its parts make: old clusters as they were, new ones beside them, thresholds anew."""

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
from squeezejax import SqueezeConfig, append, build_tree, calibrate, squeeze

W = 6
# One step of K-means: what it finds is not tested here, and compiles sooner.
FLAT = SqueezeConfig.paper(cluster_fractions=(0.2,), observation_window=W, kmeans_iterations=1)
DEEP = dataclasses.replace(FLAT, cluster_fractions=(0.07, 0.2))
KEY = jax.random.key(3)
# 60 keys are clustered each time, so that one program of K-means serves all.
TOKENS = np.random.default_rng(0).integers(0, 31, 66 + 60 + 3)
FIRST, SECOND, THIRD = TOKENS[:66], TOKENS[66:126], TOKENS[126:]


CASES = {"float32, two levels": (jnp.float32, DEEP), "bfloat16, flat": (jnp.bfloat16, FLAT)}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def case(request):
    """(params, trees: of the first part, of two, and of all three, the last shorter than the window)."""
    dtype, config = request.param
    params = oracle.make_model(dtype=dtype)
    trees = [squeeze(params, FIRST, config)]
    trees.append(append(params, trees[-1], SECOND, key=KEY))
    trees.append(append(params, trees[-1], THIRD))
    return params, trees


def original(tree):
    """keys, values [L K S+W H] in the order of the context."""
    rows = np.argsort(np.where(tree.order < 0, tree.num_keys, tree.order), axis=-1)[..., : tree.num_keys, None]
    pairs = ((tree.keys, tree.window_keys), (tree.values, tree.window_values))
    return [jnp.concatenate([jnp.take_along_axis(x, rows, 2), window], 2) for x, window in pairs]


def labels_of(tree):
    """The labels with which `build_tree` makes this tree."""
    fine = tree.levels[-1]
    of_row = np.zeros(tree.order.shape, int)
    found = np.zeros((*tree.order.shape[:2], tree.num_keys), int)
    for at in np.ndindex(fine.counts.shape):
        start = int(fine.starts[at])
        of_row[at[:2]][start : start + int(fine.counts[at])] = at[2]
    for at in np.ndindex(tree.order.shape[:2]):
        live = np.asarray(tree.order[at]) >= 0
        found[at][np.asarray(tree.order[at])[live]] = of_row[at][live]
    return [*(np.asarray(level.parents) for level in tree.levels[1:]), found]


def test_the_result_is_the_tree_of_its_parts(case):
    """Old clusters, and what K-means finds in the old window and the new keys, given to `build_tree` as labels."""
    params, (first, second, _) = case
    keys, values = original(second)
    part = build_tree(keys[:, :, 60:], values[:, :, 60:], first.config, key=KEY)
    shift = [level.counts.shape[2] for level in first.levels]
    labels = tuple(
        np.concatenate([a, b + more], axis=2)
        for a, b, more in zip(labels_of(first), labels_of(part), shift, strict=True)
    )
    expected = build_tree(keys, values, first.config, labels=labels)
    found = dataclasses.replace(second, fingerprint=None, context_hash=None, thresholds=None, sparsities=None)
    levels = [[dataclasses.replace(level, centroids=None) for level in tree.levels] for tree in (found, expected)]
    chex.assert_trees_all_equal(*levels)
    for a, b in zip(found.levels, expected.levels, strict=True):
        chex.assert_trees_all_close(a.centroids, b.centroids, atol=1e-6)
    bare = [dataclasses.replace(tree, levels=()) for tree in (found, expected)]
    assert jax.tree.structure(bare[0]) == jax.tree.structure(bare[1])
    chex.assert_trees_all_equal(*bare)
    q, *_ = oracle.plain_forward(params, TOKENS[:126])
    atol = 1e-3 if keys.dtype == jnp.float32 else 0.3
    chex.assert_trees_all_close(second.thresholds, calibrate(expected, q[:, :, -W:]).thresholds, atol=atol)


def test_new_clusters_lie_on_granules_too():
    """60 old keys end inside a granule of 8 rows: the next border is at 64, whatever K-means finds."""
    params = oracle.make_model()
    config = dataclasses.replace(FLAT, cluster_granule=8)
    tree = append(params, oracle.model_tree(params, FIRST, config, clusters=(12,)), SECOND)
    fine = tree.levels[0]
    starts, live = np.asarray(fine.starts)[..., 12:], np.asarray(fine.counts)[..., 12:] > 0
    assert np.all((starts % 8 == 0) | (starts == 60) | ~live)
    assert np.sum(fine.counts[..., 12:]) == 60 * 4


def test_the_old_part_stays_as_it_is(case):
    _, trees = case
    for before, after in itertools.pairwise(trees):
        S = before.num_keys
        chex.assert_trees_all_equal(after.keys[:, :, :S], before.keys[:, :, :S])
        for a, b in zip(after.levels, before.levels, strict=True):
            C = b.counts.shape[2]
            chex.assert_trees_all_equal(jax.tree.map(lambda leaf, C=C: leaf[:, :, :C], a), b)


def test_questions_see_all_parts(case):
    """Keys and values are those of one pass over everything; with all of them kept, so are the logits of a question."""
    params, (*_, tree) = case
    question = np.array([5, 11, 7])
    _, k, v, logits = oracle.plain_forward(params, np.concatenate([TOKENS, question]))
    exact = tree.keys.dtype == jnp.float32
    for found, expected in zip(original(tree), (k, v), strict=True):
        np.testing.assert_allclose(np.float32(found), np.float32(expected[:, :, :-3]), atol=1e-4 if exact else 0.1)
    state = squeezejax.prefill(params, tree, question, sparsity=0.0)
    np.testing.assert_allclose(state.logits[0], logits[-1], atol=1e-3 if exact else 0.5)


def test_selection_and_attention_over_the_parts_equal_the_oracle(case):
    """Masks over the keys of all parts in their order, and attention to exactly those, the window and the user."""
    _, trees = case
    if trees[0].keys.dtype != jnp.float32:
        pytest.skip("rounding to bfloat16 moves scores across thresholds")
    tree = trees[2]
    keys, values = map(np.asarray, original(tree))
    whole = oracle.Case(keys, values, tuple(labels_of(tree)), np.zeros(0), tree.config)
    q, k, v = oracle.user_tokens(whole, T=1)
    for layer in range(2):
        log_T = oracle.cutting_thresholds(whole, layer, q[0], [0.4, 0.7][-len(tree.levels) :])
        mask, gap = whole.key_mask(layer, q[0], log_T)
        assert gap > 1e-4
        assert 0 < mask[:, :60].sum() < 120 > mask[:, 60:].sum() > 0
        np.testing.assert_array_equal(oracle.mask_jit(tree, q[0], layer, log_T), mask)
        out, lse = oracle.attend_jit(tree, q, k, v, layer=layer, log_thresholds=log_T)
        expected = oracle.attend(whole, layer, q[0], k[0], v[0], k.shape[1] - 1, [mask])
        np.testing.assert_allclose(out[0], expected[0], atol=1e-4)
        np.testing.assert_allclose(lse[0], expected[1], atol=1e-4)


def test_marks_of_the_result(case):
    params, trees = case
    ids = [np.asarray(part, np.int32).tobytes() for part in (FIRST, SECOND, THIRD)]
    digest = b""
    for tree, part in zip(trees, ids, strict=True):
        digest = hashlib.sha256(digest + part).digest()
        assert bytes(np.asarray(tree.context_hash)) == digest
        assert (tree.fingerprint, tree.config) == (params.config.fingerprint, trees[0].config)
    assert [tree.num_keys for tree in trees] == [60, 120, 123]
    unknown = dataclasses.replace(trees[0], context_hash=None)
    assert append(params, unknown, SECOND, key=KEY).context_hash is None


def test_padding_is_at_the_end_wherever_it_was(case):
    """bfloat16 heads end with a whole granule: 60 keys in 64 rows, then 120 in 120, then 123 in 128."""
    params, trees = case
    exact = trees[0].keys.dtype == jnp.float32
    for tree, R in zip(trees, [60, 120, 123] if exact else [64, 120, 128], strict=True):
        assert tree.keys.shape[2] == R
        np.testing.assert_array_equal(tree.order < 0, np.broadcast_to(np.arange(R) >= tree.num_keys, tree.order.shape))
        assert not np.any(tree.keys[:, :, tree.num_keys :])
    if exact:
        grown = append(params, oracle.spread_rows(trees[0]), SECOND, key=KEY)
        assert np.all(grown.order >= 0)
        for a, b in zip(labels_of(grown), labels_of(trees[1]), strict=True):
            np.testing.assert_array_equal(a[..., :12], b[..., :12])  # rows in another order, in the same clusters
        for a, b in zip(original(grown), original(trees[1]), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)


def test_saved_trees_can_be_appended_to_and_saved_again(case, tmp_path):
    params, trees = case
    squeezejax.save(tmp_path / "a", trees[0])
    grown = append(params, squeezejax.load(tmp_path / "a", params), SECOND, key=KEY)
    chex.assert_trees_all_equal(grown, trees[1])
    squeezejax.save(tmp_path / "b", grown)
    chex.assert_trees_all_equal(squeezejax.load(tmp_path / "b", params), grown)


def test_progress_and_the_same_key_give_the_give_the_same_tree(case):
    params, trees = case
    seen = []
    chex.assert_trees_all_equal(append(params, trees[0], SECOND, key=KEY, progress=seen.append), trees[1])
    assert seen[-1].done == seen[-1].total
    assert set(seen[-1].seconds) == {"prefill", "clustering", "calibration"}


@pytest.fixture(scope="module", params=[(0.2,), (0.07, 0.2)], ids=["flat", "two levels"])
def coded(request):
    """(params, a tree with sinks and codes, the same with the second part)."""
    params = oracle.make_model()
    config = SqueezeConfig(
        cluster_fractions=request.param,
        sinks=3,
        observation_window=W,
        kmeans_iterations=1,
        kmeans_swap_rounds=0,
        query_block=1,
    )
    first = squeeze(params, FIRST, config)
    return params, first, append(params, first, SECOND, key=KEY)


def test_codes_of_both_parts(coded, tmp_path):
    """Old codes stay; new ones leave out the same mean; sinks stay the first tokens; keys are near their codes."""
    _, first, second = coded
    assert (first.num_keys, second.num_keys, second.context_length) == (57, 117, 126)
    assert second.config == first.config
    for name in ("keys", "key_codes", "key_steps", "order"):
        np.testing.assert_array_equal(getattr(second, name)[:, :, :57], getattr(first, name)[:, :, :57])
    np.testing.assert_array_equal(second.window_keys[:, :, :3], first.window_keys[:, :, :3])
    for old, new in zip(first.levels, second.levels, strict=True):
        np.testing.assert_array_equal(new.offset, old.offset)
        C = old.counts.shape[2]
        for name in ("codes", "steps", "spreads", "counts"):
            np.testing.assert_array_equal(getattr(new, name)[:, :, :C], getattr(old, name))
    for layer, head in np.ndindex(2, 2):
        rounded = oracle.rounded_centroids(second, -1, layer, head)
        packed, steps = (x[layer, head] for x in (second.key_codes, second.key_steps))
        residual = oracle.decode(packed, steps, 2, 6) @ oracle.rotation(6)
        keys = np.float64(second.keys[layer, head])
        for c, rows in enumerate(oracle.CommonScale(second, layer, head).rows_of(len(second.levels) - 1)):
            left = keys[list(rows)] - rounded[c]
            error = np.linalg.norm(left - residual[list(rows)], axis=1)
            assert np.all(error <= 0.6 * np.linalg.norm(left, axis=1) + 1e-6)
    squeezejax.save(tmp_path / "a", second)
    chex.assert_trees_all_equal(squeezejax.load(tmp_path / "a"), second)


def test_questions_over_codes_of_both_parts(coded):
    params, _, tree = coded
    question = np.array([5, 11, 7])
    _, _, _, logits = oracle.plain_forward(params, np.concatenate([TOKENS[:126], question]))
    state = squeezejax.prefill(params, tree, question, sparsity=0.0)
    np.testing.assert_allclose(state.logits[0], logits[-1], atol=1e-3)
    q = np.random.default_rng(2).normal(size=(1, 4, 6)).astype(np.float32)
    checked = 0
    for layer, sparsity in ((0, 0.5), (1, 0.5), (0, 0.7), (1, 0.7)):
        log_T = np.asarray(squeezejax.log_thresholds(tree, sparsity))
        mask, gap = oracle.selected_mask(tree, layer, q, log_T)
        if gap > 1e-5 and mask[:, :57].sum() > 0 and mask[:, 57:].sum() > 0:
            checked += 1
            np.testing.assert_array_equal(oracle.mask_jit(tree, q, layer, log_T), mask)
    assert checked


def test_without_a_window_and_over_many_chunks(monkeypatch):
    """Chunks of 16 tokens over a tree: the keys of one pass."""
    monkeypatch.setattr(sys.modules["squeezejax.offline.squeeze"], "CHUNK", 16)
    params = oracle.make_model()
    config = dataclasses.replace(DEEP, observation_window=0)
    tree = append(params, oracle.model_tree(params, FIRST, config), SECOND)
    _, k, v, _ = oracle.plain_forward(params, TOKENS[:126])
    chex.assert_trees_all_close(tuple(original(tree)), (k, v), atol=1e-4)
    assert (tree.window_keys.shape[2], tree.num_keys) == (0, 126)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "the context is empty"),
        (np.zeros((2, 5), np.int32), "one context"),
        ([31], r"\[0, 31\)"),
        (np.zeros(3), "integers"),
    ],
)
def test_what_does_not_fit_is_refused(tokens, message):
    params = oracle.make_model()
    tree = oracle.model_tree(params, FIRST, FLAT, clusters=(5,))
    with pytest.raises(ValueError, match=message):
        append(params, tree, tokens)


def test_another_model_is_refused(case):
    with pytest.raises(ValueError, match="another model"):
        append(oracle.make_model(num_layers=3), case[1][0], SECOND)
