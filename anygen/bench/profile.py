"""Where the time of one call went: `anygen generate --profile`.

While a profile is open the functions that do the work are timed, each without what the timed functions inside it take,
so that the parts add up to the whole. Timing costs a few microseconds a function: about a tenth of a small model's
step.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from anygen.api import AnyGen
from anygen.finishing import Finisher
from anygen.sampling.engine import Engine
from anygen.sampling.linear import Linear
from anygen.sampling.sampler import _Sampler
from anygen.starting import Starter

PARTS: dict[str, tuple[tuple[Any, str], ...]] = {
    "encode": ((AnyGen, "_states"), (Starter, "answering")),
    "prefill": ((Engine, "prefill"),),
    "steps: linears": ((Linear, "__call__"), (Linear, "add")),
    "steps: attention": ((Engine, "attend_cached"),),
    "steps: norms, rotations, cache": ((Engine, "step"), (Engine, "extend")),
    "steps: choice": ((_Sampler, "_choose_group"),),
    "decode": ((Finisher, "sample"),),
    "grammar, rows and the rest": ((AnyGen, "generate_batch"),),
}
_WHOLE = "prefill"
"""Not taken apart."""


class Profile:
    """Seconds and calls of each part."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.calls = dict.fromkeys(PARTS, 0)
        self._open: list[str] = []
        self._since = 0.0

    def _switch(self, device: torch.device | None = None) -> None:
        """Charge the time since the last switch to the part that is open."""
        if torch.cuda.is_available():
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        @functools.wraps(function)
        def run(*arguments: Any, **options: Any) -> Any:
            if _WHOLE in self._open:
                return function(*arguments, **options)
            self._switch()
            self._open.append(part)
            self.calls[part] += 1
            try:
                return function(*arguments, **options)
            finally:
                self._switch()
                self._open.pop()

        return run

    def lines(self) -> list[str]:
        """A table; parts that took no time are left out."""
        total = sum(self.seconds.values())
        used = [(part, seconds) for part, seconds in self.seconds.items() if self.calls[part]]
        rows = [f"{part:32}{1e3 * s:9.1f} ms{100 * s / total:6.1f} %{self.calls[part]:7d} calls" for part, s in used]
        return [*rows, f"{'together':32}{1e3 * total:9.1f} ms"]


@contextlib.contextmanager
def profiled() -> Iterator[Profile]:
    """Time everything that runs inside; one at a time in a process."""
    profile = Profile()
    plain = [(owner, name, owner.__dict__[name], part) for part, places in PARTS.items() for owner, name in places]
    try:
        for owner, name, function, part in plain:
            setattr(owner, name, profile.timed(part, function))
        yield profile
    finally:
        for owner, name, function, _ in plain:
            setattr(owner, name, function)
