"""Synthetic speech: text spoken by flite and espeak-ng voices, as 16 kHz mono sound.

Both are system programs (Debian: apt-get install flite espeak-ng), used to make data only. Their output is
deterministic.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from anygen.errors import AnyGenError, DataError, MissingDependency
from tokenizers_mm.media import Audio, FloatArray, load_sound

RATE_HZ = 16_000
FLITE_VOICES = ("awb", "kal", "kal16", "rms", "slt")
HELD_OUT_VOICE = "rms"
"""Never in training, in any recipe of ours."""
_TIMEOUT_S = 60


def check_voices(voices: tuple[str, ...]) -> None:
    """Refuse voices that cannot be spoken here.

    A voice is a flite voice (`slt`) or an espeak-ng voice, with a variant if wanted (`espeak:en-us+f3`). Behind an `@`
    stands how high and fast it speaks in percent (`slt@90`, 50 to 200): more voices than there are (speed perturbation,
    Ko et al. 2015).

    Raises:
        MissingDependency: the program behind a voice is not installed.
        DataError: not a voice name.
    """
    for voice in voices:
        if not re.fullmatch(r"([a-z0-9]+|espeak:[a-zA-Z0-9+-]+)(@[0-9]+)?", voice):
            raise DataError(
                f"{voice!r} is not a voice; write a flite voice (slt) or espeak:LANGUAGE+VARIANT (espeak:en-us+f3), "
                "and behind it how high and fast in percent, if wanted (slt@90)"
            )
        speaker, speed = speaker_of(voice), speed_of(voice)
        if not 0.5 <= speed <= 2:
            raise DataError(f"voice {voice!r} speaks at {speed:.0%} of its height and speed; that must be 50 to 200")
        if not voice.startswith("espeak:") and speaker not in FLITE_VOICES:
            raise DataError(f"flite has no voice {speaker!r}; it has {', '.join(FLITE_VOICES)}")
        program = "espeak-ng" if voice.startswith("espeak:") else "flite"
        if shutil.which(program) is None:
            raise MissingDependency(f"voice {voice!r} needs {program} (Debian: apt-get install {program})")


def speaker_of(voice: str) -> str:
    """A voice without its speed.

    >>> speaker_of("espeak:en-us+f3@110")
    'espeak:en-us+f3'
    """
    return voice.partition("@")[0]


def speed_of(voice: str) -> float:
    """How high and fast a voice speaks.

    >>> speed_of("slt"), speed_of("slt@90")
    (1.0, 0.9)
    """
    return int(voice.partition("@")[2] or 100) / 100


def speak(text: str, voice: str) -> Audio:
    """`text` spoken by `voice`, silence at both ends trimmed to 30 ms, peak at 0.7.

    Raises:
        DataError: the program cannot speak this text.
        AnyGenError: the program was stopped, which says nothing about the text.
    """
    speaker = speaker_of(voice)
    with tempfile.TemporaryDirectory() as folder:
        words, sound = Path(folder, "words.txt"), Path(folder, "sound.wav")
        words.write_text(text, encoding="utf-8")
        if speaker.startswith("espeak:"):
            command = ["espeak-ng", "-v", speaker.removeprefix("espeak:"), "-f", str(words), "-w", str(sound)]
        else:
            command = ["flite", "-voice", speaker, "-f", str(words), "-o", str(sound)]
        fault = _fault_of(command)
        if fault is not None:
            raise DataError(f"voice {voice!r} could not speak {text!r}: {fault}")
        try:
            audio = load_sound(sound, rate_hz=RATE_HZ)
        except ValueError as error:
            raise DataError(f"voice {voice!r} could not speak {text!r}: {error}") from error
    samples_T = trimmed(Audio(audio.samples_T, round(RATE_HZ * speed_of(voice))).resampled(RATE_HZ).samples_T)
    return Audio(samples_T * np.float32(0.7 / max(float(np.abs(samples_T).max()), 1e-3)), RATE_HZ)


def trimmed(samples_T: FloatArray, *, margin_s: float = 0.03, floor_db: float = -45.0) -> FloatArray:
    """Without the silence at both ends, but for a margin; silence is below `floor_db` relative to the peak."""
    loud = np.flatnonzero(np.abs(samples_T) > np.abs(samples_T).max(initial=0.0) * 10 ** (floor_db / 20))
    if not len(loud):
        return samples_T
    margin = int(margin_s * RATE_HZ)
    return samples_T[max(0, loud[0] - margin) : loud[-1] + 1 + margin]


def _fault_of(command: list[str]) -> str | None:
    """What the program complains of, None where it did its work."""
    try:
        # In a session of its own: Ctrl-C is for us, and a voice that it killed would look like one that cannot speak.
        done = subprocess.run(command, capture_output=True, timeout=_TIMEOUT_S, start_new_session=True)  # noqa: S603  no shell, fixed programs
    except (OSError, subprocess.TimeoutExpired) as error:
        raise AnyGenError(f"{command[0]} did not run to its end: {error}") from error
    if done.returncode < 0:
        raise AnyGenError(f"{command[0]} was killed by signal {-done.returncode}: run the same command again")
    return done.stderr.decode(errors="replace").strip() or f"exit code {done.returncode}" if done.returncode else None
