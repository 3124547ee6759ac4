"""The decoder against transformers' own PyTorch code, and its manners as a pytree."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_models import make_config, make_model
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from squeezejax.models import Llama, LlamaConfig, RopeConfig, load, logits
from squeezejax.models.config import parse_config
from squeezejax.models.layers import rope_frequencies

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}

# name -> family and what differs from torch_models.SIZES
MODELS = {
    "llama": ("llama", {}),
    "llama-attention-bias": ("llama", {"attention_bias": True}),
    "llama-mlp-bias": ("llama", {"mlp_bias": True}),
    "llama-every-bias-tied": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama-wide-heads": ("llama", {"head_dim": 20}),
    "llama-no-groups": ("llama", {"num_key_value_heads": 4}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1, "rms_norm_eps": 1e-2}),
    "llama-theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 321.0}}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-yarn-mscale": ("llama", {"rope_parameters": {**YARN, "mscale": 1.5, "mscale_all_dim": 0.5}}),
    "mistral": ("mistral", {}),
    "mistral-narrow-heads": ("mistral", {"head_dim": 6}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied-yarn": ("qwen2", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen3": ("qwen3", {}),
    "qwen3-bias-wide-heads": ("qwen3", {"attention_bias": True, "head_dim": 16, "tie_word_embeddings": True}),
}
PROMPT, NEW = 90, 20


@pytest.mark.parametrize("name", MODELS)
def test_parity(name, tmp_path):
    family, changes = MODELS[name]
    model = make_model(family, seed=len(name), **changes)
    model.save_pretrained(tmp_path)
    params = load(tmp_path)
    tokens = np.random.default_rng(0).integers(0, params.config.vocab_size, (2, PROMPT + NEW), dtype=np.int32)
    expected = model(torch.tensor(tokens)).logits.numpy()
    assert np.abs(expected).max() > 3  # or else 1e-4 would say little
    np.testing.assert_allclose(logits(params, tokens), expected, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(greedy_jax(params, tokens), greedy_torch(model, tokens))


def greedy_jax(params, tokens):
    tokens = tokens.copy()
    for end in range(PROMPT, PROMPT + NEW):  # tokens past the end are there, but causality hides them
        tokens[:, end] = np.argmax(logits(params, tokens)[:, end - 1], axis=-1)
    return tokens[:, PROMPT:]


def greedy_torch(model, tokens):
    prompt = torch.tensor(tokens[:, :PROMPT])
    model.generation_config.eos_token_id = None
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, do_sample=False)
    return out[:, PROMPT:].numpy()


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    "llama3": {**LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": 8192},
    "llama3-original-left-out": {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"},
    "yarn": {**YARN, "original_max_position_embeddings": 4096},
    "yarn-original-left-out": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0},
    "yarn-attention-factor": {**YARN, "attention_factor": 1.7},
    "yarn-mscale": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.2},
    "yarn-mscale-alone": {**YARN, "mscale": 0.707},
    "yarn-betas": {**YARN, "original_max_position_embeddings": 2048, "beta_fast": 16, "beta_slow": 2.5},
    "yarn-no-truncation": {**YARN, "original_max_position_embeddings": 2048, "truncate": False},
    "yarn-factor-one": {**YARN, "factor": 1.0},
    "yarn-factor-null": {**YARN, "factor": None, "original_max_position_embeddings": 512},
    "yarn-no-ramp": {**YARN, "original_max_position_embeddings": 2},
}


@pytest.mark.parametrize("head_dim", [6, 64, 128])
@pytest.mark.parametrize("name", ROPES)
def test_rope_frequencies(name, head_dim):
    config = make_config("llama", head_dim=head_dim, max_position_embeddings=2048)
    raw = {**config.to_dict(), "rope_parameters": dict(ROPES[name])}
    ours, our_factor = rope_frequencies(parse_config(raw).rope, head_dim)
    config.rope_parameters = dict(ROPES[name])
    if name == "default":
        expected, factor = 1.0 / 1e6 ** (torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim), 1.0
    else:
        expected, factor = ROPE_INIT_FUNCTIONS[ROPES[name]["rope_type"]](config)
    chex.assert_type(ours, np.float32)
    np.testing.assert_allclose(ours, expected.numpy(), rtol=5e-7, atol=0)
    assert our_factor == pytest.approx(factor, rel=1e-12)


def test_rope_default_by_hand():
    frequencies, factor = rope_frequencies(RopeConfig(theta=100.0), 4)
    np.testing.assert_allclose(frequencies, [1.0, 0.1], rtol=1e-7)
    assert factor == 1.0


@pytest.fixture(scope="module")
def params():
    config = LlamaConfig(
        vocab_size=50, model_dim=16, mlp_dim=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, qkv_bias=True
    )
    # This generator compiles several times faster than the default one, and no number here depends on it.
    return jax.jit(lambda key: Llama(config, key=key))(jax.random.key(1, impl="unsafe_rbg"))


TOKENS = np.arange(14, dtype=np.int32).reshape(2, 7)


def test_random_weights(params):
    assert params.head is not None
    assert params.layers.mlp.gate_bias is None
    np.testing.assert_array_equal(params.layers.attention_norm[...], np.ones((2, 16), np.float32))
    np.testing.assert_array_equal(params.layers.attention.key_bias[...], np.zeros((2, 2, 6), np.float32))
    first, second = params.layers.attention.query[...]
    chex.assert_shape(first, (4, 6, 16))
    assert not np.allclose(first, second)  # every layer has weights of its own
    assert np.std(first) == pytest.approx(0.25, rel=0.2)  # 1 / sqrt(model_dim)


def test_flatten_round_trip(params):
    leaves, structure = jax.tree.flatten(params)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    again = jax.tree.unflatten(structure, leaves)
    assert again.config == params.config
    chex.assert_trees_all_equal(logits(again, TOKENS), logits(params, TOKENS))


def test_tree_map_and_jit_keep_params_usable(params):
    halved = jax.tree.map(lambda weight: weight * 0.5, params)
    through = jax.jit(lambda tree: jax.tree.map(lambda weight: weight * 0.5, tree))(params)
    assert isinstance(through, Llama)
    assert through.config == params.config
    chex.assert_trees_all_equal(jax.tree.leaves(through), jax.tree.leaves(halved))
    chex.assert_trees_all_close(logits(through, TOKENS), logits(halved, TOKENS))
    assert not np.allclose(logits(halved, TOKENS), logits(params, TOKENS))


def test_config_is_static(params):
    other = jax.tree.map(lambda weight: weight, params)
    other.config = dataclasses.replace(params.config, norm_eps=1e-3)
    assert jax.tree.structure(other) != jax.tree.structure(params)
    traces = []

    @jax.jit
    def scale(tree):
        traces.append(tree.config)
        return tree.final_norm[...] * tree.config.norm_eps

    scale(params), scale(jax.tree.map(lambda weight: weight + 1, params)), scale(other)
    assert traces == [params.config, other.config]


def test_layers_one_by_one(params):
    """`layer` and `apply_layer`, which the chunked prefill uses, compute what `run_layers` computes."""

    def attend(q, k, v):
        return k, q + jnp.repeat(v, 2, axis=2)

    positions = jnp.broadcast_to(jnp.arange(7)[None], TOKENS.shape)
    x = params.embed(TOKENS)
    expected, _ = params.run_layers(x, positions, lambda carry, layer, q, k, v: (carry, attend(q, k, v)[1]), None)
    for index in range(params.config.num_layers):
        x, keys = params.apply_layer(params.layer(index), x, positions, attend)
        chex.assert_shape(keys, (2, 7, 2, 6))
    chex.assert_trees_all_close(x, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dtypes(params, dtype):
    cast = jax.tree.map(lambda weight: weight.astype(dtype), params)
    x = cast.embed(TOKENS)
    chex.assert_type(x, dtype)
    out = logits(cast, TOKENS)
    chex.assert_type(out, jnp.float32)
    chex.assert_shape(out, (2, 7, 50))
    np.testing.assert_allclose(out, logits(params, TOKENS), atol=1e-6 if dtype == jnp.float32 else 0.1)


@pytest.mark.parametrize(
    "tokens",
    [np.arange(4), np.zeros((1, 2, 3), np.int32), np.zeros((1, 4), np.float32), np.zeros((1, 0), np.int32)],
)
def test_logits_refuses_other_tokens(params, tokens):
    with pytest.raises(ValueError, match="integers \\[B T\\]"):
        logits(params, tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers"),
        ({"num_kv_heads": 3}, "multiple"),
        ({"head_dim": 5}, "even"),
        ({"rope": {"kind": "dynamic"}}, "dynamic"),
        ({"rope": {"theta": -1.0}}, "theta"),
        ({"rope": {"kind": "yarn"}}, "original_max_positions"),
        ({"rope": {"kind": "yarn", "original_max_positions": 8, "beta_fast": 0.0}}, "beta_fast"),
        ({"rope": {"kind": "llama3", "original_max_positions": 8, "low_freq_factor": 9.0}}, "low_freq_factor"),
    ],
)
def test_config_validates_itself(params, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(params.config, **{k: RopeConfig(**v) if k == "rope" else v for k, v in changes.items()})
