"""From a request to samples that can be drawn: what they read, what they are to write, and with which options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from anygen.bundle import Bundle
from anygen.documents import Document, Segment, default_task
from anygen.drawing import noise_seed
from anygen.editing import edit_of, infills
from anygen.errors import InputError
from anygen.grammar import Grammar
from anygen.plan import Block, Plan, Way
from anygen.planning import check_way, ids_of_via, plan_of, way_of
from anygen.ranking import options_of
from anygen.request import Request
from anygen.sampling.sampler import SampleState
from anygen.sequence import Sequencer
from tokenizers_mm.codes import Modality


class Starter:
    """Begins samples on one model."""

    def __init__(self, bundle: Bundle, sequencer: Sequencer, grammar: Grammar, max_positions: int) -> None:
        self._bundle, self._sequencer, self._grammar = bundle, sequencer, grammar
        self._max_positions = max_positions

    def answers_text(self, request: Request) -> bool:
        """True where a text is written first, and the answer reads that text alone."""
        return self._way(request) == "text_only"

    def check(self, request: Request) -> None:
        """Tell at once what is wrong with a request whose outputs are drawn one after another.

        Raises:
            InputError: the model has no such input or output, or not in this size.
        """
        self._check_inputs(request)
        for block in self._plan(request, None, self._max_positions).blocks:
            plan = Plan((block,))
            self._grammar.start(plan, self._budget(plan, 0, request.max_new_tokens))

    def _check_inputs(self, request: Request) -> None:
        tokenizers = self._bundle.tokenizers
        for segment in request.inputs:
            if segment.modality not in tokenizers:
                raise InputError(
                    f"this model takes no {segment.modality} input; it takes {', '.join(sorted(tokenizers))}"
                )

    def states(self, request: Request) -> list[SampleState]:
        """A state for each answer to draw; by way of a text alone, of each such text: see `answering`.

        Raises:
            InputError: the model cannot take this input, or not give this output.
        """
        self._check_inputs(request)
        tokenizers = self._bundle.tokenizers
        edit, way = edit_of(request, self._bundle), self._way(request)
        via: Modality | None = "text" if way else None
        if edit is not None:
            document = edit.document(
                self._bundle.vocabulary, request.task or ("infill" if infills(self._bundle) else None)
            )
        else:
            document = request.document(via)
        if way == "text_only":  # a task of the caller's is that of the answer
            document = replace(document, task=default_task(request.kinds, "text"))
        document = document.encode(tokenizers)
        prompt = self._sequencer.prompt(document)
        room = self._max_positions - len(prompt)
        wanted = request.max_new_tokens
        if way == "text_only":
            answer = self._plan(request, None, self._max_positions)
            self._grammar.start(answer, self._budget(answer, 0, wanted))  # what never fits is told now
            plan, wanted = Plan((Block("text"),)), ids_of_via(room) + 1  # and its end
        else:
            plan = self._plan(request, via, room) if edit is None else Plan((edit.block(self._sequencer),))
        budget = self._budget(plan, len(prompt), wanted)
        dropped = self._sequencer.prompt(document, drop_inputs=True) if document.segments else None
        options = options_of(request, self._bundle)
        return [
            SampleState(
                prompt,
                dropped,
                self._grammar.start(plan, budget),
                options,
                generator,
                seed=seed,
                window=request.speculative_window,
                edit=edit,
                noise_seed=noise_seed(generator, seed, place),
            )
            for place, (generator, seed) in enumerate(request.generators())
        ]

    def answering(self, request: Request, states: Sequence[SampleState]) -> list[SampleState]:
        """The states of the answers: the same, or, where each was to write a text, one that reads that text alone."""
        return [self._answering(request, state) for state in states] if self.answers_text(request) else list(states)

    def _answering(self, request: Request, earlier: SampleState) -> SampleState:
        written = self._sequencer.parse(np.concatenate([earlier.prompt, earlier.ids])).document.segments[-1]
        text = self._bundle.tokenizers["text"].decode(written.content)  # type: ignore[arg-type]
        task = request.own_task or default_task(("text",), request.outputs[0])  # type: ignore[arg-type]
        document = Document((Segment("text", text),), task).encode(self._bundle.tokenizers)
        prompt = self._sequencer.prompt(document)
        room = self._max_positions - len(prompt)
        plan = self._plan(request, None, room)
        generator, seed = earlier.generator, earlier.seed
        if seed is not None:  # as if the text had been given, with this seed
            generator = torch.Generator().manual_seed(seed)
        return SampleState(
            prompt,
            self._sequencer.prompt(document, drop_inputs=True),
            self._grammar.start(plan, min(room, self._budget(plan, len(prompt), request.max_new_tokens))),
            earlier.options,
            generator,
            seed=seed,
            window=earlier.window,
            noise_seed=earlier.noise_seed,
            earlier=earlier,
        )

    def _budget(self, plan: Plan, num_read: int, wanted: int | None) -> int:
        """How many ids an answer may take behind so many that are read; as many as are wanted, where they are."""
        self._grammar.check(plan)
        room = self._max_positions - num_read
        needed = self._grammar.smallest_budget(plan) + plan.ids_apart
        if room < needed:
            raise InputError(
                f"the input takes {num_read} of this model's {self._max_positions} positions and the answer "
                f"at least {needed}: shorten the input, or ask for less"
            )
        return wanted or min(self._grammar.usual_budget(plan), room - plan.ids_apart)

    def _way(self, request: Request) -> Way | None:
        way = way_of(request, self._bundle.via)
        check_way(way, request)
        return way if way in ("text", "text_only") else None  # the others are chains of calls: `anygen.chains`

    def _plan(self, request: Request, via: Modality | None, room: int) -> Plan:
        tokenizers = self._bundle.tokenizers
        return plan_of(
            request,
            self._bundle.layout,
            self._bundle.vocabulary.modalities,
            patch_px=tokenizers["image"].config.patch_px if "image" in tokenizers else 1,  # type: ignore[attr-defined]
            frame_rate_hz=(tokenizers["audio"].rate_hz if "audio" in tokenizers else None) or 1.0,
            via=via,
            room=room,
        )
