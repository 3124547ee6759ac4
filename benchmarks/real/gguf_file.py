"""GGUF files as Hugging Face checkpoints: weights, configuration, tokenizer. NumPy and the package `gguf` only.

Of the architecture `llama` with a byte-level BPE tokenizer. Weights come out in float32, one tensor at a time, exactly
as dequantised.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_NAMES = {  # GGUF's -> Hugging Face's; below "blk.N." the name within one layer
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SPECIAL = 3  # token type of GGUF: control
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_BEFORE = {  # `tokenizer.ggml.pre` -> what comes before byte-level BPE
    "gpt-2": (),
    "smollm": ({"type": "Digits", "individual_digits": True},),
}


class GgufFile:
    """One file, its tensors mapped from disk."""

    def __init__(self, path: Path):
        """Raises ValueError for another architecture, ImportError without the package `gguf`."""
        from gguf import GGUFReader  # an extra of its own

        self._reader = GGUFReader(path)
        self._about = lambda name, default=None: (
            field.contents() if (field := self._reader.get_field(name)) else default
        )
        if (kind := self._about("general.architecture")) != "llama":
            raise ValueError(f"{path}: architecture {kind!r} is not supported, only llama")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Hugging Face's name of every tensor, with its shape there."""
        # GGUF lists axes from the one that changes fastest.
        return {hugging_face_name(t.name): tuple(map(int, reversed(t.shape))) for t in self._reader.tensors}

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """(Hugging Face's name, f32 array) of every tensor, in the order of `shapes`."""
        from gguf.quants import dequantize

        heads = {"q": self._about("llama.attention.head_count"), "k": self._num_kv_heads()}
        for tensor in self._reader.tensors:
            name = hugging_face_name(tensor.name)
            values = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
            values = values.reshape(tuple(map(int, reversed(tensor.shape))))
            if found := re.search(r"self_attn\.([qk])_proj", name):
                values = halves_of_rope(values, heads[found[1]])
            yield name, np.ascontiguousarray(values)

    def config(self) -> dict:
        """What config.json holds."""
        about, rope = self._about, {"rope_type": "default", "rope_theta": self._about("llama.rope.freq_base", 10000.0)}
        if (scaling := about("llama.rope.scaling.type", "none")) != "none":
            raise ValueError(f"RoPE scaling {scaling!r} is not supported")
        D, N = about("llama.embedding_length"), about("llama.attention.head_count")
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": D,
            "intermediate_size": about("llama.feed_forward_length"),
            "num_hidden_layers": about("llama.block_count"),
            "num_attention_heads": N,
            "num_key_value_heads": self._num_kv_heads(),
            "head_dim": about("llama.attention.key_length", D // N),
            "rms_norm_eps": about("llama.attention.layer_norm_rms_epsilon"),
            "rope_parameters": rope,
            "max_position_embeddings": about("llama.context_length"),
            "vocab_size": len(about("tokenizer.ggml.tokens")),
            "bos_token_id": about("tokenizer.ggml.bos_token_id"),
            "eos_token_id": about("tokenizer.ggml.eos_token_id"),
            "tie_word_embeddings": "lm_head.weight" not in self.shapes(),
            "dtype": "float32",
        }

    def tokenizer(self) -> dict[str, dict]:
        """What tokenizer.json and tokenizer_config.json hold, by file name."""
        about = lambda name, default=None: self._about(f"tokenizer.ggml.{name}", default)
        kind, pre, tokens = about("model"), about("pre", "gpt-2"), about("tokens")
        if kind != "gpt2" or pre not in _BEFORE:
            raise ValueError(f"tokenizer {kind!r} with pre-tokenizer {pre!r} is not supported, only byte-level BPE")
        types = about("token_type", [1] * len(tokens))
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        special = [i for i, one in enumerate(types) if one == _SPECIAL]
        whole = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": i, "content": tokens[i], **flags, "special": True} for i in special],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*_BEFORE[pre], _BYTE_LEVEL]},
            "post_processor": None,
            "decoder": _BYTE_LEVEL | {"add_prefix_space": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": {token: i for i, token in enumerate(tokens)},
                "merges": [merge.split(" ") for merge in about("merges")],
            },
        }
        beside = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        beside |= {"chat_template": self._about("tokenizer.chat_template")}
        for name, field in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
            if (i := about(f"{field}_token_id")) is not None:
                beside[f"{name}_token"] = tokens[i]
        return {"tokenizer.json": whole, "tokenizer_config.json": beside}

    def _num_kv_heads(self) -> int:
        return self._about("llama.attention.head_count_kv", self._about("llama.attention.head_count"))


def hugging_face_name(name: str) -> str:
    """blk.0.attn_q.weight -> model.layers.0.self_attn.q_proj.weight. Raises ValueError for a name not known."""
    layer = re.match(r"blk\.(\d+)\.", name)
    stem, _, kind = name[layer.end() if layer else 0 :].rpartition(".")
    if stem not in _NAMES:
        raise ValueError(f"tensor {name!r} is not one of a Llama's")
    return (f"model.layers.{layer[1]}." if layer else "") + f"{_NAMES[stem]}.{kind}"


def halves_of_rope(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads·H …] of q or k from llama.cpp's order, the two of a rotated pair side by side, to halves."""
    pairs = rows.reshape(heads, len(rows) // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def convert(path: Path, folder: Path) -> None:
    """Writes a GGUF file as a Hugging Face directory into an existing, empty folder."""
    file = GgufFile(path)
    (folder / "config.json").write_text(json.dumps(file.config(), indent=2) + "\n")
    for name, content in file.tokenizer().items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    header, end = {}, 0
    for name, shape in file.shapes().items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with (folder / "model.safetensors").open("wb") as out:  # by hand: safetensors' own writer wants all at once
        out.write(len(head).to_bytes(8, "little") + head)
        for _, values in file.tensors():
            out.write(values.astype("<f4").tobytes())
