"""The smoke family, whole: every stage on real input within three minutes, and through SIGKILL and SIGTERM to the same bytes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from anygen.data.emoji_pictures import FONT_PATHS

ROOT = Path(__file__).parent.parent.parent
LIMIT_S = 180
NUM_STAGES = len(list((ROOT / "recipes" / "smoke").glob("*.yaml")))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(
        not any(p.is_file() for p in FONT_PATHS) or not shutil.which("flite") or not shutil.which("espeak-ng"),
        reason="the emoji world needs the Debian packages fonts-noto-color-emoji, flite and espeak-ng",
    ),
]


def start(root: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from anygen.cli import main; main()", "run", "recipes/smoke", "--root", str(root)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*command, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def bundle_bytes(root: Path) -> dict[str, bytes]:
    folder = root / "bundle" / "smoke"
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run from start to end, and the seconds it took."""
    root = tmp_path_factory.mktemp("smoke") / "run"
    began = time.monotonic()
    process = start(root)
    out, err = process.communicate(timeout=1200)
    assert process.returncode == 0, err
    assert len(out.splitlines()) == NUM_STAGES, "one line a stage"
    return root, time.monotonic() - began


def test_every_stage_runs_within_three_minutes(undisturbed: tuple[Path, float]) -> None:
    root, seconds = undisturbed
    print(f"anygen run recipes/smoke took {seconds:.0f} s")
    assert seconds < LIMIT_S
    assert (root / "gallery" / "page" / "index.html").is_file()
    metrics = json.loads((root / "image_tokenizer" / "stage.json").read_text())["metrics"]
    assert metrics["validation_usage"] > 0


def test_a_second_run_does_nothing(undisturbed: tuple[Path, float]) -> None:
    root, _ = undisturbed
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file() and p.name != ".lock"}
    process = start(root)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0 and err.count("done and unchanged") == NUM_STAGES, err
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_killed_three_times_it_ends_with_the_same_bundle(undisturbed: tuple[Path, float], tmp_path: Path) -> None:
    reference, seconds = undisturbed
    root = tmp_path / "run"
    chooser = random.Random()  # truly random moments: a failure prints them
    moments = []
    for _ in range(3):
        process = start(root)
        moments.append(chooser.uniform(0.1, 0.5) * seconds)
        try:
            process.communicate(timeout=moments[-1])
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
    process = start(root)
    _, err = process.communicate(timeout=1200)
    assert process.returncode == 0, (moments, err)
    expected, found = bundle_bytes(reference), bundle_bytes(root)
    assert expected.keys() == found.keys()
    assert [name for name in expected if expected[name] != found[name]] == [], moments
    assert not list(root.rglob(".tmp-*")), "nothing half-written is left"


def test_sigterm_saves_and_leaves_with_143(undisturbed: tuple[Path, float], tmp_path: Path) -> None:
    reference, _ = undisturbed
    root = tmp_path / "run"
    for stage in ("data", "text_tokenizer", "teacher", "image_tokenizer", "audio_tokenizer", "tokenize"):
        shutil.copytree(reference / stage, root / stage)
    process = start(root)
    metrics = root / "pretrain" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().strip()) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "stopped by SIGTERM; step" in err and "Traceback" not in err
    assert list((root / "pretrain" / "checkpoints").glob("step-*"))


def test_a_changed_recipe_moves_the_old_work_aside(undisturbed: tuple[Path, float], tmp_path: Path) -> None:
    reference, _ = undisturbed
    root = tmp_path / "run"
    shutil.copytree(reference, root)
    command = [
        sys.executable,
        "-c",
        "from anygen.cli import main; main()",
        "train",
        "recipes/smoke/text_tokenizer.yaml",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [*command, "vocabulary_size=400", "--root", str(root)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert (root / "old" / "text_tokenizer-1" / "text.model").is_file()
    assert "earlier work is in" in result.stderr


def test_training_is_one_function_of_its_recipe(undisturbed: tuple[Path, float], tmp_path: Path) -> None:
    """The study `benchmarks/exact_training.py`, small: run twice, stopped, killed, fed by workers: the same bits."""
    arguments = ["--steps", "16", "--kills", "2", "--resumes", "1", "--workers", "2"]
    script = subprocess.run(
        [sys.executable, "benchmarks/exact_training.py", str(undisturbed[0]), str(tmp_path / "out"), *arguments],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert script.returncode == 0, script.stdout + script.stderr
    facts = json.loads((tmp_path / "out" / "exact_training.json").read_text())
    assert len(facts["identical"]) == 5 and all(facts["identical"].values())
