"""`AnyGen`: media in, media out.

model = AnyGen.from_pretrained()
model.generate(text="a red apple", output="image").images[0].save("apple.png")
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from anygen._version import __version__
from anygen.bundle import Bundle, load_bundle
from anygen.documents import Segment
from anygen.drawing import DEFAULT_STEPS, Drawer, noise_seed
from anygen.errors import InputError
from anygen.grammar import Grammar, Plan
from anygen.request import Request
from anygen.results import (
    Event,
    Finished,
    Output,
    Sample,
    SegmentFinished,
    SegmentProgress,
    SegmentStarted,
    TextDelta,
)
from anygen.sampling.engine import Engine
from anygen.sampling.sampler import SampleState, sample
from anygen.sequence import Sequencer
from tokenizers_mm.codes import Codes

_TEXT_BUDGET = 256
_FREE_BUDGET = 1024
_WINDOW = 1
Method = TypeVar("Method", bound=Callable[..., Any])


def _with_signature_of_request(method: Method) -> Method:
    """Show the fields of `Request` as the keyword arguments that they are, in help() and completion."""
    own = inspect.signature(method)
    fields = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
        for f in dataclasses.fields(Request)
    ]
    method.__signature__ = own.replace(parameters=[own.parameters["self"], *fields])  # type: ignore[attr-defined]
    return method


class AnyGen:
    """A model with its tokenizers, ready to generate."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.sequencer = Sequencer(bundle.vocabulary, bundle.layout)
        self.grammar = Grammar(self.sequencer)
        self.engine = Engine(bundle.model)

    @classmethod
    def from_pretrained(cls, folder: str | Path | None = None, *, device: str = "auto") -> AnyGen:
        """Open a bundle; None opens the one that comes with the package.

        Raises:
            InputError: no such folder.
            CheckpointError: not a bundle, or a damaged one.
        """
        return cls(load_bundle(folder, device=device))

    @_with_signature_of_request
    def generate(self, **arguments: Any) -> Output:
        """Generate; see `anygen.request.Request` for the arguments.

        >>> model = AnyGen.from_pretrained()
        >>> model.generate(text="a red apple", output="image").image.size
        (64, 64)

        Raises:
            InputError: an argument that cannot be used, by name.
            TypeError: an unknown argument.
        """
        return self.generate_batch([Request.of(arguments)])[0]

    def generate_batch(self, requests: Iterable[Request]) -> list[Output]:
        """Several requests in one batch; each answer is what it would be alone.

        Raises:
            InputError: something in `requests` is no `Request`, or cannot be used.
        """
        requests = list(requests)
        for request in requests:
            if not isinstance(request, Request):
                raise InputError(f"generate_batch takes a list of Request; got {type(request).__name__} in it")
        states = [self._states(request) for request in requests]
        for _ in sample(self.engine, [state for group in states for state in group]):
            pass
        return [
            Output(tuple(self._sample(request, state) for state in group))
            for request, group in zip(requests, states, strict=True)
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
        """Generate, step by step: segments begun, text as it comes, progress of pictures and sounds, segments whole.

        The last event is `Finished` with the same output that `generate` gives. Closing the iterator stops the work.
        """
        request = Request.of(arguments)
        states = self._states(request)
        trackers = [_Tracker(self, index, self._drawer(request)) for index in range(len(states))]
        for pairs in sample(self.engine, states):
            for index, id in pairs:
                yield from trackers[index].push(id, states[index])
        yield Finished(Output(tuple(self._sample(request, state) for state in states)))

    def _states(self, request: Request) -> list[SampleState]:
        self._drawer(request).check()
        tokenizers, layout = self.bundle.tokenizers, self.bundle.layout
        for segment in request.inputs:
            if segment.modality not in tokenizers:
                raise InputError(
                    f"this model takes no {segment.modality} input; it takes {', '.join(sorted(tokenizers))}"
                )
        document = request.document().encode(tokenizers)
        plan = request.plan(
            layout,
            self.bundle.vocabulary.modalities,
            patch_px=tokenizers["image"].config.patch_px if "image" in tokenizers else 1,  # type: ignore[attr-defined]
            frame_rate_hz=(tokenizers["audio"].rate_hz if "audio" in tokenizers else None) or 1.0,
        )
        prompt = self.sequencer.prompt(document)
        dropped = self.sequencer.prompt(document, drop_inputs=True) if document.segments else None
        self.grammar.check(plan)
        room, needed = self.engine.max_positions - len(prompt), self.grammar.smallest_budget(plan)
        if room < needed:
            raise InputError(
                f"the input takes {len(prompt)} of this model's {self.engine.max_positions} positions and the answer "
                f"at least {needed}: shorten the input, or ask for less"
            )
        budget = request.max_new_tokens or min(self._default_budget(plan), room)
        options, window = request.options(self.bundle.defaults), request.speculative_window or _WINDOW
        return [
            SampleState(
                prompt,
                dropped,
                self.grammar.start(plan, budget),
                options,
                generator,
                seed=seed,
                window=window,
                noise_seed=noise_seed(generator, seed, place),
            )
            for place, (generator, seed) in enumerate(request.generators())
        ]

    def _drawer(self, request: Request) -> Drawer:
        return Drawer(self.bundle, request.decoder, request.num_inference_steps or DEFAULT_STEPS)

    def _default_budget(self, plan: Plan) -> int:
        if plan.free:
            return _FREE_BUDGET
        costs = {
            "text": _TEXT_BUDGET,
            "audio": self.bundle.layout.max_frames * self.sequencer.orders["audio"].num_kept + 4,
        }
        return 1 + sum(
            costs[b.modality] if b.modality in costs and b.shape is None else self.grammar.native_num_body(b) + 2
            for b in plan.blocks
        )

    def _sample(self, request: Request, state: SampleState) -> Sample:
        control = self.bundle.vocabulary.control
        parsed = self.sequencer.parse(np.array([control("target"), *state.ids]))
        assert parsed.complete, f"the grammar let through what parse refuses: {parsed.problem}"
        provenance = {
            "anygen": __version__,
            "torch": str(torch.__version__),
            "bundle": self.bundle.provenance.get("name", self.bundle.folder.name),
            "vocabulary": self.bundle.vocabulary.fingerprint,
            "request": request.describe(),
        }
        drawn = self._drawer(request).decode(parsed.document, vokens=state.vokens, noise_seed=state.noise_seed)
        return Sample(
            drawn.segments,
            state.seed,
            "length" if state.walk.is_cut else "eos",
            tuple(state.ids),
            provenance,
        )

    def decode(self, codes: Codes) -> Any:
        """Codes of any modality to media."""
        return self.bundle.tokenizers[codes.modality].decode(codes)


class _Tracker:
    """Turns the ids of one sample into events."""

    def __init__(self, model: AnyGen, index: int, drawer: Drawer) -> None:
        self._model, self._index, self._drawer = model, index, drawer
        self._num_pictures = 0
        self._start: int | None = None
        self._text = ""

    def push(self, id: int, state: SampleState) -> Iterator[Event]:
        walk = state.walk
        if self._start is None:
            if walk.modality is not None:
                self._start, self._text = len(state.ids) - 1, ""
                yield SegmentStarted(self._index, walk.modality)
        elif walk.modality is None:
            block = state.ids[self._start :]
            self._start = None
            segment = self._finished(block, state)
            self._num_pictures += segment.modality == "image"
            if segment.modality == "text" and len(str(segment.content)) > len(self._text):
                yield TextDelta(self._index, str(segment.content)[len(self._text) :])
            yield SegmentFinished(self._index, segment)
        elif walk.modality == "text":
            yield from self._text_delta(state.ids[self._start + 1 :])
        elif walk.num_written:
            yield SegmentProgress(self._index, walk.num_written, walk.num_codes)

    def _text_delta(self, ids: list[int]) -> Iterator[Event]:
        text = self._model.decode(Codes(np.array([ids]), "text")).rstrip("\ufffd")  # half a character is held back
        if len(text) > len(self._text):
            yield TextDelta(self._index, text[len(self._text) :])
            self._text = text

    def _finished(self, block: list[int], state: SampleState) -> Segment:
        vocabulary = self._model.bundle.vocabulary
        parsed = self._model.sequencer.parse(
            np.array([vocabulary.control("target"), *block, vocabulary.control("eos")])
        )
        place = self._num_pictures
        vokens = state.vokens[place:]  # where there are any, every picture of the answer is written so
        return self._drawer.decode(parsed.document, vokens=vokens, noise_seed=state.noise_seed, place=place).segments[0]


@functools.lru_cache(maxsize=1)
def default_model() -> AnyGen:
    """The embedded model, opened once."""
    return AnyGen.from_pretrained()


def generate(**arguments: Any) -> Output:
    """`AnyGen.generate` on the embedded model."""
    return default_model().generate(**arguments)
