"""What each option of the sound tokenizer's training gives: one change at a time, everything else equal.

    python benchmarks/codec_options.py RUN OUT [--variants ...] [--steps 600]

RUN is a run that has done the stage data (`anygen train recipes/speech/data.yaml`). Every variant gets the same sounds
in the same order, sizes, steps and seed. Interrupted, it goes on where it was. It writes OUT/results.json and prints a
table.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from anygen.config import build
from anygen.evaluation.report import rows_of
from anygen.evaluation.sounds import evaluate_sounds
from anygen.files import write_json
from anygen.stages.audio_tokenizer import AudioTokenizerConfig
from anygen.stages.run import run_stage
from anygen.training.metrics import read_metrics
from tokenizers_mm.audio import AudioTokenizer

JUDGE = {"channels": 16, "windows": [1024, 512, 256], "start_share": 0.3}
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "adversarial": {"adversarial": {**JUDGE, "weight": 0.15, "feature_weight": 0.3}},
    "balancer": {"balancer": True, "wave_weight": 0.1, "commitment_weight": 0.02},
    "adversarial, balancer": {
        "adversarial": {**JUDGE, "weight": 1.0, "feature_weight": 1.0},
        "balancer": True,
        "wave_weight": 0.1,
        "commitment_weight": 0.02,
    },
    "no quantiser dropout": {"codec.quantizer_dropout": 0.0},
    "EnCodec's start": {"codec.start": "stock", "min_spread": 0.0},
    "EnCodec's decoder": {"decode_with": "seanet"},
    "no floor under mel": {"mel_floor_db": None},
    "no upsampling": {"decoder.upsampling": 1},
}
CODEC: dict[str, Any] = {"num_filters": 8, "latent_dim": 64, "codebook_size": 1024, "num_codebooks": 4}
DECODER = {"width": 192, "depth": 4, "upsampling": 2}
REST: dict[str, Any] = {"batch_size": 6, "steps_without_quantiser": 150, "speed_change": 0.1}
OPTIMIZER = {"lr": 1.5e-3, "betas": [0.8, 0.99], "weight_decay": 0.0, "warmup_steps": 50}


def recipe_of(variant: str, root: Path, steps: int) -> AudioTokenizerConfig:
    """The stage's recipe; `codec.X` and `decoder.X` of a variant go into these."""
    changes = VARIANTS[variant]
    fields: dict[str, Any] = {"root": root, "codec": dict(CODEC), "decoder": dict(DECODER), **REST}
    fields["loop"] = {"steps": steps, "log_every": 25, "save_every": 200, "optimizer": OPTIMIZER}
    for name, value in changes.items():
        group, _, field = name.rpartition(".")
        (fields[group] if group else fields)[field] = value
    config: AudioTokenizerConfig = build(AudioTokenizerConfig, fields, source=variant)
    return config


def run_variant(variant: str, base: Path, out: Path, *, steps: int, limit: int) -> dict[str, Any]:
    """Train and measure one variant."""
    root = out / variant.replace(" ", "-").replace(",", "").replace("'", "")
    root.mkdir(parents=True, exist_ok=True)
    if not (root / "data").exists():
        (root / "data").symlink_to((base / "data").resolve())
    result = run_stage(recipe_of(variant, root, steps))
    tokenizer = AudioTokenizer.load(result.outputs[0])
    seconds = sorted(row["step_s"] for row in read_metrics(result.folder / "metrics.jsonl") if "step_s" in row)
    return {
        "seconds_per_step": seconds[len(seconds) // 2],
        "training": dict(result.metrics),
        "figures": rows_of(evaluate_sounds(tokenizer, base / "data", limit=limit).figures),
    }


def table(results: dict[str, Any], steps: int) -> str:
    """Markdown: a row a variant; ESTOI and PESQ with 1, 2 and 4 codebooks, and the least used codebook."""
    rows = []
    for variant, found in results.items():
        values = {(f["name"], f["group"]): f["value"] for f in found["figures"]}
        cells = []
        for group in (g for n, g in values if n == "ESTOI" and "first" not in g):
            rates = [f"{group}, first 1 of 4", f"{group}, first 2 of 4", group]
            estoi, pesq = (" ".join(f"{values.get((n, r), math.nan):.2f}" for r in rates) for n in ("ESTOI", "PESQ"))
            used = min(v for (n, g), v in values.items() if n == "codes used" and g.startswith(group))
            cells.append(f"{group}: ESTOI {estoi}, PESQ {pesq}, codes used {used:.0%}")
        rows.append(f"| {variant} | {found['seconds_per_step']:.2f} s | " + " | ".join(cells) + " |")
    return f"{steps} steps\n" + "\n".join(rows)


def main() -> None:
    """Run what is missing, write and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--limit", type=int, default=100, help="sounds of each group that are measured")
    options = parser.parse_args()
    path = options.out / "results.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"variants": {}}
    results["options"] = {name: str(value) for name, value in vars(options).items()}
    for variant in options.variants:
        if variant not in results["variants"]:
            results["variants"][variant] = run_variant(
                variant, options.run, options.out, steps=options.steps, limit=options.limit
            )
            write_json(path, results)
        print(table({variant: results["variants"][variant]}, options.steps), flush=True)


if __name__ == "__main__":
    main()
