"""The loss equals the plain loss, with its gradients, in bounded memory; parts add up; slices are the sampler's."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from anygen.documents import Document, Segment
from anygen.grammar import Block, Grammar, Plan
from anygen.model.cross_entropy import Slice, cross_entropy
from anygen.model.loss import LossWeights, NextTokenLoss
from anygen.packing import collate, join
from anygen.sequence import Sequence, Sequencer
from tokenizers_mm.codes import Codes

P, D, V = 67, 5, 301


def given(dtype: torch.dtype = torch.float32, *, spread: float = 1.0) -> tuple[torch.Tensor, ...]:
    """Hidden states, head, labels and scales."""
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, D, generator=generator).to(dtype).requires_grad_() for n in (P, V))
    with torch.no_grad():
        hidden *= spread
    labels = torch.randint(0, V, (P,), generator=generator)
    return hidden, head, labels, torch.rand(P, generator=generator).to(dtype)


def plain(hidden: Any, head: Any, labels: Any, scales: Any, z_loss: float, mask: Any = None) -> torch.Tensor:
    logits = F.linear(hidden, head).float() if hidden.dtype != torch.float64 else F.linear(hidden, head)
    logits = logits if mask is None else logits.masked_fill(~mask, -torch.inf)
    nll = F.cross_entropy(logits, labels, reduction="none")
    return (scales * (nll + z_loss * logits.logsumexp(-1).square())).sum()


@pytest.mark.parametrize("max_logits", [1, 10 * V, 2**20])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("spread", [1.0, 20.0])
def test_it_equals_the_plain_loss_and_gradients(max_logits: int, z_loss: float, spread: float) -> None:
    hidden, head, labels, scales = given(spread=spread)
    result = cross_entropy(hidden, head, labels, scales, z_loss=z_loss, max_logits=max_logits)
    expected = plain(hidden, head, labels, scales, z_loss)
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    reference = torch.autograd.grad(3 * expected, (hidden, head))
    for left, right in zip(torch.autograd.grad(3 * result.loss, (hidden, head)), reference, strict=True):
        assert (left - right).abs().max() <= 1e-5 * right.abs().max()
    nll = F.cross_entropy(F.linear(hidden, head), labels, reduction="none")
    assert torch.allclose(result.nll_P, nll, rtol=1e-5, atol=1e-5) and not result.nll_P.requires_grad


def test_its_gradients_equal_finite_differences() -> None:
    hidden, head, labels, scales = (x[:7] if len(x) == P else x for x in given(torch.float64))
    slices = [Slice(torch.arange(3), 0, 301), Slice(torch.arange(3, 7), 0, 301)]
    assert torch.autograd.gradcheck(
        lambda h, w: cross_entropy(h, w, labels, scales, z_loss=1e-2, slices=slices, max_logits=2 * V).loss,
        (hidden, head),
        fast_mode=True,
    )


def test_under_autocast_it_is_as_near_to_the_truth_as_the_plain_loss() -> None:
    hidden, head, labels, scales = given()
    truth = torch.autograd.grad(plain(hidden, head, labels, scales, 1e-4), (hidden, head))
    with torch.autocast("cpu", torch.bfloat16):
        theirs = plain(hidden, head, labels, scales, 1e-4)
        ours = cross_entropy(hidden, head, labels, scales, z_loss=1e-4, max_logits=10 * V).loss
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-4)
    pairs = zip(*(torch.autograd.grad(loss, (hidden, head)) for loss in (ours, theirs)), truth, strict=True)
    for left, right, true in pairs:
        assert left.dtype == true.dtype
        assert (left - true).abs().max() <= 1.5 * (right - true).abs().max()


def test_nothing_to_predict_is_a_loss_of_zero() -> None:
    hidden, head, labels, scales = (x[:0] if len(x) == P else x for x in given())
    loss = cross_entropy(hidden, head, labels, scales, z_loss=1e-2).loss
    dhidden, dhead = torch.autograd.grad(loss, (hidden, head))
    assert loss.item() == 0 and dhidden.shape == (0, D) and dhead.shape == (V, D) and not dhead.any()


class _Watch(TorchDispatchMode):
    """Largest tensor that any operator returned, and how many products there were."""

    numel = 0
    num_products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.num_products += func is torch.ops.aten.mm.default
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_memory_is_bounded_forward_and_backward() -> None:
    """No tensor has more elements than a chunk of logits, or the head; what waits for the backward is P x D and V x D."""
    hidden, head, labels, scales = given()
    saved: list[int] = []

    def save(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel() * tensor.element_size())
        return tensor

    with _Watch() as watch, torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        loss = cross_entropy(hidden, head, labels, scales, z_loss=1e-2, max_logits=8 * V).loss
        loss.backward()
    assert watch.numel == 8 * V < P * V
    assert sum(saved) == 4 * (P * D + V * D)
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        plain(hidden, head, labels, scales, 1e-2)
    assert sum(saved) > 4 * P * V, "the plain loss keeps logits: the count above counts"


@pytest.mark.parametrize(("learns", "num_products"), [(True, 3), (False, 1)])
def test_nothing_is_computed_twice_and_validation_computes_no_gradients(learns: bool, num_products: int) -> None:
    hidden, head, labels, scales = given()
    with torch.set_grad_enabled(learns), _Watch() as watch:
        loss = cross_entropy(hidden, head, labels, scales, z_loss=0.0, max_logits=P * V // 2 + V).loss
        if learns:
            loss.backward()
    assert loss.requires_grad == learns and watch.num_products == 2 * num_products, "in two chunks"


# -- the loss of a model


def documents(sequencer: Sequencer) -> list[Sequence]:
    text = Segment("text", Codes(np.array([[5, 6, 7]]), "text"))
    picture = Segment("image", Codes(np.array([[1, 2, 3, 4]]), "image", (2, 2)), target=True)
    sound = Segment("audio", Codes(np.array([[1, 2, 3], [4, 5, 6]]), "audio"), target=True)
    box = Segment("region", Codes(np.array([[1, 2, 9, 9]]), "region"), target=True)
    given = Segment("image", Codes(np.array([[4, 3, 2, 1]]), "image", (2, 2)))
    answer = Segment("text", Codes(np.array([[8, 9]]), "text"), target=True)
    all_of_them = [(text, picture), (given, answer), (text, sound), (given, text, box)]
    return [sequencer.build(Document(segments, None)) for segments in all_of_them]


def plain_loss(
    model: Any, sequencer: Sequencer, sequences: list[Sequence], weights: dict[str, float], *, sliced: bool
) -> tuple[Any, Any, dict[str, Any]]:
    """Weighted sum, sum of weights, and nats of target ids by modality: a loop over every id, in fp64, each document alone."""
    vocabulary = sequencer.vocabulary
    total, weight_sum, nats = torch.zeros((), dtype=torch.float64), 0.0, {}
    for sequence in sequences:
        packed = collate([[sequence]], len(sequence), pad_id=0)
        batch = LossWeights(vocabulary, {}, inputs=1.0).batch(packed)
        logits = model(
            input_ids=batch.ids_T[None], position_ids=batch.positions_T[None], segments=batch.segments, use_cache=False
        ).logits[0]
        for place, label in enumerate(sequence.ids_S[1:].tolist()):
            (r,) = [r for r in vocabulary.ranges if r.start <= label < r.stop]
            allowed = torch.ones(vocabulary.size, dtype=torch.bool)
            if sliced and r.group in ("image", "audio", "region"):
                allowed = (torch.arange(vocabulary.size) >= r.start) & (torch.arange(vocabulary.size) < r.stop)
            row = logits[place].double().masked_fill(~allowed, -torch.inf)
            weight = weights.get(r.group, 1.0) * (1.0 if sequence.target_S[place + 1] else 0.25)
            nll = row.logsumexp(-1) - row[label]
            total = total + weight * (nll + 1e-2 * row.logsumexp(-1) ** 2)
            weight_sum += weight
            if sequence.target_S[place + 1]:
                nats.setdefault(r.group, []).append(nll.item())
    return total, weight_sum, nats


@pytest.mark.parametrize("sliced", [False, True])
def test_loss_is_the_weighted_plain_loss_with_shifted_z_loss(
    tiny_model: Any, sequencer: Sequencer, sliced: bool
) -> None:
    sequences = documents(sequencer)
    weights = {"image": 0.5, "control": 2.0}
    packed = collate([sequences], 128, pad_id=0)
    batch = LossWeights(sequencer.vocabulary, weights, inputs=0.25).batch(packed)
    module = NextTokenLoss(tiny_model, sequencer.vocabulary, z_loss=1e-2, sliced_softmax=sliced)
    loss, report = module(batch)
    total, weight_sum, nats = plain_loss(tiny_model, sequencer, sequences, weights, sliced=sliced)
    assert loss.item() == pytest.approx((total / weight_sum).item(), rel=1e-5)
    for group in ("text", "control", "image", "audio", "region"):
        assert float(report[f"{group}_nats"]) == pytest.approx(float(np.mean(nats[group])), rel=1e-5)
    assert torch.isnan(report["voken_nats"]), "a modality that a batch lacks is not reported as zero"
    assert float(report["utilisation"]) == pytest.approx(sum(map(len, sequences)) / 128) == packed.utilisation
    assert float(report["tokens"]) == 128
    parameters = list(tiny_model.parameters())
    theirs = torch.autograd.grad(total / weight_sum, parameters)
    for ours, right in zip(torch.autograd.grad(loss, parameters), theirs, strict=True):
        assert (ours - right).abs().max() <= 1e-5 * max(1.0, right.abs().max())


def test_slices_change_nothing_for_text(tiny_model: Any, sequencer: Sequencer) -> None:
    text = [Segment("text", Codes(np.array([[5, 6, 7]]), "text"), target=True)]
    packed = collate([[sequencer.build(Document(tuple(text), "continue"))]], 32, pad_id=0)
    batch = LossWeights(sequencer.vocabulary, {}, inputs=1.0).batch(packed)
    full, sliced = (
        NextTokenLoss(tiny_model, sequencer.vocabulary, z_loss=1e-2, sliced_softmax=s)(batch)[0] for s in (False, True)
    )
    assert torch.equal(full, sliced)
    full, sliced = (torch.autograd.grad(loss, tiny_model.lm_head.weight)[0] for loss in (full, sliced))
    assert torch.equal(full, sliced)


@pytest.mark.parametrize(("modality", "shape"), [("image", (2, 3)), ("audio", (0, 4)), ("region", (4,))])
def test_slices_are_what_the_grammar_allows(
    tiny_model: Any, sequencer: Sequencer, modality: Any, shape: tuple[int, ...]
) -> None:
    """Every step of an answer: a slice where the grammar allows exactly one range of codes, else the vocabulary."""
    module = NextTokenLoss(tiny_model, sequencer.vocabulary, z_loss=0.0, sliced_softmax=True)
    walk = Grammar(sequencer).start(Plan((Block(modality, shape),)), 60)
    num_codes = 0
    while not walk.done:
        is_code = walk.num_codes and walk.num_written < walk.num_codes
        allowed = walk.allowed
        num_codes += bool(is_code)
        for label in (allowed[0][0], allowed[-1][1] - 1):
            (used,) = [s for s in module._slices(torch.tensor([label])) or [] if len(s.positions)]
            assert (used.start, used.stop) == (allowed[0] if is_code else (0, sequencer.vocabulary.size))
        walk.push(allowed[0][0])
    assert num_codes == len(sequencer.body_ranges(modality, shape)) > 0


def test_parts_with_a_common_normaliser_add_up_to_the_whole(tiny_model: Any, sequencer: Sequencer) -> None:
    """As gradient accumulation and several processes need it."""
    model = copy.deepcopy(tiny_model)
    module = NextTokenLoss(model, sequencer.vocabulary, z_loss=1e-2)
    weights = LossWeights(sequencer.vocabulary, {"image": 3.0}, inputs=0.25)
    rows = [collate([[sequence]], 40, pad_id=0) for sequence in documents(sequencer)]
    whole, _ = module(weights.batch(join(rows)))
    parts = [weights.batch(row) for row in rows]
    normaliser = torch.stack([part.total_weight for part in parts]).sum()
    losses = [module(part.divided_by(normaliser).to(torch.device("cpu")))[0] for part in parts]
    assert torch.stack(losses).sum().item() == pytest.approx(whole.item(), rel=1e-6)
    assert torch.stack([module(part)[0] for part in parts]).mean().item() != pytest.approx(whole.item(), rel=1e-4)
    expected = torch.autograd.grad(whole, list(model.parameters()))
    for left, right in zip(torch.autograd.grad(sum(losses), list(model.parameters())), expected, strict=True):
        assert torch.allclose(left, right, atol=1e-6)


def test_the_output_norm_is_taken_before_the_final_norm_hides_it(tiny_model: Any, sequencer: Sequencer) -> None:
    batch = LossWeights(sequencer.vocabulary, {}, inputs=1.0).batch(collate([documents(sequencer)], 128, pad_id=0))
    module = NextTokenLoss(tiny_model, sequencer.vocabulary, z_loss=0.0)
    seen: list[torch.Tensor] = []
    hook = tiny_model.model.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    report = module(batch)[1]
    hook.remove()
    assert float(report["hidden_norm"]) == pytest.approx(float(seen[0].double().square().mean().sqrt()), rel=1e-5)
    assert not tiny_model.model.norm._forward_pre_hooks, "nothing stays on the model"
