"""What is asked in an evaluation, and what would be right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from anygen.data.scenes import Scene
from anygen.documents import Document, Media, Segment
from anygen.evaluation.scores import Score
from anygen.request import Request
from tokenizers_mm.codes import Modality

if TYPE_CHECKING:
    from anygen.evaluation.suite.bench import Bench


@dataclass(frozen=True, eq=False)
class Case:
    """One request with its truth."""

    request: Request
    truth: Mapping[Modality, Media]
    """One right medium for each modality of the answer."""
    texts: tuple[str, ...] = ()
    """Texts that would be right; errors are counted against the first."""
    said: tuple[str, ...] = ()
    """Texts that would be right if they were said."""
    emoji: int | None = None
    """Index of the emoji that it is about."""
    scene: Scene | None = None

    def document(self, outputs: Sequence[Modality]) -> Document:
        """The request with the truth as its answer, to be scored by teacher forcing."""
        asked = self.request.document()
        answer = (Segment(modality, self.truth[modality], target=True) for modality in outputs)
        return Document((*asked.segments, *answer), asked.task)


@dataclass(frozen=True)
class Measured:
    """One figure of one group; what it is stands in `figures.EXPLAINED`."""

    name: str
    score: Score
    of: str = ""
    """What it was measured on, where that is not the answers themselves."""


Groups = dict[str, list[Case]]
Answer = dict[Modality, Any]
Judge = Callable[["Bench", Sequence[Case], list[Any]], Iterable[Measured]]
"""Cases and one medium for each, to figures."""


@dataclass(frozen=True)
class Part:
    """One direction: its cases, where the answers come from, and who judges them."""

    name: str
    about: str
    outputs: tuple[Modality, ...]
    cases: Callable[[Bench], Groups]
    judges: Mapping[Modality, Judge]
    answer: Callable[[Bench, Part, Sequence[Case]], list[Answer]] | None = None
    """Instead of the model: the tokenizers alone, or the truth itself."""
    needs: frozenset[Modality] = field(default_factory=frozenset)
    """Modalities of the inputs."""

    @property
    def modalities(self) -> frozenset[Modality]:
        """Everything that a model must have for it."""
        return self.needs | frozenset(self.outputs)
