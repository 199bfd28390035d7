"""Activation checkpointing: what a layer computed is computed again in the backward pass instead of being kept.

Full recomputation keeps a layer's input alone and costs one forward pass more. Selective recomputation keeps what is
dear, the matrix products and attention, and repeats the cheap rest (norms, rotations, gates), which holds most bytes.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

Recompute = Literal["none", "selective", "full"]
_DEAR = (
    "aten.mm",
    "aten.addmm",
    "aten.bmm",
    "aten.baddbmm",
    "aten._scaled_dot_product",
    "aten._flash_attention",
    "anygen.",
)


def recompute_activations(model: Any, what: Recompute) -> None:
    """Switch it on in a model of `transformers`, for training; gradients stay the same to the last bit."""
    if what == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if what == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    is_dear = str(operator).startswith(_DEAR)
    return CheckpointPolicy.MUST_SAVE if is_dear else CheckpointPolicy.PREFER_RECOMPUTE
