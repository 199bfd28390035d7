"""`build` and `parse` are inverses, and `parse` survives anything."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anygen.documents import Document, Holed, Segment, default_task
from anygen.errors import CheckpointError, DataError
from anygen.grammar import Block, Grammar, Plan
from anygen.layout import Layout
from anygen.sequence import Sequencer
from anygen.vocabulary import CONTROL, TASKS, Vocabulary
from tokenizers_mm.codes import Codes

VOCABULARY = Vocabulary.create(text=300, image=(1, 64), audio=(3, 32), region=100, voken=4)
LAYOUTS = [
    Layout(audio_codebooks=3, audio_order=order, audio_kept=kept)  # type: ignore[arg-type]
    for order, kept in (("flat", 0), ("sequential", 0), ("delay", 0), ("coarse", 2))
]


@st.composite
def segments(draw: st.DrawFn, kept: int = 3) -> Segment:
    modality = draw(st.sampled_from(["text", "image", "audio", "region"]))
    seed = draw(st.integers(0, 10**6))
    random = np.random.default_rng(seed)
    if modality == "text":
        codes = Codes(random.integers(1, 300, (1, draw(st.integers(0, 9)))), "text")
    elif modality == "image":
        grid = (draw(st.integers(1, 9)), draw(st.integers(1, 9)))
        codes = Codes(random.integers(0, 64, (1, grid[0] * grid[1])), "image", grid)
    elif modality == "audio":
        codes = Codes(random.integers(0, 32, (kept, draw(st.sampled_from([0, 1, 2, 5, 255, 256, 300])))), "audio")
    else:
        codes = Codes(random.integers(0, 100, (1, draw(st.sampled_from([2, 4])))), "region")
    return Segment(codes.modality, codes, draw(st.booleans()))


@st.composite
def documents(draw: st.DrawFn, kept: int = 3) -> Document:
    parts = draw(st.lists(segments(kept), min_size=1, max_size=4))
    if not any(part.target for part in parts):
        parts[-1] = Segment(parts[-1].modality, parts[-1].content, True)
    return Document(tuple(parts), draw(st.sampled_from([None, *TASKS])))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 3), st.data())
def test_parse_inverts_build(which: int, data: st.DataObject) -> None:
    layout = LAYOUTS[which]
    kept = layout.orders["audio"].num_kept
    document = data.draw(documents(kept))
    sequencer = Sequencer(VOCABULARY, layout)
    sequence = sequencer.build(document)
    parsed = sequencer.parse(sequence.ids_S)
    assert parsed.complete, parsed.problem
    assert parsed.document == document


@settings(max_examples=100, deadline=None)
@given(documents())
def test_targets_are_exactly_the_target_blocks_and_eos(document: Document) -> None:
    sequencer = Sequencer(VOCABULARY, LAYOUTS[0])
    sequence = sequencer.build(document)
    expected = sum(len(sequencer.block_ids(s.codes)) for s in document.segments if s.target) + 1
    assert int(sequence.target_S.sum()) == expected
    for start, stop in sequence.media_spans:
        opened = int(sequence.ids_S[start])
        assert opened in [VOCABULARY.control(m) for m in ("image", "audio", "region")]
        assert int(sequence.ids_S[stop - 1]) == opened + 1


@settings(max_examples=100, deadline=None)
@given(documents(), st.data())
def test_cut_or_corrupted_sequences_give_whole_blocks_and_a_reason(document: Document, data: st.DataObject) -> None:
    sequencer = Sequencer(VOCABULARY, LAYOUTS[2])
    ids = sequencer.build(document).ids_S
    cut = data.draw(st.integers(0, len(ids) - 1))
    parsed = sequencer.parse(ids[:cut])
    assert not parsed.complete and parsed.problem
    assert parsed.document.segments == document.segments[: len(parsed.document.segments)]
    place = data.draw(st.integers(0, len(ids) - 1))
    wrong = ids.copy()
    wrong[place] = data.draw(st.integers(-5, VOCABULARY.size + 5))
    sequencer.parse(wrong)  # must not raise, whatever comes out


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(290, 500), max_size=40))
def test_parse_never_raises(ids: list[int]) -> None:
    Sequencer(VOCABULARY, LAYOUTS[1]).parse(np.array(ids, dtype=np.int64))


def test_dropped_inputs_leave_one_token() -> None:
    sequencer = Sequencer(VOCABULARY, LAYOUTS[0])
    text = Segment("text", Codes(np.array([[5, 6, 7]]), "text"))
    picture = Segment("image", Codes(np.array([[1]]), "image", (1, 1)), target=True)
    ids = sequencer.build(Document((text, picture), "depict"), drop_inputs=True).ids_S.tolist()
    control = VOCABULARY.control
    assert ids[:4] == [control("bos"), control("depict"), control("drop"), control("target")]
    assert not set(ids) & {5, 6, 7}
    prompt = sequencer.prompt(Document((text,), "depict"), drop_inputs=True).tolist()
    assert prompt == ids[:4]


def test_prompt_is_the_beginning_of_the_built_sequence() -> None:
    sequencer = Sequencer(VOCABULARY, LAYOUTS[0])
    text = Segment("text", Codes(np.array([[5, 6, 7]]), "text"))
    picture = Segment("image", Codes(np.array([[1]]), "image", (1, 1)), target=True)
    prompt = sequencer.prompt(Document((text,), "depict"))
    built = sequencer.build(Document((text, picture), "depict")).ids_S
    assert built[: len(prompt)].tolist() == prompt.tolist()


def test_documents_without_target_or_with_foreign_codes_are_refused() -> None:
    sequencer = Sequencer(VOCABULARY, LAYOUTS[0])
    text = Segment("text", Codes(np.array([[5]]), "text"))
    with pytest.raises(DataError, match="target"):
        sequencer.build(Document((text,)))
    with pytest.raises(DataError, match="unknown task"):
        sequencer.build(Document((Segment("text", text.content, True),), "sing"))
    with pytest.raises(DataError, match=r"image\.0"):
        big = Segment("image", Codes(np.array([[64]]), "image", (1, 1)), True)
        sequencer.build(Document((big,)))
    with pytest.raises(DataError, match="numbers end at 255"):
        sequencer.build(Document((Segment("image", Codes(np.zeros((1, 256), int), "image", (256, 1)), True),)))


def test_default_tasks() -> None:
    assert default_task(("image",), "text") == "caption"
    assert default_task(("audio",), "text") == "transcribe"
    assert default_task(("text",), "audio") == "speak"
    assert default_task(("image", "image"), "text") == "caption"
    assert default_task(("image", "text"), "text") == "answer"
    assert default_task(("text",), "text") == "continue"
    assert default_task(("image", "text"), "region") == "locate"


def test_layout_round_trip_and_faults() -> None:
    layout = LAYOUTS[3]
    assert Layout.from_json(layout.to_json()) == layout
    for change in ({"max_side": 0}, {"max_side": 300}, {"audio_order": "odd"}, {"native_grid_hw": 3}, {"new": 1}):
        with pytest.raises(CheckpointError):
            Layout.from_json({**layout.to_json(), **change})


@settings(max_examples=150, deadline=None)
@given(documents())
def test_the_grammar_accepts_everything_that_build_writes(document: Document) -> None:
    """What training shows the model, sampling must be able to say."""
    sequencer = Sequencer(VOCABULARY, LAYOUTS[0])
    answer = Document(tuple(s for s in document.segments if s.target), document.task)
    if any(s.codes.num_steps == 0 for s in answer.segments):
        return  # the grammar asks for at least one code; training data have them
    prompt = sequencer.prompt(Document((), document.task))
    ids = sequencer.build(answer).ids_S[len(prompt) :]
    plan = Plan(tuple(Block(s.modality) for s in answer.segments))
    walk = Grammar(sequencer).start(plan, budget=len(ids) + 1000)  # room for native shapes of what follows
    for id in ids:
        walk.push(int(id))
    assert walk.done


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 10**6), st.booleans())
def test_holes_are_written_in_place_of_codes_and_read_back(
    layout: Layout, rows: int, columns: int, seed: int, is_sound: bool
) -> None:
    sequencer, random = Sequencer(VOCABULARY, layout), np.random.default_rng(seed)
    modality: Any = "audio" if is_sound else "image"
    order = layout.orders[modality]
    codes_KT = random.integers(0, 32, (order.num_kept, rows * columns))
    codes = Codes(codes_KT, modality, None if is_sound else (rows, columns))
    holed = Holed(codes, random.random(codes_KT.shape) < 0.5)
    document = Document((Segment(modality, holed), Segment(modality, codes, target=True)), "infill")
    sequence = sequencer.build(document)
    hole = VOCABULARY.control("hole")
    assert (sequence.ids_S == hole).sum() == (~holed.known_KT).sum()
    assert not (sequence.ids_S[sequence.target_S] == hole).any()
    parsed = sequencer.parse(sequence.ids_S)
    expected = (
        document if not holed.known_KT.all() else Document((Segment(modality, codes), document.segments[1]), "infill")
    )
    assert parsed.complete and parsed.document == expected


def test_holes_belong_into_inputs_and_need_a_vocabulary_that_has_them() -> None:
    sequencer = Sequencer(VOCABULARY, LAYOUTS[0])
    codes = Codes(np.array([[1, 2]]), "image", (1, 2))
    holed = Holed(codes, np.array([[True, False]]))
    assert holed == Holed(Codes(np.array([[1, 9]]), "image", (1, 2)), holed.known_KT) != Holed(codes, ~holed.known_KT)
    parsed = sequencer.parse(sequencer.build(Document((Segment("image", holed, target=True),), "infill")).ids_S)
    assert not parsed.complete and "ids of another kind" in str(parsed.problem)
    older = Sequencer(dataclasses.replace(VOCABULARY, control_names=CONTROL[: CONTROL.index("infill")]), LAYOUTS[0])
    assert older.parse(older.build(Document((Segment("image", codes, target=True),), "depict")).ids_S).complete
    for document in (Document((Segment("image", holed),)), Document((), "infill")):
        with pytest.raises(DataError, match="before there was one"):
            older.prompt(document)
