"""A PatchGAN discriminator (pix2pix, arXiv 1611.07004) and its hinge losses, for the end of a pixel head's training.

Dimension key: B pictures, C colours, H x W pixels, h x w patches that are judged.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tokenizers_mm.config import Config
from tokenizers_mm.together import averaged


class PatchGANConfig(Config):
    """When and how strongly pictures are also judged."""

    weight: float = Field(0.0, ge=0)
    """Of the adversarial loss; 0 leaves it out. With `adaptive`, a factor on the ratio of gradients."""
    adaptive: bool = True
    """Scale by |gradient of reconstruction| / |gradient of the adversarial loss| at the head's last layer (VQGAN)."""
    start_share: float = Field(0.5, ge=0, le=1)
    """Share of the steps before the first judgement: earlier, blurred pictures are too easy to tell."""
    channels: int = Field(32, ge=1)
    layers: int = Field(2, ge=1, le=6)
    """Convolutions of stride 2: with 2, each judgement sees 34 x 34 pixels."""


class PatchDiscriminator(nn.Module):
    """Pictures to one judgement a patch: high is real."""

    def __init__(self, config: PatchGANConfig) -> None:
        super().__init__()
        widths = [config.channels * 2**i for i in range(config.layers)]
        blocks: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for before, after in zip(widths, [*widths[1:], 2 * widths[-1]], strict=True):
            stride = 2 if after in widths else 1
            # groups, not batches: a picture's judgement does not depend on its neighbours
            blocks += [nn.Conv2d(before, after, 4, stride, 1), nn.GroupNorm(8 if after % 8 == 0 else 1, after)]
            blocks += [nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*blocks, nn.Conv2d(2 * widths[-1], 1, 4, 1, 1))

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Pixels in [0, 1] to B x 1 x h x w."""
        judged: Tensor = self.layers(pixels_BCHW * 2 - 1)
        return judged


def discriminator_loss(real_B1hw: Tensor, drawn_B1hw: Tensor) -> Tensor:
    """Hinge (arXiv 1705.02894): real above 1, drawn below -1."""
    return (F.relu(1 - real_B1hw.float()).mean() + F.relu(1 + drawn_B1hw.float()).mean()) / 2


def head_loss(discriminator: PatchDiscriminator, drawn_BCHW: Tensor) -> Tensor:
    """What the drawing side minimises; its gradient reaches the pixels, not the discriminator."""
    frozen = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
    judged: Tensor = torch.func.functional_call(discriminator, frozen, (drawn_BCHW,))
    return -judged.float().mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """|gradient of the first| / |gradient of the second| at `last_layer`, in [0, 10,000] (VQGAN, equation 7)."""
    (ours,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (theirs,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    ours, theirs = averaged(ours), averaged(theirs)  # of the whole batch: else each process weighs by another ratio
    return (ours.norm() / (theirs.norm() + 1e-4)).clamp(0, 1e4).detach()
