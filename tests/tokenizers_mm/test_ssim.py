"""SSIM with gradients equals scikit-image's on the windows that both count."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tokenizers_mm.ssim import structural_similarity


def test_it_is_wang_et_al() -> None:
    metrics = pytest.importorskip("skimage.metrics", reason='needs scikit-image: pip install "anygen[eval]"')
    generator = torch.Generator().manual_seed(0)
    real = torch.rand(2, 3, 24, 20, generator=generator)
    drawn = (real + 0.2 * torch.randn(2, 3, 24, 20, generator=generator)).clamp(0, 1)
    expected = [
        metrics.structural_similarity(
            r.permute(1, 2, 0).numpy(),
            d.permute(1, 2, 0).numpy(),
            channel_axis=2,
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for r, d in zip(real, drawn, strict=True)
    ]
    assert structural_similarity(real, drawn).item() == pytest.approx(float(np.mean(expected)), abs=1e-5)


def test_it_is_one_for_equal_pictures_and_has_gradients() -> None:
    real = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert structural_similarity(real, real).item() == pytest.approx(1.0, abs=1e-5)
    drawn = torch.full_like(real, 0.5).requires_grad_()
    similarity = structural_similarity(real, drawn)
    similarity.backward()
    assert drawn.grad is not None
    better = (drawn + 10 * drawn.grad).detach()
    assert structural_similarity(real, better).item() > similarity.item()
