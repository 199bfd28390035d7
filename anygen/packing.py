"""Leak-free packing: sequences of any length fill fixed rows; attention and positions restart at every sequence.

Rows are filled best-fit from a look-ahead pool. The row starts with the oldest waiting sequence (none starves), takes
the longest that fit while there is much room, and ends with the one or two that leave the least of it. With a pool of a
few hundred sequences a few ids in a thousand stay empty.

A sequence longer than a row is cut, never inside a media block; each piece is then packed as a sequence of its own.

Dimension key: S ids of one sequence, T ids of one packed row.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from anygen.errors import CheckpointError, ConfigError, DataError
from anygen.sequence import Sequence
from tokenizers_mm.codes import IntArray


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Packed sequences, flat. Attention is block-diagonal and causal over `lengths`.

    A label is the next id of the same sequence; the last id of a sequence predicts nothing (`predicts_T` is False
    there).
    """

    ids_T: IntArray
    positions_T: IntArray
    labels_T: IntArray
    predicts_T: npt.NDArray[np.bool_]
    """True where the label exists."""
    target_T: npt.NDArray[np.bool_]
    """True where the label is something the model is to generate (a target segment)."""
    lengths: tuple[int, ...]
    """Ids of each sequence, in order; they sum to T. Empty room at the end of a row is a sequence of padding."""
    num_padding: int = 0

    @property
    def utilisation(self) -> float:
        """Share of T that is not padding."""
        return 1.0 - self.num_padding / len(self.ids_T)


def split_long(sequence: Sequence, row_length: int) -> list[Sequence]:
    """The sequence whole where it fits a row, else in pieces that do, cut only outside media blocks.

    >>> import numpy as np
    >>> s = Sequence(np.arange(10), np.ones(10, bool), media_spans=((2, 7),))
    >>> [piece.ids_S.tolist() for piece in split_long(s, 6)]
    [[0, 1], [2, 3, 4, 5, 6, 7], [8, 9]]

    Raises:
        DataError: one media block alone is longer than a row.
    """
    pieces, start = [], 0
    while start < len(sequence):
        stop = min(start + row_length, len(sequence))
        for span_start, span_stop in sequence.media_spans:
            if span_start < stop < span_stop:
                stop = span_start
        if stop <= start:
            raise DataError(
                f"a media block of {max(b - a for a, b in sequence.media_spans)} ids does not fit "
                f"a row of {row_length}: use longer rows"
            )
        spans = tuple((a - start, b - start) for a, b in sequence.media_spans if start <= a and b <= stop)
        read_S = None if sequence.read_S is None else sequence.read_S[start:stop]
        pieces.append(Sequence(sequence.ids_S[start:stop], sequence.target_S[start:stop], spans, read_S))
        start = stop
    return pieces


def collate(rows: list[list[Sequence]], row_length: int, *, pad_id: int) -> PackedBatch:
    """Rows of sequences as one flat batch; each row is padded to `row_length` with a sequence of its own."""
    ids, positions, labels, predicts, target, lengths = [], [], [], [], [], []
    num_padding = 0
    for row in rows:
        room = row_length - sum(len(sequence) for sequence in row)
        assert room >= 0, f"row of {row_length - room} ids, longer than {row_length}"
        num_padding += room
        padding = [Sequence(np.full(room, pad_id, np.int64), np.zeros(room, np.bool_), ())] if room else []
        for sequence, is_real in [*((s, True) for s in row), *((s, False) for s in padding)]:
            num_ids = len(sequence)
            ids.append(sequence.ids_S if sequence.read_S is None else sequence.read_S)
            positions.append(np.arange(num_ids))
            labels.append(np.append(sequence.ids_S[1:], pad_id))
            predicts.append(np.append(np.full(num_ids - 1, is_real), False))
            target.append(np.append(sequence.target_S[1:], False))
            lengths.append(num_ids)
    return PackedBatch(
        np.concatenate(ids),
        np.concatenate(positions),
        np.concatenate(labels),
        np.concatenate(predicts),
        np.concatenate(target),
        tuple(lengths),
        num_padding,
    )


def join(batches: list[PackedBatch]) -> PackedBatch:
    """Batches one after another, as one."""
    return PackedBatch(
        np.concatenate([b.ids_T for b in batches]),
        np.concatenate([b.positions_T for b in batches]),
        np.concatenate([b.labels_T for b in batches]),
        np.concatenate([b.predicts_T for b in batches]),
        np.concatenate([b.target_T for b in batches]),
        tuple(length for b in batches for length in b.lengths),
        sum(b.num_padding for b in batches),
    )


def unpack(batch: PackedBatch, values_T: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    """Per-id values of a packed batch, cut back into its sequences (padding included, as the last of a row)."""
    return np.split(values_T, np.cumsum(batch.lengths)[:-1])


def check_state(state: Any, *, start: int, stride: int) -> tuple[int, list[tuple[int, int]]]:
    """Next example and waiting (example, piece) keys of a packer's state, where it can be one.

    Raises:
        CheckpointError: it cannot.
    """

    def is_example(number: Any) -> bool:
        return type(number) is int and number >= start and (number - start) % stride == 0

    if not isinstance(state, dict) or state.keys() != {"next_example", "waiting"}:
        raise CheckpointError("the state of the data is not one of a packer: expected next_example and waiting")
    following, waiting = state["next_example"], state["waiting"]
    pairs = isinstance(waiting, list) and all(isinstance(key, list | tuple) and len(key) == 2 for key in waiting)
    keys = [(number, piece) for number, piece in waiting] if pairs else []
    good = is_example(following) and all(
        is_example(number) and number < following and type(piece) is int and piece >= 0 for number, piece in keys
    )
    if not (pairs and good and all(a < b for a, b in itertools.pairwise(keys))):
        raise CheckpointError(
            f"the state of the data was altered or is of another stream: examples {start}, {start + stride}, ... "
            f"cannot have next_example {following!r} with these waiting"
        )
    return following, keys


class Packer:
    """An endless stream of packed batches over examples start, start + stride, start + 2 stride, ...

    The stream is a pure function of its arguments: its state is the number of the next example and the numbers of
    those that wait in the pool, so a resumed stream continues exactly. Several packers with the starts
    0 ... stride - 1 share the examples out among them: the lanes of `anygen.data.loader`.

    Args:
        example: example number to sequence; pure.
        row_length: ids per row.
        num_rows: rows per batch.
        pool_size: how many sequences to look ahead.
        pad_id: what fills the rest of a row.
        start: the first example.
        stride: from one example to the next.
    """

    def __init__(
        self,
        example: Callable[[int], Sequence],
        *,
        row_length: int,
        num_rows: int,
        pool_size: int,
        pad_id: int,
        start: int = 0,
        stride: int = 1,
    ) -> None:
        if min(row_length, num_rows, pool_size) < 1:
            raise ConfigError(
                f"row_length, num_rows and pool_size are 1 or more; got {row_length}, {num_rows}, {pool_size}"
            )
        self._example = example
        self._row_length, self._num_rows, self._pool_size, self._pad_id = row_length, num_rows, pool_size, pad_id
        self._start, self._stride = start, stride
        self._next = start
        self._pool: dict[tuple[int, int], Sequence] = {}  # (example, piece) -> sequence, oldest first
        self._by_length: list[tuple[int, tuple[int, int]]] = []

    def state(self) -> dict[str, Any]:
        """JSON-able position in the stream."""
        return {"next_example": self._next, "waiting": [list(key) for key in self._pool]}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned.

        Raises:
            CheckpointError: it was altered, or is of another stream.
        """
        following, waiting = check_state(state, start=self._start, stride=self._stride)
        self._pool.clear()
        self._by_length.clear()
        pieces: dict[int, list[Sequence]] = {}
        for number, piece in waiting:
            if number not in pieces:
                pieces[number] = split_long(self._example(number), self._row_length)
            if piece >= len(pieces[number]):
                raise CheckpointError(f"the state of the data says that piece {piece} of example {number} waits: none")
            self._put((number, piece), pieces[number][piece])
        self._next = following

    def __iter__(self) -> Iterator[PackedBatch]:
        while True:
            yield self.next_batch()

    def next_batch(self) -> PackedBatch:
        """The next `num_rows` rows."""
        rows = [self._next_row() for _ in range(self._num_rows)]
        return collate(rows, self._row_length, pad_id=self._pad_id)

    def _put(self, key: tuple[int, int], sequence: Sequence) -> None:
        self._pool[key] = sequence
        insort(self._by_length, (len(sequence), key))

    def _take(self, key: tuple[int, int]) -> Sequence:
        sequence = self._pool.pop(key)
        self._by_length.remove((len(sequence), key))
        return sequence

    def _next_row(self) -> list[Sequence]:
        while len(self._pool) < self._pool_size:
            for piece, sequence in enumerate(split_long(self._example(self._next), self._row_length)):
                self._put((self._next, piece), sequence)
            self._next += self._stride
        row = [self._take(next(iter(self._pool)))]
        room = self._row_length - len(row[0])
        while (length := self._longest_within(room)) is not None:
            if room < 2 * self._by_length[-1][0]:
                length = self._first_of_best_pair(room, length)
            row.append(self._take_length(length))
            room -= length
        return row

    def _first_of_best_pair(self, room: int, longest: int) -> int:
        """The longer of the two lengths that fill `room` best, or `longest` alone where that is no worse."""
        best, first = longest, longest
        for length in sorted({length for length, _ in self._by_length if length < room}, reverse=True):
            other = self._longest_within(room - length, besides=length)
            if other is not None and length + other > best:
                best, first = length + other, max(length, other)
        return first

    def _longest_within(self, room: int, *, besides: int | None = None) -> int | None:
        """The greatest waiting length that fits, when one sequence of length `besides` is spoken for."""
        index = bisect_right(self._by_length, (room, (_NEVER, 0))) - 1
        if index >= 0 and self._by_length[index][0] == besides:
            first = bisect_right(self._by_length, (besides, (-1, 0)))
            if index == first:  # the only one of this length
                index -= 1
        return self._by_length[index][0] if index >= 0 else None

    def _take_length(self, length: int) -> Sequence:
        """The oldest waiting sequence of this length (an older sequence has a smaller key)."""
        return self._take(self._by_length[bisect_right(self._by_length, (length, (-1, 0)))][1])


_NEVER = 2**62
