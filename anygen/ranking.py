"""Which of several answers to keep: the one from which the model itself would guess the request.

An answer is scored by log p(input | answer), the model read backwards: text -> picture by how likely the picture is
called that, speech -> text by how likely the text is spoken so. The input is the same for all answers, so this is their
mutual information with it up to a constant (MMI, Li et al. 2016, arXiv 1510.03055, with all of its weight on the
backward model). DALL-E (arXiv 2102.12092) needs CLIP for it; an any-to-any model is its own judge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from anygen.bundle import Bundle
from anygen.documents import Document, Segment, default_task
from anygen.errors import InputError
from anygen.request import Request
from anygen.sampling.likelihood import answer_nats
from anygen.sampling.sampler import SampleState
from anygen.sequence import Sequencer

_READ_BACK = {"text", "image", "audio"}


def is_ranked(request: Request) -> bool:
    """True where an answer can be read backwards: one input, one output of another modality."""
    inputs, outputs = [segment.modality for segment in request.inputs], request.outputs
    return len(inputs) == len(outputs) == 1 and inputs[0] != outputs[0] and {inputs[0], outputs[0]} <= _READ_BACK


def check_ranked(request: Request) -> None:
    """Raise InputError where the answers of this request cannot be read backwards."""
    if not is_ranked(request):
        inputs, outputs = [segment.modality for segment in request.inputs], request.outputs
        raise InputError(
            "best_of reads an answer backwards: it takes one input and one output of another modality, text, image or "
            f"audio; got {', '.join(inputs) or 'no input'} -> {', '.join(outputs)}"
        )
    if request.decoder == "voken":
        raise InputError("best_of compares codes; decoder='voken' draws pictures that have none")


def best_of(bundle: Bundle, sequencer: Sequencer, states: Sequence[SampleState], num: int) -> list[SampleState]:
    """Of each `num` finished answers to one request, the one that makes it likeliest; the first where several do."""
    sequences = [sequencer.build(_backwards(sequencer, state)) for state in states]
    scores = [-float(nats_P.sum()) for _, nats_P in answer_nats(bundle.model, bundle.vocabulary, sequences)]
    return [states[start + int(np.argmax(scores[start : start + num]))] for start in range(0, len(states), num)]


def _backwards(sequencer: Sequencer, state: SampleState) -> Document:
    """Its answer as the input, and its input as the answer."""
    *_, answer = _segments(sequencer, state)
    given, *_ = _segments(sequencer, state.earlier or state)
    task = default_task((answer.modality,), given.modality)
    return Document((replace(answer, target=False), replace(given, target=True)), task)


def _segments(sequencer: Sequencer, state: SampleState) -> tuple[Segment, ...]:
    return sequencer.parse(np.concatenate([state.prompt, state.ids])).document.segments
