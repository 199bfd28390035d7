"""Weights on disk: half the size where nothing is lost, and nothing lost anywhere else."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tokenizers_mm.audio import AudioTokenizer
from tokenizers_mm.encodec import EncodecSize, TrainableEncodec
from tokenizers_mm.weights import rounded, shrink


def test_what_bf16_holds_exactly_is_stored_in_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    exact = torch.randn(5, 4).bfloat16().float()
    tensors = {"exact": exact, "inexact": exact + 1e-6, "vector": torch.ones(4), "counts": torch.ones(2, 2).long()}
    save_file(tensors, tmp_path / "model.safetensors")
    shrink(tmp_path / "model.safetensors")
    found = load_file(tmp_path / "model.safetensors")
    assert {name: t.dtype for name, t in found.items() if t.is_floating_point()} == {
        "exact": torch.bfloat16,
        "inexact": torch.float32,
        "vector": torch.float32,
    }
    assert all(torch.equal(found[name].to(tensor.dtype), tensor) for name, tensor in tensors.items())


def test_a_codec_that_was_rounded_takes_half_the_room_and_opens_in_fp32(tmp_path: Path) -> None:
    from transformers import EncodecModel

    torch.manual_seed(0)
    size = EncodecSize(rate_hz=8000, ratios=(8, 5, 4), num_filters=4, latent_dim=8, codebook_size=16)
    codec = TrainableEncodec(size, tokens_per_batch=64)
    AudioTokenizer(codec.export()).save(tmp_path / "whole")
    model = rounded(codec.export(), keep=("codebook",))
    AudioTokenizer(model).save(tmp_path / "rounded")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "rounded")]
    assert sizes[1] < 0.75 * sizes[0]
    opened = EncodecModel.from_pretrained(tmp_path / "rounded").state_dict()
    for name, tensor in model.state_dict().items():
        assert opened[name].dtype == tensor.dtype and torch.equal(opened[name], tensor), name
