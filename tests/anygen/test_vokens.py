"""Voken blocks: sequences, grammar, packing, loss, and the hidden states at them: cached as in teacher forcing."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from anygen.api import AnyGen
from anygen.data.coded import CodedRecord
from anygen.data.tasks import Direction
from anygen.documents import Document, Segment, Vokens
from anygen.errors import DataError, InputError
from anygen.grammar import Block, Grammar, Plan
from anygen.layout import Layout
from anygen.model.loss import LossWeights
from anygen.packing import collate, split_long
from anygen.sampling.choose import SamplingOptions
from anygen.sampling.sampler import SampleState, sample
from anygen.sequence import Sequencer
from anygen.vocabulary import Vocabulary
from tokenizers_mm.codes import Codes

WORDS = [np.array([[5, 6, 7]]), np.array([[9]]), np.array([[11, 12, 13, 14, 15, 16, 17]])]


def document_of(text: np.ndarray, *, after: bool = False) -> Document:
    segments = [Segment("text", Codes(text, "text")), Segment("image", Vokens(), True)]
    if after:
        segments += [Segment("text", Codes(text, "text"), True), Segment("image", Vokens(), True)]
    return Document(tuple(segments), "depict")


# -- sequences


def test_a_voken_block_is_written_and_read(sequencer: Sequencer, vocabulary: Vocabulary) -> None:
    document = document_of(WORDS[0], after=True)
    sequence = sequencer.build(document)
    r, control = vocabulary.range("voken"), vocabulary.control
    block = [control("voken"), *range(r.start, r.stop), control("/voken")]
    start, stop = sequence.media_spans[0]
    assert sequence.ids_S[start:stop].tolist() == block and r.size == 4
    parsed = sequencer.parse(sequence.ids_S)
    assert parsed.complete and parsed.document == document
    assert [segment.modality for segment in parsed.document.segments] == ["text", "image", "text", "image"]


@pytest.mark.parametrize("wrong", ["order", "missing", "foreign"])
def test_anything_but_all_vokens_in_order_is_refused(sequencer: Sequencer, vocabulary: Vocabulary, wrong: str) -> None:
    ids = sequencer.build(document_of(WORDS[0])).ids_S.tolist()
    first = ids.index(vocabulary.range("voken").start)
    if wrong == "order":
        ids[first : first + 2] = ids[first + 1], ids[first]
    elif wrong == "missing":
        del ids[first + 3]
    else:
        ids[first + 1] = vocabulary.range("image.0").start
    parsed = sequencer.parse(np.array(ids))
    assert not parsed.complete and parsed.problem and "voken" in parsed.problem
    assert len(parsed.document.segments) == 1


def test_a_vocabulary_without_vokens_says_so() -> None:
    vocabulary = Vocabulary.create(text=300, image=(1, 64))
    sequencer = Sequencer(vocabulary, Layout())
    with pytest.raises(DataError, match="no range 'voken'"):
        sequencer.build(document_of(WORDS[0]))
    with pytest.raises(InputError, match="no vokens"):
        Grammar(sequencer).start(Plan((Block("image", as_vokens=True),)), 100)
    ids = [vocabulary.control("target"), vocabulary.control("voken"), 5]
    assert "no range 'voken'" in str(sequencer.parse(np.array(ids)).problem)


def test_packing_never_cuts_a_voken_block_and_the_loss_is_on_the_decision_alone(
    sequencer: Sequencer, vocabulary: Vocabulary
) -> None:
    sequence = sequencer.build(document_of(WORDS[2], after=True))
    for piece in split_long(sequence, 12):
        assert all(piece.ids_S[a] == vocabulary.control("voken") for a, _ in piece.media_spans[:1] if a)
        assert len(piece) <= 12
    assert sum(len(piece.media_spans) for piece in split_long(sequence, 12)) == 2
    packed = collate([[sequence]], 64, pad_id=vocabulary.control("pad"))
    batch = LossWeights(vocabulary, {}, inputs=0.0).batch(packed)
    learned = packed.labels_T[batch.weights_T.numpy() > 0].tolist()
    control = vocabulary.control
    text = [control("text"), *WORDS[2][0].tolist(), control("/text")]
    assert learned == [control("voken"), *text, control("voken"), control("eos")]


def test_a_direction_writes_pictures_as_vokens() -> None:
    picture = Codes(np.array([[1, 2, 3, 4]]), "image", (2, 2))
    record = CodedRecord("a", "emoji", ("a cat",), picture)
    document = Direction.parse("emoji:text>voken").document(record, random.Random(0))
    assert document.task == "depict" and document.segments[1].modality == "image" and document.segments[1].target
    content = document.segments[1].content
    assert isinstance(content, Vokens) and content.picture == picture
    asked = Direction.parse("voken>text").document(record, random.Random(0))
    assert asked.task == "caption" and isinstance(asked.segments[0].content, Vokens)


# -- sampling


def states_of(sequencer: Sequencer, blocks: tuple[Block, ...], *, guidance: float, free: bool = False) -> list[Any]:
    grammar = Grammar(sequencer)
    options = {
        name: SamplingOptions(guidance_scale=guidance) for name in ("text", "image", "audio", "region", "control")
    }
    states = []
    for place, words in enumerate(WORDS):
        document = Document((Segment("text", Codes(words, "text")),), "depict")
        states.append(
            SampleState(
                sequencer.prompt(document),
                sequencer.prompt(document, drop_inputs=True),
                grammar.start(Plan(blocks[: 1 + place] if not free else blocks, free), 60),
                options,
                torch.Generator().manual_seed(place),
            )
        )
    return states


def forced_states(model: Any, sequences: list[np.ndarray], vocabulary: Vocabulary) -> list[torch.Tensor]:
    """Hidden states at the vokens in one packed forward pass of training, block by block."""
    from anygen.model.segments import Segments

    ids = torch.from_numpy(np.concatenate(sequences))
    positions = torch.cat([torch.arange(len(s)) for s in sequences])
    segments = Segments(tuple(len(s) for s in sequences), torch.device("cpu"))
    with torch.no_grad():
        hidden = model.model(ids[None], position_ids=positions[None], segments=segments, use_cache=False)
    r = vocabulary.range("voken")
    at = (ids >= r.start) & (ids < r.stop)
    return list(hidden.last_hidden_state[0][at].unflatten(0, (-1, r.size)))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_states_of_cached_generation_are_those_of_teacher_forcing(
    model: AnyGen, sequencer: Sequencer, vocabulary: Vocabulary, guidance: float
) -> None:
    """Batched with different prompts and plans, one and several voken blocks, at different positions; then packed."""
    picture = Block("image", as_vokens=True)
    states = states_of(sequencer, (picture, Block("text"), picture), guidance=guidance)
    for _ in sample(model.engine, states):
        pass
    assert [len(state.vokens) for state in states] == [1, 1, 2]
    sequences = [np.concatenate([state.prompt, state.ids]) for state in states]
    expected = forced_states(model.bundle.model, sequences, vocabulary)
    found = [tensor for state in states for tensor in state.vokens]
    assert len({tensor.sum().item() for tensor in found}) == 4, "each depends on what came before it"
    for one, other in zip(found, expected, strict=True):
        assert one.shape == (4, model.bundle.model.config.hidden_size)
        assert (one - other).abs().max() < 1e-5
    alone = states_of(sequencer, (picture, Block("text"), picture), guidance=guidance)[2]
    for _ in sample(model.engine, [alone]):
        pass
    assert alone.ids == states[2].ids
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(alone.vokens, states[2].vokens, strict=True))


def test_vokens_are_read_in_one_pass_and_told_one_by_one(
    model: AnyGen, sequencer: Sequencer, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {"step": 0, "extend": 0}
    for name in calls:
        plain = getattr(model.engine, name)

        def counted(*arguments: Any, _plain: Any = plain, _name: str = name) -> Any:
            calls[_name] += 1
            return _plain(*arguments)

        monkeypatch.setattr(model.engine, name, counted)
    state = states_of(sequencer, (Block("image", as_vokens=True),), guidance=1.0)[0]
    told = [pair for pairs in sample(model.engine, [state]) for pair in pairs]
    assert [id for _, id in told] == state.ids and state.walk.done
    assert calls == {"step": 0, "extend": 1}, "one window of the block; its end is forced, so nothing has to be read"


def test_a_free_answer_may_hold_vokens(sequencer: Sequencer, model: AnyGen) -> None:
    blocks = (Block("text"), Block("image", as_vokens=True), Block("audio"))
    states = states_of(sequencer, blocks, guidance=1.0, free=True)
    for _ in sample(model.engine, states):
        pass
    for state in states:
        parsed = sequencer.parse(np.array([sequencer.vocabulary.control("target"), *state.ids]))
        assert parsed.complete
        assert len(state.vokens) == sum(isinstance(s.content, Vokens) for s in parsed.document.segments)
