"""K-means against hand-worked numbers, NumPy in float64 and the properties that callers rely on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from squeezejax import kmeans

KEY = jax.random.key(0)
# Few shapes, because each costs a compilation.
S, H, C = 120, 5, 12


def mixture(seed, rows, dim, clusters):
    """Gaussians of uneven weights and spreads."""
    rng = np.random.default_rng(seed)
    share = rng.gamma(1.0, size=clusters)
    of = rng.choice(clusters, rows, p=share / share.sum())
    x = rng.standard_normal((clusters, dim))[of] + rng.uniform(0.1, 0.6, clusters)[of, None] * rng.standard_normal(
        (rows, dim)
    )
    return x.astype(np.float32)


def unit(x):
    x = np.asarray(x, np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def inertia_of(x, labels, weights):
    """Weighted mean of 1 − cosine to the mean direction, in float64."""
    u, total = unit(x), 0.0
    for c in np.unique(labels):
        of = labels == c
        direction = unit((weights[of, None] * u[of]).sum(0, keepdims=True))[0]
        total += (weights[of] * (1 - u[of] @ direction)).sum()
    return total / weights.sum()


def check(found, x, num_clusters, weights=None):
    """Everything that holds for any result: valid labels, no empty cluster, means, inertia."""
    x = np.asarray(x, np.float64)
    weights = np.ones(len(x)) if weights is None else np.asarray(weights, np.float64)
    labels, counts, centroids = (np.asarray(a) for a in (found.labels, found.counts, found.centroids))
    assert labels.dtype == counts.dtype == found.iterations.dtype == np.int32
    assert centroids.dtype == found.inertia.dtype == np.float32
    assert labels.shape == (len(x),)
    assert centroids.shape == (num_clusters, x.shape[1])
    assert labels.min() >= 0
    np.testing.assert_array_equal(counts, np.bincount(labels, minlength=num_clusters))
    assert counts.min() > 0
    for c in range(num_clusters):
        of = (labels == c) & (weights > 0)
        if of.any():
            np.testing.assert_allclose(
                centroids[c], np.average(x[of], axis=0, weights=weights[of]), rtol=1e-5, atol=1e-5 * np.abs(x).max()
            )
    np.testing.assert_allclose(found.inertia, inertia_of(x, labels, weights), atol=2e-6)


def same(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(a, b)


def test_by_hand():
    # Two directions. Unit rows (.8, ±.6) have mean direction (1, 0) and 1 − cosine .2; the others lie on theirs.
    x = jnp.array([[4.0, 3.0], [-10.0, 0.0], [4.0, -3.0], [-2.0, 0.0]])
    found = kmeans(x, 2, key=KEY)
    right, left = found.labels[0], found.labels[1]
    np.testing.assert_array_equal(found.labels, [right, left, right, left])
    np.testing.assert_array_equal(found.counts, [2, 2])
    np.testing.assert_allclose(found.centroids[right], [4.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(found.centroids[left], [-6.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(found.inertia, 0.1, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_agrees_with_float64(dtype):
    x = jnp.asarray(mixture(0, 300, 33, 10), dtype)  # an odd head size, rows that fill no whole chunk or draw block
    found = kmeans(x, 20, key=KEY)
    check(found, np.asarray(x.astype(jnp.float32)), 20)
    # Every row is with its nearest centre, to the rounding of bfloat16 scores and the last step's drift.
    u, labels = unit(np.asarray(x.astype(jnp.float32))), np.asarray(found.labels)
    cosines = u @ unit(np.stack([u[labels == c].mean(0) for c in range(20)])).T
    assert np.mean(cosines.max(1) - cosines[np.arange(300), labels]) < 2e-3


KINDS = {
    "gaussian": lambda rng: rng.standard_normal((S, H)),
    "far from the origin": lambda rng: 30 + rng.standard_normal((S, H)),
    "few distinct rows": lambda rng: rng.standard_normal((7, H))[rng.integers(7, size=S)],
    "all equal": lambda rng: np.tile(rng.standard_normal((1, H)), (S, 1)),
    "all zero": lambda rng: np.zeros((S, H)),
    "some zero": lambda rng: rng.standard_normal((S, H)) * (rng.random((S, 1)) < 0.3),
    "one row and its opposite": lambda rng: rng.standard_normal((1, H)) * rng.choice([-1, 1], (S, 1)),
    "uneven norms": lambda rng: rng.standard_normal((S, H)) * 10 ** rng.uniform(-3, 3, (S, 1)),
}


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(sorted(KINDS)), seed=st.integers(0, 10**6))
def test_properties(kind, seed):
    x = KINDS[kind](np.random.default_rng(seed)).astype(np.float32)
    found = kmeans(x, C, key=jax.random.key(seed))
    check(found, x, C)
    same(found, kmeans(x, C, key=jax.random.key(seed)))


def test_equal_rows_give_exactly_that_row():
    rows = np.random.default_rng(1).standard_normal((C, H)).astype(np.float32) / 3
    x = rows[np.random.default_rng(2).integers(C, size=S)]
    found = kmeans(x, C, key=KEY)
    np.testing.assert_array_equal(found.centroids[found.labels], x)
    everywhere = kmeans(np.tile(rows[:1], (S, 1)), C, key=KEY)
    np.testing.assert_array_equal(everywhere.centroids, np.tile(rows[:1], (C, 1)))


@pytest.mark.parametrize("num_clusters", [1, S])
def test_one_cluster_and_one_row_each(num_clusters):
    x = mixture(3, S, H, 6)
    found = kmeans(x, num_clusters, key=KEY)
    check(found, x, num_clusters)
    if num_clusters == S:
        np.testing.assert_array_equal(found.centroids[found.labels], x)
    check(kmeans(np.tile(x[:1], (S, 1)), num_clusters, key=KEY), np.tile(x[:1], (S, 1)), num_clusters)


def test_vmap_equals_single():
    x = np.stack([mixture(i, S, H, 6) for i in range(4)]).reshape(2, 2, S, H)
    keys = jax.random.split(KEY, (2, 2))
    many = jax.jit(jax.vmap(jax.vmap(lambda x, key: kmeans(x, C, key=key))))(x, keys)
    for i, j in np.ndindex(2, 2):
        one, of = kmeans(x[i, j], C, key=keys[i, j]), jax.tree.map(lambda a, i=i, j=j: a[i, j], many)
        np.testing.assert_allclose(of.inertia, one.inertia, rtol=1e-5)  # a sum whose order is the compiler's
        same((one.labels, one.counts, one.iterations), (of.labels, of.counts, of.iterations))
        np.testing.assert_allclose(of.centroids, one.centroids, rtol=1e-6, atol=1e-6)


def test_no_worse_than_lloyd_from_random_rows():
    rows, clusters = 800, 40
    x = mixture(5, rows, 16, 20)
    u, rng = unit(x), np.random.default_rng(0)
    plain = []
    for _ in range(3):
        centres = u[rng.choice(rows, clusters, replace=False)]
        for _ in range(30):
            labels = np.argmax(u @ centres.T, axis=1)
            centres = unit(
                np.stack([u[labels == c].sum(0) if (labels == c).any() else centres[c] for c in range(clusters)])
            )
        plain.append(inertia_of(x, labels, np.ones(rows)))
    found = kmeans(x, clusters, key=KEY)
    check(found, x, clusters)
    assert found.inertia <= min(plain)


def test_lloyd_steps_and_tolerance():
    x = mixture(5, S, H, 6)
    seeds, some, early = (
        kmeans(x, C, key=KEY, max_iterations=steps, swap_rounds=rounds, tolerance=tolerance)
        for steps, rounds, tolerance in ((0, 5, 0.0), (50, 2, 0.0), (50, 2, 0.9))
    )
    for found in (seeds, some, early):
        check(found, x, C)
    assert seeds.iterations == 0
    assert early.iterations == 2 + 2  # the swap rounds, and the two steps that it takes to see an improvement
    assert 4 < some.iterations < 50  # stopped, because nothing improved
    assert some.inertia <= early.inertia < seeds.inertia


def test_weights_count_rows():
    x = mixture(6, S, H, 6)
    weights = np.random.default_rng(0).uniform(0.1, 5.0, S).astype(np.float32)
    check(kmeans(x, C, key=KEY, weights=weights), x, C, weights)
    one, two = (kmeans(x, C, key=KEY, weights=np.full(S, w, np.float32)) for w in (1.0, 2.0))
    same(one, two)
    same(one, kmeans(x, C, key=KEY))


def test_weight_two_is_a_row_twice():
    # C far-apart bundles, so that there is one best partition, which both calls find. Dead rows fill up the shape.
    directions = np.concatenate([np.eye(H), -np.eye(H), np.ones((1, H)), -np.ones((1, H))])
    rows, of = 80, np.arange(80) % C
    x = (directions[of] + 0.02 * np.random.default_rng(0).standard_normal((rows, H))).astype(np.float32)
    weights = np.where(np.arange(S) < S - rows, 2.0, np.where(np.arange(S) < rows, 1.0, 0.0)).astype(np.float32)
    weighted = kmeans(np.pad(x, ((0, S - rows), (0, 0))), C, key=KEY, weights=weights)
    repeated = kmeans(np.concatenate([x, x[: S - rows]]), C, key=KEY)
    centroids = [np.asarray(found.centroids)[np.asarray(found.labels)[:rows]] for found in (weighted, repeated)]
    np.testing.assert_allclose(*centroids, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(weighted.inertia, repeated.inertia, rtol=1e-3)
    assert weighted.counts.sum() == S  # rows, not weights


@pytest.mark.parametrize("junk", [1e6, np.nan, np.inf])
def test_rows_of_weight_zero_influence_nothing(junk):
    x, live = mixture(7, S, H, 6), np.arange(S) % 3 > 0
    clean = kmeans(x, C, key=KEY, weights=live.astype(np.float32))
    check(clean, x, C, live.astype(np.float32))
    assert np.isin(np.arange(C), np.asarray(clean.labels)[live]).all()
    x[~live] = junk
    same(clean, kmeans(x, C, key=KEY, weights=live.astype(np.float32)))


def test_fewer_live_rows_than_clusters():
    x, live = mixture(8, S, H, 6), np.arange(S) < C - 4
    found = kmeans(x, C, key=KEY, weights=live.astype(np.float32))
    check(found, x, C, live.astype(np.float32))
    np.testing.assert_array_equal(found.centroids[found.labels[: C - 4]], x[: C - 4])
    assert np.isfinite(found.centroids).all()


def test_memory_stays_far_under_all_scores():
    rows, clusters = 16384, 2048
    compiled = (
        jax.jit(lambda x, key: kmeans(x, clusters, key=key))
        .lower(jax.ShapeDtypeStruct((rows, 32), jnp.float32), KEY)
        .compile()
    )
    assert compiled.memory_analysis().temp_size_in_bytes < rows * clusters * 4 / 4


@pytest.mark.parametrize(
    ("x", "num_clusters", "options", "message"),
    [
        (np.zeros((4, 2), np.float32), 0, {}, "1 to 4 clusters for 4 rows, not 0"),
        (np.zeros((4, 2), np.float32), 5, {}, "1 to 4 clusters for 4 rows, not 5"),
        (np.zeros((0, 2), np.float32), 1, {}, "for 0 rows"),
        (np.zeros((3, 4, 2), np.float32), 2, {}, "use jax.vmap"),
        (np.zeros((4, 2), np.int32), 2, {}, "float32 or bfloat16"),
        ([[1.0]], 1, {}, "float32 or bfloat16"),
        (np.zeros((4, 2), np.float32), 2, {"max_iterations": -1}, "at least 0, not -1"),
        (np.zeros((4, 2), np.float32), 2, {"swap_rounds": -1}, "at least 0"),
        (np.zeros((4, 2), np.float32), 2, {"weights": np.ones(3, np.float32)}, "one weight a row"),
    ],
)
def test_bad_arguments(x, num_clusters, options, message):
    with pytest.raises(ValueError, match=message):
        kmeans(x, num_clusters, key=KEY, **options)
