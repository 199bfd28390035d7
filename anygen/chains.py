"""Answers that are several calls of the model, each of which it was taught, in place of one that it was hardly taught.

Two ways (`Request.via`) are such chains:

    in_writing   sounds about something else, such as a spoken question about a picture: each is heard by itself, its
                 words stand in its place, and an answer in sound is written before it is said (a cascade, as spoken
                 dialogue systems are; SpeechGPT, arXiv 2305.11000, writes the same texts in one sequence)
    one_by_one   several outputs: each by itself, from the text that was given, or that is the first of them
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from anygen.documents import Segment
from anygen.judging import BestOf
from anygen.plan import Way
from anygen.planning import check_way, way_of
from anygen.request import MAX_SAMPLES, SHAPED, Request
from anygen.results import Sample

_NOTHING = "?"
"""In place of words where none were heard or written: no call takes an empty text."""
_FOR_TEXT: Mapping[str, Any] = {
    "output": "text",
    "decoder": "codes",
    **dict.fromkeys(("task", "max_new_tokens", "size", "duration_s", "num_inference_steps")),
}
"""Of a call on the way, to which nothing applies that is about the answer's form."""


@dataclass(frozen=True)
class _Call:
    given: Sequence[Segment]
    changes: Mapping[str, Any]
    """Of the request, beside its inputs."""
    is_answer: bool
    """False where it is on the way to what was asked for."""


Following = Callable[[Request, Sequence[Sample]], _Call | None]
"""What is called next, after such samples; None where nothing is."""


def _in_writing(request: Request, made: Sequence[Sample]) -> _Call | None:
    sounds = [segment for segment in request.inputs if segment.modality == "audio"]
    if len(made) < len(sounds):
        return _Call([sounds[len(made)]], _FOR_TEXT, is_answer=False)
    task = None if request.own_task == "speak" else request.own_task  # that is what the last call does anyway
    is_said = request.outputs == ("audio",)
    if len(made) == len(sounds):
        words = iter([heard.segments[0] for heard in made])
        asked = [next(words) if segment.modality == "audio" else segment for segment in request.inputs]
        changes = {**_FOR_TEXT, "task": task} if is_said else {"task": task}
        return _Call(asked, changes, is_answer=not is_said)
    if is_said and len(made) == len(sounds) + 1:
        return _Call(made[-1].segments[:1], {"task": None}, is_answer=True)
    return None


def _one_by_one(request: Request, made: Sequence[Sample]) -> _Call | None:
    if len(made) == len(request.outputs):
        return None
    output = request.outputs[len(made)]
    unfit = {name: None for name, of in SHAPED.items() if of != output}
    changes = {"output": output, "task": None if made else request.own_task, **unfit}
    is_told = bool(made) and request.outputs[0] == "text"
    return _Call(made[0].segments[:1] if is_told else request.inputs, changes, is_answer=True)


_FOLLOWING: Mapping[Way, Following] = {"in_writing": _in_writing, "one_by_one": _one_by_one}


@dataclass
class Chain:
    """One answer to a request, call by call.

    Attributes:
        request: what is asked for.
        following: says what is called next.
        randomness: `seed` or `generator` of every call.
    """

    request: Request
    following: Following
    randomness: Mapping[str, Any]
    _made: list[tuple[_Call, Sample]] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        """True where no call is left."""
        return self._next is None

    @property
    def is_answering(self) -> bool:
        """True where the next call gives what was asked for, or a part of it."""
        return self._next is not None and self._next.is_answer

    @property
    def _next(self) -> _Call | None:
        return self.following(self.request, [sample for _, sample in self._made])

    def call(self) -> Request:
        """The next call."""
        following = self._next
        assert following is not None, "a chain that is done has no next call"
        content = [{"type": s.modality, s.modality: _words(s.content)} for s in following.given]
        media: dict[str, Any] = {"text": None, "image": None, "audio": None, "content": content}
        return replace(self.request, num_samples=1, via=None, **self.randomness, **media, **following.changes)

    def take(self, sample: Sample) -> None:
        """What the next call gave."""
        following = self._next
        assert following is not None, "a chain that is done takes nothing more"
        self._made.append((following, sample))

    def whole(self) -> Sample:
        """The answer, as far as it goes.

        `via` holds what was written on the way, `seed` is the first of the seeds that were drawn from, and `calls` in
        its provenance says which answer of each call was kept.
        """
        samples = [sample for _, sample in self._made]
        reasons, last = {sample.finish_reason for sample in samples}, samples[-1]
        was_stopped = "stopped" in reasons or not self.is_done
        ended: Literal["length", "eos"] = "length" if "length" in reasons else "eos"
        calls = [
            {"output": asked.get("output"), "seed": sample.seed, "best_of": asked.get("best_of", 1)}
            for sample in samples
            for asked in [sample.provenance["request"]]
        ]
        return replace(
            last,
            segments=tuple(segment for call, sample in self._made if call.is_answer for segment in sample.segments),
            via=tuple(
                segment
                for call, sample in self._made
                for segment in (*sample.via, *(() if call.is_answer else sample.segments))
            ),
            ids=tuple(id for sample in samples for id in sample.ids),
            seed=self.randomness.get("seed"),
            finish_reason="stopped" if was_stopped else ended,
            provenance={**last.provenance, "request": self.request.describe(), "calls": calls},
        )


def _words(content: Any) -> Any:
    return _NOTHING if isinstance(content, str) and not content.strip() else content


def chains_of(request: Request, ways: Mapping[str, Way], best_of: Mapping[str, BestOf]) -> list[Chain]:
    """Of a request that is answered by such a chain, one for each answer; else none.

    A chain draws from seeds of its own, as many as the best of several takes: two answers share no draw.

    Args:
        request: what is asked for.
        ways: what is usual on this model, by direction.
        best_of: how many answers it usually draws, by direction.

    Raises:
        InputError: a chain is asked for that cannot be.
    """
    way = way_of(request, ways)
    check_way(way, request)
    following = _FOLLOWING.get(way) if way else None
    if following is None:
        return []
    if way == "one_by_one" and request.via is None and request.max_new_tokens is not None:
        return []  # a budget that is given is one for all outputs
    width = max([1, *(usual.number for usual in best_of.values())]) if request.best_of is None else 1
    if width > 1 and request.num_samples * width > MAX_SAMPLES:
        request, width = request.with_best_of(1), 1
    drawn = request.with_best_of(width).generators()[::width]
    return [
        Chain(request, following, {"generator": generator} if seed is None else {"seed": seed})
        for generator, seed in drawn
    ]
