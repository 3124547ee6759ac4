"""Numbers in few bits: rotated, rounded to one step a row, packed into bytes, and back.

A row of H numbers is turned by a fixed orthogonal matrix, so that no dimension stands out, and rounded to
(c − (2^b − 1)/2)·step with c = 0 … 2^b − 1: for one bit that is a sign and a length. Byte i of a row holds dimensions
i, i + n, i + 2n, … of H filled up to a multiple of 8, so that unpacking gives runs of neighbours. The rounded numbers
are *the* numbers: calibration, look-up and every backend score the same.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

BITS = (1, 2, 4, 8)
SHRINKS = (1.0, 0.85, 0.7, 0.55, 0.42)  # steps tried, as parts of that which just holds the largest number

FEW_ROWS = 16  # up to so many, `dots` is bound by unpacking, not by products
FINER = 254.0  # what rounding to a byte leaves, at most half a unit, fills a byte again


class Codes(NamedTuple):
    """Rows of numbers in few bits."""

    packed: jax.Array  # u8[… bits·⌈H/8⌉]
    steps: jax.Array  # bf16[…]


@functools.cache
def rotation(H: int) -> np.ndarray:
    """The orthogonal matrix f32[H H] by which rows are turned: signs, then Hadamard blocks of the largest size."""
    size = H & -H
    block = np.ones((1, 1), np.float32)
    while len(block) < size:
        block = np.block([[block, block], [block, -block]])
    signs = np.where(np.random.default_rng(0).integers(0, 2, H), 1, -1).astype(np.float32)
    # Blocks take every H/size-th dimension, so that neighbours are mixed also where H is no power of two.
    return (np.kron(block, np.eye(H // size, dtype=np.float32)) / np.sqrt(np.float32(size)) * signs[None, :]).astype(
        np.float32
    )


def rotate(x):
    """x […H] in the turned space, float32."""
    turn = rotation(x.shape[-1])
    return jnp.einsum("...H,hH->...h", x.astype(jnp.float32), turn, precision=jax.lax.Precision.HIGHEST)


def rotate_back(x):
    """The inverse of `rotate`."""
    turn = rotation(x.shape[-1])
    return jnp.einsum("...h,hH->...H", x.astype(jnp.float32), turn, precision=jax.lax.Precision.HIGHEST)


def encode(x, bits: int) -> Codes:
    """Rounds rows x f32[… H], already turned, to `bits` bits; of the steps tried, the one with the least error."""
    most = 2**bits - 1
    top = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    tiny = jnp.finfo(jnp.float32).tiny
    round_to = lambda step: jnp.clip(jnp.round(x / jnp.maximum(step, tiny) + most / 2), 0, most)
    best, least = None, None
    for shrink in SHRINKS if 1 < bits < 8 else (1.0,):
        levels = round_to(2 * top * shrink / most) - most / 2
        # The step that fits these levels best, as it will be stored.
        square = jnp.sum(levels * levels, axis=-1, keepdims=True)
        step = (jnp.sum(x * levels, axis=-1, keepdims=True) / jnp.maximum(square, tiny)).astype(jnp.bfloat16)
        step = step.astype(jnp.float32)
        error = jnp.sum((round_to(step) * step - most / 2 * step - x) ** 2, axis=-1, keepdims=True)
        best = step if best is None else jnp.where(error < least, step, best)
        least = error if least is None else jnp.minimum(error, least)
    return Codes(_pack(round_to(best).astype(jnp.uint8), bits), best[..., 0].astype(jnp.bfloat16))


def decode(codes: Codes, H: int):
    """The rounded rows f32[… H], in the turned space."""
    return unpack(codes.packed, H) * codes.steps.astype(jnp.float32)[..., None]


def dots(packed, rows):
    """rows f32[… M H] · the levels of packed u8[… J bits·⌈H/8⌉] -> f32[… M J], in units of each packed row's step."""
    M, H = rows.shape[-2:]
    by_floats = lambda packed, rows: jnp.einsum(
        "...MH,...JH->...MJ", rows, unpack(packed, H), precision=jax.lax.Precision.HIGHEST
    )
    if M > FEW_ROWS:
        return by_floats(packed, rows)
    on_cpu = by_floats if packed.shape[-1] % 4 else _dots_by_integers
    return jax.lax.platform_dependent(packed, rows, cpu=on_cpu, default=_dots_by_sums)


def _dots_by_sums(packed, rows):
    """`dots` as a sum over unpacked levels: XLA's GPU backend writes levels down before a product, not inside a sum."""
    size, H = packed.shape[-1], rows.shape[-1]
    bits = size // -(-H // 8)
    # Each level is moved to the highest bits by a factor: XLA makes a range of shifts by a kernel of its own.
    top = 8 - bits
    factors = np.array([2 ** (top - shift) for shift in range(0, 8, bits)], np.int32)
    levels = packed.astype(jnp.int32)[..., None, :] * factors.reshape((1,) * (packed.ndim - 1) + (-1, 1))
    levels = (levels & ((2**bits - 1) << top)).astype(jnp.float32) / 2**top - (2**bits - 1) / 2  # [… J 8/bits size]
    padding = [(0, 0)] * (rows.ndim - 1) + [(0, size * 8 // bits - H)]
    rows = jnp.pad(rows, padding).reshape(*rows.shape[:-1], 8 // bits, size)
    # Rows last: what is gathered once serves all of them.
    found = jnp.sum(levels[..., :, None, :, :] * rows[..., None, :, :, :], axis=(-2, -1))  # [… J M]
    return jnp.swapaxes(found, -1, -2)


def _dots_by_integers(packed, rows):
    """`dots` with levels as bytes and rows in fixed point: four times as fast as floats in XLA on a CPU."""
    size, H = packed.shape[-1], rows.shape[-1]
    bits = size // -(-H // 8)
    # Four bytes at once: XLA's loops over 32-bit words fill vector registers, those over bytes do not.
    words = jax.lax.bitcast_convert_type(packed.reshape(*packed.shape[:-1], size // 4, 4), jnp.uint32)
    shifts = jnp.arange(0, 8, bits, dtype=jnp.uint32).reshape((1,) * (words.ndim - 1) + (-1, 1))
    levels = (words[..., None, :] >> shifts) & jnp.uint32((2**bits - 1) * 0x01010101)
    lowest = 0
    if bits == 8:  # as signed bytes, which begin at −128
        levels, lowest = levels ^ jnp.uint32(0x80808080), -128
    levels = jax.lax.bitcast_convert_type(levels, jnp.int8).reshape(*packed.shape[:-1], -1)
    padding = [(0, 0)] * (rows.ndim - 1) + [(0, levels.shape[-1] - H)]
    pieces, unit = _fixed_point(jnp.pad(rows, padding))
    found = jnp.einsum("...MH,...JH->...MJ", pieces, levels, preferred_element_type=jnp.int32).astype(jnp.float32)
    high, middle, low = jnp.split(found, 3, axis=-2)
    total = (high + (middle + low / FINER) / FINER) * unit
    return total - ((2**bits - 1) / 2 + lowest) * jnp.sum(rows, axis=-1, keepdims=True)


def _fixed_point(rows):
    """rows f32[… M H] as integers: (i8[… 3·M H], each third counting in units 254 times finer, unit f32[… M 1])."""
    unit = jnp.maximum(jnp.max(jnp.abs(rows), axis=-1, keepdims=True) / 127, jnp.finfo(jnp.float32).tiny)
    rest, pieces = rows / unit, []
    for _ in range(3):
        pieces.append(jnp.round(rest))
        rest = (rest - pieces[-1]) * FINER
    return jnp.concatenate(pieces, axis=-2).astype(jnp.int8), unit


def unpack(packed, H: int):
    """Levels f32[… H] of packed u8[… bits·⌈H/8⌉], in units of a row's step."""
    size = packed.shape[-1]
    bits = size // -(-H // 8)
    # In 32 bits and as one broadcast: six times as fast as bytes and a concatenation, in XLA on a CPU.
    shifts = jnp.arange(0, 8, bits, dtype=jnp.int32)
    parts = packed.astype(jnp.int32)[..., None, :] >> shifts.reshape((1,) * (packed.ndim - 1) + (-1, 1))
    levels = (parts & (2**bits - 1)).astype(jnp.float32) - (2**bits - 1) / 2
    return levels.reshape(*packed.shape[:-1], -1)[..., :H]


def _pack(levels, bits: int):
    """u8[… H] of 0 … 2^bits − 1 -> u8[… bits·⌈H/8⌉]."""
    H = levels.shape[-1]
    size = bits * -(-H // 8)
    levels = jnp.pad(levels, [(0, 0)] * (levels.ndim - 1) + [(0, size * (8 // bits) - H)])
    parts = levels.reshape(*levels.shape[:-1], 8 // bits, size)
    packed = jnp.zeros((*parts.shape[:-2], size), jnp.uint8)
    for i in range(8 // bits):
        packed |= jax.lax.shift_left(parts[..., i, :], jnp.uint8(i * bits))
    return packed


def bytes_of(H: int, bits: int) -> int:
    """Bytes of a row of H numbers, its step included; 16 and 32 bits are plain floating point."""
    return H * bits // 8 if bits > 8 else bits * -(-H // 8) + 2
