"""Activation checkpointing keeps fewer bytes, costs what it should, and changes no gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from anygen.model import attention
from anygen.model.attention import Segments
from anygen.model.attention_reference import Reference
from anygen.model.causal import ModelConfig, create_model
from anygen.model.recompute import Recompute, recompute_activations
from anygen.vocabulary import Vocabulary

LENGTHS = (37, 1, 58)
NUM_LAYERS = 2


def backward(vocabulary: Vocabulary, what: Recompute, *, compiled: bool = False) -> tuple[list[Tensor], int, int]:
    """Gradients, bytes kept for the backward pass, FLOPs."""
    config = ModelConfig(size="smoke", num_layers=NUM_LAYERS, width=32, head_width=16, mlp_width=48, max_positions=64)
    model: Any = create_model(config, vocabulary, seed=0).train()
    recompute_activations(model, what)
    if compiled:
        for layer in model.model.layers:
            layer.compile(backend="aot_eager")
    ids_T = torch.arange(sum(LENGTHS)) % vocabulary.size
    positions_T = torch.cat([torch.arange(length) for length in LENGTHS])
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        hidden = model.model(
            input_ids=ids_T[None], position_ids=positions_T[None], use_cache=False,
            segments=Segments(LENGTHS, torch.device("cpu")),
        ).last_hidden_state  # fmt: skip
        hidden.float().square().mean().backward()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    activations = sum(size for place, size in kept.items() if place not in weights)
    return [p.grad for p in model.model.parameters()], activations, counter.get_total_flops()


@pytest.mark.parametrize("what", ["selective", "full"])
def test_gradients_are_the_same_and_less_is_kept(vocabulary: Vocabulary, what: Recompute) -> None:
    plain, kept, flops = backward(vocabulary, "none")
    found, kept_now, flops_now = backward(vocabulary, what)
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
    assert kept_now < kept / 2
    if what == "selective":
        assert flops_now == flops, "no matrix product is done twice"
    else:
        assert 1.25 * flops < flops_now < 1.4 * flops, "one forward pass of three is done again"


@pytest.mark.parametrize(("what", "times"), [("selective", 1), ("full", 2)])
def test_compiled_layers_keep_what_is_dear_too(
    vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch, what: Recompute, times: int
) -> None:
    """In the compiled graph, which holds forward and backward, attention is computed as often as it should be."""
    calls = 0
    real = Reference.forward

    def counted(self: Reference, *given: Any) -> Any:
        nonlocal calls
        calls += 1
        return real(self, *given)

    monkeypatch.setattr(Reference, "forward", counted)
    monkeypatch.setattr(attention, "has_kernel", torch.compiler.assume_constant_result(lambda *_: True))
    torch._dynamo.reset()
    plain, _, _ = backward(vocabulary, "none")
    assert calls == NUM_LAYERS
    found, _, _ = backward(vocabulary, what, compiled=True)
    assert calls == NUM_LAYERS + times * NUM_LAYERS
    for left, right in zip(plain, found, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)
