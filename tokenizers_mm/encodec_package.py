"""Checkpoints of the `encodec` package (`encodec_24khz-*.th`, `encodec_48khz-*.th`) as folders that transformers opens.

    python -m tokenizers_mm.encodec_package encodec_24khz-d7cc33bc.th encodec_24khz

The package is not needed: it would bring torchaudio, and its checkpoints are plain state dicts. Which of the two models
it is, and how wide, is read off the names and shapes.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenizers_mm import compat  # noqa: F401  before transformers
from tokenizers_mm.errors import AnyGenError, CheckpointError

_RENAMED = (
    (r"^(encoder|decoder)\.model\.", r"\1.layers."),
    (r"\.conv\.conv\.", ".conv."),
    (r"\.convtr\.convtr\.", ".conv."),
    (r"\.conv\.norm\.|\.convtr\.norm\.", ".norm."),
    (r"\.weight_g$", ".parametrizations.weight.original0"),
    (r"\.weight_v$", ".parametrizations.weight.original1"),
    (r"^quantizer\.vq\.layers\.", "quantizer.layers."),
    (r"\._codebook\.", ".codebook."),
)
_LAYOUTS: dict[bool, dict[str, Any]] = {
    False: {"sampling_rate": 24_000, "target_bandwidths": [1.5, 3.0, 6.0, 12.0, 24.0]},
    True: {
        "sampling_rate": 48_000,
        "target_bandwidths": [3.0, 6.0, 12.0, 24.0],
        "audio_channels": 2,
        "normalize": True,
        "chunk_length_s": 1.0,
        "overlap": 0.01,
        "norm_type": "time_group_norm",
        "use_causal_conv": False,
    },
}
"""Norms over time or not -> the 48 kHz or the 24 kHz model."""


def convert(checkpoint: Path, folder: Path) -> None:
    """Write a checkpoint of the package as an `EncodecModel`.

    Raises:
        CheckpointError: not a state dict, or not of one of the package's two models.
    """
    from transformers import EncodecConfig, EncodecModel

    state = _read(checkpoint)
    try:
        config = EncodecConfig(**_LAYOUTS["encoder.model.0.conv.norm.weight" in state], **_sizes(state))
        model = EncodecModel(config)
        report = model.load_state_dict({renamed(name): tensor for name, tensor in state.items()}, strict=False)
    except (KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint} is not a model of the encodec package: {error}") from error
    if report.missing_keys or report.unexpected_keys:
        names = sorted([*report.missing_keys, *report.unexpected_keys])[:3]
        raise CheckpointError(f"{checkpoint} is not a whole model of the encodec package: {names} missing or unknown")
    model.save_pretrained(folder)


def renamed(name: str) -> str:
    """The name of a tensor in transformers.

    >>> renamed("decoder.model.3.convtr.convtr.weight_g")
    'decoder.layers.3.conv.parametrizations.weight.original0'
    """
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def _read(checkpoint: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)  # noqa: TID251  reads tensors alone
    except Exception as error:  # whatever a foreign file makes the reader raise
        # Torch's own message advises to run whatever code a file holds.
        reason = error.strerror if isinstance(error, OSError) else "it is not a file of tensors alone"
        raise CheckpointError(f"cannot read a state dict from {checkpoint}: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise CheckpointError(f"{checkpoint} holds no state dict; expected a .th file of the encodec package")
    return state


def _sizes(state: dict[str, Tensor]) -> dict[str, Any]:
    """What shapes tell: widths, strides, codebook."""

    def weight(name: str) -> Tensor:
        return state[f"{name}.weight_v" if f"{name}.weight_v" in state else f"{name}.weight"]

    last = max(int(name.split(".")[2]) for name in state if name.startswith("encoder.model."))
    strides = [weight(name).shape[2] // 2 for name in _upsampling(state)]
    codebook_size, hidden = state["quantizer.vq.layers.0._codebook.embed"].shape
    return {
        "num_filters": weight("encoder.model.0.conv.conv").shape[0],
        "hidden_size": weight(f"encoder.model.{last}.conv.conv").shape[0],
        "codebook_dim": hidden,
        "codebook_size": codebook_size,
        "upsampling_ratios": strides,
        "num_lstm_layers": sum(
            bool(re.fullmatch(r"encoder\.model\.\d+\.lstm\.weight_ih_l\d+", name)) for name in state
        ),
    }


def _upsampling(state: dict[str, Tensor]) -> list[str]:
    found = {match[1] for name in state if (match := re.match(r"(decoder\.model\.(\d+)\.convtr\.convtr)\.bias", name))}
    return sorted(found, key=lambda name: int(name.split(".")[2]))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m tokenizers_mm.encodec_package CHECKPOINT.th FOLDER")
    try:
        convert(Path(sys.argv[1]), Path(sys.argv[2]))
    except AnyGenError as error:
        sys.exit(f"error: {error}")
