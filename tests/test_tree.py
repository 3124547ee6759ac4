"""Building trees: cluster order, centroids, counts, the number of clusters, and what is refused."""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from squeezejax import SqueezeConfig, Tree, build_tree
from squeezejax.tree import TreeLayer, stack_layers


def runs(tree, depth, layer, head):
    """(number, rows, original keys) of every live cluster of a level."""
    level = tree.levels[depth]
    starts, counts = np.asarray(level.starts[layer, head]), np.asarray(level.counts[layer, head])
    order = np.asarray(tree.order[layer, head])
    for c in np.flatnonzero(counts):
        rows = range(starts[c], starts[c] + counts[c])
        yield c, set(rows), order[list(rows)]


def partition(tree, depth, layer, head):
    return {frozenset(keys.tolist()) for _, _, keys in runs(tree, depth, layer, head)}


@pytest.fixture(scope="module", params=[(12,), (4, 12), (3, 6, 12)], ids=["flat", "two levels", "three levels"])
def case(request):
    return oracle.make_case(clusters=request.param)


def test_clusters_are_those_of_the_labels(case):
    tree = case.uncalibrated
    for layer, head in np.ndindex(2, case.K):
        for depth, cluster in enumerate(oracle.ancestors(case.head_labels(layer, head))):
            expected = {frozenset(np.flatnonzero(cluster == c).tolist()) for c in np.unique(cluster)}
            assert partition(tree, depth, layer, head) == expected


def test_rows_hold_the_keys_and_values_that_order_names(case):
    tree, S = case.uncalibrated, case.clustered.shape[2]
    chex.assert_shape(tree.keys, case.clustered.shape)
    for layer, head in np.ndindex(2, case.K):
        order = np.asarray(tree.order[layer, head])
        assert sorted(order) == list(range(S))
        np.testing.assert_array_equal(tree.keys[layer, head], case.keys[layer, head, order])
        np.testing.assert_array_equal(tree.values[layer, head], case.values[layer, head, order])


def test_a_layer_lacks_the_axis_of_layers_and_nothing_else(case):
    tree = case.uncalibrated
    layers = [tree.layer(i) for i in range(tree.num_layers)]
    chex.assert_trees_all_equal(layers[1].cache.keys, tree.keys[1])
    for path, leaf in jax.tree_util.tree_leaves_with_path(layers[1]):
        name = re.sub(r"\.\d+", "", jax.tree_util.keystr(path, simple=True, separator="."))
        assert "L" + TreeLayer.AXES[name] == Tree.AXES[name]
        assert leaf.ndim == len(TreeLayer.AXES[name])
    whole = stack_layers(layers)
    assert jax.tree.structure(whole) == jax.tree.structure(tree)
    chex.assert_trees_all_equal(whole, tree)


def test_window_stays_in_order_and_out_of_the_clusters(case):
    tree, S = case.uncalibrated, case.clustered.shape[2]
    np.testing.assert_array_equal(tree.window_keys, case.keys[:, :, S:])
    np.testing.assert_array_equal(tree.window_values, case.values[:, :, S:])
    assert (tree.num_keys, tree.context_length, tree.num_layers, tree.num_kv_heads) == (S, S + case.W, 2, case.K)


def test_centroids_are_means_of_raw_keys_at_every_level(case):
    """A coarse centroid is the mean of all keys below it: fine ones weighted by their counts, empty ones by nothing."""
    for depth, level in enumerate(case.uncalibrated.levels):
        chex.assert_type(level.centroids, jnp.float32)
        for layer, head in np.ndindex(2, case.K):
            for c, _, keys in runs(case.uncalibrated, depth, layer, head):
                mean = case.keys[layer, head, keys].astype(np.float64).mean(axis=0)
                np.testing.assert_allclose(level.centroids[layer, head, c], mean, rtol=0, atol=1e-6)
                assert level.counts[layer, head, c] == len(keys)


def test_children_of_a_cluster_are_one_run(case):
    tree = case.uncalibrated
    for layer, head in np.ndindex(2, case.K):
        for depth in range(1, len(tree.levels)):
            parents = np.asarray(tree.levels[depth].parents[layer, head])
            for c, rows, _ in runs(tree, depth - 1, layer, head):
                below = [r for child, r, _ in runs(tree, depth, layer, head) if parents[child] == c]
                assert set().union(*below) == rows
        assert not np.any(tree.levels[0].parents[layer, head])


def test_number_of_clusters_comes_from_the_labels():
    case = oracle.make_case(clusters=(5, 9, 14), empty=0.5)
    assert [level.counts.shape[2] for level in case.uncalibrated.levels] == [5, 9, 14]
    assert all(np.any(np.asarray(level.counts) == 0) for level in case.uncalibrated.levels)


def test_by_hand():
    keys = np.array([1.0, 10.0, 3.0, 20.0, 99.0], np.float32).reshape(1, 1, 5, 1)
    labels = (np.array([[[1, 0, 0]]]), np.array([[[2, 0, 2, 1]]]))  # clusters {1}, {3}, {0, 2}; parents {1, 3+0, 2}
    tree = build_tree(
        keys, -keys, SqueezeConfig.paper(cluster_fractions=(0.1, 0.2), observation_window=1), labels=labels
    )
    coarse, fine = tree.levels
    np.testing.assert_array_equal(coarse.centroids[0, 0, :, 0], [8.0, 10.0])  # (20 + 1 + 3) / 3, not (20 + 2) / 2
    np.testing.assert_array_equal(coarse.counts[0, 0], [3, 1])
    np.testing.assert_array_equal(fine.centroids[0, 0, :, 0], [20.0, 2.0, 10.0])
    np.testing.assert_array_equal(fine.parents[0, 0], [0, 0, 1])
    np.testing.assert_array_equal(fine.starts[0, 0], [0, 1, 3])
    np.testing.assert_array_equal(tree.order[0, 0], [3, 0, 2, 1])
    np.testing.assert_array_equal(tree.values[0, 0, :, 0], [-20.0, -1.0, -3.0, -10.0])
    assert tree.thresholds is None


@pytest.fixture(scope="module")
def clustered():
    """A tree that K-means made."""
    rng = np.random.default_rng(3)
    keys, values = (rng.normal(size=(2, 2, 66, 6)).astype(np.float32) for _ in range(2))
    config = SqueezeConfig.paper(cluster_fractions=(0.07, 0.2), observation_window=6)
    return keys, values, config, build_tree(keys, values, config, key=jax.random.key(5))


def test_kmeans_trees_leave_no_cluster_empty(clustered):
    *_, tree = clustered
    assert [level.counts.shape for level in tree.levels] == [(2, 2, 4), (2, 2, 12)]
    for level in tree.levels:
        assert np.all(np.asarray(level.counts) > 0)
        assert np.all(np.sum(level.counts, axis=-1) == 60)


def test_kmeans_trees_nest(clustered):
    keys, _, _, tree = clustered
    for layer, head in np.ndindex(2, 2):
        coarse, fine = (partition(tree, depth, layer, head) for depth in (0, 1))
        assert all(any(small <= large for large in coarse) for small in fine)
        for depth, level in enumerate(tree.levels):
            for c, _, members in runs(tree, depth, layer, head):
                mean = keys[layer, head, members].mean(axis=0)
                np.testing.assert_allclose(level.centroids[layer, head, c], mean, rtol=0, atol=1e-6)


def test_same_key_same_tree_bit_for_bit(clustered):
    keys, values, config, tree = clustered
    chex.assert_trees_all_equal(tree, build_tree(keys, values, config, key=jax.random.key(5)))
    other = build_tree(keys, values, config, key=jax.random.key(6))
    assert not np.array_equal(other.order, tree.order)


@pytest.mark.parametrize(
    ("fractions", "num_keys", "expected"),
    [
        ((0.01, 0.05), 1000, (10, 50)),
        ((0.01, 0.05), 1019, (10, 50)),
        ((0.01, 0.05), 20, (1, 1)),
        ((0.05,), 1, (1,)),
        ((0.29,), 100, (29,)),  # 0.29 · 100 is a little under 29 in floating point
        ((0.2, 0.5, 1.0), 10, (2, 5, 10)),
    ],
)
def test_number_of_clusters(fractions, num_keys, expected):
    assert SqueezeConfig.paper(cluster_fractions=fractions).num_clusters(num_keys) == expected


@pytest.mark.parametrize(
    ("num_keys", "fractions"),
    [(1, (0.05,)), (9, (0.01, 0.05)), (9, (0.5, 1.0))],
    ids=["one key", "one cluster a level", "one key per cluster"],
)
def test_extreme_sizes(num_keys, fractions):
    keys = np.random.default_rng(0).normal(size=(1, 1, num_keys + 1, 33)).astype(np.float32)
    config = SqueezeConfig.paper(cluster_fractions=fractions, observation_window=1)
    tree = build_tree(keys, keys, config)
    for level, C in zip(tree.levels, config.num_clusters(num_keys), strict=True):
        chex.assert_shape(level.counts, (1, 1, C))
        assert np.all(np.asarray(level.counts) > 0)
        assert int(np.sum(level.counts)) == num_keys


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_keys_keep_their_dtype_and_have_float32_centroids(dtype):
    case = oracle.make_case(H=33, dtype=dtype)
    tree = case.uncalibrated
    chex.assert_type([tree.keys, tree.values, tree.window_keys, tree.window_values], dtype)
    for depth, level in enumerate(tree.levels):
        chex.assert_type(level.centroids, jnp.float32)
        for c, _, members in runs(tree, depth, 0, 1):
            mean = case.keys[0, 1, members].mean(axis=0)
            np.testing.assert_allclose(level.centroids[0, 1, c], mean, rtol=0, atol=1e-6)


def test_kmeans_clusters_float16_keys():
    keys = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 25, 6)), jnp.float16)
    tree = build_tree(keys, keys, SqueezeConfig.paper(cluster_fractions=(0.2,), observation_window=5))
    chex.assert_type(tree.keys, jnp.float16)
    assert np.all(np.asarray(tree.levels[0].counts) > 0)


def test_all_keys_equal_give_bit_equal_centroids(clustered):
    keys, _, config, _ = clustered
    row = np.random.default_rng(0).normal(size=6).astype(np.float32)
    equal = np.broadcast_to(row, keys.shape)
    for level in build_tree(equal, equal, config).levels:
        assert np.all(np.asarray(level.centroids) == row)


def test_tree_is_a_pytree_with_static_config(case):
    leaves, structure = jax.tree.flatten(case.uncalibrated)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    again = jax.tree.unflatten(structure, leaves)
    assert (again.config, again.num_keys) == (case.config, 60)
    assert hash(structure) is not None
    with pytest.raises(dataclasses.FrozenInstanceError):
        again.num_keys = 3


KEYS = np.zeros((1, 2, 12, 4), np.float32)
FLAT = SqueezeConfig.paper(cluster_fractions=(0.5,), observation_window=2)
DEEP = SqueezeConfig.paper(cluster_fractions=(0.2, 0.5), observation_window=2)
FINE = np.zeros((1, 2, 10), np.int32)


@pytest.mark.parametrize(
    ("keys", "values", "config", "labels", "message"),
    [
        (KEYS[0], KEYS[0], FLAT, None, r"L K sinks\+S\+W H"),
        (KEYS, KEYS[:, :, 1:], FLAT, None, "must both be"),
        (KEYS, KEYS.astype(np.float16), FLAT, None, "dtype"),
        (KEYS.astype(np.int32), KEYS.astype(np.int32), FLAT, None, "floating"),
        (KEYS[:, :, :2], KEYS[:, :, :2], FLAT, None, "nothing is left to cluster"),
        (np.where(np.arange(4) == 1, np.float32("nan"), KEYS), KEYS, FLAT, None, "layer 0 are not finite"),
        (KEYS, np.where(np.arange(4) == 1, np.float32("inf"), KEYS), FLAT, None, "not finite"),
        (KEYS, KEYS, FLAT, (FINE, FINE), "levels"),
        (KEYS, KEYS, FLAT, (FINE[:, :1],), "integers"),
        (KEYS, KEYS, FLAT, (FINE.astype(np.float32),), "integers"),
        (KEYS, KEYS, FLAT, (FINE[:, :, 1:],), "10 clustered keys"),
        (KEYS, KEYS, FLAT, (FINE - 1,), "negative"),
        (KEYS, KEYS, DEEP, (np.zeros((1, 2, 3), np.int32), FINE + 3), "cluster 3"),
    ],
)
def test_what_does_not_fit_is_refused(keys, values, config, labels, message):
    with pytest.raises(ValueError, match=message):
        build_tree(keys, values, config, labels=labels)
