"""Thresholds: exact quantiles of key scores for every sparsity, flat and hierarchical, also at extreme scores."""

import dataclasses
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from squeezejax import SqueezeConfig, build_tree, calibrate, log_thresholds, select

ON_GRID = [0.001, 0.05, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 0.993, 0.999, 0.9995]
OFF_GRID = [0.0003, 0.0505, 0.12345, 0.61803, 0.88888, 0.90009, 0.97777, 0.99871, 0.99995]
lookup = jax.jit(log_thresholds)


def assert_thresholds(tree, sparsity, expected, rtol=1e-3):
    """Compares T, not log T: within rtol relative, −∞ being an exact 0."""
    found = np.asarray(lookup(tree, jnp.float32(sparsity)))
    np.testing.assert_array_equal(np.isneginf(found), np.isneginf(expected))
    finite = np.isfinite(expected)
    np.testing.assert_allclose(found[finite], expected[finite], rtol=0, atol=np.log1p(rtol))


FLAT = {
    "small": {},
    "uneven clusters": {"clusters": (30,), "S": 400, "empty": 0.8},
    "heavy tails": {"clusters": (40,), "S": 200, "scale": 6.0},
    "every key its own score": {"clusters": (300,), "S": 300, "empty": 0.0, "L": 1},
    "groups of three": {"G": 3, "K": 1, "H": 33},
    "more heads than layers": {"L": 1, "K": 5, "G": 1},
    "logits of several hundred": {"scale": 150.0},
    "bfloat16": {"dtype": jnp.bfloat16},
}


@pytest.mark.parametrize("name", FLAT)
def test_flat_threshold_is_the_exact_quantile_of_key_scores(name):
    case = oracle.make_case(seed=1, **{"clusters": (12,)} | FLAT[name])
    for p in ON_GRID + OFF_GRID:
        # Float32 logits of several hundred are known to some 1e-4, and so are their exponentials.
        assert_thresholds(case.tree, p, case.thresholds(np.float32(p)), rtol=3e-3 if "hundred" in name else 1e-3)


def test_flat_threshold_is_the_exact_quantile_with_very_many_clusters():
    """Too many clusters to hold every step of the quantile function: the grid alone has to be fine enough."""
    rng = np.random.default_rng(0)
    C = 12_000
    keys = 3 * rng.normal(size=(1, 1, C, 2)).astype(np.float32)
    labels = (np.arange(C)[None, None],)
    queries = rng.normal(size=(1, 1, 3, 2)).astype(np.float32)
    config = SqueezeConfig.paper(cluster_fractions=(1.0,), observation_window=0)
    tree = calibrate(build_tree(keys, keys, config, labels=labels), queries)
    for p in ON_GRID + OFF_GRID:
        assert_thresholds(tree, p, oracle.thresholds(keys, labels, queries, np.float32(p), 4.0))


def test_by_hand():
    """Two clusters of 3 and 1 keys, one query: A = 1/(3 + e), e/(3 + e); the 0.75-quantile lies 1/4 between them."""
    keys = np.array([0.0, 0.0, 0.0, 1.0], np.float32).reshape(1, 1, 4, 1)
    config = SqueezeConfig.paper(cluster_fractions=(0.5,), observation_window=0)
    tree = build_tree(keys, keys, config, labels=(np.array([[[0, 0, 0, 1]]]),))
    tree = calibrate(tree, np.ones((1, 1, 1, 1), np.float32))
    low, high = 1 / (3 + np.e), np.e / (3 + np.e)
    for p, T in [
        (0.25, low),
        (0.5, low),
        (2 / 3, low),
        (0.75, low + (high - low) / 4),
        (0.9, low + (high - low) * 0.7),
    ]:
        np.testing.assert_allclose(np.exp(lookup(tree, p)), [T], rtol=1e-5)


@pytest.mark.parametrize(("clusters", "margin"), [((4, 12), 1.0), ((4, 12), 4.0), ((3, 6, 12), 1.5), ((3, 6, 12), 4.0)])
def test_hierarchy_matches_the_oracle(clusters, margin):
    """Margins are a geometric series; below the coarsest level only survivors count, in the denominators too."""
    case = oracle.make_case(seed=2, clusters=clusters, coarse_margin=margin, empty=0.1)
    for p in [0.05, 0.3, 0.5, 0.76, 0.8, 0.9, 0.95, 0.99]:
        assert_thresholds(case.tree, p, case.thresholds(np.float32(p)))


@pytest.mark.parametrize("scale", [20.0, 150.0])
def test_hierarchy_with_extreme_logits(scale):
    """Survivors may score hundreds of nats below what the coarse level cut: their thresholds are as exact."""
    case = oracle.make_case(seed=3, clusters=(4, 12), coarse_margin=2.0, empty=0.0, scale=scale)
    for p in [0.3, 0.6, 0.8, 0.9]:
        assert_thresholds(case.tree, p, case.thresholds(np.float32(p)), rtol=3e-3)


def test_sets_of_thresholds_scored_a_few_at_a_time(monkeypatch):
    case = oracle.make_case(seed=2, clusters=(3, 6, 12), empty=0.1)
    monkeypatch.setattr(sys.modules["squeezejax.offline.levelwise"], "SCORES_AT_ONCE", 500)
    chex.assert_trees_all_equal(calibrate(case.uncalibrated, case.queries).thresholds, case.tree.thresholds)


def test_hierarchy_by_hand():
    """log T of the finest level comes from the restricted denominator: the cut half of the keys counts nowhere."""
    keys = np.array([3.0, 2.0, 0.0, 0.0, 0.0, 0.0], np.float32).reshape(1, 1, 6, 1)
    labels = (np.array([[[0, 0, 1]]]), np.array([[[0, 1, 2, 2, 2, 2]]]))
    config = SqueezeConfig.paper(cluster_fractions=(0.1, 0.5), observation_window=0, coarse_margin=1.5)
    tree = calibrate(build_tree(keys, keys, config, labels=labels), np.ones((1, 1, 1, 1), np.float32))
    # Sparsity 0.8: the coarse level keeps 30 % of 6 keys; its quantile, at 0.7 · 5 = 3.5, lies between both clusters.
    coarse = (np.exp([0.0, 2.5]) / (4 + 2 * np.exp(2.5))).mean()
    fine = np.exp([2.0, 3.0]) / np.exp([2.0, 3.0]).sum()  # of the survivors alone; the 0.8-quantile is the fifth key
    np.testing.assert_allclose(np.exp(lookup(tree, 0.8)), [coarse, fine[0]], rtol=1e-5)


@pytest.mark.parametrize("clusters", [(40,), (10, 40), (5, 12, 40)], ids=["flat", "two levels", "three levels"])
@pytest.mark.parametrize("sparsity", [0.3, 0.6543, 0.7504, 0.8, 0.87654, 0.9, 0.9333])
def test_calibration_queries_keep_what_was_asked_for(clusters, sparsity):
    """1 − p of all keys, up to the one cluster that the quantile falls into, on and off the grid."""
    case = kept_case(clusters)
    kept = sum(int(np.sum(calibration_mask(case, layer, sparsity))) for layer in range(2))
    total = case.clustered[..., 0].size
    largest = max(int(np.max(case.tree.levels[-1].counts)), 1)
    slack = largest if len(clusters) == 1 else 3 * largest  # off the grid the levels' thresholds are interpolated apart
    assert (1 - sparsity) * total - slack <= kept <= (1 - sparsity) * total + (0 if len(clusters) == 1 else slack)


_cases = {}


def kept_case(clusters):
    if clusters not in _cases:
        _cases[clusters] = oracle.make_case(seed=5, clusters=clusters, S=400, H=8, empty=0.0)
    return _cases[clusters]


mask_at = jax.jit(
    lambda tree, q, layer, p: select(tree, q, layer=layer, log_thresholds=log_thresholds(tree, p)).key_mask(tree)
)


def calibration_mask(case, layer, sparsity):
    return np.asarray(mask_at(case.tree, case.queries[layer].swapaxes(0, 1), layer, jnp.float32(sparsity)))


def test_one_threshold_for_all_heads():
    """Of two heads with 10 keys each, a peaked and an even one, half of all keys are kept, not half of each."""
    peaked, even = np.repeat([9.0, 0.0], [1, 9]), np.repeat([0.3, 0.2, 0.1], [4, 3, 3])
    keys = np.stack([peaked, even]).astype(np.float32)[None, :, :, None]
    labels = (np.array([[[0] + 5 * [1] + 4 * [2], [0] * 4 + [1] * 3 + [2] * 3]]),)
    config = SqueezeConfig.paper(cluster_fractions=(0.3,), observation_window=0)
    tree = calibrate(build_tree(keys, keys, config, labels=labels), np.ones((1, 2, 1, 1), np.float32))
    q = np.ones((1, 2, 1), np.float32)
    kept = select(tree, q, layer=0, log_thresholds=log_thresholds(tree, 0.5)).num_kept(tree)
    np.testing.assert_array_equal(kept, [1, 7])  # A: 1.0 once, then 0.11 … 0.09, then the 9 keys at e⁻⁹


@pytest.mark.parametrize("sparsity", [-1.0, 0.0, 0, 1, 1.0, 3.0])
def test_from_0_and_from_1_on_thresholds_are_infinite(sparsity):
    case = oracle.make_case(clusters=(4, 12))
    expected = np.full(2, -np.inf if sparsity <= 0 else np.inf, np.float32)
    np.testing.assert_array_equal(log_thresholds(case.tree, sparsity), expected)
    np.testing.assert_array_equal(lookup(case.tree, jnp.float32(sparsity)), expected)


def test_thresholds_rise_with_sparsity():
    case = oracle.make_case(clusters=(12,), scale=4.0)
    table = np.array([lookup(case.tree, p)[0] for p in np.linspace(0.0005, 0.9999, 400, dtype=np.float32)])
    assert np.all(np.diff(table) >= -1e-6)
    assert not np.any(np.isnan(table))


@pytest.mark.parametrize("num_queries", [1, 2, 17])
def test_any_number_of_queries_calibrates(num_queries):
    case = oracle.make_case(seed=4, clusters=(12,), Q=num_queries)
    assert_thresholds(case.tree, 0.7, case.thresholds(np.float32(0.7)))


def test_calibration_changes_nothing_but_the_table():
    case = oracle.make_case(clusters=(4, 12))
    assert case.uncalibrated.thresholds is None
    stripped = dataclasses.replace(case.tree, thresholds=None, sparsities=None)
    chex.assert_trees_all_equal(stripped, case.uncalibrated)
    chex.assert_trees_all_equal(calibrate(case.uncalibrated, case.queries), case.tree)  # twice the same, bit for bit


@pytest.mark.parametrize("clusters", [(12,), (4, 12)], ids=["flat", "two levels"])
def test_tables_of_equal_trees_have_equal_shapes(clusters):
    """Else another document of the same length would compile everything again, whatever clusters it has."""
    one, other = (oracle.make_case(seed, clusters=clusters, empty=empty).tree for seed, empty in ((0, 0.2), (1, 0.8)))
    chex.assert_trees_all_equal_shapes_and_dtypes(one, other)


def test_uncalibrated_tree_is_refused():
    with pytest.raises(ValueError, match="calibrate"):
        log_thresholds(oracle.make_case().uncalibrated, 0.5)


def test_sparsity_is_one_number_or_one_a_user():
    tree = oracle.make_case().tree
    of_users = log_thresholds(tree, [0.5, 0.6])
    np.testing.assert_array_equal(of_users, np.stack([log_thresholds(tree, p) for p in (0.5, 0.6)]))
    with pytest.raises(ValueError, match="one number, or one a user"):
        log_thresholds(tree, [[0.5, 0.6]])


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        (np.zeros((2, 4, 5)), "queries must be"),
        (np.zeros((1, 4, 5, 6)), "queries must be"),
        (np.zeros((2, 3, 5, 6)), "multiple of K"),
        (np.zeros((2, 4, 5, 7)), "H=6"),
        (np.zeros((2, 4, 0, 6)), "at least one query"),
        (np.full((2, 4, 5, 6), np.nan), "finite"),
    ],
)
def test_queries_that_do_not_fit_are_refused(queries, message):
    with pytest.raises(ValueError, match=message):
        calibrate(oracle.make_case().uncalibrated, queries.astype(np.float32))
