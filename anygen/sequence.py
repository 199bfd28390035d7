"""Documents to ids (`build`) and back (`parse`): the only place that knows how a block is written.

    <bos> <task> block ... <target> block ... <eos>
    block = <text> piece ... </text>
          | <image> rows columns code ... </image>
          | <audio> length/256 length%256 code ... </audio>
          | <region> 2 or 4 bin ... </region>
          | <voken> voken_0 ... voken_N-1 </voken>      a picture that a decoder draws from hidden states

`<target>` and `<input>` mark where the role changes (a sequence opens in the input role). A dropped condition
(classifier-free guidance, arXiv 2207.12598) is one `<drop>` in place of all inputs before the first target. Where an
input has holes, `<hole>` stands in place of a code: what is known comes first, and the target is the block as a whole.

Dimension key: S ids of one sequence, K codebooks, T steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from anygen.documents import Document, Holed, Segment, Vokens
from anygen.errors import DataError
from anygen.layout import Layout
from anygen.vocabulary import NUM_NUMBERS, TASKS, Range, Vocabulary
from tokenizers_mm.codes import Codes, IntArray, Modality

BlockName = Literal["text", "image", "audio", "region", "voken"]


@dataclass(frozen=True, eq=False)
class Sequence:
    """Ids of one document, ready for packing."""

    ids_S: IntArray
    target_S: npt.NDArray[np.bool_]
    """True for ids that the model is to generate."""
    media_spans: tuple[tuple[int, int], ...]
    """[start, stop) of blocks that must never be split (all but text)."""
    read_S: IntArray | None = None
    """What a model in training reads in place of `ids_S`, where that differs (`anygen.data.code_noise`)."""

    def __len__(self) -> int:
        return len(self.ids_S)


@dataclass(frozen=True)
class Parsed:
    """What `parse` could read, and why it stopped where it did."""

    document: Document
    complete: bool
    """True where the ids were read to an `<eos>`."""
    problem: str | None = None


class Sequencer:
    """`build` and `parse` for one vocabulary and layout.

    >>> sequencer = Sequencer(Vocabulary.create(text=300, image=(1, 64)), Layout())
    >>> picture = Codes(np.array([[5, 6]]), "image", grid_hw=(1, 2))
    >>> document = Document((Segment("image", picture, target=True),), task="depict")
    >>> sequencer.build(document).ids_S.tolist()  # bos, depict, target, image, 1 row, 2 columns, codes, /image, eos
    [301, 316, 304, 308, 365, 366, 625, 626, 309, 302]
    >>> sequencer.parse(sequencer.build(document).ids_S).document == document
    True
    """

    def __init__(self, vocabulary: Vocabulary, layout: Layout) -> None:
        self.vocabulary = vocabulary
        self.layout = layout
        self.orders = layout.orders

    # -- shapes: the numbers between a begin token and the codes

    def shape_of(self, codes: Codes) -> tuple[int, ...]:
        """The numbers that announce a block: rows and columns, the two digits of a length, the count of coordinates."""
        shape: tuple[int, ...] = ()
        if codes.grid_hw is not None:
            shape = codes.grid_hw
        elif codes.modality == "audio":
            shape = divmod(codes.num_steps, NUM_NUMBERS)
        elif codes.modality == "region":
            shape = (codes.num_steps,)
        if any(number >= NUM_NUMBERS for number in shape):
            raise DataError(f"{codes.modality} block of {codes.num_steps} steps, shape {shape}: numbers end at 255")
        return shape

    def num_shape_numbers(self, modality: BlockName) -> int:
        """How many numbers announce a block of this modality."""
        return {"text": 0, "image": 2, "audio": 2, "region": 1, "voken": 0}[modality]

    def body_ranges(self, modality: BlockName, shape: tuple[int, ...]) -> list[Range]:
        """The range that each code of a block with this shape lies in, in order (text has no fixed length)."""
        if modality == "voken":
            return [Range("voken", int(id), 1) for id in self.vocabulary.vokens_N]
        if modality == "region":
            return [self.vocabulary.range("region")] * shape[0]
        num_frames = shape[0] * shape[1] if modality == "image" else shape[0] * NUM_NUMBERS + shape[1]
        books = [self.vocabulary.range(f"{modality}.{k}") for k in range(self.orders[modality].num_kept)]
        if len(books) == 1:
            return books * num_frames
        return [books[k] for k in self.orders[modality].codebook_S(num_frames)]

    # -- documents to ids

    def build(self, document: Document, *, drop_inputs: bool = False) -> Sequence:
        """A whole document, `<bos>` to `<eos>`.

        Args:
            document: segments of codes, at least one of them a target.
            drop_inputs: replace the inputs before the first target by `<drop>`.

        Raises:
            DataError: no target, an unknown task, or codes that this vocabulary has no ids for.
        """
        if not any(segment.target for segment in document.segments):
            raise DataError("a document to train on needs at least one target segment")
        writer = self._write(document, drop_inputs=drop_inputs)
        writer.add([self.vocabulary.control("eos")], target=True)
        return writer.finish()

    def prompt(self, document: Document, *, drop_inputs: bool = False) -> IntArray:
        """The ids that a sampler continues: the document, then the role set to target.

        Segments marked as target are what the answer already holds (they are continued, not repeated).
        """
        writer = self._write(document, drop_inputs=drop_inputs)
        if not writer.in_target:
            writer.switch(True)
        return writer.finish().ids_S

    def _write(self, document: Document, *, drop_inputs: bool) -> _Writer:
        if document.task is not None and document.task not in TASKS:
            raise DataError(f"unknown task {document.task!r}; expected one of {', '.join(TASKS)}")
        first_target = next((i for i, s in enumerate(document.segments) if s.target), len(document.segments))
        writer = _Writer(self)
        writer.add([self.vocabulary.control("bos")])
        if document.task is not None:
            writer.add([self.vocabulary.control(document.task)])
        if drop_inputs and first_target > 0:
            writer.add([self.vocabulary.control("drop")])
        for index, segment in enumerate(document.segments):
            if not (drop_inputs and index < first_target):
                writer.block(segment)
        return writer

    def block_ids(self, codes: Codes | Holed | Vokens) -> IntArray:
        """One block, begin token to end token."""
        if isinstance(codes, Vokens):
            control = self.vocabulary.control
            return np.concatenate([[control("voken")], self.vocabulary.vokens_N, [control("/voken")]])
        if isinstance(codes, Holed):
            ids_S = self.block_ids(codes.codes)
            known_S = self.orders[codes.codes.modality].apply(codes.known_KT * 1) > 0
            ids_S[-1 - len(known_S) : -1][~known_S] = self.vocabulary.control("hole")
            return ids_S
        modality = codes.modality
        if modality in ("text", "region"):
            body = self.vocabulary.to_ids(modality, codes.codes_KT[0])
        else:
            order = self.orders[modality]
            codes_S = order.apply(codes.codes_KT)
            body = np.empty_like(codes_S)
            book_S = order.codebook_S(codes.num_steps)
            for k in range(order.num_kept):
                body[book_S == k] = self.vocabulary.to_ids(f"{modality}.{k}", codes_S[book_S == k])
        head = [self.vocabulary.control(modality)]
        head += [self.vocabulary.numbers.start + number for number in self.shape_of(codes)]
        return np.concatenate([head, body, [self.vocabulary.control("/" + modality)]]).astype(np.int64)

    # -- ids to documents

    def parse(self, ids_S: IntArray) -> Parsed:
        """Read ids as a document; whatever they are, return the whole blocks before the first fault, and the fault.

        The inverse of `build` (without `drop_inputs`), up to codebooks that a `coarse` order leaves out.
        """
        reader = _Reader(self, np.asarray(ids_S, dtype=np.int64).ravel())
        problem = reader.read()
        return Parsed(Document(tuple(reader.segments), reader.task), problem is None, problem)


class _Writer:
    def __init__(self, sequencer: Sequencer) -> None:
        self.sequencer = sequencer
        self.ids: list[IntArray] = []
        self.targets: list[npt.NDArray[np.bool_]] = []
        self.spans: list[tuple[int, int]] = []
        self.length = 0
        self.in_target = False

    def add(self, ids: IntArray | list[int], *, target: bool = False) -> None:
        self.ids.append(np.asarray(ids, dtype=np.int64))
        self.targets.append(np.full(len(ids), target))
        self.length += len(ids)

    def switch(self, target: bool) -> None:
        self.add([self.sequencer.vocabulary.control("target" if target else "input")])
        self.in_target = target

    def block(self, segment: Segment) -> None:
        if segment.target != self.in_target:
            self.switch(segment.target)
        ids = self.sequencer.block_ids(segment.written)
        if segment.modality != "text":
            self.spans.append((self.length, self.length + len(ids)))
        self.add(ids, target=segment.target)

    def finish(self) -> Sequence:
        return Sequence(np.concatenate(self.ids), np.concatenate(self.targets), tuple(self.spans))


class _Reader:
    def __init__(self, sequencer: Sequencer, ids_S: IntArray) -> None:
        self.sequencer = sequencer
        self.vocabulary = sequencer.vocabulary
        self.ids = ids_S
        self.at = 0
        self.segments: list[Segment] = []
        self.task: str | None = None
        control = self.vocabulary.range("control")
        self.names = {control.start + i: name for i, name in enumerate(self.vocabulary.control_names)}
        self.hole = next((id for id, name in self.names.items() if name == "hole"), -1)

    def read(self) -> str | None:
        """Fill `segments`; return None at `<eos>`, otherwise what was wrong."""
        target = False
        while True:
            if self.at >= len(self.ids):
                return "the ids end before <eos>"
            name = self.names.get(int(self.ids[self.at]))
            self.at += 1
            if name == "eos":
                return None
            if name in ("bos", "drop"):
                continue
            if name in ("input", "target"):
                target = name == "target"
            elif name in TASKS:
                self.task = name
            elif name in get_args(BlockName):
                try:
                    problem = self._block(name, target)  # type: ignore[arg-type]
                except DataError as error:  # codes, or a kind of block, that this vocabulary cannot have
                    problem = str(error)
                if problem:
                    return problem
            else:
                return f"id {int(self.ids[self.at - 1])} at {self.at - 1} opens nothing"

    def _block(self, modality: BlockName, target: bool) -> str | None:
        numbers = self.vocabulary.numbers
        num_numbers = self.sequencer.num_shape_numbers(modality)
        shape = tuple(int(i) - numbers.start for i in self.ids[self.at : self.at + num_numbers])
        if len(shape) < num_numbers or any(not 0 <= n < NUM_NUMBERS for n in shape):
            return f"{modality} block at {self.at - 1} has no valid shape"
        self.at += num_numbers
        end = self.vocabulary.control("/" + modality)
        if modality == "text":
            stops = np.flatnonzero(self.ids[self.at :] == end)
            length = int(stops[0]) if len(stops) else len(self.ids) - self.at
            ranges = [self.vocabulary.range("text")] * length
        else:
            ranges = self.sequencer.body_ranges(modality, shape)
        body = self.ids[self.at : self.at + len(ranges)]
        starts = np.array([r.start for r in ranges[: len(body)]], dtype=np.int64)
        stops_S = np.array([r.stop for r in ranges[: len(body)]], dtype=np.int64)
        hole_S = body == self.hole if modality in ("image", "audio") and not target else np.zeros(len(body), bool)
        if ((body < starts) | (body >= stops_S))[~hole_S].any():
            return f"{modality} block at {self.at - 1 - num_numbers} holds ids of another kind"
        self.at += len(body)
        if len(body) < len(ranges) or self.at >= len(self.ids) or int(self.ids[self.at]) != end:
            return f"{modality} block at {self.at - 1 - num_numbers - len(body)} is not closed"
        self.at += 1
        if modality == "voken":
            self.segments.append(Segment("image", Vokens(), target))
            return None
        codes = self._codes(modality, shape, np.where(hole_S, 0, body - starts))
        known_KT = self.sequencer.orders[modality].invert(~hole_S * 1) > 0 if hole_S.any() else None
        self.segments.append(Segment(modality, codes if known_KT is None else Holed(codes, known_KT), target))
        return None

    def _codes(self, modality: Modality, shape: tuple[int, ...], codes_S: IntArray) -> Codes:
        if modality in ("text", "region"):
            return Codes(codes_S.reshape(1, -1), modality)
        codes_KT = self.sequencer.orders[modality].invert(codes_S)
        return Codes(codes_KT, modality, grid_hw=(shape[0], shape[1]) if modality == "image" else None)
