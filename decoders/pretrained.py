"""Opening a pretrained diffusers pipeline, with its text encoders or without them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from decoders.optional import load_diffusers
from tokenizers_mm.errors import CheckpointError


def open_pipeline(base: str | Path, *, text: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """A pretrained pipeline, from a folder in diffusers' layout or a repository's id; safetensors only, no remote code.

    Args:
        base: folder or id.
        text: open its text encoders too; drawing from vokens needs none, and they are much of its weight.
        dtype: of the weights.

    Raises:
        CheckpointError: there is no such pipeline, or a part of it is missing.
        MissingDependency: diffusers is absent or broken.
    """
    library = load_diffusers()
    try:
        index = library.DiffusionPipeline.load_config(str(base))
        left_out = {} if text else {name: None for name in index if _is_text(name, index)}
        pipeline = library.DiffusionPipeline.from_pretrained(str(base), dtype=dtype, use_safetensors=True, **left_out)
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{base} is not a pipeline that diffusers can open: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def check_pipeline(base: str | Path) -> None:
    """Read a pipeline's index, nothing more.

    Raises:
        CheckpointError: there is no such pipeline.
        MissingDependency: diffusers is absent or broken.
    """
    try:
        load_diffusers().DiffusionPipeline.load_config(str(base))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{base} is not a pipeline that diffusers can open: {error}") from error


def _is_text(name: str, index: Mapping[str, Any]) -> bool:
    if "language_model" in index and name in ("language_model", "projection_model", "feature_extractor"):  # AudioLDM2
        return True
    return name.startswith(("text_encoder", "tokenizer"))
