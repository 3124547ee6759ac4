"""Euclidean K-means and segments against hand-worked numbers, NumPy in float64, and what callers rely on."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from squeezejax import SqueezeConfig, kmeans
from squeezejax.offline import lloyd
from squeezejax.offline.build import build_tree
from squeezejax.offline.kmeans import Clustering, cluster, cluster_levels, num_segments, usual_segment

KEY = jax.random.key(0)
S, H, C = 120, 5, 12
WEIGHTS = (1.0, 0.1, 2.0, 0.5, 1.0)
EUCLIDEAN = Clustering("euclidean", WEIGHTS)


def mixture(seed, rows=S, dim=H, clusters=8):
    """Gaussians of uneven spreads around a common offset."""
    rng = np.random.default_rng(seed)
    of = rng.integers(clusters, size=rows)
    x = (
        3
        + 2 * rng.standard_normal((clusters, dim))[of]
        + rng.uniform(0.1, 0.6, clusters)[of, None] * rng.standard_normal((rows, dim))
    )
    return x.astype(np.float32)


def inertia_of(x, labels, dims, weights=None):
    """Weighted mean of squared distances to the clusters' means, in float64."""
    y = np.asarray(x, np.float64) * np.asarray(dims, np.float64)
    weights = np.ones(len(y)) if weights is None else np.asarray(weights, np.float64)
    total = 0.0
    for c in np.unique(labels[weights > 0]):
        of = (labels == c) & (weights > 0)
        total += (weights[of, None] * (y[of] - np.average(y[of], axis=0, weights=weights[of])) ** 2).sum()
    return total / weights.sum()


def check(found, x, num_clusters, dims, weights=None):
    """Everything that holds for any result: valid labels, no empty cluster, means, inertia."""
    x = np.asarray(x, np.float64)
    labels, counts, centroids = (np.asarray(a) for a in (found.labels, found.counts, found.centroids))
    assert labels.dtype == counts.dtype == found.iterations.dtype == np.int32
    assert centroids.dtype == found.inertia.dtype == np.float32
    assert labels.shape == (len(x),)
    assert centroids.shape == (num_clusters, x.shape[1])
    assert labels.min() >= 0
    np.testing.assert_array_equal(counts, np.bincount(labels, minlength=num_clusters))
    assert counts.min() > 0
    live = np.ones(len(x)) if weights is None else np.maximum(np.asarray(weights, np.float64), 0)
    for c in range(num_clusters):
        of = (labels == c) & (live > 0)
        if of.any():
            mean = np.average(x[of], axis=0, weights=live[of])
            np.testing.assert_allclose(centroids[c], mean, rtol=1e-5, atol=1e-5 * np.abs(x).max())
    want = inertia_of(x, labels, dims, live)
    np.testing.assert_allclose(found.inertia, want, rtol=2e-4, atol=1e-5 * np.abs(x * dims).max() ** 2)


def same(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(a, b)


def test_by_hand():
    # One direction, two distances: the cosine could not tell these apart. Deviations of ±1 at each end.
    x = jnp.array([[1.0, 0.0], [9.0, 0.0], [3.0, 0.0], [11.0, 0.0]])
    found = cluster(x, 2, key=KEY, options=Clustering("euclidean"))
    near, far = found.labels[0], found.labels[1]
    np.testing.assert_array_equal(found.labels, [near, far, near, far])
    np.testing.assert_allclose(found.centroids[near], [2.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(found.centroids[far], [10.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(found.inertia, 1.0, atol=1e-5)


def test_dimension_weights_by_hand():
    # A wide first dimension that hardly counts, and a narrow one that does.
    x = jnp.array([[0.0, 1.0], [10.0, 1.0], [0.0, -1.0], [10.0, -1.0]])
    plain, weighted = (cluster(x, 2, key=KEY, options=Clustering("euclidean", dims)) for dims in (None, (0.01, 1.0)))
    assert plain.labels[0] == plain.labels[2] != plain.labels[1] == plain.labels[3]
    assert weighted.labels[0] == weighted.labels[1] != weighted.labels[2] == weighted.labels[3]
    np.testing.assert_allclose(plain.inertia, 1.0, atol=1e-5)
    np.testing.assert_allclose(weighted.inertia, 0.05**2, rtol=1e-4)
    np.testing.assert_allclose(weighted.centroids[weighted.labels[0]], [5.0, 1.0], atol=1e-6)


def test_assignment_and_centres_are_those_of_float64():
    x = mixture(0, 300)
    raw, weights = jnp.asarray(x), jnp.asarray(np.random.default_rng(1).uniform(0.5, 2, 300), jnp.float32)
    rows = lloyd.euclidean_rows(raw, weights, 20, jnp.asarray(WEIGHTS))
    y = (x - np.average(x, axis=0, weights=weights)).astype(np.float64) * WEIGHTS / float(rows.scale)
    np.testing.assert_allclose(rows.points, y, atol=1e-6)
    assert np.linalg.norm(rows.points, axis=1).max() <= 1 + 1e-6
    centres = y[np.random.default_rng(2).choice(300, 20, replace=False)]
    fit = lloyd._assign(rows, jnp.asarray(centres, jnp.float32), with_second=True)
    distances = 0.5 * ((y[:, None] - centres) ** 2).sum(2)
    ranked = np.sort(distances, axis=1)
    # bfloat16 rows and centres of norm 1 at most
    for score, labels, want in ((fit.best, fit.labels, ranked[:, 0]), (fit.second, fit.fallback, ranked[:, 1])):
        np.testing.assert_allclose(rows.highest - score, want, atol=1e-2)
        np.testing.assert_allclose(distances[np.arange(300), labels], want, atol=1e-2)
    means = lloyd.centres_of(rows, fit.labels, 20)
    labels, w = np.asarray(fit.labels), np.asarray(weights, np.float64)
    want = [np.average(y[labels == c], axis=0, weights=w[labels == c]) for c in range(20)]
    np.testing.assert_allclose(means, want, atol=1e-5)
    want = 0.5 * ((y - np.stack(want)[labels]) ** 2).sum(1)
    np.testing.assert_allclose(lloyd.half_distances(rows, fit.labels, 20), want, atol=1e-6)


def test_no_worse_than_lloyd_from_random_rows():
    rows, clusters = 800, 40
    x = mixture(5, rows, H, 20)
    y, rng, plain = x * np.array(WEIGHTS), np.random.default_rng(0), []
    for _ in range(3):
        centres = y[rng.choice(rows, clusters, replace=False)]
        for _ in range(30):
            labels = np.argmin(((y[:, None] - centres) ** 2).sum(2), axis=1)
            centres = np.stack([y[labels == c].mean(0) if (labels == c).any() else centres[c] for c in range(clusters)])
        plain.append(inertia_of(x, labels, WEIGHTS))
    found = cluster(x, clusters, key=KEY, options=EUCLIDEAN)
    check(found, x, clusters, WEIGHTS)
    assert found.inertia <= min(plain)


KINDS = {
    "gaussian": lambda rng: rng.standard_normal((S, H)),
    "far from the origin": lambda rng: 30 + rng.standard_normal((S, H)),
    "few distinct rows": lambda rng: rng.standard_normal((7, H))[rng.integers(7, size=S)],
    "all equal": lambda rng: np.tile(rng.standard_normal((1, H)), (S, 1)),
    "all zero": lambda rng: np.zeros((S, H)),
    "one outlier": lambda rng: rng.standard_normal((S, H)) * np.where(np.arange(S) == 5, 100, 1)[:, None],
}


@settings(max_examples=30, deadline=None)
@given(kind=st.sampled_from(sorted(KINDS)), seed=st.integers(0, 10**6), segment=st.sampled_from([None, 25]))
def test_properties(kind, seed, segment):
    x = KINDS[kind](np.random.default_rng(seed)).astype(np.float32)
    options = dataclasses.replace(EUCLIDEAN, segment=segment)
    found = cluster(x, C, key=jax.random.key(seed), options=options)
    check(found, x, C, WEIGHTS)
    same(found, cluster(x, C, key=jax.random.key(seed), options=options))
    if kind == "few distinct rows" and segment is None:
        np.testing.assert_array_equal(np.asarray(found.centroids)[found.labels], x)


def test_distances_do_not_depend_on_the_origin():
    x = np.round(mixture(4) * 16) / 16  # sums with 1,024 are exact
    near, far = (cluster(v, C, key=KEY, options=EUCLIDEAN) for v in (x, x + 1024))
    np.testing.assert_allclose(far.inertia, near.inertia, rtol=0.1)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_one_segment_is_all_rows(metric):
    x = mixture(1)
    flat, one = (cluster(x, C, key=KEY, options=Clustering(metric, segment=n)) for n in (None, S))
    same(flat, one)
    if metric == "cosine":
        same(flat, kmeans(x, C, key=KEY))


@settings(max_examples=6, deadline=None)  # each compiles
@given(data=st.data(), metric=st.sampled_from(["cosine", "euclidean"]))
def test_every_number_of_rows_clusters_and_segments(data, metric):
    rows = data.draw(st.integers(1, 60))
    num = data.draw(st.integers(1, rows))
    segment = data.draw(st.integers(1, 30))
    x = mixture(rows, rows)
    found = cluster(x, num, key=KEY, options=Clustering(metric, segment=segment, max_iterations=2, swap_rounds=1))
    assert np.bincount(found.labels, minlength=num).min() > 0
    assert len(found.counts) == num


@settings(max_examples=500, deadline=None)
@given(rows=st.integers(1, 10**6), data=st.data())
def test_every_segment_has_clusters_and_no_more_than_rows(rows, data):
    num, segment = data.draw(st.integers(1, rows)), data.draw(st.integers(1, 10**4))
    segments = num_segments(rows, num, segment)
    ends = np.arange(segments + 1) * rows // segments
    shares, sizes = np.diff(ends * num // rows), np.diff(ends)
    assert shares.sum() == num
    assert shares.min() >= 1
    assert np.all(shares <= sizes)


def test_usual_segments_grow_as_the_root_of_the_rows():
    assert [usual_segment(rows) for rows in (1, 4096, 8192, 32768, 131072)] == [2048, 2048, 2048, 4096, 8192]


def test_segments_are_clustered_by_themselves():
    # 103 rows: segments of 25 or 26 rows, with 2 or 3 of 11 clusters; none holds rows of two segments.
    x = mixture(2, 103)
    found = cluster(x, 11, key=KEY, options=dataclasses.replace(EUCLIDEAN, segment=30))
    check(found, x, 11, WEIGHTS)
    ends = np.arange(5) * 103 // 4
    of = [set(np.asarray(found.labels)[a:b]) for a, b in itertools.pairwise(ends)]
    assert [len(labels) for labels in of] == list(np.diff(ends * 11 // 103))
    assert sum(map(len, of)) == len(set().union(*of)) == 11
    # What one segment holds does not change the others.
    y = x.copy()
    y[ends[3] :] = mixture(3, 103)[ends[3] :]
    other = cluster(y, 11, key=KEY, options=dataclasses.replace(EUCLIDEAN, segment=30))
    np.testing.assert_array_equal(found.labels[: ends[3]], other.labels[: ends[3]])


def test_a_centre_that_is_not_there_gets_no_row():
    x = mixture(6)
    for make in (
        lambda raw, w: lloyd.cosine_rows(raw, w, C, None),
        lambda raw, w: lloyd.euclidean_rows(raw, w, C, jnp.ones(H)),
    ):
        rows = make(jnp.asarray(x), jnp.ones(S))
        labels, _ = lloyd.partition(rows, C, KEY, 2, 2, 0.0, jnp.int32(C - 3))
        assert set(np.asarray(labels)) == set(range(C - 3))


@pytest.mark.parametrize("junk", [1e6, np.nan, np.inf])
@pytest.mark.parametrize("segment", [None, 25])
def test_rows_of_weight_zero_influence_nothing(junk, segment):
    x, live = mixture(7), np.arange(S) % 3 > 0
    options = dataclasses.replace(EUCLIDEAN, segment=segment)
    clean = cluster(x, C, key=KEY, weights=live.astype(np.float32), options=options)
    check(clean, x, C, WEIGHTS, live)
    x[~live] = junk
    same(clean, cluster(x, C, key=KEY, weights=live.astype(np.float32), options=options))


def test_rows_that_are_no_numbers_leave_valid_labels():
    x = mixture(8)
    x[3] = np.nan
    found = cluster(x, C, key=KEY, options=EUCLIDEAN)
    assert np.bincount(found.labels, minlength=C).min() > 0
    assert np.isnan(found.inertia)


def test_weights_and_bfloat16():
    x = jnp.asarray(mixture(6), jnp.bfloat16)
    weights = np.random.default_rng(0).uniform(0.1, 5.0, S).astype(np.float32)
    check(cluster(x, C, key=KEY, weights=weights, options=EUCLIDEAN), x.astype(jnp.float32), C, WEIGHTS, weights)


def test_vmap_and_map_equal_single():
    x, keys = np.stack([mixture(i) for i in range(3)]), jax.random.split(KEY, 3)
    options = dataclasses.replace(EUCLIDEAN, segment=50)
    one = lambda x, key: cluster(x, C, key=key, options=options).labels
    want = np.stack([one(*operands) for operands in zip(x, keys, strict=True)])
    np.testing.assert_array_equal(jax.jit(jax.vmap(one))(x, keys), want)
    np.testing.assert_array_equal(jax.lax.map(lambda operands: one(*operands), (jnp.asarray(x), keys)), want)


def test_tree_of_segments():
    changes = {"cluster_metric": "slow", "cluster_segment": 60, "kmeans_iterations": 3, "kmeans_swap_rounds": 2}
    config = SqueezeConfig.paper(cluster_fractions=(0.03, 0.12), observation_window=8, **changes)
    keys = jnp.asarray(np.stack([mixture(i, 208) for i in range(2)])[None])
    options = dataclasses.replace(EUCLIDEAN, segment=60, max_iterations=3, swap_rounds=2)
    tree = build_tree(keys, keys, config, weights=WEIGHTS)
    assert [level.counts.shape[2] for level in tree.levels] == [6, 24]
    for level in tree.levels:
        assert level.counts.min() > 0
        np.testing.assert_array_equal(level.counts.sum(2), [[200, 200]])
    seed = jax.random.split(jax.random.split(jax.random.key(0), 1)[0], 2)[0]
    labels = cluster_levels(keys[0, 0, :200], (6, 24), key=seed, options=options)
    assert [entry.shape for entry in labels] == [(24,), (200,)]
    np.testing.assert_array_equal(np.sort(tree.levels[1].counts[0, 0]), np.sort(np.bincount(labels[1], minlength=24)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "manhattan"}, "one of"),
        ({"dimension_weights": (1.0,) * H}, "for the Euclidean metric"),
        ({"metric": "euclidean", "dimension_weights": (1.0, -1.0)}, "at least 0"),
        ({"metric": "euclidean", "dimension_weights": (1.0, np.nan)}, "finite"),
        ({"metric": "euclidean", "dimension_weights": (1.0, 1.0)}, "2 entries, and rows have 5"),
        ({"segment": 0}, "at least one row, not 0"),
        ({"max_iterations": -1}, "at least 0, not -1"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        cluster(mixture(0), C, key=KEY, options=Clustering(**options))
