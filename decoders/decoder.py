"""`FlowDecoder`: noise and a condition to media, in few steps; a `DiffusionPipeline` with its own saving and loading.

Stochastic steps (denoise, then add fresh noise for the next level) need four network calls where plain Euler needs
twenty and is worse (measured).

Dimension key: B samples, C H W data.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor

from decoders.denoiser import FlowTransformer
from decoders.drivers import CodeEmbedder, VokenMapper
from decoders.flow import step_sigmas, velocity
from decoders.sound import LatentScale
from tokenizers_mm import compat  # noqa: F401  before diffusers
from tokenizers_mm.errors import InputError


@dataclass(frozen=True, eq=False)
class DecoderOutput:
    """What was drawn."""

    data_BCHW: Tensor
    """In [-1, 1] for pictures."""

    @property
    def images(self) -> list[Image.Image]:
        """As pictures."""
        pixels = ((self.data_BCHW.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return [Image.fromarray(np.ascontiguousarray(p.permute(1, 2, 0).cpu().numpy())) for p in pixels]


class FlowDecoder(DiffusionPipeline):  # type: ignore[misc]
    """A denoiser with its drivers.

    Args:
        denoiser: of the media.
        scheduler: `FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)` for few steps.
        codes: driver for codes.
        vokens: driver for hidden states at vokens.
        scale: of the codec's latents, where the media are sounds.
    """

    _optional_components = ["codes", "vokens", "scale"]

    def __init__(
        self,
        denoiser: FlowTransformer,
        scheduler: FlowMatchEulerDiscreteScheduler,
        codes: CodeEmbedder | None = None,
        vokens: VokenMapper | None = None,
        scale: LatentScale | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(denoiser=denoiser, scheduler=scheduler, codes=codes, vokens=vokens, scale=scale)

    @property
    def num_patches(self) -> int:
        """Features of a condition."""
        return int(self.denoiser.num_patches)

    def save_small(self, folder: Path) -> None:
        """`save_pretrained` in bf16, as bundles hold weights; the decoder itself stays on the CPU in bf16."""
        for part in self.components.values():
            if isinstance(part, torch.nn.Module):
                torch.nn.Module.to(
                    part, "cpu", torch.bfloat16
                )  # ModelMixin's own warns of modules to keep in fp32: none
        self.save_pretrained(folder)
        for path in folder.rglob("*.json"):  # where the parts were opened is nobody's business, and differs by run
            facts = json.loads(path.read_text(encoding="utf-8"))
            if facts.pop("_name_or_path", None) is not None:
                path.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def condition(self, *, codes: Tensor | None = None, vokens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """A condition, and the null of its driver.

        Raises:
            InputError: not exactly one of the two, or one without its driver.
        """
        given = {name: value for name, value in (("codes", codes), ("vokens", vokens)) if value is not None}
        if len(given) != 1:
            raise InputError("a decoder is driven by either codes or vokens")
        name, value = next(iter(given.items()))
        driver = getattr(self, name)
        if driver is None:
            raise InputError(f"this decoder is not driven by {name}")
        return driver(value.to(self.device)), driver.null(len(value))

    @torch.no_grad()
    def __call__(
        self,
        *,
        codes: Tensor | None = None,
        vokens: Tensor | None = None,
        steps: int = 4,
        guidance: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> DecoderOutput:
        """Draw.

        Args:
            codes: B x P codes, or
            vokens: B x N x D hidden states.
            steps: network calls, twice as many with guidance.
            guidance: extrapolation from the null to the condition; 1 is off.
            generator: one, or one a sample.
        """
        condition, null = self.condition(codes=codes, vokens=vokens)
        return DecoderOutput(self.draw(condition, null, steps=steps, guidance=guidance, generator=generator))

    def draw(
        self,
        condition: Tensor,
        null: Tensor | None = None,
        *,
        steps: int = 4,
        guidance: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Tensor:
        """Data from a condition, B x C x H x W; gradients pass through every step. `null` is for guidance only."""
        from diffusers.utils.torch_utils import randn_tensor

        config = self.denoiser.config
        shape = (len(condition), config.channels, *config.size)
        x: Any = randn_tensor(shape, generator=generator, device=condition.device, dtype=condition.dtype)
        self.scheduler.set_timesteps(sigmas=step_sigmas(steps), device=condition.device)
        for timestep in self.scheduler.timesteps:
            t_B = (timestep / self.scheduler.config.num_train_timesteps).expand(len(x))
            denoised = self.denoiser(x, t_B, condition)
            if guidance != 1:
                other = self.denoiser(x, t_B, null)
                denoised = other + guidance * (denoised - other)
            x = self.scheduler.step(velocity(denoised, x, t_B), timestep, x, generator=generator).prev_sample
        return x
