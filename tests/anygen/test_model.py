"""Attention rooms agree; packed equals alone; nothing leaks; the loss is the plain loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from anygen.documents import Document, Segment
from anygen.errors import ConfigError
from anygen.model.attention import Segments, attend, attend_sdpa, block_diagonal_bias
from anygen.model.causal import ModelConfig, create_model, qwen3_config
from anygen.model.loss import LossWeights, NextTokenLoss
from anygen.packing import collate
from anygen.sequence import Sequence, Sequencer
from anygen.vocabulary import Vocabulary
from tokenizers_mm.codes import Codes

CPU = torch.device("cpu")


def dense_attention(q: Any, k: Any, v: Any, lengths: tuple[int, ...]) -> torch.Tensor:
    """The slow, obvious reference, in fp64."""
    heads, groups = q.shape[1], k.shape[1]
    k, v = (x.repeat_interleave(heads // groups, dim=1) for x in (k, v))
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(len(document))
    visible = (document[:, None] == document[None]) & (place[:, None] >= place[None])
    scores = torch.einsum("qhd,khd->hqk", q.double(), k.double()) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v.double())


def random_qkv(total: int, heads: int, groups: int, width: int, *, grad: bool = False) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(total, heads, width), (total, groups, width), (total, groups, width)]
    return [torch.randn(shape, generator=generator).requires_grad_(grad) for shape in shapes]


LENGTHS = [(1,), (5,), (1, 1, 1), (3, 33, 7, 1, 64), (31, 32, 33), (100, 2)]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 1), (6, 2)])
@pytest.mark.parametrize("grad", [False, True])
def test_sdpa_room_equals_dense_attention(lengths: tuple[int, ...], heads: int, groups: int, grad: bool) -> None:
    q, k, v = random_qkv(sum(lengths), heads, groups, 8, grad=grad)
    out = attend(q, k, v, Segments(lengths, CPU))
    expected = dense_attention(q, k, v, lengths)
    assert (out.double() - expected).abs().max() < 2e-6
    if grad:
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        ours = torch.autograd.grad((out * weight).sum(), (q, k, v), retain_graph=True)
        theirs = torch.autograd.grad((expected * weight).sum(), (q, k, v))
        for left, right in zip(ours, theirs, strict=True):
            assert (left - right).abs().max() < 1e-5


@pytest.mark.parametrize("lengths", LENGTHS)
def test_sdpa_room_equals_the_mask_of_xformers(lengths: tuple[int, ...]) -> None:
    """The xformers room computes softmax(q k' + bias) v; the bias, made visible, must be the mask we compute with."""
    pytest.importorskip("xformers", reason="xformers is not installed: its mask cannot be compared")
    q, k, v = random_qkv(sum(lengths), 4, 2, 8)
    bias = block_diagonal_bias(lengths).materialize((sum(lengths), sum(lengths)))
    k4, v4 = (x.repeat_interleave(2, dim=1) for x in (k, v))
    expected = F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q, k4, v4)), attn_mask=bias)
    out = attend_sdpa(q, k, v, Segments(lengths, CPU))
    assert (out - expected[0].transpose(0, 1)).abs().max() < 2e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("lengths", LENGTHS)
def test_xformers_room_equals_sdpa_room_on_a_gpu(lengths: tuple[int, ...]) -> None:
    from anygen.model.attention import attend_xformers, find_xformers

    if find_xformers() is None:
        pytest.skip("xformers is not usable here")
    device = torch.device("cuda")
    q, k, v = (x.to(device, torch.bfloat16) for x in random_qkv(sum(lengths), 4, 2, 64))
    segments = Segments(lengths, device)
    expected = attend_sdpa(q, k, v, segments)
    assert (attend_xformers(q, k, v, segments) - expected).abs().max() < 2e-2
    assert (attend_xformers(q.float(), k.float(), v, segments) - expected).abs().max() < 2e-2, "as under autocast"


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


def test_loss_is_the_weighted_plain_loss_with_shifted_z_loss(tiny_model: Any, sequencer: Sequencer) -> None:
    vocabulary = sequencer.vocabulary
    text = Segment("text", Codes(np.array([[5, 6, 7]]), "text"))
    picture = Segment("image", Codes(np.array([[1, 2, 3, 4]]), "image", (2, 2)), target=True)
    given = Segment("image", Codes(np.array([[4, 3, 2, 1]]), "image", (2, 2)))
    answer = Segment("text", Codes(np.array([[8, 9]]), "text"), target=True)
    documents = [Document((text, picture), "depict"), Document((given, answer), "caption")]
    sequences = [sequencer.build(document) for document in documents]
    packed = collate([sequences], 64, pad_id=0)
    weights = {"image": 0.5, "control": 2.0}
    batch = LossWeights(vocabulary, weights, inputs=0.25).batch(packed)
    loss, report = NextTokenLoss(tiny_model, vocabulary, z_loss=1e-2)(batch)

    logits = packed_logits(tiny_model, [s.ids_S for s in sequences]).double()
    total, weight_sum, image_nll, at = 0.0, 0.0, [], 0
    for sequence in sequences:
        for place in range(len(sequence) - 1):
            label = int(sequence.ids_S[place + 1])
            group = vocabulary.ranges[int(vocabulary.range_index(np.array([label]))[0])].group
            weight = weights.get(group, 1.0) * (1.0 if sequence.target_S[place + 1] else 0.25)
            log_z = logits[at + place].logsumexp(-1)
            nll = log_z - logits[at + place, label]
            total += weight * (nll + 1e-2 * log_z**2)
            weight_sum += weight
            if group == "image" and sequence.target_S[place + 1]:
                image_nll.append(nll.item())
        at += len(sequence)
    assert loss.item() == pytest.approx((total / weight_sum).item(), rel=1e-5)
    assert float(report["image_nats"]) == pytest.approx(float(np.mean(image_nll)), rel=1e-5)
    assert torch.isnan(report["audio_nats"]), "a modality that a batch lacks is not reported as zero"


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
