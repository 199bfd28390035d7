"""The loudness loss against PESQ itself, and what it must do where nothing can be heard."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tokenizers_mm.loudness import loudness_distance

RATE_HZ = 16_000


def speech_like(seconds: float, seed: int = 0) -> torch.Tensor:
    """Syllables of a buzz through three formants, with pauses."""
    random = np.random.default_rng(seed)
    t = np.arange(round(seconds * RATE_HZ)) / RATE_HZ
    pitch = 110 + 30 * np.sin(2 * np.pi * 0.7 * t + seed)
    phase = 2 * np.pi * np.cumsum(pitch) / RATE_HZ
    sound = np.zeros_like(t)
    for number in range(1, 40):
        hz = 130 * number
        formants = sum(math.exp(-(((hz - f) / 150) ** 2)) for f in (600 + 80 * seed, 1500, 2700))
        sound += (0.03 + formants) / number * np.sin(number * phase + random.uniform(0, 6.28))
    sound *= np.clip(np.sin(2 * np.pi * 2.5 * t), 0, None) ** 0.5
    sound += random.normal(size=len(t)) * 0.001
    return torch.from_numpy((0.2 * sound / np.abs(sound).max()).astype(np.float32))[None]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(loudness_distance(a, b, rate_hz=RATE_HZ))


def noisy(sound: torch.Tensor, snr_db: float, seed: int = 1) -> torch.Tensor:
    noise = torch.randn(sound.shape, generator=torch.Generator().manual_seed(seed))
    return sound + noise * sound.std() * 10 ** (-snr_db / 20)


def test_it_ranks_noises_as_pesq_does() -> None:
    pesq = pytest.importorskip("pesq", reason="the extra [eval] is not installed")
    ours, theirs = [], []
    for seed in range(4):
        sound = speech_like(2.0, seed)
        for snr_db in (0, 6, 12, 18, 24, 30, 40):
            decoded = noisy(sound, snr_db, seed)
            mos = pesq.pesq(RATE_HZ, sound[0].numpy(), decoded[0].numpy(), "wb")
            raw = (3.8224 - math.log(4 / (mos - 0.999) - 1)) / 1.3669  # ITU-T P.862.2, backwards
            ours.append(distance(decoded, sound))
            theirs.append(4.5 - raw)
    assert np.corrcoef(ours, theirs)[0, 1] > 0.95


def test_equal_sounds_differ_by_nothing_and_noise_by_more_and_more() -> None:
    sound = speech_like(1.0)
    found = [distance(sound, sound)] + [distance(noisy(sound, snr_db), sound) for snr_db in (50, 35, 20, 5)]
    assert found[0] < 0.02 and found == sorted(found) and found[-1] > 1


def test_what_was_added_is_heard_more_than_what_is_missing() -> None:
    sound = speech_like(1.0)
    t = torch.arange(sound.shape[1]) / RATE_HZ
    tone = 0.05 * torch.sin(2 * torch.pi * 4000 * t)[None]
    assert distance(sound + tone, sound) > 1.5 * distance(sound, sound + tone)


def test_only_levels_relative_to_the_original_count() -> None:
    sound = speech_like(1.0)
    decoded = noisy(sound, 15)
    assert distance(decoded * 0.1, sound * 0.1) == pytest.approx(distance(decoded, sound), rel=1e-3)
    hiss = 1e-5 * torch.randn(1, RATE_HZ, generator=torch.Generator().manual_seed(0))
    assert distance(hiss * 1.5, hiss) < 0.1, "near silence is not turned up to the level of speech"


def test_small_differences_are_not_heard() -> None:
    sound = speech_like(1.0)
    assert distance(1.3 * sound, sound) < 0.03 and distance(3 * sound, sound) > 0.5, "a quarter more loudness is masked"


@pytest.mark.parametrize("case", ["half", "equal", "silence", "silent original", "silent decoded", "one window"])
def test_gradients_are_finite(case: str) -> None:
    sound = speech_like(0.5)
    silence = torch.zeros_like(sound)
    original, decoded = {
        "half": (sound, torch.cat([sound[:, :4000], 2 * sound[:, 4000:]], 1)),
        "equal": (sound, sound),
        "silence": (silence, silence),
        "silent original": (silence, sound),
        "silent decoded": (sound, silence),
        "one window": (sound[:, 2000:2512], sound[:, 1900:2412]),
    }[case]
    decoded = decoded.clone().requires_grad_()
    loudness_distance(decoded, original, rate_hz=RATE_HZ).backward()
    assert decoded.grad is not None and decoded.grad.isfinite().all()


def test_its_gradient_leads_to_the_original() -> None:
    sound = speech_like(1.0)
    decoded = noisy(sound, 10).requires_grad_()
    before = loudness_distance(decoded, sound, rate_hz=RATE_HZ)
    before.backward()
    assert decoded.grad is not None
    step = 0.05 * float((decoded.detach() - sound).norm() / decoded.grad.norm())
    assert distance(decoded.detach() - step * decoded.grad, sound) < float(before.detach()) - 0.01


@pytest.mark.parametrize("rate_hz", [8_000, 16_000, 24_000, 48_000])
def test_other_rates_and_batches(rate_hz: int) -> None:
    sound = torch.cat([speech_like(1.0, seed) for seed in (0, 1)])
    decoded = noisy(sound, 12)
    together = loudness_distance(decoded, sound, rate_hz=rate_hz)
    alone = [loudness_distance(decoded[i : i + 1], sound[i : i + 1], rate_hz=rate_hz) for i in range(2)]
    assert float(together) == pytest.approx(float(torch.stack(alone).mean()), rel=1e-5) and float(together) > 0.5


def test_it_stays_fp32_under_autocast() -> None:
    sound = speech_like(1.0)
    decoded = noisy(sound, 30)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loudness_distance(decoded, sound, rate_hz=RATE_HZ)
    assert found.dtype == torch.float32 and float(found) == pytest.approx(distance(decoded, sound), rel=1e-6)
