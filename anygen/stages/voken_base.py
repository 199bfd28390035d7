"""What both kinds of stage `vokens` share: the recipe's fields, the transformer that writes vokens, its data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from anygen.data.coded import CodedStore
from anygen.data.tasks import Direction, DocumentStream
from anygen.documents import Tokenizers
from anygen.files import publishing, write_json
from anygen.layout import Layout
from anygen.model import attention
from anygen.seeding import borrowed_randomness, seed_of
from anygen.sequence import Sequencer
from anygen.stages.base import StageConfig
from anygen.stages.coded_shards import places_of
from anygen.stages.pretrain import load_pretrained, open_tokenizers
from anygen.stages.tokenize import coded_facts
from anygen.stages.voken_losses import VokenRows
from anygen.training.loop import LoopConfig
from anygen.vocabulary import Vocabulary


class VokenStageConfig(StageConfig):
    """Fields of both kinds of recipe."""

    stage: Literal["vokens"] = "vokens"
    mixture: dict[str, float] = {"text>voken": 1.0}
    """Directions of the first phase, to voken pictures; see `anygen.data.tasks`."""
    joint_mixture: dict[str, float] = {}
    """Directions of the second phase, as `story>voken`, `story>text,voken` and those of pretraining, so that nothing is
    forgotten; those of the first where empty."""
    documents_per_batch: int = Field(32, ge=1)
    align_weight: float = Field(0.1, ge=0)
    """Of the term without which vokens are ignored."""
    text_weight: float = Field(0.01, ge=0)
    """Next-token loss of the first phase: of the decision to draw alone."""
    drop_share: float = Field(0.1, ge=0, le=1)
    """Share of conditions replaced by the null (classifier-free guidance)."""
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

    @property
    def on_cpu(self) -> bool:
        """True where the recipe wants no GPU."""
        return self.frozen_loop.device == "cpu"


@dataclass(frozen=True)
class Writer:
    """The pretrained transformer that learns to write vokens, with what makes its sequences."""

    model: Any
    vocabulary: Vocabulary
    layout: Layout
    tokenizers: Tokenizers
    rows: VokenRows
    """Of its vokens, trained in the first phase."""

    @classmethod
    def open(cls, config: VokenStageConfig) -> Writer:
        """What stage `pretrain` left.

        Raises:
            DataError: nothing.
        """
        model, vocabulary, layout = load_pretrained(config.root / "pretrain" / "model")
        model.set_attn_implementation(attention.register())
        tokenizers = open_tokenizers(config.root, location_bins=vocabulary.range("region").size)
        with borrowed_randomness(seed_of(config.frozen_loop.seed, "rows")):
            rows = VokenRows(model, vocabulary)
            rows.start(model, vocabulary, layout.native_grid_hw)
        return cls(model, vocabulary, layout, tokenizers, rows)

    @property
    def sequencer(self) -> Sequencer:
        """Builds its sequences."""
        return Sequencer(self.vocabulary, self.layout)

    def save(self, place: Path) -> None:
        """A Qwen3 checkpoint with its vocabulary and layout, as of stage `pretrain`."""
        with publishing(place) as folder:
            self.model.cpu().save_pretrained(folder)
            write_json(folder / "vocabulary.json", self.vocabulary.manifest())
            write_json(folder / "layout.json", self.layout.to_json())


def open_stream(
    config: StageConfig, tokenizers: Tokenizers, mixture: dict[str, float], split: str, *, seed: int
) -> DocumentStream:
    """The documents of a split; no inputs are dropped, but conditions by the mapper's null."""
    facts = coded_facts(tokenizers.get("image"), tokenizers.get("audio"))  # type: ignore[arg-type]
    store = CodedStore(places_of(None, config.root, split), facts=facts)
    return DocumentStream(store, mixture, tokenizers, drop_share=0.0, free_share=0.0, seed=seed_of(seed, split))
