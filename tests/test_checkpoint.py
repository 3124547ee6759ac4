"""Loading Hugging Face directories: every form that is read, and a sentence for every one that is refused."""

import contextlib
import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch_models import CLASSES, make_model, to_transformers_4

from squeezejax.models import Llama, checkpoint, load
from squeezejax.models.config import parse_config

KEY = "model.layers.1.self_attn.k_proj.weight"
YARN = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}


def save(folder, family="llama", *, dtype=torch.float32, shards=None, **changes):
    model = make_model(family, **changes).to(dtype)
    model.save_pretrained(folder, **({"max_shard_size": shards} if shards else {}))
    return model


def edit_json(file, **changes):
    raw = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**raw, **changes}))


def edit_tensors(folder, change):
    """Rewrites model.safetensors with its dict of tensors changed in place by `change`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return save(folder, attention_bias=True, mlp_bias=True), folder


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of the checkpoint to damage."""
    return shutil.copytree(saved[1], tmp_path / "copy")


# What is read


def test_every_weight_has_its_place(saved):
    model, folder = saved
    params, weights = load(folder), model.state_dict()
    attention, mlp = params.layers.attention, params.layers.mlp
    places = {
        "self_attn.q_proj": (attention.query, attention.query_bias),
        "self_attn.k_proj": (attention.key, attention.key_bias),
        "self_attn.v_proj": (attention.value, attention.value_bias),
        "self_attn.o_proj": (attention.output, attention.output_bias),
        "mlp.gate_proj": (mlp.gate, mlp.gate_bias),
        "mlp.up_proj": (mlp.up, mlp.up_bias),
        "mlp.down_proj": (mlp.down, mlp.down_bias),
        "input_layernorm": (params.layers.attention_norm, None),
        "post_attention_layernorm": (params.layers.mlp_norm, None),
    }
    for name, parameters in places.items():
        for kind, parameter in zip(("weight", "bias"), parameters, strict=True):
            for layer in range(3) if parameter is not None else ():
                expected = weights[f"model.layers.{layer}.{name}.{kind}"].numpy()
                np.testing.assert_array_equal(np.reshape(parameter[...][layer], expected.shape), expected)
    np.testing.assert_array_equal(params.embedding[...], weights["model.embed_tokens.weight"].numpy())
    np.testing.assert_array_equal(params.head[...], weights["lm_head.weight"].numpy())
    np.testing.assert_array_equal(params.final_norm[...], weights["model.norm.weight"].numpy())


def test_loaded_structure_is_the_constructed_one(saved):
    params = load(saved[1])
    built = jax.eval_shape(lambda key: Llama(params.config, key=key), jax.random.key(0))
    assert jax.tree.structure(built) == jax.tree.structure(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(built, params)


def test_no_random_numbers_are_drawn(saved, monkeypatch):
    concrete = []
    normal = jax.random.normal
    monkeypatch.setattr(jax.random, "normal", lambda key, *rest: concrete.append(key) or normal(key, *rest))
    load(saved[1])
    assert concrete
    assert all(isinstance(key, jax.core.Tracer) for key in concrete)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [None, "float32", jnp.bfloat16, np.float16])
def test_dtypes(stored, dtype, tmp_path):
    model = save(tmp_path, "qwen3", dtype=stored, tie_word_embeddings=True)
    params = load(tmp_path, dtype)
    chex.assert_tree_all_finite(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype or "float32")}
    expected = model.model.layers[2].mlp.up_proj.weight.float().numpy().astype(jnp.dtype(dtype or "float32"))
    np.testing.assert_array_equal(params.layers.mlp.up[...][2], expected)
    assert params.config.fingerprint == load(tmp_path).config.fingerprint


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
def test_off_the_cpu_the_checkpoints_dtype_is_the_default(stored, tmp_path, monkeypatch):
    save(tmp_path, dtype=getattr(torch, stored))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert load(tmp_path).embedding.dtype == stored
    edit_json(tmp_path / "config.json", dtype=None)
    assert load(tmp_path).embedding.dtype == stored


def test_other_dtypes_are_refused(saved):
    with pytest.raises(ValueError, match="float32, float16, bfloat16, got int8"):
        load(saved[1], "int8")


def test_shards(saved, tmp_path):
    model, folder = saved
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    # Equal configs include equal fingerprints: how the tensors are spread over files does not count.
    chex.assert_trees_all_equal(load(tmp_path), load(folder))
    assert load(tmp_path).config == load(folder).config


@pytest.mark.parametrize("slab_bytes", [1, 200, 1 << 30])
def test_slabs(slab_bytes, saved, monkeypatch):
    expected = load(saved[1])
    monkeypatch.setattr(checkpoint, "_SLAB_BYTES", slab_bytes)
    chex.assert_trees_all_equal(jax.tree.leaves(load(saved[1])), jax.tree.leaves(expected))


@pytest.mark.parametrize("rope", [YARN, LLAMA3, LINEAR, {"rope_type": "default", "rope_theta": 5e5}])
@pytest.mark.parametrize("legacy_type", [False, True])
@pytest.mark.parametrize("family", CLASSES)
def test_transformers_4_config(family, legacy_type, rope, tmp_path):
    save(tmp_path, family, rope_parameters=rope)
    config = load(tmp_path).config
    to_transformers_4(tmp_path, legacy_type=legacy_type)
    assert "rope_parameters" not in (tmp_path / "config.json").read_text()
    assert load(tmp_path).config == config
    assert config.rope.theta == 5e5
    assert config.rope.kind == rope["rope_type"]


@pytest.mark.parametrize("family", CLASSES)
def test_left_out_fields_take_transformers_defaults(family):
    reference = CLASSES[family][0]()
    config = parse_config({"model_type": family, **({"sliding_window": None} if family == "mistral" else {})})
    head_dim = getattr(reference, "head_dim", None) or reference.hidden_size // reference.num_attention_heads
    eos = reference.eos_token_id
    assert dataclasses.astuple(config)[:7] == (
        reference.vocab_size,
        reference.hidden_size,
        reference.intermediate_size,
        reference.num_hidden_layers,
        reference.num_attention_heads,
        reference.num_key_value_heads,
        head_dim,
    )
    assert config.rope.theta == reference.rope_parameters["rope_theta"]
    assert config.norm_eps == reference.rms_norm_eps
    assert config.max_positions == reference.max_position_embeddings
    assert config.stop_tokens == (() if eos is None else (eos,))
    assert not config.tie_embeddings


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_head_dim_absent_or_null(family, tmp_path):
    save(tmp_path, family)
    config = load(tmp_path).config
    assert config.head_dim == 8
    edit_json(tmp_path / "config.json", head_dim=None)
    assert load(tmp_path).config == config
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["head_dim"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert load(tmp_path).config == config


def test_original_positions_at_the_top_level_go_first():
    raw = {"model_type": "llama", "max_position_embeddings": 100}
    assert parse_config({**raw, "rope_scaling": {**YARN}}).rope.original_max_positions == 32
    raw["original_max_position_embeddings"] = 50
    assert parse_config({**raw, "rope_scaling": {**YARN}}).rope.original_max_positions == 50


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize("case", ["embedding only", "both, equal", "both, different", "head only"])
def test_tied_embeddings(case, tmp_path):
    save(tmp_path, tie_word_embeddings=True)

    def change(tensors):
        if case != "embedding only":
            tensors[HEAD] = tensors[EMBEDDING].clone()
        if case == "both, different":
            tensors[HEAD][50, 3] += 1
        if case == "head only":
            del tensors[EMBEDDING]

    edit_tensors(tmp_path, change)
    params = load(tmp_path)
    # transformers decides the same way, and says so in what it computes.
    reference = CLASSES["llama"][1].from_pretrained(tmp_path)
    head = params.embedding if params.head is None else params.head
    np.testing.assert_array_equal(head[...], reference.lm_head.weight.detach().numpy())
    np.testing.assert_array_equal(params.embedding[...], reference.model.embed_tokens.weight.detach().numpy())
    assert params.config.tie_embeddings == (params.head is None) == (case != "both, different")


def test_rotary_buffers_are_ignored(copy):
    expected = load(copy)
    edit_tensors(copy, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    chex.assert_trees_all_equal(load(copy), expected)


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [(5, None, (5,)), ([5, 6], None, (5, 6)), (5, 7, (7,)), (5, [7, 8], (7, 8)), (None, None, ()), (5, "none", (5,))],
)
def test_stop_tokens(config, generation, expected, copy):
    edit_json(copy / "config.json", eos_token_id=config)
    (copy / "generation_config.json").unlink()
    if generation is not None:
        (copy / "generation_config.json").write_text(
            json.dumps({"eos_token_id": generation} if generation != "none" else {})
        )
    assert load(copy).config.stop_tokens == expected


def test_fingerprint(copy):
    before = load(copy).config.fingerprint
    assert re.fullmatch("[0-9a-f]{32}", before)
    edit_json(copy / "config.json", eos_token_id=9, max_position_embeddings=77, use_cache=False)
    assert load(copy).config.fingerprint == before  # nothing that the weights' meaning depends on
    edit_json(copy / "config.json", rms_norm_eps=1e-5)
    other = load(copy).config.fingerprint
    edit_tensors(copy, lambda tensors: tensors[KEY][7, 13].add_(1e-3))
    assert len({before, other, load(copy).config.fingerprint}) == 3


MEMORY = """
import sys, jax, numpy as np
from squeezejax.models import load
def status(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) / 1024
load(sys.argv[1])  # the small one: what loading costs once, whatever the size
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = status("VmRSS")
params = load(sys.argv[2])
peak = status("VmHWM") - before
print(peak, sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 2**20)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory as Linux counts it")
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_peak_memory_is_near_one_copy(stored, saved, tmp_path):
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8}
    with torch.device("meta"):
        model = CLASSES["llama"][1](CLASSES["llama"][0](**sizes, vocab_size=16_384, num_key_value_heads=8))
    dtype = getattr(torch, stored)
    tensors = {name: torch.full(tensor.shape, 0.01, dtype=dtype) for name, tensor in model.state_dict().items()}
    model.config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    command = [sys.executable, "-c", MEMORY, str(saved[1]), str(tmp_path)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    peak, copy = map(float, output.split())
    assert copy > 180
    assert peak < 1.25 * copy


# What is refused


def refusals():
    scaling = {"rope_parameters": None, "rope_theta": 1e4}
    yield "gemma2", {"model_type": "gemma2"}, "'gemma2' is not supported; supported are llama, mistral, qwen2, qwen3"
    yield "no-model-type", {"model_type": None}, "model_type None"
    yield "activation", {"hidden_act": "gelu"}, "hidden_act 'gelu'"
    yield "quantised", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised weights .*gptq"
    yield "mistral-window", {"model_type": "mistral", "sliding_window": 16}, "sliding window .*sliding_window = 16"
    yield "qwen2-window", {"model_type": "qwen2", "use_sliding_window": True}, "sliding window .*use_sliding_window"
    yield "qwen3-window", {"model_type": "qwen3", "use_sliding_window": True}, "sliding window .*use_sliding_window"
    yield "qwen2-layers", {"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]}, "sliding_att"
    for kind in ("dynamic", "longrope", "su", "mrope", "proportional"):
        yield f"{kind}-4", {**scaling, "rope_scaling": {"type": kind, "factor": 2.0}}, f"rope type '{kind}'"
        yield f"{kind}-5", {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4}}, f"rope type '{kind}'"
    yield "rope-by-layer", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ by layer"
    yield "partial-rope", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"
    yield "linear-no-factor", {**scaling, "rope_scaling": {"type": "linear"}}, "factor must be a number, got None"
    yield "llama3-no-low", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor must be"
    yield "size-text", {"hidden_size": "32"}, "hidden_size must be an integer, got '32'"
    yield "size-negative", {"num_hidden_layers": -1}, "num_layers must be at least 1"
    yield "flag-text", {"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false"
    yield "eos-text", {"eos_token_id": "</s>"}, "eos_token_id must be"
    yield "eos-huge", {"eos_token_id": 10**30}, "eos_token_id must be below 2³¹"
    yield "eos-huge-list", {"eos_token_id": [2, -(10**4000)]}, "eos_token_id must be below 2³¹"
    yield "eps-negative", {"rms_norm_eps": -1}, r"norm_eps \(rms_norm_eps\) must be at least 0, got -1"
    yield "more-layers", {"num_hidden_layers": 4}, "missing tensors: model.layers.3.input_layernorm.weight, .* more"
    yield "many-layers", {"num_hidden_layers": 10**9}, "missing most of the 1000000000 layers"
    yield "fewer-layers", {"num_hidden_layers": 2}, "surplus tensors: model.layers.2"
    yield "no-bias", {"attention_bias": False}, "surplus tensors: model.layers.0.self_attn.k_proj.bias"
    yield "vocabulary", {"vocab_size": 98}, r"shape \[97, 32\], but config.json asks for \[98, 32\]"
    yield "head-dim", {"head_dim": 16}, r"k_proj.*shape \[16, 32\].*asks for \[32, 32\]"


@pytest.fixture
def no_tensor_is_read(monkeypatch):
    def fail(tensor):
        raise AssertionError(f"{tensor.name} was read")

    monkeypatch.setattr(checkpoint, "_slabs", fail)


CASES = {name: case for name, *case in refusals()}


@pytest.mark.usefixtures("no_tensor_is_read")
class TestRefusals:
    @pytest.mark.parametrize("name", CASES)
    def test_config(self, name, copy):
        changes, message = CASES[name]
        edit_json(copy / "config.json", **changes)
        with pytest.raises(ValueError, match=message) as caught:
            load(copy)
        assert str(copy) in str(caught.value)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t.pop(KEY), f"missing tensors: {KEY}$"),
            (lambda t: t.update(extra=torch.ones(2)), "surplus tensors: extra$"),
            (lambda t: t.update({KEY: t[KEY][:-1].clone()}), rf"{KEY} has shape \[15, 32\]"),
            (lambda t: t.update({KEY: t[KEY].reshape(-1)}), rf"{KEY} has shape \[512\]"),
            (lambda t: t.update({KEY: t[KEY].to(torch.int8)}), f"{KEY} as I8: quantised weights"),
            (lambda t: t.update({KEY: t[KEY].to(torch.float8_e4m3fn)}), f"{KEY} as F8_E4M3: quantised weights"),
            (lambda t: t.update({KEY: t[KEY].double()}), f"{KEY} as F64"),
        ],
    )
    def test_tensors(self, change, message, copy):
        edit_tensors(copy, change)
        with pytest.raises(ValueError, match=message):
            load(copy)

    @pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
    @pytest.mark.parametrize("content", [b"", b'{"model_type": "lla', b"[1]", b"\xff\xfe{}", b"[" * 100_000])
    def test_damaged_json(self, name, content, copy):
        (copy / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            load(copy)

    @pytest.mark.parametrize("keep", [0, 4, 100, -1])
    def test_truncated_weights(self, keep, copy):
        file = copy / "model.safetensors"
        file.write_bytes(file.read_bytes()[:keep])
        with pytest.raises(ValueError, match=r"model\.safetensors is truncated or damaged"):
            load(copy)

    def test_missing_files(self, copy):
        with pytest.raises(FileNotFoundError, match="no checkpoint directory at"):
            load(copy / "nowhere")
        with pytest.raises(ValueError, match="is a file; give the checkpoint directory"):
            load(copy / "config.json")
        (copy / "model.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor model.safetensors.index.json"):
            load(str(copy))
        (copy / "config.json").unlink()
        with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
            load(copy)

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
    def test_pickled_weights(self, name, copy):
        (copy / "model.safetensors").rename(copy / name)
        with pytest.raises(ValueError, match=rf"PyTorch files only \({name}\).*convert them to safetensors"):
            load(copy)

    def test_index(self, saved, tmp_path):
        saved[0].save_pretrained(tmp_path, max_shard_size="20KB")
        index = tmp_path / "model.safetensors.index.json"
        shards = json.loads(index.read_text())["weight_map"]
        first, *_, last = sorted(set(shards.values()))
        (tmp_path / "inside").mkdir()
        for outside in (f"../{tmp_path.name}/{first}", str(tmp_path / first), f"inside/../{first}", "..", ""):
            edit_json(index, weight_map={**shards, KEY: outside})
            with pytest.raises(ValueError, match="names files outside its folder"):
                load(tmp_path)
        for weight_map in (None, [], {}, {KEY: 3}):
            edit_json(index, weight_map=weight_map)
            with pytest.raises(ValueError, match="weight_map must map"):
                load(tmp_path)
        edit_json(index, weight_map={**shards, KEY: first if shards[KEY] != first else last})
        with pytest.raises(ValueError, match=f"says that .* holds tensor {KEY}, but it does not"):
            load(tmp_path)
        edit_json(index, weight_map=shards)
        shutil.copy(tmp_path / first, tmp_path / "again.safetensors")
        edit_json(index, weight_map={**shards, "more": "again.safetensors"})
        with pytest.raises(ValueError, match="is stored twice"):
            load(tmp_path)
        edit_json(index, weight_map=shards)
        (tmp_path / last).unlink()
        with pytest.raises(FileNotFoundError, match=f"lacks {last}"):
            load(tmp_path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_raises_nothing_else(data, copy, saved):
    """A byte changed in config.json or the safetensors header either does not matter or is refused in a sentence."""
    name = data.draw(st.sampled_from(["config.json", "model.safetensors"]))
    content = bytearray((saved[1] / name).read_bytes())
    header = 8 + int.from_bytes(content[:8], "little") if name.endswith("safetensors") else len(content)
    content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    (copy / name).write_bytes(content)
    with contextlib.suppress(ValueError):
        load(copy)
    shutil.copy(saved[1] / name, copy / name)
