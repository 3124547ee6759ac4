"""A Llama-family decoder whose attention is a function argument, so that dense and squeezed caches thread through it.

Flax NNX serves as a typed pytree only: every weight is an `nnx.Param` set in `__init__`, the configuration is static,
layers are stacked along a leading axis L, and nothing but `jax.*` transforms touches the module.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.pytreelib import PytreeState
from flax.typing import HashableMapping

from squeezejax.models.config import LlamaConfig, RopeConfig
from squeezejax.models.layers import apply_rope, project, rms_norm, rope_frequencies, rope_tables
from squeezejax.pallas_kernels.xla.dense import causal_attention
from squeezejax.storage import exporting

# attend(carry, layer, q [B T N H], k [B T K H], v [B T K H]) -> (carry, out [B T N H]); q and k are after RoPE.
Attend = Callable[[Any, jax.Array, jax.Array, jax.Array, jax.Array], tuple[Any, jax.Array]]


class Attention(nnx.Module):
    """The projections around attention; weights lie as in Hugging Face checkpoints, output axes first."""

    def __init__(self, config: LlamaConfig, key, dtype):
        D, N, K, H = config.model_dim, config.num_heads, config.num_kv_heads, config.head_dim
        keys = jax.random.split(key, 4)
        self.eps = config.norm_eps
        self.query = _random(keys[0], (N, H, D), D, dtype)
        self.key = _random(keys[1], (K, H, D), D, dtype)
        self.value = _random(keys[2], (K, H, D), D, dtype)
        self.output = _random(keys[3], (D, N, H), N * H * 2 * config.num_layers, dtype)
        self.query_bias = _zeros((N, H), dtype) if config.qkv_bias else None
        self.key_bias = _zeros((K, H), dtype) if config.qkv_bias else None
        self.value_bias = _zeros((K, H), dtype) if config.qkv_bias else None
        self.output_bias = _zeros((D,), dtype) if config.output_bias else None
        self.query_norm = _ones((H,), dtype) if config.qk_norm else None
        self.key_norm = _ones((H,), dtype) if config.qk_norm else None

    def project(self, x, cos, sin):
        """x [B T D] -> q [B T N H], k [B T K H], v [B T K H], q and k after RoPE."""
        q = project(x, self.query[...], _array(self.query_bias))
        k = project(x, self.key[...], _array(self.key_bias))
        v = project(x, self.value[...], _array(self.value_bias))
        if self.query_norm is not None:
            q, k = rms_norm(q, self.query_norm[...], self.eps), rms_norm(k, self.key_norm[...], self.eps)
        return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v

    def merge_heads(self, out):
        """out [B T N H] -> [B T D]."""
        D = self.output.shape[0]
        return project(out.reshape(*out.shape[:2], -1), self.output[...].reshape(D, -1), _array(self.output_bias))


class Mlp(nnx.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)); F is the hidden width."""

    def __init__(self, config: LlamaConfig, key, dtype):
        D, F = config.model_dim, config.mlp_dim
        keys = jax.random.split(key, 3)
        self.gate = _random(keys[0], (F, D), D, dtype)
        self.up = _random(keys[1], (F, D), D, dtype)
        self.down = _random(keys[2], (D, F), F * 2 * config.num_layers, dtype)
        self.gate_bias = _zeros((F,), dtype) if config.mlp_bias else None
        self.up_bias = _zeros((F,), dtype) if config.mlp_bias else None
        self.down_bias = _zeros((D,), dtype) if config.mlp_bias else None

    def __call__(self, x):
        """x [B T D] -> [B T D]."""
        gate = project(x, self.gate[...], _array(self.gate_bias))
        up = project(x, self.up[...], _array(self.up_bias))
        return project(jax.nn.silu(gate) * up, self.down[...], _array(self.down_bias))


class Layer(nnx.Module):
    """One decoder layer: attention and MLP, each behind an RMS norm and added to the residual."""

    def __init__(self, config: LlamaConfig, key, dtype):
        attention_key, mlp_key = jax.random.split(key)
        self.eps = config.norm_eps
        self.attention_norm = _ones((config.model_dim,), dtype)
        self.attention = Attention(config, attention_key, dtype)
        self.mlp_norm = _ones((config.model_dim,), dtype)
        self.mlp = Mlp(config, mlp_key, dtype)

    def __call__(self, x, cos, sin, attend):
        """x [B T D] -> (x, carry), where attend(q, k, v) -> (carry, out)."""
        q, k, v = self.attention.project(rms_norm(x, self.attention_norm[...], self.eps), cos, sin)
        with jax.named_scope("attention"):
            carry, out = attend(q, k, v)
        x = x + self.attention.merge_heads(out.astype(x.dtype))
        return x + self.mlp(rms_norm(x, self.mlp_norm[...], self.eps)), carry


class Llama(nnx.Module):
    """A pytree of weights with its configuration as static metadata; what the public API calls `params`.

    `Llama(config, key=key)` gives random weights; `squeezejax.models.load` those of a checkpoint.
    """

    # Axes by attribute path, F = the MLP's width; what `squeezejax.shardings` splits weights by.
    AXES: ClassVar[dict[str, str]] = {
        "embedding": "VD",
        "final_norm": "D",
        "head": "VD",
        "layers.attention_norm": "LD",
        "layers.attention.query": "LNHD",
        "layers.attention.key": "LKHD",
        "layers.attention.value": "LKHD",
        "layers.attention.output": "LDNH",
        "layers.attention.query_bias": "LNH",
        "layers.attention.key_bias": "LKH",
        "layers.attention.value_bias": "LKH",
        "layers.attention.output_bias": "LD",
        "layers.attention.query_norm": "LH",
        "layers.attention.key_norm": "LH",
        "layers.mlp_norm": "LD",
        "layers.mlp.gate": "LFD",
        "layers.mlp.up": "LFD",
        "layers.mlp.down": "LDF",
        "layers.mlp.gate_bias": "LF",
        "layers.mlp.up_bias": "LF",
        "layers.mlp.down_bias": "LD",
    }

    def __init__(self, config: LlamaConfig, *, key, dtype=jnp.float32):
        embed_key, head_key, layers_key = jax.random.split(key, 3)
        V, D = config.vocab_size, config.model_dim
        self.config = config
        self.embedding = _random(embed_key, (V, D), D, dtype)
        self.layers = jax.vmap(lambda k: Layer(config, k, dtype))(jax.random.split(layers_key, config.num_layers))
        self.final_norm = _ones((D,), dtype)
        self.head = None if config.tie_embeddings else _random(head_key, (V, D), D, dtype)

    def key_frequencies(self):
        """How fast RoPE turns each dimension of a key, f32[H] in radians a token."""
        frequencies, _ = rope_frequencies(self.config.rope, self.config.head_dim)
        return np.concatenate([frequencies, frequencies])

    def embed(self, tokens):
        """tokens i32[B T] -> x [B T D]."""
        return self.embedding[...][tokens]

    def layer(self, index) -> Layer:
        """The weights of one layer."""
        return jax.tree.map(lambda weight: weight[index], self.layers)

    def apply_layer(self, layer: Layer, x, positions, attend):
        """Runs one layer on x [B T D] at `positions` i32[B T]; attend(q, k, v) -> (carry, out) -> (x, carry)."""
        cos, sin = rope_tables(self.config.rope, self.config.head_dim, positions)
        return layer(x, cos, sin, attend)

    def run_layers(self, x, positions, attend: Attend, carry):
        """All layers in turn over x [B T D], the carry going through every layer's `attend` -> (x, carry)."""
        cos, sin = rope_tables(self.config.rope, self.config.head_dim, positions)

        def step(state, inputs):
            (x, carry), (layer, index) = state, inputs
            return layer(x, cos, sin, lambda q, k, v: attend(carry, index, q, k, v)), None

        (x, carry), _ = jax.lax.scan(step, (x, carry), (self.layers, jnp.arange(self.config.num_layers)))
        return x, carry

    def unembed(self, x):
        """x [B T D] -> logits f32[B T V]."""
        weights = self.embedding if self.head is None else self.head
        x = rms_norm(x, self.final_norm[...], self.config.norm_eps)
        return project(x, weights[...], dtype=jnp.float32)


# Every kind of node in a Llama's pytree and of value in its static fields; the last of each are Flax's own.
exporting.register_static(LlamaConfig, RopeConfig, HashableMapping)
exporting.register_nodes(Llama, Layer, Attention, Mlp, nnx.Param, PytreeState)


@jax.jit
def _logits(params: Llama, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    attend = lambda carry, layer, q, k, v: (carry, causal_attention(q, k, v))
    x, _ = params.run_layers(params.embed(tokens), positions, attend, None)
    return params.unembed(x)


def logits(params: Llama, tokens) -> jax.Array:
    """Next-token logits f32[B T V] of tokens i32[B T] by a plain dense causal forward pass, with no cache.

    Raises ValueError for tokens that are not a matrix of ids, or are none at all.
    """
    tokens = jnp.asarray(tokens)
    if tokens.ndim != 2 or not tokens.size or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers [B T], at least one, got {tokens.dtype}{list(tokens.shape)}")
    return _logits(params, tokens)


def _random(key, shape, fan_in, dtype):
    return nnx.Param((jax.random.normal(key, shape, jnp.float32) / math.sqrt(fan_in)).astype(dtype))


def _zeros(shape, dtype):
    return nnx.Param(jnp.zeros(shape, dtype))


def _ones(shape, dtype):
    return nnx.Param(jnp.ones(shape, dtype))


def _array(parameter):
    """The array of a parameter that may be absent."""
    return None if parameter is None else parameter[...]
