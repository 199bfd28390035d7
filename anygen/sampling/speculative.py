"""Several codes a pass: coupled Jacobi decoding of pictures and sounds. The ids are those of one code a pass.

A pass reads the last chosen id and, after it, guesses at the codes that follow (speculative Jacobi decoding, arXiv
2410.01699). It gives a choice at every position: right ones up to the first wrong guess and in its place, and the
guesses of the next pass after that. A position keeps the waits of its exponential race (`choose`) from pass to pass,
the Gumbel coupling of arXiv 2510.24211: a choice changes only where its distribution changed enough.

Deviation: the papers accept a guess with probability min(1, p/q) and draw from the residual where they do not. Here a
guess is right where it is what its race gives. The waits are a function of the position (`anygen.sampling.race`), so
the choice there is one of the ids before it, and the iteration has one fixed point: the ids of plain sampling. A sample
depends on its seed only, not on the window. (Measured: as many codes a pass as with rejection, see
benchmarks/README.md.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from anygen.grammar import Walk
from tokenizers_mm.codes import Modality

USUAL_WINDOW, MOST_ROWS = 8, 2


def usual_window(modality: Modality | None, num_rows: int, device: torch.device) -> int:
    """Codes a pass where nobody asks for a number: several where that was measured to be faster, else one.

    So it was for one picture on a CPU: one row, or two with guidance. Beyond, a pass is bound by its products, and a
    wrong guess costs as much as a code. Codes of sound are hardly ever guessed right (benchmarks/README.md).
    """
    return USUAL_WINDOW if modality == "image" and num_rows <= MOST_ROWS and device.type == "cpu" else 1


class Draft:
    """What one sample has guessed of the ids after its next one."""

    def __init__(self) -> None:
        self.guesses: list[int] = []
        """In place of the ids after the next one, on their way through the model."""
        self._choices: dict[int, int] = {}  # by place in the answer

    def remember(self, position: int, ids: Sequence[int]) -> None:
        """Take what a pass chose from `position` on: the next guesses, where it does not stand."""
        self._choices = dict(enumerate(ids, position))

    def confirms(self, offset: int, id: int) -> bool:
        """Whether the id chosen at this offset of the pass was guessed, so that the choice after it holds."""
        return offset < len(self.guesses) and self.guesses[offset] == id

    def renew(self, walk: Walk, written: Sequence[int], count: int) -> None:
        """Guess the next codes, up to `count`: what the last pass chose, else the code above or before.

        Args:
            walk: of the sample, after the last id of `written`.
            written: all ids so far.
            count: how many guesses.
        """
        known = list(written)
        count = min(count, walk.num_codes - walk.num_written)
        for ((start, stop),) in walk.ahead(count) if count > 0 else []:
            near = (self._choices.get(len(known), -1), known[-walk.row :][0], *known[:-9:-1])
            known.append(next((id for id in near if start <= id < stop), start))
        self.guesses = known[len(written) :]
