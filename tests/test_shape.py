"""Cluster sizes that suit kernels: borders at granules, a cap, and no row further from home than it must be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from squeezejax import SqueezeConfig, build_tree
from squeezejax.offline.shape import Shape, _borders, shape_clusters, shape_of

S, C, H = 400, 20, 6
shape_jit = jax.jit(shape_clusters, static_argnames="shape")


def mixture(seed=0):
    """Rows around 20 directions of four families, with uneven sizes -> rows [S H], labels [S], parents [C]."""
    rng = np.random.default_rng(seed)
    parents = np.sort(rng.integers(0, 4, C)).astype(np.int32)
    centres = 3 * rng.normal(size=(4, H))[parents] + rng.normal(size=(C, H))
    share = rng.gamma(1.0, size=C) + 0.1
    of = rng.choice(C, S, p=share / share.sum()).astype(np.int32)
    return (centres[of] + 0.3 * rng.normal(size=(S, H))).astype(np.float32), of, parents


SHAPES = [Shape(8, None), Shape(8, None, 3), Shape(1, 30), Shape(8, 40), Shape(8, 24), Shape(5, 20)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sizes_are_as_asked(shape):
    rows, labels, parents = mixture()
    found = np.asarray(shape_jit(rows, labels, parents, shape=shape))
    assert found.dtype == np.int32
    assert found.min() >= 0
    assert found.max() < C
    ends = np.cumsum(np.bincount(found, minlength=C))
    inside = ends[ends < S]  # clusters behind the last row are empty
    np.testing.assert_array_equal((inside + shape.first_row) % shape.granule, 0)
    if shape.most is not None:
        assert np.max(np.diff(ends, prepend=0)) <= shape.most


def test_borders_by_hand():
    ends = np.array([3, 11, 20, 20, 29, 30], np.int32)
    np.testing.assert_array_equal(_borders(jnp.asarray(ends), Shape(8, None)), [0, 8, 24, 24, 30, 30])
    np.testing.assert_array_equal(_borders(jnp.asarray(ends), Shape(8, None, 2)), [6, 14, 22, 22, 30, 30])
    # At most 8 rows: the third run hands on 8 of 16, and the last ones are full enough.
    np.testing.assert_array_equal(_borders(jnp.asarray(ends), Shape(8, 8)), [0, 8, 16, 24, 30, 30])
    # All rows in the last run: it hands them back.
    np.testing.assert_array_equal(_borders(jnp.array([0, 0, 0, 0, 30]), Shape(8, 8)), [0, 8, 16, 24, 30])
    np.testing.assert_array_equal(_borders(jnp.array([30, 30, 30, 30, 30]), Shape(8, 8)), [8, 16, 24, 30, 30])


def test_rows_that_move_are_those_that_fit_the_neighbour():
    """Two clusters along an arc: 5 of 13 rows leave for the second one, those nearest to it."""
    angle = np.concatenate([np.linspace(0.0, 0.5, 13), np.linspace(0.7, 1.2, 11)])
    rows = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    labels = np.repeat([0, 1], [13, 11]).astype(np.int32)
    shuffled = np.random.default_rng(0).permutation(24)
    parents = np.zeros(2, np.int32)
    found = np.asarray(shape_clusters(rows[shuffled], labels[shuffled], parents, Shape(8, None)))
    first = found[np.argmin(angle[shuffled])]
    moved = np.where(first == 0, 16, 8)  # the end of the first run goes to 16 or, the other way round, to 8
    np.testing.assert_array_equal(np.sort(angle[shuffled][found == first]), np.sort(angle)[:moved])


def test_neighbours_in_memory_are_alike():
    """Clusters along one arc, numbered at random, come out in the order of the arc."""
    angle = np.repeat(np.linspace(0, 1.5, C), 16)
    rows = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    number = np.random.default_rng(0).permutation(C).astype(np.int32)
    labels = np.repeat(number, 16)
    found = np.asarray(shape_clusters(rows, labels, np.zeros(C, np.int32), Shape(8, None)))
    expected = np.repeat(np.arange(C), 16)
    assert np.array_equal(found, expected) or np.array_equal(found, expected[::-1])


@pytest.mark.parametrize(
    ("options", "dtype", "num_keys", "expected"),
    [
        ({}, jnp.float32, 4000, None),
        ({}, jnp.bfloat16, 4000, Shape(8, None)),
        ({"cluster_granule": 1}, jnp.bfloat16, 4000, None),
        ({"cluster_granule": 8}, jnp.float32, 4000, Shape(8, None)),
        ({"cluster_fractions": (0.1,)}, jnp.bfloat16, 4000, None),
        ({"cluster_cap": 2.0}, jnp.float32, 4000, Shape(1, 40)),
        ({"cluster_cap": 1.1}, jnp.bfloat16, 4000, Shape(8, 24)),
    ],
)
def test_what_a_configuration_asks_for(options, dtype, num_keys, expected):
    assert shape_of(SqueezeConfig.paper(**options), num_keys, jnp.dtype(dtype)) == expected
    if expected is not None:
        assert (
            shape_of(SqueezeConfig.paper(**options), num_keys, jnp.dtype(dtype), 21).first_row == 21 % expected.granule
        )


def test_trees_have_the_shape_and_stay_trees():
    """bfloat16: every run begins on a granule, at both levels; counts and centroids are those of the rows there."""
    keys = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 166, 6)), jnp.bfloat16)
    config = SqueezeConfig.paper(cluster_fractions=(0.02, 0.06), observation_window=6)
    tree = build_tree(keys, keys, config)
    clustered = np.asarray(keys[:, :, :160], np.float64)
    for level in tree.levels:
        starts, counts = np.asarray(level.starts), np.asarray(level.counts)
        np.testing.assert_array_equal(counts.sum(axis=-1), 160)
        np.testing.assert_array_equal(starts[counts > 0] % 8, 0)
        for at in np.argwhere(counts > 0):
            at = tuple(at)
            members = tree.order[at[:2]][starts[at] : starts[at] + counts[at]]
            np.testing.assert_allclose(level.centroids[at], clustered[at[:2]][members].mean(axis=0), atol=1e-2)
    # Labels that are given stay as they are.
    labels = (np.zeros((1, 2, 3), np.int32), np.tile(np.arange(160) % 3, (1, 2, 1)))
    given = build_tree(keys, keys, config, labels=labels)
    np.testing.assert_array_equal(given.levels[1].counts, [[[54, 53, 53]] * 2])
