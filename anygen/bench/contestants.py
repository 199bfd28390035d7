"""Who trains in the benchmark: the same weights, the same documents, the same update, different ways through them.

- `ours`: packed rows, attention per segment, our loss.
- `padded`: transformers as it is, batches padded to their longest document, `attention_mask`, SDPA.
- `flattened`: transformers' `DataCollatorWithFlattening` (position ids that restart), SDPA.
- `unmasked`: our packed rows without a document mask. It reads across documents: another, wrong computation, shown for
  what the mask costs. It does not pass the gate and is not meant to.
- `ours compiled`: `ours` with compiled blocks.

A step takes all documents of a round to one update. Batches of a round that are several add up their gradients, as
transformers' trainer does (`num_items_in_batch`).

Dimension key: B documents, L padded length, T packed ids, R rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anygen.bench.samples import Round
from anygen.errors import AnyGenError
from anygen.model.causal import ModelConfig, create_model
from anygen.model.loss import LossWeights, NextTokenLoss
from anygen.training.schedule import OptimizerConfig, make_optimizer
from anygen.vocabulary import Vocabulary
from tokenizers_mm import compat  # noqa: F401  before transformers
from tokenizers_mm.codes import IntArray

IGNORED = -100
TOLERANCE = 1e-3
"""Greatest difference of losses, and of gradients over their norm."""


class GateError(AnyGenError):
    """Contestants do not compute the same thing: their times must not be compared."""


@dataclass(frozen=True)
class Contestant:
    """One way through a round."""

    name: str
    prepare: Callable[[Round], list[Any]]
    """Batches, on the device; what a data loader does, so not timed."""
    loss: Callable[[Any], Tensor]
    """Of one batch; a round's losses add up to the mean over its labels."""
    gated: bool = True


class Field:
    """All contestants over one set of weights, and their optimizer."""

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary, device: torch.device, *, compiled: bool) -> None:
        self.device = device
        self.model = create_model(config, vocabulary, seed=0).to(device)
        self._config, self._vocabulary = config, vocabulary
        self._optimizer_config = OptimizerConfig(lr=1e-4)
        self._optimizer = make_optimizer(self.model, self._optimizer_config)
        reference = self._sharing()
        reference.set_attn_implementation("sdpa")
        self.contestants = [
            self._ours("ours", self.model),
            Contestant("padded", lambda r: self._to_device(map(padded_batch, r.batches), r), _loss_of(reference)),
            Contestant("flattened", lambda r: self._to_device(map(_flattened, r.batches), r), _loss_of(reference)),
            Contestant(
                "unmasked", lambda r: self._to_device([_unmasked(r)], r), _loss_of(reference), gated=False
            ),
        ]  # fmt: skip
        if compiled:
            ours = self._sharing()
            for layer in ours.model.layers:
                layer.compile()
            self.contestants.append(self._ours("ours compiled", ours))

    def _sharing(self) -> Any:
        """Another model over the same parameters: only their owner differs."""
        model = create_model(self._config, self._vocabulary, seed=0).to(self.device)
        model.load_state_dict(self.model.state_dict(keep_vars=True), assign=True)
        assert all(a is b for a, b in zip(model.parameters(), self.model.parameters(), strict=True))
        return model

    def _ours(self, name: str, model: Any) -> Contestant:
        loss = NextTokenLoss(model, self._vocabulary, z_loss=0.0).to(self.device)
        weights = LossWeights(self._vocabulary, {}, inputs=1.0)
        return Contestant(name, lambda r: [weights.batch(r.packed).to(self.device)], lambda batch: loss(batch)[0])

    def _to_device(self, batches: Any, r: Round) -> list[dict[str, Any]]:
        count = torch.tensor(r.num_labels)
        return [{k: v.to(self.device) for k, v in {**b, "num_items_in_batch": count}.items()} for b in batches]

    def gradients(self, contestant: Contestant, batches: list[Any], *, bf16: bool) -> Tensor:
        """Gradients of a round, into `.grad`; returns its loss."""
        self._optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for batch in batches:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                loss = contestant.loss(batch)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    def step(self, contestant: Contestant, batches: list[Any], *, bf16: bool) -> None:
        """One update."""
        self.gradients(contestant, batches, bf16=bf16)
        nn.utils.clip_grad_norm_(self.model.parameters(), self._optimizer_config.max_grad_norm)
        self._optimizer.step()

    def gate(self, r: Round) -> dict[str, dict[str, float]]:
        """How far each contestant's loss and gradients are from the padded baseline's, in fp32.

        Raises:
            GateError: farther than `TOLERANCE`.
        """
        gated = sorted((c for c in self.contestants if c.gated), key=lambda c: c.name != "padded")
        figures: dict[str, dict[str, float]] = {}
        expected: tuple[Tensor, list[Tensor]] | None = None
        for contestant in gated:
            loss = self.gradients(contestant, contestant.prepare(r), bf16=False)
            found = [p.grad.clone() for p in self.model.parameters() if p.grad is not None]
            expected = expected or (loss, found)
            difference = max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected[1], strict=True))
            figures[contestant.name] = {"loss": float(loss), "loss_difference": abs(float(loss - expected[0]))}
            figures[contestant.name]["gradient_difference"] = difference
            if not max(figures[contestant.name]["loss_difference"], difference) <= TOLERANCE:
                raise GateError(
                    f"{contestant.name} does not compute what padded does: loss {float(loss):.6f}, not "
                    f"{float(expected[0]):.6f}; gradients differ by {difference:.2g} of their norm; at most "
                    f"{TOLERANCE} is allowed, so nothing is timed"
                )
        return figures


def _loss_of(model: Any) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda batch: model(**batch, use_cache=False).loss


def padded_batch(documents: tuple[IntArray, ...]) -> dict[str, Tensor]:
    """Padded to the longest.

    >>> import numpy as np
    >>> padded_batch((np.array([5, 6]), np.array([7])))["labels"].tolist()
    [[5, 6], [7, -100]]
    """
    ids = [torch.from_numpy(ids_S) for ids_S in documents]
    mask = [torch.ones_like(ids_S) for ids_S in ids]
    pad = nn.utils.rnn.pad_sequence
    labels_BL = pad(ids, batch_first=True, padding_value=IGNORED)
    return {
        "input_ids": pad(ids, batch_first=True), "attention_mask": pad(mask, batch_first=True), "labels": labels_BL
    }  # fmt: skip


def _flattened(documents: tuple[IntArray, ...]) -> dict[str, Tensor]:
    from transformers import DataCollatorWithFlattening

    return dict(DataCollatorWithFlattening()([{"input_ids": ids_S.tolist()} for ids_S in documents]))


def _unmasked(r: Round) -> dict[str, Tensor]:
    packed, num_rows = r.packed, r.num_rows
    labels_T = torch.from_numpy(packed.ids_T).clone()
    labels_T[1:][~torch.from_numpy(packed.predicts_T)[:-1]] = IGNORED  # the first id of each document
    ids_RT = torch.from_numpy(packed.ids_T).view(num_rows, -1)
    return {"input_ids": ids_RT, "labels": labels_T.view(num_rows, -1)}
