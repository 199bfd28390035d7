"""What a transformer's recipe would cost: parameters, FLOPs, memory, compute; on tensors that have only shapes.

What cannot be known without data is assumed, and told as such: how long texts and sounds are.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from anygen.codebooks import CodebookOrder
from anygen.data.story_tasks import STORY
from anygen.data.tasks import Direction
from anygen.model.causal import qwen3_config
from anygen.model.cost import TrainingCost
from anygen.model.recompute import Recompute
from anygen.model.warm_start import read_qwen3_config
from anygen.stages.from_bundle import as_run, bundle_at
from anygen.stages.pretrain import PretrainConfig
from anygen.stages.tokenizer_facts import TokenizerFacts, tokenizer_facts
from anygen.stages.weighing import BYTES_PER_PARAMETER, counting_saved, figure, num_parameters
from anygen.vocabulary import Vocabulary
from tokenizers_mm import compat  # noqa: F401  before transformers

TEXT_IDS, SOUND_S, CONTROL_IDS, STORY_STEPS = 32, 5.0, 6, 5
"""Assumed of a document: ids of a text, seconds of a sound, control ids of a block with its share of the document's,
steps of a story."""
PEAK_FLOPS, SHARE_OF_PEAK = 989e12, 0.4
"""H100 SXM or H200 in bf16, and the share of it that a billion parameters reach (MFU)."""
SHARDS = 8
_CHUNK_LOGITS, _BYTES_PER_LOGIT = 2**28, 10
"""Logits that exist at once on a GPU: in bf16, in fp32, and their gradient."""
_ATTENTION = "anygen-weighed"


def weigh_pretrain(config: PretrainConfig, recipe: Path | None) -> dict[str, Any]:
    """JSON-able facts of the recipe.

    Raises:
        ConfigError, CheckpointError: no text tokenizer is known, or `init_from` is no checkpoint.
    """
    facts = _tokenizers_of(config, recipe)
    kept = CodebookOrder(config.layout.audio_order, max(1, facts.audio[0]), config.layout.audio_kept).num_kept
    vocabulary = Vocabulary.create(
        text=facts.text,
        image=facts.image,
        audio=(min(kept, facts.audio[0]), facts.audio[1]),
        region=config.location_bins,
        voken=config.vokens,
    )
    if config.init_from is None:
        architecture = qwen3_config(config.model, vocabulary)
    else:
        architecture = read_qwen3_config(config.start_folder)
        architecture.vocab_size = vocabulary.size
    model = _shapes_of(architecture)
    cost = TrainingCost.of_config(architecture)
    per_step = config.row_length * config.rows_per_batch * config.loop.accumulate
    lengths = document_lengths(config, facts, kept)
    weight = sum(config.mixture[direction] * length for direction, length in lengths.items())
    mean_square = sum(config.mixture[direction] * cost.of((length,)) for direction, length in lengths.items())
    flops_per_id = mean_square / weight  # a document of n ids is n ids of the stream
    compute = flops_per_id * per_step * config.loop.steps
    return {
        "vocabulary": {r.name: r.size for r in vocabulary.ranges} | {"all, padded": vocabulary.size},
        "tokenizers": list(facts.sources),
        "parameters": {
            "all": num_parameters(model),
            "embeddings": num_parameters(model) - num_parameters(model.model.layers) - num_parameters(model.model.norm),
            "in matrix products": cost.matrices + cost.head,
        },
        "assumed": f"texts of {TEXT_IDS} ids, sounds of {SOUND_S:g} s (or the longest), stories of {STORY_STEPS} steps",
        "ids of a document": lengths,
        "steps": config.loop.steps,
        "ids per step": per_step,
        "ids in all": per_step * config.loop.steps,
        "GFLOP per id": figure(flops_per_id / 1e9),
        "TFLOP per step": figure(flops_per_id * per_step / 1e12),
        "EFLOP in all": figure(compute / 1e18),
        f"GPU hours (H100 or H200 at {SHARE_OF_PEAK:.0%} MFU)": figure(compute / PEAK_FLOPS / SHARE_OF_PEAK / 3600),
        "GB, 1 process": _memory(config, architecture, model, 1),
        f"GB each of {SHARDS} processes, FSDP": _memory(config, architecture, model, SHARDS),
    }


def _tokenizers_of(config: PretrainConfig, recipe: Path | None) -> TokenizerFacts:
    """Of the run, else of the bundle that it goes on from, else what recipes say."""
    bundle = bundle_at(config.earlier_run) if config.earlier_run is not None else None
    if bundle is None or (config.root / "text_tokenizer").exists():
        return tokenizer_facts(config.root, recipe)
    with tempfile.TemporaryDirectory() as folder:
        return tokenizer_facts(as_run(bundle, Path(folder)), recipe)


def document_lengths(config: PretrainConfig, facts: TokenizerFacts, kept: int) -> dict[str, int]:
    """Ids of an assumed document of each direction of the mixture."""
    seconds = min(SOUND_S, config.layout.max_duration_s)
    ids = {
        "text": TEXT_IDS,
        "image": facts.image[0] * facts.grid_hw[0] * facts.grid_hw[1],
        "audio": kept * round(seconds * facts.rate_hz),
        "region": 4,
        "voken": config.vokens,
    }
    special = dict.fromkeys(STORY, ("text", "image") * STORY_STEPS) | {
        "ask": ("image", "text", "text"),
        "ask_aloud": ("image", "audio", "audio"),
        "locate": ("image", "text", "region"),
        "name": ("image", "text", "region"),
        "quiz": ("image", *("text", "text") * 2, "text", "region", "region", "text"),
        "quiz_listed": ("image", *("text", "text", "text") * 2, "text", "text", "region"),
        "infill_image": ("image", "text", "image"),
        "infill_audio": ("audio", "text", "audio"),
    }
    lengths = {}
    for name in config.mixture:
        direction = Direction.parse(name)
        blocks = special.get(direction.special, (*direction.inputs, *direction.targets))
        lengths[name] = min(config.row_length, sum(ids[block] + CONTROL_IDS for block in blocks))
    return lengths


def saved_bytes(architecture: Any, num_ids: int, *, bf16: bool, recompute: Recompute = "none") -> tuple[int, int]:
    """What a forward pass over `num_ids` keeps for its backward, the head left out; and what one layer of it needs.

    Layers are alike: one and two of them say what all keep.
    """
    one, two = (_saved_by(architecture, layers, num_ids, bf16=bf16) for layers in (1, 2))
    layer, num_layers = two - one, architecture.num_hidden_layers
    if recompute == "none":
        return one + (num_layers - 1) * layer, layer
    kept = 4 * num_ids * architecture.hidden_size  # its input, in fp32 also under autocast
    if recompute == "selective":
        heads, groups = architecture.num_attention_heads, architecture.num_key_value_heads
        widths = 2 * (heads + groups) * architecture.head_dim  # queries, keys, values and what attention gives
        widths += 2 * (architecture.hidden_size + architecture.intermediate_size)  # the other matrices' outputs
        kept += num_ids * ((2 if bf16 else 4) * widths + 4 * heads)
    return one - layer + num_layers * kept, layer


def _memory(config: PretrainConfig, architecture: Any, model: nn.Module, processes: int) -> dict[str, float]:
    bf16 = config.loop.precision == "bf16"
    rows = -(-config.rows_per_batch // processes)
    num_ids = rows * config.row_length
    parameters = num_parameters(model)
    bytes_each = BYTES_PER_PARAMETER + (4 if config.loop.ema_decay else 0)
    logits = min(_CHUNK_LOGITS, num_ids * architecture.vocab_size) * _BYTES_PER_LOGIT
    kept, layer = saved_bytes(architecture, num_ids, bf16=bf16, recompute=config.recompute)
    parts = {
        "weights and optimizer": bytes_each * parameters / processes,
        "activations": float(kept if config.recompute == "none" else kept + layer),
        "logits": float(logits),
    }
    if processes > 1:  # gathered for use and their gradients: what is in no layer, and two layers
        apart = parameters - num_parameters(model.model.layers)  # type: ignore[union-attr,arg-type]
        two_layers = 2 * num_parameters(model.model.layers[0])  # type: ignore[union-attr,index,arg-type]
        parts["gathered"] = float((4 if bf16 else 8) * (apart + two_layers))
    parts["all"] = sum(parts.values())
    return {name: figure(num_bytes / 1e9) for name, num_bytes in parts.items()}


def _saved_by(architecture: Any, num_layers: int, num_ids: int, *, bf16: bool) -> int:
    few = type(architecture)(**{**architecture.to_dict(), "num_hidden_layers": num_layers, "layer_types": None})
    with FakeTensorMode():
        model = _model(few)
        ids_BT = torch.zeros(1, num_ids, dtype=torch.long)
        with counting_saved([model]) as saved, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            model.model(input_ids=ids_BT, use_cache=False)
    return saved.num_bytes


def _shapes_of(architecture: Any) -> Any:
    with torch.device("meta"):
        return _model(architecture)


def _model(architecture: Any) -> Any:
    from transformers import AttentionInterface, Qwen3ForCausalLM

    AttentionInterface.register(_ATTENTION, _attend)
    model = Qwen3ForCausalLM(architecture)
    model.set_attn_implementation(_ATTENTION)
    return model


def _attend(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """As the kernels on a GPU do it: keys and values expanded, the scores never whole."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.to(v.dtype).repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    return F.scaled_dot_product_attention(q.to(v.dtype), k, v, is_causal=True, scale=scaling).transpose(1, 2), None
