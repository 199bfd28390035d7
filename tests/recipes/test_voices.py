"""The script of `recipes/speech/voices`: more voices for a codec."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from anygen.data.emoji_names import spoken_forms
from anygen.data.emoji_pictures import FONT_PATHS, EmojiFont
from anygen.data.scenes import NUMBER_WORDS, answers_about, is_countable, make_scene, questions_about
from anygen.data.speech import speak

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "recipes" / "speech" / "voices" / "more_voices.py"
pytestmark = pytest.mark.skipif(
    not any(p.is_file() for p in FONT_PATHS), reason="the emoji world needs the Debian package fonts-noto-color-emoji"
)


def run(
    out: Path, *voices: str, path: str | None = None, names: int = 2, say: str = "names", **more: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), str(out), "--names", str(names), "--say", say, "--voices", *voices]
    env = {"PATH": path if path is not None else "/usr/bin:/bin", "PYTHONPATH": str(ROOT), **more}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)


def test_every_voice_gets_its_folder_and_what_is_there_stays(tmp_path: Path) -> None:
    pytest.importorskip("ttspico", reason="the package ttspico is not there")
    done = run(tmp_path, "pico/en-GB@75", "pico/de-DE@130")
    assert done.returncode == 0, done.stderr
    low, high = (sorted((tmp_path / voice).iterdir()) for voice in ("pico/en-GB@75", "pico/de-DE@130"))
    assert [p.name for p in low] == [p.name for p in high] == ["0000.wav", "0001.wav"]
    sound, rate_hz = soundfile.read(low[0])
    assert rate_hz == 16_000 and len(sound) > 4_000 and np.abs(sound).max() > 0.05
    low[0].write_bytes(b"mine")
    low[1].unlink()
    assert run(tmp_path, "pico/en-GB@75").returncode == 0
    assert low[0].read_bytes() == b"mine" and low[1].is_file()


@pytest.mark.skipif(not shutil.which("flite") or not shutil.which("espeak-ng"), reason="needs flite and espeak-ng")
def test_the_metadata_names_what_each_sound_says(tmp_path: Path) -> None:
    assert run(tmp_path, "flite/slt@90", names=1).returncode == 0
    before = (tmp_path / "flite" / "slt@90" / "0000.wav").read_bytes()
    done = run(tmp_path, "flite/slt@90", "espeak/en-us+m3", names=3)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert [row["speaker"] for row in rows] == ["flite/slt@90"] * 3 + ["espeak/en-us+m3"] * 3
    for row in rows:
        voice = row["speaker"].removeprefix("flite/").replace("espeak/", "espeak:")
        sound, _ = soundfile.read(tmp_path / row["file_name"], dtype="float32")
        assert np.allclose(sound, speak(row["text"], voice).samples_T, atol=1e-3)
    assert (tmp_path / rows[0]["file_name"]).read_bytes() == before, "more names go on from fewer"


def test_all_spoken_phrasings_of_a_name_are_read_and_of_held_out_names_none(tmp_path: Path) -> None:
    script = f"import json, sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import more_voices\n"
    script += "print(json.dumps([more_voices.sayings_of(say) for say in ('names', 'phrasings')]))"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=60)
    names, phrasings = json.loads(done.stdout)
    catalogue = EmojiFont().catalogue()
    held_out = {form for e in catalogue if e.split != "train" for form in spoken_forms(e.parts)}
    assert ["a man kneeling facing right with dark skin tone"] in phrasings and ["love hotel"] in phrasings
    assert sorted(phrasings) == sorted([form] for name in names for form in name) and len(phrasings) > 1.9 * len(names)
    assert len(names) == sum(e.split == "train" for e in catalogue) and len(held_out) > 500
    assert not held_out & {form for (form,) in phrasings}


@pytest.mark.skipif(not shutil.which("flite"), reason="needs flite")
@pytest.mark.parametrize("say", ["questions", "answers"])
def test_voices_read_what_is_asked_and_answered_about_scenes(tmp_path: Path, say: str) -> None:
    font, asked = EmojiFont(), set()
    things = [emoji for emoji in font.catalogue() if is_countable(emoji)]
    for number in range(300):
        for pair in make_scene(things, font, side_px=32, generator=np.random.default_rng(number)).questions:
            asked.add(pair[say == "answers"])
    done = run(tmp_path, "flite/slt@90-100-120Hz", names=12, say=say)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert len({row["text"] for row in rows}) == len(rows) == 12
    about = {"questions": questions_about, "answers": answers_about}[say]
    known = {text for emoji in things for text in about(emoji.parts.subject)} | set(NUMBER_WORDS[1:])
    assert {row["text"] for row in rows} <= known and asked <= known and len(asked) > 100
    before = (tmp_path / "metadata.jsonl").read_bytes()
    other = run(tmp_path, "flite/slt@90-100-120Hz", names=3)
    assert other.returncode == 1 and f"read {say}: take another folder for names" in other.stderr
    assert (tmp_path / "metadata.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("voice", "message"),
    [
        ("pico/en-AU", "'pico/en-AU' is none of festival/lp_diphone"),
        ("flite/nobody", "flite has no voice 'nobody'"),
        ("flite/rms@90", "'flite/rms@90' is held out"),
        ("rhvoice/evgeniy-eng", "RHVoice has no voice 'evgeniy-eng'"),
        ("rhvoice/bdl@90", "RHVoice has no voice 'bdl@90'"),
        ("rhvoice/bdl@20-30-30", "throat, tempo and pitch in percent"),
        ("rhvoice/bdl@60-150-100", "from half to twice the first"),
    ],
)
def test_what_is_no_voice_for_training_is_refused(voice: str, message: str, tmp_path: Path) -> None:
    done = run(tmp_path, voice)
    assert done.returncode == 2 and message in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.skipif(not shutil.which("RHVoice-test"), reason="needs rhvoice and rhvoice-english (Debian's non-free)")
def test_rhvoice_speaks_in_every_manner(tmp_path: Path) -> None:
    voices = ("bdl", "bdl@80-100-100", "bdl@100-150-100", "bdl@100-100-150", "clb")
    script = f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); from pathlib import Path; import more_voices\n"
    script += f"for voice in {voices}:\n"
    script += (
        f"    assert not more_voices.read_by_rhvoice(voice, {{Path({str(tmp_path)!r}, voice + '.wav'): 'a red apple'}})"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    plain, throat, tempo, pitch, other = (soundfile.read(tmp_path / f"{voice}.wav")[0] for voice in voices)
    assert len(tempo) == pytest.approx(len(plain) / 1.5, rel=0.1)
    assert len(throat) == pytest.approx(len(plain), rel=0.1) and len(throat) != len(plain)
    assert len(pitch) == pytest.approx(len(plain), rel=0.1) and not np.array_equal(pitch[:9000], plain[:9000])
    assert len(other) != len(plain), "another speaker"


def test_a_throat_changes_resonances_and_leaves_tempo_and_pitch_to_the_engine(tmp_path: Path) -> None:
    program = tmp_path / "bin" / "RHVoice-test"  # an engine that says everything in 1 s of 240 Hz, the second name not
    program.parent.mkdir()
    program.write_text(
        f"#!{sys.executable}\n"
        "import sys, pathlib, numpy, soundfile\n"
        f"asked = pathlib.Path({str(tmp_path / 'asked')!r})\n"
        "assert sys.stdin.read()\n"
        "if not asked.exists():\n"
        "    soundfile.write(sys.argv[-1], numpy.sin(numpy.arange(24_000) * 2 * numpy.pi / 100) / 2, 24_000)\n"
        "asked.write_text(' '.join(sys.argv[1:-1]))\n"
    )
    program.chmod(0o755)
    (tmp_path / "clb").mkdir()
    done = run(tmp_path / "out", "rhvoice/clb@80-120-100", path=str(program.parent), RHVOICE_VOICES=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "1 of 2 it said nothing for" in done.stdout
    assert (tmp_path / "asked").read_text() == "-p clb -r 150 -t 125 -o"
    sound, rate_hz = soundfile.read(tmp_path / "out" / "rhvoice" / "clb@80-120-100" / "0000.wav")
    assert rate_hz == 24_000 and len(sound) == pytest.approx(30_000, abs=100)
    assert np.abs(np.fft.rfft(sound)).argmax() * rate_hz / len(sound) == pytest.approx(192, abs=2)
    done = run(tmp_path / "out", "rhvoice/bdl", path=str(program.parent), RHVOICE_VOICES=str(tmp_path))
    assert done.returncode == 1 and f"RHVoice's voice is not in {tmp_path / 'bdl'}" in done.stderr


@pytest.mark.parametrize("voice", ["festival/ked_diphone", "rhvoice/bdl"])
def test_a_missing_engine_is_told_in_a_sentence(voice: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = run(tmp_path / "out", voice, path=str(tmp_path / "empty"))
    assert done.returncode == 1 and "install what the head of this file names" in done.stderr
    assert "Traceback" not in done.stderr
