"""How much of a codebook is used: the share of codes that occur, and the perplexity of their use.

Both are of a whole set, never of one batch: 4,096 codes cannot use more than half of a codebook of 8,192.
"""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor, nn

from tokenizers_mm.together import is_first, summed

logger = logging.getLogger("anygen")
REMEDY = "raise dead_code_share (0.25 replaces codes that die), or lower codebook_size or code_dim"


def usage_of(codes: Tensor, codebook_size: int) -> tuple[float, float]:
    """Share of the codebook that occurs, and the perplexity of its use.

    >>> usage_of(torch.tensor([0, 0, 2, 2]), 4)
    (0.5, 2.0)
    """
    return _usage(torch.bincount(codes.flatten(), minlength=codebook_size))


class UsageMonitor(nn.Module):
    """Watches a codebook while it is trained, and says when it collapses.

    Its counts are buffers, so a resumed run says what an undisturbed one says.

    Args:
        codebook_size: entries.
        window: batches that are counted together.
        alarm: share of the codebook below which `update` warns, once a window.
        name: of the codebook, in the warning.
        remedy: what the warning says to do.
    """

    def __init__(
        self, codebook_size: int, *, window: int = 50, alarm: float = 0.5, name: str = "", remedy: str = REMEDY
    ) -> None:
        super().__init__()
        self.window, self.alarm, self._name, self._remedy = window, alarm, name, remedy
        self._hits: Tensor
        self._batches: Tensor
        self._figures: Tensor
        self.register_buffer("_hits", torch.zeros(codebook_size, dtype=torch.long))
        self.register_buffer("_batches", torch.zeros((), dtype=torch.long))
        self.register_buffer("_figures", torch.full((2,), torch.nan))

    @torch.no_grad()
    def update(self, codes: Tensor) -> dict[str, Tensor]:
        """Count one batch of all processes; `usage` and `perplexity` of the last whole window, NaN before one."""
        self._hits += summed(torch.bincount(codes.flatten(), minlength=len(self._hits)))
        self._batches += 1
        if int(self._batches) >= self.window:
            seen = bool(self._hits.any())  # a codebook that was left out all the time has no figures
            self._figures.copy_(torch.tensor(_usage(self._hits) if seen else (math.nan, math.nan)))
            possible = min(1.0, float(self._hits.sum()) / len(self._hits))
            if (usage := float(self._figures[0])) < self.alarm * possible and is_first():
                logger.warning(
                    "codebook collapse%s: the last %d batches used %.1f %% of %d codes (alarm below %.0f %%); %s",
                    *(self._name and f" ({self._name})", self.window, 100 * usage, len(self._hits), 100 * self.alarm),
                    self._remedy,
                )
            self._hits.zero_()
            self._batches.zero_()
        return {"usage": self._figures[0].clone(), "perplexity": self._figures[1].clone()}


def _usage(hits: Tensor) -> tuple[float, float]:
    share = hits.double() / hits.sum()
    entropy = -(share * share.clamp_min(1e-12).log()).sum()
    return float((hits > 0).double().mean()), round(float(entropy.exp()), 6)
