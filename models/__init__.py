"""Llama-family decoders as typed pytrees, and loading them from Hugging Face checkpoint directories."""

from squeezejax.models.checkpoint import load
from squeezejax.models.config import LlamaConfig, RopeConfig
from squeezejax.models.llama import Llama, logits

__all__ = ["Llama", "LlamaConfig", "RopeConfig", "load", "logits"]
