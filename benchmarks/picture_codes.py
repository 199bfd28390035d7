"""What a transformer learns from picture codes: VQ-KD against pixels alone, everything else equal.

    python benchmarks/picture_codes.py RUN OUT [--seeds 0 1] [--limit 150]

RUN is a run that has done the stages data, text_tokenizer and teacher (`anygen run recipes/emoji64`). Every variant
gets the same pictures, encoder, codebook, pixel head, steps and seeds; only its losses differ. Then one transformer
learns text -> picture on each variant's codes, and is asked for pictures of training names and of held-out ones.
Interrupted, it goes on where it was. It writes OUT/results.json.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from anygen.api import AnyGen
from anygen.config import build
from anygen.evaluation.emoji import RealEmoji
from anygen.evaluation.frechet import frechet_distance
from anygen.evaluation.scores import proportion
from anygen.request import Request
from anygen.stages.catalogue import STAGES
from anygen.stages.image_tokenizer import ImageTokenizerConfig, open_teacher
from anygen.stages.run import run_stage
from tokenizers_mm.image import to_pixels
from tokenizers_mm.teacher import VisionTeacher

VARIANTS: dict[str, dict[str, Any]] = {
    "pixels": {"deep_weight": 0.0, "shallow_weight": 0.0, "pixel_weight": 10.0, "head_start": "joint"},
    "local pixels": {
        "encoder": {"margin_px": 0},
        "deep_weight": 0.0,
        "shallow_weight": 0.0,
        "pixel_weight": 10.0,
        "head_start": "joint",
    },
    "pixels within 2 px": {
        "encoder": {"margin_px": 2},
        "deep_weight": 0.0,
        "shallow_weight": 0.0,
        "pixel_weight": 10.0,
        "head_start": "joint",
    },
    "deep": {"deep_weight": 1.0, "shallow_weight": 0.0},
    "deep + shallow": {"deep_weight": 1.0, "shallow_weight": 1.0},
    "light teacher + pixels": {
        "deep_weight": 0.1,
        "shallow_weight": 0.1,
        "pixel_weight": 10.0,
        "head_start": "joint",
    },
    "deep + shallow + pixels": {
        "deep_weight": 1.0,
        "shallow_weight": 1.0,
        "pixel_weight": 10.0,
        "head_start": "joint",
    },
}
MUON = {"kind": "muon", "muon_lr_ratio": 8.0, "lr": 1e-3, "betas": [0.9, 0.99], "weight_decay": 1e-4}
TOKENIZER: dict[str, Any] = {
    "encoder": {"width": 128, "depth": 3, "num_heads": 4, "codebook_size": 1024, "code_dim": 16},
    "head": {"width": 192, "depth": 2, "num_heads": 6, "refine_channels": 16},
    "batch_size": 64,
    "steps_without_quantiser": 60,
}
MODEL: dict[str, Any] = {
    "model": {"size": "nano", "width": 192, "mlp_width": 512, "head_width": 48, "max_positions": 1024},
    "mixture": {"emoji:text>image": 1.0},
    "loss_weights": {"text": 3.0},
    "rows_per_batch": 1,
}
CHANGES: dict[str, dict[str, Any]] = {
    "code noise 0.15": {"code_noise": 0.15},
    "rows from the codebook": {"code_rows": "codebook"},
    "Muon": {
        "optimizer": {"kind": "muon", "muon_lr_ratio": 4.0, "lr": 2e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}
    },
}
"""What the transformer's training may do otherwise."""


def loop(steps: int, optimizer: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """A loop's recipe; both sides of a comparison get the same."""
    more = {"warmup_steps": steps // 15, "min_lr_ratio": 0.02, "max_grad_norm": 3.0}
    rest = {"log_every": 50, "save_every": 200, "compile": True}
    return {"steps": steps, "seed": seed, "optimizer": {**optimizer, **more}, **rest}


def stage(kind: str, root: Path, **fields: Any) -> Any:
    """Run one stage of the package, or find it done."""
    import importlib

    config_class = getattr(importlib.import_module(f"anygen.stages.{kind}"), STAGES[kind].config_class)
    return run_stage(build(config_class, {"root": root, **fields}, source=kind))


def tokenizer_of(variant: str, base: Path, out: Path, steps: int) -> Path:
    """The run in which a variant's picture tokenizer is trained and the pictures are encoded."""
    root = out / variant.replace(" ", "")
    root.mkdir(parents=True, exist_ok=True)
    for name in ("data", "text_tokenizer", "teacher"):
        if not (root / name).exists():
            (root / name).symlink_to((base / name).resolve())
    phases = {"vqkd_loop": loop(steps, MUON), "head_loop": loop(steps // 2, {**MUON, "muon_lr_ratio": 4.0})}
    encoder = {**TOKENIZER["encoder"], **VARIANTS[variant].get("encoder", {})}
    stage("image_tokenizer", root, **{**TOKENIZER, **VARIANTS[variant], "encoder": encoder}, **phases)
    stage("tokenize", root)
    return root


def transformer_of(root: Path, seed: int, steps: int, changes: list[str]) -> tuple[Path, dict[str, float]]:
    """A transformer trained on a variant's codes: its bundle and its figures."""
    own = root / "-".join([f"seed{seed}", *(change.replace(" ", "") for change in changes)])
    own.mkdir(exist_ok=True)
    for name in ("data", "text_tokenizer", "teacher", "image_tokenizer", "tokenize"):
        if not (own / name).exists():
            (own / name).symlink_to((root / name).resolve())
    fields: dict[str, Any] = {"optimizer": {"lr": 2e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}}
    for change in changes:
        fields |= CHANGES[change]
    optimizer = fields.pop("optimizer")
    result = stage("pretrain", own, **MODEL, **fields, loop=loop(steps, optimizer, seed))
    (bundle,) = stage("bundle", own, name="study").outputs
    return bundle, dict(result.metrics)


def measure(bundle: Path, teacher: VisionTeacher, world: RealEmoji, limit: int, seed: int) -> dict[str, Any]:
    """Retrieval and Frechet distances of generated pictures, for training names and held-out ones."""
    model = AnyGen.from_pretrained(bundle)
    groups = {
        "train": [i for i, emoji in enumerate(world.emoji) if emoji.split == "train"],
        "held_out": world.held_out(),
    }
    figures: dict[str, Any] = {}
    for group, items in groups.items():
        chosen = sorted(random.Random(0).sample(items, min(limit, len(items))))
        pictures: list[Image.Image] = []
        for start in range(0, len(chosen), 50):
            requests = [
                Request(
                    text=world.emoji[i].parts.phrase,
                    output="image",
                    seed=seed * 100_000 + i,
                    temperature=0.5,
                    guidance_scale=1.5,
                )
                for i in chosen[start : start + 50]
            ]
            pictures += [output.samples[0].of("image")[0] for output in model.generate_batch(requests)]
        right = [world.nearest(p) == int(world.classes[i]) for i, p in zip(chosen, pictures, strict=True)]
        score = proportion(right)
        real = [world.pictures[i] for i in chosen]
        figures[group] = {
            "retrieval": score.value,
            "interval": [score.low, score.high],
            "frechet_teacher": frechet_distance(deep(teacher, real), deep(teacher, pictures)),
            "frechet_layout": frechet_distance(layout(real), layout(pictures)),
            "n": len(chosen),
        }
    return figures


def deep(teacher: VisionTeacher, pictures: list[Image.Image]) -> np.ndarray:
    """Mean deep features: the teacher's space, in which VQ-KD was taught."""
    pixels = torch.stack([to_pixels(picture) for picture in pictures])
    return teacher(pixels).deep_BND.mean(1).numpy()


def layout(pictures: list[Image.Image]) -> np.ndarray:
    """Colours on a 4 x 4 grid, 48 numbers: a space in which nothing here was taught."""
    small = [np.asarray(picture.resize((4, 4), Image.Resampling.BOX), np.float64).ravel() / 255 for picture in pictures]
    return np.stack(small)


def main() -> None:
    """Run what is missing, write and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--limit", type=int, default=150)
    parser.add_argument("--tokenizer-steps", type=int, default=700)
    parser.add_argument("--model-steps", type=int, default=1500)
    parser.add_argument("--changes", nargs="+", default=[], choices=list(CHANGES), help="of the transformer's training")
    parser.add_argument(
        "--variants", nargs="+", default=list(VARIANTS), help="which to run; the others' results in OUT stay"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "results.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"variants": {}}
    results["options"] = {k: str(v) for k, v in vars(options).items()}
    world = RealEmoji(64)
    plain = {"root": options.run, "vqkd_loop": {"steps": 1}, "head_loop": {"steps": 1}}
    teacher = open_teacher(build(ImageTokenizerConfig, plain, source="teacher"))
    assert teacher is not None
    for variant in options.variants:
        root = tokenizer_of(variant, options.run, options.out, options.tokenizer_steps)
        facts = json.loads((root / "image_tokenizer" / "stage.json").read_text())
        rows: dict[str, Any] = {"tokenizer": facts["metrics"], "seeds": {}}
        variant = ", ".join([variant, *options.changes])
        for seed in options.seeds:
            bundle, metrics = transformer_of(root, seed, options.model_steps, options.changes)
            rows["seeds"][seed] = {
                "validation_bits_per_picture": metrics["validation_image_nats"] * 64 / math.log(2),
                "parameters": metrics["parameters"],
                **measure(bundle, teacher, world, options.limit, seed),
            }
            print(variant, seed, json.dumps(rows["seeds"][seed]), flush=True)
        results["variants"][variant] = rows
        path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
