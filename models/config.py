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
        if self.theta <= 0 or self.factor <= 0:
            raise ValueError(f"rope theta ({self.theta}) and factor ({self.factor}) must be positive")
        if self.kind in ("llama3", "yarn") and not self.original_max_positions:
            raise ValueError(f"rope kind {self.kind!r} needs original_max_positions")


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
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")
