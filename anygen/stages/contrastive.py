"""Contrastive losses of the stage `teacher`: pictures with captions, and with sounds where there is a tower for them.

InfoNCE over the pairs of a batch in both directions (CLIP, arXiv 2103.00020). Where it is asked for, pairs that say the
same are positives of one another, their shares of a row equal (UniCL, arXiv 2204.03610): in data labelled with ten
classes most of a batch would else be false negatives.

Several processes meet in one loss, as one process has it on the whole batch: each gathers the embeddings of all and
computes all of it, so every pair of the batch is a negative.

Dimension key: B pairs, S sounds among them, E embedding.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_mm.sound_tower import SoundTower
from tokenizers_mm.together import gathered, gathered_with_gradient, has_others

PIXEL_MEAN = PIXEL_STD = 0.5


def contrastive_loss(logits_BB: Tensor, positives_BB: Tensor) -> Tensor:
    """Mean of both directions of UniCL's cross-entropy; InfoNCE, bit for bit, where no pair has two positives.

    Args:
        logits_BB: similarity of picture (row) and partner (column).
        positives_BB: True where they say the same; symmetric, and True on the diagonal.
    """
    targets_BB = positives_BB.float() / positives_BB.sum(dim=1, keepdim=True)
    return (_direction(logits_BB, targets_BB) + _direction(logits_BB.T, targets_BB)) / 2


def _direction(logits_BB: Tensor, targets_BB: Tensor) -> Tensor:
    own = torch.arange(len(logits_BB), device=logits_BB.device)
    chances_BB = logits_BB.log_softmax(dim=1)
    # Written as a difference to InfoNCE, so that value and gradient are exactly its own where the difference is 0.
    shared_B = chances_BB.diagonal() - (targets_BB * chances_BB).sum(dim=1)
    return F.cross_entropy(logits_BB, own) + shared_B.mean()


def matched_share(logits_BB: Tensor, positives_BB: Tensor) -> Tensor:
    """Share of pictures whose nearest partner says what they say."""
    return positives_BB.gather(1, logits_BB.argmax(dim=1, keepdim=True)).float().mean()


def equal_rows(ids_BL: Tensor) -> Tensor:
    """B x B, True where two rows are equal.

    >>> equal_rows(torch.tensor([[1, 2], [3, 4], [1, 2]])).int().tolist()
    [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    """
    return (ids_BL[:, None] == ids_BL[None]).all(dim=2)


def _as_it_is(rows: Tensor) -> Tensor:
    return rows


class Towers(nn.Module):
    """A batch to its loss and figures; with `share_equal`, equal captions (and equal spoken texts) share their rows.

    A batch is `pixels` and caption `ids`; with a sound tower also `sounds`, the `owners` of these (rows of `pixels`)
    and `texts`, a number for what is said.
    """

    spares_parameters = True

    def __init__(
        self,
        model: Any,
        sound: SoundTower | None = None,
        *,
        share_equal: bool = False,
        sound_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self._share_equal = share_equal
        self.model = model
        self.sound = sound
        self._sound_weight = sound_weight

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and `matched`, `sound` (loss) and `sound_matched`; NaN where a batch has fewer than two sounds."""
        pixels = (batch["pixels"] - PIXEL_MEAN) / PIXEL_STD
        out = self.model(input_ids=batch["ids"], attention_mask=None, pixel_values=pixels, return_dict=True)
        # a validation batch is the same on every process: there is nothing to gather
        together = gathered_with_gradient if self.training and has_others() else _as_it_is
        logits_BB, ids_BL = out.logits_per_image, batch["ids"]
        if together is not _as_it_is:
            logits_BB = together(out.image_embeds) @ together(out.text_embeds).T * self.model.logit_scale.exp()
            ids_BL = gathered(ids_BL)
        logits_BB, positives_BB = logits_BB.float(), self._positives(ids_BL)
        loss = contrastive_loss(logits_BB, positives_BB)
        report = {"matched": matched_share(logits_BB, positives_BB)}
        if self.sound is None:
            return loss, report
        texts_S = together(batch["texts"])
        if len(texts_S) < 2:  # one sound alone has nothing to be told from
            nothing = torch.tensor(math.nan, device=loss.device)
            return loss, {**report, "sound": nothing, "sound_matched": nothing}
        pictures_SE = out.image_embeds.float()[batch["owners"]]
        vectors_SE = self.sound(batch["sounds"]) if len(batch["owners"]) else torch.zeros_like(pictures_SE)
        pictures_SE, vectors_SE = together(pictures_SE), together(vectors_SE)
        with torch.autocast(pictures_SE.device.type, enabled=False):
            logits_SS = self.sound.logit_scale.exp() * pictures_SE @ vectors_SE.T
        positives_SS = self._positives(texts_S[:, None])
        sound = contrastive_loss(logits_SS, positives_SS)
        report |= {"sound": sound, "sound_matched": matched_share(logits_SS, positives_SS)}
        return loss + self._sound_weight * sound, report

    def _positives(self, ids_BL: Tensor) -> Tensor:
        if self._share_equal:
            return equal_rows(ids_BL)
        return torch.eye(len(ids_BL), dtype=torch.bool, device=ids_BL.device)
