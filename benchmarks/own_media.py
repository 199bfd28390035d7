"""What a model of `recipes/own` has learned from class folders of pictures and recordings of spoken words.

    python benchmarks/own_media.py RUN OTHER.tar [--limit 300]

RUN was made by the recipes `own`; OTHER.tar is a WebDataset shard of pictures of the same classes, with their names.
Prints shares with 95 % intervals: captions of pictures in RUN and in OTHER.tar, transcripts of held-out recordings, and
what pocketsphinx and the model itself hear of ten spoken answers to each word.
"""

from __future__ import annotations

import argparse
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

import anygen
from anygen.data.records import RecordStore
from anygen.evaluation.recogniser import Recogniser
from anygen.evaluation.scores import proportion


def show(what: str, right: Sequence[bool]) -> None:
    """Print one share."""
    score = proportion(right)
    print(f"{what}: {score.value:.1%} ({score.low:.1%} to {score.high:.1%}) of {score.count}", flush=True)


def opened(picture: bytes) -> Image.Image:
    """A picture file."""
    return Image.open(io.BytesIO(picture))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("--limit", type=int, default=300)
    options = parser.parse_args()
    model = anygen.AnyGen.from_pretrained(options.run / "bundle" / "own")

    def said(**given: Any) -> str:
        return model.generate(output="text", seed=0, **given).text.strip()

    data = options.run / "data"
    store = RecordStore(sorted(data.glob("train-*.tar")))
    own = [record for record in (store[i] for i in range(len(store))) if record.picture]
    show("captions of its training pictures", [said(image=opened(r.picture)) in r.captions for r in own if r.picture])
    with tarfile.open(options.other) as tar:
        names = [name.removesuffix(".txt") for name in tar.getnames() if name.endswith(".txt")][: options.limit]
        files = [(tar.extractfile(f"{name}.jpg"), tar.extractfile(f"{name}.txt")) for name in names]
        pairs = [(opened(p.read()), t.read().decode().strip()) for p, t in files if p and t]
    show("captions of other pictures", [said(image=picture) == name for picture, name in pairs])

    held_out = RecordStore(sorted(data.glob("test-*.tar")))
    spoken = [(u.text, u.audio(16_000)) for i in range(len(held_out)) for u in held_out[i].utterances]
    show("transcripts of held-out recordings", [said(audio=(a.samples_T, a.rate_hz)) == text for text, a in spoken])
    words = sorted({text for text, _ in spoken})
    recogniser = Recogniser(words)
    show("recordings, as pocketsphinx hears them", [recogniser.heard(audio) == text for text, audio in spoken])
    answers = [(w, model.generate(text=w, output="audio", seed=seed).audio) for w in words for seed in range(10)]
    show("spoken answers, as pocketsphinx hears them", [recogniser.heard(audio) == word for word, audio in answers])
    show("spoken answers, as it hears itself", [said(audio=(a.samples_T, a.rate_hz)) == word for word, a in answers])


if __name__ == "__main__":
    main()
