"""Writes a trained model as a Hugging Face checkpoint directory: config.json, model.safetensors and the tokenizer."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save as serialize

from benchmarks.embedded import tokenizer
from squeezejax.models import Llama, LlamaConfig


def round_weights(params: Llama) -> Llama:
    """The weights as bfloat16 stores them, in float32 again: what a reader of the checkpoint computes with."""
    return jax.tree.map(lambda weight: weight.astype(jnp.bfloat16).astype(jnp.float32), params)


def config_json(config: LlamaConfig, bos: int, eos: int) -> dict:
    """config.json as transformers writes it for LlamaForCausalLM (the rope in the forms of versions 4 and 5)."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": config.vocab_size,
        "hidden_size": config.model_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_theta": config.rope.theta, "rope_type": "default"},
        "rope_theta": config.rope.theta,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": True,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": eos,
        "initializer_range": 0.02,
        "pretraining_tp": 1,
        "use_cache": True,
    }


def tensors(params: Llama) -> dict[str, np.ndarray]:
    """The weights under their Hugging Face names, bfloat16; heads and their dimensions become one axis."""
    config, layers = params.config, params.layers
    D, L = config.model_dim, config.num_layers
    attention, mlp = layers.attention, layers.mlp
    stacked = {
        "self_attn.q_proj": attention.query[...].reshape(L, -1, D),
        "self_attn.k_proj": attention.key[...].reshape(L, -1, D),
        "self_attn.v_proj": attention.value[...].reshape(L, -1, D),
        "self_attn.o_proj": attention.output[...].reshape(L, D, -1),
        "mlp.gate_proj": mlp.gate[...],
        "mlp.up_proj": mlp.up[...],
        "mlp.down_proj": mlp.down[...],
        "input_layernorm": layers.attention_norm[...],
        "post_attention_layernorm": layers.mlp_norm[...],
    }
    named = {f"model.layers.{i}.{name}.weight": weight[i] for name, weight in stacked.items() for i in range(L)}
    named["model.embed_tokens.weight"] = params.embedding[...]
    named["model.norm.weight"] = params.final_norm[...]
    return {name: np.asarray(weight.astype(jnp.bfloat16)) for name, weight in sorted(named.items())}


def save(directory: Path, params: Llama, bos: int, eos: int) -> None:
    """Writes the whole checkpoint directory.

    Raises ValueError for a model with an output matrix of its own or with biases: the embedded model has neither.
    """
    config = params.config
    if not config.tie_embeddings or config.qkv_bias or config.output_bias or config.mlp_bias or config.qk_norm:
        raise ValueError("only a plain Llama with tied embeddings is written")
    tokenizer.save(directory)
    text = json.dumps(config_json(config, bos, eos), indent=2) + "\n"
    (directory / "config.json").write_text(text, encoding="utf-8")
    (directory / "model.safetensors").write_bytes(serialize(tensors(params), metadata={"format": "pt"}))
