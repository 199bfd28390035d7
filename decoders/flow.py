"""Flow matching on straight lines, as pure functions (rectified flow, arXiv 2209.03003; SD3, arXiv 2403.03206).

Time t runs from 0 (data) to 1 (noise): x_t = (1 - t) x + t noise, whose velocity is noise - x. A network predicts the
data (x-prediction; the loss is taken on the velocity, JiT, arXiv 2511.13720): with patches as wide as a
small network, predicting velocity or noise fails (measured).

Dimension key: B samples; data have any further dimensions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

T_MIN = 0.05


def interpolate(x: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
    """x_t on the line from data to noise."""
    t = _like(t_B, x)
    return (1 - t) * x + t * noise


def sample_times(
    count: int,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Logit-normal times: the middle of the line, where the network decides most, is seen most."""
    normal_B = torch.randn(count, generator=generator)
    return torch.sigmoid(mean + std * normal_B).to(device)


def velocity(denoised: Tensor, x_t: Tensor, t_B: Tensor, *, t_min: float = T_MIN) -> Tensor:
    """Velocity at x_t of the line through `denoised`; `t_min` bounds the division near the data."""
    return (x_t - denoised) / _like(t_B, x_t).clamp_min(t_min)


def flow_loss(
    denoiser: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    condition: Tensor,
    *,
    t_min: float = T_MIN,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mean squared error of the velocity, at random times.

    Args:
        denoiser: (x_t, t, condition) to denoised data.
        x: data.
        condition: one a sample.
        t_min: as in `velocity`.
        generator: CPU generator; the global one by default.
    """
    t_B = sample_times(len(x), generator=generator, device=x.device)
    noise = torch.randn(x.shape, generator=generator).to(x)
    x_t = interpolate(x, noise, t_B)
    # the same divisor on both sides: below t_min the target shrinks as the prediction does
    error = velocity(denoiser(x_t, t_B, condition), x_t, t_B, t_min=t_min) - velocity(x, x_t, t_B, t_min=t_min)
    return error.square().mean()


def step_sigmas(steps: int) -> list[float]:
    """Noise levels of `steps` equal steps; a scheduler appends the 0.

    >>> step_sigmas(4)
    [1.0, 0.75, 0.5, 0.25]
    """
    return [1.0 - step / steps for step in range(steps)]


def _like(t_B: Tensor, x: Tensor) -> Tensor:
    return t_B.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
