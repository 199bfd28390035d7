"""A codec that somebody trained, from its recipe to codes on disk; what it is, said by `anygen inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from anygen.bundle import default_bundle
from anygen.data.coded import CodedStore
from anygen.data.records import Record, Utterance, write_shard
from anygen.data.source import flac_of
from anygen.errors import AnyGenError, CheckpointError, ConfigError
from anygen.inspection import inspect_path
from anygen.stages.base import StageConfig
from anygen.stages.dry_run import weigh
from anygen.stages.run import load_recipe, run_stage
from anygen.stages.tokenize import TokenizeConfig, coded_facts
from tokenizers_mm.audio import AudioTokenizer
from tokenizers_mm.encodec import start
from tokenizers_mm.media import Audio


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """EnCodec's 24 kHz layout, narrow, with random weights."""
    from transformers import EncodecConfig, EncodecModel

    torch.manual_seed(0)
    narrow = {"num_filters": 4, "hidden_size": 8, "codebook_dim": 8, "codebook_size": 1024}
    model = EncodecModel(EncodecConfig(sampling_rate=24_000, target_bandwidths=[1.5, 3.0, 6.0, 12.0, 24.0], **narrow))
    start(model)
    with torch.no_grad():
        for layer in model.quantizer.layers:
            layer.codebook.embed.copy_(torch.randn(layer.codebook.embed.shape))
    folder = tmp_path_factory.mktemp("published") / "encodec_24khz"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "run"
    (root / "data").mkdir(parents=True)
    noise = np.random.default_rng(0).normal(size=9000).astype(np.float32) * 0.1
    spoken = (
        Utterance("a", "v", flac_of(Audio(noise, 16_000))),
        Utterance("a", "w", flac_of(Audio(noise[:700], 16_000))),
    )
    write_shard(root / "data" / "train-00000.tar", [Record("r", captions=("a",), utterances=spoken)])
    (root / "data" / "stage.json").write_text(json.dumps({"identity": "data"}))
    return root


def recipe_of(root: Path, **fields: Any) -> StageConfig:
    path = root.parent / "audio_tokenizer.yaml"
    path.write_text(
        yaml.safe_dump(
            {"stage": "audio_tokenizer", **{k: str(v) if isinstance(v, Path) else v for k, v in fields.items()}}
        )
    )
    return load_recipe(path, root=root)


def test_from_a_recipe_to_codes_on_disk(published: Path, root: Path) -> None:
    config = recipe_of(root, checkpoint=published, num_codebooks=2)
    result = run_stage(config)
    assert result.metrics == {"codebooks": 2.0, "bits_per_s": 1500.0}
    ours = AudioTokenizer.load(root / "audio_tokenizer" / "tokenizer")
    theirs = AudioTokenizer.load(published, num_codebooks=2)
    assert ours.fingerprint == theirs.fingerprint and ours.num_codebooks == 2
    run_stage(TokenizeConfig(root=root))
    record = CodedStore([root / "tokenize" / "train-00000"], facts=coded_facts(None, ours))[0]
    assert len(record.utterances) == 2
    sound = np.random.default_rng(0).normal(size=9000).astype(np.float32) * 0.1
    for found, length in zip(record.utterances, (9000, 700), strict=True):
        assert found.codes == theirs.encode(flac_of(Audio(sound[:length], 16_000)))


def test_the_codec_of_the_embedded_bundle_by_name(root: Path, monkeypatch: pytest.MonkeyPatch, published: Path) -> None:
    run_stage(recipe_of(root, checkpoint="nano"))
    taken = AudioTokenizer.load(root / "audio_tokenizer" / "tokenizer")
    assert taken.fingerprint == AudioTokenizer.load(default_bundle() / "tokenizers" / "audio").fingerprint
    (root / "nano").symlink_to(published)
    monkeypatch.chdir(root)  # a folder of that name comes first
    assert run_stage(recipe_of(root, checkpoint="nano", num_codebooks=2)).metrics["bits_per_s"] == 1500


def test_a_codec_is_taken_again_when_its_files_change(published: Path, root: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "codec"
    AudioTokenizer.load(published, num_codebooks=4).save(checkpoint)
    config = recipe_of(root, checkpoint=checkpoint)
    assert run_stage(config).metrics["codebooks"] == 4
    AudioTokenizer.load(published, num_codebooks=2).save(checkpoint)
    assert run_stage(config).metrics["codebooks"] == 2
    assert (root / "old" / "audio_tokenizer-1" / "tokenizer").is_dir(), "nothing is deleted"


def test_a_file_of_the_encodec_package(published: Path, root: Path, tmp_path: Path) -> None:
    model = AudioTokenizer.load(published).model
    file = tmp_path / "encodec_24khz.th"
    torch.save({in_the_package(name): tensor for name, tensor in model.state_dict().items()}, file)
    config = recipe_of(root, checkpoint=file, num_codebooks=8)
    run_stage(config)
    taken = AudioTokenizer.load(root / "audio_tokenizer" / "tokenizer")
    assert taken.fingerprint == AudioTokenizer.load(published, num_codebooks=8).fingerprint
    file.write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="not a file of tensors alone"):
        run_stage(config)
    assert (root / "audio_tokenizer" / "tokenizer").is_dir(), (
        "what was there is not moved for a recipe that cannot work"
    )


def in_the_package(name: str) -> str:
    """`tokenizers_mm.encodec_package.renamed`, backwards."""
    name = name.replace("parametrizations.weight.original0", "weight_g").replace(
        "parametrizations.weight.original1", "weight_v"
    )
    if name.startswith("quantizer.layers."):
        return name.replace("quantizer.layers.", "quantizer.vq.layers.").replace(".codebook.", "._codebook.")
    for part in ("encoder", "decoder"):
        name = name.replace(f"{part}.layers.", f"{part}.model.")
    pieces = name.split(".")
    if pieces[-2] == "conv":
        upsamples = pieces[0] == "decoder" and len(pieces) == 5 and int(pieces[2]) in (3, 6, 9, 12)
        pieces[-2:-1] = ["convtr", "convtr"] if upsamples else ["conv", "conv"]
    return ".".join(pieces)


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"checkpoint": "absent"}, CheckpointError, "there is no codec at absent"),
        ({"checkpoint": "{empty}"}, CheckpointError, "no config.json: of a run, name RUN"),
        ({"checkpoint": "{clip}"}, CheckpointError, "not of an EnCodec model"),
        ({"checkpoint": "{published}", "num_codebooks": 3}, CheckpointError, r"bandwidths of \[2, 4, 8, 16, 32\] codebooks"),
        ({"checkpoint": "{published}", "num_codebooks": 0}, ConfigError, "greater than or equal to 1"),
        ({"checkpoint": "{published}", "loop": {"steps": 1}}, ConfigError, "unknown key 'loop'"),
        ({"checkpoint": None}, ConfigError, "'checkpoint'"),
        ({"checkpont": "{published}"}, ConfigError, "unknown key 'checkpont'; did you mean 'checkpoint'"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_told(
    published: Path, root: Path, tmp_path: Path, clip_folder: Path, fields: dict[str, Any], error: type[AnyGenError], says: str
) -> None:  # fmt: skip
    (tmp_path / "empty").mkdir()
    places = {"published": published, "clip": clip_folder, "empty": tmp_path / "empty"}
    values = {name: value.format(**places) if isinstance(value, str) else value for name, value in fields.items()}
    with pytest.raises(error, match=says):
        run_stage(recipe_of(root, **values))
    assert not (root / "audio_tokenizer").exists()
    with pytest.raises(error, match=says):
        weigh(recipe_of(root, **values))


def test_what_a_sound_tokenizer_is(
    published: Path, audio_tokenizer: AudioTokenizer, root: Path, tmp_path: Path
) -> None:
    audio_tokenizer.save(tmp_path / "own")
    facts = inspect_path(tmp_path / "own")
    assert facts == {
        "kind": "sound tokenizer",
        "sample_rate_hz": 8000,
        "hop": 160,
        "frames_per_s": 50.0,
        "codebooks": 2,
        "codes": 16,
        "bits_per_s": 400.0,
        "decoder": "inverse STFT",
        "parameters": facts["parameters"],
        "fingerprint": audio_tokenizer.fingerprint,
    }
    assert facts["parameters"] > sum(p.numel() for p in audio_tokenizer.model.parameters())
    facts = inspect_path(published)
    assert (facts["decoder"], facts["codebooks"], facts["bits_per_s"]) == ("SEANet", 32, 24_000.0)
    json.dumps(facts)
    dry = weigh(recipe_of(root, checkpoint=published, num_codebooks=2))
    assert dry["codec"]["bits_per_s"] == 1500.0 and dry["config"]["num_codebooks"] == 2
    (published_copy := tmp_path / "broken").mkdir()
    (published_copy / "config.json").write_text((published / "config.json").read_text())
    with pytest.raises(CheckpointError, match="no usable EnCodec model"):
        inspect_path(published_copy)
