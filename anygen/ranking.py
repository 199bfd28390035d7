"""Which of several answers to keep: the one that the model itself judges best.

Usually by log p(input | answer), the model read backwards: text -> picture by how likely the picture is
called that, speech -> text by how likely the text is spoken so. The input is the same for all answers, so this is their
mutual information with it up to a constant (MMI, Li et al. 2016, arXiv 1510.03055, with all of its weight on the
backward model). DALL-E (arXiv 2102.12092) needs CLIP for it; an any-to-any model is its own judge. Where a text is
written between the two (`Request.via`), each step is judged: log p(input | text) + log p(text | answer).

A bundle may say that a direction is judged forward, by log p(answer | input), as recognisers of speech search for the
likeliest words: a voice that a model never speaks is about as unlikely whatever it says. Or that it is judged both
ways, by way of a text at every step: sum log p(input | answer) + 15 mean log p(answer | input), after MMI-bidi of the
same paper, which adds the sums. Read backwards one wording is as good as another, but the model may know how to say
the one and not the other, and log p(speech | wording) tells which; by its sum short wordings would win, and leave out
what is to be said (`benchmarks/judged_ways.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from anygen.bundle import Bundle
from anygen.documents import Document, Segment, default_task
from anygen.errors import InputError
from anygen.judging import BestOf, Judge
from anygen.plan import can_be_read_back
from anygen.planning import steps_of
from anygen.request import MAX_SAMPLES, Request
from anygen.sampling.choose import SamplingOptions
from anygen.sampling.likelihood import Nats, answer_nats
from anygen.sampling.sampler import SampleState
from anygen.sequence import Sequencer

_FORWARD_IDS = 15
"""As how many ids the forward side of each step counts, where both are judged: the mean of its own, so many times.
Chosen for picture -> speech of the embedded bundle, where 10 to 20 do as well."""


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
    chains = [_judged(usual, sequencer, state) for state in states]
    built = [[sequencer.build(told.document) for told in chain] for chain in chains]
    different = {s.ids_S.tobytes(): s for sequences in built for s in sequences}  # texts are often alike
    found = answer_nats(bundle.model, bundle.vocabulary, list(different.values()))
    nats = {key: nats_P for key, (_, nats_P) in zip(different, found, strict=True)}
    scores = [
        -sum(told.cost(nats[s.ids_S.tobytes()]) for told, s in zip(chain, sequences, strict=True))
        for chain, sequences in zip(chains, built, strict=True)
    ]
    return [states[start + int(np.argmax(scores[start : start + num]))] for start in range(0, len(states), num)]


@dataclass(frozen=True)
class _Told:
    """What a judge weighs: how likely the target of a document is."""

    document: Document
    by_mean: bool
    """By the mean of its ids, as if they were `_FORWARD_IDS`, and not by their sum."""

    def cost(self, nats_P: Nats) -> float:
        """Of its target's nats."""
        return _FORWARD_IDS * float(nats_P.mean()) if self.by_mean else float(nats_P.sum())


def _judged(usual: Mapping[str, BestOf], sequencer: Sequencer, state: SampleState) -> list[_Told]:
    """Of each step from the input to the answer what its judge weighs; of `both`, first backward."""
    segments = _segments(sequencer, state)
    if state.earlier is not None:
        segments = (*_segments(sequencer, state.earlier), *segments[-1:])
    whole = _judge_of(usual, segments[0], segments[-1])
    judged = []
    for given, answer in itertools.pairwise(segments):
        judge = whole if whole == "both" else _judge_of(usual, given, answer)
        if judge in ("backward", "both"):
            judged.append(_Told(_document(given, known=answer), by_mean=False))
        if judge in ("forward", "both"):
            judged.append(_Told(_document(answer, known=given), by_mean=judge == "both"))
    return judged


def _judge_of(usual: Mapping[str, BestOf], given: Segment, answer: Segment) -> Judge:
    direction = usual.get(f"{given.modality}>{answer.modality}")
    return direction.judge if direction is not None else "backward"


def _document(target: Segment, *, known: Segment) -> Document:
    """The document that answers `known` with `target`."""
    task = default_task((known.modality,), target.modality)
    return Document((replace(known, target=False), replace(target, target=True)), task)


def _segments(sequencer: Sequencer, state: SampleState) -> tuple[Segment, ...]:
    return sequencer.parse(np.concatenate([state.prompt, state.ids])).document.segments
