"""Tokenizers and teacher trained in two processes over gloo: codebooks, losses and order of data are those of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import test_audio_tokenizer_stage as sounds
import test_codec_decoder_stage as decoders
import test_teacher_stage as teacher
import torch
from stage_processes import noted
from test_image_tokenizer_stage import recipe_of, root, work_in  # noqa: F401  the fixture too

from anygen.data.records import write_shard
from anygen.errors import ConfigError
from anygen.stages.base import Shuffled
from anygen.stages.run import run_stage
from anygen.training import engine, loop, processes
from anygen.training.metrics import read_metrics
from anygen.training.schedule import OptimizerConfig
from tokenizers_mm.image import ImageTokenizer
from tokenizers_mm.text import TextTokenizer

ROOT = Path(__file__).parent.parent.parent
sounds_root = sounds.root
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def launched(config: Any, *, code: int = 0, **more: Any) -> tuple[list[dict[str, Any]], str]:
    """What each of two processes saw, and what they said."""
    values = {**config.model_dump(mode="json", exclude={"root"}), **more}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = str(Path(__file__).with_name("stage_processes.py"))
    done = subprocess.run(
        [sys.executable, *command, script, type(config).__name__, str(config.root), json.dumps(values)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode != 0) == bool(code), done.stderr[-4000:]
    paths = [config.root / f"seen-{rank}.pt" for rank in range(2)]
    return [torch.load(path, weights_only=True) for path in paths if path.exists()], done.stderr


def alone(config: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What one process sees."""
    monkeypatch.setattr(Shuffled, "next", Shuffled.next)
    monkeypatch.setattr(loop._Run, "finish", loop._Run.finish)
    seen = noted()
    run_stage(config)
    monkeypatch.undo()
    return seen


def assert_equal(states: list[dict[str, Any]], others: list[dict[str, Any]], *, exact: bool) -> None:
    assert len(states) == len(others)
    for left, right in zip(states, others, strict=True):
        assert left.keys() == right.keys()
        for name in left:
            if exact:
                assert torch.equal(left[name].nan_to_num(), right[name].nan_to_num()), name
            else:
                torch.testing.assert_close(left[name], right[name], rtol=2e-3, atol=2e-4, equal_nan=True, msg=name)


def losses(folder: Path, name: str = "loss") -> list[float]:
    return [row[name] for row in read_metrics(folder / "metrics.jsonl") if name in row]


PICTURES: dict[str, Any] = {
    "augmentation": {"flip": 0.5, "colour": 0.2},
    "steps_without_quantiser": 2,
    "usage_window": 4,
    "adversarial": {"weight": 0.5, "start_share": 0.5, "channels": 8, "layers": 1},
    "features_loop": {"steps": 3, "log_every": 1, "precision": "fp32", "device": "cpu"},
}


def test_picture_tokenizer_of_two_processes_is_that_of_one(
    root: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both, one = (recipe_of(work_in(root, tmp_path / n), steps=54, head_steps=6, **PICTURES) for n in ("two", "one"))
    seen, _ = launched(both)
    assert_equal(seen[0]["states"], seen[1]["states"], exact=True)
    books = [state["vqkd.encoder.quantizer._codebook.embed"] for state in (seen[0]["states"][0], seen[1]["states"][0])]
    assert torch.equal(*books) and len(books[0].unique(dim=1)[0]) == 16, "all phases, and 52 steps with codes"
    single = alone(one, monkeypatch)
    assert seen[0]["items"] == seen[1]["items"] == single["items"], "the same pictures in the same order"
    for phase in ("vqkd", "pixels", "described"):
        expected, got = (losses(c.folder / phase) for c in (one, both))
        assert len(got) == len(expected) > 2
        # later steps add up rounding: a code at the border of two falls to the other
        assert got[:8] == pytest.approx(expected[:8], rel=2e-5), phase
        assert got == pytest.approx(expected, rel=2e-2), phase
        norms = [losses(config.folder / phase, "grad_norm")[:8] for config in (one, both)]
        assert norms[1] == pytest.approx(norms[0], rel=5e-3), phase
    assert losses(both.folder / "vqkd", "usage")[-1] == pytest.approx(
        losses(one.folder / "vqkd", "usage")[-1], abs=0.07
    )
    assert ImageTokenizer.load(both.folder / "tokenizer").grid_hw == (2, 2)


def test_a_run_stopped_on_two_processes_goes_on_alone_and_the_other_way_round(
    root: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    two = recipe_of(work_in(root, tmp_path / "two"), steps=6, head_steps=2)
    seen, _ = launched(two, stop=2)
    assert [s["stopped"] for s in seen] == [143, 143] and len(seen[0]["items"]) == 3
    rest = alone(two, monkeypatch)
    one = recipe_of(work_in(root, tmp_path / "one"), steps=6, head_steps=2)
    whole = alone(one, monkeypatch)
    assert seen[0]["items"] + rest["items"] == whole["items"]
    assert losses(two.folder / "vqkd") == pytest.approx(losses(one.folder / "vqkd"), rel=2e-5)
    assert_equal(rest["states"], whole["states"], exact=False)


def test_where_one_process_fails_all_end(root: Path, tmp_path: Path) -> None:  # noqa: F811
    began = time.monotonic()
    _, said = launched(recipe_of(work_in(root, tmp_path / "run"), steps=6), code=1, fail=2)
    assert "DataError: this process cannot read its pictures" in said and time.monotonic() - began < 100


def test_where_the_first_process_cannot_begin_the_others_leave_in_a_sentence(root: Path, tmp_path: Path) -> None:  # noqa: F811
    config = recipe_of(work_in(root, tmp_path / "run"), steps=6)
    loop = {**config.vqkd_loop.model_dump(mode="json"), "start_from": str(tmp_path / "nothing")}
    _, said = launched(config, code=1, vqkd_loop=loop)
    assert f"ConfigError: start_from={tmp_path / 'nothing'} has no" in said
    assert "TrainingError: stage image_tokenizer was not begun: the first process says why" in said
    assert "in _follow" not in said, "no traceback of ours"


def test_a_batch_that_does_not_divide_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "count", lambda: 3)
    with pytest.raises(ConfigError, match=r"batch_size=16 is of all processes together .* multiple of their number, 3"):
        processes.own_rows(16)
    assert processes.own_rows(18) == slice(0, 6)


def test_teacher_of_two_processes_has_every_pair_for_a_negative(
    tmp_path: Path, text_tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    both, one = (
        teacher.config_of(
            teacher_run(tmp_path / name, text_tokenizer),
            batch_size=6,
            equal_captions="positives",
            sound={"width": 16, "depth": 1, "num_heads": 2},
            sound_s=0.4,
            augmentation={"flip": 0.5},
            loop={"steps": 8},
        )
        for name in ("two", "one")
    )
    seen, _ = launched(both)
    single = alone(one, monkeypatch)
    assert_equal(seen[0]["states"], seen[1]["states"], exact=True)
    assert_equal(seen[0]["states"], single["states"], exact=False)
    for name in ("loss", "matched", "sound", "validation_loss", "grad_norm"):
        expected = losses(one.folder, name)
        # Adam forgives a gradient of another scale: its norm does not
        rel = 1e-3 if name == "grad_norm" else 2e-5
        assert losses(both.folder, name) == pytest.approx(expected, rel=rel) and expected, name


def teacher_run(folder: Path, text_tokenizer: TextTokenizer) -> Path:
    """A run up to the stage: 13 records with a picture, of which two neighbours in three have sounds."""
    (folder / "data").mkdir(parents=True)
    records = [teacher.record(n, sounds=0 if n % 3 == 2 else 2) for n in range(20)]
    write_shard(folder / "data" / "train-000.tar", records[:13])
    write_shard(folder / "data" / "validation-000.tar", records[13:])
    text_tokenizer.save(folder / "text_tokenizer")
    for stage in ("data", "text_tokenizer"):
        (folder / stage / "stage.json").write_text(json.dumps({"identity": stage}))
    return folder


@pytest.mark.parametrize("balancer", [False, True])
def test_sound_tokenizer_of_two_processes_is_that_of_one(
    sounds_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, balancer: bool
) -> None:
    both, one = (
        sounds.recipe_of(
            sounds_root,
            tmp_path / name,
            codec={"num_codebooks": 2, "quantizer_dropout": 0.5},
            speed_change=0.1,
            steps_without_quantiser=1,
            balancer=balancer,
            adversarial=sounds.JUDGE,
        )
        for name in ("two", "one")
    )
    seen, _ = launched(both)
    single = alone(one, monkeypatch)
    assert_equal(seen[0]["states"], seen[1]["states"], exact=True)
    expected, got = losses(one.folder), losses(both.folder)
    assert got[:3] == pytest.approx(expected[:3], rel=5e-5) and got == pytest.approx(expected, rel=2e-2)
    norms = [losses(config.folder, "grad_norm")[:3] for config in (one, both)]
    assert norms[1] == pytest.approx(norms[0], rel=5e-3), "Adam forgives a gradient of another scale: its norm does not"
    assert len(got) == 6 and seen[0]["items"] == single["items"]


def test_decoder_of_sounds_of_two_processes_is_that_of_one(
    sounds_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = sounds.recipe_of(sounds_root, tmp_path / "codec", codec={"num_codebooks": 2})
    run_stage(codec)
    loop = {
        "steps": 6,
        "log_every": 1,
        "precision": "fp32",
        "device": "cpu",
        "optimizer": {"lr": 2e-3, "warmup_steps": 1},
    }
    both, one = (
        decoders.recipe_of(
            sounds_root, codec.folder / "tokenizer", tmp_path / name,
            voices=["v"], rehearsed=1, loudness_weight=0.1, loop=loop,
        )
        for name in ("two", "one")
    )  # fmt: skip
    seen, _ = launched(both)
    single = alone(one, monkeypatch)
    assert_equal(seen[0]["states"], seen[1]["states"], exact=True)
    assert_equal(seen[0]["states"], single["states"], exact=False)
    assert losses(both.folder) == pytest.approx(losses(one.folder), rel=1e-4)
    assert len(losses(one.folder)) == 6 and seen[0]["items"] == single["items"]


def test_what_is_replicated_is_not_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Late(torch.nn.Linear):
        spares_parameters = True

    monkeypatch.setattr(engine.sharding, "is_asked_for", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(engine.processes, "join", lambda *, cpu: None)
    with pytest.raises(ConfigError, match="start this one with type MULTI_GPU"):
        engine.Engine(Late(1, 1), OptimizerConfig(), bf16=False, cpu=True, checkpoints=tmp_path)
