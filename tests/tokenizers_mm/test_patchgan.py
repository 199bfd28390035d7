"""The PatchGAN: hinge losses by hand, gradients that stay on their side, judgements of a picture alone."""

from __future__ import annotations

import pytest
import torch

from tokenizers_mm.patchgan import PatchDiscriminator, PatchGANConfig, adaptive_weight, discriminator_loss, head_loss

CONFIG = PatchGANConfig(weight=1.0, channels=8, layers=2)


def discriminator() -> PatchDiscriminator:
    torch.manual_seed(0)
    return PatchDiscriminator(CONFIG)


def test_hinge_losses_by_hand() -> None:
    real, drawn = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.5])
    assert float(discriminator_loss(real, drawn)) == pytest.approx(((0 + 0.5) / 2 + (0 + 1.5) / 2) / 2)


def test_a_judgement_is_of_a_patch_of_one_picture() -> None:
    judge = discriminator()
    pixels = torch.rand(3, 3, 64, 64)
    together = judge(pixels)
    assert together.shape[:2] == (3, 1) and together.shape[2] > 1
    assert torch.allclose(together[1], judge(pixels[1:2])[0], atol=1e-5)


def test_each_side_gets_only_its_own_gradient() -> None:
    judge = discriminator()
    drawn = torch.rand(2, 3, 32, 32, requires_grad=True)
    loss = head_loss(judge, drawn)
    assert loss.item() == pytest.approx(-judge(drawn).mean().item(), rel=1e-5)
    loss.backward()
    assert drawn.grad is not None and drawn.grad.abs().sum() > 0
    assert all(p.grad is None for p in judge.parameters()), "the drawing side does not train its judge"
    discriminator_loss(judge(torch.rand(2, 3, 32, 32)), judge(drawn.detach())).backward()
    assert all(p.grad is not None for p in judge.parameters())


def test_the_adaptive_weight_is_the_ratio_of_gradients() -> None:
    weight = torch.ones(3, requires_grad=True)
    ratio = adaptive_weight((weight * 2).sum(), (weight * torch.tensor([0.0, 0.0, 3.0])).sum(), weight)
    assert float(ratio) == pytest.approx(12**0.5 / 3, rel=1e-3)
    assert not ratio.requires_grad


def test_a_judge_learns_to_tell_noise_from_pictures() -> None:
    judge = discriminator()
    optimizer = torch.optim.Adam(judge.parameters(), 2e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        smooth = torch.rand(8, 3, 4, 4, generator=generator).repeat_interleave(8, 2).repeat_interleave(8, 3)
        loss = discriminator_loss(judge(smooth), judge(torch.rand(8, 3, 32, 32, generator=generator)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.3
