"""EnCodec checkpoints of transformers, from disk: any of them, opened by our own reading of its configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tokenizers_mm import compat  # noqa: F401  before transformers
from tokenizers_mm.errors import CheckpointError
from tokenizers_mm.weights import UNREADABLE


def load_encodec(folder: Path, *, num_codebooks: int | None = None) -> Any:
    """The `EncodecModel` in a folder, with its leading codebooks only where a number is given.

    Raises:
        CheckpointError: missing, broken, or not an EnCodec model, or without a bandwidth of so many codebooks.
    """
    model = _opened(folder)
    if num_codebooks is not None:
        _keep_codebooks(model, num_codebooks)
    return model


def is_plain(model: Any) -> bool:
    """True for an EnCodec that is mono, leaves loudness alone and works on the whole sound at once."""
    config = model.config
    return config.audio_channels == 1 and not config.normalize and config.chunk_length is None


def _opened(folder: Path) -> Any:
    from transformers import EncodecConfig, EncodecModel

    try:
        facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(facts, dict) or facts.get("model_type") != "encodec":
            raise CheckpointError(f"{folder / 'config.json'} is not of an EnCodec model")
        # Our own class from our own reading of the file: nothing in a checkpoint chooses which code runs.
        config = EncodecConfig.from_dict(facts)
        model, report = EncodecModel.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except CheckpointError:
        raise
    except UNREADABLE as error:
        raise CheckpointError(f"no usable EnCodec model in {folder}: {str(error).splitlines()[0]}") from error
    if report["missing_keys"] or report["mismatched_keys"]:
        raise CheckpointError(
            f"the EnCodec model in {folder} is incomplete: {sorted(report['missing_keys'])[:3]} missing"
        )
    return model


def _keep_codebooks(model: Any, num_codebooks: int) -> None:
    counts = {model.quantizer.get_num_quantizers_for_bandwidth(kbps): kbps for kbps in model.config.target_bandwidths}
    if num_codebooks not in counts:
        raise CheckpointError(f"the codec has bandwidths of {sorted(counts)} codebooks, not of {num_codebooks}")
    kept = [kbps for kbps in model.config.target_bandwidths if kbps <= counts[num_codebooks]]
    model.config.target_bandwidths = kept
    model.quantizer.num_quantizers, model.quantizer.layers = num_codebooks, model.quantizer.layers[:num_codebooks]
