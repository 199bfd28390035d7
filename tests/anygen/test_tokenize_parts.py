"""Stage `tokenize` by many hands: parts side by side and a local Ray give the bytes that one process gives."""

from __future__ import annotations

import importlib.util
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from anygen.data.records import Record, Utterance, write_shard
from anygen.data.source import flac_of
from anygen.errors import CheckpointError, ConfigError, DataError, MissingDependency
from anygen.files import publishing, write_json
from anygen.stages import run, tokenize
from anygen.stages.run import load_recipe, run_stage
from anygen.stages.tokenize import TokenizeConfig
from tokenizers_mm.audio import AudioTokenizer
from tokenizers_mm.media import Audio

SHARDS = [f"train-{n:05}" for n in range(5)] + ["validation-00000"]


def run_of(root: Path, audio_tokenizer: AudioTokenizer) -> Path:
    """A run whose data and tokenizers are there."""
    random = np.random.default_rng(0)
    for number, name in enumerate(SHARDS):
        sounds = [flac_of(Audio(0.1 * random.normal(size=700).astype(np.float32), 8000)) for _ in range(2)]
        (root / "data").mkdir(parents=True, exist_ok=True)
        records = [Record(f"{name}-{n}", utterances=(Utterance("a", "v", s),)) for n, s in enumerate(sounds)]
        write_shard(root / "data" / f"{name}.tar", records[: 1 + number % 2])
    with publishing(root / "audio_tokenizer" / "tokenizer") as folder:
        audio_tokenizer.save(folder)
    for stage in ("data", "audio_tokenizer"):
        write_json(root / stage / "stage.json", {"identity": stage})
    return root


def config_of(root: Path, **options: Any) -> TokenizeConfig:
    return TokenizeConfig(root=root, **options)


def shards_in(root: Path) -> dict[str, bytes]:
    folder = root / "tokenize"
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.glob("*/*") if p.is_file()}


@pytest.fixture
def alone(tmp_path: Path, audio_tokenizer: AudioTokenizer) -> dict[str, bytes]:
    run_stage(config_of(run_of(tmp_path / "alone", audio_tokenizer)))
    return shards_in(tmp_path / "alone")


def test_parts_make_together_what_one_process_makes(
    tmp_path: Path, audio_tokenizer: AudioTokenizer, alone: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    root = run_of(tmp_path / "parts", audio_tokenizer)
    caplog.set_level("INFO", "anygen")
    first = run_stage(config_of(root, part="2/4"))
    assert {name.split("/")[0] for name in shards_in(root)} == {"train-00001", "validation-00000"}
    assert first.unfinished == "4 of 6 shards are to be encoded by other parts, train-00000 first"
    assert f"share 2/4 is done; {first.unfinished}" in caplog.text
    assert not (root / "tokenize" / "stage.json").exists()
    for part in ("4/4", "1/4", "2/4"):
        assert run_stage(config_of(root, part=part)).unfinished
    last = run_stage(config_of(root, part="3/4"))
    assert not last.unfinished and last.metrics == {"shards": 6.0}
    assert shards_in(root) == alone
    identities = [run.read_json(tmp_path / name / "tokenize" / "stage.json")["identity"] for name in ("alone", "parts")]
    assert identities[0] == identities[1]
    caplog.clear()
    for options in ({}, {"part": "1/9"}, {"on": "ray"}):
        assert len(run_stage(config_of(root, **options)).outputs) == 6
    assert caplog.text.count("tokenize: done and unchanged") == 3


def test_the_next_stage_waits_for_all_parts(tmp_path: Path, audio_tokenizer: AudioTokenizer) -> None:
    root = run_of(tmp_path, audio_tokenizer)
    run_stage(config_of(root, part="1/2"))
    (root / "text_tokenizer").mkdir()
    write_json(root / "text_tokenizer" / "stage.json", {"identity": "t"})
    pretrain = load_recipe(Path(__file__).parents[2] / "recipes" / "nano" / "pretrain.yaml", root=root)
    with pytest.raises(ConfigError, match="stage tokenize, which was begun"):
        run_stage(pretrain)


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "1/", "a/b", "-1/2", "1/2/3", "/"])
def test_parts_that_are_none(part: str) -> None:
    with pytest.raises(ValueError, match="expected i/n with i from 1 to n"):
        TokenizeConfig(part=part)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_parts_share_out_all_shards(count: int) -> None:
    paths = [Path(name) for name in SHARDS]
    parts = [TokenizeConfig(part=f"{n + 1}/{count}").own(paths) for n in range(count)]
    assert sorted(path for part in parts for path in part) == paths
    assert TokenizeConfig().own(paths) == paths


def _encode(config: TokenizeConfig, inside: Any, leave: Any) -> None:
    real = tokenize.ShardEncoder.encode

    def waiting(self: Any, path: Path) -> bool:
        inside.set()
        assert leave.wait(60)
        return real(self, path)

    tokenize.ShardEncoder.encode = waiting  # type: ignore[method-assign]
    run_stage(config)


@pytest.fixture
def busy(tmp_path: Path, audio_tokenizer: AudioTokenizer) -> Iterator[tuple[Path, Any]]:
    """A run in which another process is at work on part 1/2, and the event that lets it end."""
    root = run_of(tmp_path / "busy", audio_tokenizer)
    context = multiprocessing.get_context("fork")
    inside, leave = context.Event(), context.Event()
    process = context.Process(target=_encode, args=(config_of(root, part="1/2"), inside, leave), daemon=True)
    process.start()
    assert inside.wait(60)

    def finish() -> None:
        leave.set()
        process.join(60)
        assert process.exitcode == 0

    yield root, finish
    process.kill()


def test_parts_work_beside_each_other_and_nothing_else_does(busy: tuple[Path, Any], alone: dict[str, bytes]) -> None:
    root, finish = busy
    temporary = root / "tokenize" / ".tmp-1-train-00000"  # what the other one is writing
    temporary.mkdir()
    for config in (config_of(root), config_of(root, part="1/2")):
        with pytest.raises(CheckpointError, match="another anygen process is at work"):
            run_stage(config)
    with pytest.raises(CheckpointError, match="another anygen process"):
        run_stage(config_of(root, part="2/2", device="cuda"))  # another identity would move the folder aside
    assert run_stage(config_of(root, part="2/2")).unfinished
    assert temporary.exists()
    temporary.rmdir()
    finish()
    assert (root / "tokenize" / "stage.json").exists() and shards_in(root) == alone


def test_a_part_waits_while_another_process_looks_after_the_folder(
    tmp_path: Path, audio_tokenizer: AudioTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = run_of(tmp_path, audio_tokenizer)
    monkeypatch.setattr(run, "_PATIENCE_S", 0.1)
    with FileLock(root / ".lock"), pytest.raises(CheckpointError, match="another anygen process"):
        run_stage(config_of(root, part="1/2"))
    assert run_stage(config_of(root, part="1/2")).unfinished


def test_without_ray_its_absence_is_said(
    tmp_path: Path, audio_tokenizer: AudioTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(MissingDependency, match=r"anygen\[ray\]"):
        run_stage(config_of(run_of(tmp_path, audio_tokenizer), on="ray"))


@pytest.fixture
def cluster() -> Iterator[None]:
    """A Ray of this machine alone."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed (pip install 'anygen[ray]')")
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ray_makes_what_one_process_makes_and_says_what_is_wrong_as_it_was(
    tmp_path: Path, audio_tokenizer: AudioTokenizer, alone: dict[str, bytes], cluster: None
) -> None:
    root = run_of(tmp_path / "ray", audio_tokenizer)
    config = config_of(root, on="ray")
    shard = root / "data" / "train-00002.tar"
    whole = shard.read_bytes()
    shard.write_bytes(b"no tar")
    with pytest.raises(DataError) as caught:
        run_stage(config)
    assert str(caught.value).startswith(f"{shard} is not a readable tar shard")
    expected = {name: data for name, data in alone.items() if not name.startswith("train-00002")}
    assert shards_in(root) == expected, "the other shards are done"
    shard.write_bytes(whole)
    two = config_of(root, on="ray", ray={"concurrency": 2, "num_cpus": 0.5})
    assert not run_stage(two).unfinished and shards_in(root) == alone
