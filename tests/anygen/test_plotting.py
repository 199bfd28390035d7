"""Curves of a run: the right figures in the right panels, any kind of run, faults told."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from anygen.errors import DataError, InputError, MissingDependency
from anygen.plotting.curves import Series, find_metrics, panels_of, read_rows
from anygen.plotting.run import plot_run

pytest.importorskip("matplotlib")


def row(step: int, **more: float) -> dict[str, Any]:
    falling = 8.0 * math.exp(-step / 40) + 1
    return {"step": step, "loss": falling, "grad_norm": 2 * falling, "text_nats": falling, "image_nats": falling + 1,
            "hidden_norm": 1 + step / 100, "tokens": 64.0, "step_s": 0.5, "tokens_per_s": 128.0, "lr": 1e-3, **more}  # fmt: skip


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    rows = [row(step) for step in range(9, 1000, 10)]
    rows[-1] |= {"validation_text_nats": 2.0, "validation_loss": 2.5}
    write(tmp_path / "run" / "pretrain", rows)
    codec = [{"step": s, "loss": 0.5, "mel": 0.4, "usage": 0.5, "usage1": 0.2, "perplexity": 9.0} for s in (4, 9)]
    codec[-1] |= {"validation_usage": 0.4, "validation_psnr_db": 20.0}
    write(tmp_path / "run" / "audio_tokenizer", codec)
    write(tmp_path / "run" / "old" / "pretrain-1", rows)
    return tmp_path / "run"


def panels(path: Path) -> dict[str, list[tuple[str, bool]]]:
    return {panel.title: [(s.name, s.held_out) for s in panel.series] for panel in panels_of(read_rows(path))}


def test_every_figure_has_its_panel(run: Path) -> None:
    found = find_metrics(run)
    assert list(found) == ["audio_tokenizer", "pretrain"], "earlier work that was moved aside is not drawn"
    assert panels(found["pretrain"]) == {
        "Loss": [("", False), ("", True)],
        "Loss by modality, nats an id": [("text", False), ("image", False), ("text", True)],
        "Gradient norm": [("", False)],
        "Output norm": [("", False)],
        "Learning rate": [("", False)],
        "Ids a second": [("", False)],
    }
    assert panels(found["audio_tokenizer"]) == {
        "Loss": [("", False)],
        "Parts of the loss, other figures": [("mel", False)],
        "Codes in use, %": [("book 0", False), ("book 1", False), ("book 0", True)],
        "Perplexity of codes": [("book 0", False)],
        "Psnr db": [("", True)],
    }


def test_values_are_those_of_the_lines_and_alarms_stand_where_they_were(tmp_path: Path) -> None:
    counts = [0, 0, 1, 1, 3]
    rows = [row(step, norm_alarms=count, mfu=0.25) for step, count in enumerate(counts)]
    rows[1]["hidden_norm"] = float("nan")
    by_title = {panel.title: panel for panel in panels_of(rows)}
    assert by_title["Output norm"].alarms == (2, 4)
    assert by_title["Output norm"].series[0].steps == (0, 2, 3, 4)
    assert by_title["Peak of the device in use, %"].series[0].values == (25.0,) * 5


def test_smoothing_keeps_straight_lines_and_lengths() -> None:
    for count in (1, 2, 59, 60, 121, 600):
        steps = tuple(range(count))
        line = Series("", steps, tuple(float(3 * step) for step in steps))
        assert line.smoothed() == pytest.approx(line.values)
    noisy = Series("", tuple(range(600)), tuple(float(step % 2) for step in range(600)))
    assert max(abs(value - 0.5) for value in noisy.smoothed()[20:-20]) < 0.05


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_pictures_are_what_their_suffix_says(run: Path, tmp_path: Path, suffix: str) -> None:
    (picture,) = plot_run(run / "pretrain", tmp_path / "out" / f"curves{suffix}")
    if suffix == ".png":
        with Image.open(picture) as image:
            assert image.format == "PNG" and image.getpixel((2, image.height - 3))[:3] == (255, 255, 255)
    else:
        assert picture.read_bytes().startswith(b"%PDF" if suffix == ".pdf" else b"<?xml")


def test_each_stage_is_a_picture_of_its_own_colours_by_modality(run: Path, tmp_path: Path) -> None:
    pictures = plot_run(run, tmp_path / "c.svg")
    assert [path.name for path in pictures] == ["c-audio_tokenizer.svg", "c-pretrain.svg"]
    text = pictures[1].read_text()
    assert "run/pretrain" in text and "Loss by modality" in text and "held out" in text
    assert "#0072b2" in text and "#d55e00" in text and "#009e73" not in text, "text and image, no sound"
    again = plot_run(run, tmp_path / "d.svg")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in pictures]


def test_two_runs_share_axes_where_they_share_stages(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write(other / "pretrain", [row(step, region_nats=3.0) for step in range(9, 500, 10)])
    (picture,) = plot_run(run, tmp_path / "c.svg", compare=other)
    text = picture.read_text()
    assert ">run/pretrain<" in text and ">run<" in text and ">other<" in text and ">region<" in text
    assert "stroke-dasharray" in text
    (alone,) = plot_run(run / "pretrain", tmp_path / "e.svg", compare=other / "pretrain" / "metrics.jsonl")
    assert "stroke-dasharray" in alone.read_text()
    write(tmp_path / "third" / "teacher", [row(1)])
    write(tmp_path / "third" / "vqkd", [row(1)])
    with pytest.raises(InputError, match="no stage in common: the second has teacher, vqkd"):
        plot_run(run, tmp_path / "c.svg", compare=tmp_path / "third")


@pytest.mark.parametrize("kept", [1, 30, 31, 200])
def test_a_run_that_was_interrupted_mid_line_is_drawn(run: Path, tmp_path: Path, kept: int) -> None:
    path = run / "pretrain" / "metrics.jsonl"
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    path.write_bytes(whole[: first + kept])
    assert [line["step"] for line in read_rows(path)] == [9] + ([19] if kept >= first else [])
    (picture,) = plot_run(path, tmp_path / "c.png")
    assert picture.is_file()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no whole line yet"),
        (b'{"step": 9, "lo', "no whole line yet"),
        (b"\xff\xfe\x00", "no whole line yet"),
        (b"3\n", "holds no metrics"),
        (b'{"loss": 3}\n', "holds no metrics"),
    ],
)
def test_files_without_metrics_are_refused(tmp_path: Path, content: bytes, says: str) -> None:
    path = write(tmp_path / "run", [])
    path.write_bytes(content)
    with pytest.raises(DataError, match=says):
        plot_run(tmp_path / "run", tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()


def test_a_stage_that_has_not_logged_yet_does_not_hide_the_others(run: Path, tmp_path: Path) -> None:
    (run / "pretrain" / "metrics.jsonl").write_text("")
    assert [path.name for path in plot_run(run, tmp_path / "c.png")] == ["c-audio_tokenizer.png"]


def test_faults_of_the_call_are_told(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=re.escape("there is no metrics.jsonl in")):
        plot_run(tmp_path / "nowhere", tmp_path / "c.png")
    with pytest.raises(InputError, match="is no picture"):
        plot_run(run, tmp_path / "c.jpg")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependency, match=re.escape('pip install "anygen[plot]"')):
        plot_run(run, tmp_path / "c.png")


def test_the_command_prints_what_it_drew_and_leaves_with_two_on_a_wrong_call(run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "anygen", "plot"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    settings: dict[str, Any] = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    drawn = subprocess.run([*command, "run/audio_tokenizer"], **settings)
    assert drawn.returncode == 0 and drawn.stdout == "out/curves.png\n", drawn.stderr
    refused = subprocess.run([*command, "nowhere"], **settings)
    assert refused.returncode == 2 and refused.stderr.startswith("Error: there is no metrics.jsonl in nowhere")
