"""Which attention kernel is taken: order, refusal of what is wrong, and how each package is called."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.metadata
import logging
import sys
import types
from collections.abc import Callable
from importlib.metadata import PackagePath
from typing import Any

import pytest
import torch

from anygen.model import attention, attention_kernels
from anygen.model.attention_kernels import Resolution, TorchKernel, candidates, choose, fits, resolve
from anygen.model.attention_reference import Reference

CPU = torch.device("cpu")


@dataclasses.dataclass
class FakeLengths:
    seqstart: Any
    max_seqlen: int


@dataclasses.dataclass
class FakeMask:
    q_seqinfo: Any
    k_seqinfo: Any

    @classmethod
    def from_seqlens(cls, lengths: list[int], *, device: torch.device) -> FakeMask:
        info = FakeLengths(torch.tensor([0, *lengths]), max(lengths))
        return cls(info, info)


def fake_fmha(*, causal: bool = True) -> types.ModuleType:
    """What `xformers.ops.fmha` offers, computed by the reference."""
    module = types.ModuleType("fmha")

    def forward(q: Any, k: Any, v: Any, bias: Any, *, scale: float) -> Any:
        assert bias.q_seqinfo is bias.k_seqinfo and bias.q_seqinfo.max_seqlen == 32
        spans = bias.q_seqinfo.seqstart if causal else torch.arange(len(q[0]) + 1)
        out, lse = Reference().forward(q[0], k[0], v[0], spans, 0, scale)
        return out[None], lse[None]

    def backward(gradient: Any, out: Any, lse: Any, q: Any, k: Any, v: Any, bias: Any, *, scale: float) -> Any:
        tensors = (x[0] for x in (gradient, q, k, v, out, lse))
        return tuple(x[None] for x in Reference().backward(*tensors, bias.q_seqinfo.seqstart, 0, scale))

    module.memory_efficient_attention_forward_requires_grad = forward  # type: ignore[attr-defined]
    module.memory_efficient_attention_backward = backward  # type: ignore[attr-defined]
    module.attn_bias = types.SimpleNamespace(BlockDiagonalCausalMask=FakeMask)  # type: ignore[attr-defined]
    return module


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Says what `import` finds; what is not named is absent."""
    monkeypatch.setattr(attention_kernels.importlib.metadata, "version", lambda name: "9.9")

    def install(**found: types.ModuleType) -> None:
        for name, place in {"mslk": "mslk.attention.fmha", "xformers": "xformers.ops.fmha"}.items():
            monkeypatch.setitem(sys.modules, place, found.get(name))

    return install


def test_kernels_are_tried_in_order(packages: Callable[..., None]) -> None:
    packages(mslk=fake_fmha(), xformers=fake_fmha())
    assert str(choose(candidates(), CPU)) == "mslk 9.9"
    packages(xformers=fake_fmha())
    second = choose(candidates(), CPU)
    assert second.kernel is not None and second.kernel.name == "xformers 9.9" and list(second.refused) == ["mslk"]
    assert second.unusable == (), "what is not installed is no fault"
    packages()
    none = choose(candidates(), CPU)  # torch has its kernel for CUDA only
    assert none.kernel is None and list(none.refused) == ["mslk", "xformers", "torch"] and none.unusable == ("torch",)


def test_a_kernel_that_computes_something_else_is_refused(packages: Callable[..., None]) -> None:
    packages(mslk=fake_fmha(causal=False), xformers=fake_fmha())
    resolution = choose(candidates(), CPU)
    assert resolution.kernel is not None and resolution.kernel.name == "xformers 9.9"
    assert "differs from the reference" in resolution.refused["mslk"] and resolution.unusable == ("mslk",)


def test_a_package_that_lacks_another_is_unusable_and_not_absent() -> None:
    """As xformers is after its attention moved to mslk, where that is not installed."""

    def opener() -> Any:
        raise ModuleNotFoundError("No module named 'mslk'", name="mslk")

    resolution = choose({"mslk": opener, "xformers": opener, "right": Reference}, CPU)
    assert list(resolution.refused) == ["mslk", "xformers"] and resolution.unusable == ("xformers",)


@pytest.mark.parametrize("wrong", ["forward", "backward", "shape", "nan"])
def test_every_result_of_a_kernel_is_checked(wrong: str) -> None:
    class Wrong(Reference):
        def forward(self, *given: Any) -> Any:
            out, lse = super().forward(*given)
            if wrong == "forward":
                return out, lse + 1
            return (out * torch.nan if wrong == "nan" else out), (lse.T if wrong == "shape" else lse)

        def backward(self, *given: Any) -> Any:
            dq, dk, dv = super().backward(*given)
            return (dq, dv, dk) if wrong == "backward" else (dq, dk, dv)

    resolution = choose({"wrong": Wrong, "right": Reference}, CPU)
    assert list(resolution.refused) == ["wrong"] and type(resolution.kernel) is Reference


def test_rounding_of_a_real_kernel_is_accepted() -> None:
    """FlashAttention keeps probabilities in 16 bits between its products."""

    class Rounded(Reference):
        def forward(self, q: Any, k: Any, v: Any, *rest: Any) -> Any:
            out, lse = super().forward(q, k, v, *rest)
            return (out.float() * (1 + 2**-8)).to(out.dtype), lse

        def backward(self, *given: Any) -> Any:
            return tuple((x.float() * (1 - 2**-7)).to(x.dtype) for x in super().backward(*given))

    assert choose({"rounded": Rounded}, CPU).kernel is not None


@pytest.mark.parametrize(("kernel", "unusable"), [(None, ()), (Reference(), ()), (Reference(), ("mslk",))])
def test_the_choice_is_said_once_and_a_fallback_is_a_warning(
    kernel: Any, unusable: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention_kernels, "choose", lambda *_: Resolution(kernel, {"mslk": "not installed"}, unusable))
    resolve.cache_clear()
    with caplog.at_level(logging.INFO, logger="anygen"):
        assert resolve() is resolve() and resolve().kernel is kernel
    resolve.cache_clear()
    (record,) = caplog.records
    assert record.levelno == (logging.INFO if kernel and not unusable else logging.WARNING)
    assert ("plain torch" if kernel else "torch SDPA") in record.message and "mslk: not installed" in record.message


def test_without_a_gpu_no_kernel_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(attention_kernels, "choose", lambda *_: pytest.fail("nothing is imported"))
    resolve.cache_clear()
    assert resolve().kernel is None
    resolve.cache_clear()


def test_heads_that_no_kernel_takes_go_to_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kernels, "resolve", lambda: Resolution(Reference(), {}))
    taken = {width for width in range(1, 300) if attention.has_kernel("cuda", torch.bfloat16, width)}
    assert taken == set(range(8, 257, 8))
    assert not attention.has_kernel("cuda", torch.float32, 64) and not attention.has_kernel("cpu", torch.bfloat16, 64)
    assert fits(torch.float16, 64)
    torch.use_deterministic_algorithms(True)
    assert not fits(torch.float16, 64)
    torch.use_deterministic_algorithms(False)


def test_the_cuda_runtime_of_its_package_is_loaded_before_xformers(
    packages: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Globally, or the extension of xformers does not find it."""
    packages(xformers=fake_fmha())
    paths = [PackagePath("nvidia/cuda_runtime/lib") / name for name in ("libcudart.so.12", "other.so")]
    for path in paths:
        path.dist = importlib.metadata.distribution("torch")
    loaded = []
    monkeypatch.setattr(attention_kernels.importlib.metadata, "files", lambda name: paths)
    monkeypatch.setattr(attention_kernels.ctypes, "CDLL", lambda path, mode: loaded.append((path, mode)))
    assert choose(candidates(), CPU).kernel is not None
    ((path, mode),) = loaded
    assert path.endswith("nvidia/cuda_runtime/lib/libcudart.so.12") and mode == ctypes.RTLD_GLOBAL


def test_the_kernel_of_torch_is_called_as_this_torch_wants_it() -> None:
    """Against torch's own shape rules for the operators, which need no GPU."""
    q, k, v, gradient = (torch.empty(48, 2, 64, dtype=torch.bfloat16, device="meta") for _ in range(4))
    offsets = torch.empty(64, dtype=torch.int32, device="meta")
    out, lse = TorchKernel().forward(q, k, v, offsets, 32, 0.125)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, (2, 48), torch.float32)
    for result in TorchKernel().backward(gradient, q, k, v, out, lse, offsets, 32, 0.125):
        assert (result.shape, result.dtype) == (q.shape, q.dtype)


def test_xformers_itself_is_called_as_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own checks and conversions run; only its CUDA operators are replaced by the reference, on the CPU."""
    flash = pytest.importorskip("xformers.ops.fmha.flash", reason="xformers is not installed")

    def forward(q: Any, k: Any, v: Any, spans: Any, spans_k: Any, used: Any, longest: int, *rest: Any, **_: Any) -> Any:
        assert spans is spans_k and used is None and rest[0] == longest == 32 and rest[3] is True
        return (*Reference().forward(q, k, v, spans, 0, rest[2]), None)

    def backward(
        shared: bool, gradient: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, spans: Any, *rest: Any, **_: Any
    ) -> Any:
        assert spans is rest[0] and rest[1] == 32 and rest[5] is True
        return Reference().backward(gradient, q, k, v, out, lse, spans, 0, rest[4])

    for op, operator in ((flash.FwOp, forward), (flash.BwOp, backward)):
        monkeypatch.setattr(op, "OPERATOR", staticmethod(operator))
        monkeypatch.setattr(op, "SUPPORTED_DEVICES", {"cpu"})
        bf16 = "bf16 is only supported on A100+ GPUs"
        asked = op.not_supported_reasons
        monkeypatch.setattr(op, "not_supported_reasons", lambda d, asked=asked: [r for r in asked(d) if r != bf16])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    resolution = choose({"xformers": candidates()["xformers"]}, CPU)
    assert resolution.kernel is not None, resolution.refused
