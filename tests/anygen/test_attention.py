"""Attention over packed segments: every room and kernel equals the dense oracle, forward and backward, and compiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from anygen.model import attention
from anygen.model.attention import attend, attend_packed, attend_sdpa
from anygen.model.attention_kernels import Resolution, candidates, choose
from anygen.model.packed_attention import packed_attention, packed_attention_backward
from anygen.model.segments import Segments

CPU = torch.device("cpu")
LENGTHS = [(), (0,), (1,), (5,), (1, 1, 1), (0, 3, 0, 0, 4, 0), (3, 33, 7, 1, 64), (31, 32, 33), (100, 2), (1,) * 70]
HEADS = [(4, 4, 8), (8, 2, 32), (3, 1, 64)]
ROOMS = {"sdpa": attend_sdpa, "packed": attend_packed}


def dense_attention(q: Any, k: Any, v: Any, lengths: tuple[int, ...]) -> torch.Tensor:
    """The slow, obvious reference, in fp64."""
    heads, groups = q.shape[1], k.shape[1]
    k, v = (x.repeat_interleave(heads // groups, dim=1) for x in (k, v))
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.long))
    place = torch.arange(len(document))
    visible = (document[:, None] == document[None]) & (place[:, None] >= place[None])
    scores = torch.einsum("qhd,khd->hqk", q.double(), k.double()) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v.double())


def random_qkv(lengths: tuple[int, ...], heads: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> Any:
    """Queries, keys and values, strided as transformers hands them over."""
    generator = torch.Generator().manual_seed(0)
    num_q, num_kv, width = heads
    shapes = [(num, sum(lengths), width) for num in (num_q, num_kv, num_kv)]
    return [torch.randn(s, generator=generator).to(dtype).transpose(0, 1).requires_grad_() for s in shapes]


def gradients(out: torch.Tensor, qkv: Any) -> Any:
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad((out * weight.to(out.device, out.dtype)).sum(), qkv)


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_rooms_equal_dense_attention(room: str, lengths: tuple[int, ...], heads: tuple[int, int, int]) -> None:
    qkv = random_qkv(lengths, heads)
    out = ROOMS[room](*qkv, Segments(lengths, CPU))
    expected = dense_attention(*qkv, lengths)
    assert out.shape == expected.shape and torch.allclose(out.double(), expected, atol=2e-6)
    for ours, theirs in zip(gradients(out, qkv), gradients(expected, qkv), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-5)
    with torch.inference_mode():
        alone = ROOMS[room](*[x.detach() for x in qkv], Segments(lengths, CPU))
    assert torch.allclose(alone, out, atol=2e-6), "the same without gradients"


@pytest.mark.parametrize("lengths", [(3, 33, 7, 1, 64), (5,), (1, 1, 1)], ids=str)
def test_rooms_equal_the_mask_of_xformers(lengths: tuple[int, ...]) -> None:
    """Xformers computes softmax(q k' + bias) v; its bias, made visible, must be the mask we compute with."""
    fmha = pytest.importorskip("xformers.ops.fmha", reason="xformers is not installed: its mask cannot be compared")
    q, k, v = random_qkv(lengths, (8, 2, 32))
    bias = fmha.attn_bias.BlockDiagonalCausalMask.from_seqlens(list(lengths)).materialize((sum(lengths),) * 2)
    heads_first = [x.repeat_interleave(8 // x.shape[1], dim=1).transpose(0, 1)[None] for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*heads_first, attn_mask=bias)[0].transpose(0, 1)
    for room in ROOMS.values():
        assert torch.allclose(room(q, k, v, Segments(lengths, CPU)), expected, atol=2e-6)


def test_a_scale_and_mixed_types_are_honoured() -> None:
    lengths = (5, 9)
    q, k, v = random_qkv(lengths, (4, 2, 8))
    expected = attend_sdpa(q * 2, k, v, Segments(lengths, CPU))
    for room in ROOMS.values():
        assert torch.allclose(room(q, k, v, Segments(lengths, CPU), scale=2 * 8**-0.5), expected, atol=2e-6)


@pytest.mark.parametrize("room", ROOMS)
def test_under_autocast_only_the_last_bits_differ(room: str) -> None:
    """Behind QK-norm queries and keys are fp32 and values bf16. Large scores show where a softmax has too few bits."""
    lengths = (50, 7, 33)
    q, k, v = random_qkv(lengths, (4, 2, 32))
    qkv = [(3 * q).detach().requires_grad_(), (3 * k).detach().requires_grad_(), v.bfloat16().detach().requires_grad_()]
    rounded = [x.bfloat16().double().detach().requires_grad_() for x in qkv]
    with torch.autocast("cpu", torch.bfloat16):
        out = ROOMS[room](*qkv, Segments(lengths, CPU))
    assert out.dtype == torch.bfloat16
    expected = dense_attention(*rounded, lengths)
    pairs = [(out, expected), *zip(gradients(out, qkv), gradients(expected, rounded), strict=True)]
    for ours, theirs in pairs:
        assert (ours - theirs).norm() < 7e-3 * theirs.norm()


# -- the operator


def arguments(lengths: tuple[int, ...], heads: tuple[int, int, int], dtype: torch.dtype) -> tuple[Any, ...]:
    segments = Segments(lengths, CPU)
    return (*random_qkv(lengths, heads, dtype), segments.offsets_N, segments.max_length, heads[2] ** -0.5)


@pytest.mark.parametrize("lengths", [(), (3,), (1, 4, 0, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operator_keeps_the_contract_of_torch(lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    """Schema, fake tensors, autograd registration and tracing with dynamic shapes agree with the real thing."""
    given = arguments(lengths, (4, 2, 8), dtype)
    torch.library.opcheck(packed_attention, given)
    out, lse = packed_attention(*given)
    detached = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in (out, *given[:3], out, lse, *given[3:]))
    torch.library.opcheck(packed_attention_backward, detached)
    assert not lse.requires_grad


@pytest.mark.parametrize("heads", [(4, 2, 3), (3, 1, 2), (2, 2, 3)], ids=str)
def test_gradients_equal_finite_differences(heads: tuple[int, int, int]) -> None:
    *qkv, offsets, max_length, scale = arguments((1, 4, 0, 2), heads, torch.float64)
    assert torch.autograd.gradcheck(lambda *x: packed_attention(*x, offsets, max_length, scale)[0], qkv)


def test_one_graph_serves_batches_of_any_number_of_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the door, as on CUDA: one full graph, whatever the packing."""
    monkeypatch.setattr(attention, "has_kernel", torch.compiler.assume_constant_result(lambda *_: True))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *x: attend(*x).square().sum(), backend=counter, fullgraph=True)
    for lengths in [(10, 20, 34), (64,), (1, 1, 1, 61), (5,) * 12 + (4,), (0, 30, 34), (1,) * 63]:
        qkv = random_qkv(lengths if sum(lengths) == 64 else (*lengths, 1), (4, 2, 8))
        segments = Segments(lengths if sum(lengths) == 64 else (*lengths, 1), CPU)
        loss = compiled(*qkv, segments)
        expected = dense_attention(*qkv, segments.lengths).square().sum()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        for ours, theirs in zip(torch.autograd.grad(loss, qkv), torch.autograd.grad(expected, qkv), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-4)
    assert counter.frame_count <= 2, "a second one for more offsets than the first had is allowed"


def test_a_compiled_layer_has_one_graph(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "has_kernel", torch.compiler.assume_constant_result(lambda *_: True))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(tiny_model.model.layers[0], backend=counter, fullgraph=True)
    for lengths in [(16, 16), (32,), (1, 2, 3, 26)]:
        x = torch.randn(1, 32, tiny_model.config.hidden_size, generator=torch.Generator().manual_seed(0))
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        given = {"position_embeddings": tiny_model.model.rotary_emb(x, positions), "attention_mask": None}
        given |= {"segments": Segments(lengths, CPU)}
        assert torch.allclose(compiled(x, **given), tiny_model.model.layers[0](x, **given), atol=1e-6)
    assert counter.frame_count == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("heads", [(8, 2, 64), (3, 1, 32), (4, 4, 128)], ids=str)
def test_every_kernel_of_this_gpu_equals_the_oracle(
    lengths: tuple[int, ...], heads: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cuda")
    kernels = [choose({name: opener}, device).kernel for name, opener in candidates().items()]
    for kernel in filter(None, kernels):
        monkeypatch.setattr("anygen.model.packed_attention.resolve", lambda kernel=kernel: Resolution(kernel, {}))
        qkv = random_qkv(lengths, heads, torch.bfloat16)
        on_gpu = [x.detach().to(device).requires_grad_() for x in qkv]
        out = attend_packed(*on_gpu, Segments(lengths, device))
        expected = dense_attention(*qkv, lengths)
        assert torch.allclose(out.cpu().double(), expected, atol=2e-2), kernel.name
        for left, right in zip(gradients(out, on_gpu), gradients(expected, qkv), strict=True):
            assert torch.allclose(left.cpu().float(), right.float(), atol=5e-2, rtol=5e-2), kernel.name
