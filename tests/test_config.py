"""The configuration validates itself; arguments of the public functions are refused with a sentence that helps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from squeezejax import SqueezeConfig
from squeezejax.arguments import check_lengths, check_tokens


def test_defaults_are_those_of_the_design():
    config = SqueezeConfig.paper()
    assert config.cluster_fractions == (0.01, 0.05)
    assert (config.observation_window, config.sparsity, config.coarse_margin, config.query_block) == (
        100,
        0.9,
        4.0,
        128,
    )
    assert config.num_levels == 2


def test_frozen_and_hashable():
    config = SqueezeConfig.paper(cluster_fractions=[0.1, 0.2])  # a list, as JSON has it
    assert config == SqueezeConfig.paper(cluster_fractions=(0.1, 0.2))
    assert hash(config) == hash(SqueezeConfig.paper(cluster_fractions=(0.1, 0.2)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.sparsity = 0.5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cluster_fractions", ()),
        ("cluster_fractions", (0.0,)),
        ("cluster_fractions", (1.5,)),
        ("cluster_fractions", (0.05, 0.01)),
        ("cluster_fractions", (0.05, 0.05)),
        ("cluster_fractions", (float("nan"),)),
        ("observation_window", -1),
        ("observation_window", 1.5),
        ("sparsity", float("nan")),
        ("coarse_margin", 0.5),
        ("coarse_margin", float("nan")),
        ("coarse_margin", float("inf")),
        ("query_block", 0),
        ("query_block", 1.5),
        ("kmeans_iterations", -1),
        ("kmeans_iterations", 1.5),
        ("kmeans_swap_rounds", -1),
        ("kmeans_swap_rounds", None),
        ("observation_window", 10**4000),
        ("kmeans_iterations", 2**31),
        ("cluster_granule", 0),
        ("cluster_granule", 8.5),
        ("cluster_cap", 0.9),
        ("cluster_cap", float("nan")),
        ("kmeans_tolerance", -1.0),
        ("kmeans_tolerance", float("nan")),
    ],
)
def test_senseless_values_are_refused_by_field(field, value):
    with pytest.raises(ValueError, match=field):
        SqueezeConfig.paper(**{field: value})


@pytest.mark.parametrize("sparsity", [-1.0, 0, 0.5, 1, 7.0])
def test_any_sparsity_may_be_the_default(sparsity):
    assert SqueezeConfig.paper(sparsity=sparsity).sparsity == sparsity


@pytest.mark.parametrize("tokens", [[1, 2, 3], np.array([1, 2, 3], np.int64), jnp.array([1, 2, 3])])
def test_one_question_may_leave_out_the_batch(tokens):
    checked = check_tokens(tokens, 10)
    assert (checked.shape, checked.dtype) == ((1, 3), jnp.int32)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "no user tokens"),
        (np.zeros((2, 0), np.int32), "no user tokens"),
        ([1.0, 2.0], "integers"),
        (np.zeros((1, 2, 3), np.int32), "integers"),
        (7, "integers"),
        ([1, 10], r"\[0, 10\)"),
        ([-1, 1], r"\[0, 10\)"),
    ],
)
def test_bad_tokens(tokens, message):
    with pytest.raises(ValueError, match=message):
        check_tokens(tokens, 10)


@pytest.mark.parametrize("lengths", [[0, 3], [1, 4], [1, 2, 3], [1.0, 2.0], 2])
def test_bad_lengths(lengths):
    with pytest.raises(ValueError, match="lengths"):
        check_lengths(lengths, 2, 3)


def test_traced_arguments_pass():
    """Values on a device are not waited for: only dtype and shape are looked at."""
    tokens, lengths = jax.jit(lambda t, n: (check_tokens(t, 10), check_lengths(n, 1, 2)))(
        jnp.array([[99, -1]]), jnp.array([7])
    )
    assert tokens.tolist() == [[99, -1]]
    assert lengths.tolist() == [7]
