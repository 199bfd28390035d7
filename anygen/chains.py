"""Answers that are several calls of the model, each of which it was taught, in place of one that it was hardly taught.

Two ways (`Request.via`) are such chains:

    in_writing   sounds about something else, such as a spoken question about a picture: each is heard by itself, its
                 words stand in its place, and an answer in sound is written before it is said (a cascade, as spoken
                 dialogue systems are; SpeechGPT, arXiv 2305.11000, writes the same texts in one sequence)
    one_by_one   several outputs: each by itself, from the text that was given, or that is the first of them
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from anygen.documents import Segment
from anygen.plan import Way
from anygen.planning import check_way, way_of
from anygen.request import Request
from anygen.results import Sample

_NOTHING = "?"
"""In place of words where none were heard or written: no call takes an empty text."""


class Chain:
    """One answer to a request, call by call.

    Args:
        request: what is asked for.
        place: which of its answers this is; it is drawn as that one, in every call.
    """

    def __init__(self, request: Request, place: int) -> None:
        self._request = request
        generator, seed = request.generators()[place]
        self._randomness: dict[str, Any] = {"generator": generator} if seed is None else {"seed": seed}
        self._samples: list[Sample] = []

    @property
    def is_done(self) -> bool:
        """True where no call is left."""
        raise NotImplementedError

    @property
    def is_answering(self) -> bool:
        """True where the next call gives what was asked for, or a part of it."""
        raise NotImplementedError

    def call(self) -> Request:
        """The next call."""
        raise NotImplementedError

    def take(self, sample: Sample) -> None:
        """What the call gave."""
        self._samples.append(sample)

    def whole(self) -> Sample:
        """The answer, as far as it goes, with what was written before it in `via`."""
        raise NotImplementedError

    def _call(self, given: Sequence[Segment], **changes: Any) -> Request:
        content = [{"type": s.modality, s.modality: _NOTHING if s.content == "" else s.content} for s in given]
        media: dict[str, Any] = {"text": None, "image": None, "audio": None, "content": content}
        return replace(self._request, num_samples=1, via=None, **self._randomness, **media, **changes)

    def _joined(self, segments: Sequence[Segment], via: Sequence[Segment]) -> Sample:
        last, reasons = self._samples[-1], {sample.finish_reason for sample in self._samples}
        return replace(
            last,
            segments=tuple(segments),
            via=tuple(via),
            ids=tuple(id for sample in self._samples for id in sample.ids),
            finish_reason="length" if reasons == {"eos", "length"} else last.finish_reason,
            provenance={**last.provenance, "request": self._request.describe()},
        )


class InWriting(Chain):
    """Sounds are heard, what is asked is answered in writing, and said where it is to be sound."""

    @property
    def _sounds(self) -> list[Segment]:
        return [segment for segment in self._request.inputs if segment.modality == "audio"]

    @property
    def _num_calls(self) -> int:
        return len(self._sounds) + (2 if self._request.outputs == ("audio",) else 1)

    @property
    def is_done(self) -> bool:
        """True where no call is left."""
        return len(self._samples) == self._num_calls

    @property
    def is_answering(self) -> bool:
        """True where the next call is the last."""
        return len(self._samples) == self._num_calls - 1

    def call(self) -> Request:
        """The next call."""
        sounds, number = self._sounds, len(self._samples)
        if number < len(sounds):
            return self._for_text([sounds[number]], None)
        if number > len(sounds):
            return self._call(self._samples[-1].segments[:1], task=None)
        words = iter([heard.segments[0] for heard in self._samples])
        asked = [next(words) if segment.modality == "audio" else segment for segment in self._request.inputs]
        return self._call(asked) if self.is_answering else self._for_text(asked, self._request.own_task)

    def whole(self) -> Sample:
        """The answer, with all that was heard and written before it."""
        *before, last = self._samples
        texts = [segment for sample in before for segment in (*sample.via, *sample.segments)]
        return self._joined(last.segments, [*texts, *last.via])

    def _for_text(self, given: Sequence[Segment], task: str | None) -> Request:
        """A call for which nothing holds that is about the answer's form."""
        plain = {"max_new_tokens": None, "size": None, "duration_s": None, "num_inference_steps": None}
        return self._call(given, output="text", task=task, decoder="codes", best_of=1, **plain)


class OneByOne(Chain):
    """Every output is a call of its own."""

    @property
    def is_done(self) -> bool:
        """True where no call is left."""
        return len(self._samples) == len(self._request.outputs)

    @property
    def is_answering(self) -> bool:
        """Always: each call gives a part of what was asked for."""
        return True

    def call(self) -> Request:
        """The next call."""
        output = self._request.outputs[len(self._samples)]
        if self._samples and self._request.outputs[0] == "text":
            return self._call(self._samples[0].segments[:1], output=output, task=None)
        task = self._request.own_task if not self._samples else None
        return self._call(self._request.inputs, output=output, task=task)

    def whole(self) -> Sample:
        """All of them, in the order in which they were asked for."""
        made = self._samples
        return self._joined([s for each in made for s in each.segments], [s for each in made for s in each.via])


def chains_of(request: Request, usual: Mapping[str, Way]) -> list[Chain]:
    """Of a request that is answered by such a chain, one for each answer; else none.

    Args:
        request: what is asked for.
        usual: the bundle's ways, by direction.

    Raises:
        InputError: a chain is asked for that cannot be.
    """
    way = way_of(request, usual)
    check_way(way, request)
    kind = {"in_writing": InWriting, "one_by_one": OneByOne}.get(way or "")
    if kind is None or (kind is OneByOne and request.via is None and request.max_new_tokens is not None):
        return []  # a budget that is given is one for all outputs
    return [kind(request, place) for place in range(request.num_samples)]
