"""SIGTERM and SIGINT as a request to save and leave, not as a crash."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

import torch

from anygen.errors import AnyGenError
from anygen.training import processes

_HEARD = (signal.SIGTERM, signal.SIGINT)


class Interrupted(AnyGenError):
    """Work stopped on a signal, after a clean save; exit code 128 + signal."""

    def __init__(self, signal_number: int, what: str) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}; {what}: run the same command to go on")
        self.exit_code = 128 + signal_number


class StopRequest:
    """Context in which SIGTERM and SIGINT only set `signal_number`; the loop inside looks at it between steps.

    A second SIGINT ends the process in the usual way (a checkpoint being written is never half visible). Outside the
    main thread, where Python allows no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in _HEARD:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = number

    def agree(self, device: torch.device) -> None:
        """Where one process was told to stop, all are: they save together."""
        if processes.count() > 1:
            told = processes.total(torch.tensor([float(self.signal_number == n) for n in _HEARD], device=device))
            self.signal_number = next((n for n, count in zip(_HEARD, told.tolist(), strict=True) if count), None)

    def check(self, what: str) -> None:
        """Raise `Interrupted` where a signal has come."""
        if self.signal_number is not None:
            raise Interrupted(self.signal_number, what)
