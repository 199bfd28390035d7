"""Stage `vokens`: the transformer learns to say in vokens what the diffusion decoder is to draw (MiniGPT-5's phases).

reading/  where the recipe has it: checkpoints and metrics of a cheap phase without drawing (GILL's, with codes)
frozen/   of the first phase: only the rows of the vokens, and the mapper, learn, as in `reading`
joint/    of the second, where the recipe has one: the transformer learns too, on text and vokens
model/    the result: a Qwen3 checkpoint with its vocabulary and layout, as of stage `pretrain`
retrieval/  where the recipe has it: GILL's head, trained on the vokens as they are (`anygen.stages.retrieval`)
decoder/  the flow decoder of stage `decoder`, now also driven by vokens

The decoder's denoiser, which already speaks grids of codes, stays as it is in both phases.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from anygen.config import Config
from anygen.data.pictures import NamedPictures
from anygen.errors import ConfigError
from anygen.files import publishing
from anygen.model.loss import LossWeights
from anygen.seeding import borrowed_randomness, seed_of
from anygen.stages.base import StageResult, open_records
from anygen.stages.decoder import encoder_of
from anygen.stages.retrieval import RetrievalConfig, RetrievalData, RetrievalLoss, features_of
from anygen.stages.voken_base import VokenStageConfig, Writer, open_stream
from anygen.stages.voken_losses import VokenLoss, VokenWeights
from anygen.stages.voken_phases import VokenData, VokenTraining
from anygen.training.loop import LoopConfig, train
from anygen.vocabulary import Vocabulary
from decoders.carried import open_renderer
from decoders.optional import load_diffusers
from decoders.retrieval import RetrievalHead


class MapperConfig(Config):
    """Size of the voken mapper."""

    width: int = Field(192, ge=8)
    layers: int = Field(2, ge=1)
    heads: int = Field(4, ge=1)


class VokensConfig(VokenStageConfig):
    """Recipe of the stage; alignment is the cross-entropy of the picture's codes from the mapper."""

    mapper: MapperConfig = MapperConfig()
    flow_weight: float = Field(1.0, ge=0)
    joint_text_weight: float = Field(1.0, ge=0)
    flow_share: float = Field(1.0, ge=0, le=1)
    """Share of a batch's pictures for which the flow loss is taken: a forward pass of the denoiser each."""
    reading_loop: LoopConfig | None = Field(None, exclude_if=lambda loop: loop is None)
    """Before the first phase: text and alignment losses alone, with no denoiser in the loop; None leaves it out."""
    retrieval: RetrievalConfig | None = Field(None, exclude_if=lambda retrieval: retrieval is None)
    """After the phases: a head that says whether a picture of an index answers, in `retrieval/head`; None, no head."""

    def check(self) -> None:
        """Without diffusers nothing is moved or trained."""
        load_diffusers()


def main(config: VokensConfig) -> StageResult:
    """Train the phases; save `model/` and `decoder/`."""
    writer = Writer.open(config)
    decoder = start_decoder(config, writer.model.config.hidden_size, writer.vocabulary)
    weights = VokenWeights(
        config.flow_weight, config.align_weight, config.text_weight, config.drop_share, config.flow_share
    )

    def phase(name: str, loop: LoopConfig | None, mixture: dict[str, float], **changes: float) -> dict[str, float]:
        if loop is None:
            return {}
        rows, ratio = (None, config.model_lr_ratio) if name == "joint" else (writer.rows, config.rows_lr_ratio)
        losses = VokenLoss(
            writer.model, writer.vocabulary, decoder,
            weights=replace(weights, **changes), rows=rows, model_lr_ratio=ratio,
        )  # fmt: skip
        trainee = _trainee(config, writer, losses, mixture, seed=seed_of(loop.seed, name))
        return train(trainee, loop, config.folder / name, title=f"vokens, {name}")

    metrics = phase("reading", config.reading_loop, config.mixture, flow=0.0)
    metrics |= phase("frozen", config.frozen_loop, config.mixture)
    writer.rows.write(writer.model)
    joint_mixture = config.joint_mixture or config.mixture
    metrics |= phase("joint", config.joint_loop, joint_mixture, text=config.joint_text_weight)

    outputs: tuple[Path, ...] = (config.folder / "model", config.folder / "decoder")
    if config.retrieval is not None:
        metrics |= train_retrieval(config, config.retrieval, writer, decoder)
        outputs += (config.folder / "retrieval" / "head",)
    writer.save(config.folder / "model")
    with publishing(config.folder / "decoder") as folder:
        decoder.save_small(folder)
    return StageResult(config.folder, outputs, metrics)


def train_retrieval(config: VokensConfig, wanted: RetrievalConfig, writer: Writer, decoder: Any) -> dict[str, float]:
    """Train the head on the vokens as they are, and save it in `retrieval/head`."""
    weights = VokenWeights(0.0, 0.0, 0.0, 0.0, 0.0)
    losses = VokenLoss(writer.model, writer.vocabulary, decoder, weights=weights, rows=None).eval()
    base = _trainee(config, writer, losses, config.mixture, seed=seed_of(wanted.loop.seed, "retrieval"))
    splits = [
        RetrievalData(data, frozenset(r.key for r in open_records(config.root, split) if r.kind in wanted.library))
        for data, split in ((base.train, "train"), (base.held_out, "validation"))
    ]
    image: Any = writer.tokenizers["image"]
    side_px = image.config.side_px
    picture_dim = features_of(image, torch.zeros(1, 3, side_px, side_px)).shape[1]
    sizes = {"hidden_dim": writer.model.config.hidden_size, "picture_dim": picture_dim}
    with borrowed_randomness(seed_of(wanted.loop.seed, "head")):
        head = RetrievalHead(**sizes, embed_dim=wanted.embed_dim, drop=wanted.drop)
    losses_of_head: Any = RetrievalLoss(head, lambda batch: losses.read(batch)[0], image)
    data: Any = splits
    trainee = VokenTraining(losses_of_head, data[0], data[1], base.encode)
    found = train(trainee, wanted.loop, config.folder / "retrieval", title="vokens, retrieval")
    with publishing(config.folder / "retrieval" / "head") as folder:
        head.cpu().save(folder)
    return {f"retrieval_{name}": value for name, value in found.items()}


def start_decoder(config: VokensConfig, hidden_dim: int, vocabulary: Vocabulary) -> Any:
    """The flow decoder of stage `decoder`, with a fresh voken mapper.

    Raises:
        ConfigError: there is none.
    """
    folder = config.root / "decoder" / "model"
    if not folder.is_dir():
        raise ConfigError(f"there is no diffusion decoder in {folder}: run the stage decoder first")
    decoder = open_renderer(folder, device=torch.device("cpu"))
    from decoders.drivers import VokenMapper  # needs diffusers, which the line above has found

    with borrowed_randomness(seed_of(config.frozen_loop.seed, "mapper")):
        mapper = VokenMapper(
            hidden_dim=hidden_dim,
            vokens=len(vocabulary.vokens_N),
            patches=decoder.num_patches,
            dim=decoder.denoiser.config.condition_dim,
            codebook_size=vocabulary.range("image.0").size,
            **config.mapper.model_dump(),
        )
    mapper.say_as(decoder.codes)
    decoder.register_modules(vokens=mapper)
    return decoder


def _trainee(
    config: VokensConfig, writer: Writer, losses: VokenLoss, mixture: dict[str, float], *, seed: int
) -> VokenTraining:
    image: Any = writer.tokenizers["image"]

    def data(split: str) -> VokenData:
        records = NamedPictures(open_records(config.root, split), image.config.side_px)
        return VokenData(
            open_stream(config, writer.tokenizers, mixture, split, seed=seed), records, writer.sequencer,
            LossWeights(writer.vocabulary, {}, inputs=0.0), config.documents_per_batch,
        )  # fmt: skip

    return VokenTraining(losses, data("train"), data("validation"), encoder_of(image))
