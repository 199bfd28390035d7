"""EnCodec's discriminator and loss balancer: who gets which gradient, and how much of it."""

from __future__ import annotations

import copy

import pytest
import torch
from pydantic import ValidationError

from tokenizers_mm.balancer import Balancer, with_gradient
from tokenizers_mm.msstft import (
    MSSTFTConfig,
    MultiScaleSTFTDiscriminator,
    adversarial_loss,
    discriminator_loss,
    feature_loss,
    judge_frozen,
)


def discriminator(channels: int = 4) -> MultiScaleSTFTDiscriminator:
    torch.manual_seed(0)
    return MultiScaleSTFTDiscriminator(MSSTFTConfig(channels=channels, windows=(256, 128)))


def tones_and_noise(seed: int, count: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pitch = 0.05 + 0.2 * torch.rand(count, 1, generator=generator)
    return torch.sin(torch.arange(1024) * pitch), torch.randn(count, 1024, generator=generator) * 0.7


def test_every_scale_judges_at_its_own_resolution() -> None:
    judged = discriminator()(torch.randn(3, 1024))
    frames = [(1024 - window) // (window // 4) + 1 for window in (256, 128)]
    bins = []
    for window in (256, 128):
        size = window // 2 + 1
        for _ in range(3):
            size = (size - 1) // 2 + 1
        bins.append(size)
    assert [tuple(j.score.shape) for j in judged] == [(3, 1, n, f) for n, f in zip(frames, bins, strict=True)]
    assert [len(j.features) for j in judged] == [5, 5]
    with pytest.raises(ValidationError, match="multiples of 4"):
        MSSTFTConfig(windows=(130,))


def test_it_learns_to_tell_tones_from_noise() -> None:
    judge = discriminator(8)
    optimizer = torch.optim.Adam(judge.parameters(), 3e-3)
    for step in range(25):
        real, other = tones_and_noise(step)
        optimizer.zero_grad()
        discriminator_loss(judge(real), judge(other)).backward()
        optimizer.step()
    real, other = tones_and_noise(1000)
    with torch.no_grad():
        assert float(discriminator_loss(judge(real), judge(other))) < 0.5, "2 is a coin's"
        assert float(adversarial_loss(judge(real))) < float(adversarial_loss(judge(other)))


def test_the_codecs_side_gives_the_judge_no_gradient() -> None:
    judge = discriminator()
    sound, other = tones_and_noise(0)
    other.requires_grad_()
    decoded = judge_frozen(judge, other)
    for mine, plain in zip(decoded, judge(other), strict=True):
        assert torch.equal(mine.score, plain.score)
    (adversarial_loss(decoded) + feature_loss(judge(sound), decoded)).backward()
    assert other.grad is not None and other.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in judge.parameters())


def test_feature_matching_is_relative_and_zero_for_the_same_sound() -> None:
    judge = discriminator()
    sound, other = tones_and_noise(0)
    near, same, far = (feature_loss(judge(sound), judge(decoded)).item() for decoded in (0.9 * sound, sound, other))
    assert same == 0 < near < far
    louder = [[j._replace(features=[10 * f for f in j.features]) for j in judge(decoded)] for decoded in (sound, other)]
    assert feature_loss(*louder).item() == pytest.approx(far)


def test_shares_of_the_gradient_do_not_depend_on_the_scale_of_a_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    target, other = torch.randn(2, 5, 40, generator=generator)

    def gradient(scale: float) -> torch.Tensor:
        balancer = Balancer({"a": 3.0, "b": 1.0})
        for step in range(4):
            leaf = torch.randn(5, 40, generator=torch.Generator().manual_seed(step)).requires_grad_()
            found: torch.Tensor = balancer({"a": scale * (leaf - target).abs().sum(), "b": (leaf * other).sum()}, leaf)
        return found

    assert torch.allclose(gradient(1.0), gradient(1e4), rtol=1e-4)
    leaf = torch.zeros(1, 2, requires_grad=True)
    shares = Balancer({"a": 3.0, "b": 1.0})({"a": 7 * leaf[0, 0], "b": 0.1 * leaf[0, 1]}, leaf)
    assert torch.allclose(shares, torch.tensor([[0.75, 0.25]]))
    leaf = torch.zeros(5, 40, requires_grad=True)
    alone = Balancer({"a": 3.0, "b": 1.0})({"b": (leaf * other).sum()}, leaf)
    assert torch.allclose(alone, other / other.norm(dim=1).mean()), "an absent loss takes no share"
    with pytest.raises(ValueError, match="above 0"):
        Balancer({"a": 0.0})


def test_the_average_of_norms_is_the_papers_and_is_kept() -> None:
    balancer = Balancer({"a": 1.0}, decay=0.5)
    norms, average, weight = (1.0, 4.0, 2.0), 0.0, 0.0
    for norm in norms:
        leaf = torch.zeros(1, 1, requires_grad=True)
        found = float(balancer({"a": norm * leaf.sum()}, leaf))
        average, weight = 0.5 * average + 0.5 * norm, 0.5 * weight + 0.5
        assert found == pytest.approx(norm / (average / weight))
    kept = Balancer({"a": 1.0}, decay=0.5)
    kept.load_state_dict(copy.deepcopy(balancer.state_dict()))
    leaf = torch.zeros(1, 1, requires_grad=True)
    assert float(kept({"a": leaf.sum()}, leaf)) == float(balancer({"a": leaf.sum()}, leaf))


def test_a_loss_with_a_given_gradient() -> None:
    weight = torch.tensor([2.0], requires_grad=True)
    output = weight * torch.tensor([[1.0, 2.0, 3.0]])
    loss = with_gradient(torch.tensor(7.0), output, torch.tensor([[0.1, 0.2, 0.3]]))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(7.0)
    assert weight.grad is not None and float(weight.grad) == pytest.approx(0.1 + 0.4 + 0.9)
