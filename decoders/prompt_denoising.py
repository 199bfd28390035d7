"""The training loss of a mapper through the frozen denoiser of a pretrained pipeline: MiniGPT-5's LDM term.

Noise is added to a picture's latents as the pipeline's scheduler would, and the denoiser, which read the mapper's
embeddings, is asked for what it was trained to predict: the noise or the velocity of a diffusion (weighted by
min-SNR-5, arXiv 2303.09556, as in MiniGPT-5's code), or the velocity of a straight-line flow (Stable Diffusion 3,
arXiv 2403.03206: logit-normal times, shifted as in the scheduler).

Dimension key: B samples, C channels, H W of pictures, h w of latents, Q tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from decoders.prompt_ports import GENERATED, MAIN, POOLED, denoiser_of, named
from tokenizers_mm.errors import InputError

MIN_SNR = 5.0


@dataclass(frozen=True)
class Noised:
    """Latents with noise, and what the denoiser is to make of them."""

    noisy_BChw: Tensor
    time_B: Tensor
    """In the units that the denoiser takes."""
    target_BChw: Tensor
    weight_B: Tensor


@torch.no_grad()
def latents_of(pipeline: Any, pixels_BCHW: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Latents of pictures in [0, 1], scaled as the denoiser expects them: B x C x h x w.

    Args:
        pipeline: with its VAE.
        pixels_BCHW: sides are multiples of the VAE's factor.
        generator: draws from the VAE's posterior; None takes its mode.
    """
    vae, dtype = pipeline.vae, pipeline.vae.dtype
    if dtype == torch.float16 and vae.config.get("force_upcast"):  # it overflows
        vae.to(torch.float32)
    encoded = vae.encode((pixels_BCHW * 2 - 1).to(vae.device, vae.dtype))
    vae.to(dtype)
    if hasattr(encoded, "latent_dist"):
        posterior = encoded.latent_dist
        latents_BChw = posterior.mode() if generator is None else posterior.sample(generator)
    else:
        latents_BChw = encoded.latent
    shift = vae.config.get("shift_factor") or 0.0
    return (latents_BChw - shift) * vae.config.scaling_factor


def denoising_loss(
    pipeline: Any, latents_BChw: Tensor, embeds: Mapping[str, Tensor], *, generator: torch.Generator
) -> Tensor:
    """How far the frozen denoiser is from its target when it reads these embeddings; a scalar in fp32.

    Args:
        pipeline: its denoiser and scheduler are used; nothing of it changes.
        latents_BChw: of what is to be drawn, from `latents_of`.
        embeds: by port, B x Q x D, pooled ones B x D; gradients flow into them.
        generator: of times and noise, on the latents' device.

    Raises:
        InputError: a scheduler whose training target is not known.
    """
    noised = add_noise(pipeline.scheduler, latents_BChw.float(), generator=generator)
    predicted_BChw = _predict(pipeline, noised, embeds)
    error_B = F.mse_loss(predicted_BChw, noised.target_BChw, reduction="none").flatten(1).mean(1)
    return (noised.weight_B * error_B).mean()


def add_noise(scheduler: Any, latents_BChw: Tensor, *, generator: torch.Generator) -> Noised:
    """Noise as the scheduler's kind of process adds it, and the target that goes with it."""
    config = scheduler.config
    kind = config.get("prediction_type", "flow_prediction" if "shift" in config else "epsilon")
    noise_BChw = torch.randn(latents_BChw.shape, generator=generator, device=latents_BChw.device)
    if kind == "flow_prediction":
        return _flow(config, latents_BChw, noise_BChw, generator)
    if kind not in ("epsilon", "v_prediction", "sample") or not hasattr(scheduler, "alphas_cumprod"):
        raise InputError(
            f"{type(scheduler).__name__} predicts {kind!r}: how such a denoiser is trained is not known here"
        )
    return _diffusion(scheduler, kind, latents_BChw, noise_BChw, generator)


def _flow(config: Any, x_BChw: Tensor, noise_BChw: Tensor, generator: torch.Generator) -> Noised:
    shift = float(config.get("shift") or config.get("flow_shift") or 1.0)
    even_B = torch.randn(len(x_BChw), generator=generator, device=x_BChw.device).sigmoid()
    sigma_B = shift * even_B / (1 + (shift - 1) * even_B)
    sigma_B111 = sigma_B[:, None, None, None]
    return Noised(
        (1 - sigma_B111) * x_BChw + sigma_B111 * noise_BChw,
        sigma_B * config["num_train_timesteps"],
        noise_BChw - x_BChw,
        torch.ones_like(sigma_B),
    )


def _diffusion(scheduler: Any, kind: str, x_BChw: Tensor, noise_BChw: Tensor, generator: torch.Generator) -> Noised:
    num_times = scheduler.config["num_train_timesteps"]
    time_B = torch.randint(num_times, (len(x_BChw),), generator=generator, device=x_BChw.device)
    kept_B = scheduler.alphas_cumprod.to(x_BChw)[time_B]
    signal, noise = (share.sqrt()[:, None, None, None] for share in (kept_B, 1 - kept_B))
    targets = {"epsilon": noise_BChw, "sample": x_BChw, "v_prediction": signal * noise_BChw - noise * x_BChw}
    snr_B = kept_B / (1 - kept_B)
    shares = {"epsilon": snr_B.clamp(min=1e-8), "sample": torch.ones_like(snr_B), "v_prediction": snr_B + 1}
    weight_B = snr_B.clamp(max=MIN_SNR) / shares[kind]
    return Noised(signal * x_BChw + noise * noise_BChw, time_B, targets[kind], weight_B)


def _predict(pipeline: Any, noised: Noised, embeds: Mapping[str, Tensor]) -> Tensor:
    """The denoiser's answer, with what its kind asks for beside latents, time and embeddings."""
    denoiser = denoiser_of(pipeline)
    config = denoiser.config
    embeds = {name: value.to(denoiser.device, denoiser.dtype) for name, value in embeds.items()}
    noisy_BChw = noised.noisy_BChw.to(denoiser.device, denoiser.dtype)
    mask_BQ = torch.ones(embeds[MAIN].shape[:2], dtype=torch.long, device=noisy_BChw.device)
    offered = {
        "sample": noisy_BChw,
        "hidden_states": noisy_BChw,
        "timestep": noised.time_B * (config.get("timestep_scale") or 1.0),
        "encoder_hidden_states": embeds.get(GENERATED, embeds[MAIN]),
        "encoder_attention_mask": mask_BQ if "caption_channels" in config else None,
        "encoder_hidden_states_1": embeds[MAIN],
        "encoder_attention_mask_1": mask_BQ,
        "pooled_projections": embeds.get(POOLED),
        "added_cond_kwargs": _conditions(pipeline, config, noisy_BChw, embeds),
        "return_dict": False,
    }
    answer_BChw = denoiser(**named(denoiser.forward, offered))[0].float()
    return answer_BChw[:, : noisy_BChw.shape[1]]  # those that learned a variance give it behind


def _conditions(pipeline: Any, config: Any, noisy_BChw: Tensor, embeds: Mapping[str, Tensor]) -> dict[str, Any]:
    height, width = (side * pipeline.vae_scale_factor for side in noisy_BChw.shape[2:])
    if "addition_time_embed_dim" in config and POOLED in embeds:  # SDXL: original size, crop, target size
        sizes_6 = torch.tensor([height, width, 0, 0, height, width], device=noisy_BChw.device)
        return {"text_embeds": embeds[POOLED], "time_ids": sizes_6.expand(len(noisy_BChw), 6).to(noisy_BChw)}
    if config.get("use_additional_conditions"):  # PixArt-alpha at 1024 px
        sizes_B2 = torch.tensor([[height, width]]).to(noisy_BChw).expand(len(noisy_BChw), 2)
        return {"resolution": sizes_B2, "aspect_ratio": sizes_B2[:, :1] / sizes_B2[:, 1:]}
    return {"resolution": None, "aspect_ratio": None}
