"""A mapper in front of any pretrained diffusers pipeline: what is drawn, or heard, follows from voken hidden states.

MiniGPT-5 (arXiv 2310.02239) drives Stable Diffusion so: queries read the hidden states and give the 77 embeddings that
the text encoder would have given. Here a pipeline has one `VokenMapper` a port (`decoders.prompt_ports`), each with a
learned null that stands for the empty prompt; nothing of the pipeline itself is ever trained or saved.

    decoder = PromptDecoder.create(open_pipeline("stable-diffusion-2-1-base"), hidden_dim=1024, vokens=8)
    picture = decoder(states, steps=30, guidance=7.5).images[0]

Dimension key: B samples, N vokens, D width of hidden states.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decoders.optional import load_diffusers
from decoders.pretrained import open_pipeline
from decoders.prompt_denoising import denoising_loss, latents_of
from decoders.prompt_ports import (
    CLIP_TOKENS,
    GENERATED,
    MAIN,
    POOLED,
    denoiser_of,
    masks_for,
    named,
    ports_of,
    text_at_ports,
)
from tokenizers_mm.errors import CheckpointError, InputError
from tokenizers_mm.weights import UNREADABLE

if TYPE_CHECKING:
    from decoders.drivers import VokenMapper

INDEX_FILE = "model_index.json"
GENERATED_TOKENS = 8
"""What AudioLDM2's GPT-2 writes."""


class PromptDecoder:
    """Drive a pretrained text-to-image or text-to-audio pipeline from vokens by prompt embeddings.

    Args:
        mapper: one for `prompt_embeds`, or one for each port of the pipeline by its name.
        pipeline: frozen here; may lack its text encoders and tokenizers (`align_loss` needs them).

    Raises:
        InputError: mappers and ports do not fit.
    """

    def __init__(self, mapper: VokenMapper | Mapping[str, VokenMapper], pipeline: Any) -> None:
        mappers: dict[str, Any] = dict(mapper) if isinstance(mapper, Mapping) else {MAIN: mapper}
        ports = ports_of(pipeline)
        if set(mappers) != set(ports):
            raise InputError(
                f"{type(pipeline).__name__} takes {', '.join(ports)}; got mappers for {', '.join(mappers)}"
            )
        for name, port in ports.items():
            found = (int(mappers[name].config.dim), int(mappers[name].config.patches))
            if found != (port.width, port.num_tokens or found[1]):
                raise InputError(
                    f"{name} of {type(pipeline).__name__} takes embeddings of {port.width}; "
                    f"its mapper gives {found[1]} of {found[0]}"
                )
        self.mappers = nn.ModuleDict(mappers)
        """By port; all that is trained."""
        self._by_port = mappers
        self.pipeline = pipeline
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(False).eval()

    @classmethod
    def create(
        cls,
        pipeline: Any,
        *,
        hidden_dim: int,
        vokens: int,
        queries: int = CLIP_TOKENS,
        width: int = 1024,
        layers: int = 4,
        heads: int = 8,
    ) -> PromptDecoder:
        """Fresh mappers for a pipeline; the defaults are MiniGPT-5's.

        Args:
            pipeline: from `open_pipeline`.
            hidden_dim: width of the transformer's hidden states.
            vokens: how many of them.
            queries: embeddings that the main mapper gives. Aligning to captions needs the text encoder's own number: 77
                for CLIP, more than 77 for SD3 (T5 stands behind CLIP), any for T5 and Gemma.
            width: of the mapper.
            layers: of it.
            heads: of its attention.
        """
        load_diffusers()
        from decoders.drivers import VokenMapper

        sizes: dict[str, Any] = {"width": width, "layers": layers, "heads": heads}
        counts = {MAIN: queries, POOLED: 1, GENERATED: GENERATED_TOKENS}
        return cls(
            {
                name: VokenMapper(hidden_dim=hidden_dim, vokens=vokens, patches=counts[name], dim=port.width, **sizes)
                for name, port in ports_of(pipeline).items()
            },
            pipeline,
        )

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of the mappers."""
        return self.mappers.parameters()

    def to(self, device: torch.device | str) -> PromptDecoder:
        """Mappers and pipeline on a device."""
        self.mappers.to(device)
        self.pipeline.to(device)
        return self

    def embeds(self, states_BND: Tensor, drop_B: Tensor | None = None) -> dict[str, Tensor]:
        """By port: B x Q x width, pooled ones B x width. Rows where `drop_B` is true get the null.

        Raises:
            InputError: states of another number or width than the mappers read.
        """
        config = self.mappers[MAIN].config
        expected = (int(config.vokens), int(config.hidden_dim))  # type: ignore[union-attr, arg-type]
        if tuple(states_BND.shape[1:]) != expected or states_BND.ndim != 3:
            raise InputError(
                f"this decoder reads {expected[0]} vokens of {expected[1]}; "
                f"got states of shape {tuple(states_BND.shape)}"
            )
        return {n: _shaped(n, mapper(states_BND, drop_B)) for n, mapper in self.mappers.items()}

    def null(self, batch: int) -> dict[str, Tensor]:
        """What stands for the empty prompt, by port."""
        return {name: _shaped(name, mapper.null(batch)) for name, mapper in self._by_port.items()}

    # -- drawing

    def __call__(
        self, vokens: Tensor, *, steps: int | None = None, guidance: float | None = None, **options: Any
    ) -> Any:
        """What the pipeline gives (`.images` or `.audios`), one for each row of `vokens`.

        Args:
            vokens: hidden states at the vokens, B x N x D.
            steps: the pipeline's `num_inference_steps`; None keeps its own.
            guidance: its `guidance_scale`.
            options: others of its call: height, width, generator, output_type and so on.

        Raises:
            InputError: an option that the pipeline does not have.
        """
        options |= {} if steps is None else {"num_inference_steps": steps}
        options |= {} if guidance is None else {"guidance_scale": guidance}
        if unknown := set(options) - set(named(self.pipeline.__call__, options)):
            raise InputError(f"{type(self.pipeline).__name__} has no option {min(unknown)!r}")
        with torch.no_grad():
            return self.pipeline(**self.arguments(vokens), **self._native_size(options), **options)

    def arguments(self, states_BND: Tensor) -> dict[str, Any]:
        """Embeddings, nulls for guidance, and masks, under the names that the pipeline's call has for them."""
        denoiser = denoiser_of(self.pipeline)
        device = next(self.parameters()).device
        embeds = self.embeds(states_BND.to(device))
        offered: dict[str, Any] = {"prompt": None, "negative_prompt": None} | embeds
        offered |= {f"negative_{name}": value for name, value in self.null(len(states_BND)).items()}
        offered = {n: v if v is None else v.to(denoiser.device, denoiser.dtype) for n, v in offered.items()}
        offered |= masks_for(self.pipeline.__call__, offered[MAIN])
        if GENERATED in embeds:
            self._stand_in_for_encoders(denoiser)
        return named(self.pipeline.__call__, offered)

    def _stand_in_for_encoders(self, denoiser: Any) -> None:
        """AudioLDM2 asks encoders that it does not need for their dtype and kind."""
        for name in ("text_encoder_2", "language_model"):
            if getattr(self.pipeline, name) is None:
                vars(self.pipeline)[name] = SimpleNamespace(
                    dtype=denoiser.dtype, config=SimpleNamespace(model_type="t5")
                )

    def _native_size(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The size that the denoiser was trained at, where none is asked for: Sana's default is another; no binning."""
        if {"height", "width"} & set(options) or self.side_px is None:
            return {}
        native = {"height": self.side_px, "width": self.side_px, "use_resolution_binning": False}
        return {n: v for n, v in named(self.pipeline.__call__, native).items() if n not in options}

    @property
    def side_px(self) -> int | None:
        """Side of the pictures that the denoiser was trained on; None for sounds, and where its config does not say."""
        side = denoiser_of(self.pipeline).config.get("sample_size")
        if GENERATED in self.mappers or not isinstance(side, int):
            return None
        return side * int(self.pipeline.vae_scale_factor)

    # -- training

    def align_loss(self, states_BND: Tensor, captions: Sequence[str], drop_B: Tensor | None = None) -> Tensor:
        """MSE of the mappers' embeddings to those of the captions (MiniGPT-5's caption term), mean over ports.

        Rows that `drop_B` marks are compared with the empty caption, so that the null learns the empty prompt.
        """
        dropped = [False] * len(captions) if drop_B is None else drop_B.tolist()
        captions = ["" if drop else caption for caption, drop in zip(captions, dropped, strict=True)]
        counts = {name: int(mapper.config.patches) for name, mapper in self._by_port.items()}
        targets = text_at_ports(self.pipeline, captions, counts)
        losses = [
            F.mse_loss(mapper(states_BND, drop_B).float(), targets[name].to(states_BND.device, torch.float32))
            for name, mapper in self._by_port.items()
        ]
        return torch.stack(losses).mean()

    def denoise_loss(
        self, states_BND: Tensor, latents_BChw: Tensor, drop_B: Tensor | None = None, *, generator: torch.Generator
    ) -> Tensor:
        """MiniGPT-5's LDM term: see `decoders.prompt_denoising`. Latents come from `latents_of`."""
        return denoising_loss(self.pipeline, latents_BChw, self.embeds(states_BND, drop_B), generator=generator)

    def latents_of(self, pixels_BCHW: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Latents of pictures in [0, 1]: B x C x h x w."""
        return latents_of(self.pipeline, pixels_BCHW, generator=generator)

    # -- saving

    def save_pretrained(self, folder: Path | str, *, base: str | None = None) -> None:
        """Write the mappers and the name of the pipeline that they drive; never its weights.

        Args:
            folder: a folder each port, and `model_index.json`.
            base: how the pipeline is found again: a folder or a repository's id; None keeps what it was opened from.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, mapper in self.mappers.items():
            mapper.save_pretrained(folder / name)  # type: ignore[operator]
        facts = {
            "_class_name": type(self).__name__,
            "_diffusers_version": load_diffusers().__version__,
            "base": base or self.pipeline.config.get("_name_or_path"),
            "pipeline": type(self.pipeline).__name__,
            "ports": sorted(self.mappers),
            "vokens": ["decoders.drivers", "VokenMapper"],
        }
        (folder / INDEX_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: Path | str, pipeline: Any = None, *, text: bool = False) -> PromptDecoder:
        """What `save_pretrained` wrote.

        Args:
            folder: of the mappers.
            pipeline: the pipeline itself, or where it is; None opens the one that the folder names.
            text: open the pipeline with its text encoders, which `align_loss` needs.

        Raises:
            CheckpointError: not such a folder, or a pipeline of other widths.
            MissingDependency: diffusers is absent or broken.
        """
        load_diffusers()
        from decoders.drivers import VokenMapper

        folder = Path(folder)
        try:
            facts = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
            assert facts["_class_name"] == cls.__name__
            ports, base = list(facts["ports"]), facts["base"]
            assert set(ports) <= {MAIN, POOLED, GENERATED}
        except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
            raise CheckpointError(f"{folder} is not the folder of a {cls.__name__}: {error}") from error
        if pipeline is None and not base:
            raise CheckpointError(f"{folder} does not say which pipeline it drives: pass one as `pipeline`")
        if pipeline is None or isinstance(pipeline, (str, Path)):
            try:
                pipeline = open_pipeline(pipeline or base, text=text)
            except CheckpointError as error:
                raise CheckpointError(f"{error}; {folder / INDEX_FILE} names it as `base`") from error
        try:
            mappers = {name: VokenMapper.from_pretrained(folder / name, use_safetensors=True) for name in ports}
        except UNREADABLE as error:
            raise CheckpointError(f"a mapper in {folder} cannot be read: {error}") from error
        try:
            return cls(mappers, pipeline)
        except InputError as error:
            raise CheckpointError(f"{folder} was trained for a {facts.get('pipeline')}: {error}") from error


def _shaped(name: str, embeds_BQD: Tensor) -> Tensor:
    return embeds_BQD[:, 0] if name == POOLED else embeds_BQD
