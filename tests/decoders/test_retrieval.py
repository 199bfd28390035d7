"""Retrieve or draw: the right picture is found, the decision is learned, and what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from decoders.retrieval import DRAW, RETRIEVE, Draw, PictureIndex, RetrievalHead, Retrieved
from tokenizers_mm.errors import CheckpointError, InputError

KEYS = [f"picture {i}" for i in range(12)]
HIDDEN, VOKENS, WIDTH = 16, 4, 10


def toy_set(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States and features that hold the same six facts in ways of their own; the first state's first number decides."""
    generator = torch.Generator().manual_seed(seed)
    facts = torch.randn(12, 6, generator=torch.Generator().manual_seed(99))
    to_states, to_pictures = (
        torch.randn(6, width, generator=torch.Generator().manual_seed(width)) for width in (HIDDEN, WIDTH)
    )
    states = (facts @ to_states)[:, None] + 0.3 * torch.randn(12, VOKENS, HIDDEN, generator=generator)
    labels = torch.randint(2, (12,), generator=generator)
    states[:, 0, 0] = 6.0 * (labels * 2 - 1)
    return states, facts @ to_pictures, labels


def head_of(seed: int = 0, **sizes: Any) -> RetrievalHead:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return RetrievalHead(**({"hidden_dim": HIDDEN, "picture_dim": WIDTH, "embed_dim": 8} | sizes))


@pytest.fixture(scope="module")
def trained() -> RetrievalHead:
    head = head_of()
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # dropout
        for step in range(150):
            states, features, labels = toy_set(step)
            loss = head.contrastive_loss(states, features) + head.decision_loss(states, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return head.eval()


def test_the_picture_that_is_meant_is_found_in_states_never_seen(trained: RetrievalHead) -> None:
    states, features, _ = toy_set(10_000)
    index = trained.index(features, KEYS)
    found = trained.rank(states, index).argmax(1)
    assert (found == torch.arange(12)).float().mean() >= 0.9
    untrained = head_of(1)
    assert (untrained.rank(states, untrained.index(features, KEYS)).argmax(1) == torch.arange(12)).float().mean() < 0.5


def test_the_decision_follows_the_rule_that_it_was_shown(trained: RetrievalHead) -> None:
    states, features, labels = toy_set(20_000)
    answers = trained.choose(states, trained.index(features, KEYS))
    for number, (answer, label) in enumerate(zip(answers, labels.tolist(), strict=True)):
        if label == DRAW:
            assert isinstance(answer, Draw) and answer.probability > 0.5
        else:
            assert isinstance(answer, list) and answer[0].probability > 0.5 and isinstance(answer[0], Retrieved)
            assert answer[0].key == KEYS[number]


def test_best_and_threshold(trained: RetrievalHead) -> None:
    states, features, _ = toy_set(3)
    index = trained.index(features, KEYS)
    always = trained.choose(states, index, threshold=0.0, best=5)
    for answer in always:
        assert isinstance(answer, list) and len(answer) == 5
        scores = [found.similarity for found in answer]
        assert scores == sorted(scores, reverse=True) and -1.001 <= scores[-1] <= scores[0] <= 1.001
    assert all(isinstance(answer, Draw) for answer in trained.choose(states, index, threshold=1.01))
    empty = trained.index(features[:0], [])
    assert all(isinstance(answer, Draw) for answer in trained.choose(states, empty, threshold=0.0))
    assert len(trained.choose(states, trained.index(features[:2], KEYS[:2]), threshold=0.0, best=9)[0]) == 2  # type: ignore[arg-type]


def test_a_decision_does_not_fall_by_dropout() -> None:
    head, (states, features, _) = head_of().train(), toy_set()
    index = head.index(features, KEYS)
    assert head.choose(states, index, threshold=0.0) == head.choose(states, index, threshold=0.0)
    assert head.training, "and the head is left as it was"


def test_the_contrastive_loss_is_infonce_in_both_directions() -> None:
    head, (states, features, _) = head_of(), toy_set()
    with torch.no_grad():
        logits = head.log_scale.exp() * head.queries(states) @ head.pictures(features).T
        there, back = logits.log_softmax(1).diagonal().mean(), logits.log_softmax(0).diagonal().mean()
        assert torch.allclose(head.contrastive_loss(states, features), -(there + back) / 2, atol=1e-5)
        assert head.log_scale.exp().item() == pytest.approx(1 / 0.07)
        head.log_scale += 10
        capped = 100 * head.queries(states) @ head.pictures(features).T
        expected = torch.nn.functional.cross_entropy(capped, torch.arange(12))
        expected = (expected + torch.nn.functional.cross_entropy(capped.T, torch.arange(12))) / 2
        assert torch.allclose(head.contrastive_loss(states, features), expected, rtol=1e-4)


def test_rows_of_the_same_picture_are_no_negatives_of_each_other() -> None:
    head, (states, features, _) = head_of(), toy_set()
    few = states[[0, 0, 1]], features[[0, 0, 1]]
    logits = (1 / 0.07) * (head.queries(few[0]) @ head.pictures(few[1]).T).detach()
    pairs = [logits[[0, 2]][:, [0, 2]], logits[[1, 2]][:, [1, 2]]]  # each of the equal rows meets the third row alone
    rows = [pairs[0].log_softmax(1)[0, 0], pairs[1].log_softmax(1)[0, 0], logits.log_softmax(1)[2, 2]]
    columns = [pairs[0].log_softmax(0)[0, 0], pairs[1].log_softmax(0)[0, 0], logits.log_softmax(0)[2, 2]]
    found = head.contrastive_loss(*few, torch.tensor([7, 7, 3]))
    assert torch.allclose(found, -torch.stack(rows + columns).mean(), atol=1e-5)
    assert head.contrastive_loss(*few) > found + 0.01
    assert torch.equal(head.contrastive_loss(*few, torch.arange(3)), head.contrastive_loss(*few))


def test_an_open_decision_teaches_nothing() -> None:
    head, (states, _, _) = head_of(drop=0.0), toy_set()
    labels = torch.tensor([RETRIEVE, DRAW] + [-100] * 10)
    assert torch.allclose(head.decision_loss(states, labels), head.decision_loss(states[:2], labels[:2]))
    loss = head.decision_loss(states, torch.full((12,), -100))
    loss.backward()
    assert loss.item() == 0 and head.decision[1].weight.grad.abs().sum() == 0


def test_head_and_index_come_back_equal(trained: RetrievalHead, tmp_path: Path) -> None:
    states, features, _ = toy_set(5)
    index = trained.index(features, [*KEYS[:-1], "\u00fc\u2028 key"])
    trained.save(tmp_path / "head")
    index.save(tmp_path / "pictures.safetensors")
    assert sorted(p.name for p in (tmp_path / "head").iterdir()) == ["config.json", "model.safetensors"]
    head, again = RetrievalHead.load(tmp_path / "head"), PictureIndex.load(tmp_path / "pictures.safetensors")
    assert again.keys == index.keys and torch.equal(again.embeds_IE, index.embeds_IE)
    assert torch.equal(head.rank(states, again), trained.rank(states, index))
    assert head.choose(states, again) == trained.choose(states, index)


def test_an_index_of_another_size_or_head_is_refused(trained: RetrievalHead) -> None:
    states, features, _ = toy_set()
    with pytest.raises(InputError, match="embeddings of 6, this head's have 8"):
        trained.rank(states, head_of(embed_dim=6).index(features, KEYS))
    with pytest.raises(InputError, match="another head"):
        trained.choose(states, head_of(7).index(features, KEYS))
    with pytest.raises(InputError, match="11 keys"):
        trained.index(features, KEYS[:-1])
    with pytest.raises(InputError, match="features of 10"):
        trained.index(features[:, :4], KEYS)


def test_damaged_files_are_told(trained: RetrievalHead, tmp_path: Path) -> None:
    trained.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"embed_dim": 9}))
    with pytest.raises(CheckpointError, match="retrieval head"):
        RetrievalHead.load(tmp_path)
    with pytest.raises(CheckpointError, match="retrieval head"):
        RetrievalHead.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="not an index"):
        PictureIndex.load(tmp_path / "model.safetensors")
    (tmp_path / "cut").write_bytes((tmp_path / "model.safetensors").read_bytes()[:50])
    with pytest.raises(CheckpointError, match="not an index"):
        PictureIndex.load(tmp_path / "cut")
