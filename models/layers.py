"""The pieces of a decoder layer that hold no weights: RMS norm and rotary position embeddings."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from squeezejax.models.config import RopeConfig


def rms_norm(x, scale, eps: float):
    """x [... D] divided by its root mean square and scaled; statistics in float32 whatever the dtype of x."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype) * jnp.broadcast_to(scale, x.shape)


def project(x, weight, bias=None, *, dtype=None):
    """x [B T D] times weight [… D] over D, plus bias […]: [B T …] in `dtype` (default x's), accumulated in float32."""
    # As a matrix: with more axes XLA's CPU backend transposes the whole weight before every product.
    rows = weight.reshape(-1, weight.shape[-1])
    out = jnp.einsum("BTD,OD->BTO", x, rows, preferred_element_type=jnp.float32)
    out = out.reshape(*x.shape[:2], *weight.shape[:-1]).astype(dtype or x.dtype)
    return out if bias is None else out + bias[None, None]


def rope_frequencies(config: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Angular frequency of each pair of dimensions f32[H/2], and the factor that multiplies cosine and sine.

    Kinds: `default` (Su et al., arXiv 2104.09864), `linear` (position interpolation, arXiv 2306.15595),
    `llama3` (Llama 3.1's wavelength-dependent stretch), `yarn` (arXiv 2309.00071).
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain = (1.0 / np.float32(config.theta) ** exponents).astype(np.float32)
    match config.kind:
        case "default":
            return plain, 1.0
        case "linear":
            return plain / np.float32(config.factor), 1.0
        case "llama3":
            return _llama3_frequencies(config, plain), 1.0
        case _:
            return _yarn_frequencies(config, plain, head_dim), _yarn_attention_factor(config)


def _llama3_frequencies(config: RopeConfig, plain: np.ndarray) -> np.ndarray:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended linearly in 1/wavelength."""
    turns = config.original_max_positions * plain / (2 * math.pi)  # rotations within the original context
    keep = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return (plain * (keep + (1 - keep) / config.factor)).astype(np.float32)


def _yarn_frequencies(config: RopeConfig, plain: np.ndarray, head_dim: int) -> np.ndarray:
    """Dimensions that turn often keep their frequency, those that turn rarely are stretched, a ramp joins the two."""

    def dimension_of(turns):
        wavelengths = config.original_max_positions / (turns * 2 * math.pi)
        return head_dim * math.log(wavelengths) / (2 * math.log(config.theta))

    low, high = dimension_of(config.beta_fast), dimension_of(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a ramp of no width would divide by zero
    stretched = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0.0, 1.0)
    return (plain * (1 - stretched) + plain / config.factor * stretched).astype(np.float32)


def _yarn_attention_factor(config: RopeConfig) -> float:
    if config.attention_factor is not None:
        return config.attention_factor

    def temperature(scale):
        return 1.0 if config.factor <= 1 else 0.1 * scale * math.log(config.factor) + 1.0

    if config.mscale and config.mscale_all_dim:
        return temperature(config.mscale) / temperature(config.mscale_all_dim)
    return temperature(1.0)


def rope_tables(config: RopeConfig, head_dim: int, positions):
    """cos, sin f32[B T H/2] of the tokens at `positions` i32[B T]."""
    frequencies, factor = rope_frequencies(config, head_dim)
    angles = positions[..., None].astype(jnp.float32) * frequencies[None, None, :]
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def apply_rope(x, cos, sin):
    """Rotates x [B T N H]; dimension i is paired with i + H/2, as in Hugging Face checkpoints."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
