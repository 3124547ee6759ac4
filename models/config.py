"""What a Llama-family model is, as one frozen, hashable value (static metadata of the parameters' pytree)."""

import dataclasses

ROPE_KINDS = ("default", "linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding; the fields after `factor` belong to the kind named beside them."""

    theta: float = 10_000.0
    kind: str = "default"  # one of ROPE_KINDS
    factor: float = 1.0  # linear, llama3, yarn: how far the context is stretched
    original_max_positions: int | None = None  # llama3, yarn: the context length before stretching
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn: None = 0.1 log(factor) + 1, or mscale's ratio
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: round the correction range to whole dimensions

    def __post_init__(self):
        if self.kind not in ROPE_KINDS:
            raise ValueError(f"rope kind {self.kind!r} is not supported; known kinds: {', '.join(ROPE_KINDS)}")
        if not (self.theta > 0 and self.factor > 0):  # so written, NaN fails too
            raise ValueError(f"rope theta ({self.theta}) and factor ({self.factor}) must be positive")
        if self.kind in ("llama3", "yarn") and not self.original_max_positions:
            raise ValueError(f"rope kind {self.kind!r} needs original_max_positions")
        if self.kind == "yarn" and not (self.beta_fast > 0 and self.beta_slow > 0 and self.theta != 1):
            raise ValueError("yarn needs beta_fast and beta_slow above 0, and a theta other than 1")
        if self.kind == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"llama3 needs low_freq_factor ({self.low_freq_factor}) < high_freq_factor ({self.high_freq_factor})"
            )


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shapes and switches of a Llama, Mistral, Qwen2 or Qwen3 decoder."""

    vocab_size: int
    model_dim: int  # D
    mlp_dim: int
    num_layers: int  # L
    num_heads: int  # N, query heads
    num_kv_heads: int  # K, key/value heads
    head_dim: int  # H, not necessarily D / N
    rope: RopeConfig = RopeConfig()
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # Qwen3: RMS norm of every query and key head before RoPE
    max_positions: int | None = None  # what the checkpoint was trained for; advisory
    stop_tokens: tuple[int, ...] = ()  # end-of-sequence ids named by the checkpoint
    fingerprint: str | None = None  # identity of the loaded weights; None = made in memory

    def __post_init__(self):
        sizes = ("vocab_size", "model_dim", "mlp_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if not 0 <= self.norm_eps < float("inf"):  # so written, NaN fails too
            raise ValueError(f"norm_eps (rms_norm_eps) must be at least 0, got {self.norm_eps}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")


# What transformers assumes of a field that config.json leaves out.
_COMMON = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
_QWEN = {
    "vocab_size": 151_936,
    "intermediate_size": 22_016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "sliding_window": 4096,
}
_FAMILIES = {
    "llama": {"intermediate_size": 11_008, "max_position_embeddings": 2048, "eos_token_id": 2},
    "mistral": {
        "intermediate_size": 14_336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,
        "eos_token_id": 2,
    },
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
}


def parse_config(raw: dict) -> LlamaConfig:
    """The LlamaConfig of a Hugging Face config.json, as transformers 4 or 5 writes it, already decoded from JSON.

    Fields left out take transformers' defaults for the model type. ValueError, with a sentence that names the field,
    for a model that the decoder would compute wrongly: other model types and activations, sliding windows in use,
    quantised weights, RoPE variants outside ROPE_KINDS.
    """
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in _FAMILIES:
        raise ValueError(f"model_type {family!r} is not supported; supported are {', '.join(_FAMILIES)}")
    raw = {**_COMMON, **_FAMILIES[family], **raw}
    _refuse_unsupported(family, raw)
    D, N = _number(raw, "hidden_size", int), _number(raw, "num_attention_heads", int)
    attention_bias = family in ("llama", "qwen3") and _flag(raw, "attention_bias")
    return LlamaConfig(
        vocab_size=_number(raw, "vocab_size", int),
        model_dim=D,
        mlp_dim=_number(raw, "intermediate_size", int),
        num_layers=_number(raw, "num_hidden_layers", int),
        num_heads=N,
        num_kv_heads=_number(raw, "num_key_value_heads", int, default=N),
        head_dim=_number(raw, "head_dim", int, default=D // max(N, 1)),
        rope=_parse_rope(raw),
        norm_eps=_number(raw, "rms_norm_eps", float),
        tie_embeddings=_flag(raw, "tie_word_embeddings"),
        qkv_bias=attention_bias or family == "qwen2",
        output_bias=attention_bias,
        mlp_bias=family == "llama" and _flag(raw, "mlp_bias"),
        qk_norm=family == "qwen3",
        max_positions=_number(raw, "max_position_embeddings", int),
        stop_tokens=parse_stop_tokens(raw),
    )


def parse_stop_tokens(raw: dict) -> tuple[int, ...]:
    """The ids under eos_token_id: an integer, a list of them, or nothing."""
    ids = raw.get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise ValueError(f"eos_token_id must be an integer or a list of integers, got {raw['eos_token_id']!r}")
    if not all(abs(token) < 2**31 for token in ids):
        raise ValueError("eos_token_id must be below 2³¹, as all token ids")
    return tuple(ids)


def _refuse_unsupported(family: str, raw: dict):
    quantization = raw.get("quantization_config") or raw.get("compression_config")
    if quantization:
        method = quantization.get("quant_method", "unnamed") if isinstance(quantization, dict) else quantization
        raise ValueError(
            f"quantised weights (quantization_config: {method}) are not supported; "
            "load the float checkpoint that they were made from, or dequantise it first"
        )
    if raw["hidden_act"] not in ("silu", "swish"):
        raise ValueError(f"hidden_act {raw['hidden_act']!r} is not supported; the MLP here computes silu")
    # Mistral slides whenever a window is set; the Qwens have a switch of their own. Whether a window would be longer
    # than every input cannot be known here, so it counts as in use.
    slides = raw["sliding_window"] is not None if family == "mistral" else bool(raw.get("use_sliding_window"))
    if slides:
        field = "sliding_window" if family == "mistral" else "use_sliding_window"
        raise ValueError(
            f"sliding window attention ({field} = {raw[field]!r}) is not supported; if inputs stay within the window, "
            f"set {field} to {'null' if family == 'mistral' else 'false'} in config.json"
        )
    layer_types = raw.get("layer_types") or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise ValueError(
            f"layer_types {layer_types!r} is not supported (a sliding window, or another kind of attention); "
            "every layer must be full_attention"
        )


def _parse_rope(raw: dict) -> RopeConfig:
    # transformers 4: rope_theta and rope_scaling at the top level; 5: both inside rope_parameters.
    scaling = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(scaling, dict) or any(isinstance(value, dict) for value in scaling.values()):
        raise ValueError("RoPE settings that differ by layer are not supported; rope_parameters must be a flat object")
    kind = scaling.get("rope_type", scaling.get("type")) or "default"
    if kind not in ROPE_KINDS:
        raise ValueError(f"rope type {kind!r} is not supported; supported are {', '.join(ROPE_KINDS)}")
    rope = {**raw, **scaling}
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ValueError(f"partial_rotary_factor {rope['partial_rotary_factor']} is not supported; it must be 1")
    theta = _number(rope, "rope_theta", float, default=10_000.0)
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, kind=kind, factor=_number(rope, "factor", float))
    name, longest = "original_max_position_embeddings", _number(raw, "max_position_embeddings", int)
    # As in transformers, the top-level field goes before the one in the RoPE settings.
    original = _number(scaling if raw.get(name) is None else raw, name, int, default=longest)
    if kind == "llama3":
        numbers = {name: _number(rope, name, float) for name in ("factor", "low_freq_factor", "high_freq_factor")}
        return RopeConfig(theta=theta, kind=kind, original_max_positions=original, **numbers)
    if rope.get("factor") is None:
        rope["factor"] = longest / max(original, 1)
    names = ("factor", "attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow")
    numbers = {name: _number(rope, name, float) for name in names if rope.get(name) is not None}
    truncate = bool(rope.get("truncate", True))  # transformers takes null for False
    return RopeConfig(theta=theta, kind=kind, original_max_positions=original, truncate=truncate, **numbers)


def _flag(raw: dict, name: str) -> bool:
    if not isinstance(raw[name], bool):
        raise ValueError(f"config.json: {name} must be true or false, got {raw[name]!r}")
    return raw[name]


def _number(raw: dict, name: str, kind: type, default=None):
    """raw[name] as an int or a float; null or nothing there is the default, and an error without one."""
    value = raw.get(name)
    value = default if value is None else value
    allowed, limit = (int, 2**31) if kind is int else ((int, float), 1e30)  # so NaN and infinity fail too
    if not isinstance(value, allowed) or isinstance(value, bool) or not abs(value) < limit:
        wanted = "an integer" if kind is int else "a number"
        raise ValueError(f"config.json: {name} must be {wanted}, got {value!r}")
    return kind(value)
