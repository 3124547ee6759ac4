"""Small random models of transformers' own PyTorch code, which the parity tests take as the reference."""

import json
import logging

import torch
import transformers

# Progress bars and remarks on configurations that tests make odd on purpose; errors still show.
transformers.utils.logging.disable_progress_bar()
logging.getLogger("transformers").setLevel(logging.ERROR)

# The models are too small to share among threads, whose spinning would slow the tests down.
torch.set_num_threads(1)

CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def make_config(family, **changes):
    extra = {"sliding_window": None} if family == "mistral" else {"head_dim": 8} if family == "qwen3" else {}
    return CLASSES[family][0](**{**SIZES, **extra, "attn_implementation": "eager", **changes})


def make_model(family, *, seed=0, **changes):
    """A model whose every parameter counts: biases and norms are random too, and logits are several units wide."""
    generator = torch.Generator().manual_seed(seed)
    model = CLASSES[family][1](make_config(family, **changes)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):
            parameter.copy_(1 + 0.3 * noise)
        elif parameter.ndim == 1:
            parameter.copy_(0.3 * noise)
        else:
            parameter.copy_(noise * (0.5 if "embed" in name else 1.3 * parameter.shape[1] ** -0.5))
    return model


def to_transformers_4(folder, *, legacy_type=False):
    """Rewrites config.json as transformers 4 wrote it."""
    file = folder / "config.json"
    raw = json.loads(file.read_text())
    rope = raw.pop("rope_parameters")
    raw["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    raw["rope_scaling"] = None if kind == "default" else {"type" if legacy_type else "rope_type": kind, **rope}
    raw["torch_dtype"] = raw.pop("dtype")
    raw["transformers_version"] = "4.51.3"
    file.write_text(json.dumps(raw))
