"""`AnyGen`: media in, media out.

model = AnyGen.from_pretrained()
model.generate(text="a red apple", output="image").images[0].save("apple.png")
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from anygen._version import __version__
from anygen.bundle import Bundle, load_bundle
from anygen.documents import Document, Segment
from anygen.drawing import Drawer
from anygen.errors import InputError
from anygen.grammar import Grammar
from anygen.ranking import best_of, check_ranked, with_usual_best_of
from anygen.request import Request
from anygen.results import Event, Finished, Output, Sample
from anygen.sampling.engine import Engine
from anygen.sampling.sampler import SampleState, sample
from anygen.sequence import Sequencer
from anygen.starting import Starter
from anygen.streaming import Tracker
from tokenizers_mm.codes import Codes

Method = TypeVar("Method", bound=Callable[..., Any])


def _with_signature_of_request(method: Method) -> Method:
    """Show the fields of `Request` as the keyword arguments that they are, in help() and completion."""
    own = inspect.signature(method).parameters.values()
    fields = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
        for f in dataclasses.fields(Request)
    ]
    kept = [p for p in own if p.kind is not inspect.Parameter.VAR_KEYWORD]
    method.__signature__ = inspect.Signature([*kept, *fields])  # type: ignore[attr-defined]
    return method


class AnyGen:
    """A model with its tokenizers, ready to generate."""

    def __init__(self, bundle: Bundle, *, dtype: torch.dtype = torch.float32) -> None:
        self.bundle = bundle
        self.sequencer = Sequencer(bundle.vocabulary, bundle.layout)
        self.grammar = Grammar(self.sequencer)
        self.engine = Engine(bundle.model, dtype=dtype)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path | None = None, *, device: str = "auto", dtype: torch.dtype = torch.float32
    ) -> AnyGen:
        """Open a bundle; None opens the one that comes with the package.

        Args:
            folder: of the bundle.
            device: `auto` takes a GPU where there is one.
            dtype: of the transformer's weights while sampling; `torch.bfloat16` is faster and gives other ids.

        Raises:
            InputError: no such folder, or another dtype.
            CheckpointError: not a bundle, or a damaged one.
        """
        if dtype not in (torch.float32, torch.bfloat16):
            raise InputError(f"dtype must be torch.float32 or torch.bfloat16; got {dtype!r}")
        return cls(load_bundle(folder, device=device), dtype=dtype)

    @_with_signature_of_request
    def generate(self, *, on_event: Callable[[Event | Finished], Any] | None = None, **arguments: Any) -> Output:
        """Generate; see `anygen.request.Request` for the other arguments.

        `on_event` is told what `stream` would tell. Where it returns False everything stops; samples then hold what is
        whole, and the text so far.

        >>> model = AnyGen.from_pretrained()
        >>> model.generate(text="a red apple", output="image").image.size
        (64, 64)

        Raises:
            InputError: an argument that cannot be used, by name.
            TypeError: an unknown argument.
        """
        if on_event is None:
            return self.generate_batch([Request.of(arguments)])[0]
        if not callable(on_event):
            raise InputError(f"on_event is called with every event; got {type(on_event).__name__}")
        return self._watched(Request.of(arguments), on_event)

    def generate_batch(self, requests: Iterable[Request]) -> list[Output]:
        """Several requests in one batch; each answer is what it would be alone.

        Raises:
            InputError: something in `requests` is no `Request`, or cannot be used.
        """
        requests = list(requests)
        for request in requests:
            if not isinstance(request, Request):
                raise InputError(f"generate_batch takes a list of Request; got {type(request).__name__} in it")
        requests = [with_usual_best_of(request, self.bundle.best_of) for request in requests]
        states = self._answering(requests, [self._states(request) for request in requests])
        for _ in sample(self.engine, [state for group in states for state in group]):
            pass
        kept = [
            best_of(self.bundle, self.sequencer, group, request.num_drawn) if request.num_drawn > 1 else group
            for request, group in zip(requests, states, strict=True)
        ]
        return [
            Output(tuple(self._sample(request, state, self._answer(request, state)) for state in group))
            for request, group in zip(requests, kept, strict=True)
        ]

    def tokenize(self, request: Request) -> list[dict[str, Any]]:
        """Of each input its `modality`, `grid`, `codes` and, in the model's vocabulary, `ids`; JSON-able.

        Raises:
            InputError: the model has no tokenizer for an input.
        """
        rows = []
        for segment in request.inputs:
            if segment.modality not in self.bundle.tokenizers:
                raise InputError(f"this model has no {segment.modality} tokenizer")
            codes = self.bundle.tokenizers[segment.modality].encode(segment.content)
            ids = self.sequencer.block_ids(codes).tolist()
            facts = {"modality": segment.modality, "grid": codes.grid_hw, "codes": codes.codes_KT.tolist()}
            rows.append({**facts, "ids": ids})
        return rows

    @_with_signature_of_request
    def stream(self, **arguments: Any) -> Iterator[Event | Finished]:
        """Generate, step by step: segments begun, text as it comes, rows of pictures, sound in chunks, segments whole.

        The last event is `Finished` with the same output that `generate` gives with `best_of=1`, sounds up to rounding
        (1e-6): they are their chunks, joined. Closing the iterator stops the work and frees what it holds.

        Raises:
            InputError: (at once, not with the first event) an argument that cannot be used, by name.
            TypeError: an unknown argument.
        """
        return self.stream_request(Request.of(arguments))

    def stream_request(self, request: Request) -> Iterator[Event | Finished]:
        """`stream` of a request that is there already."""
        return self._streamed(request, self._states_to_watch(request))

    def _streamed(self, request: Request, states: list[SampleState]) -> Iterator[Event | Finished]:
        (states,) = self._answering([request], [states])
        yield from self._events(request, states, self._trackers(request, states))

    def _states_to_watch(self, request: Request) -> list[SampleState]:
        if request.num_drawn > 1:
            raise InputError("best_of chooses among whole answers: it cannot be streamed or watched by on_event")
        return self._states(request)

    def _trackers(self, request: Request, states: list[SampleState]) -> list[Tracker]:
        return [
            Tracker(
                index,
                state.walk,
                self.sequencer,
                self.bundle.tokenizers,
                functools.partial(self._decoded, request, state),
                state.edit,
            )
            for index, state in enumerate(states)
        ]

    def _events(
        self, request: Request, states: list[SampleState], trackers: list[Tracker]
    ) -> Iterator[Event | Finished]:
        for pairs in sample(self.engine, states):
            for index, id in pairs:
                yield from trackers[index].push(id)
        yield Finished(self._output(request, states, trackers))

    def _watched(self, request: Request, on_event: Callable[[Event | Finished], Any]) -> Output:
        (states,) = self._answering([request], [self._states_to_watch(request)])
        trackers = self._trackers(request, states)
        for event in self._events(request, states, trackers):
            if on_event(event) is False or isinstance(event, Finished):
                break
        return self._output(request, states, trackers)

    def _output(self, request: Request, states: list[SampleState], trackers: list[Tracker]) -> Output:
        pairs = zip(states, trackers, strict=True)
        return Output(tuple(self._sample(request, state, tracker.so_far) for state, tracker in pairs))

    @property
    def _starter(self) -> Starter:
        return Starter(self.bundle, self.sequencer, self.grammar, self.engine.max_positions)

    def _states(self, request: Request) -> list[SampleState]:
        self._drawer(request).check()
        if request.num_drawn > 1:
            check_ranked(request)
        return self._starter.states(request)

    def _answering(self, requests: Sequence[Request], states: list[list[SampleState]]) -> list[list[SampleState]]:
        """The states of the answers, where texts are answered by themselves after these are written, in one batch."""
        texts = [group for request, group in zip(requests, states, strict=True) if self._starter.answers_text(request)]
        for _ in sample(self.engine, [state for group in texts for state in group]):
            pass
        return [self._starter.answering(request, group) for request, group in zip(requests, states, strict=True)]

    def _drawer(self, request: Request) -> Drawer:
        return Drawer(self.bundle, request.decoder, request.num_inference_steps)

    def _answer(self, request: Request, state: SampleState) -> tuple[Segment, ...]:
        """Everything a sample holds, decoded."""
        control = self.bundle.vocabulary.control
        parsed = self.sequencer.parse(np.array([control("target"), *state.ids]))
        assert parsed.complete, f"the grammar let through what parse refuses: {parsed.problem}"
        return self._decoded(request, state, parsed.document).segments

    def _decoded(self, request: Request, state: SampleState, document: Document, place: int = 0) -> Document:
        """Codes of a sample's answer, or of a part of it behind so many pictures, as media."""
        drawer, edit = self._drawer(request), state.edit
        if edit is not None:
            finished: Document = edit.finished(
                drawer.decode(edit.whole(document), vokens=(), noise_seed=state.noise_seed)
            )
            return finished
        return drawer.decode(document, vokens=state.vokens[place:], noise_seed=state.noise_seed, place=place)

    def _sample(self, request: Request, state: SampleState, segments: tuple[Segment, ...]) -> Sample:
        num_via, ids, is_cut = state.walk.plan.num_via, tuple(state.ids), state.walk.is_cut
        if (earlier := state.earlier) is not None:
            text = self._answer(request, earlier)
            num_via, segments, ids = len(text), (*text, *segments), (*earlier.ids, *ids)
            is_cut = is_cut or earlier.walk.is_cut
        provenance = {
            "anygen": __version__,
            "torch": str(torch.__version__),
            "bundle": self.bundle.provenance.get("name", self.bundle.folder.name),
            "vocabulary": self.bundle.vocabulary.fingerprint,
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

    def decode(self, codes: Codes) -> Any:
        """Codes of any modality to media."""
        return self.bundle.tokenizers[codes.modality].decode(codes)


@functools.lru_cache(maxsize=1)
def default_model() -> AnyGen:
    """The embedded model, opened once."""
    return AnyGen.from_pretrained()


def generate(**arguments: Any) -> Output:
    """`AnyGen.generate` on the embedded model."""
    return default_model().generate(**arguments)
