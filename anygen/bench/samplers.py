"""Who samples in the benchmark: the same weights and prompts, greedy, ours and transformers' own loops.

- `ours fp32`, `ours bf16`: the engine, all rows of the output matrix.
- `ours bf16 slice`: only `SLICE` rows of it, as in a picture block. It chooses from fewer ids: another answer, so it
  does not pass the gate and is not meant to.
- `generate fp32`, `generate bf16`: transformers' `generate` with its dynamic cache; `static`: with its static cache.
- `generate_batch`: transformers' continuous batching.

Dimension key: B rows, T ids of a prompt, N new ids.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anygen.errors import AnyGenError
from anygen.sampling.engine import Engine
from tokenizers_mm import compat  # noqa: F401  before transformers

SLICE = 1024
_PAGE = 64
TOLERANCE = 1e-5
"""Greatest difference of fp32 logits."""


class GateError(AnyGenError):
    """Contestants do not compute the same thing: their times must not be compared."""


@dataclass(frozen=True)
class Contestant:
    """One way from prompts to ids."""

    name: str
    generate: Callable[[Tensor, int], Tensor]
    """From B x T prompts and N to B x N ids."""
    exact: bool
    """Expected to give the ids of `generate fp32`."""
    num_bytes: int
    """Of weights, read in each step."""


def contestants(model: Any, *, continuous: bool) -> list[Contestant]:
    """All, over the weights of one fp32 `Qwen3ForCausalLM`.

    Args:
        model: whose weights are read; it is not changed.
        continuous: with transformers' `generate_batch`.
    """
    reference = copy.deepcopy(model).eval()
    reference.set_attn_implementation("sdpa")
    rough = copy.deepcopy(reference).to(torch.bfloat16)
    exact, fast = Engine(model), Engine(model, dtype=torch.bfloat16)
    vocabulary = ((0, len(model.lm_head.weight)),)
    num = sum(p.numel() for p in model.model.layers.parameters()) + model.lm_head.weight.numel()
    sliced = num - model.lm_head.weight.numel() + SLICE * model.lm_head.weight.shape[1]
    made = [
        Contestant("ours fp32", lambda ids, n: greedy(exact, ids, n, vocabulary), True, 4 * num),
        Contestant("ours bf16", lambda ids, n: greedy(fast, ids, n, vocabulary), False, 2 * num),
        Contestant("ours bf16 slice", lambda ids, n: greedy(fast, ids, n, ((0, SLICE),)), False, 2 * sliced),
        Contestant("generate fp32", _generate(reference, None), True, 4 * num),
        Contestant("generate bf16", _generate(rough, None), False, 2 * num),
        Contestant("static fp32", _generate(reference, "static"), True, 4 * num),
    ]
    if continuous:
        made.append(Contestant("generate_batch fp32", _continuous(reference), True, 4 * num))
    return made


@torch.inference_mode()
def greedy(engine: Engine, prompts_BT: Tensor, num_new: int, ranges: tuple[tuple[int, int], ...]) -> Tensor:
    """The likeliest of these ids, again and again; B x N."""
    cache = engine.new_cache(len(prompts_BT), prompts_BT.shape[1] + num_new)
    hidden_BD = engine.prefill(list(prompts_BT.numpy()), cache)
    ids = []
    for left in reversed(range(num_new)):
        ids.append(engine.logits(hidden_BD, ranges).argmax(-1) + ranges[0][0])
        if left:
            hidden_BD = engine.step(ids[-1], cache)
    return torch.stack(ids, 1)


def _settings(num_new: int, cache: str | None) -> Any:
    from transformers import GenerationConfig

    never = {"eos_token_id": None, "pad_token_id": 0, "bos_token_id": None}
    return GenerationConfig(max_new_tokens=num_new, do_sample=False, cache_implementation=cache, **never)


def _generate(model: Any, cache: str | None) -> Callable[[Tensor, int], Tensor]:
    def generate(prompts_BT: Tensor, num_new: int) -> Tensor:
        mask_BT = torch.ones_like(prompts_BT)
        out = model.generate(prompts_BT, attention_mask=mask_BT, generation_config=_settings(num_new, cache))
        return out[:, prompts_BT.shape[1] :]

    return generate


def _continuous(model: Any) -> Callable[[Tensor, int], Tensor]:
    from transformers import ContinuousBatchingConfig

    def generate(prompts_BT: Tensor, num_new: int) -> Tensor:
        pages = len(prompts_BT) * (1 + (prompts_BT.shape[1] + num_new) // _PAGE)
        room = ContinuousBatchingConfig(  # by itself it takes most of the memory
            page_size=_PAGE, num_blocks=2 * pages, max_batch_tokens=max(64, prompts_BT.numel())
        )
        found = model.generate_batch(
            prompts_BT.tolist(),
            generation_config=_settings(num_new, None),
            continuous_batching_config=room,
            warmup=False,
            progress_bar=False,
        )
        ordered = sorted(found.values(), key=lambda one: int(str(one.request_id).rsplit("_", 1)[-1]))
        return torch.tensor([one.generated_tokens for one in ordered])

    return generate


def gate(model: Any, made: list[Contestant], prompts_BT: Tensor, num_new: int) -> dict[str, Any]:
    """How far the engine's fp32 logits are from transformers', and that exact contestants give the same ids.

    Raises:
        GateError: they do not.
    """
    reference = copy.deepcopy(model).eval()
    reference.set_attn_implementation("sdpa")
    engine = Engine(model)
    hidden_BD = engine.prefill(list(prompts_BT.numpy()), engine.new_cache(*prompts_BT.shape))
    logits_BV = engine.logits(hidden_BD, ((0, len(model.lm_head.weight)),))
    with torch.inference_mode():
        difference = float((logits_BV - reference(input_ids=prompts_BT).logits[:, -1]).abs().max())
    expected = next(c for c in made if c.name == "generate fp32").generate(prompts_BT, num_new)
    same = {c.name: torch.equal(c.generate(prompts_BT, num_new), expected) for c in made if c.exact}
    if difference > TOLERANCE or not all(same.values()):
        raise GateError(f"logits differ by {difference:.2g} (at most {TOLERANCE}), same greedy ids: {same}; not timed")
    return {"logits_difference": difference, "same_greedy_ids": same, "prompts": len(prompts_BT), "ids": num_new}
