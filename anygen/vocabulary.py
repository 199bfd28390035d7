"""One vocabulary for every modality: contiguous ranges of ids, joined by offset after tokenizing.

    text [0, T) | control | image.0 ... | audio.0 ... | region | voken | (unused, up to a multiple of 128)

No string is ever added to a text tokenizer, so no text can become a control or media token. The ranges, the control
tokens and the fingerprints of the tokenizers are a manifest that travels with the model. A new modality is a new
range at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from anygen.documents import Tokenizers
from anygen.errors import CheckpointError, DataError
from tokenizers_mm.codes import IntArray, fingerprint_of

FORMAT = 1
PAD_TO = 128
NUM_NUMBERS = 256

_FIRST_TASKS = ("depict", "caption", "speak", "transcribe", "answer", "locate", "continue")
TASKS = (*_FIRST_TASKS, "infill")

# Appended to, never reordered: an id is a position in this list. `_NUM_NAMED` keeps room for 64 of them.
CONTROL = (
    *("pad", "bos", "eos", "input", "target", "drop"),
    *("text", "/text", "image", "/image", "audio", "/audio", "region", "/region", "voken", "/voken"),
    *_FIRST_TASKS,
    *("infill", "hole"),
)
_NUM_NAMED = 64


Spans = tuple[tuple[int, int], ...]
_UNKNOWN: Spans = ((0, 1),)  # SentencePiece's own; a manifest names others only


@dataclass(frozen=True)
class Range:
    """Ids [start, start + size) of one codebook, or of the control tokens."""

    name: str
    start: int
    size: int

    @property
    def stop(self) -> int:
        """One past the last id."""
        return self.start + self.size

    @property
    def group(self) -> str:
        """The modality that the range belongs to: `audio` for `audio.1`."""
        return self.name.split(".")[0]


@dataclass(frozen=True)
class Vocabulary:
    """The id ranges of one model.

    >>> vocabulary = Vocabulary.create(text=300, image=(1, 64), audio=(2, 32), region=10, voken=4)
    >>> [(r.name, r.start, r.stop) for r in vocabulary.ranges][:4]
    [('text', 0, 300), ('control', 300, 620), ('image.0', 620, 684), ('audio.0', 684, 716)]
    >>> vocabulary.to_ids("audio.1", np.array([0, 31])).tolist()
    [716, 747]
    >>> vocabulary.to_codes("audio.1", np.array([716, 747])).tolist()
    [0, 31]
    >>> vocabulary.used, vocabulary.size
    (762, 768)
    """

    ranges: tuple[Range, ...]
    control_names: tuple[str, ...] = CONTROL
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """Fingerprint of the tokenizer behind each modality."""
    unused_text: Spans = _UNKNOWN
    """[start, stop) of text codes that no text encodes to; they are never sampled."""

    @classmethod
    def create(
        cls,
        *,
        text: int,
        image: tuple[int, int] = (0, 0),
        audio: tuple[int, int] = (0, 0),
        region: int = 0,
        voken: int = 0,
        fingerprints: Mapping[str, str] | None = None,
        unused_text: Spans = _UNKNOWN,
    ) -> Vocabulary:
        """Lay out the ranges; `image` and `audio` are (codebooks, codes per book), the rest sizes."""
        sizes = [("text", text), ("control", _NUM_NAMED + NUM_NUMBERS)]
        sizes += [(f"image.{k}", image[1]) for k in range(image[0])]
        sizes += [(f"audio.{k}", audio[1]) for k in range(audio[0])]
        sizes += [("region", region), ("voken", voken)]
        ranges, start = [], 0
        for name, size in sizes:
            if size:
                ranges.append(Range(name, start, size))
                start += size
        return cls(tuple(ranges), CONTROL, dict(fingerprints or {}), unused_text)

    @classmethod
    def of(cls, tokenizers: Tokenizers, *, audio_codebooks: int | None = None, voken: int = 0) -> Vocabulary:
        """The vocabulary of a set of tokenizers; `audio_codebooks` keeps only the first books of the sound codec."""

        def books(modality: Any) -> tuple[int, int]:
            tokenizer = tokenizers.get(modality)
            return (tokenizer.num_codebooks, tokenizer.codebook_size) if tokenizer else (0, 0)

        num_audio, audio_size = books("audio")
        return cls.create(
            text=tokenizers["text"].codebook_size,
            image=books("image"),
            audio=(min(num_audio, audio_codebooks or num_audio), audio_size),
            region=books("region")[1],
            voken=voken,
            fingerprints={modality: tokenizer.fingerprint for modality, tokenizer in tokenizers.items()},
            unused_text=getattr(tokenizers["text"], "unused_codes", _UNKNOWN),
        )

    @cached_property
    def _by_name(self) -> dict[str, Range]:
        return {r.name: r for r in self.ranges}

    @cached_property
    def _stops(self) -> IntArray:
        return np.array([r.stop for r in self.ranges], dtype=np.int64)

    @property
    def used(self) -> int:
        """Number of ids that mean something."""
        return self.ranges[-1].stop

    @property
    def size(self) -> int:
        """Rows of the embedding: `used`, rounded up to a multiple of 128 (fast matrix products)."""
        return -(-self.used // PAD_TO) * PAD_TO

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that have a range, in the order of the ranges."""
        return tuple(dict.fromkeys(r.group for r in self.ranges if r.group not in ("control", "voken")))

    @cached_property
    def text_ids(self) -> Spans:
        """[start, stop) of the ids that text encodes to, ascending; at least one.

        >>> Vocabulary.create(text=300, unused_text=((0, 2), (290, 300))).text_ids
        ((2, 290),)
        """
        text = self.range("text")
        edges = [0, *(edge for span in self.unused_text for edge in span), text.size]
        spans = zip(edges[::2], edges[1::2], strict=True)
        return tuple((text.start + low, text.start + high) for low, high in spans if high > low)

    def range(self, name: str) -> Range:
        """The range of a codebook.

        Raises:
            DataError: this vocabulary has no such range.
        """
        if name not in self._by_name:
            raise DataError(f"this vocabulary has no range {name!r}; it has {', '.join(self._by_name)}")
        return self._by_name[name]

    def control(self, name: str) -> int:
        """Id of a control token, e.g. `control("eos")`.

        Raises:
            DataError: this vocabulary is of before there was one.
        """
        if name not in self.control_names:
            raise DataError(f"this vocabulary has no control token {name!r}: its model was made before there was one")
        return self.range("control").start + self.control_names.index(name)

    @cached_property
    def vokens_N(self) -> IntArray:
        """The ids of a voken block between its begin and end tokens: every voken, in order.

        Raises:
            DataError: this vocabulary has no vokens.
        """
        r = self.range("voken")
        return np.arange(r.start, r.stop, dtype=np.int64)

    @property
    def numbers(self) -> Range:
        """The ids that write shapes: numbers 0 to 255."""
        return Range("numbers", self.range("control").start + _NUM_NAMED, NUM_NUMBERS)

    def to_ids(self, name: str, codes: IntArray) -> IntArray:
        """Codes of one codebook to ids.

        Raises:
            DataError: a code outside the codebook.
        """
        r = self.range(name)
        if codes.size and not (int(codes.min()) >= 0 and int(codes.max()) < r.size):
            raise DataError(f"codes of {name} are in [0, {r.size}); got {int(codes.min())} to {int(codes.max())}")
        return codes + r.start

    def to_codes(self, name: str, ids: IntArray) -> IntArray:
        """Ids of one codebook to codes; the inverse of `to_ids`.

        Raises:
            DataError: an id outside the range.
        """
        r = self.range(name)
        if ids.size and not (r.start <= int(ids.min()) and int(ids.max()) < r.stop):
            raise DataError(f"ids of {name} are in [{r.start}, {r.stop}); got {int(ids.min())} to {int(ids.max())}")
        return ids - r.start

    def range_index(self, ids: IntArray) -> IntArray:
        """Position in `ranges` of each id; ids in the unused tail give `len(ranges)`."""
        return np.searchsorted(self._stops, ids, side="right")

    def manifest(self) -> dict[str, Any]:
        """JSON-able description; `from_manifest` is the inverse."""
        unused = [list(span) for span in self.unused_text]
        return ({} if self.unused_text == _UNKNOWN else {"unused_text": unused}) | {
            "format": FORMAT,
            "size": self.size,
            "ranges": [{"name": r.name, "start": r.start, "size": r.size} for r in self.ranges],
            "control": list(self.control_names),
            "numbers": {"start": self.numbers.start, "size": self.numbers.size},
            "fingerprints": dict(self.fingerprints),
        }

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any]) -> Vocabulary:
        """Read and check a manifest.

        Raises:
            CheckpointError: another format, missing fields, ranges that do not follow one another, or other control
            tokens.
        """
        try:
            if manifest["format"] != FORMAT:
                raise CheckpointError(f"vocabulary format {manifest['format']!r}; this version reads {FORMAT}")
            ranges = tuple(Range(str(r["name"]), int(r["start"]), int(r["size"])) for r in manifest["ranges"])
            names = tuple(manifest["control"])
            fingerprints = {str(k): str(v) for k, v in manifest["fingerprints"].items()}
            unused = tuple((int(low), int(high)) for low, high in manifest.get("unused_text", _UNKNOWN))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"broken vocabulary manifest: {type(error).__name__} {error}") from error
        vocabulary = cls(ranges, names, fingerprints, unused)
        expected = 0
        for r in ranges:
            if r.start != expected or r.size <= 0:
                raise CheckpointError(
                    f"broken vocabulary manifest: range {r.name!r} starts at {r.start}, not {expected}"
                )
            expected = r.stop
        if [r.name for r in ranges[:2]] != ["text", "control"]:
            raise CheckpointError("broken vocabulary manifest: it must open with the ranges text and control")
        edges = [0, *(edge for span in unused for edge in span), ranges[0].size]
        if edges != sorted(edges) or not vocabulary.text_ids:
            raise CheckpointError("broken vocabulary manifest: unused_text leaves no text, or is not in order")
        if names != CONTROL[: len(names)] or ranges[1].size != _NUM_NAMED + NUM_NUMBERS:
            raise CheckpointError("the vocabulary has other control tokens than this version of anygen")
        if (
            manifest.get("size") != vocabulary.size
            or manifest.get("numbers", {}).get("start") != vocabulary.numbers.start
        ):
            raise CheckpointError("broken vocabulary manifest: its sizes contradict its ranges")
        return vocabulary

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the manifest."""
        return fingerprint_of(self.manifest())

    def check(self, tokenizers: Tokenizers) -> None:
        """Refuse tokenizers other than those the ids were made with.

        Raises:
            CheckpointError: one is missing or has another fingerprint or size.
        """
        for modality, fingerprint in self.fingerprints.items():
            tokenizer = tokenizers.get(modality)  # type: ignore[call-overload]
            if tokenizer is None:
                raise CheckpointError(f"the {modality} tokenizer of this vocabulary is missing")
            if tokenizer.fingerprint != fingerprint:
                raise CheckpointError(
                    f"the {modality} tokenizer is not the one that this model was trained with "
                    f"(fingerprint {tokenizer.fingerprint[:12]}, expected {fingerprint[:12]})"
                )
