"""The transformer: `transformers.Qwen3ForCausalLM` as it is, with our attention registered.

Qwen3 is a pre-norm decoder with grouped-query attention, QK-norm, RoPE and SwiGLU. QK-norm is what keeps mixed-modal
training stable (Chameleon, arXiv 2405.09818).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field

from anygen.config import Config
from anygen.errors import ConfigError
from anygen.model import attention
from anygen.seeding import borrowed_randomness
from anygen.vocabulary import Vocabulary
from tokenizers_mm import compat  # noqa: F401  before transformers

Size = Literal["smoke", "nano", "tiny", "small", "base", "large"]

# width, layers, query heads, key/value heads, head width, MLP width
_SIZES: dict[str, tuple[int, int, int, int, int, int]] = {
    "smoke": (64, 2, 2, 1, 32, 128),
    "nano": (320, 6, 5, 1, 64, 896),
    "tiny": (512, 8, 8, 2, 64, 1408),
    "small": (768, 12, 12, 4, 64, 2048),
    "base": (1024, 24, 16, 8, 64, 3072),
    "large": (2048, 20, 16, 8, 128, 5632),
}


class ModelConfig(Config):
    """One dial, `size`, and overrides by name."""

    size: Size = "nano"
    width: int | None = Field(None, ge=8)
    num_layers: int | None = Field(None, ge=1)
    num_heads: int | None = Field(None, ge=1)
    num_kv_heads: int | None = Field(None, ge=1)
    head_width: int | None = Field(None, ge=4)
    mlp_width: int | None = Field(None, ge=8)
    max_positions: int = Field(4096, ge=16)
    """Longest sequence, prompt included."""
    tie_embeddings: bool = True
    """One matrix for input and output; right for small models, untied where FSDP shards them."""


def qwen3_config(config: ModelConfig, vocabulary: Vocabulary) -> Any:
    """The `transformers.Qwen3Config` of a model over a vocabulary."""
    from transformers import Qwen3Config

    size = _SIZES[config.size]
    given = (
        config.width, config.num_layers, config.num_heads, config.num_kv_heads, config.head_width, config.mlp_width
    )  # fmt: skip
    width, layers, heads, kv_heads, head_width, mlp = (
        g if g is not None else s for g, s in zip(given, size, strict=True)
    )
    if heads % kv_heads:
        raise ConfigError(f"num_heads ({heads}) must be a multiple of num_kv_heads ({kv_heads})")
    return Qwen3Config(
        vocab_size=vocabulary.size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_width,
        intermediate_size=mlp,
        max_position_embeddings=config.max_positions,
        tie_word_embeddings=config.tie_embeddings,
        bos_token_id=vocabulary.control("bos"),
        eos_token_id=vocabulary.control("eos"),
        pad_token_id=vocabulary.control("pad"),
        rope_theta=10_000.0,
        use_cache=True,
    )


def create_model(config: ModelConfig, vocabulary: Vocabulary, *, seed: int) -> Any:
    """A fresh `Qwen3ForCausalLM` with our attention; the global random state is left as it was."""
    from transformers import Qwen3ForCausalLM

    with borrowed_randomness(seed):
        model = Qwen3ForCausalLM(qwen3_config(config, vocabulary))
    model.set_attn_implementation(attention.register())
    return model


def num_parameters(model: torch.nn.Module) -> int:
    """Parameters, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
