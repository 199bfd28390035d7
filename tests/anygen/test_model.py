"""The model: packed equals alone; nothing leaks; it starts near uniform and is reproducible."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from anygen.errors import ConfigError
from anygen.model.causal import ModelConfig, create_model, qwen3_config
from anygen.model.segments import Segments
from anygen.packing import collate
from anygen.sequence import Sequence
from anygen.vocabulary import Vocabulary

CPU = torch.device("cpu")


def packed_logits(model: Any, documents: list[np.ndarray]) -> torch.Tensor:
    rows = [Sequence(d, np.ones(len(d), bool), ()) for d in documents]
    batch = collate([rows], sum(len(d) for d in documents), pad_id=0)
    return model(
        input_ids=torch.from_numpy(batch.ids_T)[None],
        position_ids=torch.from_numpy(batch.positions_T)[None],
        segments=Segments(batch.lengths, CPU),
        use_cache=False,
    ).logits[0]


def random_documents(vocabulary: Vocabulary, lengths: tuple[int, ...]) -> list[np.ndarray]:
    generator = np.random.default_rng(3)
    return [generator.integers(0, vocabulary.used, length) for length in lengths]


def test_packed_logits_equal_those_of_each_document_alone(tiny_model: Any, vocabulary: Vocabulary) -> None:
    documents = random_documents(vocabulary, (7, 1, 40, 23, 64))
    packed = packed_logits(tiny_model, documents)
    at = 0
    for document in documents:
        alone = packed_logits(tiny_model, [document])
        assert (packed[at : at + len(document)] - alone).abs().max() < 1e-5
        at += len(document)


def test_packed_logits_equal_transformers_own_attention(tiny_model: Any, vocabulary: Vocabulary) -> None:
    import copy

    (document,) = random_documents(vocabulary, (50,))
    reference = copy.deepcopy(tiny_model)
    reference.set_attn_implementation("eager")
    expected = reference(input_ids=torch.from_numpy(document)[None], use_cache=False).logits[0]
    assert (packed_logits(tiny_model, [document]) - expected).abs().max() < 1e-5


def test_no_gradient_reaches_later_ids_or_other_documents(tiny_model: Any, vocabulary: Vocabulary) -> None:
    lengths = (9, 14, 5)
    ids = torch.from_numpy(np.concatenate(random_documents(vocabulary, lengths)))
    embedded = tiny_model.model.embed_tokens(ids).detach()[None].requires_grad_()
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    out = tiny_model(
        inputs_embeds=embedded, position_ids=positions, segments=Segments(lengths, CPU), use_cache=False
    ).logits[0]
    start = 0
    for length in lengths:
        for t in range(start, start + length):
            (gradient,) = torch.autograd.grad(out[t].square().sum(), embedded, retain_graph=True)
            reached = gradient[0].abs().sum(-1) > 0
            assert reached[start : t + 1].all(), "an id must see every earlier one of its document"
            assert not reached[:start].any() and not reached[t + 1 :].any(), "exactly zero elsewhere"
        start += length


def test_model_starts_near_uniform_and_is_reproducible(vocabulary: Vocabulary) -> None:
    config = ModelConfig(size="smoke")
    state = torch.get_rng_state()
    first, second = (create_model(config, vocabulary, seed=5) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state()), "the global random state is not touched"
    for left, right in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(left, right)
    logits = packed_logits(first, random_documents(vocabulary, (30,)))
    labels = torch.randint(0, vocabulary.used, (30,), generator=torch.Generator().manual_seed(0))
    assert abs(F.cross_entropy(logits, labels).item() - np.log(vocabulary.size)) < 0.3


def test_config_dial_and_overrides(vocabulary: Vocabulary) -> None:
    config = qwen3_config(ModelConfig(size="nano", num_layers=3), vocabulary)
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (320, 3, vocabulary.size)
    with pytest.raises(ConfigError, match="multiple of num_kv_heads"):
        qwen3_config(ModelConfig(num_heads=5, num_kv_heads=2), vocabulary)
