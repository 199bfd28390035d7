"""The sound tokenizer's stage: its variants, what its folder is to others, its guards, exact resume."""

from __future__ import annotations

import json
import logging
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from anygen.config import build
from anygen.data.records import Record, Utterance, write_shard
from anygen.data.source import flac_of
from anygen.errors import ConfigError
from anygen.stages import audio_tokenizer
from anygen.stages.audio_tokenizer import AudioTokenizerConfig
from anygen.stages.codec_losses import CodecLoss
from anygen.stages.run import run_stage
from anygen.training.interrupts import Interrupted
from tokenizers_mm.audio import AudioTokenizer
from tokenizers_mm.encodec import EncodecSize, TrainableEncodec
from tokenizers_mm.errors import TrainingError
from tokenizers_mm.istft import InverseSTFTConfig, InverseSTFTDecoder
from tokenizers_mm.media import Audio
from tokenizers_mm.msstft import MSSTFTConfig


def voice(seed: int, seconds: float = 0.5) -> np.ndarray:
    """A buzz whose pitch glides, louder and softer."""
    random = np.random.default_rng(seed)
    time = np.arange(int(seconds * 8000)) / 8000
    phase = (
        2 * np.pi * np.cumsum(100 + 80 * random.random() + 50 * np.sin(2 * np.pi * time * random.uniform(1, 4))) / 8000
    )
    waves = sum(np.sin(k * phase) / k for k in range(1, 10))
    return (0.1 * waves * (1 + np.sin(2 * np.pi * 3 * time))).astype(np.float32)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    (root / "data").mkdir()
    for split, count in (("train", 24), ("validation", 4)):
        sounds = [flac_of(Audio(voice(1000 * len(split) + n), 8000)) for n in range(count)]
        records = [
            Record(f"{split}{n}", "pair", ("a",), utterances=(Utterance("a", "v", sound),))
            for n, sound in enumerate(sounds)
        ]
        write_shard(root / "data" / f"{split}-00000.tar", records)
    (root / "data" / "stage.json").write_text(json.dumps({"identity": "data"}))
    return root


def recipe_of(root: Path, folder: Path | None = None, **fields: Any) -> AudioTokenizerConfig:
    if folder is not None:
        folder.mkdir()
        (folder / "data").symlink_to(root / "data")
    values: dict[str, Any] = {
        "root": folder or root,
        "codec": {"rate_hz": 8000, "ratios": [8, 5, 4], "num_filters": 2, "latent_dim": 8, "codebook_size": 16},
        "decoder": {"width": 16, "depth": 1},
        "crop_s": 0.3,
        "batch_size": 8,
        "steps_without_quantiser": 2,
        "usage_window": 2,
        "loop": {"steps": 6, "log_every": 1, "save_every": 2, "precision": "fp32", "device": "cpu"},
    }
    for name, value in fields.items():
        values[name] = {**values.get(name, {}), **value} if isinstance(value, dict) else value
    return build(AudioTokenizerConfig, values, source="test")


JUDGE = {"weight": 1.0, "start_share": 0.5, "channels": 2, "windows": [256, 128]}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "seanet": {"decode_with": "seanet"},
    "two codebooks": {"codec": {"num_codebooks": 2}},
    "judged": {"adversarial": JUDGE},
    "judged and balanced": {"adversarial": JUDGE, "balancer": True, "decode_with": "seanet"},
    "without the waveform": {"wave_weight": 0.0, "balancer": True},
    "loudness": {"loudness_weight": 0.4},
    "loudness, balanced": {"loudness_weight": 0.4, "balancer": True},
}


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_trains_saves_and_is_an_encodec_model(root: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    from transformers import EncodecModel

    config = recipe_of(root, tmp_path / "run", **fields)
    result = run_stage(config)
    books = config.codec.num_codebooks
    assert result.metrics["validation_mel"] > 0
    assert all(0 < result.metrics[f"validation_usage{k or ''}"] <= 1 for k in range(books))
    rows = [json.loads(line) for line in (config.folder / "metrics.jsonl").read_text().splitlines()]
    assert ["usage" in row for row in rows] == [False] * 3 + [True] * 3, "once a window is full"
    assert {"loudness" in row for row in rows} == {"loudness_weight" in fields}
    judged = [False] * 6 if "adversarial" not in fields else [False] * 3 + [True] * 3
    assert ["discriminator" in row and "adversarial" in row and "features" in row for row in rows] == judged

    folder = config.folder / "tokenizer"
    ours, theirs = AudioTokenizer.load(folder), EncodecModel.from_pretrained(folder)
    sound = voice(7)
    codes = ours.encode((sound, 8000))
    plain = theirs.encode(torch.from_numpy(sound)[None, None], bandwidth=max(theirs.config.target_bandwidths))
    assert np.array_equal(codes.codes_KT, plain.audio_codes[0, 0].numpy())
    assert (folder / "istft").is_dir() == (config.decode_with == "istft")
    if config.decode_with == "seanet":
        with torch.no_grad():
            waveform = theirs.decode(plain.audio_codes, plain.audio_scales).audio_values[0, 0].numpy()
        decoded = ours.decode(codes).samples_T
        assert np.allclose(decoded, np.clip(waveform[: len(decoded)], -1, 1), atol=1e-6)


def test_averaged_weights_are_saved_and_codebooks_as_they_are(root: Path, tmp_path: Path) -> None:
    last, averaged = (
        recipe_of(root, tmp_path / str(decay), decode_with="seanet", loop={"ema_decay": decay}) for decay in (0.0, 0.9)
    )
    run_stage(last)
    run_stage(averaged)
    checkpoints = [
        load_file(c.folder / "checkpoints" / "step-00000006" / "state.safetensors") for c in (last, averaged)
    ]
    trained = {name: tensor for name, tensor in checkpoints[0].items() if name.startswith("module.")}
    assert all(torch.equal(checkpoints[1][name], tensor) for name, tensor in trained.items()), "training is the same"
    saved = load_file(averaged.folder / "tokenizer" / "model.safetensors")
    count = 0
    for name, mean in checkpoints[1].items():
        if (found := saved.get(name.removeprefix("average.codec.model."))) is not None:
            assert torch.equal(found, mean.bfloat16().float())
            count += not torch.equal(mean, trained[name.replace("average.", "module.")])
    assert count > 20
    codebook = trained["module.codec.quantizer.layers.0._codebook.embed"][0]
    assert torch.equal(saved["quantizer.layers.0.codebook.embed"], codebook)


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ema_decay: float
) -> None:
    fields = {**VARIANTS["judged and balanced"], "codec": {"num_codebooks": 2}, "loop": {"ema_decay": ema_decay}}
    whole, parts = (recipe_of(root, tmp_path / name, **fields) for name in ("whole", "parts"))
    run_stage(whole)
    trainee = audio_tokenizer._CodecTraining
    dealt, count = trainee.next_batch, [0]

    def stops_after_four(self: Any) -> torch.Tensor:
        count[0] += 1
        if count[0] == 5:
            raise Interrupted(signal.SIGTERM, "by the test")
        return dealt(self)

    monkeypatch.setattr(trainee, "next_batch", stops_after_four)
    with pytest.raises(Interrupted):
        run_stage(parts)
    monkeypatch.undo()
    run_stage(parts)
    for name in ("model.safetensors", "config.json"):
        mine, other = (config.folder / "tokenizer" / name for config in (whole, parts))
        assert mine.read_bytes() == other.read_bytes()
    rows = [
        [{k: v for k, v in json.loads(line).items() if k != "step_s"} for line in (c.folder / "metrics.jsonl").open()]
        for c in (whole, parts)
    ]
    assert rows[0] == rows[1], "the monitors and the balancer go on too"


def test_encodecs_own_start_is_refused_unless_one_insists(root: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"hardly depends on the sound .*variance_preserving"):
        run_stage(recipe_of(root, tmp_path / "stock", codec={"start": "stock"}))
    run_stage(recipe_of(root, tmp_path / "forced", codec={"start": "stock"}, min_spread=0.0))


def test_collapse_is_told(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="anygen"):
        run_stage(recipe_of(root, tmp_path / "run", codec={"codebook_size": 256}, usage_alarm=1.0))
    assert any("codebook collapse" in record.message for record in caplog.records)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"crop_s": 0.01}, "a code frame of 160 samples or more"),
        ({"crop_s": 0.007, "codec": {"ratios": [5, 4]}}, "64 samples for the shortest spectrum"),
        ({"loudness_weight": 0.1, "crop_s": 0.02, "codec": {"ratios": [5, 4]}}, "shorter than the 0.032 s"),
        ({"adversarial": {"weight": 1.0}, "crop_s": 0.2}, "discriminator's window of 2048 samples"),
        ({"steps_without_quantiser": 6}, "leaves no step with codes"),
        ({"decoder": {"upsampling": 3}}, "does not divide the codec's hop of 160"),
        ({"mel_floor_db": 3}, "mel_floor_db"),
        ({"speed_change": 1.0}, "speed_change"),
    ],
)
def test_recipes_that_cannot_work_are_refused(root: Path, fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        recipe_of(root, **fields)


def test_no_step_is_spent_on_padding(root: Path) -> None:
    """Pieces longer than any sound here; slower and faster ones have the same number of samples."""
    for speed_change, crop_s in ((0.0, 1.2), (0.3, 1.2), (0.0, 20.0)):
        config = recipe_of(root, crop_s=crop_s, speed_change=speed_change)
        first, again = (audio_tokenizer._CodecTraining(config) for _ in range(2))
        batch = first.next_batch()
        assert batch.shape == (8, config.crop) and batch.dtype == torch.float32
        assert torch.equal(batch, again.next_batch()), "the order alone decides"
        loudness = batch.unfold(1, 800, 800).square().mean(-1).sqrt()
        assert (loudness > 1e-3).all(), "silent nowhere"
        assert not torch.equal(batch, first.next_batch())


def test_speed_changes_pitch(root: Path) -> None:
    pitches = []
    for speed_change in (0.0, 0.5):
        trainee = audio_tokenizer._CodecTraining(recipe_of(root, speed_change=speed_change))
        pieces = torch.cat([trainee.next_batch() for _ in range(4)])
        spectrum = torch.fft.rfft(pieces).abs()
        pitches.append((spectrum * torch.arange(spectrum.shape[1])).sum(1) / spectrum.sum(1))
    assert pitches[1].std() > 1.3 * pitches[0].std()


def test_half_of_the_pieces_are_made_quieter(root: Path) -> None:
    levels = {}
    for quieter_db in (0.0, 40.0):
        trainee = audio_tokenizer._CodecTraining(recipe_of(root, quieter_db=quieter_db))
        pieces = torch.cat([trainee.next_batch() for _ in range(32)])
        levels[quieter_db] = 10 * pieces.square().mean(1).log10()
    low, high = levels[0.0].min(), levels[0.0].max()
    quieter = levels[40.0] < low
    assert high - low < 12, "of pieces as they are"
    assert 0.3 < quieter.float().mean() < 0.55 and levels[40.0].max() <= high + 0.1
    assert low - 41 < levels[40.0].min() < low - 25, "up to 40 dB"
    with pytest.raises(ConfigError, match="quieter_db"):
        recipe_of(root, quieter_db=-6)


def loss_of(
    size: EncodecSize, istft: InverseSTFTDecoder | None, weights: dict[str, float], **changes: Any
) -> CodecLoss:
    """A codec's losses, quantised from the first step, not judged, its monitors silent."""
    rest: dict[str, Any] = {"judge": MSSTFTConfig(), "judge_start": 0, "balanced": False, "steps_without_quantiser": 0}
    rest |= {"min_spread": 0.0, "usage_window": 50, "usage_alarm": 0.0, **changes}
    return CodecLoss(TrainableEncodec(size, tokens_per_batch=100), istft, weights=weights, **rest)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_codebooks_are_left_out_in_a_share_of_the_steps(share: float) -> None:
    torch.manual_seed(0)
    size = EncodecSize(
        rate_hz=8000, ratios=(8, 5, 4), num_filters=2, latent_dim=8, codebook_size=4, num_codebooks=4,
        quantizer_dropout=share,
    )  # fmt: skip
    istft = InverseSTFTDecoder(InverseSTFTConfig(width=8, depth=1), latent_dim=8, hop=160)
    loss = loss_of(size, istft, {"mel": 1.0, "wave": 0.0, "commitment": 0.25})
    asked: list[bool] = []
    quantise = loss.codec.quantise
    loss.codec.quantise = lambda latents, *, leave_out: (
        asked.append(leave_out) or quantise(latents, leave_out=leave_out)
    )  # type: ignore[assignment,method-assign,func-returns-value]
    batch = torch.from_numpy(np.stack([voice(n) for n in range(4)]))
    with torch.no_grad():
        for _ in range(40):
            loss(batch)
    assert abs(sum(asked) - 40 * share) <= (1 if share == 0.5 else 0)
    assert share != 0.5 or all(0 < sum(asked[n : n + 5]) < 5 for n in range(36)), "all over the steps"


def test_the_mel_loss_has_its_floor() -> None:
    size = EncodecSize(rate_hz=8000, ratios=(8, 5, 4), num_filters=2, latent_dim=8, codebook_size=16)
    batch, mel = torch.from_numpy(np.stack([voice(n) for n in range(4)])), []
    for floor_db in (None, -20.0):
        torch.manual_seed(0)
        _, parts = loss_of(size, None, {"mel": 1.0, "wave": 0.0, "commitment": 0.0}, mel_floor_db=floor_db)(batch)
        mel.append(float(parts["mel"]))
    assert mel[1] < 0.5 * mel[0]


def test_commitment_has_its_weight(root: Path) -> None:
    batch = torch.from_numpy(np.stack([voice(n) for n in range(4)]))
    size = EncodecSize(rate_hz=8000, ratios=(8, 5, 4), num_filters=2, latent_dim=8, codebook_size=16)
    shown = []
    for weight in (0.0, 3.0):
        torch.manual_seed(0)
        loss = loss_of(size, None, {"mel": 1.0, "wave": 0.0, "commitment": weight}, balanced=True)
        value, parts = loss(batch)
        assert parts["commitment"] > 0
        shown.append(float(value.detach()) - float(parts["mel"]) - weight * float(parts["commitment"].detach()))
    assert shown == pytest.approx([0, 0], abs=1e-4)


def gradients(balanced: bool, scale: float) -> torch.Tensor:
    """Of the decoder, after one step."""
    torch.manual_seed(0)
    size = EncodecSize(rate_hz=8000, ratios=(8, 5, 4), num_filters=2, latent_dim=8, codebook_size=16)
    istft = InverseSTFTDecoder(InverseSTFTConfig(width=8, depth=1), latent_dim=8, hop=160)
    weights = {"mel": 2.0 * scale, "wave": 0.5 * scale, "commitment": 0.25}
    judge = MSSTFTConfig(weight=scale, channels=2, windows=(256,))
    loss = loss_of(size, istft, weights, judge=judge, balanced=balanced, steps_without_quantiser=1)
    value, parts = loss(torch.from_numpy(np.stack([voice(n) for n in range(4)])))
    shares = {"mel": 2.0, "wave": 0.5, "adversarial": 1.0, "features": 1.0 / scale}
    shown = sum(scale * share * float(parts[name]) for name, share in shares.items()) + parts["discriminator"].item()
    assert float(value.detach()) == pytest.approx(shown, rel=1e-4), "the loss that is shown is the weighted sum"
    value.backward()
    assert loss.discriminator is not None and all(p.grad is not None for p in loss.discriminator.parameters())
    return torch.cat([p.grad.flatten() for p in istft.parameters() if p.grad is not None])


def test_balanced_weights_are_shares() -> None:
    """Ten times the weights (all but feature matching's) change shares a little and the gradient's length not at all."""
    free = [gradients(False, scale).norm() for scale in (1.0, 100.0)]
    balanced = [gradients(True, scale).norm() for scale in (1.0, 100.0)]
    assert float(free[1] / free[0]) > 20
    assert 0.5 < float(balanced[1] / balanced[0]) < 2
