"""Products with weights that are laid out once: oneDNN's packed form on a CPU, plain `F.linear` elsewhere.

A step of sampling reads every weight once, so its time is that of streaming them. At one row a CPU streams packed fp32
weights 2.6 times, packed bf16 weights 2.3 times as fast as `F.linear` does (benchmarks/README.md). The operators are
private to torch (its compiler emits them): they are used only where a probe finds them giving what `F.linear` gives.

Dimension key: M rows, D inputs, O outputs.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

_TYPICAL_ROWS = 8
"""What the packed form is made for. It serves any number of rows; one made for a single row is slow for more."""


class Linear:
    """x_MD @ weight_OD.T for fp32 x, with weights in `dtype`; fp32 is exact up to the order of sums.

    Args:
        weight_OD: any float type, on the device of the products.
        dtype: of the weights kept, and of both sides of the product.
        packed: False keeps to `F.linear`.
    """

    def __init__(self, weight_OD: Tensor, dtype: torch.dtype, *, packed: bool = True) -> None:
        self.dtype, self.num_bytes = dtype, weight_OD.numel() * dtype.itemsize
        self.is_packed = packed and weight_OD.device.type == "cpu" and can_pack(dtype)
        self._weight = weight_OD.detach().to(dtype).contiguous()
        if self.is_packed:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight, _TYPICAL_ROWS)

    def __call__(self, x_MD: Tensor) -> Tensor:
        """The product, in `dtype`."""
        x_MD = x_MD.to(self.dtype)
        if self.is_packed:
            return torch.ops.mkldnn._linear_pointwise(x_MD, self._weight, None, "none", [], "")
        return F.linear(x_MD, self._weight)

    def add(self, x_MD: Tensor, to_MO: Tensor) -> Tensor:
        """`to_MO` plus the product, fp32."""
        if self.is_packed and self.dtype == torch.float32:  # one operator instead of two
            return torch.ops.mkldnn._linear_pointwise.binary(x_MD, to_MO, self._weight, None, "add")
        return to_MO + self(x_MD)


@functools.cache
def can_pack(dtype: torch.dtype) -> bool:
    """True where torch has the operators for this type and they give what `F.linear` gives on a small product."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    if not all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")):
        return False
    generator = torch.Generator().manual_seed(0)
    weight_OD = torch.randn(48, 40, generator=generator).to(dtype)
    x_MD, to_MO = torch.randn(3, 40, generator=generator).to(dtype), torch.randn(3, 48, generator=generator).to(dtype)
    expected = F.linear(x_MD, weight_OD)
    rtol, atol = (1e-5, 1e-4) if dtype == torch.float32 else (2e-2, 2e-1)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight_OD, _TYPICAL_ROWS)
        product = torch.ops.mkldnn._linear_pointwise(x_MD, packed, None, "none", [], "")
        total = torch.ops.mkldnn._linear_pointwise.binary(x_MD, to_MO, packed, None, "add")
    except (RuntimeError, TypeError, AttributeError):  # another torch, another processor
        return False
    pairs = ((product, expected), (total, to_MO + expected))
    return all(torch.allclose(found, right, rtol=rtol, atol=atol) for found, right in pairs)
