"""The emoji world: split by rule, captions, scenes with exact truth. Drawing and speech need system packages."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from anygen.data.emoji_names import TONE, captions, parse_name, split, spoken_forms
from anygen.data.emoji_pictures import FONT_PATHS, EmojiFont, on_white
from anygen.data.scenes import THINGS, is_countable, make_scene
from anygen.data.sources import EmojiSource
from anygen.data.speech import RATE_HZ, check_voices, speak, trimmed
from anygen.errors import AnyGenError, ConfigError, DataError, MissingDependency
from tokenizers_mm.media import Audio

needs_font = pytest.mark.skipif(
    not any(path.is_file() for path in FONT_PATHS), reason="needs the Debian package fonts-noto-color-emoji"
)
needs_flite = pytest.mark.skipif(shutil.which("flite") is None, reason="needs the Debian package flite")
needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs the Debian package espeak-ng")


def test_split_is_the_rule_of_the_project() -> None:
    rule = re.compile(r"_(light|medium-light|medium|medium-dark|dark)_skin_tone")
    assert TONE.pattern == rule.pattern
    for name in ("cat", "waving_hand_dark_skin_tone", "woman_health_worker_medium-dark_skin_tone"):
        tones = rule.findall(name)
        expected = "train"
        if len(tones) == 1:
            digest = hashlib.sha256(f"{rule.sub('', name)}|{tones[0]}".encode()).hexdigest()
            expected = {0: "test", 1: "validation"}.get(int(digest, 16) % 10, "train")
        assert split(name) == expected
    assert split("woman_health_worker_medium-dark_skin_tone") == "test"


@pytest.mark.parametrize(
    ("name", "plain", "phrase"),
    [
        ("owl", "owl", "an owl"),
        ("grapes", "grapes", "grapes"),
        ("man_dark_skin_tone_bald", "man, bald, dark skin tone", "a man with no hair and dark skin tone"),
        ("woman_with_veil_light_skin_tone", "woman with veil, light skin tone",
         "a woman with veil and light skin tone"),
        ("family_man_woman_boy", "family of a man, a woman and a boy", "a family of a man, a woman and a boy"),
        ("rescue_worker\u2019s_helmet", "rescue worker's helmet", "a rescue worker's helmet"),
        ("person_lifting_weights", "person lifting weights", "a person lifting weights"),
    ],
)  # fmt: skip
def test_names_become_plain_english(name: str, plain: str, phrase: str) -> None:
    parts = parse_name(name)
    assert (parts.plain, parts.phrase) == (plain, phrase)
    assert plain in captions(parts) and set(spoken_forms(parts)) <= set(captions(parts))


@needs_font
def test_the_font_has_about_3800_emoji_and_draws_them_deterministically() -> None:
    font = EmojiFont()
    catalogue = font.catalogue()
    assert len(catalogue) > 3500
    assert len({emoji.key for emoji in catalogue}) == len(catalogue)
    splits = [emoji.split for emoji in catalogue]
    assert 100 < splits.count("test") < 300 and 100 < splits.count("validation") < 300
    one, two = (on_white(EmojiFont().draw("\U0001f34e", 64)) for _ in range(2))
    assert one.tobytes() == two.tobytes() and one.size == (64, 64)
    pixels = np.asarray(one).reshape(-1, 3).astype(int)
    assert ((pixels[:, 0] - pixels[:, 2]) > 80).mean() > 0.2, "a red apple is red"
    plain = captions(catalogue[0].parts)
    assert all(caption.strip() == caption and caption for caption in plain)


@needs_font
def test_a_caption_belongs_to_one_emoji() -> None:
    owners: dict[str, set[str]] = {}
    for emoji in EmojiFont().catalogue():
        for caption in captions(emoji.parts):
            owners.setdefault(caption, set()).add(emoji.name)
    assert not {caption: names for caption, names in owners.items() if len(names) > 1}


def test_a_missing_font_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anygen.data.emoji_pictures.FONT_PATHS", ())
    with pytest.raises(MissingDependency, match="fonts-noto-color-emoji"):
        EmojiFont()


@needs_font
def test_scenes_are_what_they_say() -> None:
    font = EmojiFont()
    things = [emoji for emoji in font.catalogue() if is_countable(emoji)]
    assert len(things) == len(THINGS), sorted(THINGS - {emoji.name for emoji in things})
    of_emoji = {emoji.parts.subject: set(captions(emoji.parts)) for emoji in things}
    counts = {"one": 1, "two": 2, "three": 3, "four": 4}
    for seed in range(60):
        scene = make_scene(things, font, side_px=64, generator=np.random.default_rng(seed))
        again = make_scene(things, font, side_px=64, generator=np.random.default_rng(seed))
        assert scene.picture.tobytes() == again.picture.tobytes() and scene.captions == again.captions
        assert 1 <= len(scene.objects) <= 4
        pixels = np.asarray(scene.picture)
        for placed in scene.objects:
            x0, y0, x1, y1 = (round(value * 64) for value in placed.box.values)
            assert (pixels[y0:y1, x0:x1] < 250).any(), "there is something in every box"
        outside = np.ones((64, 64), bool)
        for placed in scene.objects:
            x0, y0, x1, y1 = (round(value * 64) for value in placed.box.values)
            outside[y0:y1, x0:x1] = False
        assert (pixels[outside] > 250).all(), "and nothing outside the boxes"
        names = [placed.name for placed in scene.objects]
        for (question, answer), name in zip(scene.questions, dict.fromkeys(names), strict=False):
            assert question.startswith("how many") and counts[answer] == names.count(name)
        if len(names) == 1:
            assert f"one {names[0]}" in scene.captions
            assert not set(scene.captions) & of_emoji[names[0]], (
                "the emoji alone is drawn larger: no caption is of both"
            )
        kinds = list(dict.fromkeys(names))
        if len(kinds) == 2:
            first = [p.box.values for p in scene.objects if p.name == kinds[0]]
            second = [p.box.values for p in scene.objects if p.name == kinds[1]]
            axis = 0 if " left of " in scene.captions[0] else 1
            assert max(b[axis + 2] for b in first) <= min(b[axis] for b in second)


@needs_flite
def test_flite_speaks_deterministically_at_16_khz() -> None:
    one, two = speak("a red apple", "slt"), speak("a red apple", "slt")
    assert one.rate_hz == RATE_HZ and 0.4 < one.duration_s < 2.0
    assert np.array_equal(one.samples_T, two.samples_T)
    assert np.abs(one.samples_T).max() == pytest.approx(0.7, abs=1e-3)
    assert not np.array_equal(one.samples_T, speak("a red apple", "awb").samples_T)
    assert speak("-h --help; $(rm -rf /)", "kal").duration_s > 0.1, "text is never an option or a command"


def test_a_voice_is_not_reached_by_ctrl_c_and_one_that_is_killed_is_no_bad_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    program = tmp_path / "flite"
    # Its whole process group, so without a session of its own this test too. TERM: a background job ignores INT.
    program.write_text("#!/bin/sh\nkill -TERM 0\n")
    program.chmod(0o755)
    with pytest.raises(AnyGenError, match="killed by signal 15") as raised:
        speak("a red apple", "slt")
    assert not isinstance(raised.value, DataError), "a record must not be left out for it"
    program.write_text("#!/bin/sh\necho no such word >&2\nexit 3\n")
    with pytest.raises(DataError, match="'slt' could not speak 'a red apple': no such word"):
        speak("a red apple", "slt")


@needs_espeak
def test_espeak_voices() -> None:
    assert 0.3 < speak("a red apple", "espeak:en-us+f3").duration_s < 3.0


@needs_flite
def test_a_voice_may_speak_deeper_and_slower() -> None:
    plain, deeper = speak("a red apple", "slt"), speak("a red apple", "slt@80")
    assert deeper.duration_s == pytest.approx(plain.duration_s / 0.8, rel=0.05)
    assert middle_hz(deeper) == pytest.approx(0.8 * middle_hz(plain), rel=0.1)


def middle_hz(audio: Audio) -> float:
    """Of the spectrum: below it lies half of its magnitude."""
    magnitudes = np.abs(np.fft.rfft(audio.samples_T)).cumsum()
    return float(np.searchsorted(magnitudes, magnitudes[-1] / 2) / audio.duration_s)


def pitch_hz(audio: Audio) -> float:
    """The median over frames in which the wave repeats itself: where its autocorrelation is highest."""
    found = []
    for start in range(0, len(audio.samples_T) - 1024, 256):
        frame = audio.samples_T[start : start + 1024] * np.hanning(1024)
        repeats = np.fft.irfft(np.abs(np.fft.rfft(frame, 4096)) ** 2)
        lag = 40 + int(np.argmax(repeats[40:266]))  # 400 to 60 Hz
        if repeats[lag] > 0.4 * repeats[0] and np.abs(frame).max() > 0.05:
            found.append(audio.rate_hz / lag)
    return float(np.median(found))


@needs_flite
@pytest.mark.parametrize("voice", ["slt", "awb", "kal16"])
def test_throat_tempo_and_pitch_of_a_voice_are_set_apart(voice: str) -> None:
    words = "a man swimming with medium skin tone"
    plain, like, faster = (speak(words, f"{voice}{how}") for how in ("", "@100-100-125Hz", "@100-125-125Hz"))
    other = speak(words, f"{voice}@84-100-95Hz")
    assert [a.duration_s for a in (like, other)] == pytest.approx([plain.duration_s] * 2, rel=0.08)  # silences differ
    assert faster.duration_s == pytest.approx(like.duration_s / 1.25, rel=0.05)
    assert [pitch_hz(audio) for audio in (like, faster, other)] == pytest.approx([125, 125, 95], rel=0.12)
    assert middle_hz(other) < 0.93 * middle_hz(like)


@pytest.mark.parametrize("voice", ["rms@90", "rms@90-100-110Hz"])
def test_a_held_out_voice_is_refused_at_any_speed(voice: str) -> None:
    with pytest.raises(ConfigError, match=rf"'{voice}' is held out"):
        EmojiSource(voices=("slt", voice)).open()


def test_voices_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    for voice in (
        "alice",
        "../slt",
        "espeak:en us",
        "espeak:",
        "SLT",
        "slt@",
        "slt@0.9",
        "slt@20",
        "slt@300",
        "slt@-1",
        "slt@90-100",
        "slt@90-100-110",
        "slt@20-100-110Hz",
        "slt@90-300-110Hz",
        "slt@90-100-20Hz",
        "espeak:en-us@90-100-110Hz",
    ):
        with pytest.raises(DataError):
            check_voices((voice,))
        with pytest.raises(DataError):
            EmojiSource(voices=(voice,)).open()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(MissingDependency, match="apt-get install flite"):
        check_voices(("slt",))


def test_silence_is_trimmed() -> None:
    sound = np.zeros(16_000, np.float32)
    sound[5000:9000] = 0.5
    assert len(trimmed(sound)) == 4000 + 2 * 480
    assert len(trimmed(np.zeros(100, np.float32))) == 100


@needs_font
@needs_flite
def test_the_emoji_source_keeps_voices_and_splits_apart() -> None:
    source = EmojiSource(voices=("slt",), unheard_voices=("rms",), num_scenes=40, max_emoji=200).open()
    items = source.items()
    assert len(items["unheard"]) == 200 and len(items["train"]) > 150
    record = source.record(items["train"][0])
    assert [u.voice for u in record.utterances] == ["slt"] and record.utterances[0].text in record.captions
    assert [u.voice for u in source.record(items["unheard"][0]).utterances] == ["rms"]
    scene = source.record(items["test"][-1])
    assert scene.kind == "scene" and scene.objects and scene.picture == source.record(items["test"][-1]).picture
