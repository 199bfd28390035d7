"""From records to documents: which part of a record is given, which is to be generated.

A direction is written `inputs>targets`, modalities parted by commas, with a kind of record in front where it matters:
`text>image`, `image>text,audio`, `scene:image>text`. Where a document holds sound, its text is what is said; two
texts are two phrasings. `voken` is a picture written as vokens (`text>voken`). Some directions need more than
modalities: `ask` (picture and question to answer), `ask_aloud` (the same, both spoken), `locate` (picture and name to
box), `name` (picture and box to name), `quiz` (a picture and several of those three in turn), `quiz_listed` (questions
and names to boxes, and before every answer what stands where, in words; see `anygen.data.quiz`), `infill_image` and
`infill_audio` (what is known of a picture or sound, and mostly its text, to the whole of it). `story>...` continues a
story; see `anygen.data.story_tasks`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from anygen.data.coded import CodedRecord, CodedStore
from anygen.data.order import Draw, Mixture
from anygen.data.quiz import first_of_each, quiz_document
from anygen.data.rarity import repeats_by_rarity
from anygen.data.shard_index import Has
from anygen.data.story_tasks import STORY, story_document
from anygen.documents import Document, Holed, Segment, Tokenizers, Vokens, default_task
from anygen.errors import ConfigError
from anygen.sequence import BlockName
from tokenizers_mm.codes import Codes, Modality

SPECIAL = {
    "ask": Has.PICTURE | Has.QUESTIONS,
    "ask_aloud": Has.PICTURE | Has.SPOKEN_QUESTIONS,
    "locate": Has.PICTURE | Has.OBJECTS,
    "name": Has.PICTURE | Has.OBJECTS,
    "quiz": Has.PICTURE | Has.OBJECTS | Has.QUESTIONS,
    "quiz_listed": Has.PICTURE | Has.OBJECTS | Has.QUESTIONS,
    "infill_image": Has.PICTURE,
    "infill_audio": Has.UTTERANCES,
}
"""Direction -> what a record must hold for it."""
_TEXT_SHARE = 0.8
"""Of infilling examples; the others teach to go by what is known alone."""


@dataclass(frozen=True)
class Direction:
    """What is given and what is asked for.

    >>> Direction.parse("scene:image>text,audio")
    Direction(inputs=('image',), targets=('text', 'audio'), kind='scene', special='')
    >>> Direction.parse("ask").special
    'ask'

    Raises:
        ConfigError: (from `parse`) not a direction.
    """

    inputs: tuple[BlockName, ...]
    targets: tuple[BlockName, ...]
    kind: str = ""
    special: str = ""

    @classmethod
    def parse(cls, text: str) -> Direction:
        """Read the notation of this module."""
        kind, _, rest = text.rpartition(":")
        if rest in SPECIAL:
            return cls((), (), kind, rest)
        inputs, arrow, targets = rest.partition(">")
        special, inputs = (inputs, "") if inputs in STORY else ("", inputs)
        sides = [tuple(m for m in side.split(",") if m) for side in (inputs, targets)]
        if not arrow or not sides[1] or any(m not in get_args(BlockName) for side in sides for m in side):
            raise ConfigError(
                f"{text!r} is not a direction; write inputs>targets (image>text,audio) or one of {tuple(SPECIAL)}"
            )
        if special and not set(sides[1]) <= set(STORY[special]):
            raise ConfigError(f"{text!r} is not a direction: {special} leads to {', '.join(STORY[special])} only")
        return cls(sides[0], sides[1], kind, special)  # type: ignore[arg-type]

    @property
    def needs(self) -> Has:
        """What a record must hold for this direction."""
        if self.special in STORY:
            return Has.STORY
        if self.special:
            return SPECIAL[self.special]
        modalities = {*self.inputs, *self.targets}
        needs = Has.PICTURE if modalities & {"image", "voken"} else Has(0)
        if "audio" in modalities:  # the text is what is said
            return needs | Has.UTTERANCES
        return needs | Has.CAPTIONS if "text" in modalities else needs

    @property
    def lacks(self) -> Has:
        """What makes a record unfit for this direction."""
        return Has.WORDLESS if {"audio", "text"} <= {*self.inputs, *self.targets} else Has(0)

    @property
    def speaks(self) -> bool:
        """True where it answers with sound to something else, or to a spoken question."""
        return self.special == "ask_aloud" or ("audio" in self.targets and "audio" not in self.inputs)

    def document(self, record: CodedRecord, generator: random.Random) -> Document:
        """One document of this direction, with the record's other choices (phrasing, voice) drawn from `generator`."""
        if self.special in STORY:
            return story_document(record, self.special, self.targets, generator)
        if self.special:
            return _special(self.special, record, generator)
        content: dict[BlockName, list[Any]] = {"image": [record.picture] * 2, "text": self._texts(record, generator)}
        content["voken"] = [Vokens(record.picture, record.key)] * 2
        if "audio" in (*self.inputs, *self.targets):
            said = [u for u in record.utterances if u.text.strip()] if self.lacks else record.utterances
            utterances = generator.sample(said, 1)
            others = [u for u in record.utterances if u.text == utterances[0].text and u is not utterances[0]]
            utterances.append(generator.choice(others or utterances))
            content["audio"] = [utterance.codes for utterance in utterances]
            content["text"] = [utterances[0].text] * 2
        kinds: list[tuple[BlockName, bool]] = [(m, False) for m in self.inputs] + [(m, True) for m in self.targets]
        segments = tuple(Segment(_modality_of(m), content[m].pop(), target) for m, target in kinds)
        inputs = tuple(s.modality for s in segments if not s.target)
        return Document(segments, default_task(inputs, _modality_of(self.targets[0])))

    def _texts(self, record: CodedRecord, generator: random.Random) -> list[str]:
        texts = generator.sample(record.captions, min(2, len(record.captions)))
        return (texts * 2)[:2]


def _said_by(record: CodedRecord, voices: tuple[str, ...]) -> CodedRecord:
    """The record with what these voices say; with what all do, where they say nothing of it."""
    utterances = tuple(u for u in record.utterances if u.voice in voices)
    pairs = tuple(pair for pair in record.spoken_questions if pair[1].voice in voices)
    return replace(
        record,
        utterances=utterances or record.utterances,
        spoken_questions=pairs or record.spoken_questions,
    )


def _infill(special: str, record: CodedRecord, generator: random.Random) -> Document:
    """What is known, then the text, then the whole: as `anygen.editing` asks for it."""
    if special == "infill_audio":
        utterance = generator.choice(record.utterances)
        whole, texts = utterance.codes, [utterance.text] if utterance.text.strip() else []
    else:
        assert record.picture is not None, "directions are given the records that they need"
        whole, texts = record.picture, list(record.captions)
    inputs: list[tuple[Modality, Any]] = [(whole.modality, Holed(whole, known_at_random(whole, generator)))]
    if texts and generator.random() < _TEXT_SHARE:
        inputs.append(("text", generator.choice(texts)))
    segments = [Segment(modality, content) for modality, content in inputs]
    return Document((*segments, Segment(whole.modality, whole, target=True)), "infill")


def known_at_random(codes: Codes, generator: random.Random) -> npt.NDArray[np.bool_]:
    """K x T: False in a rectangle of a picture or a span of a sound, of any size from one code to all."""
    rows, columns = codes.grid_hw or (1, codes.num_steps)
    known = np.ones((rows, columns), bool)
    known[_span(rows, generator), _span(columns, generator)] = False
    return np.broadcast_to(known.ravel(), codes.codes_KT.shape)


def _span(length: int, generator: random.Random) -> slice:
    size = generator.randint(min(1, length), length)
    start = generator.randint(0, length - size)
    return slice(start, start + size)


def _modality_of(block: BlockName) -> Modality:
    return "image" if block == "voken" else block


def _special(name: str, record: CodedRecord, generator: random.Random) -> Document:
    if name == "ask":
        question, answer = generator.choice(record.questions)
        return _about(record, ("text", question), ("text", answer), "answer")
    if name == "ask_aloud":
        asked, answered = generator.choice(record.spoken_questions)
        return _about(record, ("audio", asked.codes), ("audio", answered.codes), "answer")
    if name == "locate":
        thing, region = generator.choice(first_of_each(record.objects))
        return _about(record, ("text", thing), ("region", region), "locate")
    if name.startswith("quiz"):
        return quiz_document(record, generator, listed=name == "quiz_listed")
    if name.startswith("infill_"):
        return _infill(name, record, generator)
    assert name == "name", name
    thing, region = generator.choice(record.objects)
    return _about(record, ("region", region), ("text", thing), "answer")


def _about(record: CodedRecord, given: tuple[Modality, Any], target: tuple[Modality, Any], task: str) -> Document:
    """The picture and what is given with it, to the target."""
    return Document((Segment("image", record.picture), Segment(*given), Segment(*target, target=True)), task)  # type: ignore[arg-type]


class DocumentStream:
    """Example number to document: a pure function, so the stream has no state but the number.

    Args:
        store: coded records.
        weights: direction to weight.
        tokenizers: encode what is still text or region.
        drop_share: share of examples whose inputs are dropped (classifier-free guidance).
        free_share: share of examples without a task: what follows is for the model to decide (`output="any"`).
        seed: of every choice.
        rare_repeats: direction to how often its epoch holds a record with a word of its own, 1 where not named; see
            `anygen.data.rarity`.
        own_voices: what is said to a text, picture or question is in one of these, where the record has it in one.
        shards_per_block: shards that a direction goes through at a time; 0 shuffles all records.
        lookahead: how many examples ahead the store is told what will be needed; 0 tells it nothing.
    """

    def __init__(
        self,
        store: CodedStore,
        weights: Mapping[str, float],
        tokenizers: Tokenizers,
        *,
        drop_share: float,
        free_share: float,
        seed: int,
        rare_repeats: Mapping[str, float] = MappingProxyType({}),
        own_voices: tuple[str, ...] = (),
        shards_per_block: int = 0,
        lookahead: int = 0,
    ) -> None:
        self._store, self._tokenizers = store, tokenizers
        self._drop_share, self._free_share, self._lookahead = drop_share, free_share, lookahead
        self._own_voices = own_voices
        self._directions = {text: Direction.parse(text) for text in weights}
        wanted = {text: (d.kind, d.needs, d.lacks, rare_repeats.get(text, 1.0)) for text, d in self._directions.items()}
        found = {want: store.numbers(*want[:3]) for want in set(wanted.values())}  # what is wanted alike is shared
        if rarest := {most for *_, most in found if most > 1}:
            records = [store[number] for number in range(len(store))]
            repeats_N = {most: repeats_by_rarity(records, most) for most in rarest} | {
                1.0: np.ones(len(store), np.int64)
            }
            found = {want: np.repeat(numbers, repeats_N[want[3]][numbers]) for want, numbers in found.items()}
        self._eligible = {text: found[want] for text, want in wanted.items()}
        shards = {t: np.diff(np.searchsorted(items, store.starts)).tolist() for t, items in self._eligible.items()}
        self._mixture = Mixture(
            weights,
            {text: len(items) for text, items in self._eligible.items()},
            seed=seed,
            shard_counts=shards if shards_per_block else None,
            block=shards_per_block,
        )

    def __call__(self, number: int) -> tuple[Document, bool]:
        """The encoded document, and whether its inputs are to be dropped."""
        if self._lookahead:
            self._store.prefetch(self._record_of(self._mixture(number + self._lookahead)))
        draw = self._mixture(number)
        generator = random.Random(draw.seed)
        record, direction = self._store[self._record_of(draw)], self._directions[draw.kind]
        if self._own_voices and direction.speaks:
            record = _said_by(record, self._own_voices)
        document = direction.document(record, generator)
        dropped, free = generator.random() < self._drop_share, generator.random() < self._free_share
        if free:
            document = replace(document, task=None)
        return document.encode(self._tokenizers), dropped

    def _record_of(self, draw: Draw) -> int:
        return int(self._eligible[draw.kind][draw.item])
