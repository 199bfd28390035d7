"""The script of `recipes/nano/questions`: two bundles' weights, averaged."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from anygen.api import AnyGen
from anygen.bundle import load_bundle, save_bundle
from anygen.files import publishing
from anygen.vocabulary import Vocabulary

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "recipes" / "nano" / "questions" / "average.py"


def run(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *(str(word) for word in words)]
    return subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, timeout=120)


def doubled(bundle: Path, out: Path) -> Path:
    """The same bundle with all weights twice as large."""
    with publishing(out) as folder:
        shutil.copytree(bundle, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
        for shard in folder.glob("model*.safetensors"):
            save_file({n: 2 * w for n, w in load_file(shard).items()}, shard, metadata={"format": "pt"})
    return out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {n: w for shard in folder.glob("model*.safetensors") for n, w in load_file(shard).items()}


def test_weights_are_mixed_and_the_bundle_works_and_says_so(bundle_folder: Path, tmp_path: Path) -> None:
    double, out = doubled(bundle_folder, tmp_path / "double"), tmp_path / "out"
    done = run(double, bundle_folder, "--share", "0.25", "--out", out)
    assert done.returncode == 0, done.stderr
    old, new = weights(bundle_folder), weights(out)
    assert old.keys() == new.keys() and all(
        torch.equal(new[n].float(), (1.25 * old[n].float()).to(new[n].dtype).float()) for n in new
    )
    assert load_bundle(out).provenance["averaged"]["share"] == 0.25
    again = tmp_path / "again"
    assert run(out, bundle_folder, "--share", "0.5", "--out", again).returncode == 0
    averaged = load_bundle(again).provenance["averaged"]
    assert (averaged["share"], averaged["before"]["share"]) == (0.5, 0.25), "an average of an average tells of both"
    assert AnyGen.from_pretrained(out).generate(text="a", output="text", max_new_tokens=4).text is not None


def test_what_does_not_fit_is_refused_and_nothing_is_written(bundle_folder: Path, tmp_path: Path) -> None:
    opened = load_bundle(bundle_folder)
    narrow = copy.deepcopy(opened.model.config)
    narrow.intermediate_size //= 2
    deep = copy.deepcopy(opened.model.config)
    deep.num_hidden_layers += 1
    deep.layer_types = [*deep.layer_types, deep.layer_types[-1]]
    more_ids = Vocabulary.of(opened.tokenizers, voken=8)
    wide = copy.deepcopy(opened.model.config)
    wide.vocab_size = more_ids.size
    others = {"narrow": (narrow, opened.vocabulary), "deep": (deep, opened.vocabulary), "more ids": (wide, more_ids)}
    for name, (config, vocabulary) in others.items():
        model = type(opened.model)(config)
        facts: dict[str, Any] = {"layout": opened.layout, "tokenizers": opened.tokenizers}
        save_bundle(tmp_path / name, model=model, vocabulary=vocabulary, defaults={}, provenance={}, card="", **facts)
    for words, message in (
        ((bundle_folder, bundle_folder, "--share", 1.5), "share must be from 0 to 1"),
        ((bundle_folder, tmp_path / "none", "--share", 0.5), "there is no bundle"),
        ((bundle_folder, tmp_path / "narrow", "--share", 0.5), "different shapes"),
        ((bundle_folder, tmp_path / "deep", "--share", 0.5), "different shapes"),
        ((bundle_folder, tmp_path / "more ids", "--share", 0.5), "mean different things"),
    ):
        done = run(*words, "--out", tmp_path / "out")
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
        assert not (tmp_path / "out").exists()
    assert "exists" in run(bundle_folder, bundle_folder, "--share", 0.5, "--out", tmp_path / "narrow").stderr
