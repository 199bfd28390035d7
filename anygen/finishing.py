"""From a sample that is drawn to what the caller gets: codes as media, and everything that made them."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from anygen._version import __version__
from anygen.bundle import Bundle
from anygen.documents import Document, Segment
from anygen.drawing import Drawer
from anygen.request import Request
from anygen.results import Sample
from anygen.sampling.sampler import SampleState
from anygen.sequence import Sequencer


class Finisher:
    """Finishes the samples of one model."""

    def __init__(self, bundle: Bundle, sequencer: Sequencer) -> None:
        self._bundle, self._sequencer = bundle, sequencer

    def drawer(self, request: Request) -> Drawer:
        """What draws its pictures."""
        return Drawer(self._bundle, request.decoder, request.num_inference_steps)

    def answer(self, request: Request, state: SampleState) -> tuple[Segment, ...]:
        """Everything a sample holds, decoded."""
        control = self._bundle.vocabulary.control
        parsed = self._sequencer.parse(np.array([control("target"), *state.ids]))
        assert parsed.complete, f"the grammar let through what parse refuses: {parsed.problem}"
        return self.decoded(request, state, parsed.document).segments

    def decoded(self, request: Request, state: SampleState, document: Document, place: int = 0) -> Document:
        """Codes of a sample's answer, or of a part of it behind so many pictures, as media."""
        drawer, edit = self.drawer(request), state.edit
        if edit is not None:
            finished: Document = edit.finished(
                drawer.decode(edit.whole(document), vokens=(), noise_seed=state.noise_seed)
            )
            return finished
        return drawer.decode(document, vokens=state.vokens[place:], noise_seed=state.noise_seed, place=place)

    def sample(self, request: Request, state: SampleState, segments: tuple[Segment, ...] | None = None) -> Sample:
        """A sample; `segments` are what it holds, where they are decoded already."""
        segments = self.answer(request, state) if segments is None else segments
        num_via, ids, is_cut = state.walk.plan.num_via, tuple(state.ids), state.walk.is_cut
        if (earlier := state.earlier) is not None:
            text = self.answer(request, earlier)
            num_via, segments, ids = len(text), (*text, *segments), (*earlier.ids, *ids)
            is_cut = is_cut or earlier.walk.is_cut
        provenance = {
            "anygen": __version__,
            "torch": str(torch.__version__),
            "bundle": self._bundle.provenance.get("name", self._bundle.folder.name),
            "vocabulary": self._bundle.vocabulary.fingerprint,
            "request": request.describe(),
        }
        ended: Literal["eos", "length"] = "length" if is_cut else "eos"
        return Sample(
            segments[num_via:],
            state.seed,
            ended if state.walk.done else "stopped",
            ids,
            provenance,
            segments[:num_via],
        )
