"""What a recogniser still understands of real recordings where only leading codebooks are decoded.

    python benchmarks/leading_codebooks.py OUT.json CODEC... [--names 120] [--theirs DATA]

CODEC is a codec's folder or `nano`, the embedded one. It is the ceiling of a transformer that writes no more codebooks:
names of emoji as `slt` says them, those of the evaluation (and as many others), coded and decoded again. With
`--theirs` also ESTOI of 12 held-out sounds of each voice of a data stage that has five or more.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pystoi import stoi

from anygen.bundle import default_bundle
from anygen.data.emoji_names import spoken_forms
from anygen.data.records import RecordStore
from anygen.data.speech import speak
from anygen.errors import AnyGenError
from anygen.evaluation.emoji import RealEmoji
from anygen.evaluation.recogniser import Recogniser, lists_of, spelled
from anygen.evaluation.scores import Score, proportion
from anygen.files import write_json
from tokenizers_mm.audio import AudioTokenizer
from tokenizers_mm.codes import Codes
from tokenizers_mm.media import Audio

VOICE, MOST_SOUNDS, FEWEST = "slt", 12, 5


def names_of(world: RealEmoji, limit: int) -> dict[str, list[int]]:
    """The evaluation's names, and others."""
    groups, whole = world.groups(limit), world.groups(None)
    for name in tuple(groups):
        rest = sorted(set(whole[name]) - set(groups[name]))
        groups[f"other {name}"] = sorted(random.Random(0).sample(rest, min(limit, len(rest))))
    return groups


def decoded(codec: AudioTokenizer, sound: Audio, books: int) -> Audio:
    """A sound from its leading codebooks."""
    codes = codec.encode(sound)
    return codec.decode(Codes(codes.codes_KT[:books], "audio", num_samples=codes.num_samples))


def understood(recogniser: Recogniser, phrases: Sequence[str], sounds: Sequence[Audio], others: Sequence[str]) -> Any:
    """Share of the phrases that are heard to the word."""
    right = []
    for rows, texts in lists_of([(phrase,) for phrase in phrases], others):
        recogniser.listen_for(texts)
        right += [recogniser.heard(sounds[row]) == spelled(phrases[row]) for row in rows]
    return proportion(right, right)


def facts_of(score: Score) -> dict[str, Any]:
    """A share as it stands in a report."""
    return {"value": score.value, "low": score.low, "high": score.high, "count": score.count}


def of_names(codecs: dict[str, AudioTokenizer], limit: int) -> Iterator[dict[str, Any]]:
    """Exact words of each group, of the recordings and from one codebook to all."""
    world, recogniser = RealEmoji(64), Recogniser()
    others = sorted({form for emoji in world.emoji for form in spoken_forms(emoji.parts)})
    for group, items in names_of(world, limit).items():
        phrases = [p for p in (world.emoji[i].words_of(VOICE) for i in items) if recogniser.knows(p)]
        recordings = [speak(phrase, VOICE) for phrase in phrases]
        versions = {("recordings", 0): recordings}
        for name, codec in codecs.items():
            for books in range(1, codec.num_codebooks + 1):
                versions[name, books] = [decoded(codec, sound, books) for sound in recordings]
        for (name, books), sounds in versions.items():
            score = understood(recogniser, phrases, sounds, others)
            yield {"group": group, "codec": name, "codebooks": books, "exact words": facts_of(score)}


def of_voices(codecs: dict[str, AudioTokenizer], store: RecordStore) -> Iterator[dict[str, Any]]:
    """Mean ESTOI of each voice's sounds, those of VOICE among them."""
    places: dict[str, list[int]] = {}
    for index in range(len(store)):
        for voice in store.voices(index):
            places.setdefault(voice, []).append(index)
    for voice, found in sorted(places.items()):
        if len(found) < FEWEST:
            continue
        chosen = random.Random(0).sample(found, min(MOST_SOUNDS, len(found)))
        said = [store.utterance(index, voice) for index in chosen]
        for name, codec in codecs.items():
            sounds = [utterance.audio(codec.sample_rate_hz) for utterance in said]
            for books in range(1, codec.num_codebooks + 1):
                values = [v for sound in sounds if (v := estoi(sound, decoded(codec, sound, books))) is not None]
                if values:
                    facts = {"ESTOI": float(np.mean(values)), "count": len(values)}
                    yield {"voice": voice, "codec": name, "codebooks": books, **facts}


def estoi(sound: Audio, other: Audio) -> float | None:
    """None where too little is not silent."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        try:
            return float(stoi(sound.samples_T, other.samples_T, sound.rate_hz, extended=True))
        except RuntimeWarning:
            return None


def main() -> int:
    """Write a JSON of all figures, and print them; 2 where a codec cannot be opened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("codecs", nargs="+", metavar="CODEC")
    parser.add_argument("--names", type=int, default=120, help="of each group")
    parser.add_argument("--theirs", type=Path, metavar="DATA", help="folder of shards with other voices")
    options = parser.parse_args()
    try:
        codecs = {
            name: AudioTokenizer.load(default_bundle() / "tokenizers" / "audio" if name == "nano" else Path(name))
            for name in options.codecs
        }
        store = RecordStore(options.theirs.glob("validation-*.tar")) if options.theirs else None
    except AnyGenError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    for row in itertools.chain(of_voices(codecs, store) if store else (), of_names(codecs, options.names)):
        print(row, flush=True)
        rows.append(row)
        write_json(options.out, {"voice": VOICE, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
