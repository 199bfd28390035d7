"""What `anygen generate --stream` prints: a line an event for people, or one JSON object a line for programs."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from anygen.cli.options import print_json
from anygen.results import (
    Event,
    Finished,
    Output,
    RowDone,
    SegmentFinished,
    SegmentStarted,
    SoundChunk,
    TextDelta,
)


def print_stream(events: Iterator[Event | Finished], *, as_json: bool) -> Output:
    """Print events as they come; returns the output of the last one, which is for the caller to print."""
    for event in events:
        if isinstance(event, Finished):
            return event.output
        if as_json:
            print_json(facts_of(event))
        elif (line := line_of(event)) is not None:
            print(line, flush=True)
    raise AssertionError("a stream ends with Finished")


def line_of(event: Event) -> str | None:
    """An event for people; None where it is not worth a line.

    >>> line_of(TextDelta(1, "a cat"))
    '[1] text "a cat"'
    """
    said = {
        SegmentStarted: lambda e: f"{e.modality} begins",
        TextDelta: lambda e: f'text "{e.text}"',
        RowDone: lambda e: f"image row {e.num_done} of {e.num_rows}",
        SoundChunk: lambda e: f"audio {e.start_s:.2f} to {e.start_s + e.audio.duration_s:.2f} s",
        SegmentFinished: lambda e: f"{e.segment.modality} ends",
    }.get(type(event))
    return None if said is None else f"[{event.sample}] {said(event)}"


def facts_of(event: Event) -> dict[str, Any]:
    """An event for programs. Sounds come as 16 bit samples, little-endian, in base64: joined, the chunks are the sound.

    >>> facts_of(TextDelta(0, "a cat"))
    {'event': 'text_delta', 'sample': 0, 'text': 'a cat'}
    """
    name = re.sub(r"(?<!^)(?=[A-Z])", "_", type(event).__name__).lower()
    facts: dict[str, Any] = {"event": name, "sample": event.sample}
    if isinstance(event, SoundChunk):
        samples_N = (event.audio.samples_T.clip(-1, 1) * 32767).round().astype("<i2")
        facts |= {"start_s": event.start_s, "rate_hz": event.audio.rate_hz}
        return facts | {"pcm_s16le": base64.b64encode(np.ascontiguousarray(samples_N).tobytes()).decode()}
    if isinstance(event, SegmentFinished):
        return facts | {"modality": event.segment.modality}
    return facts | {key: value for key, value in vars(event).items() if isinstance(value, int | str)}
