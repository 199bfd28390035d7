"""What the machine can do, measured, and how undisturbed a measurement was.

Wall time means something only where nobody else computes. Each window therefore records how many cores others kept
busy (`/proc/stat` minus our own time, so stolen time of a virtual machine counts as others'). Process CPU time of one
thread survives such neighbours, except for what they take of caches and memory.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

CLEAN_CORES = 0.06
"""Above this share of one core for others a window is dropped."""
_STAT = Path("/proc/stat")
_GEMMS = ((2048, 512, 1408), (4096, 1024, 4096), (4096, 4096, 4096))
_LARGE_GEMM, _SMALL_GEMM = (8192, 8192, 8192), (512, 512, 512)
_COPY_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Window:
    """One timed piece of work."""

    wall_s: float
    cpu_s: float
    """Of all threads of this process."""
    others: float | None
    """Cores that others kept busy meanwhile; None where the system does not tell."""
    peak_bytes: int | None = None
    """Most GPU memory at once, weights and optimizer included."""

    @property
    def clean(self) -> bool:
        """True where others took next to nothing."""
        return self.others is None or self.others <= CLEAN_CORES

    def seconds(self, clock: str) -> float:
        """Time on a clock, `wall` or `cpu`."""
        return self.wall_s if clock == "wall" else self.cpu_s


def timed(work: Callable[[], object], device: torch.device) -> Window:
    """Do the work to its end, also on a GPU."""
    _finish(device)
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    busy, wall, cpu = _busy_s(), time.perf_counter(), time.process_time()
    work()
    _finish(device)
    wall_s, cpu_s, now = time.perf_counter() - wall, time.process_time() - cpu, _busy_s()
    others = None if busy is None or now is None or is_cuda else max(0.0, now - busy - cpu_s) / wall_s
    return Window(wall_s, cpu_s, others, torch.cuda.max_memory_allocated(device) if is_cuda else None)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _busy_s() -> float | None:
    """Busy seconds of all cores since the start of the machine; None without `/proc/stat`."""
    if not _STAT.exists():
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, _STAT.read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def measure_limits(device: torch.device, *, clock: str, repeats: int, small: bool) -> dict[str, Any]:
    """The fastest matrix products (TFLOP/s, by dtype and shape) and copy (GB/s, read and write) in a few tries."""
    shapes: tuple[tuple[int, int, int], ...]
    shapes = (_SMALL_GEMM,) if small else _GEMMS if device.type == "cpu" else (*_GEMMS, _LARGE_GEMM)

    def best(work: Callable[[], object]) -> float:
        work()
        return min(timed(work, device).seconds(clock) for _ in range(repeats))

    precision = torch.get_float32_matmul_precision()
    if device.type == "cpu":  # oneDNN's products, twice as fast as MKL's on AMD and as exact where there is no AMX
        torch.set_float32_matmul_precision("medium")
    limits: dict[str, Any] = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        limits[f"gemm_{name}_tflops"] = {}
        for m, k, n in shapes:
            a_MK, b_KN = torch.ones(m, k, dtype=dtype, device=device), torch.ones(k, n, dtype=dtype, device=device)
            calls = max(1, round((4e8 if small else 4e9) / (m * k * n)))  # long enough for the clock
            seconds = best(lambda a=a_MK, b=b_KN, calls=calls: [a @ b for _ in range(calls)])  # type: ignore[misc]
            limits[f"gemm_{name}_tflops"][f"{m}x{k}x{n}"] = 2 * m * k * n * calls / seconds / 1e12
    torch.set_float32_matmul_precision(precision)
    source = torch.ones((_COPY_BYTES >> (4 if small else 0)) // 4, device=device)
    target = torch.empty_like(source)
    limits["copy_gb_s"] = 2 * source.nbytes / best(lambda: target.copy_(source)) / 1e9
    return limits


def machine_facts(device: torch.device) -> dict[str, Any]:
    """The processor, its cores, and the versions of what computes."""
    packages = ("torch", "transformers", "numpy", "anygen")
    return {
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
