"""The library's attention, put together from two parts, against our own; without a GPU it runs as XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from squeezejax.pallas_kernels import cudnn, registry
from squeezejax.pallas_kernels.layout import split_heads
from squeezejax.pallas_kernels.xla.backend import Xla
from squeezejax.pallas_kernels.xla.dense import attend_cached
from squeezejax.pallas_kernels.xla.softmax import partial_attention


def chunk(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 5)
    q = jax.random.normal(keys[0], (1, 24, 6, 16), dtype)
    k, v = (jax.random.normal(key, (1, 96, 2, 16), dtype) for key in keys[1:3])
    before = jax.random.normal(keys[3], (1, 24, 2, 3, 16)), jax.random.normal(keys[4], (1, 24, 2, 3))
    return q, k, v, before


@pytest.mark.parametrize("with_before", [False, True])
def test_two_parts_are_one_attention(with_before):
    q, k, v, before = chunk()
    before = before if with_before else None
    run = jax.jit(lambda k, v, start: cudnn.attend_fused(q, k, v, start, before=before, implementation="xla"))
    for start in (0, 1, 40, 72):  # the first chunk, which has nothing before it, to the last
        later = jnp.arange(96)[None, :, None, None] >= start + 24
        junk = [jnp.where(later, 1e3, x) for x in (k, v)]  # rows not written yet
        want = attend_cached(q, k, v, start, before=before)
        np.testing.assert_allclose(run(*junk, start), want, atol=2e-6)


def test_users_who_begin_in_different_rows():
    """Some have said nothing before; the padding of one lies past the last row."""
    keys = jax.random.split(jax.random.key(1), 3)
    q = jax.random.normal(keys[0], (3, 24, 6, 16))
    k, v = (jax.random.normal(key, (3, 40, 2, 16)) for key in keys[1:])
    run = jax.jit(lambda start: cudnn.attend_own(q, k, v, start, implementation="xla"))
    for start in (jnp.array([0, 5, 20]), jnp.zeros(3, jnp.int32)):
        row = start[:, None] + jnp.arange(24)[None, :]
        mask = jnp.arange(40)[None, None, :] <= row[:, :, None]
        for found, want in zip(run(start), partial_attention(split_heads(q, 2), k, v, mask), strict=True):
            real = row < 40
            np.testing.assert_allclose(found[real], want[real], atol=2e-6)


def test_without_a_gpu_nothing_changes():
    q, k, v, _ = chunk(jnp.bfloat16)
    np.testing.assert_array_equal(Xla().attend_chunk(q, k, v, 40, None), attend_cached(q, k, v, 40))


def test_a_library_that_fails_is_not_used():
    """There is no cuDNN here: the check says so, once, and the caller goes on with XLA."""
    registry.proved.cache_clear()
    with pytest.warns(RuntimeWarning, match="plain XLA runs instead"):
        assert not registry.proved(cudnn.agrees, 64, 2, "bfloat16")
    registry.proved.cache_clear()


def test_the_check_of_a_library_that_works():
    assert cudnn._largest_error(16, 2, "float32", implementation="xla") < 1e-5
