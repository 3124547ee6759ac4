"""Keys and values of the fixed context as one object, as the model gave them or in 8 bits.

In 8 bits a row is H whole numbers from −127 to 127 and one scale, what a step of them is worth. The rounded numbers are
*the* numbers: attention is exact over them, and calibration and explanations read the same ones.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

MOST = 127  # the largest whole number; −128 is not used, so that both signs reach equally far


@functools.partial(jax.tree_util.register_dataclass)
@dataclasses.dataclass(frozen=True)
class KeysValues:
    """Keys and values, row by row: the clustered ones, or those that are always read."""

    keys: jax.Array  # [… R H], after RoPE, floating point or i8; leading axes L K in a tree, K in one of its layers
    values: jax.Array  # [… R H]
    key_scales: jax.Array | None = None  # bf16[… R], by which rows of i8 are multiplied; None for floating point
    value_scales: jax.Array | None = None  # bf16[… R]

    def wide(self) -> "KeysValues":
        """The numbers that are meant, in float32, without scales: for a part of a cache at a time, never for all."""
        return KeysValues(_widen(self.keys, self.key_scales), _widen(self.values, self.value_scales))


def in_8_bits(rows: KeysValues) -> KeysValues:
    """Rows in floating point, rounded to 8 bits."""
    keys, key_scales = _round(rows.keys)
    values, value_scales = _round(rows.values)
    return KeysValues(keys, values, key_scales, value_scales)


def _round(x):
    """(i8[… R H], bf16[… R]) of x [… R H]."""
    x = x.astype(jnp.float32)
    # Rounded before it is used: the scale is the one that is stored.
    scales = (jnp.max(jnp.abs(x), axis=-1) / MOST).astype(jnp.bfloat16)
    step = jnp.maximum(scales.astype(jnp.float32), jnp.finfo(jnp.float32).tiny)[..., None]  # a row of zeros stays one
    return jnp.clip(jnp.round(x / step), -MOST, MOST).astype(jnp.int8), scales


def _widen(x, scales):
    x = x.astype(jnp.float32)
    return x if scales is None else x * scales.astype(jnp.float32)[..., None]
