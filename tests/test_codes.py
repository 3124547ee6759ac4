"""Numbers in few bits: what comes back, how far it may lie off, and every byte where the description says."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from squeezejax.pallas_kernels import codes

SIZES = range(1, 41)
encode = jax.jit(codes.encode, static_argnums=1)


def rows_of(H, seed=0, num_rows=24):
    """Rows f32[n H] of very different lengths, one of zeros."""
    rng = np.random.default_rng([seed, H])
    rows = rng.normal(size=(num_rows, H)) * 10.0 ** rng.uniform(-4, 4, (num_rows, 1))
    rows[0] = 0
    return rows.astype(np.float32)


@pytest.mark.parametrize("bits", codes.BITS)
@pytest.mark.parametrize("H", SIZES)
def test_what_is_packed_comes_back(H, bits):
    """Rows that are steps of a code exactly: the codes are those, by hand, and the rows come back bit for bit."""
    rng = np.random.default_rng([H, bits])
    most = 2**bits - 1
    levels = rng.integers(0, most + 1, (5, H))
    packed = codes._pack(jnp.asarray(levels, jnp.uint8), bits)
    assert packed.shape == (5, bits * -(-H // 8))
    assert packed.dtype == jnp.uint8
    np.testing.assert_array_equal(oracle.unpack(packed, bits, H), levels)
    np.testing.assert_array_equal(codes.unpack(packed, H), levels - most / 2)


@pytest.mark.parametrize("bits", codes.BITS)
@pytest.mark.parametrize("H", SIZES)
def test_rounding_is_as_near_as_the_step_allows(H, bits):
    """No number lies further than half a step from its own, unless the scale was cut below it; nor are rows worse
    than with the step that just holds the largest number."""
    rows = rows_of(H)
    found = encode(rows, bits)
    assert found.steps.dtype == jnp.bfloat16
    assert found.packed.nbytes + found.steps.nbytes == len(rows) * codes.bytes_of(H, bits)
    steps = np.float64(np.float32(found.steps))[:, None]
    numbers = oracle.decode(found.packed, found.steps, bits, H)
    np.testing.assert_allclose(codes.decode(found, H), numbers, rtol=1e-6)
    assert not numbers[0].any()
    top = (2**bits - 1) / 2
    x = np.float64(rows)
    inside = np.abs(x) <= steps * (top + 0.5)
    assert np.all(np.abs(numbers - x)[inside] <= (0.5 * steps * np.ones_like(x))[inside] * (1 + 1e-5))
    # Beyond the scale: the outermost level.
    np.testing.assert_allclose(np.abs(numbers)[~inside], (top * steps * np.ones_like(x))[~inside], rtol=1e-6)
    if bits > 1:
        largest = np.abs(x).max(axis=1, keepdims=True)
        step = np.where(largest > 0, largest / top, 1)
        plain = (np.clip(np.round(x / step + top), 0, 2 * top) - top) * step
        error, plain_error = (np.sum((y - x) ** 2, axis=1) for y in (numbers, plain))
        # A step in bfloat16 lies 2^-9 off at most.
        assert np.all(error <= plain_error + (2.0**-8 * np.linalg.norm(x, axis=1)) ** 2 + 1e-30)


@pytest.mark.parametrize("H", SIZES)
def test_one_bit_is_a_sign_and_a_length(H):
    rows = rows_of(H)
    numbers = np.float64(codes.decode(encode(rows, 1), H))
    length = np.abs(rows.astype(np.float64)).mean(axis=1, keepdims=True)  # what fits best
    np.testing.assert_allclose(np.abs(numbers), length * np.ones_like(rows), rtol=2.0**-8)
    np.testing.assert_array_equal(np.sign(numbers[1:]), np.sign(rows[1:]))


@pytest.mark.parametrize(("bits", "most"), [(8, 0.006), (4, 0.11), (2, 0.37), (1, 0.62)])
def test_errors_of_normal_numbers(bits, most):
    """Root mean square, as a part of the rows' own."""
    rows = np.random.default_rng(0).normal(size=(2000, 64)).astype(np.float32)
    error = np.float64(codes.decode(encode(rows, bits), 64)) - rows
    assert most / 2 < np.sqrt(np.mean(error**2)) < most


@pytest.mark.parametrize("H", SIZES)
def test_turning_is_orthogonal_and_spreads_one_dimension(H):
    turn = codes.rotation(H)
    np.testing.assert_allclose(turn, oracle.rotation(H), atol=1e-7)
    np.testing.assert_allclose(turn.astype(np.float64) @ turn.T, np.eye(H), atol=1e-6)
    size = H & -H
    assert np.all(np.sum(np.abs(turn) > 1e-9, axis=0) == size)
    rows = np.random.default_rng(H).normal(size=(3, H)).astype(np.float32)
    np.testing.assert_allclose(codes.rotate(rows), rows @ oracle.rotation(H).T, atol=1e-5)
    np.testing.assert_allclose(codes.rotate_back(codes.rotate(rows)), rows, atol=1e-5)


def test_by_hand():
    """Four dimensions in two bits: two bytes, byte i with dimensions i, i + 2, …, the first in the lowest bits."""
    rows = np.array([[-1.5, -0.5, 0.5, 1.5], [3.0, 3.0, -1.0, -3.0]], np.float32)
    found = codes.encode(rows, 2)
    np.testing.assert_array_equal(found.steps.astype(jnp.float32), [1.0, 2.0])
    np.testing.assert_array_equal(found.packed, [[0b1000, 0b1101], [0b0111, 0b0011]])
    np.testing.assert_array_equal(codes.decode(found, 4), rows)
    # Eight signs in a byte.
    np.testing.assert_array_equal(codes.encode(np.float32([[1, -1, 1, 1, -1, -1, -1, 1]]), 1).packed, [[0b10001101]])
    assert (codes.bytes_of(64, 2), codes.bytes_of(64, 4), codes.bytes_of(64, 16), codes.bytes_of(64, 32)) == (
        18,
        34,
        128,
        256,
    )


@pytest.mark.parametrize("bits", codes.BITS)
def test_codes_are_the_same_under_jit_and_vmap(bits):
    rows = rows_of(24)
    one, many = encode(rows, bits), jax.vmap(lambda row: codes.encode(row, bits))(rows)
    np.testing.assert_array_equal(oracle.decode(*one, bits, 24), oracle.decode(*many, bits, 24))


@pytest.mark.parametrize("num_rows", [1, 4, codes.FEW_ROWS, codes.FEW_ROWS + 1])
@pytest.mark.parametrize("bits", codes.BITS)
@pytest.mark.parametrize("H", [12, 32, 72, 128])
def test_products_with_levels_are_as_exact_as_floats(H, bits, num_rows):
    """By integers or not, and also for rows that are zero, tiny or huge."""
    rng = np.random.default_rng([H, bits, num_rows])
    levels = rng.integers(0, 2**bits, (3, 17, H))
    packed = codes._pack(jnp.asarray(levels, jnp.uint8), bits)
    rows = rng.normal(size=(3, num_rows, H)) * 10.0 ** rng.uniform(-30, 30, (3, num_rows, 1))
    rows[0, 0] = 0
    rows = rows.astype(np.float32)
    found = jax.jit(codes.dots)(packed, rows)
    exact = np.einsum("UMH,UJH->UMJ", np.float64(rows), levels - (2**bits - 1) / 2)
    # What H products of numbers up to these may come to, in float32.
    largest = np.abs(np.float64(rows)).max(axis=2)[:, :, None] * 2**bits * H
    assert np.all(np.abs(found - exact) <= 2e-7 * largest)


def test_few_rows_are_multiplied_as_bytes_on_a_cpu():
    """The fast path is there: the compiled program multiplies bytes, and for many rows it does not."""
    text = lambda num_rows: (
        jax.jit(codes.dots).lower(jnp.zeros((64, 32), jnp.uint8), jnp.zeros((num_rows, 128), jnp.float32)).as_text()
    )
    assert "xi8>" in text(codes.FEW_ROWS)
    assert "xi8>" not in text(codes.FEW_ROWS + 1).replace("xui8>", "")
