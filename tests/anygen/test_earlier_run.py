"""Going on from an earlier run: what it made is taken where nothing newer stands against it, and is never written to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_audio_tokenizer_stage import recipe_of, root  # noqa: F401  a fixture

from anygen.errors import ConfigError
from anygen.stages.base import StageConfig
from anygen.stages.catalogue import STAGES
from anygen.stages.earlier_run import take_over
from anygen.stages.run import run_stage


def made(run: Path, *stages: str) -> Path:
    for stage in stages:
        (run / stage).mkdir(parents=True)
        (run / stage / "stage.json").write_text(json.dumps({"identity": stage}))
    return run


def taken(run: Path) -> set[str]:
    return {path.name for path in run.iterdir() if path.is_symlink()}


def test_a_longer_training_takes_the_data_and_keeps_the_earlier_work(root: Path, tmp_path: Path) -> None:  # noqa: F811
    first = recipe_of(root, tmp_path / "first")
    run_stage(first)
    before = {path: path.read_bytes() for path in first.folder.rglob("*") if path.is_file()}
    fields = first.model_dump(exclude={"root", "stage"}) | {"earlier_run": first.root}
    fields["loop"] |= {"start_from": first.folder, "steps": 4}
    longer = type(first)(root=tmp_path / "longer", **fields)
    result = run_stage(longer)
    assert taken(longer.root) == {"data"} and result.folder == longer.root / "audio_tokenizer"
    assert json.loads((longer.folder / "stage.json").read_text())["config"]["earlier_run"] == str(first.root)
    assert run_stage(longer).outputs == result.outputs, "done and unchanged"
    assert {path: path.read_bytes() for path in first.folder.rglob("*") if path.is_file()} == before


def test_a_stage_that_was_taken_over_is_left_alone_when_it_is_made_anew(root: Path, tmp_path: Path) -> None:  # noqa: F811
    first = recipe_of(root, tmp_path / "first")
    run_stage(first)
    second = tmp_path / "second"
    second.mkdir()
    take_over(StageConfig(stage="pretrain", root=second, earlier_run=first.root))
    assert taken(second) == {"data", "audio_tokenizer"}
    run_stage(type(first)(root=second, **first.model_dump(exclude={"root", "stage"}) | {"batch_size": 4}))
    assert taken(second) == {"data"} and not (second / "old").exists()
    assert json.loads((first.folder / "stage.json").read_text())["config"]["batch_size"] == 8


def test_all_that_a_stage_builds_on_is_taken(tmp_path: Path) -> None:
    earlier = made(tmp_path / "earlier", *STAGES)
    run = tmp_path / "run"
    run.mkdir()
    take_over(StageConfig(stage="tokenize", root=run, earlier_run=earlier))
    assert taken(run) == {"data", "text_tokenizer", "teacher", "image_tokenizer", "audio_tokenizer"}
    take_over(StageConfig(stage="bundle", root=run, earlier_run=earlier))
    assert taken(run) == set(STAGES) - {"bundle", "evaluate", "gallery"}


def test_what_was_made_from_something_else_is_not_taken(tmp_path: Path) -> None:
    earlier = made(tmp_path / "earlier", *STAGES)
    run = made(tmp_path / "run", "pretrain")
    take_over(StageConfig(stage="bundle", root=run, earlier_run=earlier))
    assert "decoder" in taken(run), "it does not build on the transformer"
    assert "vokens" not in taken(run), "they were learned with another transformer"


def test_tokenizers_and_decoder_serve_other_data_but_codes_do_not(tmp_path: Path) -> None:
    earlier = made(tmp_path / "earlier", *STAGES)
    run = made(tmp_path / "run", "data")
    take_over(StageConfig(stage="bundle", root=run, earlier_run=earlier))
    assert taken(run) == {"text_tokenizer", "teacher", "image_tokenizer", "audio_tokenizer", "decoder"}


def test_a_decoder_serves_codes_that_were_made_anew_with_the_same_tokenizer(tmp_path: Path) -> None:
    earlier = made(tmp_path / "earlier", *STAGES)
    run = made(tmp_path / "run", "data", "tokenize", "pretrain")
    take_over(StageConfig(stage="bundle", root=run, earlier_run=earlier))
    assert "decoder" in taken(run) and "vokens" not in taken(run)


def test_a_tokenizer_of_another_teacher_is_not_taken(tmp_path: Path) -> None:
    earlier = made(tmp_path / "earlier", *STAGES)
    run = made(tmp_path / "run", "data", "teacher")
    take_over(StageConfig(stage="bundle", root=run, earlier_run=earlier))
    assert taken(run) == {"text_tokenizer", "audio_tokenizer"}, "nor a decoder of its codes"


def test_codes_of_pictures_do_not_depend_on_how_texts_and_sounds_are_written(tmp_path: Path) -> None:
    earlier = made(tmp_path / "earlier", *STAGES)
    run = made(tmp_path / "run", "text_tokenizer", "audio_tokenizer")
    take_over(StageConfig(stage="bundle", root=run, earlier_run=earlier))
    assert taken(run) == {"data", "image_tokenizer", "decoder"}, (
        "the teacher reads texts; codes in shards are of sounds too"
    )


def test_an_earlier_run_that_was_moved(tmp_path: Path) -> None:
    earlier = made(tmp_path / "earlier", "data")
    run = tmp_path / "run"
    run.mkdir()
    take_over(StageConfig(stage="tokenize", root=run, earlier_run=earlier))
    moved = earlier.rename(tmp_path / "moved")
    take_over(StageConfig(stage="tokenize", root=run, earlier_run=moved))
    assert (run / "data").resolve() == moved / "data"


def test_what_is_nowhere_is_told_with_both_places(tmp_path: Path) -> None:
    config = recipe_of(made(tmp_path / "run"), earlier_run=tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"reads stage data, which has not been run in .*/run or .*/nothing"):
        run_stage(config)


def test_a_run_that_names_itself_stays_as_it_is(tmp_path: Path) -> None:
    run = made(tmp_path / "run", *STAGES)
    take_over(StageConfig(stage="bundle", root=run, earlier_run=run / "." / ""))
    assert not taken(run)
