"""Which CUDA kernel computes attention over packed segments: mslk, else xformers, else torch's own, else none.

mslk is where the attention of xformers has moved; both dispatch to FlashAttention 3 where that is installed, else to
the FlashAttention 2 (arXiv 2307.08691) inside torch. A candidate must import and give the reference's numbers, forward
and backward, on this GPU; this is settled once a process. This is the only file that imports either package.

Dimension key: T packed ids, H heads, D head width, N offsets.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from anygen.model.attention_reference import Reference

logger = logging.getLogger("anygen")
_TOLERANCE = 3e-2
"""Largest error over the largest value, in bf16. Rounding gives less than a third of it, a wrong mask ten times it."""


class Kernel(Protocol):
    """Causal attention inside segments; all heads have keys and values of their own."""

    name: str

    def forward(
        self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, offsets_N: Tensor, max_length: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Output, T x H x D, and log-sum-exp of the scores, fp32, H x T."""
        ...

    def backward(
        self,
        gradient_THD: Tensor,
        q_THD: Tensor,
        k_THD: Tensor,
        v_THD: Tensor,
        out_THD: Tensor,
        lse_HT: Tensor,
        offsets_N: Tensor,
        max_length: int,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of `q_THD`, `k_THD` and `v_THD`."""
        ...


@dataclass(frozen=True)
class Resolution:
    """Which kernel was taken, and why not the ones before it."""

    kernel: Kernel | None
    refused: Mapping[str, str]
    unusable: tuple[str, ...] = ()
    """Those of the refused that are installed: that they are passed over is worth a warning."""

    def __str__(self) -> str:
        chosen = self.kernel.name if self.kernel else "torch SDPA"
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.refused.items())
        return f"{chosen} (not {reasons})" if reasons else chosen


class KernelRefused(RuntimeError):
    """A kernel that imports but cannot be used here; says why."""


def fits(dtype: torch.dtype, width: int) -> bool:
    """True for heads that the kernels take, all of which are FlashAttention: 16 bits, width a multiple of 8 up to 256.

    Their backward adds up in any order, so none is taken under `torch.use_deterministic_algorithms`.
    """
    is_narrow = dtype in (torch.float16, torch.bfloat16)
    return is_narrow and width % 8 == 0 and width <= 256 and not torch.are_deterministic_algorithms_enabled()


@lru_cache(maxsize=1)
def resolve() -> Resolution:
    """The kernel of this process, on the current CUDA device; says once which it is.

    It warns where there is none, or where a package that is installed was passed over.
    """
    if not torch.cuda.is_available():
        return Resolution(None, {"kernels": "there is no CUDA device"})
    resolution = choose(candidates(), torch.device("cuda"))
    if resolution.kernel is None:
        logger.warning("attention runs on %s: the same results, more slowly", resolution)
    else:
        level = logging.WARNING if resolution.unusable else logging.INFO
        logger.log(level, "attention runs on %s", resolution)
    return resolution


def candidates() -> dict[str, Callable[[], Kernel]]:
    """What opens each kernel, in order of preference; it may raise whatever an import raises."""
    return {"mslk": _open_mslk, "xformers": _open_xformers, "torch": TorchKernel}


def choose(openers: Mapping[str, Callable[[], Kernel]], device: torch.device) -> Resolution:
    """The first kernel that opens and computes what the reference computes."""
    refused: dict[str, str] = {}
    unusable: tuple[str, ...] = ()
    for name, opener in openers.items():
        try:
            kernel = opener()
            _require_equal(kernel, device)
        # what a package built for another torch, CUDA or GPU raises
        except (ImportError, OSError, RuntimeError, AttributeError, TypeError, ValueError, AssertionError) as error:
            refused[name] = str(error).strip().split("\n")[0] or type(error).__name__
            unusable += () if _is_absent(name, error) else (name,)
        else:
            return Resolution(kernel, refused, unusable)
    return Resolution(None, refused, unusable)


def _is_absent(package: str, error: Exception) -> bool:
    """True where the package itself is what is missing, and not something that it wants."""
    return isinstance(error, ModuleNotFoundError) and str(error.name).partition(".")[0] == package


def _require_equal(kernel: Kernel, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    # three segments of 17, 1 and 30 ids, and two empty ones
    offsets_N = torch.tensor([0, 17, 18, 48, 48, 48], dtype=torch.int32, device=device)
    q, k, v, gradient = (
        torch.randn(48, 2, 64, generator=generator).to(device, torch.bfloat16).contiguous() for _ in range(4)
    )
    results = []
    for one in (Reference(), kernel):
        out, lse = one.forward(q, k, v, offsets_N, 32, 0.125)
        results.append([out, lse, *one.backward(gradient, q, k, v, out, lse, offsets_N, 32, 0.125)])
    for expected, got in zip(*results, strict=True):
        if got.shape != expected.shape or got.dtype != expected.dtype:
            raise KernelRefused(f"gives {got.dtype} {tuple(got.shape)}, not {expected.dtype} {tuple(expected.shape)}")
        error = ((got - expected).abs().max() / expected.abs().max()).item()
        if not error < _TOLERANCE:  # NaN is refused too
            raise KernelRefused(f"differs from the reference by {error:.3g}")


class _FmhaKernel:
    """`xformers.ops.fmha`, or `mslk.attention.fmha`, which is the same."""

    def __init__(self, fmha: Any, name: str) -> None:
        self._fmha, self.name = fmha, name

    def forward(
        self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, offsets_N: Tensor, max_length: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse = self._fmha.memory_efficient_attention_forward_requires_grad(
            q_THD[None], k_THD[None], v_THD[None], self._bias(len(q_THD), offsets_N, max_length), scale=scale
        )
        return out[0], lse[0]

    def backward(
        self,
        gradient_THD: Tensor,
        q_THD: Tensor,
        k_THD: Tensor,
        v_THD: Tensor,
        out_THD: Tensor,
        lse_HT: Tensor,
        offsets_N: Tensor,
        max_length: int,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tensors = (x[None] for x in (gradient_THD, out_THD, lse_HT, q_THD, k_THD, v_THD))
        bias = self._bias(len(q_THD), offsets_N, max_length)
        dq, dk, dv = self._fmha.memory_efficient_attention_backward(*tensors, bias, scale=scale)
        return dq[0], dk[0], dv[0]

    def _bias(self, num_ids: int, offsets_N: Tensor, max_length: int) -> Any:
        # One segment on the CPU, then our offsets in its place: the lengths need not come back from the GPU.
        bias = self._fmha.attn_bias.BlockDiagonalCausalMask.from_seqlens([num_ids], device=torch.device("cpu"))
        spans = replace(bias.q_seqinfo, seqstart=offsets_N, max_seqlen=max_length)
        return replace(bias, q_seqinfo=spans, k_seqinfo=spans)


def _open_mslk() -> Kernel:
    return _FmhaKernel(importlib.import_module("mslk.attention.fmha"), f"mslk {importlib.metadata.version('mslk')}")


def _open_xformers() -> Kernel:
    _preload_cuda_runtime()
    fmha = importlib.import_module("xformers.ops.fmha")
    return _FmhaKernel(fmha, f"xformers {importlib.metadata.version('xformers')}")


def _preload_cuda_runtime() -> None:
    """Load the CUDA 12 runtime from its own package, where that is installed.

    The published wheels of xformers are for CUDA 12: beside a torch for CUDA 13 their extension finds no
    libcudart.so.12, and without its extension xformers refuses every kernel, also those that are torch's own.
    """
    try:
        files = importlib.metadata.files("nvidia-cuda-runtime-cu12") or []
    except importlib.metadata.PackageNotFoundError:
        return
    for file in files:
        if file.name == "libcudart.so.12":
            ctypes.CDLL(str(file.locate()), mode=ctypes.RTLD_GLOBAL)


class TorchKernel:
    """FlashAttention 2 inside torch (what `torch.nn.attention.varlen` calls); signatures as of torch 2.10 to 2.13."""

    name = f"torch {torch.__version__} varlen"

    def forward(
        self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, offsets_N: Tensor, max_length: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        """As `Kernel` says."""
        spans = (offsets_N, offsets_N, max_length, max_length)
        no_dropout, causal, debug = 0.0, True, False
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q_THD, k_THD, v_THD, *spans, no_dropout, causal, debug, scale=scale
        )
        return out, lse

    def backward(
        self,
        gradient_THD: Tensor,
        q_THD: Tensor,
        k_THD: Tensor,
        v_THD: Tensor,
        out_THD: Tensor,
        lse_HT: Tensor,
        offsets_N: Tensor,
        max_length: int,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `Kernel` says."""
        spans = (offsets_N, offsets_N, max_length, max_length)
        no_dropout, causal = 0.0, True
        random_state = torch.zeros(2, dtype=torch.uint64, device=q_THD.device)  # dropout's
        unused = torch.empty(0, device=q_THD.device)
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            *(gradient_THD, q_THD, k_THD, v_THD, out_THD, lse_HT),
            *spans,
            no_dropout,
            causal,
            random_state,
            unused,
            scale=scale,
        )
        return dq, dk, dv
