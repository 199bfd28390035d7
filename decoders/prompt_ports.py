"""Where a pretrained diffusers pipeline takes embeddings in place of text, of which widths, and what text gives there.

Every text-to-image pipeline has a port `prompt_embeds`; SDXL, SD3 and Flux have a pooled vector beside it, PixArt and
Sana a mask, AudioLDM2 a second port for the vectors that its GPT-2 writes. What a pipeline has is read from the
signature of its call and from its denoiser's config, so one of another name that keeps these conventions works too.

Dimension key: B samples, Q tokens of a port, D its width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenizers_mm.errors import InputError

MAIN, POOLED, GENERATED = "prompt_embeds", "pooled_prompt_embeds", "generated_prompt_embeds"
MASKS = ("prompt_attention_mask", "attention_mask", "prompt_embeds_mask")
CLIP_TOKENS = 77


@dataclass(frozen=True)
class Port:
    """One argument that takes embeddings."""

    width: int
    num_tokens: int | None = None
    """How many embeddings, where the pipeline leaves no choice; the pooled port takes one, without a token axis."""


def denoiser_of(pipeline: Any) -> Any:
    """The UNet or transformer of a pipeline, a model of diffusers.

    Raises:
        InputError: it has neither.
    """
    for name in ("unet", "transformer"):
        if isinstance(found := getattr(pipeline, name, None), nn.Module):
            return found
    raise InputError(
        f"{type(pipeline).__name__} has neither a unet nor a transformer to be driven by prompt embeddings"
    )


def named(call: Callable[..., Any], offered: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `offered` that a function's signature names."""
    takes = inspect.signature(call).parameters
    return {name: value for name, value in offered.items() if name in takes}


def ports_of(pipeline: Any) -> dict[str, Port]:
    """The ports of a pipeline by the name of their argument, `prompt_embeds` first.

    Raises:
        InputError: the pipeline takes no prompt embeddings, or its config does not say how wide they are.
    """
    takes = inspect.signature(type(pipeline).__call__).parameters
    if MAIN not in takes:
        raise InputError(
            f"{type(pipeline).__name__} takes no prompt_embeds; pipelines that do: Stable Diffusion 1.x, 2.x, XL "
            "and 3, PixArt, Sana, Flux, AudioLDM2"
        )
    config = denoiser_of(pipeline).config
    if GENERATED in takes:
        return _audioldm2_ports(config)
    width = next((config[n] for n in ("joint_attention_dim", "caption_channels") if config.get(n)), None)
    width = width or config.get("cross_attention_dim")
    if not isinstance(width, int):
        raise InputError(f"{type(pipeline).__name__}: its denoiser's config gives no one width of prompt embeddings")
    return {MAIN: Port(width)} | ({POOLED: Port(_pooled_width(config), 1)} if POOLED in takes else {})


def _pooled_width(config: Any) -> int:
    if config.get("pooled_projection_dim"):
        return int(config["pooled_projection_dim"])
    num_sizes = 6  # SDXL adds the pooled vector to the embeddings of six sizes
    return int(config["projection_class_embeddings_input_dim"]) - num_sizes * int(config["addition_time_embed_dim"])


def _audioldm2_ports(config: Any) -> dict[str, Port]:
    """Its UNet has per block a row of widths: the first two attend to what GPT-2 wrote, the others to the text."""
    rows = [row for row in config["cross_attention_dim"] if isinstance(row, Sequence)]
    generated = {width for row in rows for width in row[:2] if width}
    text = {width for row in rows for width in row[2:] if width}
    if len(generated) != 1 or len(text) != 1:
        raise InputError(
            f"its UNet attends to embeddings of {config['cross_attention_dim']}, not to two of one width each"
        )
    return {MAIN: Port(text.pop()), GENERATED: Port(generated.pop())}


def masks_for(call: Callable[..., Any], embeds_BQD: Tensor) -> dict[str, Tensor]:
    """The masks that a call asks for: every embedding is attended to."""
    mask_BQ = torch.ones(embeds_BQD.shape[:2], dtype=torch.long, device=embeds_BQD.device)
    return named(call, {f"{sign}{name}": mask_BQ for name in MASKS for sign in ("", "negative_")})


def text_at_ports(pipeline: Any, captions: Sequence[str], num_tokens: Mapping[str, int]) -> dict[str, Tensor]:
    """What the pipeline's own text encoders give for captions, at each port: B x Q x D.

    Where they give a mask, the places behind a caption's end repeat its last embedding: a mapper writes all Q, all are
    attended to, and vectors of padding are none that the denoiser has seen.

    Args:
        pipeline: with its text encoders and tokenizers.
        captions: B texts.
        num_tokens: Q of each port.

    Raises:
        InputError: the pipeline was opened without text encoders, or gives another number of embeddings.
    """
    if getattr(pipeline, "tokenizer", None) is None or getattr(pipeline, "text_encoder", None) is None:
        raise InputError("the pipeline was opened without its text encoder: aligning to captions needs it (text=True)")
    takes = inspect.signature(pipeline.encode_prompt).parameters
    behind_clip = CLIP_TOKENS if "prompt_3" in takes else 0  # SD3 writes T5 behind CLIP
    offered = {
        "prompt": list(captions),
        "prompt_2": None,
        "prompt_3": None,
        "device": denoiser_of(pipeline).device,
        "num_images_per_prompt": 1,
        "num_waveforms_per_prompt": 1,
        "do_classifier_free_guidance": False,
        "max_sequence_length": max(1, num_tokens[MAIN] - behind_clip),
        "max_new_tokens": num_tokens.get(GENERATED),
    }
    with torch.no_grad():
        given = pipeline.encode_prompt(**named(pipeline.encode_prompt, offered))
    mask_BQ = given[1] if GENERATED in num_tokens or "prompt_attention_mask" in takes else None
    found = {MAIN: _fitted(given[0], mask_BQ, num_tokens[MAIN])}
    if GENERATED in num_tokens:
        found[GENERATED] = _fitted(given[2], None, num_tokens[GENERATED])
    if POOLED in num_tokens:
        found[POOLED] = given[2][:, None]
    return found


def _fitted(embeds_BQD: Tensor, mask_BQ: Tensor | None, num_tokens: int) -> Tensor:
    if mask_BQ is None:
        if embeds_BQD.shape[1] != num_tokens:
            raise InputError(
                f"the text encoder gives {embeds_BQD.shape[1]} embeddings, the mapper {num_tokens}: "
                f"aligning to captions needs a mapper of {embeds_BQD.shape[1]}"
            )
        return embeds_BQD
    last_B = mask_BQ.long().sum(1).clamp(min=1) - 1
    places_BQ = torch.minimum(torch.arange(num_tokens, device=last_B.device)[None], last_B[:, None])
    return embeds_BQD.gather(1, places_BQ[:, :, None].expand(-1, -1, embeds_BQD.shape[2]))
