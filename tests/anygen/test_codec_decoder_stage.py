"""A codec's decoder that learns on: its codes stay, the leading ones alone are understood better, in chosen voices."""

from __future__ import annotations

import difflib
import importlib
import io
import json
import signal
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_audio_tokenizer_stage as sounds
import torch
from safetensors.torch import load_file
from test_audio_tokenizer_stage import voice

from anygen.config import build
from anygen.data.records import Record, RecordStore, Utterance, write_shard
from anygen.data.source import flac_of
from anygen.errors import CheckpointError, ConfigError, DataError
from anygen.stages import codec_decoder
from anygen.stages.audio_tokenizer import SoundSet
from anygen.stages.catalogue import ALTERNATIVES, STAGES
from anygen.stages.codec_decoder import CodecDecoderConfig
from anygen.stages.dry_run import weigh
from anygen.stages.run import load_recipe, run_stage
from anygen.training.interrupts import Interrupted
from tokenizers_mm.audio import AudioTokenizer
from tokenizers_mm.codes import Codes
from tokenizers_mm.media import Audio
from tokenizers_mm.spectral import mel_distance

root = sounds.root


@pytest.fixture(scope="module")
def codec(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two codebooks at 50 Hz, trained for a moment."""
    config = sounds.recipe_of(root, tmp_path_factory.mktemp("codec") / "run", codec={"num_codebooks": 2})
    run_stage(config)
    return config.folder / "tokenizer"


def recipe_of(root: Path, codec: Path, folder: Path | None = None, **fields: Any) -> CodecDecoderConfig:
    if folder is not None:
        folder.mkdir()
        (folder / "data").symlink_to(root / "data")
    loop = {"steps": 6, "log_every": 1, "save_every": 2, "precision": "fp32", "device": "cpu"}
    values = {"root": str(folder or root), "codes_of": str(codec), "crop_s": 0.4, "batch_size": 4}
    return build(CodecDecoderConfig, {**values, "loop": loop, **fields}, source="test")


def test_the_codes_stay_and_the_leading_ones_alone_are_decoded_better(root: Path, codec: Path, tmp_path: Path) -> None:
    loop = {"steps": 40, "precision": "fp32", "device": "cpu", "optimizer": {"lr": 2e-3, "warmup_steps": 2}}
    config = recipe_of(root, codec, tmp_path / "run", loudness_weight=0.1, wave_weight=3.0, loop=loop)
    result = run_stage(config)
    before = AudioTokenizer.load(codec)
    after = AudioTokenizer.load(config.folder / "tokenizer")
    assert after.fingerprint == before.fingerprint and after.num_codebooks == 2
    assert all(torch.equal(a, b) for a, b in zip(after.model.parameters(), before.model.parameters(), strict=True))
    store = RecordStore([root / "data" / "validation-00000.tar"])
    heard = [u.audio(8000) for record in store for u in record.utterances]
    (leading_before, leading_after), (all_before, all_after) = (
        [float(np.mean([distance(tokenizer, sound, books) for sound in heard])) for tokenizer in (before, after)]
        for books in (1, 2)
    )
    assert leading_after < 0.9 * leading_before and all_after < all_before, "of sounds that it was not trained on"
    figures = [result.metrics[f"validation_mel{kind}"] for kind in ("", "_rehearsed")]
    assert figures == pytest.approx([leading_after, all_after], rel=2e-2), "weights are rounded as they are saved"


def test_a_share_of_what_was_learned_can_be_kept(root: Path, codec: Path, tmp_path: Path) -> None:
    loop = {"steps": 10, "precision": "fp32", "device": "cpu", "optimizer": {"lr": 1e-2, "warmup_steps": 1}}
    whole, part = (
        recipe_of(root, codec, tmp_path / str(share), learned_share=share, loop=loop) for share in (1.0, 0.25)
    )
    figures = [run_stage(config).metrics for config in (whole, part)]
    before, after, mixed = (
        load_file(folder / "istft" / "model.safetensors")
        for folder in (codec, whole.folder / "tokenizer", part.folder / "tokenizer")
    )
    for name, weight in mixed.items():
        expected = 0.25 * after[name].float() + 0.75 * before[name].float()
        torch.testing.assert_close(weight.float(), expected, rtol=2e-2, atol=1e-3)
    assert any((after[name] - before[name]).abs().max() > 0.02 for name in after)
    assert figures[0]["validation_mel"] != figures[1]["validation_mel"]
    store = RecordStore([root / "data" / "validation-00000.tar"])
    heard = [u.audio(8000) for record in store for u in record.utterances]
    saved = AudioTokenizer.load(part.folder / "tokenizer")
    found = float(np.mean([distance(saved, sound, 1) for sound in heard]))
    assert figures[1]["validation_mel"] == pytest.approx(found, rel=2e-2), "of what is saved"


def distance(codec: AudioTokenizer, sound: Audio, books: int) -> float:
    """Mel distance between a sound and what its leading codebooks are decoded to."""
    decoded = codec.decode(Codes(codec.encode(sound).codes_KT[:books], "audio")).samples_T
    pair = [torch.from_numpy(x[: len(decoded)].copy())[None] for x in (decoded, sound.samples_T)]
    return float(mel_distance(*pair, rate_hz=8000))


@pytest.mark.parametrize("books", [1, 2])
def test_a_piece_is_of_a_sound_that_was_coded_whole(root: Path, codec: Path, books: int) -> None:
    training = codec_decoder._DecoderTraining(recipe_of(root, codec, crop_s=0.2))
    tokenizer, sound = training._tokenizer, training._spoken.samples(0)
    codes_KN = tokenizer.encode(Audio(sound, 8000)).codes_KT
    for place, start in ((0.0, 0), (0.999, codes_KN.shape[1] - 10)):
        latents_LN, piece_T = training._piece(training._spoken, 0, books, place)
        expected = tokenizer.latents_of(Codes(codes_KN[:books, start : start + 10], "audio"))[0]
        assert torch.equal(latents_LN, expected)
        assert np.array_equal(piece_T.numpy(), sound[start * tokenizer.hop : (start + 10) * tokenizer.hop])


def test_what_is_shorter_is_masked(root: Path, codec: Path) -> None:
    training = codec_decoder._DecoderTraining(recipe_of(root, codec, crop_s=0.7))
    batch = training.next_batch()
    assert batch.mask_BN.shape == (4, 35) and batch.mask_BN.sum(1).tolist() == [25] * 4, "0.5 s at 50 Hz"
    assert batch.sound_BT.shape == (4, 35 * 160) and not batch.sound_BT[:, 25 * 160 :].any()
    assert not batch.latents_BLN[..., 25:].any()


def test_its_voices_are_learned_and_all_are_rehearsed(
    codec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run" / "data"
    folder.mkdir(parents=True)
    said = [flac_of(Audio(voice(n), 8000)) for n in range(3)]
    utterances = tuple(Utterance("a", name, sound) for name, sound in zip(("v", "w", "v@90"), said, strict=True))
    for split in ("train", "validation"):
        write_shard(folder / f"{split}-00000.tar", [Record(f"{split}{n}", utterances=utterances) for n in range(2)])
    (folder / "stage.json").write_text(json.dumps({"identity": "data"}))
    config = recipe_of(tmp_path / "run", codec, voices=["w", "v@90"], batch_size=3, rehearsed=1)
    training = codec_decoder._DecoderTraining(config)
    spoken = [training._spoken.samples(n) for n in range(len(training._spoken))]
    assert all(np.allclose(sound, voice(1 + n % 2), atol=1e-4) for n, sound in enumerate(spoken)) and len(spoken) == 4
    drawn: list[tuple[int, int]] = []
    piece = training._piece
    monkeypatch.setattr(training, "_piece", lambda *asked: drawn.append((len(asked[0]), asked[2])) or piece(*asked))
    for _ in range(8):
        training.next_batch()
    assert [of for of, _ in drawn] == [4, 4, 6] * 8
    assert {books for of, books in drawn if of == 4} == {1}, "its voices from the leading codebook"
    assert {books for of, books in drawn if of == 6} == {1, 2}, "any voice from one or both"
    for voices, match in (("vv", "nothing in the voice 'vv'; it has v$"), ("xyz", "'xyz'; it has v, v@90, w$")):
        with pytest.raises(ConfigError, match=match):
            recipe_of(tmp_path / "run", codec, voices=["v", voices]).check()
    for path in folder.glob("validation*"):
        path.unlink()
    write_shard(folder / "validation-00000.tar", [Record("r", utterances=(replace(utterances[0], voice="u"),))])
    with pytest.raises(ConfigError, match="the split validation has nothing in the voice 'v@90'; it has u"):
        config.check()
    with pytest.raises(DataError, match="no sounds in the voices x"):
        SoundSet(RecordStore([folder / "train-00000.tar"]), 8000, ("x",))


def test_a_voice_is_found_by_its_name_in_any_order_of_sounds(tmp_path: Path) -> None:
    """As in shards of other tools: the JSON lists them in another order, or a sound has no name."""
    path = tmp_path / "train-00000.tar"
    said = {"v": flac_of(Audio(voice(0), 8000)), "w": flac_of(Audio(voice(1), 8000))}
    listed = {"utterances": [{"text": "a", "voice": "w"}, {"text": "a", "voice": "v"}]}
    with tarfile.open(path, "w") as tar:
        for name, data in (
            ("k.json", json.dumps(listed).encode()), ("k.v.flac", said["v"]), ("k.w.flac", said["w"]), ("n.flac", said["w"]), ("n.txt", b"a"),
        ):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    store = RecordStore([path])
    for name, number in (("v", 0), ("w", 1), ("voice", 1)):
        sounds = SoundSet(store, 8000, (name,))
        assert len(sounds) == 1 and np.allclose(sounds.samples(0), voice(number), atol=1e-4), name
    assert len(SoundSet(store, 8000)) == 3
    with tarfile.open(path, "w") as tar:
        for name, data in (("k.json", json.dumps(listed).encode()), *((f"k.{v}.flac", said["v"]) for v in "vwx")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with pytest.raises(DataError, match="record 'k' has a sound of 'x', which its utterances do not list"):
        SoundSet(RecordStore([path]), 8000, ("x",)).samples(0)


def test_what_is_behind_the_end_of_a_sound_is_not_heard(root: Path, codec: Path) -> None:
    training = codec_decoder._DecoderTraining(recipe_of(root, codec, crop_s=0.7))
    batch, heard = training.next_batch(), []
    istft = training._loss.istft.forward

    def spy(*given: Any) -> torch.Tensor:
        heard.append(istft(*given))
        heard[-1].retain_grad()
        return heard[-1]

    training._loss.istft.forward = spy  # type: ignore[method-assign]
    loss, _ = training._loss(batch)
    loss.backward()
    assert heard[0][:, 25 * 160 :].abs().max() > 0, "windows reach beyond it"
    assert heard[0].grad is not None and not heard[0].grad[:, 25 * 160 :].any()
    assert heard[0].grad[:, 25 * 160 - 80 : 25 * 160].any()


def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    root: Path, codec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = recipe_of(root, codec, tmp_path / "whole")
    run_stage(whole)
    next_batch, calls = codec_decoder._DecoderTraining.next_batch, []

    def stops_after_four(self: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGTERM)
        return next_batch(self)

    monkeypatch.setattr(codec_decoder._DecoderTraining, "next_batch", stops_after_four)
    parts = recipe_of(root, codec, tmp_path / "parts")
    with pytest.raises(Interrupted):
        run_stage(parts)
    monkeypatch.undo()
    run_stage(parts)
    files = [config.folder / "tokenizer" / "istft" / "model.safetensors" for config in (whole, parts)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_codecs_that_cannot_be_are_refused_before_anything_is_moved(root: Path, codec: Path, tmp_path: Path) -> None:
    kept = tmp_path / "run" / "audio_tokenizer" / "tokenizer"
    config = recipe_of(root, codec, tmp_path / "run")
    run_stage(config)
    seanet = sounds.recipe_of(root, tmp_path / "seanet", decode_with="seanet")
    run_stage(seanet)
    for wrong, match in (
        ({"codes_of": str(seanet.folder / "tokenizer")}, "only an inverse-STFT one"),
        ({"codes_of": str(seanet.root)}, "no config.json: of a run, name RUN/audio_tokenizer/tokenizer"),
        ({"leading": 3}, "leading=3, but the codec has 2 codebooks"),
        ({"codes_of": str(tmp_path / "nowhere")}, "there is no codec at"),
    ):
        with pytest.raises(CheckpointError, match=match):
            run_stage(build(CodecDecoderConfig, {**config.model_dump(mode="json"), **wrong}, source="test"))
        assert kept.is_dir()
    with pytest.raises(ConfigError, match="rehearsed=4 leaves nothing of a batch of 4"):
        recipe_of(root, codec, rehearsed=4)
    with pytest.raises(ConfigError, match=r"too short to be heard: take 0\.064 s"):
        recipe_of(root, codec, crop_s=0.05)


def test_a_recipe_is_known_by_its_key(codec: Path, tmp_path: Path) -> None:
    path = tmp_path / "audio_tokenizer.yaml"
    path.write_text(f"stage: audio_tokenizer\ncodes_of: {codec}\nloop: {{steps: 1}}\n")
    config = load_recipe(path, root=tmp_path / "run")
    assert isinstance(config, CodecDecoderConfig)
    assert weigh(config)["codec"]["codebooks"] == 2


def test_no_key_of_a_usual_recipe_is_taken_for_one_that_makes_it_another_kind() -> None:
    for (stage, key), _ in ALTERNATIVES.items():
        usual = STAGES[stage].config_class
        module = importlib.import_module(f"anygen.stages.{stage}")
        keys = list(getattr(module, usual).model_fields)
        assert not difflib.get_close_matches(key, keys, cutoff=0.8), f"{key} is near to a key of {usual}"
