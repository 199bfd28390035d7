r"""Names of emoji in more voices, as a folder of sounds: 30 more speakers for a codec, or for the transformer to hear.

    apt-get install festival festvox-{italp16k,itapc16k,kdlpc16k,us-slt-hts,ru,suopuhe-lj,suopuhe-mv,ca-ona-hts} \
        festvox-czech-{dita,krb,machac,ph}
    apt-get install rhvoice rhvoice-english  # only for rhvoice/: Debian's non-free, its voices being trained networks;
                                             # RHVOICE_VOICES names their folder where it is not Debian's
    pip install ttspico
    python recipes/speech/voices/more_voices.py voices [--names 500] [--voices festival/ked_diphone pico/en-GB@75]

Twelve voices of festival and six of SVOX Pico, these at three pitches. Every voice reads names of the training split by
the rules of its own language: nobody has to understand them. Those of flite, espeak-ng and RHVoice can be had as well,
where they are asked for: flite/awb@80, espeak/en-us+m3, rhvoice/bdl@90-110-95 (throat, tempo, pitch in percent). What
lies there already is kept, so it can be interrupted. `metadata.jsonl` says what each voice of the last call reads, so a
folder source can take the folder. In place of names, each in one of its spoken phrasings, they can read all of these
(--say phrasings: with and without an article), questions about scenes, or the answers to these (--say questions).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import wave
from pathlib import Path

import soundfile

from anygen.data.emoji_names import spoken_forms
from anygen.data.emoji_pictures import EmojiFont
from anygen.data.scenes import NUMBER_WORDS, answers_about, is_countable, questions_about
from anygen.data.speech import HELD_OUT_VOICE, check_voices, speak, speaker_of
from anygen.errors import AnyGenError, DataError, InputError, MissingDependency
from tokenizers_mm.media import Audio

FESTIVAL = (
    "lp_diphone", "pc_diphone", "ked_diphone", "cmu_us_slt_arctic_hts", "msu_ru_nsh_clunits", "czech_dita", "czech_krb",
    "czech_machac", "czech_ph", "suo_fi_lj_diphone", "hy_fi_mv_diphone", "upc_ca_ona_hts",
)  # fmt: skip
PICO = tuple(
    f"{tongue}@{pitch}" for tongue in ("en-US", "en-GB", "de-DE", "es-ES", "fr-FR", "it-IT") for pitch in (75, 100, 130)
)
RHVOICE_FOLDER = Path(os.environ.get("RHVOICE_VOICES", "/usr/share/RHVoice/voices"))
RHVOICE = ("alan", "bdl", "clb", "slt")  # LGPL; the other English ones allow no derivatives
VOICES = (*(f"festival/{name}" for name in FESTIVAL), *(f"pico/{name}" for name in PICO))
_PICO_HZ = 16_000


def read_by_festival(voice: str, wanted: dict[Path, str]) -> str:
    """Write every sound in one process, which loads its voice once; returns what it complained about."""
    lines = [f"(voice_{voice})"]
    for path, text in wanted.items():
        words = "".join(c for c in text if c.isalnum() or c == " ")
        save = f'(utt.save.wave (utt.synth (Utterance Text "{words}")) "{path}" \'riff)'
        lines.append(f"(unwind-protect {save} nil)")  # a word that the voice cannot read costs one sound
    with tempfile.NamedTemporaryFile("w", suffix=".scm") as commands:
        commands.write("\n".join(lines))
        commands.flush()
        done = subprocess.run(["festival", "-b", commands.name], capture_output=True, text=True)  # noqa: S603, S607
    return done.stderr.strip()[-200:]


def read_by_pico(voice: str, wanted: dict[Path, str]) -> str:
    """Write every sound; returns nothing."""
    import ttspico

    tongue, _, pitch = voice.partition("@")
    engine = ttspico.TtsEngine(tongue)
    engine.pitch = int(pitch)
    for path, text in wanted.items():
        with wave.open(str(path), "wb") as file:
            file.setparams((1, 2, _PICO_HZ, 0, "NONE", ""))
            file.writeframes(engine.speak(text))
    return ""


def read_by_rhvoice(voice: str, wanted: dict[Path, str]) -> str:
    """Write every sound; returns what could not be spoken.

    Raises:
        MissingDependency: the voice is not installed.
    """
    speaker, throat, tempo, pitch = rhvoice_manner(voice)
    if not (folder := RHVOICE_FOLDER / speaker).is_dir():  # it would speak with another voice, and say nothing
        raise MissingDependency(f"RHVoice's voice is not in {folder}")
    command = ["RHVoice-test", "-p", speaker, "-r", f"{100 * tempo / throat:.0f}", "-t", f"{100 * pitch / throat:.0f}"]
    told = ""
    for path, text in wanted.items():
        with tempfile.NamedTemporaryFile(suffix=".wav") as sound:
            done = subprocess.run([*command, "-o", sound.name], input=text, capture_output=True, text=True)  # noqa: S603
            if done.returncode or not Path(sound.name).stat().st_size:
                told = done.stderr.strip()[-200:] or f"it said nothing for {text!r}, exit code {done.returncode}"
                continue
            samples_T, rate_hz = soundfile.read(sound.name, dtype="float32")
        audio = Audio(samples_T, round(rate_hz * throat)).resampled(rate_hz)
        soundfile.write(path, audio.samples_T, rate_hz)
    return told


def rhvoice_manner(voice: str) -> tuple[str, float, float, float]:
    """The speaker, and its throat, tempo and pitch, 1 as the speaker's own.

    >>> rhvoice_manner("bdl@90-110-95")
    ('bdl', 0.9, 1.1, 0.95)

    Raises:
        InputError: no voice like this, or a manner that RHVoice does not reach.
    """
    found = re.fullmatch(r"(\w+)(?:@(\d+)-(\d+)-(\d+))?", voice)
    throat, tempo, pitch = (int(part or 100) / 100 for part in found.groups()[1:]) if found else (0, 0, 0)
    is_reached = bool(throat) and all(0.5 <= part <= 2 for part in (throat, tempo / throat, pitch / throat))
    if not found or found[1] not in RHVOICE or not is_reached:
        raise InputError(
            f"RHVoice has no voice {voice!r}: expected one of {', '.join(RHVOICE)}, and behind an @, if wanted, its "
            "throat, tempo and pitch in percent (bdl@90-110-95): the first from 50 to 200, the others from half to "
            "twice the first"
        )
    return found[1], throat, tempo, pitch


def read_by_flite_or_espeak(voice: str, wanted: dict[Path, str]) -> str:
    """Write every sound; returns what could not be spoken."""
    told = ""
    for path, text in wanted.items():
        try:
            audio = speak(text, voice)
        except DataError as error:
            told = str(error)
            continue
        soundfile.write(path, audio.samples_T, audio.rate_hz)
    return told


def read(voice: str, wanted: dict[Path, str]) -> str:
    """Let the engine of `voice` write the texts to their paths; returns what it complained about."""
    engine, _, name = voice.partition("/")
    if engine == "festival":
        return read_by_festival(name, wanted)
    if engine == "pico":
        return read_by_pico(name, wanted)
    if engine == "rhvoice":
        return read_by_rhvoice(name, wanted)
    return read_by_flite_or_espeak(spoken_name(voice), wanted)


def spoken_name(voice: str) -> str:
    """What `anygen.data.speech` calls a voice of flite or espeak-ng."""
    engine, _, name = voice.partition("/")
    return name if engine == "flite" else f"espeak:{name}"


def known_voice(voice: str) -> str:
    """`voice`, where it is one that training may hear; for argparse."""
    if voice in VOICES:
        return voice
    if not voice.startswith(("flite/", "espeak/", "rhvoice/")):
        raise argparse.ArgumentTypeError(
            f"{voice!r} is none of {', '.join(VOICES)}, flite/VOICE, espeak/VOICE or rhvoice/VOICE"
        )
    if speaker_of(spoken_name(voice)) == HELD_OUT_VOICE:
        raise argparse.ArgumentTypeError(f"{voice!r} is held out: figures of unheard voices are measured with it")
    try:
        if voice.startswith("rhvoice/"):
            rhvoice_manner(voice.removeprefix("rhvoice/"))
        else:
            check_voices((spoken_name(voice),))
    except AnyGenError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return voice


def sayings_of(what: str) -> list[tuple[str, ...]]:
    """Everything that can be read, each in one wording or several."""
    emoji = [e for e in EmojiFont().catalogue() if e.split == "train"]
    if what == "names":
        return [tuple(spoken_forms(e.parts)) for e in emoji]
    if what == "phrasings":
        return [(form,) for e in emoji for form in spoken_forms(e.parts)]
    about = {"questions": questions_about, "answers": answers_about}[what]
    said = [text for e in emoji if is_countable(e) for text in about(e.parts.subject)]
    return [(text,) for text in (*said, *(NUMBER_WORDS[1:] if what == "answers" else ()))]


def main() -> None:
    """Write OUT/ENGINE/VOICE/0000.wav and so on, and OUT/metadata.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--names", type=int, default=500, help="how many each voice reads, of whatever it reads")
    parser.add_argument("--say", choices=("names", "phrasings", "questions", "answers"), default="names")
    parser.add_argument("--voices", nargs="+", default=VOICES, type=known_voice, metavar="VOICE")
    options = parser.parse_args()
    sayings = sayings_of(options.say)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    says = out / ".says"  # a sound that lies there is taken for what would be read now
    before = says.read_text() if says.exists() else "names" if (out / "metadata.jsonl").exists() else options.say
    if before != options.say:
        sys.exit(f"the voices in {options.out} read {before}: take another folder for {options.say}")
    says.write_text(options.say)
    rows = []
    for voice in options.voices:
        # All are shuffled, so that more names go on from fewer: what lies there stays what the metadata says.
        forms = random.Random(voice.partition("/")[2]).sample(sayings, len(sayings))[: options.names]
        folder = out / voice
        folder.mkdir(parents=True, exist_ok=True)
        texts = {folder / f"{number:04d}.wav": said[number % len(said)] for number, said in enumerate(forms)}
        try:
            told = read(voice, {path: text for path, text in texts.items() if not path.exists()})
        except (ImportError, FileNotFoundError, AnyGenError) as error:
            sys.exit(
                f"{voice} cannot be read here ({error}): install what the head of this file names, or leave it out"
            )
        rows += [
            {"file_name": str(path.relative_to(out)), "text": text, "speaker": voice}
            for path, text in texts.items()
            if path.exists()
        ]
        print(f"{voice}: {sum(path.exists() for path in texts)} of {len(texts)}", told, flush=True)
    (out / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
