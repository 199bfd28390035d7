"""The stage `teacher`: InfoNCE where nothing is said twice, shared positives where it is, sounds, and the same run twice."""

from __future__ import annotations

import io
import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from anygen.config import build
from anygen.data.augmentation import AugmentationConfig
from anygen.data.records import Record, RecordStore, Utterance, write_shard
from anygen.errors import CheckpointError, ConfigError, DataError
from anygen.seeding import borrowed_randomness, seed_of
from anygen.stages import teacher as stage
from anygen.stages.base import Shuffled, open_text_tokenizer
from anygen.stages.contrastive import Towers, contrastive_loss, equal_rows, matched_share
from anygen.stages.sound_pairs import SoundPairs
from anygen.stages.teacher import TeacherConfig
from anygen.training.interrupts import Interrupted
from tokenizers_mm.media import Audio
from tokenizers_mm.sound_tower import SoundTower, SoundTowerConfig
from tokenizers_mm.teacher import TeacherConfig as VisionTeacherConfig
from tokenizers_mm.teacher import VisionTeacher
from tokenizers_mm.text import TextTokenizer

CAPTIONS = ("a red apple", "two cats", "one dog", "the flag of Norway", "how many apples")


def sound_bytes(seed: int, *, seconds: float = 0.4) -> bytes:
    import soundfile

    times = np.arange(int(16_000 * seconds)) / 16_000
    samples = 0.2 * np.sin(2 * np.pi * (200 + 37 * seed) * times)  # a tone of its own
    buffer = io.BytesIO()
    soundfile.write(buffer, samples.astype(np.float32), 16_000, format="FLAC")
    return buffer.getvalue()


def record(number: int, *, sounds: int = 2) -> Record:
    picture = Image.fromarray(np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    name = f"{CAPTIONS[number % 5]} {number}"
    spoken = tuple(Utterance(f"{name} {turn}", f"v{turn}", sound_bytes(10 * number + turn)) for turn in range(sounds))
    return Record(f"r{number:03}", captions=(name, f"again {name}"), picture=buffer.getvalue(), utterances=spoken)


@pytest.fixture
def root(tmp_path: Path, text_tokenizer: TextTokenizer) -> Path:
    """13 training records, of which every third has no sound, and 7 held out."""
    (tmp_path / "data").mkdir()
    records = [record(n, sounds=0 if n % 3 == 2 else 2) for n in range(20)]
    write_shard(tmp_path / "data" / "train-000.tar", records[:13])
    write_shard(tmp_path / "data" / "validation-000.tar", records[13:])
    text_tokenizer.save(tmp_path / "text_tokenizer")
    return tmp_path


def config_of(root: Path, **more: Any) -> TeacherConfig:
    tower = {"width": 16, "depth": 1, "num_heads": 2}
    loop = {"steps": 2, "log_every": 1, "save_every": 1, "device": "cpu", "precision": "fp32", **more.pop("loop", {})}
    values = {"side_px": 16, "patch_px": 8, "vision": tower, "text": tower, "embedding": 8, "max_pieces": 12}
    return build(
        TeacherConfig,
        {**values, "batch_size": 5, "loop": loop, "root": root, "stage": "teacher", **more},
        source="test",
    )


SOUND = {"sound": {"width": 16, "depth": 1, "num_heads": 2}, "sound_s": 0.5}


def trainee_of(config: TeacherConfig) -> Any:
    tokenizer = open_text_tokenizer(config.root)
    with borrowed_randomness(config.loop.seed):
        model = stage._create(config, tokenizer.codebook_size)
    sound = stage._create_sound(config) if config.sound else None
    share_equal = config.equal_captions == "positives"
    towers = Towers(model, sound, share_equal=share_equal, sound_weight=config.sound_weight)
    return stage._Contrastive(config, towers, tokenizer)


def info_nce(logits: torch.Tensor) -> torch.Tensor:
    truth = torch.arange(len(logits))
    return (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2


# -- the loss


@pytest.mark.parametrize("size", [1, 2, 7, 33])
def test_with_distinct_captions_the_loss_is_info_nce_bit_for_bit(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(size, size, generator=generator).mul(20).requires_grad_(True)
    loss = contrastive_loss(logits, torch.eye(size, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(loss, logits)
    (expected,) = torch.autograd.grad(info_nce(logits), logits)
    assert torch.equal(loss, info_nce(logits)) and torch.equal(gradient, expected)


def test_equal_captions_share_their_row() -> None:
    """UniCL, equations 2 and 3, written out."""
    labels = [0, 1, 0, 2, 0, 1]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    expected = 0.0
    for matrix in (logits, logits.T):
        for i in range(6):
            same = [k for k in range(6) if labels[k] == labels[i]]
            chances = matrix[i].exp() / matrix[i].exp().sum()
            expected -= sum(float(chances[k].log()) for k in same) / len(same) / 6 / 2
    positives = equal_rows(torch.tensor(labels)[:, None])
    assert float(contrastive_loss(logits, positives)) == pytest.approx(expected, abs=1e-6)
    perfect = torch.where(positives, 50.0, 0.0)
    entropy = positives.sum(1).float().log().mean()
    assert (contrastive_loss(perfect, positives) - entropy).abs() < 1e-5, "the least it can be"


def test_matched_counts_every_positive() -> None:
    logits = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    assert float(matched_share(logits, torch.eye(3, dtype=torch.bool))) == 0.0
    same = equal_rows(torch.tensor([[4], [4], [9]]))
    assert float(matched_share(logits, same)) == pytest.approx(2 / 3)


# -- what a recipe without the new fields does


def test_batches_and_losses_of_plain_recipes_are_what_they_were(root: Path) -> None:
    config = config_of(root)
    assert config.augmentation == AugmentationConfig() and config.sound is None and config.max_shift_px == 3
    trainee = trainee_of(config)
    order = Shuffled(13, 5, seed=seed_of(config.loop.seed, "teacher"))
    for _ in range(4):
        items, generator = order.next(), order.generator()
        shift = (generator.randint(-3, 3), generator.randint(-3, 3))
        ids = torch.stack([generator.choice(trainee._train._captions[item]) for item in items])
        batch = trainee.next_batch()
        assert set(batch) == {"pixels", "ids"}
        assert torch.equal(batch["pixels"], torch.roll(trainee._train.pictures.pixels(items), shift, dims=(2, 3)))
        assert torch.equal(batch["ids"], ids)
    loss, report = trainee.module(batch)
    out = trainee.module.model(input_ids=batch["ids"], pixel_values=batch["pixels"] * 2 - 1)
    assert (loss - info_nce(out.logits_per_image)).abs() < 1e-6 and set(report) == {"matched"}


@pytest.mark.parametrize("kind", ["negatives", "positives"])
def test_equal_captions_are_what_the_recipe_says(root: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    real = contrastive_loss

    def spied(logits: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
        seen.append(positives)
        return real(logits, positives)

    monkeypatch.setattr("anygen.stages.contrastive.contrastive_loss", spied)
    twice = [Record(f"{r.key}-{n}", captions=("same",), picture=r.picture) for n in range(3) for r in [record(n)]]
    write_shard(root / "data" / "train-000.tar", [*twice, record(9), record(10)])
    (root / "data" / "validation-000.tar").unlink()
    stage.main(config_of(root, equal_captions=kind))
    expected = 5 if kind == "negatives" else 3 * 3 + 2
    assert [int(positives.sum()) for positives in seen] == [expected] * 2


def test_augmentation_changes_pixels_and_nothing_else(root: Path) -> None:
    plain, flipped, again = (
        trainee_of(config_of(root, max_shift_px=0, augmentation=more)).next_batch()
        for more in ({}, {"flip": 1.0}, {"flip": 1.0})
    )
    assert torch.equal(plain["ids"], flipped["ids"])
    assert (flipped["pixels"] - plain["pixels"].flip(3)).abs().max() < 1e-5
    assert torch.equal(flipped["pixels"], again["pixels"])


# -- whole runs


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("more", [{}, SOUND], ids=["two-towers", "three-towers"])
def test_two_steps_make_a_clip_that_teaches(root: Path, more: dict[str, Any]) -> None:
    from transformers import CLIPModel

    state = torch.get_rng_state()
    result = stage.main(config_of(root, **more))
    assert torch.equal(torch.get_rng_state(), state)
    assert 0 <= result.metrics["validation_matched"] <= 1 and result.metrics["validation_loss"] > 0
    assert ("validation_sound_matched" in result.metrics) == bool(more)
    model = CLIPModel.from_pretrained(root / "teacher" / "model").eval()
    teacher = VisionTeacher.open(VisionTeacherConfig(path=root / "teacher" / "model", projected=True))
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = model.vision_model(pixels * 2 - 1, output_hidden_states=True).hidden_states
    assert (teacher(pixels).shallow_BND - F.layer_norm(states[1][:, 1:], (16,))).abs().max() < 1e-4
    assert teacher.deep_width == 8
    assert (root / "teacher" / "sound").exists() == bool(more)
    assert len(result.outputs) == 1 + bool(more)


@pytest.mark.parametrize("more", [{}, SOUND], ids=["two-towers", "three-towers"])
def test_resumed_equals_never_stopped(root: Path, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(root, loop={"steps": 4}, augmentation={"flip": 0.5}, **more)
    stage.main(config)
    whole = {part: tensors_of(config.folder / part) for part in ("model", "sound") if (config.folder / part).exists()}
    config.folder.rename(root / "whole")
    real = stage._Contrastive.next_batch

    def killed(self: Any) -> Any:
        if self._order.position == 2 * config.batch_size:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self)

    monkeypatch.setattr(stage._Contrastive, "next_batch", killed)
    with pytest.raises(Interrupted):
        stage.main(config)
    monkeypatch.undo()
    stage.main(config)
    for part, tensors in whole.items():
        resumed = tensors_of(config.folder / part)
        assert resumed.keys() == tensors.keys()
        assert all(torch.equal(resumed[name], tensors[name]) for name in tensors)


def test_validation_is_in_order_and_whole(root: Path) -> None:
    trainee = trainee_of(config_of(root, batch_size=3))
    seen: list[int] = []

    class Counting(nn.Module):
        def forward(self, batch: dict[str, torch.Tensor]) -> Any:
            seen.append(len(batch["ids"]))
            return torch.tensor(float(len(seen))), {"matched": torch.tensor(1.0)}

    assert trainee.validate(Counting(), torch.device("cpu")) == {"loss": 1.5, "matched": 1.0}
    assert seen == [3, 3], "a single pair, which has nothing to be told from, is left out"
    batch = trainee._held_out.batch([0, 1, 2])
    assert torch.equal(batch["ids"][1], trainee._held_out._captions[1][0])
    (root / "data" / "validation-000.tar").unlink()
    assert trainee_of(config_of(root)).validate(Counting(), torch.device("cpu")) == {}


# -- sounds


def test_the_sound_tower_learns(root: Path) -> None:
    trainee = trainee_of(config_of(root, **SOUND, batch_size=12))
    batch, tower = trainee.next_batch(), trainee.module.sound
    optimizer = torch.optim.AdamW(tower.parameters(), 1e-2)  # the pictures stay where they are
    losses = []
    for _ in range(60):
        loss = trainee.module(batch)[1]["sound"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0], losses


def test_the_sound_tower_is_saved_as_it_was_trained(root: Path) -> None:
    config = config_of(root, **SOUND)
    stage.main(config)
    folder = config.folder / "sound"
    tower = SoundTower.load(folder)
    assert tower.config == SoundTowerConfig(sound_s=0.5, width=16, depth=1, num_heads=2, embedding=8)
    facts = json.loads((folder / "config.json").read_text())
    assert facts["kind"] == "sound_tower"
    sounds = torch.randn(2, 8000, generator=torch.Generator().manual_seed(0))
    tower.save(root / "copy")
    assert torch.equal(SoundTower.load(root / "copy")(sounds), tower(sounds))
    (folder / "config.json").write_text(json.dumps({**facts, "tower": {"width": 6}}))
    with pytest.raises(CheckpointError, match="sound_tower"):
        SoundTower.load(folder)


def test_the_sound_loss_is_that_of_the_pictures_with_sounds(root: Path) -> None:
    trainee = trainee_of(config_of(root, **SOUND, sound_weight=0.5))
    batch = trainee.next_batch()
    assert 2 <= len(batch["owners"]) <= 5 and batch["sounds"].shape == (len(batch["owners"]), 8000)
    loss, report = trainee.module(batch)
    out = trainee.module.model(input_ids=batch["ids"], pixel_values=batch["pixels"] * 2 - 1)
    tower = trainee.module.sound
    logits = tower.logit_scale.exp() * out.image_embeds[batch["owners"]] @ tower(batch["sounds"]).T
    assert (report["sound"] - info_nce(logits)).abs() < 1e-5
    assert (loss - info_nce(out.logits_per_image) - 0.5 * report["sound"]).abs() < 1e-5
    alone = {**batch, **{name: batch[name][:1] for name in ("sounds", "owners", "texts")}}
    loss, report = trainee.module(alone)
    assert (loss - info_nce(out.logits_per_image)).abs() < 1e-5 and bool(torch.isnan(report["sound"]))


def test_windows_are_cut_padded_cached_and_drawn(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RecordStore([root / "data" / "train-000.tar"])
    pairs = SoundPairs(store, list(range(13)), rate_hz=16_000, num_samples=8_000, cache_bytes=2 * 8_000)
    batch = pairs.batch([0, 2, 4])
    assert batch["owners"].tolist() == [0, 2], "record 2 has no sound"
    samples = torch.from_numpy(store[4].utterances[0].audio(16_000).samples_T)
    assert (batch["sounds"][1, :6400] - samples).abs().max() < 1e-4 and batch["sounds"][1, 6400:].abs().max() == 0
    short = SoundPairs(store, [4], rate_hz=16_000, num_samples=1_000).batch([0])
    assert (short["sounds"][0] - samples[:1000]).abs().max() < 1e-4
    assert batch["texts"].unique().numel() == 2 and torch.equal(pairs.batch([4, 0])["texts"], batch["texts"].flip(0))
    drawn = {tuple(pairs.batch([0], random.Random(n))["texts"].tolist()) for n in range(20)}
    assert len(drawn) == 2, "either utterance"
    decoded: list[int] = []
    real = Utterance.audio

    def counted(self: Utterance, rate_hz: int) -> Audio:
        decoded.append(1)
        return real(self, rate_hz)

    monkeypatch.setattr(Utterance, "audio", counted)
    pairs.batch([0, 0, 4])
    assert len(decoded) == 1, "record 0 is held; there is memory for one window only"


def test_the_sound_tower_hears_its_window_in_any_batch() -> None:
    torch.manual_seed(0)
    tower = SoundTower(SoundTowerConfig(sound_s=0.5, width=16, depth=1, num_heads=2, embedding=8)).eval()
    sound = torch.randn(3, 8000, generator=torch.Generator().manual_seed(0)) * 0.1
    with torch.no_grad():
        vectors = tower(sound)
        with torch.autocast("cpu", torch.bfloat16):
            rough = tower(sound)
        assert (tower(sound[1:2]) - vectors[1]).abs().max() < 1e-5
    assert vectors.shape == (3, 8) and (vectors.norm(dim=1) - 1).abs().max() < 1e-5
    assert rough.dtype == torch.float32 and (rough - vectors).abs().max() < 0.1
    late = sound.clone().requires_grad_(True)
    tower(late)[0, 0].backward()
    assert late.grad is not None and late.grad[0, 7000:].abs().sum() > 0 and late.grad[1].abs().sum() == 0


# -- refusals


def test_bad_recipes_and_bad_data(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="multiple of num_heads=2 and of 4"):
        config_of(root, sound={"width": 6, "depth": 1, "num_heads": 2})
    write_shard(root / "data" / "train-000.tar", [record(n, sounds=0) for n in range(6)])
    with pytest.raises(DataError, match="no record with a picture has a sound: set sound=null"):
        trainee_of(config_of(root, **SOUND))
    mute = Record("mute", picture=record(0).picture)
    write_shard(root / "data" / "train-000.tar", [record(1), mute])
    with pytest.raises(DataError, match="'mute' of the split train has a picture and no caption"):
        trainee_of(config_of(root))
