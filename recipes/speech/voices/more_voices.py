r"""Names of emoji in 30 more voices, as a folder of sounds: more speakers for a codec.

    apt-get install festival festvox-{italp16k,itapc16k,kdlpc16k,us-slt-hts,ru,suopuhe-lj,suopuhe-mv,ca-ona-hts} \
        festvox-czech-{dita,krb,machac,ph}
    pip install ttspico
    python recipes/speech/voices/more_voices.py voices [--names 500] [--voices festival/ked_diphone pico/en-GB@75]

Twelve voices of festival and six of SVOX Pico, these at three pitches. Every voice reads names of the training split by
the rules of its own language: nobody has to understand them. What lies there already is kept, so it can be interrupted.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import wave
from pathlib import Path

from anygen.data.emoji_names import spoken_forms
from anygen.data.emoji_pictures import EmojiFont

FESTIVAL = (
    "lp_diphone", "pc_diphone", "ked_diphone", "cmu_us_slt_arctic_hts", "msu_ru_nsh_clunits", "czech_dita", "czech_krb",
    "czech_machac", "czech_ph", "suo_fi_lj_diphone", "hy_fi_mv_diphone", "upc_ca_ona_hts",
)  # fmt: skip
PICO = tuple(
    f"{tongue}@{pitch}" for tongue in ("en-US", "en-GB", "de-DE", "es-ES", "fr-FR", "it-IT") for pitch in (75, 100, 130)
)
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


def main() -> None:
    """Write OUT/ENGINE/VOICE/0000.wav and so on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--names", type=int, default=500)
    parser.add_argument("--voices", nargs="+", default=VOICES, choices=VOICES, metavar="VOICE")
    options = parser.parse_args()
    emoji = [e for e in EmojiFont().catalogue() if e.split == "train"]
    for voice in options.voices:
        engine, _, name = voice.partition("/")
        chosen = random.Random(name).sample(emoji, min(options.names, len(emoji)))
        folder = options.out.resolve() / voice
        folder.mkdir(parents=True, exist_ok=True)
        texts = {folder / f"{number:04d}.wav": spoken_forms(e.parts)[0] for number, e in enumerate(chosen)}
        wanted = {path: text for path, text in texts.items() if not path.exists()}
        try:
            told = (read_by_festival if engine == "festival" else read_by_pico)(name, wanted)
        except (ImportError, FileNotFoundError) as error:
            sys.exit(
                f"{voice} cannot be read here ({error}): install what the head of this file names, or leave it out"
            )
        print(f"{voice}: {len(list(folder.glob('*.wav')))} of {len(chosen)}", told, flush=True)


if __name__ == "__main__":
    main()
