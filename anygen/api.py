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
from typing import Any, TypeVar

import torch

from anygen.bundle import Bundle, load_bundle
from anygen.chains import Chain, chains_of
from anygen.errors import InputError
from anygen.finishing import Finisher
from anygen.grammar import Grammar
from anygen.ranking import best_of, check_ranked, with_usual_best_of
from anygen.request import Request
from anygen.results import Event, Finished, Output
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


@dataclasses.dataclass(frozen=True)
class _Watched:
    """An answer whose ids are told as they come."""

    request: Request
    state: SampleState
    tracker: Tracker


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
        request = Request.of(arguments)
        watched: list[_Watched] = []
        request, chains, states = self._begun(request)
        for event in self._streamed(request, chains, states, watched):
            wants_more = on_event(event)
            if isinstance(event, Finished):
                return event.output
            if wants_more is False:
                break
        return self._so_far(chains, watched)

    def generate_batch(self, requests: Iterable[Request]) -> list[Output]:
        """Several requests in one batch; each answer is what it would be alone.

        Raises:
            InputError: something in `requests` is no `Request`, or cannot be used.
        """
        requests = list(requests)
        for request in requests:
            if not isinstance(request, Request):
                raise InputError(f"generate_batch takes a list of Request; got {type(request).__name__} in it")
        chains = [self._chains(request) for request in requests]
        outputs = iter(self._generated([r for r, group in zip(requests, chains, strict=True) if not group]))
        while going := [chain for group in chains for chain in group if not chain.is_done]:
            self._advance(going)
        return [Output(tuple(chain.whole() for chain in group)) if group else next(outputs) for group in chains]

    def _generated(self, requests: Sequence[Request]) -> list[Output]:
        requests = [with_usual_best_of(request, self.bundle) for request in requests]
        states = self._answering(requests, [self._states(request) for request in requests])
        for _ in sample(self.engine, [state for group in states for state in group]):
            pass
        kept = [
            best_of(self.bundle, self.sequencer, request, group) if request.num_drawn > 1 else group
            for request, group in zip(requests, states, strict=True)
        ]
        return [
            Output(tuple(self._finisher.sample(request, state) for state in group))
            for request, group in zip(requests, kept, strict=True)
        ]

    def _chains(self, request: Request) -> list[Chain]:
        chains = chains_of(request, self.bundle.via, self.bundle.best_of)
        if chains and request.num_drawn > 1:
            check_ranked(request)
        if chains:
            self._finisher.drawer(request).check()
            self._starter.check(request)
        return chains

    def _advance(self, chains: Sequence[Chain]) -> None:
        """Make the next call of each."""
        for chain, output in zip(chains, self._generated([chain.call() for chain in chains]), strict=True):
            chain.take(output.samples[0])

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
        return self._streamed(*self._begun(request), [])

    def _begun(self, request: Request) -> tuple[Request, list[Chain], list[SampleState]]:
        """A request that will be watched, with its chains, or else its states: what is wrong with it is told now."""
        if request.num_drawn > 1:
            raise InputError("best_of chooses among whole answers: it cannot be streamed or watched by on_event")
        if self.bundle.best_of:
            request = request.with_best_of(1)
        chains = self._chains(request)
        return request, chains, self._states(chains[0].call() if chains else request)

    def _streamed(
        self, request: Request, chains: list[Chain], states: list[SampleState], watched: list[_Watched]
    ) -> Iterator[Event | Finished]:
        """What happens; `watched` holds what is being drawn whenever an event comes."""
        if not chains:
            watched[:] = self._watched([request], [states])
            yield from self._events(watched)
        while chains and not chains[0].is_done:
            if not chains[0].is_answering:
                self._advance(chains)
                continue
            calls = [chain.call() for chain in chains]
            watched[:] = self._watched(calls, [self._states(call) for call in calls])
            yield from self._events(watched)
            self._so_far(chains, watched)
            watched.clear()
        yield Finished(self._so_far(chains, watched))

    def _watched(self, requests: Sequence[Request], states: list[list[SampleState]]) -> list[_Watched]:
        groups = self._answering(requests, states)
        pairs = [(request, state) for request, group in zip(requests, groups, strict=True) for state in group]
        return [
            _Watched(
                request,
                state,
                Tracker(
                    index,
                    state.walk,
                    self.sequencer,
                    self.bundle.tokenizers,
                    functools.partial(self._finisher.decoded, request, state),
                    state.edit,
                ),
            )
            for index, (request, state) in enumerate(pairs)
        ]

    def _events(self, watched: list[_Watched]) -> Iterator[Event]:
        for pairs in sample(self.engine, [each.state for each in watched]):
            for index, id in pairs:
                yield from watched[index].tracker.push(id)

    def _so_far(self, chains: list[Chain], watched: list[_Watched]) -> Output:
        samples = [self._finisher.sample(each.request, each.state, each.tracker.so_far) for each in watched]
        if not chains:
            return Output(tuple(samples))
        for chain, drawn in zip(chains, samples, strict=True) if samples else ():
            chain.take(drawn)
        return Output(tuple(chain.whole() for chain in chains))

    @property
    def _finisher(self) -> Finisher:
        return Finisher(self.bundle, self.sequencer)

    @property
    def _starter(self) -> Starter:
        return Starter(self.bundle, self.sequencer, self.grammar, self.engine.max_positions)

    def _states(self, request: Request) -> list[SampleState]:
        self._finisher.drawer(request).check()
        if request.num_drawn > 1:
            check_ranked(request)
        return self._starter.states(request)

    def _answering(self, requests: Sequence[Request], states: list[list[SampleState]]) -> list[list[SampleState]]:
        """The states of the answers, where texts are answered by themselves after these are written, in one batch."""
        texts = [group for request, group in zip(requests, states, strict=True) if self._starter.answers_text(request)]
        for _ in sample(self.engine, [state for group in texts for state in group]):
            pass
        return [self._starter.answering(request, group) for request, group in zip(requests, states, strict=True)]

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
