"""Synthetic speech: text spoken by flite and espeak-ng voices, as 16 kHz mono sound.

Both are system programs (Debian: apt-get install flite espeak-ng), used to make data only. Their output is
deterministic.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from anygen.errors import AnyGenError, DataError, MissingDependency
from tokenizers_mm.media import Audio, FloatArray, load_sound

RATE_HZ = 16_000
FLITE_VOICES = ("awb", "kal", "kal16", "rms", "slt")
HELD_OUT_VOICE = "rms"
"""Never in training, in any recipe of ours."""
_STRETCH = {"kal": 1.1, "kal16": 1.1}
"""How much slower than its durations flite lets a voice speak, where it does."""
_TIMEOUT_S = 60
_VOICE = re.compile(r"([a-z0-9]+|espeak:[a-zA-Z0-9+-]+)(@[0-9]+(-[0-9]+-[0-9]+Hz)?)?")


def check_voices(voices: tuple[str, ...]) -> None:
    """Refuse voices that cannot be spoken here.

    A voice is a flite voice (`slt`) or an espeak-ng voice, with a variant if wanted (`espeak:en-us+f3`). Behind an `@`
    stands how high and fast it speaks in percent (`slt@90`, 50 to 200): more voices than there are (speed perturbation,
    Ko et al. 2015). A flite voice takes three apart, the resonances of its throat and its tempo in percent and the
    pitch in Hz that it speaks at in the mean: `slt@86-100-110Hz` is a woman's voice as a man might speak.

    Raises:
        MissingDependency: the program behind a voice is not installed.
        DataError: not a voice name.
    """
    for voice in voices:
        if not _VOICE.fullmatch(voice):
            raise DataError(
                f"{voice!r} is not a voice; write a flite voice (slt) or espeak:LANGUAGE+VARIANT (espeak:en-us+f3), "
                "and behind it how high and fast in percent, if wanted (slt@90), or of flite's throat, tempo and pitch "
                "apart (slt@86-100-110Hz)"
            )
        speaker, manner = speaker_of(voice), Manner.of(voice)
        if not 0.5 <= manner.height <= 2 or not 0.5 <= manner.tempo <= 2:
            raise DataError(f"voice {voice!r}: height and tempo must be 50 to 200 percent")
        if manner.pitch_hz is not None and (voice.startswith("espeak:") or not 50 <= manner.pitch_hz <= 400):
            raise DataError(f"voice {voice!r}: only flite's voices take a pitch, of 50 to 400 Hz")
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


@dataclass(frozen=True)
class Manner:
    """How a voice speaks, beside what its speaker does.

    Attributes:
        height: of all its frequencies, resonances included, 1 as its speaker.
        tempo: 1 as its speaker.
        pitch_hz: the mean pitch that is heard; None as its speaker, times `height`.

    >>> Manner.of("slt@90"), Manner.of("slt@86-100-110Hz")
    (Manner(height=0.9, tempo=0.9, pitch_hz=None), Manner(height=0.86, tempo=1.0, pitch_hz=110))
    """

    height: float = 1.0
    tempo: float = 1.0
    pitch_hz: int | None = None

    @classmethod
    def of(cls, voice: str) -> Manner:
        """What stands behind the `@` of a voice."""
        height, *rest = re.findall(r"\d+", voice.partition("@")[2]) or ["100"]
        if not rest:
            return cls(int(height) / 100, int(height) / 100)
        return cls(int(height) / 100, int(rest[0]) / 100, int(rest[1]))

    def of_flite(self, speaker: str) -> list[str]:
        """Options that make flite speak so, once its sound is played `height` times as fast."""
        if self.pitch_hz is None:
            return []
        settings = {
            "duration_stretch": f"{_STRETCH.get(speaker, 1.0) * self.height / self.tempo:.3f}",
            "int_f0_target_mean": f"{self.pitch_hz / self.height:.1f}",
        }
        return [part for name, value in settings.items() for part in ("--setf", f"{name}={value}")]


def speak(text: str, voice: str) -> Audio:
    """`text` spoken by `voice`, silence at both ends trimmed to 30 ms, peak at 0.7.

    Raises:
        DataError: the program cannot speak this text.
        AnyGenError: the program was stopped, which says nothing about the text.
    """
    speaker, manner = speaker_of(voice), Manner.of(voice)
    with tempfile.TemporaryDirectory() as folder:
        words, sound = Path(folder, "words.txt"), Path(folder, "sound.wav")
        words.write_text(text, encoding="utf-8")
        if speaker.startswith("espeak:"):
            command = ["espeak-ng", "-v", speaker.removeprefix("espeak:"), "-f", str(words), "-w", str(sound)]
        else:
            command = ["flite", "-voice", speaker, *manner.of_flite(speaker), "-f", str(words), "-o", str(sound)]
        fault = _fault_of(command)
        if fault is not None:
            raise DataError(f"voice {voice!r} could not speak {text!r}: {fault}")
        try:
            audio = load_sound(sound, rate_hz=RATE_HZ)
        except ValueError as error:
            raise DataError(f"voice {voice!r} could not speak {text!r}: {error}") from error
    samples_T = trimmed(Audio(audio.samples_T, round(RATE_HZ * manner.height)).resampled(RATE_HZ).samples_T)
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
