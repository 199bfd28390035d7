"""`anygen doctor`: is this installation sound, and what can it do?"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anygen.errors import AnyGenError, MissingDependency

REQUIRED = (
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "sentencepiece",
    "vector-quantize-pytorch",
    "pillow",
    "soundfile",
)
OPTIONAL = ("xformers", "encodec", "diffusers", "jiwer")
PROGRAMS = {"flite": "speech of the emoji world", "espeak-ng": "more voices of the emoji world"}


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    status: str
    """`ok`, `absent` (fine unless wanted) or `broken`."""
    detail: str


def examine() -> Iterator[Finding]:
    """Look at packages, programs, device, disk, and generate once with the embedded model."""
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores")
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "packages": _packages, "programs": _programs, "device": _device, "disk": _disk, "embedded model": _smoke
    }  # fmt: skip
    for name, check in checks.items():
        try:
            yield from check()
        except Exception as error:  # a broken installation may raise anything: that is the finding
            yield Finding(name, "broken", f"{type(error).__name__}: {error}")


def _packages() -> Iterator[Finding]:
    for name in (*REQUIRED, *OPTIONAL):
        try:
            yield Finding(name, "ok", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            status = "broken" if name in REQUIRED else "absent"
            yield Finding(name, status, "not installed" if status == "absent" else f"not installed: pip install {name}")
    from tokenizers_mm import compat

    for name, reason in compat.BROKEN.items():
        # It would take transformers down with it, were it not hidden: worth repairing, but nothing of ours needs it.
        yield Finding(
            name, "absent", f"installed but broken, hidden from transformers ({reason}); pip uninstall {name}"
        )


def _programs() -> Iterator[Finding]:
    for name, use in PROGRAMS.items():
        found = shutil.which(name)
        yield Finding(name, "ok" if found else "absent", found or f"needed for {use}: apt-get install {name}")
    from anygen.data.emoji_pictures import EmojiFont

    try:
        EmojiFont()
        yield Finding("emoji font", "ok", "Noto Color Emoji")
    except AnyGenError as error:
        yield Finding("emoji font", "absent", str(error))


def _device() -> Iterator[Finding]:
    import torch

    from anygen.model.attention_kernels import resolve
    from anygen.training.precision import is_bf16_fast

    if not torch.cuda.is_available():
        trains = "bf16" if is_bf16_fast(torch.device("cpu")) else "fp32 (it has no instructions for bf16)"
        threads = torch.get_num_threads()
        yield Finding("device", "ok", f"CPU, {threads} threads; attention by torch SDPA; trains in {trains}")
        return
    yield Finding("device", "ok", f"{torch.cuda.get_device_name()}; attention by {resolve()}")


def _disk() -> Iterator[Finding]:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    start = time.monotonic()
    with tempfile.TemporaryFile(dir=Path.cwd()) as file:
        file.write(bytes(8 * 2**20))
        file.flush()
        os.fsync(file.fileno())
    speed = 8 / (time.monotonic() - start)
    yield Finding(
        "disk", "ok" if free > 1 else "broken", f"{free:.0f} GiB free here, {speed:.0f} MiB/s written and flushed"
    )


def _smoke() -> Iterator[Finding]:
    from anygen.api import AnyGen

    start = time.monotonic()
    model = AnyGen.from_pretrained()
    loaded = time.monotonic()
    model.generate(text="a red apple", output="image")
    yield Finding(
        "embedded model",
        "ok",
        f"loads in {loaded - start:.1f} s, draws a picture in {time.monotonic() - loaded:.2f} s",
    )
    yield _decoders(model.bundle)


def _decoders(bundle: Any) -> Finding:
    """The diffusion decoders of a bundle, and whether they can be opened here."""
    carried = "; ".join(f"{name} from {' and '.join(drivers)}" for name, drivers in bundle.renderers.items())
    try:
        for name in bundle.renderers:
            bundle.renderer(name)
    except MissingDependency as error:
        return Finding("diffusion decoders", "absent", f"{carried}: {error}")
    return Finding("diffusion decoders", "ok" if carried else "absent", carried or "the embedded model carries none")
