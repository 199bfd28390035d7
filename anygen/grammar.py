"""The grammar of answers: which ids may follow, so that every sample decodes, even from an untrained model.

A `Walk` follows one sample from its `<target>` to `<eos>`. What it allows is always a few contiguous ranges of ids,
so a sampler multiplies by those rows of the output matrix only. It counts the budget: a block is opened only where it
can be closed, and the blocks still asked for can follow.
"""

from __future__ import annotations

from itertools import takewhile

from anygen.errors import InputError
from anygen.plan import Block as Block
from anygen.plan import Plan as Plan
from anygen.sequence import BlockName, Sequencer
from anygen.vocabulary import NUM_NUMBERS, Range
from tokenizers_mm.codes import Modality

Ranges = tuple[tuple[int, int], ...]
"""Allowed ids as [start, stop) pairs, ascending."""


_TEXT_BUDGET = 256
_FREE_BUDGET = 1024


class Grammar:
    """Starts walks for one vocabulary and layout."""

    def __init__(self, sequencer: Sequencer) -> None:
        self.sequencer = sequencer
        self.vocabulary = sequencer.vocabulary
        self.layout = sequencer.layout
        self.text_ids = self.vocabulary.text_ids  # what no text encodes to is not sampled

    def num_body(self, block: Block) -> int:
        """Fewest ids between begin and end: shape numbers and codes."""
        if block.modality == "text":
            return 1
        shape = block.shape or {"image": (1, 1), "audio": (0, 1), "region": (2,), "voken": ()}[block.name]
        return self._num_body_of(block.name, shape)

    def native_num_body(self, block: Block) -> int:
        """Ids between begin and end at the native shape, which is kept free for this block where the budget allows."""
        if block.shape is None and block.name == "image":
            return self._num_body_of("image", self.layout.native_grid_hw)
        if block.shape is None and block.modality == "audio":
            return self._num_body_of("audio", divmod(self.layout.native_frames, NUM_NUMBERS))
        if block.shape is None and block.modality == "region":
            return self._num_body_of("region", (4,))
        return self.num_body(block)

    def _num_body_of(self, modality: BlockName, shape: tuple[int, ...]) -> int:
        return len(shape) + len(self.sequencer.body_ranges(modality, shape))

    def body_of(self, block: Block, shape: tuple[int, ...]) -> list[Range]:
        """The range that each id between shape and end lies in: of one id where it is known."""
        ranges = self.sequencer.body_ranges(block.name, shape)
        if block.known is None:
            return ranges
        return [r if id < 0 else Range(r.name, id, 1) for r, id in zip(ranges, block.known, strict=True)]

    def smallest_budget(self, plan: Plan) -> int:
        """Fewest new ids of an answer with which the plan can be carried out, `<eos>` included."""
        costs = [self.num_body(block) + 2 for block in plan.blocks[plan.num_via :]]
        return (min(costs) if plan.free else sum(costs)) + 1

    def usual_budget(self, plan: Plan) -> int:
        """New ids for an answer of any usual length: texts of 256 pieces, the longest sound, pictures as they are."""
        if plan.free:
            return _FREE_BUDGET
        costs = {"text": _TEXT_BUDGET, "audio": self.layout.max_frames * self.sequencer.orders["audio"].num_kept + 4}
        return 1 + sum(
            costs[b.modality] if b.modality in costs and b.shape is None else self.native_num_body(b) + 2
            for b in plan.blocks[plan.num_via :]
        )

    def start(self, plan: Plan, budget: int) -> Walk:
        """A walk whose answer ends within `budget` ids; what is written before it has its own.

        Raises:
            InputError: an empty plan, a modality that the vocabulary lacks, a shape out of bounds, or too small a
            budget.
        """
        self.check(plan)
        if budget < self.smallest_budget(plan):
            names = ", ".join(block.modality for block in plan.blocks[plan.num_via :])
            raise InputError(
                f"max_new_tokens={budget} is too small for output {names}: "
                f"it takes at least {self.smallest_budget(plan)}"
            )
        return Walk(self, plan, budget)

    def check(self, plan: Plan) -> None:
        """Raises InputError for an empty plan, a modality that the vocabulary lacks, or a shape out of bounds."""
        if not plan.blocks:
            raise InputError("ask for at least one output")
        for block in plan.blocks:
            self._check(block)

    def _check(self, block: Block) -> None:
        if block.modality not in self.vocabulary.modalities:
            raise InputError(
                f"this model has no {block.modality!r} output; it has {', '.join(self.vocabulary.modalities)}"
            )
        if block.as_vokens and not any(r.name == "voken" for r in self.vocabulary.ranges):
            raise InputError("this model has no vokens: its pictures are drawn from codes")
        if block.shape is None:
            return
        good = {
            "voken": False,
            "text": block.shape == (),
            "image": len(block.shape) == 2 and all(1 <= n <= self.layout.max_side for n in block.shape),
            "audio": len(block.shape) == 2
            and all(0 <= n < NUM_NUMBERS for n in block.shape)
            and 1 <= block.shape[0] * NUM_NUMBERS + block.shape[1] <= self.layout.max_frames,
            "region": block.shape in ((2,), (4,)),
        }[block.name]
        if not good:
            bounds = f"at most {self.layout.max_side} patches a side, {self.layout.max_frames} frames of sound"
            raise InputError(
                f"this model cannot give {block.modality} output of shape {block.shape}; it gives {bounds}"
            )


class Walk:
    """One sample on its way through the grammar.

    `allowed` says which ids may come next; `push` takes the chosen one; `done` is True after `<eos>`. `is_cut` turns
    True where the budget ended a text or the answer, or left a picture or sound less than its native shape.
    """

    def __init__(self, grammar: Grammar, plan: Plan, budget: int) -> None:
        self._grammar = grammar
        self.plan = plan
        self._answer_budget, self.budget = budget, budget + plan.ids_apart
        self._left = self.budget
        self._next_block = 0
        self._block: Block | None = None
        self._shape: list[int] = []
        self._body: list[Range] = []
        self._num_written = 0
        natives = [grammar.native_num_body(block) + 2 for block in plan.blocks]
        # Later blocks keep room for their native shape where the budget has it, else for their smallest one.
        fits = sum(natives[plan.num_via :]) + 1 <= budget
        self._costs = natives if fits else [grammar.num_body(b) + 2 for b in plan.blocks]
        self.num_blocks, self.done = 0, False
        self.is_cut = False
        self.allowed: Ranges = self._between_blocks()

    @property
    def num_written(self) -> int:
        """Codes written of the open block."""
        return self._num_written

    @property
    def num_codes(self) -> int:
        """Codes that the open block will have, once its shape is known; 0 for text."""
        return len(self._body)

    @property
    def modality(self) -> Modality | None:
        """The block that is open, or None between blocks."""
        return self._block.modality if self._block else None

    @property
    def row(self) -> int:
        """How many codes a row of the open picture has; 1 in any other block."""
        is_picture = self.modality == "image" and len(self._shape) == 2
        return len(self._body) // self._shape[0] if is_picture else 1

    def ahead(self, count: int) -> list[Ranges]:
        """What each of the next ids may be, `count` at most, as far as the open block says; at least `allowed`."""
        codes = self._body[self._num_written :] if self._block else []
        return [*(((r.start, r.stop),) for r in codes), _only(self._end_id())][:count] if codes else [self.allowed]

    @property
    def forced(self) -> tuple[int, ...]:
        """Vokens or known codes that come next in an open block: they are not chosen, and are read in one pass."""
        if self._block is None or not (self._block.as_vokens or self._block.known):
            return ()
        return tuple(r.start for r in takewhile(lambda r: r.size == 1, self._body[self._num_written :]))

    @property
    def writes_vokens(self) -> bool:
        """True inside a voken block."""
        return self._block is not None and self._block.as_vokens

    def again(self) -> Walk:
        """A new walk from the start, of the same plan and budget."""
        return Walk(self._grammar, self.plan, self._answer_budget)

    def push(self, id: int) -> None:
        """Take the next id; it must be allowed."""
        assert any(start <= id < stop for start, stop in self.allowed), f"id {id} is not in {self.allowed}"
        self._left -= 1
        if self._block is None:
            self.allowed = self._open(id)
        elif len(self._shape) < self._grammar.sequencer.num_shape_numbers(self._block.name):
            self._shape.append(id - self._grammar.vocabulary.numbers.start)
            self.allowed = self._inside()
        else:
            self._num_written += 1
            self.allowed = self._close() if id == self._end_id() else self._inside()

    # -- between blocks

    def _between_blocks(self) -> Ranges:
        vocabulary = self._grammar.vocabulary
        if self.plan.free:
            ids = [
                vocabulary.control(block.name)
                for block in self.plan.blocks
                if self._grammar.num_body(block) + 2 <= self._left - 1
            ]
            if self.num_blocks:
                self.is_cut |= not ids
                ids.append(vocabulary.control("eos"))
            return tuple((id, id + 1) for id in sorted(set(ids)))
        if self._next_block == len(self.plan.blocks):
            return _only(vocabulary.control("eos"))
        return _only(vocabulary.control(self.plan.blocks[self._next_block].name))

    def _open(self, id: int) -> Ranges:
        vocabulary = self._grammar.vocabulary
        if id == vocabulary.control("eos"):
            self.done = True
            return ()
        if self.plan.free:
            self._block = next(b for b in self.plan.blocks if vocabulary.control(b.name) == id)
        else:
            self._block = self.plan.blocks[self._next_block]
            self._next_block += 1
        self._shape, self._body, self._num_written = [], [], 0
        if self._block.shape is None:
            self.is_cut |= self._room() <= self._grammar.native_num_body(self._block)
        return self._inside()

    def _close(self) -> Ranges:
        if self._block and self._block.ids_apart:  # what it left of its own is not for the answer
            self._left = self._answer_budget
        self._block = None
        self.num_blocks += 1
        return self._between_blocks()

    # -- inside a block

    def _room(self) -> int:
        """Ids that the open block may still take, its end token included."""
        if self._block and self._block.ids_apart:
            return self._block.ids_apart - 1 - self._num_written
        reserved = 0 if self.plan.free else sum(self._costs[self._next_block :])
        return self._left - reserved - 1

    def _end_id(self) -> int:
        assert self._block is not None
        return self._grammar.vocabulary.control("/" + self._block.name)

    def _inside(self) -> Ranges:
        assert self._block is not None
        modality = self._block.name
        if modality == "text":
            if self._room() <= 1:
                self.is_cut = True
                return _only(self._end_id())
            end = ((self._end_id(), self._end_id() + 1),) if self._num_written else ()
            return (*self._grammar.text_ids, *end)
        if len(self._shape) < self._grammar.sequencer.num_shape_numbers(modality):
            zero = self._grammar.vocabulary.numbers.start
            return tuple((zero + low, zero + high + 1) for low, high in self._shape_bounds())
        if not self._num_written:
            self._body = self._grammar.body_of(self._block, tuple(self._shape))
        if self._num_written < len(self._body):
            r = self._body[self._num_written]
            return ((r.start, r.stop),)
        return _only(self._end_id())

    def _shape_bounds(self) -> tuple[tuple[int, int], ...]:
        """[smallest, largest] numbers that may come next in the shape."""
        assert self._block is not None
        layout, index = self._grammar.layout, len(self._shape)
        if self._block.shape is not None:
            return ((self._block.shape[index],) * 2,)
        numbers_left = self._grammar.sequencer.num_shape_numbers(self._block.modality) - index
        room = self._room() - 1 - numbers_left  # for codes
        if self._block.modality == "region":
            return ((2, 2), (4, 4)) if room >= 4 else ((2, 2),)
        patches = room // self._grammar.sequencer.orders[self._block.modality].num_kept
        if self._block.modality == "image":
            other = self._shape[0] if index else 1
            return ((1, min(layout.max_side, patches // other)),)
        frames = min(layout.max_frames, patches)
        if index == 0:
            return ((0, frames // NUM_NUMBERS),)
        high = self._shape[0]
        return ((0 if high else 1, min(NUM_NUMBERS - 1, frames - high * NUM_NUMBERS)),)


def _only(id: int) -> Ranges:
    return ((id, id + 1),)
