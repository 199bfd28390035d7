"""Stage `vokens`: the transformer learns to say in vokens what the diffusion decoder is to draw (MiniGPT-5's phases).

frozen/   checkpoints and metrics of the first phase: only the rows of the vokens, and the mapper, learn
joint/    of the second, where the recipe has one: the transformer learns too, on text and vokens
model/    the result: a Qwen3 checkpoint with its vocabulary and layout, as of stage `pretrain`
decoder/  the flow decoder of stage `decoder`, now also driven by vokens

The decoder's denoiser, which already speaks grids of codes, stays as it is in both phases.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, field_validator

from anygen.config import Config
from anygen.data.coded import CodedStore
from anygen.data.pictures import NamedPictures
from anygen.data.tasks import Direction, DocumentStream
from anygen.documents import Tokenizers
from anygen.errors import ConfigError
from anygen.files import publishing, write_json
from anygen.model import attention
from anygen.model.loss import LossWeights
from anygen.seeding import borrowed_randomness, seed_of
from anygen.sequence import Sequencer
from anygen.stages.base import StageConfig, StageResult, open_records
from anygen.stages.coded_shards import places_of
from anygen.stages.decoder import encoder_of
from anygen.stages.pretrain import load_pretrained, open_tokenizers
from anygen.stages.tokenize import coded_facts
from anygen.stages.voken_losses import VokenLoss, VokenRows, VokenWeights
from anygen.stages.voken_phases import VokenData, VokenTraining
from anygen.training.loop import LoopConfig, train
from anygen.vocabulary import Vocabulary
from decoders.carried import open_renderer
from decoders.optional import load_diffusers


class MapperConfig(Config):
    """Size of the voken mapper."""

    width: int = Field(192, ge=8)
    layers: int = Field(2, ge=1)
    heads: int = Field(4, ge=1)


class VokensConfig(StageConfig):
    """Recipe of the stage."""

    stage: Literal["vokens"] = "vokens"
    mapper: MapperConfig = MapperConfig()
    mixture: dict[str, float] = {"text>voken": 1.0}
    """Directions of the first phase, to voken pictures; see `anygen.data.tasks`."""
    joint_mixture: dict[str, float] = {}
    """Directions of the second phase: those of the first and, so that nothing is forgotten, those of pretraining."""
    documents_per_batch: int = Field(32, ge=1)
    flow_weight: float = Field(1.0, ge=0)
    align_weight: float = Field(0.1, ge=0)
    """Cross-entropy of the picture's codes from the mapper; without it vokens are ignored."""
    text_weight: float = Field(0.01, ge=0)
    """Next-token loss of the first phase: of the decision to draw alone."""
    joint_text_weight: float = Field(1.0, ge=0)
    drop_share: float = Field(0.1, ge=0, le=1)
    """Share of conditions replaced by the null (classifier-free guidance)."""
    flow_share: float = Field(1.0, ge=0, le=1)
    """Share of a batch's pictures for which the flow loss is taken: a forward pass of the denoiser each."""
    rows_lr_ratio: float = Field(10.0, gt=0)
    """Learning rate of the voken rows over the mapper's."""
    model_lr_ratio: float = Field(0.2, gt=0)
    """Learning rate of the transformer in the second phase over the mapper's."""
    frozen_loop: LoopConfig
    joint_loop: LoopConfig | None = Field(None, exclude_if=lambda loop: loop is None)
    """None leaves the second phase out: the transformer stays as pretrained but for its voken rows."""

    @field_validator("mixture", "joint_mixture")
    @classmethod
    def _directions(cls, mixture: dict[str, float]) -> dict[str, float]:
        for direction in mixture:
            Direction.parse(direction)
        return mixture

    def check(self) -> None:
        """Without diffusers nothing is moved or trained."""
        load_diffusers()

    @property
    def on_cpu(self) -> bool:
        """True where the recipe wants no GPU."""
        return self.frozen_loop.device == "cpu"


def main(config: VokensConfig) -> StageResult:
    """Train the phases; save `model/` and `decoder/`."""
    model, vocabulary, layout = load_pretrained(config.root / "pretrain" / "model")
    model.set_attn_implementation(attention.register())
    tokenizers = open_tokenizers(config.root, location_bins=vocabulary.range("region").size)
    sequencer = Sequencer(vocabulary, layout)
    decoder = start_decoder(config, model.config.hidden_size, vocabulary)

    with borrowed_randomness(seed_of(config.frozen_loop.seed, "rows")):
        rows = VokenRows(model, vocabulary)
        rows.start(model, vocabulary, layout.native_grid_hw)
    losses = VokenLoss(
        model, vocabulary, decoder,
        weights=_weights(config, config.text_weight), rows=rows, model_lr_ratio=config.rows_lr_ratio,
    )  # fmt: skip
    phase = _phase(config, losses, sequencer, tokenizers, config.mixture, seed=config.frozen_loop.seed)
    metrics = train(phase, config.frozen_loop, config.folder / "frozen", title="vokens, frozen")
    rows.write(model)

    if config.joint_loop is not None:
        losses = VokenLoss(
            model, vocabulary, decoder,
            weights=_weights(config, config.joint_text_weight), rows=None, model_lr_ratio=config.model_lr_ratio,
        )  # fmt: skip
        mixture = config.joint_mixture or config.mixture
        phase = _phase(config, losses, sequencer, tokenizers, mixture, seed=config.joint_loop.seed)
        metrics |= train(phase, config.joint_loop, config.folder / "joint", title="vokens, joint")

    with publishing(config.folder / "model") as folder:
        model.cpu().save_pretrained(folder)
        write_json(folder / "vocabulary.json", vocabulary.manifest())
        write_json(folder / "layout.json", layout.to_json())
    with publishing(config.folder / "decoder") as folder:
        decoder.save_small(folder)
    return StageResult(config.folder, (config.folder / "model", config.folder / "decoder"), metrics)


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


def _weights(config: VokensConfig, text: float) -> VokenWeights:
    return VokenWeights(config.flow_weight, config.align_weight, text, config.drop_share, config.flow_share)


def _phase(
    config: VokensConfig,
    losses: VokenLoss,
    sequencer: Sequencer,
    tokenizers: Tokenizers,
    mixture: dict[str, float],
    *,
    seed: int,
) -> VokenTraining:
    image: Any = tokenizers["image"]
    encode = encoder_of(image)

    def data(split: str) -> VokenData:
        records = NamedPictures(open_records(config.root, split), image.config.side_px)
        return VokenData(
            open_stream(config, tokenizers, mixture, split, seed=seed), records, sequencer,
            LossWeights(sequencer.vocabulary, {}, inputs=0.0), config.documents_per_batch,
        )  # fmt: skip

    return VokenTraining(losses, data("train"), data("validation"), encode)


def open_stream(
    config: VokensConfig, tokenizers: Tokenizers, mixture: dict[str, float], split: str, *, seed: int
) -> DocumentStream:
    """The documents of a split; no inputs are dropped, but conditions by the mapper's null."""
    facts = coded_facts(tokenizers.get("image"), tokenizers.get("audio"))  # type: ignore[arg-type]
    store = CodedStore(places_of(None, config.root, split), facts=facts)
    return DocumentStream(store, mixture, tokenizers, drop_share=0.0, free_share=0.0, seed=seed_of(seed, split))
