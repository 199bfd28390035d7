"""Which of several answers to keep: the one that the model itself judges best.

Usually by log p(input | answer), the model read backwards: text -> picture by how likely the picture is
called that, speech -> text by how likely the text is spoken so. The input is the same for all answers, so this is their
mutual information with it up to a constant (MMI, Li et al. 2016, arXiv 1510.03055, with all of its weight on the
backward model). DALL-E (arXiv 2102.12092) needs CLIP for it; an any-to-any model is its own judge. Where a text is
written between the two (`Request.via`), each step is judged: log p(input | text) + log p(text | answer).

A bundle may say that a direction is judged forward, by log p(answer | input), as recognisers of speech search for the
likeliest words: a voice that a model never speaks is about as unlikely whatever it says. Or that it is judged both
ways (MMI-bidi of the same paper), where by way of a text all steps are: read backwards one wording is as good as
another, but the model may know how to say the one and not the other, and log p(speech | wording) tells which.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from anygen.bundle import Bundle
from anygen.documents import Document, Segment, default_task
from anygen.errors import InputError
from anygen.judging import BestOf, Judge
from anygen.plan import can_be_read_back
from anygen.planning import steps_of
from anygen.request import MAX_SAMPLES, Request
from anygen.sampling.choose import SamplingOptions
from anygen.sampling.likelihood import answer_nats
from anygen.sampling.sampler import SampleState
from anygen.sequence import Sequencer

_FORWARD_IDS = 15
"""As how many ids an answer counts forward where it is judged both ways: the mean of its own, so many times. By the sum
short wordings would win, and leave out what is to be said. From 10 to 20 the same answers win."""


def is_ranked(request: Request) -> bool:
    """True where an answer can be read backwards: one input, one output of another modality."""
    return can_be_read_back(request.kinds, request.outputs)


def with_usual_best_of(request: Request, bundle: Bundle) -> Request:
    """The request, drawing as many answers as the bundle does in its direction where it does not say how many.

    One answer where all of them would be the same, or cannot be compared.
    """
    if request.best_of is not None or request.own_task is not None:
        return request
    if not is_ranked(request) or request.decoder == "voken":
        return request
    usual = bundle.best_of.get(f"{request.kinds[0]}>{request.outputs[0]}")
    number = min(usual.number, MAX_SAMPLES // request.num_samples) if usual else 1
    if number < 2:
        return request
    ranked = request.with_best_of(number)
    options = options_of(ranked, bundle)
    drawn = ("control", *(step.partition(">")[2] for step in steps_of(request, bundle.via)))
    return request if all(options[name].is_greedy for name in drawn) else ranked


def options_of(request: Request, bundle: Bundle) -> dict[str, SamplingOptions]:
    """Sampling options by modality; each of several answers is drawn at the temperatures for several."""
    defaults = dict(bundle.defaults)
    for step in steps_of(request, bundle.via) if request.num_drawn > 1 else ():
        if (usual := _usual(request, bundle).get(step)) is not None:
            name = step.partition(">")[2]
            defaults[name] = defaults.get(name, SamplingOptions()).override(temperature=usual.temperature)
    return request.options(defaults)


def _usual(request: Request, bundle: Bundle) -> Mapping[str, BestOf]:
    """What the bundle does by direction: nothing where the task is another than a direction suggests."""
    return bundle.best_of if request.own_task is None else {}


def check_ranked(request: Request) -> None:
    """Raise InputError where the answers of this request cannot be read backwards."""
    if not is_ranked(request):
        inputs, outputs = request.kinds, request.outputs
        raise InputError(
            "best_of reads an answer backwards: it takes one input and one output of another modality, text, image or "
            f"audio; got {', '.join(inputs) or 'no input'} -> {', '.join(outputs)}"
        )
    if request.decoder == "voken":
        raise InputError("best_of compares codes; decoder='voken' draws pictures that have none")


def best_of(bundle: Bundle, sequencer: Sequencer, request: Request, states: Sequence[SampleState]) -> list[SampleState]:
    """Of the finished answers that were drawn for each sample, the best; the first where several are."""
    usual, num = _usual(request, bundle), request.num_drawn
    chains = [[(sequencer.build(d), is_mean) for d, is_mean in _judged(usual, sequencer, state)] for state in states]
    different = {s.ids_S.tobytes(): s for chain in chains for s, _ in chain}  # texts are often alike
    found = answer_nats(bundle.model, bundle.vocabulary, list(different.values()))
    nats = {key: nats_P for key, (_, nats_P) in zip(different, found, strict=True)}

    def weighed(chain: list[tuple[Any, bool]]) -> float:
        told = [(nats[s.ids_S.tobytes()], is_mean) for s, is_mean in chain]
        return sum(_FORWARD_IDS * float(n_P.mean()) if is_mean else float(n_P.sum()) for n_P, is_mean in told)

    scores = [-weighed(chain) for chain in chains]
    return [states[start + int(np.argmax(scores[start : start + num]))] for start in range(0, len(states), num)]


def _judged(usual: Mapping[str, BestOf], sequencer: Sequencer, state: SampleState) -> list[tuple[Document, bool]]:
    """Of each step from the input to the answer a document of both, whose target is what its judge finds likely.

    Two where the judge is `both`; with each, whether it counts by the mean of its ids.
    """
    segments = _segments(sequencer, state)
    if state.earlier is not None:
        segments = (*_segments(sequencer, state.earlier), *segments[-1:])
    whole = _judge_of(usual, segments[0], segments[-1])
    documents = []
    for given, answer in itertools.pairwise(segments):
        judge = whole if whole == "both" else _judge_of(usual, given, answer)
        if judge in ("backward", "both"):
            documents.append((_telling(given, known=answer), False))
        if judge in ("forward", "both"):
            documents.append((_telling(answer, known=given), judge == "both"))
    return documents


def _judge_of(usual: Mapping[str, BestOf], given: Segment, answer: Segment) -> Judge:
    direction = usual.get(f"{given.modality}>{answer.modality}")
    return direction.judge if direction is not None else "backward"


def _telling(told: Segment, *, known: Segment) -> Document:
    """The document that answers `known` with `told`."""
    task = default_task((known.modality,), told.modality)
    return Document((replace(known, target=False), replace(told, target=True)), task)


def _segments(sequencer: Sequencer, state: SampleState) -> tuple[Segment, ...]:
    return sequencer.parse(np.concatenate([state.prompt, state.ids])).document.segments
