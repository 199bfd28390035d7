"""What the choices of nano's pretraining give: loss weights, z-loss, QK-norm, softmax, noise, optimizer, size.

    python benchmarks/nano_choices.py RUN OUT [--steps 900] [--seeds 0] [--limit 60] [--variants ...]

RUN is a run that has done nano's stages up to tokenize. Every variant is the recipe `nano` with a smaller model and one
change; all see the same documents, and models of other sizes get as many steps as the same number of operations allow.
Then each is asked for pictures of training names and of held-out ones. Interrupted, it goes on where it was. It writes
OUT/results.json: validation nats by modality (of what is to be generated), retrieval, seconds a step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml

from anygen.api import AnyGen
from anygen.config import build
from anygen.evaluation.emoji import RealEmoji
from anygen.evaluation.scores import proportion
from anygen.model.causal import create_model, num_parameters
from anygen.recipes_index import find_recipe
from anygen.request import Request
from anygen.stages import pretrain
from anygen.stages.bundle import BundleConfig
from anygen.stages.run import run_stage
from anygen.vocabulary import Vocabulary

BASE: dict[str, Any] = {"model": {"size": "nano", "width": 192, "mlp_width": 512, "head_width": 48}}
ADAMW = {"kind": "adamw", "lr": 1.5e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}
VARIANTS: dict[str, dict[str, Any]] = {
    "as the recipe": {},
    "text weighs 1": {"loss_weights": {"text": 1.0}},
    "text weighs 9": {"loss_weights": {"text": 9.0}},
    "inputs weigh 0": {"input_weight": 0.0},
    "inputs weigh 1": {"input_weight": 1.0},
    "no z-loss": {"z_loss": 0.0},
    "z-loss 1e-2": {"z_loss": 1e-2},
    "no QK-norm": {"qk_norm": False},
    "sliced softmax": {"sliced_softmax": True},
    "rare words three times": {"rare_repeats": 3.0},
    "no code noise": {"code_noise": 0.0},
    "code noise 0.3": {"code_noise": 0.3},
    "AdamW": {"optimizer": ADAMW},
    "rows drawn at random": {"code_rows": "random"},
    "two codebooks of sound": {"layout": {"audio_order": "flat", "max_duration_s": 6.0}},
    "2 layers": {"model": {"num_layers": 2}},
    "width 320": {"model": {"width": 320, "mlp_width": 896, "head_width": 64}},
}


@contextlib.contextmanager
def without_qk_norm() -> Iterator[None]:
    """Models created inside have none: Qwen3 knows no such option."""

    def created(*args: Any, **kwargs: Any) -> Any:
        model = create_model(*args, **kwargs)
        for layer in model.model.layers:
            layer.self_attn.q_norm = layer.self_attn.k_norm = torch.nn.Identity()
        return model

    with mock.patch.object(pretrain, "create_model", created):
        yield


def recipe(root: Path, variant: dict[str, Any], *, seed: int, steps: int) -> dict[str, Any]:
    """The recipe `nano` with the smaller model and one change."""
    fields: dict[str, Any] = yaml.safe_load(find_recipe("nano/pretrain.yaml").read_text())
    fields["model"] |= BASE["model"] | variant.get("model", {})
    fields |= {key: value for key, value in variant.items() if key not in ("model", "optimizer", "qk_norm")}
    optimizer = {**fields["loop"]["optimizer"], **variant.get("optimizer", {}), "warmup_steps": min(100, steps // 3)}
    fields["loop"] |= {"steps": steps, "seed": seed, "validate_every": 0, "save_every": 300, "optimizer": optimizer}
    return {"root": root, **fields}


def operations(variant: dict[str, Any], run: Path) -> float:
    """Parameters that take part in a product for each id: a step's work, but for a constant."""
    config = build(pretrain.PretrainConfig, recipe(run, variant, seed=0, steps=1), source="size")
    tokenizers = pretrain.open_tokenizers(run, location_bins=config.location_bins)
    audio = tokenizers.get("audio")
    books = config.layout.audio_kept or (audio.num_codebooks if audio else 1)
    vocabulary = Vocabulary.of(tokenizers, audio_codebooks=books, voken=config.vokens)
    return float(num_parameters(create_model(config.model, vocabulary, seed=0)))


def trained(run: Path, own: Path, variant: dict[str, Any], *, seed: int, steps: int) -> tuple[Any, dict[str, Any]]:
    """The model of a variant and its figures."""
    own.mkdir(parents=True, exist_ok=True)
    for name in ("data", "text_tokenizer", "image_tokenizer", "audio_tokenizer", "tokenize"):
        if not (own / name).exists():
            (own / name).symlink_to((run / name).resolve())
    config = build(pretrain.PretrainConfig, recipe(own, variant, seed=seed, steps=steps), source="study")
    with contextlib.nullcontext() if variant.get("qk_norm", True) else without_qk_norm():
        result = run_stage(config)
    figures = {name: value for name, value in result.metrics.items() if name.startswith("validation_")}
    rows = [json.loads(line) for line in (own / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    norms = [row["grad_norm"] for row in rows]
    return own, figures | {
        "steps": steps,
        "parameters": result.metrics["parameters"],
        "step_s": sorted(row["step_s"] for row in rows)[len(rows) // 2],
        "largest_gradient_after_warm_up": max(norms[len(norms) // 4 :]),
    }


def pictures_right(own: Path, world: RealEmoji, limit: int) -> dict[str, Any]:
    """Share of generated pictures that are nearest to the right emoji, of training names and held-out ones."""
    (bundle,) = run_stage(build(BundleConfig, {"root": own, "name": "study"}, source="study")).outputs
    model = AnyGen.from_pretrained(bundle)
    found: dict[str, Any] = {}
    training = [i for i, emoji in enumerate(world.emoji) if emoji.split == "train"]
    for group, items in {"train": training, "held_out": world.held_out()}.items():
        chosen = sorted(random.Random(0).sample(items, min(limit, len(items))))
        requests = [
            Request(text=world.emoji[i].parts.phrase, output="image", seed=i, temperature=0.5, guidance_scale=1.5)
            for i in chosen
        ]
        outputs = model.generate_batch(requests)
        right = [
            world.nearest(output.samples[0].of("image")[0]) == int(world.classes[i])
            for i, output in zip(chosen, outputs, strict=True)
        ]
        score = proportion(right)
        found[group] = {"retrieval": score.value, "interval": [score.low, score.high], "n": len(chosen)}
    return found


def main() -> None:
    """Run what is missing, write and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "results.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    world = RealEmoji(64)
    work = operations({}, options.run)
    for variant in options.variants:
        changes = VARIANTS[variant]
        steps = round(options.steps * work / operations(changes, options.run))
        for seed in options.seeds:
            if str(seed) in results.get(variant, {}):
                continue
            own = options.out / variant.replace(" ", "-") / f"seed{seed}"
            own, figures = trained(options.run, own, changes, seed=seed, steps=steps)
            if changes.get("qk_norm", True):  # a bundle is a Qwen3, which has it
                figures |= pictures_right(own, world, options.limit)
            results.setdefault(variant, {})[str(seed)] = figures
            print(variant, seed, json.dumps(figures), flush=True)
            path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
