"""`anygen evaluate` for sound tokenizers: figures whose value is known, and the whole road on a tiny run."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from anygen.cli import app
from anygen.data.records import Record, Utterance, write_shard
from anygen.data.source import flac_of
from anygen.errors import DataError, MissingDependency
from anygen.evaluation.sounds import evaluate_sounds, si_sdr
from anygen.evaluation.tokenizers import kind_of
from tokenizers_mm.audio import AudioTokenizer
from tokenizers_mm.codes import Codes
from tokenizers_mm.media import Audio

pytest.importorskip("pystoi", reason="the extra [eval] is not installed")

RATE_HZ = 8000


def voice(seed: int, seconds: float = 1.0) -> Audio:
    """Syllables: a buzz that is switched on and off."""
    random = np.random.default_rng(seed)
    time = np.arange(int(seconds * RATE_HZ)) / RATE_HZ
    phase = 2 * np.pi * np.cumsum(120 + 60 * np.sin(2 * np.pi * random.uniform(1, 3) * time)) / RATE_HZ
    waves = sum(np.sin(k * phase) / k for k in range(1, 15))
    noise = 0.01 * random.normal(size=len(time))
    return Audio((0.1 * waves * (1 + np.sin(2 * np.pi * 4 * time)) + noise).astype(np.float32), RATE_HZ)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, audio_tokenizer: AudioTokenizer) -> Path:
    """A run with two held-out sounds, of which one is too short for STOI, and four of unheard voices: three of v, one of w."""
    root = tmp_path_factory.mktemp("run")
    (root / "data").mkdir()
    sounds = {"train": [1.0], "validation": [1.0], "test": [0.01], "unheard": [0.9, 1.0, 1.1, 1.0]}
    for number, (split, lengths) in enumerate(sounds.items()):
        spoken = [flac_of(voice(10 * number + i, length)) for i, length in enumerate(lengths)]
        records = [
            Record(f"r{i}", captions=("<b>x</b>",), utterances=(Utterance("<b>x</b>", "v" if i < 3 else "w", s),))
            for i, s in enumerate(spoken)
        ]
        write_shard(root / "data" / f"{split}-00000.tar", [*records, Record("silent", captions=("none",))])
    audio_tokenizer.save(root / "audio_tokenizer" / "tokenizer")
    return root


class Perfect:
    """Gives back what it was given; its codes are places in a list."""

    codebook_size, num_codebooks, rate_hz, sample_rate_hz = 8, 1, 50.0, RATE_HZ

    def __init__(self, tokenizer: AudioTokenizer) -> None:
        self.device = tokenizer.device
        self.sounds: list[Audio] = []

    def encode(self, audio: Audio) -> Codes:
        self.sounds.append(audio)
        return Codes(np.array([[len(self.sounds) % 8] * 10]), "audio", num_samples=len(audio.samples_T), scales=(0.5,))

    def decode(self, codes: Codes) -> Audio:
        assert codes.num_samples and codes.scales == (0.5,), "what is not coded comes along"
        matching = [n for n in range(len(self.sounds)) if (n + 1) % 8 == codes.codes_KT[0, 0]]
        return self.sounds[matching[0]]


def test_known_figures(run: Path, audio_tokenizer: AudioTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    perfect = Perfect(audio_tokenizer)
    monkeypatch.setattr("anygen.evaluation.sounds._speed", lambda *_: iter(()))
    (run / "data" / "test-00000.tar").rename(run / "test")
    try:
        found = evaluate_sounds(perfect, run / "data")  # type: ignore[arg-type]
    finally:
        (run / "test").rename(run / "data" / "test-00000.tar")
    figures = {(figure.name, figure.group): figure.value for figure in found.figures}
    for group in ("held out", "unheard: v"):
        assert figures["STOI", group] == pytest.approx(1.0, abs=1e-6)
        assert figures["ESTOI", group] == pytest.approx(1.0, abs=1e-6)
        assert figures["mel distance", group] == 0
    assert figures["codes used", "unheard: v"] == 3 / 8 and figures["codes used", "held out"] == 1 / 8
    assert figures["perplexity / codebook size", "unheard: v"] == pytest.approx(3 / 8)
    assert figures["codes per second", "1 of 1 codebooks"] == 50
    assert figures["bits per second", "1 of 1 codebooks"] == 150


def test_si_sdr_knows_no_scale_and_no_phase_by_heart() -> None:
    random = np.random.default_rng(0)
    tone = np.sin(np.arange(8000) * 0.1)
    noise = random.normal(size=8000)
    noise -= noise @ tone / (tone @ tone) * tone
    noise *= np.linalg.norm(tone) / np.linalg.norm(noise)
    assert si_sdr(tone, 3 * tone + 0.3 * noise) == pytest.approx(20, abs=1e-6)
    assert si_sdr(tone, 0.1 * (tone + noise)) == pytest.approx(0, abs=1e-6)
    assert math.isnan(si_sdr(np.zeros(9), np.ones(9)))
    assert si_sdr(tone, 0 * tone) == -60 and si_sdr(tone, tone) == pytest.approx(60), (
        "silence is the worst answer, not none"
    )


def test_the_whole_road(run: Path, tmp_path: Path) -> None:
    folder = run / "audio_tokenizer" / "tokenizer"
    assert kind_of(folder) == "sound" and kind_of(run) is None
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["evaluate", str(folder), "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads((out / "report.json").read_text())
    assert json.loads(result.stdout) == report and report["sounds"] == {"held out": 2, "unheard: v": 3, "unheard: w": 1}
    figures = {(row["name"], row["group"]): row for row in report["figures"]}
    counted = figures["ESTOI", "held out"]["count"], figures["ESTOI", "unheard: v"]["count"]
    assert counted == (1, 3) and report["skipped"]["ESTOI of 1 sounds (held out)"] == "too short or too quiet for it"
    books, size = report["num_codebooks"], report["codebook_size"]
    assert books == 2 and ("ESTOI", "held out, first 1 of 2") in figures
    bits = figures["bits per second", "2 of 2 codebooks"]["value"]
    assert bits == pytest.approx(2 * report["frames_per_second"] * math.log2(size))
    page = (out / "index.html").read_text()
    assert "<b>x</b>" not in page and "&lt;b&gt;x" in page, "what data say is escaped"
    assert len(re.findall(r'src="data:audio/flac', page)) == 2 * (2 + 3 + 1 + 5), "both of each group, and the worst"
    assert not re.search(r'(src|href)="(?!data:)', page)
    text = CliRunner().invoke(app, ["evaluate", str(folder), "--out", str(out), "--limit", "1"])
    assert text.exit_code == 0 and "n=1" in text.output and str(out / "index.html") in text.output


def test_what_cannot_be_measured_is_told(
    run: Path, tmp_path: Path, audio_tokenizer: AudioTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(run / "audio_tokenizer" / "tokenizer")
    for options, match in (
        (["--teacher", "x"], "--teacher is for picture tokenizers"),
        (["--direction", "text>image"], "this is a sound tokenizer"),
        (["--best-of", "2"], "this is a sound tokenizer"),
        (["--data", str(tmp_path)], "no record shards"),
    ):
        result = CliRunner().invoke(app, ["evaluate", folder, "--out", str(tmp_path / "out"), *options])
        assert result.exit_code != 0 and match in str(result.exception or result.output)
    write_shard(tmp_path / "validation-00000.tar", [Record("silent", captions=("none",))])
    with pytest.raises(DataError, match="no sound is held out"):
        evaluate_sounds(audio_tokenizer, tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "pesq", None)
    found = evaluate_sounds(audio_tokenizer, run / "data", limit=1)
    assert "C compiler" in found.skipped["PESQ"] and not any(figure.name == "PESQ" for figure in found.figures)
    monkeypatch.setitem(__import__("sys").modules, "pystoi", None)
    with pytest.raises(MissingDependency, match=r"anygen\[eval\]"):
        evaluate_sounds(audio_tokenizer, run / "data")


def test_pesq_of_the_same_sound_is_its_best(run: Path, audio_tokenizer: AudioTokenizer) -> None:
    pytest.importorskip("pesq", reason="the extra [pesq] is not installed")
    from anygen.evaluation.sounds import SoundMeasures

    sounds = [voice(1), Audio(np.zeros(RATE_HZ, np.float32), RATE_HZ)]
    measures = SoundMeasures(RATE_HZ)
    values = measures.of("x", sounds, sounds)["PESQ"]
    assert values[0] > 4.5 and math.isnan(values[1])
    assert measures.of("x", sounds[:1], sounds[1:])["PESQ"][0] == 1.0, "silence is the worst answer"
    assert math.isnan(measures.of("x", sounds[1:], sounds[:1])["STOI"][0]), "nothing to be understood"
    noisy = Audio(sounds[0].samples_T + np.random.default_rng(0).normal(size=RATE_HZ).astype(np.float32) * 0.1, RATE_HZ)
    assert measures.of("x", sounds[:1], [noisy])["PESQ"][0] < 3


def test_voices_are_told_apart_by_what_records_say(
    run: Path, tmp_path: Path, audio_tokenizer: AudioTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by the order of a shard's members; many of them are one group."""
    spoken = {name: flac_of(voice(n, 0.5)) for n, name in enumerate("vw")}
    facts = {"captions": [], "utterances": [{"text": name, "voice": name} for name in "wv"]}
    with tarfile.open(tmp_path / "unheard-00000.tar", "w") as tar:
        files = {"a.json": json.dumps(facts).encode(), "a.v.flac": spoken["v"], "a.w.flac": spoken["w"]}
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    shutil.copy(run / "data" / "validation-00000.tar", tmp_path)
    found = evaluate_sounds(audio_tokenizer, tmp_path)
    assert {heard.voice: heard.group for heard in found.heard if heard.group != "held out"} == {
        "v": "unheard: v",
        "w": "unheard: w",
    }
    monkeypatch.setattr("anygen.evaluation.sounds.MAX_VOICES", 1)
    found = evaluate_sounds(audio_tokenizer, tmp_path)
    assert {heard.group for heard in found.heard} == {"held out", "unheard voices"}
