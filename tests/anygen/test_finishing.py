"""Stage `decoder`, second phase: learning through the steps of drawing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_decoder

from anygen.stages.finishing import FinishingConfig, FinishingLoss
from anygen.training.loop import LoopConfig
from decoders.carried import open_renderer


@pytest.fixture
def made(tmp_path: Path, vocabulary: Any, layout: Any, tokenizers: dict[str, Any]) -> Any:
    """A fresh decoder, a tokenizer, and a batch of its codes and of what its pixel head draws from them."""
    tiny_decoder(tmp_path / "tiny", layout, vocabulary, hidden_dim=None)
    decoder, image = open_renderer(tmp_path / "tiny", device=torch.device("cpu")), tokenizers["image"]
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(6, 3, 16, 16, generator=generator).round()
    codes = image.encode_pixels(pixels).clone()
    return decoder, image, (codes, pixels)


def losses_of(made: Any, **weights: float) -> FinishingLoss:
    decoder, image, _ = made
    zero = dict.fromkeys(("pixel_weight", "structure_weight", "agreement_weight", "flow_weight"), 0.0)
    config = FinishingConfig(**(zero | weights), loop=LoopConfig(steps=1))
    return FinishingLoss(decoder, image, config, drop_share=0.1)


@pytest.mark.parametrize("weight", ["pixel_weight", "structure_weight", "agreement_weight", "flow_weight"])
def test_each_weight_teaches_denoiser_and_codes_and_leaves_the_tokenizer(made: Any, weight: str) -> None:
    _, image, batch = made
    losses = losses_of(made, **{weight: 1.0})
    before = {name: tensor.clone() for name, tensor in image.encoder.state_dict().items()}
    losses(batch)[0].backward()
    for part in (losses.denoiser, losses.codes):
        assert any(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in part.parameters()), weight
    assert all(p.grad is None for p in image.encoder.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in image.encoder.state_dict().items())
    assert not any("encoder" in name for name, _ in losses.named_parameters()), "the tokenizer is not what is trained"


def test_the_first_step_of_four_is_taught_too(made: Any) -> None:
    """Gradients pass through later steps to earlier ones: with the last call's own path cut, some is left."""
    decoder, _, (codes, _) = made
    calls, plain = [], decoder.denoiser.forward

    def first_only(x: Any, t: Any, condition: Any) -> Any:
        calls.append(1)
        denoised = plain(x, t, condition.detach() if len(calls) > 1 else condition)
        return denoised

    decoder.denoiser.forward = first_only
    condition = decoder.codes(codes).detach().requires_grad_(True)
    decoder.draw(condition, steps=4, generator=torch.Generator().manual_seed(0)).square().sum().backward()
    assert len(calls) == 4 and float(condition.grad.abs().sum()) > 0


def test_a_few_steps_make_drawings_that_are_read_as_their_codes(made: Any) -> None:
    decoder, image, (codes, pixels) = made

    def agreement() -> float:
        drawn = decoder(codes=codes, generator=torch.Generator().manual_seed(7)).data_BCHW
        return float((image.encode_pixels((drawn.clamp(-1, 1) + 1) / 2) == codes).float().mean())

    losses = losses_of(made, pixel_weight=10.0, agreement_weight=0.2)
    optimizer = torch.optim.AdamW(losses.parameters(), lr=3e-3)
    before = agreement()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(150):
            optimizer.zero_grad()
            losses((codes, pixels))[0].backward()
            optimizer.step()
    assert before < 0.5 and agreement() > before + 0.3, (before, agreement())
