"""Selection: which keys a set of query tokens keeps, against the oracle, by hand, and at every numerical trap."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from squeezejax import Selection, SqueezeConfig, build_tree, calibrate, log_thresholds, select
from squeezejax.online.select import kept_rows
from squeezejax.pallas_kernels.layout import split_heads, to_lanes
from squeezejax.pallas_kernels.xla import levelwise

RELIABLE = 1e-4  # float32 scores further than this from a threshold fall on the same side of it as the oracle's
LEVELS = {1: (10,), 2: (4, 10), 3: (3, 5, 10)}


def key_mask(tree, q, log_T, layer=0):
    """Tokens [T N H] and thresholds, one a level -> bool[K S], through one compiled program a shape."""
    return np.asarray(oracle.mask_jit(tree, jnp.asarray(q), layer, jnp.asarray(log_T, jnp.float32)))


def one_head(keys, labels, queries=None, *, dtype=np.float32):
    """A tree of one layer, one head, no window: keys [S H], labels of a head; calibrated if there are queries [Q H]."""
    keys = np.asarray(keys, dtype)[None, None]
    config = SqueezeConfig.paper(
        cluster_fractions=tuple((i + 1) / (len(labels) + 1) for i in range(len(labels))), observation_window=0
    )
    tree = build_tree(keys, keys, config, labels=tuple(np.asarray(entry)[None, None] for entry in labels))
    return tree if queries is None else calibrate(tree, np.asarray(queries, dtype)[None, None])


def log_score(tree, q, at, span=200.0):
    """log A of key `at`, found from outside: the threshold at which it is no longer kept, by bisection."""
    low, high = -span, 1e-3
    for _ in range(60):
        middle = (low + high) / 2
        kept = key_mask(tree, q, [-np.inf] * (len(tree.levels) - 1) + [middle])[0, at]
        low, high = (middle, high) if kept else (low, middle)
    return low


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    levels=st.sampled_from(sorted(LEVELS)),
    seed=st.integers(0, 10**6),
    empty=st.sampled_from([0.0, 0.3, 0.6, 0.8]),
    scale=st.sampled_from([0.3, 1.0, 5.0, 60.0]),
    fractions=st.lists(st.floats(0.0, 0.9), min_size=3, max_size=3),
    layer=st.integers(0, 1),
)
def test_key_mask_equals_the_oracle(levels, seed, empty, scale, fractions, layer):
    """Random trees with empty clusters: the same keys, in their original order."""
    case = oracle.make_case(seed, clusters=LEVELS[levels], empty=empty, scale=scale, S=40)
    q, _, _ = oracle.user_tokens(case, seed)
    log_T = oracle.cutting_thresholds(case, layer, q[0], fractions[:levels])
    mask, gap = case.key_mask(layer, q[0], log_T)
    assume(gap > RELIABLE * max(1.0, scale))
    np.testing.assert_array_equal(key_mask(case.uncalibrated, q[0], log_T, layer), mask)


@pytest.mark.parametrize("most_rows", [0, 64], ids=["masking the dead", "listing the living"])
@pytest.mark.parametrize("clusters", [(1100,), (20, 1100), (5, 600, 1100)], ids=["flat", "two levels", "three levels"])
def test_both_ways_of_looking_up_equal_the_oracle(monkeypatch, clusters, most_rows):
    """With more clusters than either scores at once, and heads that keep very different numbers of them."""
    monkeypatch.setattr(levelwise, "MOST_LISTED_ROWS", most_rows)
    case = oracle.make_case(seed=13, clusters=clusters, S=2500, L=1, H=4, scale=2.0, empty=0.1)
    q, _, _ = oracle.user_tokens(case)

    @jax.jit
    def look_up(tree, q, valid, log_T):
        rows = to_lanes(split_heads(q, case.K))
        found = levelwise.select(tree, rows, jnp.repeat(valid, q.shape[2] // case.K, axis=1), 0, log_T)
        return found, kept_rows(tree, found, 0)

    for fractions in [(0.3, 0.2, 0.5), (0.0, 0.6, 0.9), (0.7, 0.8, 0.0)]:
        log_T = oracle.cutting_thresholds(case, 0, q[0], fractions[: len(clusters)])
        of_users = np.broadcast_to(log_T, (len(q), len(log_T)))
        found, rows = look_up(case.uncalibrated, q, np.array([[True] * 3, [True, True, False]]), of_users)
        for user, tokens in enumerate([q[0], q[1, :2]]):  # the second user's last token is padding
            mask, gap = case.key_mask(0, tokens, log_T)
            if gap < 2e-6:
                continue  # a score as close to its threshold as float32 is exact
            selection = Selection(rows[user], jnp.int32(0))
            np.testing.assert_array_equal(selection.key_mask(case.uncalibrated), mask)
            np.testing.assert_array_equal(found.num_rows[user], mask.sum(axis=1))


@pytest.mark.parametrize(("T", "G"), [(1, 1), (1, 8), (4, 3)])
def test_scores_are_means_over_tokens_and_the_groups_heads(T, G):
    case = oracle.make_case(seed=8, clusters=(4, 10), G=G, K=2, H=33)
    q, _, _ = oracle.user_tokens(case, T=T, G=G)
    log_T = oracle.cutting_thresholds(case, 1, q[0], (0.3, 0.5))
    mask, gap = case.key_mask(1, q[0], log_T)
    assert gap > RELIABLE
    assert 0.05 < mask.mean() < 0.95
    np.testing.assert_array_equal(key_mask(case.uncalibrated, q[0], log_T, 1), mask)


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("sparsity", [-0.5, 0.0, 0.3, 0.5, 0.8, 0.95, 1.0, 1.5])
def test_thresholds_of_a_sparsity_keep_what_the_oracle_keeps(levels, sparsity):
    case = oracle.make_case(seed=9, clusters=LEVELS[levels])
    q, _, _ = oracle.user_tokens(case)
    log_T = log_thresholds(case.tree, sparsity)
    selection = oracle.select_jit(case.tree, q[0], layer=1, log_thresholds=log_T)
    mask = np.asarray(selection.key_mask(case.tree))
    np.testing.assert_array_equal(mask, case.key_mask(1, q[0], np.asarray(log_T))[0])
    np.testing.assert_array_equal(selection.num_kept(case.tree), mask.sum(axis=1))
    if not 0 < sparsity < 1:
        assert np.all(mask == (sparsity <= 0))


@pytest.mark.parametrize("sparsity", [None, -0.5, 0.0, 0.4, 0.9, 1.0, 1.5])
def test_sparsity_means_its_thresholds_or_every_key(sparsity):
    """Every key where a cost rule falls back to dense attention, which it may for 0 < p < 1; None is the tree's."""
    case = oracle.make_case(clusters=(10,), sparsity=0.4)
    q, _, _ = oracle.user_tokens(case)
    p = 0.4 if sparsity is None else sparsity
    mask = np.asarray(select(case.tree, q[0], layer=0, sparsity=sparsity).key_mask(case.tree))
    exact = key_mask(case.tree, q[0], log_thresholds(case.tree, p))
    assert np.array_equal(mask, exact) or (np.all(mask) and 0 < p < 1)


def test_layer_and_sparsity_may_be_traced_without_compiling_again():
    case = oracle.make_case(clusters=(4, 10))
    q, _, _ = oracle.user_tokens(case)
    program = jax.jit(lambda tree, q, layer, p: select(tree, q, layer=layer, sparsity=p))
    for layer in range(2):
        for p in (-1.0, 0.3, 0.7, 1.0):
            traced = program(case.tree, q[0], jnp.int32(layer), jnp.float32(p))
            assert traced.layer == layer
            np.testing.assert_array_equal(traced.rows, select(case.tree, q[0], layer=layer, sparsity=p).rows)
    assert program._cache_size() == 1


# ---------------------------------------------------------------------------------------------------------------------
# By hand
# ---------------------------------------------------------------------------------------------------------------------
def test_by_hand_counts_weigh_in_the_denominator():
    """Clusters of 1, 2 and 5 keys that score 2, 1 and 0: A = exp(s) / (e² + 2e + 5)."""
    keys = np.repeat([2.0, 1.0, 0.0], [1, 2, 5])[:, None]
    tree = one_head(keys, [np.repeat([0, 1, 2], [1, 2, 5])])
    q = np.ones((1, 1, 1), np.float32)
    total = np.e**2 + 2 * np.e + 5
    for at, s in ((0, 2.0), (1, 1.0), (7, 0.0)):
        assert log_score(tree, q, at) == pytest.approx(s - np.log(total), abs=1e-5)


def test_by_hand_denominators_below_a_level_count_survivors_only():
    """Of the parents {0, 1} and {2} the second is cut: the scores of 0 and 1 share 1 between their 4 keys."""
    keys = np.repeat([1.0, 0.0, -1.0], [1, 3, 4])[:, None]
    tree = one_head(keys, [[0, 0, 1], np.repeat([0, 1, 2], [1, 3, 4])])
    q = np.ones((1, 1, 1), np.float32)
    coarse = [0.25 - np.log(4 * np.exp(0.25) + 4 * np.exp(-1.0)), -1 - np.log(4 * np.exp(0.25) + 4 * np.exp(-1.0))]
    between = float(np.mean(coarse))
    low, high = -np.log(np.e + 3), 1 - np.log(np.e + 3)  # restricted; the full denominator would add 4/e
    for log_T, expected in [
        (low - 1e-4, [1, 1, 1, 1, 0, 0, 0, 0]),
        (low + 1e-4, [1, 0, 0, 0, 0, 0, 0, 0]),
        (high - 1e-4, [1, 0, 0, 0, 0, 0, 0, 0]),
        (high + 1e-4, [0] * 8),
    ]:
        np.testing.assert_array_equal(key_mask(tree, q, [between, log_T]), [expected])


@pytest.mark.parametrize("levels", [1, 2])
def test_by_hand_the_threshold_is_strict(levels):
    """One key has all of the softmax, log A = 0 exactly: a threshold of 0 drops it, at either level."""
    tree, q = one_head([[1.5]], [[0]] * levels), np.ones((1, 1, 1), np.float32)
    for depth in range(levels):
        for log_T, kept in [(0.0, False), (-1e-6, True)]:
            assert key_mask(tree, q, [log_T if i == depth else -np.inf for i in range(levels)]).item() == kept


def test_by_hand_a_coarse_centroid_is_the_mean_of_its_keys():
    """Children of 1 key at 10 and 9 keys at 0 have the mean 1, not 5: the parent loses against one at 2."""
    keys = np.concatenate([[10.0], np.zeros(9), np.full(5, 2.0)])[:, None]
    tree = one_head(keys, [[0, 0, 1], np.repeat([0, 1, 2], [1, 9, 5])])
    mask = key_mask(tree, np.ones((1, 1, 1), np.float32), [-np.log(10 * np.exp(-1.0) + 5) - 0.1, -np.inf])
    np.testing.assert_array_equal(mask, [[0] * 10 + [1] * 5])


def test_key_mask_is_in_original_order():
    labels = np.array([2, 0, 1, 2, 1, 0, 2])
    keys = np.array([0.0, 3.0, 6.0])[labels][:, None]
    tree = one_head(keys, [labels])
    mask = key_mask(tree, np.ones((1, 1, 1), np.float32), [-2.0])
    np.testing.assert_array_equal(mask[0], labels == 2)


def test_readers_take_rows_where_starts_and_order_say():
    """Padding rows between clusters, and clusters in any order, change nothing that is selected."""
    case = oracle.make_case(seed=11, clusters=(4, 10))
    q, _, _ = oracle.user_tokens(case)
    mask = key_mask(case.tree, q[0], log_thresholds(case.tree, 0.6), 1)
    assert 0 < mask.sum() < mask.size
    moved = oracle.spread_rows(case.tree)
    assert moved.keys.shape[2] > case.tree.keys.shape[2]
    np.testing.assert_array_equal(key_mask(moved, q[0], log_thresholds(moved, 0.6), 1), mask)


# ---------------------------------------------------------------------------------------------------------------------
# Numerical traps (docs/method.md)
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("height", [100.0, 400.0, 3000.0])
def test_trap_logits_of_several_hundred(height):
    """Without subtracting the maximum exp overflows; scores far below stay ordered too."""
    keys = np.array([0.0, 1.0, 2.0, 3.0])[:, None] - 1.5
    tree = one_head(keys, [[0, 1, 2, 3]], queries=np.full((3, 1), height))
    q = np.full((1, 1, 1), height, np.float32)
    assert np.all(np.isfinite(tree.thresholds))
    for p, expected in [(0.2, [0, 1, 1, 1]), (0.5, [0, 0, 1, 1]), (0.9, [0, 0, 0, 1])]:
        np.testing.assert_array_equal(key_mask(tree, q, log_thresholds(tree, p)), [expected])
    for at in range(4):
        assert log_score(tree, q, at, span=4 * height) == pytest.approx((at - 3) * height, rel=1e-5, abs=1e-2)


def test_trap_empty_clusters_do_not_compete():
    """Live scores of −200 and −201; the empty clusters' centroids would score 0, or as high as they like."""
    keys = np.repeat([-200.0, -201.0], 3)[:, None]
    tree = one_head(keys, [np.repeat([1, 3], 3)], queries=np.ones((2, 1)))
    q = np.ones((1, 1, 1), np.float32)
    level = tree.levels[0]
    for value in (0.0, 1e4, -1e4):
        centroids = jnp.where((level.counts > 0)[..., None], level.centroids, value)
        altered = dataclasses.replace(tree, levels=(dataclasses.replace(level, centroids=centroids),))
        assert log_score(altered, q, 0) == pytest.approx(-np.log(3 + 3 * np.exp(-1)), abs=1e-5)
        np.testing.assert_array_equal(key_mask(altered, q, log_thresholds(altered, 0.5)), [[1, 1, 1, 0, 0, 0]])
        np.testing.assert_array_equal(key_mask(altered, q, [-np.inf]), np.ones((1, 6)))


def test_trap_clusters_cut_by_a_coarser_level_do_not_compete():
    """A fine cluster that scores 200 lies under a parent of mean −25: it is cut, and 199 nats above all survivors."""
    scores, sizes = [200.0, -50.0, 1.0, 0.0], [1, 9, 5, 5]
    tree = one_head(np.repeat(scores, sizes)[:, None], [[0, 0, 1, 1], np.repeat([0, 1, 2, 3], sizes)])
    q = np.ones((1, 1, 1), np.float32)
    low, high = -np.log(5 * np.e + 5), 1 - np.log(5 * np.e + 5)
    for log_T, expected in [(low - 1e-4, [0, 0, 1, 1]), ((low + high) / 2, [0, 0, 1, 0]), (high + 1e-4, [0, 0, 0, 0])]:
        np.testing.assert_array_equal(key_mask(tree, q, [-10.0, log_T]), [np.repeat(expected, sizes)])


@pytest.mark.parametrize("log_T", [[0.0, -np.inf, -np.inf], [-np.inf, 0.0, -np.inf], [-np.inf, -np.inf, 0.0]])
def test_trap_no_survivor_at_a_level(log_T):
    case = oracle.make_case(clusters=(3, 5, 10))
    q, _, _ = oracle.user_tokens(case)
    assert not np.any(key_mask(case.uncalibrated, q[0], log_T))


@pytest.mark.parametrize("height", [1.0, 300.0])
@pytest.mark.parametrize("clusters", [(37,), (2, 5, 37)])
def test_trap_all_keys_equal_keep_only_the_window(clusters, height):
    """Every score equals T for 0 < p < 1, and none exceeds it: to the last bit, for decode and for prefill."""
    row = height * np.random.default_rng(0).normal(size=33)
    case = oracle.make_case(clusters=clusters, H=33, S=90, L=1)
    case = dataclasses.replace(case, keys=np.broadcast_to(row, case.keys.shape).astype(np.float32))
    assert_only_the_window(case.tree, case.queries)


def assert_only_the_window(tree, queries):
    rng = np.random.default_rng(1)
    for T in (1, 5):
        q = rng.normal(size=(T, *queries.shape[1::2])).astype(np.float32)
        for p in (0.001, 0.1234, 0.5, 0.75, 0.9, 0.99987):
            assert not np.any(key_mask(tree, q, log_thresholds(tree, p)))
        assert np.all(key_mask(tree, q, log_thresholds(tree, 0)))


def test_trap_all_keys_equal_clustered_by_kmeans():
    row = np.random.default_rng(0).normal(size=6).astype(np.float32)
    keys = np.broadcast_to(row, (2, 2, 66, 6))  # sizes and configuration as in test_tree.py: one compiled program
    queries = np.random.default_rng(2).normal(size=(2, 4, 6, 6)).astype(np.float32)
    config = SqueezeConfig.paper(cluster_fractions=(0.07, 0.2), observation_window=6)
    assert_only_the_window(calibrate(build_tree(keys, keys, config), queries), queries)


def test_trap_one_cluster():
    keys = np.random.default_rng(0).normal(size=(7, 3))
    tree = one_head(keys, [np.zeros(7, int)], queries=np.ones((2, 3)))
    q = np.random.default_rng(1).normal(size=(2, 1, 3)).astype(np.float32)
    for p, kept in [(0.0, True), (0.01, False), (0.5, False), (0.99, False), (1.0, False)]:
        assert np.all(key_mask(tree, q, log_thresholds(tree, p)) == kept)


def test_trap_one_key_per_cluster_is_exact_top_k():
    """With centroids that are the keys, the sparsity p keeps the best 1 − p of them on the calibration query."""
    rng = np.random.default_rng(0)
    keys, q = rng.normal(size=(41, 6)), rng.normal(size=(1, 6))
    tree = one_head(keys, [rng.permutation(41)], queries=q)
    ranked = np.argsort(keys @ q[0])
    for p in (0.1, 0.5, 0.75, 0.9, 0.95):
        mask = key_mask(tree, q[None].astype(np.float32), log_thresholds(tree, p))[0]
        np.testing.assert_array_equal(np.flatnonzero(mask), np.sort(ranked[int(np.floor(p * 40)) + 1 :]))


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.7])
def test_trap_ties_at_the_threshold_are_dropped(p):
    """The quantile falls inside one of two large clusters: T is its score exactly, so it goes as a whole."""
    keys = np.repeat([[0.3, 0.1, -0.7], [0.2, 0.5, 0.4]], [50, 30], axis=0)
    queries = np.array([[0.7, 0.9, 0.3]])
    tree = one_head(keys, [np.repeat([0, 1], [50, 30])], queries=queries)
    mask = key_mask(tree, queries[None].astype(np.float32), log_thresholds(tree, p))[0]
    np.testing.assert_array_equal(mask, np.repeat([0, p < 0.6], [50, 30]))


@pytest.mark.parametrize("levels", [1, 2])
def test_trap_clusters_of_equal_score_are_kept_or_dropped_together(levels):
    """Twelve clusters, three distinct centroids: whatever the sparsity, each third is kept as a whole."""
    rng = np.random.default_rng(3)
    kinds = np.repeat(np.arange(12) % 3, 5)
    keys = (100 * rng.normal(size=(3, 33)))[kinds]
    labels = [np.repeat(np.arange(12), 5)] if levels == 1 else [np.arange(12) % 3, np.repeat(np.arange(12), 5)]
    queries = rng.normal(size=(4, 33))
    tree = one_head(keys, labels, queries=queries)
    for p in (0.1, 0.2, 0.4, 0.6, 0.7, 0.9):
        mask = key_mask(tree, queries[:, None].astype(np.float32), log_thresholds(tree, p))[0]
        thirds = [mask[kinds == kind] for kind in range(3)]
        assert all(np.all(third == third[0]) for third in thirds)
        assert sum(third[0] for third in thirds) == (2 if p < 1 / 3 else 1 if p < 2 / 3 else 0)


def test_trap_bfloat16_tree_scores_in_float32():
    """Keys and queries are rounded, their scores are not: centroids stay float32, so the oracle still agrees."""
    case = oracle.make_case(seed=12, clusters=(4, 10), dtype=jnp.bfloat16, H=34)
    q, _, _ = oracle.user_tokens(case)
    log_T = oracle.cutting_thresholds(case, 0, q[0], (0.3, 0.5))
    mask, gap = case.key_mask(0, q[0], log_T)
    assert gap > RELIABLE
    assert 0 < mask.sum() < mask.size
    np.testing.assert_array_equal(key_mask(case.uncalibrated, jnp.asarray(q[0], jnp.bfloat16), log_T), mask)


def test_calls_outside_jit_compile_once():
    """A loop over layers in plain Python must not compile the look-up again at every call."""
    case = oracle.make_case(clusters=(4, 10))
    q, _, _ = oracle.user_tokens(case)
    select(case.tree, q[0], layer=0, sparsity=0.5)
    with oracle.count_compilations() as compiled:
        select(case.tree, q[0], layer=1, sparsity=0.7)
    assert not compiled


def test_selection_repeats_bit_for_bit():
    case = oracle.make_case(clusters=(4, 10))
    q, _, _ = oracle.user_tokens(case)
    first, second = (select(case.tree, q[0], layer=0, sparsity=0.6) for _ in range(2))
    np.testing.assert_array_equal(first.rows, second.rows)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((3, 4, 7), {}, "H = 6"),
        ((3, 3, 6), {}, "multiple of K = 2"),
        ((1, 3, 4, 6), {}, "T N H"),
        ((0, 4, 6), {}, "no query tokens"),
        ((3, 4, 6), {"sparsity": 0.5, "log_thresholds": np.zeros(2)}, "not both"),
        ((3, 4, 6), {"log_thresholds": np.zeros(1)}, "one a level"),
        ((3, 4, 6), {"log_thresholds": 0.0}, "one a level"),
        ((3, 4, 6), {"sparsity": np.array([0.5, 0.6])}, "given for 2 users"),
    ],
)
def test_what_does_not_fit_is_refused(shape, options, message):
    with pytest.raises(ValueError, match=message):
        select(oracle.make_case().tree, np.zeros(shape, np.float32), layer=0, **options)


def test_uncalibrated_tree_selects_by_explicit_thresholds_only():
    tree, q = oracle.make_case().uncalibrated, np.zeros((1, 4, 6), np.float32)
    with pytest.raises(ValueError, match=r"squeezejax\.calibrate"):
        select(tree, q, layer=0)
    assert np.all(select(tree, q, layer=0, log_thresholds=np.full(2, -np.inf)).key_mask(tree))
