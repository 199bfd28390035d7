"""Stage `pretrain`: one causal transformer on documents of every direction, packed, by next-token prediction."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator
from torch import nn

from anygen.data.code_noise import with_noise
from anygen.data.coded import CodedStore
from anygen.data.loader import PackedLoader, Packing, merge_states
from anygen.data.rarity import Repeats, repeats_by_direction
from anygen.data.tasks import Direction, DocumentStream
from anygen.documents import Tokenizers
from anygen.errors import ConfigError, DataError
from anygen.files import publishing, read_json, verify, write_json
from anygen.layout import Layout
from anygen.model.causal import ModelConfig, create_model, num_parameters
from anygen.model.code_rows import start_code_rows
from anygen.model.loss import LossWeights, NextTokenLoss, TensorBatch
from anygen.model.recompute import Recompute, recompute_activations
from anygen.model.warm_start import check_named, checkpoint_fingerprints, warm_start
from anygen.packing import Packer
from anygen.seeding import seed_of
from anygen.sequence import Sequence, Sequencer
from anygen.stages.base import StageConfig, StageResult, open_text_tokenizer
from anygen.stages.block_layout import LayoutConfig
from anygen.stages.coded_shards import LOOKAHEAD, ShardsConfig, places_of
from anygen.stages.from_bundle import bundle_at, model_of
from anygen.stages.tokenize import coded_facts, open_media_tokenizers
from anygen.training import processes
from anygen.training.loop import LoopConfig, train
from anygen.training.sharding import whole_state
from anygen.training.trackers import require
from anygen.vocabulary import Vocabulary
from tokenizers_mm import compat  # noqa: F401  before transformers
from tokenizers_mm.codes import Modality
from tokenizers_mm.regions import RegionTokenizer

VALIDATION_EXAMPLES = 400


class PretrainConfig(StageConfig):
    """Recipe of the stage."""

    several_processes: ClassVar[bool] = True
    stage: Literal["pretrain"] = "pretrain"
    model: ModelConfig = ModelConfig()
    init_from: Path | None = Field(None, exclude_if=lambda path: path is None)
    """Folder of a Qwen3 checkpoint to start from, in place of `model`; see `anygen.model.warm_start`. Or a bundle of
    the same vocabulary (`nano`: the embedded one), whose weights are taken as they are."""
    code_rows: Literal["random", "codebook"] = Field("random", exclude_if=lambda start: start == "random")
    """Where the rows of codes start; see `anygen.model.code_rows`."""
    layout: LayoutConfig = LayoutConfig()
    location_bins: int = Field(100, ge=2)
    vokens: int = Field(8, ge=0)
    """Ids kept for a voken decoder."""
    mixture: dict[str, float]
    """Direction to weight; see `anygen.data.tasks`."""
    rare_repeats: Repeats = Field(1.0, exclude_if=lambda most: most == 1)
    """How often an epoch of every direction, or of those named (`{"audio>text": 3}`), holds a record with a word of its
    own, for which all are read at the start; see `anygen.data.rarity`."""
    own_voices: tuple[str, ...] = Field((), exclude_if=lambda voices: not voices)
    """The voices in which it learns to speak (`("slt",)`): a model of few voices needs less to say words well. It hears
    all. Records that none of these speaks, and `audio>audio`, keep theirs. Empty: it speaks in all."""
    drop_share: float = Field(0.1, ge=0, le=1)
    """Share of examples that learn to answer without their inputs (classifier-free guidance)."""
    free_share: float = Field(0.1, ge=0, le=1)
    """Share of examples without a task token: they teach what to answer when nothing is asked for (`output="any"`)."""
    code_noise: float = Field(0.0, ge=0, lt=1, exclude_if=lambda share: share == 0)
    """Share of picture and sound codes that the model reads as another one; see `anygen.data.code_noise`."""
    loss_weights: dict[Literal["text", "control", "image", "audio", "region"], Annotated[float, Field(ge=0)]] = {}
    """Weight by modality of the label; 1 where not named."""
    input_weight: float = Field(0.0, ge=0)
    """Weight of predicting the inputs themselves."""
    z_loss: float = Field(1e-4, ge=0)
    """Weight of (log Z)^2, which keeps logits from drifting."""
    sliced_softmax: bool = Field(False, exclude_if=lambda sliced: not sliced)
    """Softmax of a picture, sound or location code over its own codebook only, as in sampling; less work."""
    recompute: Recompute = Field("none", exclude_if=lambda what: what == "none")
    """Activations computed anew in the backward pass instead of kept; see `anygen.model.recompute`."""
    row_length: int = Field(2048, ge=64)
    """Ids of one packed row."""
    rows_per_batch: int = Field(2, ge=1)
    """Rows of a batch, of all processes together."""
    pool_size: int = Field(256, ge=1)
    """Look-ahead of the packer, in documents; each row of a batch has its own."""
    num_workers: int = Field(0, ge=0, exclude=True)
    """Processes that pack, at most one a row; batches are the same with any number of them."""
    shards: ShardsConfig | None = Field(None, exclude_if=lambda shards: shards is None)
    """Coded shards from elsewhere; None for those of the run's stage tokenize."""
    loop: LoopConfig

    @field_validator("mixture")
    @classmethod
    def _directions(cls, mixture: dict[str, float]) -> dict[str, float]:
        for direction in mixture:  # a misspelt one is told before hours of tokenizer training
            Direction.parse(direction)
        return mixture

    @model_validator(mode="after")
    def _repeats(self) -> PretrainConfig:
        repeats_by_direction(self.rare_repeats, self.mixture)
        return self

    @model_serializer(mode="wrap")
    def _recorded(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        facts: dict[str, Any] = serialize(self)
        if self.init_from is not None:  # sizes that the model does not have would mislead, and contradict init_from
            facts.pop("model", None)
        return facts

    @property
    def on_cpu(self) -> bool:
        """True where the recipe wants no GPU."""
        return self.loop.device == "cpu"

    def check(self) -> None:
        """A checkpoint that cannot be started from, or a tracker that is missing, is told before anything is moved."""
        require(self.loop.trackers)
        if self.init_from is not None:
            check_named(self.model, self.start_folder)
            if self.code_rows == "codebook" and bundle_at(self.init_from) is not None:
                raise ConfigError(f"code_rows: {self.init_from} has learnt its rows; leave code_rows out of the recipe")

    @property
    def start_folder(self) -> Path:
        """Where the checkpoint that it starts from lies, which a bundle is too."""
        assert self.init_from is not None
        return bundle_at(self.init_from) or self.init_from

    def elsewhere(self) -> tuple[str, ...]:
        """Stages whose work is not in this run."""
        return () if self.shards is None else ("tokenize",)

    def outside_inputs(self) -> Mapping[str, str]:
        """The files of the checkpoint that it starts from."""
        return {} if self.init_from is None else checkpoint_fingerprints(self.start_folder)


def main(config: PretrainConfig) -> StageResult:
    """Train and save `model/`: a Qwen3 checkpoint with the vocabulary and layout beside it."""
    tokenizers = open_tokenizers(config.root, location_bins=config.location_bins)
    layout = config.layout.layout_of(tokenizers)
    vocabulary = Vocabulary.of(tokenizers, audio_codebooks=layout.orders["audio"].num_kept, voken=config.vokens)
    sequencer = Sequencer(vocabulary, layout)
    model = start_model(config, vocabulary, tokenizers, layout)
    recompute_activations(model, config.recompute)
    trainee = _Pretraining(config, model, sequencer, tokenizers)
    with contextlib.closing(trainee):
        metrics = train(trainee, config.loop, config.folder, title="pretrain")
    weights = whole_state(model)
    if processes.rank() == 0:
        with publishing(config.folder / "model") as folder:
            model.save_pretrained(folder, state_dict=weights)
            write_json(folder / "vocabulary.json", vocabulary.manifest())
            write_json(folder / "layout.json", layout.to_json())
    processes.wait()
    metrics["parameters"] = float(num_parameters(model))
    return StageResult(config.folder, (config.folder / "model",), metrics)


def start_model(config: PretrainConfig, vocabulary: Vocabulary, tokenizers: Tokenizers, layout: Layout) -> Any:
    """The model before its first step."""
    if config.init_from is None:
        model = create_model(config.model, vocabulary, seed=config.loop.seed)
    else:
        check_named(config.model, config.start_folder)
        if (bundle := bundle_at(config.init_from)) is not None:
            return model_of(bundle, vocabulary, layout)
        model = warm_start(config.init_from, vocabulary, tokenizers["text"], seed=config.loop.seed)  # type: ignore[arg-type]
    if config.code_rows == "codebook":
        vectors = {name: tokenizers[name].code_vectors for name in ("image", "audio") if name in tokenizers}  # type: ignore[attr-defined]
        start_code_rows(model, vocabulary, vectors, seed=seed_of(config.loop.seed, "code rows"))
    return model


def open_tokenizers(root: Path, *, location_bins: int) -> Tokenizers:
    """The tokenizers that a run has made so far, and the location bins."""
    image, audio = open_media_tokenizers(root)
    tokenizers: dict[Modality, Any] = {"text": open_text_tokenizer(root), "region": RegionTokenizer(location_bins)}
    if image is not None:
        tokenizers["image"] = image
    if audio is not None:
        tokenizers["audio"] = audio
    return tokenizers


class _Pretraining:
    def __init__(self, config: PretrainConfig, model: Any, sequencer: Sequencer, tokenizers: Tokenizers) -> None:
        self._sequencer = sequencer
        self._weights = LossWeights(
            sequencer.vocabulary, {str(k): w for k, w in config.loss_weights.items()}, inputs=config.input_weight
        )
        self._pad_id = sequencer.vocabulary.control("pad")
        facts = coded_facts(tokenizers.get("image"), tokenizers.get("audio"))  # type: ignore[arg-type]
        self._stream = self._open(config, tokenizers, facts, "train")
        self._held_out = self._open(config, tokenizers, facts, "validation")
        example = self._example_of(self._stream)
        if config.code_noise:
            example = self._noisy(example, config.code_noise, seed_of(config.loop.seed, "code noise"))
        self._loader = PackedLoader(
            example,
            packing=Packing(config.row_length, config.pool_size, self._pad_id),
            num_lanes=config.rows_per_batch,
            num_workers=config.num_workers,
        )
        self._config = config
        self._model = model
        self.module: nn.Module = NextTokenLoss(
            model, sequencer.vocabulary, z_loss=config.z_loss, sliced_softmax=config.sliced_softmax
        )

    @staticmethod
    def _open(config: PretrainConfig, tokenizers: Tokenizers, facts: dict[str, Any], split: str) -> DocumentStream:
        store = CodedStore(places_of(config.shards, config.root, split), facts=facts)
        shares = (config.drop_share, config.free_share) if split == "train" else (0.0, 0.0)
        return DocumentStream(
            store,
            config.mixture,
            tokenizers,
            drop_share=shares[0],
            free_share=shares[1],
            seed=seed_of(config.loop.seed, split),
            own_voices=config.own_voices,
            rare_repeats=repeats_by_direction(config.rare_repeats, config.mixture) if split == "train" else {},
            shards_per_block=config.shards.shards_per_block if config.shards else 0,
            lookahead=LOOKAHEAD if config.shards else 0,
        )

    def _example_of(self, stream: DocumentStream) -> Callable[[int], Sequence]:
        def example(number: int) -> Sequence:
            document, dropped = stream(number)
            return self._sequencer.build(document, drop_inputs=dropped)

        return example

    def _noisy(self, example: Callable[[int], Sequence], share: float, seed: int) -> Callable[[int], Sequence]:
        vocabulary = self._sequencer.vocabulary
        return lambda number: with_noise(example(number), vocabulary, share, np.random.default_rng([seed, number]))

    def next_batch(self) -> TensorBatch:
        return self._weights.batch(self._loader.next_batch())

    def to_device(self, batch: TensorBatch, device: torch.device) -> TensorBatch:
        return batch.to(device)

    def state(self) -> dict[str, Any]:
        return self._loader.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self._loader.load_state(state)

    def joined(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        return merge_states(states)

    def close(self) -> None:
        self._loader.close()

    def validate(self, module: nn.Module, device: torch.device) -> dict[str, float]:
        packer = Packer(
            self._example_of(self._held_out),
            row_length=self._config.row_length,
            num_rows=1,  # figures that do not depend on the number of processes
            pool_size=self._config.pool_size,
            pad_id=self._pad_id,
        )
        totals: dict[str, list[float]] = {}
        while packer.state()["next_example"] < VALIDATION_EXAMPLES + self._config.pool_size:
            loss, report = module(self._weights.batch(packer.next_batch()).to(device))
            for name, value in {"loss": loss, **report}.items():
                if name == "loss" or (
                    name.endswith("_nats") and not math.isnan(value.item())
                ):  # NaN: none in the batch
                    totals.setdefault(name, []).append(value.item())
        return {name: sum(values) / len(values) for name, values in totals.items()}

    def compile(self) -> None:
        for layer in self._model.model.layers:
            layer.compile()


def load_pretrained(folder: Path) -> tuple[Any, Vocabulary, Layout]:
    """What `main` saved: the model, its vocabulary and layout."""
    from transformers import Qwen3ForCausalLM

    if not folder.is_dir():
        raise DataError(f"there is no pretrained model at {folder}: run the stage pretrain first")
    verify(folder)
    model = Qwen3ForCausalLM.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=torch.float32)
    vocabulary = Vocabulary.from_manifest(read_json(folder / "vocabulary.json"))
    return model, vocabulary, Layout.from_json(read_json(folder / "layout.json"))
