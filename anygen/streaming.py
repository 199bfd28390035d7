"""Events of one sample: what its ids, one after another, mean to whoever waits for them.

A tracker walks the grammar again by itself, so it does not matter how many ids a step of the sampler adds. Rows of a
picture can be looked at when they are done; a sound is decoded in chunks, which joined are the whole.

Dimension key: K codebooks, T frames or patches, S codes in the order in which they are written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from anygen.codebooks import CodebookOrder
from anygen.documents import Document, Segment, Tokenizers
from anygen.editing import Edit
from anygen.grammar import Walk
from anygen.results import (
    Event,
    RowDone,
    SegmentFinished,
    SegmentProgress,
    SegmentStarted,
    SoundChunk,
    TextDelta,
)
from anygen.sequence import Sequencer
from anygen.vocabulary import NUM_NUMBERS
from tokenizers_mm.audio import AudioTokenizer
from tokenizers_mm.codes import Codes
from tokenizers_mm.errors import CheckpointError
from tokenizers_mm.media import Audio, FloatArray
from tokenizers_mm.streaming import StreamingDecoder

_CHUNK_S = 0.2
"""Of a sound; a little more must be known before a chunk can be decoded. Shorter ones come sooner, and cost more."""


class Tracker:
    """Turns the ids of one sample into events, and keeps its segments.

    Args:
        index: of the sample, as events tell it.
        walk: the sample's, or one like it; it is not touched.
        sequencer: reads blocks.
        tokenizers: decode text, rows and sounds as they grow.
        decode: an answer of one block in codes to media; given the number of pictures before it.
        edit: what is edited, if anything.
    """

    def __init__(
        self,
        index: int,
        walk: Walk,
        sequencer: Sequencer,
        tokenizers: Tokenizers,
        decode: Callable[[Document, int], Document],
        edit: Edit | None = None,
    ) -> None:
        self.index, self.walk = index, walk.again()
        self.segments: list[Segment] = []
        """Whole ones."""
        self._sequencer, self._tokenizers, self._decode, self._edit = sequencer, tokenizers, decode, edit
        self._block: list[int] = []
        self._text = ""
        self._growing: _Rows | _Sound | None = None

    @property
    def so_far(self) -> tuple[Segment, ...]:
        """Whole segments and, where one is open, the text as far as it goes."""
        is_open = self.walk.modality == "text" and self._text
        return (*self.segments, *((Segment("text", self._text, target=True),) if is_open else ()))

    def push(self, id: int) -> Iterator[Event]:
        """The events that one more id makes."""
        is_via = len(self.segments) < self.walk.plan.num_via  # no part of the answer
        for event in self._events(id):
            if not is_via:
                yield event

    def _events(self, id: int) -> Iterator[Event]:
        was_open = self.walk.modality is not None
        self.walk.push(id)
        modality = self.walk.modality
        if not was_open:
            if modality is not None:
                self._block, self._text, self._growing = [id], "", None
                yield SegmentStarted(self.index, modality)
        else:
            self._block.append(id)
            yield from self._grow(id) if modality is not None else self._finish()

    def _grow(self, id: int) -> Iterator[Event]:
        if self.walk.modality == "text":
            yield from self._text_delta()
        elif self.walk.num_written:
            yield SegmentProgress(self.index, self.walk.num_written, self.walk.num_codes)
            if self._growing is None and not self.walk.writes_vokens:
                self._growing = self._started()
            if self._growing is not None:
                yield from self._growing.push(id)

    def _text_delta(self) -> Iterator[Event]:
        codes = self._sequencer.vocabulary.to_codes("text", np.array([self._block[1:]]))
        text = str(self._tokenizers["text"].decode(Codes(codes, "text"))).rstrip("\ufffd")  # half a character waits
        if len(text) > len(self._text):
            new, self._text = text[len(self._text) :], text
            yield TextDelta(self.index, new)

    def _started(self) -> _Rows | _Sound | None:
        modality = self.walk.modality
        if modality not in ("image", "audio"):
            return None
        shape = tuple(id - self._sequencer.vocabulary.numbers.start for id in self._block[1:3])
        starts = [r.start for r in self._sequencer.body_ranges(modality, shape)]
        order = self._sequencer.orders[modality]
        if modality == "image":
            return _Rows(self.index, order, starts, (shape[0], shape[1]), self._tokenizers["image"].decode)
        num_frames, tokenizer = shape[0] * NUM_NUMBERS + shape[1], self._tokenizers["audio"]
        assert isinstance(tokenizer, AudioTokenizer)
        return _Sound(self.index, order, starts, num_frames, tokenizer, self._edit)

    def _finish(self) -> Iterator[Event]:
        control = self._sequencer.vocabulary.control
        parsed = self._sequencer.parse(np.array([control("target"), *self._block, control("eos")]))
        assert parsed.complete, f"the grammar let through what parse refuses: {parsed.problem}"
        last: list[Event] = []
        sound = self._growing if isinstance(self._growing, _Sound) else None
        if sound is not None and sound.is_chunked:
            last += sound.finish()
            segment = Segment("audio", sound.joined(), target=True)
        else:
            num_pictures = sum(segment.modality == "image" for segment in self.segments)
            segment = self._decode(parsed.document, num_pictures).segments[0]
        content = segment.content
        if isinstance(content, str) and len(content) > len(self._text):
            last.append(TextDelta(self.index, content[len(self._text) :]))
        if isinstance(content, Audio) and not (sound is not None and sound.is_chunked):
            last.append(SoundChunk(self.index, content, 0.0))
        self.segments.append(segment)  # before the events: who stops at one of them has it
        self._growing = None
        yield from (*last, SegmentFinished(self.index, segment))


class _Frames:
    """The codes of a growing block, and how many leading frames are whole."""

    def __init__(self, order: CodebookOrder, starts: list[int], num_frames: int) -> None:
        self._coordinates_S2, self._starts = order.coordinates_S2(num_frames), starts
        self._whole = order.num_whole(num_frames)
        self._num_written = 0
        self.codes_KT = np.zeros((order.num_kept, num_frames), dtype=np.int64)

    def push(self, id: int) -> int:
        """Take the next id; leading frames that are whole then."""
        book, frame = self._coordinates_S2[self._num_written]
        self.codes_KT[book, frame] = id - self._starts[self._num_written]
        self._num_written += 1
        return int(self._whole[self._num_written])


class _Rows:
    def __init__(
        self,
        index: int,
        order: CodebookOrder,
        starts: list[int],
        grid_hw: tuple[int, int],
        draw: Callable[..., Any],
    ) -> None:
        self._index, self._draw = index, draw
        self._num_rows, self._num_columns = grid_hw
        self._frames = _Frames(order, starts, grid_hw[0] * grid_hw[1])
        self._num_done = 0

    def push(self, id: int) -> Iterator[Event]:
        whole = self._frames.push(id) // self._num_columns
        for rows in range(self._num_done + 1, whole + 1):
            codes_KT = self._frames.codes_KT[:, : rows * self._num_columns]
            codes = Codes(codes_KT, "image", (rows, self._num_columns))
            yield RowDone(self._index, rows, self._num_rows, codes, self._draw)
        self._num_done = whole


class _Sound:
    def __init__(
        self,
        index: int,
        order: CodebookOrder,
        starts: list[int],
        num_frames: int,
        tokenizer: AudioTokenizer,
        edit: Edit | None,
    ) -> None:
        self._index, self._edit, self._rate_hz = index, edit, tokenizer.sample_rate_hz
        self._frames = _Frames(order, starts, num_frames)
        self._num_given = self._num_samples = 0
        self._pieces: list[FloatArray] = []
        try:
            self._decoder = StreamingDecoder(tokenizer, chunk=max(1, round(_CHUNK_S * tokenizer.rate_hz)))
            self.is_chunked = True
        except CheckpointError:  # such a codec decodes at once: the whole is the only chunk
            self.is_chunked = False

    def push(self, id: int) -> Iterator[Event]:
        whole = self._frames.push(id)
        if self.is_chunked and whole > self._num_given:
            codes_KT = self._frames.codes_KT[:, self._num_given : whole]
            self._num_given = whole
            yield from self._chunk(self._decoder.push(Codes(codes_KT, "audio")))

    def finish(self) -> Iterator[Event]:
        yield from self._chunk(self._decoder.finish())

    def joined(self) -> Audio:
        return Audio(np.concatenate([np.zeros(0, np.float32), *self._pieces]), self._rate_hz)

    def _chunk(self, audio: Audio) -> Iterator[Event]:
        samples_N, start = audio.samples_T, self._num_samples
        if self._edit is not None:
            samples_N = self._edit.samples(samples_N, start)
        self._num_samples += len(audio.samples_T)
        if len(samples_N):
            self._pieces.append(samples_N)
            yield SoundChunk(self._index, Audio(samples_N, self._rate_hz), start / self._rate_hz)
