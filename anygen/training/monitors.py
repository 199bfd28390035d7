"""What a run tells about its health beside its losses: growth of the output norm, and how well the device is used.

Growth of the output norm is the early warning of Chameleon (arXiv 2405.09818, section 2.3): it comes long before the
loss diverges. All state is in the lines of `metrics.jsonl`, so a resumed run warns as one that was never stopped.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from anygen.training.metrics import rounded

logger = logging.getLogger("anygen")
_WINDOW = 5
"""Log lines of the running mean: one odd batch is no alarm."""
_PEAK_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}
"""Dense bf16 matrix products with fp32 sums, from NVIDIA's data sheets; the first name that fits counts."""


class Monitors:
    """Adds figures to each line of the log.

    `norm_growth`: running mean of `hidden_norm`, the size of the last layer's output before the final norm, over its
    level after warm-up; `norm_alarms`: how often the run has warned of it, once when it exceeds `norm_alarm` and once
    more at each doubling. `mfu`: share of the device's peak, where the line has `flops`, `tokens` and `tokens_per_s`,
    and the peak is known.

    Args:
        history: the lines of the run so far.
        warmup_steps: steps before the level is taken.
        norm_alarm: growth that is worth a warning.
        peak_tflops: of one device; None leaves `mfu` out.
        num_devices: over which `tokens_per_s` is summed.
    """

    def __init__(
        self,
        history: Iterable[Mapping[str, Any]] = (),
        *,
        warmup_steps: int,
        norm_alarm: float = 3.0,
        peak_tflops: float | None = None,
        num_devices: int = 1,
    ) -> None:
        self._warmup_steps, self._norm_alarm = warmup_steps, norm_alarm
        self._peak_flops = peak_tflops * 1e12 * num_devices if peak_tflops else None
        self._level: float | None = None
        self._recent: deque[float] = deque(maxlen=_WINDOW)
        self._alarms = 0
        for row in history:
            self._watch_norm(row["step"], row)

    def update(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """The values of a line and what follows from them; warns where the norm has grown."""
        known = self._alarms
        growth = self._watch_norm(step, values)
        found = dict(values)
        if growth is not None:
            found |= {"norm_growth": growth, "norm_alarms": float(self._alarms)}
        if self._alarms > known:
            logger.warning(
                "step %d: the output norm is %.2g times its level after warm-up (%.3g). Where it keeps growing the "
                "loss diverges later: lower the learning rate, or go back to a checkpoint before it grew",
                step, growth, self._level,
            )  # fmt: skip
        if self._peak_flops and {"flops", "tokens", "tokens_per_s"} <= values.keys():
            found["mfu"] = values["flops"] / values["tokens"] * values["tokens_per_s"] / self._peak_flops
        return found

    def _watch_norm(self, step: int, values: Mapping[str, float]) -> float | None:
        norm = values.get("hidden_norm")
        if norm is None or step < self._warmup_steps:
            return None
        self._recent.append(rounded(norm))  # as the log has it, so that a resumed run sees the same
        mean = sum(self._recent) / len(self._recent)
        if self._level is None:
            if len(self._recent) < _WINDOW:
                return None
            self._level = mean
        growth = mean / self._level if self._level else math.inf
        if growth >= self._norm_alarm:
            doublings = math.floor(math.log2(growth / self._norm_alarm)) if math.isfinite(growth) else 0
            self._alarms = max(self._alarms, 1 + doublings)
        return growth


def peak_tflops(device_name: str) -> float | None:
    """Peak of a GPU in bf16 by its name; None where it is not known.

    >>> peak_tflops("NVIDIA H200"), peak_tflops("NVIDIA H100 PCIe"), peak_tflops("AMD EPYC")
    (989.0, 756.0, None)
    """
    return next((peak for name, peak in _PEAK_TFLOPS.items() if name in device_name), None)


def peak_tflops_of(device: torch.device) -> float | None:
    """Peak of the device in bf16; None on a CPU or where it is not known."""
    return peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
