"""Sounds about something else, such as a spoken question about a picture, put in writing.

Each sound is heard by itself, its words stand in its place, and an answer in sound is written before it is said: a
chain of calls that the model was taught one by one, in place of one that it was hardly taught (a cascade, as spoken
dialogue systems have it; SpeechGPT, arXiv 2305.11000, writes the same texts in one sequence).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from anygen.documents import Segment
from anygen.errors import InputError
from anygen.plan import Way, can_be_in_writing
from anygen.planning import way_of
from anygen.request import Request
from anygen.results import Sample

_NOTHING = "?"
"""In place of words where none were heard or written: no call takes an empty text."""


def is_in_writing(request: Request, usual: Mapping[str, Way]) -> bool:
    """True where a request is answered so.

    Args:
        request: what is asked for.
        usual: the bundle's ways, by direction.

    Raises:
        InputError: it is asked for, and there is no sound about something else, or not one output.
    """
    if way_of(request, usual) != "in_writing":
        return False
    if not can_be_in_writing(request.kinds, request.outputs):
        raise InputError(
            "via='in_writing' hears sounds that come with something else, and gives one output; "
            f"got {', '.join(request.kinds) or 'no input'} -> {', '.join(request.outputs)}"
        )
    return True


class Spoken:
    """One answer to such a request, call by call.

    Args:
        request: what is asked for.
        place: which of its answers this is.
    """

    def __init__(self, request: Request, place: int) -> None:
        self._request = request
        generator, seed = request.generators()[place]
        self._randomness: dict[str, Any] = {"generator": generator} if seed is None else {"seed": seed}
        self._heard: list[Sample] = []
        self._written: Sample | None = None
        self._sounds = [segment for segment in request.inputs if segment.modality == "audio"]

    @property
    def is_at_the_end(self) -> bool:
        """True where the next call gives what was asked for."""
        if len(self._heard) < len(self._sounds):
            return False
        return self._request.outputs != ("audio",) or self._written is not None

    def call(self) -> Request:
        """The next call."""
        if len(self._heard) < len(self._sounds):
            return self._between([self._sounds[len(self._heard)]], None)
        words = iter([heard.segments[0] for heard in self._heard])
        asked = [next(words) if segment.modality == "audio" else segment for segment in self._request.inputs]
        if not self.is_at_the_end:
            return self._between(asked, self._request.own_task)
        if self._written is None:
            return self._call(asked)
        return self._call(self._written.segments[:1], task=None)

    def take(self, sample: Sample) -> None:
        """What the call gave, where it was not the last."""
        if len(self._heard) < len(self._sounds):
            self._heard.append(sample)
        else:
            self._written = sample

    def whole(self, last: Sample) -> Sample:
        """The answer that was asked for, with what was heard and written before it."""
        before = [*self._heard, *([self._written] if self._written is not None else [])]
        texts = [segment for sample in before for segment in (*sample.via, *sample.segments)]
        was_cut = any(sample.finish_reason == "length" for sample in before)
        return replace(
            last,
            ids=(*(id for sample in before for id in sample.ids), *last.ids),
            via=(*texts, *last.via),
            finish_reason="length" if was_cut and last.finish_reason == "eos" else last.finish_reason,
            provenance={**last.provenance, "request": self._request.describe()},
        )

    def _between(self, given: Sequence[Segment], task: str | None) -> Request:
        """A call for a text, for which nothing holds that is about the answer's form."""
        plain = {"max_new_tokens": None, "size": None, "duration_s": None, "num_inference_steps": None}
        return self._call(given, output="text", task=task, decoder="codes", best_of=1, **plain)

    def _call(self, given: Sequence[Segment], **changes: Any) -> Request:
        content = [{"type": s.modality, s.modality: _NOTHING if s.content == "" else s.content} for s in given]
        media: dict[str, Any] = {"text": None, "image": None, "audio": None, "content": content}
        return replace(self._request, num_samples=1, via=None, **self._randomness, **media, **changes)
