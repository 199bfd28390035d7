"""Streams: rows, chunks and texts as they come; interleaved, stopped, closed, and nothing left behind."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import anygen.api
import anygen.starting
from anygen.api import AnyGen
from anygen.errors import InputError
from anygen.request import Request
from anygen.results import (
    Event,
    Finished,
    RowDone,
    SegmentFinished,
    SegmentProgress,
    SegmentStarted,
    SoundChunk,
    TextDelta,
)
from anygen.sampling import sampler
from anygen.streaming import Tracker
from tokenizers_mm.codes import Codes

CALL: dict[str, Any] = {"text": "a cat", "output": ("image", "text", "audio"), "size": (24, 32), "duration_s": 0.9}


def told(event: Any) -> Any:
    """What an event says, comparable."""
    if isinstance(event, SoundChunk):
        return ("chunk", event.start_s, event.audio.samples_T.tobytes())
    if isinstance(event, RowDone):
        return ("row", event.num_done, event.codes)
    if isinstance(event, SegmentFinished):
        return ("segment", event.segment.modality)
    return (type(event).__name__, *(v for k, v in vars(event).items() if k != "sample"))


def test_rows_come_one_by_one_and_can_be_looked_at(model: AnyGen) -> None:
    events = list(model.stream(**CALL))
    rows = [event for event in events if isinstance(event, RowDone)]
    assert [(row.num_done, row.num_rows) for row in rows] == [(1, 3), (2, 3), (3, 3)]
    place = {id(event): number for number, event in enumerate(events)}
    progress = [e for e in events if isinstance(e, SegmentProgress)]
    for row in rows:
        (at,) = (e for e in progress if e.num_done == 4 * row.num_done and e.num_codes == 12)
        assert place[id(row)] == place[id(at)] + 1, "a row is told with its last code"
    picture = next(e.segment.content for e in events if isinstance(e, SegmentFinished))
    assert isinstance(picture, Image.Image)
    assert np.array_equal(np.asarray(rows[-1].preview()), np.asarray(picture))
    first = np.asarray(rows[0].preview())
    assert first.shape == (24, 32, 3) and (first[8:] == 255).all() and (first[:8] != 255).any()


@pytest.mark.parametrize("order", ["flat", "sequential", "delay"])
@pytest.mark.parametrize("duration_s", [0.02, 0.2, 1.3])
def test_chunks_joined_are_the_sound(
    model: AnyGen, order: Any, duration_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = type(model.bundle.layout)(**{**model.bundle.layout.to_json(), "audio_order": order})
    monkeypatch.setattr(model.sequencer, "orders", layout.orders)
    call: dict[str, Any] = {"text": "a cat", "output": "audio", "duration_s": duration_s}
    events = list(model.stream(**call))
    chunks = [event for event in events if isinstance(event, SoundChunk)]
    joined = np.concatenate([chunk.audio.samples_T for chunk in chunks])
    (whole,) = (e.segment.content for e in events if isinstance(e, SegmentFinished))
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert np.array_equal(joined, whole.samples_T) and np.array_equal(joined, finished.output.audio.samples_T)  # type: ignore[union-attr]
    assert len(joined) == round(duration_s * 8000)
    assert np.allclose(joined, model.generate(**call).audio.samples_T, atol=1e-5)
    starts = np.cumsum([0, *(len(chunk.audio.samples_T) for chunk in chunks)])[:-1] / 8000
    assert np.allclose([chunk.start_s for chunk in chunks], starts)
    if duration_s > 1 and order != "sequential":
        number = [type(event) for event in events].index(SoundChunk)
        written = [e.num_done for e in events[:number] if isinstance(e, SegmentProgress)][-1]
        assert len(chunks) > 3 and written < 60, "the first can be played before half of the 130 codes are there"


def test_a_codec_that_decodes_at_once_gives_one_chunk(model: AnyGen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.bundle.tokenizers["audio"].model.config, "norm_type", "time_group_norm")  # type: ignore[attr-defined]
    events = list(model.stream(text="a", output="audio", duration_s=1.0))
    (chunk,) = (event for event in events if isinstance(event, SoundChunk))
    assert chunk.audio is events[-1].output.audio  # type: ignore[union-attr]


def test_characters_are_told_whole(model: AnyGen) -> None:
    texts = []
    for seed in range(6):
        events = list(model.stream(output="text", seed=seed, max_new_tokens=60, temperature=3.0))
        pieces = [event.text for event in events if isinstance(event, TextDelta)]
        texts.append("".join(pieces))
        assert texts[-1] == events[-1].output.text and all(pieces)  # type: ignore[union-attr]
        assert not any(piece.endswith("\ufffd") for piece in pieces[:-1])
    assert any("\ufffd" in text for text in texts), "bytes that are no characters occurred"


def test_events_of_a_sample_are_the_same_among_others(model: AnyGen) -> None:
    together = list(model.stream(**CALL, num_samples=3, seed=5))
    for number in range(3):
        alone = list(model.stream(**CALL, seed=5 + number))
        mine = [e for e in together if not isinstance(e, Finished) and e.sample == number]
        assert [told(e) for e in mine] == [told(e) for e in alone[:-1]]
    order = [e.sample for e in together if not isinstance(e, Finished)]
    assert order != sorted(order), "they come as they are made"


@pytest.mark.parametrize("window", [1, 4])
def test_a_stream_does_not_depend_on_how_many_codes_a_pass_adds(model: AnyGen, window: int) -> None:
    events = [told(e) for e in model.stream(**CALL, speculative_window=window)][:-1]
    assert events == [told(e) for e in model.stream(**CALL)][:-1]


def test_a_tracker_needs_ids_only(model: AnyGen) -> None:
    (watched,) = model._watched([Request(**CALL)], [model._states(Request(**CALL))])
    for _ in sampler.sample(model.engine, [watched.state]):
        pass
    events = [event for id in watched.state.ids for event in watched.tracker.push(id)]
    assert [told(e) for e in events] == [told(e) for e in model.stream(**CALL)][:-1]


# -- stopping


def test_a_callback_sees_the_stream_and_gets_the_output(model: AnyGen) -> None:
    seen: list[Any] = []
    out = model.generate(**CALL, num_samples=2, on_event=seen.append)
    assert [told(e) for e in seen[:-1]] == [told(e) for e in model.stream(**CALL, num_samples=2)][:-1]
    assert isinstance(seen[-1], Finished) and [s.ids for s in out.samples] == [
        s.ids for s in model.generate(**CALL, num_samples=2).samples
    ]


def test_a_callback_that_returns_false_stops_everything(model: AnyGen) -> None:
    def until(kind: type[Event], count: int) -> Any:
        seen: list[Any] = []

        def on_event(event: Any) -> bool:
            seen.append(event)
            return sum(isinstance(e, kind) for e in seen) < count

        out = model.generate(**CALL, on_event=on_event)
        assert isinstance(seen[-1], kind) and out.samples[0].finish_reason == "stopped"
        return out

    assert until(RowDone, 2).samples[0].segments == ()
    started = until(SegmentStarted, 2)
    assert [s.modality for s in started.samples[0].segments] == ["image"] and started.image.size == (32, 24)
    told_so_far = until(TextDelta, 3)
    assert [s.modality for s in told_so_far.samples[0].segments] == ["image", "text"]
    whole = model.generate(**CALL)
    assert 0 < len(told_so_far.text) < len(whole.text) and whole.text.startswith(told_so_far.text)
    assert told_so_far.samples[0].ids == whole.samples[0].ids[: len(told_so_far.samples[0].ids)]
    with pytest.raises(InputError, match="no audio"):
        told_so_far.audio  # noqa: B018
    with pytest.raises(InputError, match="on_event is called with every event; got int"):
        model.generate(**CALL, on_event=3)


def test_a_stopped_answer_can_be_saved(model: AnyGen, tmp_path: Any) -> None:
    out = model.generate(**CALL, on_event=lambda event: not isinstance(event, TextDelta))
    assert [path.suffix for path in out.save(tmp_path)] == [".png", ".txt"]


def test_faults_are_told_when_stream_is_called(model: AnyGen) -> None:
    for arguments, error in (({"output": "smell"}, InputError), ({"outputs": "text"}, TypeError)):
        with pytest.raises(error):
            model.stream(**arguments)


@pytest.mark.parametrize("events", [0, 1, 40])
def test_a_closed_stream_leaves_nothing_behind(model: AnyGen, events: int, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Any]] = []

    def watched(owner: Any, name: str) -> None:
        make = getattr(owner, name)

        def made(*arguments: Any, **options: Any) -> Any:
            thing = make(*arguments, **options)
            alive.append(weakref.ref(thing))
            return thing

        monkeypatch.setattr(owner, name, made)

    watched(model.engine, "new_cache")
    watched(anygen.starting, "SampleState")
    watched(anygen.api, "Tracker")
    threads = threading.active_count()
    gc.collect()
    gc.disable()  # nothing may wait for the collector
    try:
        stream = model.stream(**CALL, num_samples=2, guidance_scale=2.0)
        for _ in range(events):
            next(stream)
        assert len(alive) > 4 if events else len(alive) == 2  # two states, and then two trackers and the cache
        assert threading.active_count() == threads
        stream.close()
        assert list(stream) == []
        del stream
        assert [ref() for ref in alive] == [None] * len(alive)
    finally:
        gc.enable()


def test_an_error_in_a_callback_comes_through(model: AnyGen) -> None:
    def on_event(event: Any) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        model.generate(**CALL, on_event=on_event)


def test_streaming_leaves_the_global_random_state(model: AnyGen) -> None:
    state = torch.get_rng_state()
    list(model.stream(**CALL))
    assert torch.equal(state, torch.get_rng_state())


def test_rows_of_several_codebooks_wait_for_the_last(model: AnyGen) -> None:
    order = model.sequencer.orders["audio"]
    assert order.num_whole(3).tolist() == [0, 0, 0, 1, 1, 2, 3]
    assert Codes(np.zeros((1, 0), int), "audio").num_steps == 0 and Tracker.__doc__
