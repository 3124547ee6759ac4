"""Choosing tokens: greedy, temperature, top-k, top-p, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from squeezejax.online.sampling import sample, sampling_of

LOGITS = np.log(np.array([0.4, 0.05, 0.3, 0.2, 0.05])).astype(np.float32) + 3
DRAWS = 20_000
draw = jax.jit(sample)


@functools.cache
def frequencies(seed=0, **options):
    """How often each token is drawn for LOGITS."""
    key = jax.random.key(seed)
    sampling = sampling_of(**{"temperature": 1.0, "top_k": None, "top_p": None, "stop_tokens": ()} | options, key=key)
    tokens = draw(np.tile(LOGITS, (DRAWS, 1)), sampling, key)
    return np.bincount(tokens, minlength=5) / DRAWS


def assert_drawn(found, weights):
    expected = np.asarray(weights) / np.sum(weights)
    np.testing.assert_array_equal(found == 0, expected == 0)
    error = np.sqrt(expected * (1 - expected) / DRAWS)
    assert np.all(np.abs(found - expected) <= 5 * error)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_greedy_takes_the_first_of_the_largest(temperature):
    sampling = sampling_of(temperature, None, None, None, ())
    logits = np.array([[0.0, 2.0, 2.0], [5.0, -np.inf, 1.0]], np.float32)
    np.testing.assert_array_equal(draw(logits, sampling, jax.random.key(0)), [1, 0])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_draws_from_the_softmax(temperature):
    assert_drawn(frequencies(temperature=temperature), np.exp(LOGITS / temperature))


def test_tiny_temperature_is_greedy():
    assert_drawn(frequencies(temperature=1e-30), [1, 0, 0, 0, 0])


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({"top_k": 1}, [4, 0, 0, 0, 0]),
        ({"top_k": 2}, [4, 0, 3, 0, 0]),
        ({"top_k": 3}, [4, 0, 3, 2, 0]),
        ({"top_k": 99}, [4, 0.5, 3, 2, 0.5]),
        ({"top_p": 0.01}, [4, 0, 0, 0, 0]),
        ({"top_p": 0.39}, [4, 0, 0, 0, 0]),
        ({"top_p": 0.41}, [4, 0, 3, 0, 0]),
        ({"top_p": 0.75}, [4, 0, 3, 2, 0]),
        ({"top_p": 1.0}, [4, 0.5, 3, 2, 0.5]),
        ({"top_k": 3, "top_p": 0.5}, [4, 0, 3, 0, 0]),  # of the top 3, the first has 0.44: one does not reach 0.5
        ({"top_k": 3, "top_p": 0.43}, [4, 0, 0, 0, 0]),  # 0.4 of all is 0.44 of the top 3: enough
        ({"top_k": 2, "top_p": 1.0, "temperature": 0.5}, [16, 0, 9, 0, 0]),
        ({"top_p": 0.5, "temperature": 0.5}, [16, 0, 0, 0, 0]),  # top-p reads the sharpened distribution: 0.54
    ],
)
def test_top_k_and_top_p(options, weights):
    assert_drawn(frequencies(**options), weights)


def test_same_key_same_tokens():
    np.testing.assert_array_equal(frequencies(seed=4), frequencies.__wrapped__(seed=4))
    assert np.any(frequencies(seed=4) != frequencies(seed=5))


def test_users_draw_independently():
    sampling = sampling_of(1.0, None, None, jax.random.key(0), ())
    tokens = np.asarray(draw(np.zeros((200, 7), np.float32), sampling, jax.random.key(1)))
    assert len(np.unique(tokens)) == 7


def test_numbers_may_be_traced_without_compiling_again():
    @jax.jit
    def program(logits, temperature, k, p, key):
        return sample(logits, sampling_of(temperature, k, p, key, ()), key)

    logits = np.tile(LOGITS, (50, 1))
    for temperature, k, p in [(0.0, 5, 1.0), (1.0, 1, 1.0), (1.0, 5, 0.1), (3.0, 5, 1.0)]:
        tokens = program(logits, jnp.float32(temperature), jnp.int32(k), jnp.float32(p), jax.random.key(0))
        assert np.all(tokens == 0) == (temperature < 3)
    assert program._cache_size() == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.5}, "give a key"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"temperature": float("nan"), "key": 0}, "temperature"),
    ],
)
def test_senseless_values_are_refused(options, message):
    arguments = {"temperature": 0.0, "top_k": None, "top_p": None, "key": None, "stop_tokens": ()} | options
    with pytest.raises(ValueError, match=message):
        sampling_of(**arguments)
