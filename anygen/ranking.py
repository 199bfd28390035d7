"""Which of several answers to keep: the one from which the model itself would guess the request.

An answer is scored by log p(input | answer), the model read backwards: text -> picture by how likely the picture is
called that, speech -> text by how likely the text is spoken so. The input is the same for all answers, so this is their
mutual information with it up to a constant (MMI, Li et al. 2016, arXiv 1510.03055, with all of its weight on the
backward model). DALL-E (arXiv 2102.12092) needs CLIP for it; an any-to-any model is its own judge. Where a text is
written between the two (`Request.via`), each step is read backwards: log p(input | text) + log p(text | answer).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from anygen.bundle import Bundle
from anygen.documents import Document, Segment, default_task
from anygen.errors import InputError
from anygen.plan import can_be_read_back
from anygen.request import MAX_SAMPLES, Request
from anygen.sampling.choose import SamplingOptions
from anygen.sampling.likelihood import answer_nats
from anygen.sampling.sampler import SampleState
from anygen.sequence import Sequencer


def is_ranked(request: Request) -> bool:
    """True where an answer can be read backwards: one input, one output of another modality."""
    return can_be_read_back(request.kinds, request.outputs)


def with_usual_best_of(request: Request, usual: Mapping[str, int], defaults: Mapping[str, SamplingOptions]) -> Request:
    """The request, drawing as many answers as is usual for its direction where it does not say how many.

    One answer where all of them would be the same, or cannot be compared.

    Args:
        request: what is asked for.
        usual: direction to how many are drawn.
        defaults: sampling options of the model, by modality.
    """
    if not usual or request.best_of is not None or request.own_task is not None:
        return request
    if not is_ranked(request) or request.decoder == "voken":
        return request
    options = request.options(defaults)
    if all(options[name].is_greedy for name in (request.outputs[0], "control")):
        return request
    number = min(usual.get(f"{request.kinds[0]}>{request.outputs[0]}", 1), MAX_SAMPLES // request.num_samples)
    return request.with_best_of(number) if number > 1 else request


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


def best_of(bundle: Bundle, sequencer: Sequencer, states: Sequence[SampleState], num: int) -> list[SampleState]:
    """Of each `num` finished answers to one request, the one that makes it likeliest; the first where several do."""
    chains = [_backwards(sequencer, state) for state in states]
    sequences = [sequencer.build(document) for chain in chains for document in chain]
    nats = iter([float(nats_P.sum()) for _, nats_P in answer_nats(bundle.model, bundle.vocabulary, sequences)])
    scores = [-sum(itertools.islice(nats, len(chain))) for chain in chains]
    return [states[start + int(np.argmax(scores[start : start + num]))] for start in range(0, len(states), num)]


def _backwards(sequencer: Sequencer, state: SampleState) -> list[Document]:
    """Of each step from the input to the answer, what it gave as the input and what it read as the answer."""
    segments = _segments(sequencer, state)
    if state.earlier is not None:
        segments = (*_segments(sequencer, state.earlier), *segments[-1:])
    return [
        Document(
            (replace(given, target=False), replace(read, target=True)), default_task((given.modality,), read.modality)
        )
        for read, given in itertools.pairwise(segments)
    ]


def _segments(sequencer: Sequencer, state: SampleState) -> tuple[Segment, ...]:
    return sequencer.parse(np.concatenate([state.prompt, state.ids])).document.segments
