"""Walks always end, in budget, in something that parses."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anygen.documents import Document
from anygen.errors import InputError
from anygen.grammar import Block, Grammar, Plan
from anygen.layout import Layout
from anygen.sequence import Sequencer
from anygen.vocabulary import Vocabulary
from tokenizers_mm.codes import Modality

VOCABULARY = Vocabulary.create(text=300, image=(1, 64), audio=(2, 32), region=100)
LAYOUT = Layout(
    audio_codebooks=2, audio_order="delay", native_grid_hw=(3, 3), max_side=12, native_frames=20, max_frames=700
)
SEQUENCER = Sequencer(VOCABULARY, LAYOUT)
GRAMMAR = Grammar(SEQUENCER)
MODALITIES = ("text", "image", "audio", "region")


def random_walk(plan: Plan, budget: int, random: np.random.Generator) -> list[int]:
    walk = GRAMMAR.start(plan, budget)
    ids: list[int] = []
    while not walk.done:
        assert walk.allowed, "a walk that is not done allows something"
        assert all(start < stop for start, stop in walk.allowed)
        assert list(walk.allowed) == sorted(walk.allowed)
        choices = np.concatenate([np.arange(start, stop) for start, stop in walk.allowed])
        ids.append(int(random.choice(choices)))
        walk.push(ids[-1])
        assert len(ids) <= budget
    return ids


plans = st.builds(
    lambda names, free: Plan(tuple(Block(n) for n in names), free),
    st.lists(st.sampled_from(MODALITIES), min_size=1, max_size=4),
    st.booleans(),
)


@settings(max_examples=300, deadline=None)
@given(plans, st.integers(0, 200), st.integers(0, 10**6))
def test_every_walk_ends_in_budget_and_parses(plan: Plan, slack: int, seed: int) -> None:
    budget = GRAMMAR.smallest_budget(plan) + slack
    ids = random_walk(plan, budget, np.random.default_rng(seed))
    parsed = SEQUENCER.parse(np.array([VOCABULARY.control("target"), *ids]))
    assert parsed.complete, parsed.problem
    names = tuple(segment.modality for segment in parsed.document.segments)
    if plan.free:
        assert names and set(names) <= {block.modality for block in plan.blocks}
    else:
        assert names == tuple(block.modality for block in plan.blocks)


def test_a_walk_knows_whether_the_budget_ended_it() -> None:
    letter, end, eos = VOCABULARY.range("text").start + 5, VOCABULARY.control("/text"), VOCABULARY.control("eos")

    def walk(plan: Plan, budget: int, ids: list[int]) -> bool:
        walk = GRAMMAR.start(plan, budget)
        for id in ids:
            walk.push(id)
        assert walk.done
        return walk.is_cut

    text = VOCABULARY.control("text")
    fixed, free = Plan((Block("text"),)), Plan((Block("text"),), free=True)
    assert not walk(fixed, 6, [text, letter, letter, end, eos])
    assert walk(fixed, 5, [text, letter, letter, end, eos]), "the third letter had no room"
    assert not walk(free, 12, [text, letter, end, eos])
    assert walk(free, 6, [text, letter, end, eos]), "a second text had no room"
    picture = Plan((Block("image"),))
    three, code = VOCABULARY.numbers.start + 3, VOCABULARY.range("image.0").start
    ids = [VOCABULARY.control("image"), three, three, *[code] * 9, VOCABULARY.control("/image"), eos]
    assert not walk(picture, len(ids), ids)
    small = [VOCABULARY.control("image"), three, three - 1, *[code] * 6, VOCABULARY.control("/image"), eos]
    assert walk(picture, len(ids) - 1, small), "the native 3 x 3 had no room"


@pytest.mark.parametrize("names", itertools.product(MODALITIES, repeat=2))
def test_the_smallest_budget_is_enough_and_one_less_is_refused(names: tuple[str, str]) -> None:
    plan = Plan(tuple(Block(n) for n in names))  # type: ignore[arg-type]
    budget = GRAMMAR.smallest_budget(plan)
    assert len(random_walk(plan, budget, np.random.default_rng(0))) == budget
    with pytest.raises(InputError, match=f"max_new_tokens={budget - 1} is too small"):
        GRAMMAR.start(plan, budget - 1)


@pytest.mark.parametrize(
    ("block", "grid", "num_codes"),
    [
        (Block("image", (2, 5)), (2, 5), 10),
        (Block("image", (12, 1)), (12, 1), 12),
        (Block("audio", (0, 1)), None, 1),
        (Block("audio", (1, 44)), None, 300),
        (Block("region", (4,)), None, 4),
    ],
)
def test_fixed_shapes_are_kept(block: Block, grid: tuple[int, int] | None, num_codes: int) -> None:
    ids = random_walk(Plan((block,)), 1000, np.random.default_rng(1))
    segment = SEQUENCER.parse(np.array([VOCABULARY.control("target"), *ids])).document.segments[0]
    assert segment.codes.grid_hw == grid and segment.codes.num_steps == num_codes


@pytest.mark.parametrize(
    "block",
    [Block("image", (13, 1)), Block("image", (0, 4)), Block("audio", (0, 0)), Block("audio", (2, 200)),
     Block("region", (3,)), Block("text", (1,)), Block("image", (4,))],
)  # fmt: skip
def test_impossible_shapes_are_refused(block: Block) -> None:
    with pytest.raises(InputError, match="cannot give"):
        GRAMMAR.start(Plan((block,)), 10_000)


def test_a_text_leaves_room_for_the_native_picture_behind_it() -> None:
    plan = Plan((Block("text"), Block("image")))
    for seed in range(50):
        walk, random = GRAMMAR.start(plan, 40), np.random.default_rng(seed)
        while walk.modality != "image":
            # never choose to close the text: the grammar must do it
            start, stop = walk.allowed[0]
            walk.push(int(random.integers(start, stop)))
        zero = VOCABULARY.numbers.start
        (rows,) = walk.allowed
        assert rows[1] - 1 - zero >= 3
        walk.push(zero + 3)
        (columns,) = walk.allowed
        assert columns[1] - 1 - zero >= 3


def test_vocabulary_without_sound_refuses_sound() -> None:
    grammar = Grammar(Sequencer(Vocabulary.create(text=300, image=(1, 4)), Layout()))
    with pytest.raises(InputError, match="no 'audio' output; it has text, image"):
        grammar.start(Plan((Block("audio"),)), 100)
    with pytest.raises(InputError, match="at least one output"):
        grammar.start(Plan(()), 100)


def test_text_never_contains_the_unknown_piece_or_any_other_range() -> None:
    walk = GRAMMAR.start(Plan((Block("text"),)), 50)
    walk.push(VOCABULARY.control("text"))
    assert walk.allowed == ((1, 300),)
    walk.push(17)
    end = VOCABULARY.control("/text")
    assert walk.allowed == ((1, 300), (end, end + 1))


@pytest.mark.parametrize("written", [1, 4, 7])
def test_a_text_before_the_answer_neither_gives_to_its_budget_nor_takes_from_it(written: int) -> None:
    plan = Plan((Block("text", ids_apart=9), Block("text")))
    walk, letter = GRAMMAR.start(plan, 6), VOCABULARY.text_ids[0][0]
    begin, end = VOCABULARY.control("text"), VOCABULARY.control("/text")
    for id in (begin, *[letter] * written, end, begin, *[letter] * 3):
        walk.push(id)
    assert walk.allowed == ((end, end + 1),), "6 ids: begin, three letters, end and the end of all"
    assert GRAMMAR.smallest_budget(plan) == 4 and walk.budget == 15
    full = GRAMMAR.start(plan, 6)
    for id in (begin, *[letter] * 7):
        full.push(id)
    assert full.allowed == ((end, end + 1),), "9 ids of its own: begin, seven letters and end"


def test_prompts_are_never_part_of_the_walk() -> None:
    prompt = SEQUENCER.prompt(Document((), "depict"))
    assert prompt.tolist() == [VOCABULARY.control(n) for n in ("bos", "depict", "target")]


@pytest.mark.parametrize(("modality", "shape", "count"), [("image", (3, 4), 12), ("audio", (0, 5), 10)])
def test_known_codes_are_the_only_ones_allowed_and_are_told_in_runs(
    modality: Modality, shape: tuple[int, ...], count: int
) -> None:
    ranges, random = SEQUENCER.body_ranges(modality, shape), np.random.default_rng(0)
    for share in (0.0, 0.3, 1.0):
        known = tuple(int(random.integers(r.start, r.stop)) if random.random() < share else -1 for r in ranges)
        plan = Plan((Block("text"), Block(modality, shape, known=known)))
        ids = random_walk(plan, GRAMMAR.smallest_budget(plan) + 7, random)
        body = ids[-2 - count : -2]
        assert all(k in (-1, id) for k, id in zip(known, body, strict=True))
        walk = GRAMMAR.start(plan, GRAMMAR.smallest_budget(plan) + 7)
        for place, id in enumerate(ids):
            at = place - (len(ids) - 2 - count)
            run = tuple(itertools.takewhile(lambda k: k >= 0, known[at:])) if at >= 0 else ()
            assert walk.forced == run
            walk.push(id)
