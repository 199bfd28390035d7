"""Where bf16 is worth its rounding: on GPUs, and on CPUs with instructions for it.

Other CPUs compute bf16 products by way of fp32, several times slower than fp32 itself.
"""

from __future__ import annotations

import torch


def is_bf16_fast(device: torch.device) -> bool:
    """False on an x86 CPU that has no instructions for bf16 (AVX512-BF16, AMX); True where that is not known."""
    if device.type != "cpu":
        return True
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return found.get("architecture") != "x86_64" or bool(found.get("avx512_bf16") or found.get("amx_bf16"))
