"""Which judge keeps the take, of eight that say what a picture shows, that a recogniser understands.

    python benchmarks/judged_ways.py OUT.json [MODEL] [--names 120]

MODEL is a bundle, by default the embedded one; names are others than the evaluation's, so that a judge can be chosen.
All takes are judged backward (log p(picture | text) + log p(text | sound)), and with log p(text | picture) and
log p(sound | text) beside these: by their sums, or by the means of their ids, so many times (`WEIGHTS`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import leading_codebooks
import numpy as np

from anygen import api, ranking
from anygen.api import AnyGen
from anygen.bundle import Bundle
from anygen.errors import AnyGenError
from anygen.evaluation.recogniser import lists_of, spelled
from anygen.evaluation.scores import proportion
from anygen.evaluation.suite.bench import Bench
from anygen.files import write_json
from anygen.judging import BestOf
from anygen.request import Request
from anygen.sampling.likelihood import answer_nats
from anygen.sampling.sampler import SampleState
from anygen.sequence import Sequencer
from tokenizers_mm.codes import Codes

NUM, BATCH, SEED = 8, 20, 0
WEIGHTS = (5, 10, 15, 20, 30)


class Take(NamedTuple):
    """One of the answers to a picture."""

    text: str
    """What it wrote first."""
    sound: Codes
    backward: float
    """Nats of the picture by the text, and of the text by the sound."""
    forward: float
    """Of the text by the picture, and of the sound by the text."""
    by_id: float
    """Of these two the means by id, added."""


def takes_of(bundle: Bundle, sequencer: Sequencer, states: Sequence[SampleState]) -> list[Take]:
    """All of them, with what every judge wants to know."""
    both = {"image>audio": BestOf(number=NUM, judge="both")}
    judged = [[told.document for told in ranking._judged(both, sequencer, state)] for state in states]
    found = answer_nats(bundle.model, bundle.vocabulary, [sequencer.build(d) for four in judged for d in four])
    nats = [nats_P for _, nats_P in found]
    takes = []
    for number, (of_text, _, _, of_sound) in enumerate(judged):
        seen, written, heard, said = nats[4 * number : 4 * number + 4]
        text = bundle.tokenizers["text"].decode(of_text.segments[0].content)  # type: ignore[arg-type]
        takes.append(
            Take(
                str(text),
                of_sound.segments[-1].content,
                float(seen.sum() + heard.sum()),
                float(written.sum() + said.sum()),
                float(written.mean() + said.mean()),
            )
        )
    return takes


def drawn(model: AnyGen, requests: Sequence[Request]) -> list[list[Take]]:
    """Of each request all takes, as they are drawn where one of them is to be kept."""
    store: list[list[Take]] = []
    usual = api.best_of

    def watched(bundle: Bundle, sequencer: Sequencer, request: Request, states: list[SampleState]) -> list[SampleState]:
        store.append(takes_of(bundle, sequencer, states))
        return usual(bundle, sequencer, request, states)

    api.best_of = watched
    try:
        for start in range(0, len(requests), BATCH):
            model.generate_batch(requests[start : start + BATCH])
            print(f"{min(start + BATCH, len(requests))} of {len(requests)}", file=sys.stderr)
    finally:
        api.best_of = usual
    return store


def rules() -> dict[str, Callable[[Take], float]]:
    """What is least of the take that is kept."""
    means = {f"and forward as {n} ids": lambda t, n=n: t.backward + n * t.by_id for n in WEIGHTS}
    return {"backward": lambda t: t.backward, **means, "and forward by sums": lambda t: t.backward + t.forward}


def understood(bench: Bench, takes: Sequence[Sequence[Take]], said: Sequence[Sequence[str]]) -> dict[int, list[bool]]:
    """Of each row that the recogniser has the words for, which takes it hears as one of the phrasings."""
    recogniser, tokenizer = bench.recogniser, bench.model.bundle.tokenizers["audio"]
    found: dict[int, list[bool]] = {}
    for rows, texts in lists_of(said, bench.sayings):
        recogniser.listen_for(texts)
        for row in rows:
            if right := {spelled(form) for form in said[row] if recogniser.knows(form)}:
                found[row] = [recogniser.heard(tokenizer.decode(take.sound)) in right for take in takes[row]]
    return found


def measured(model: AnyGen, names: int) -> Iterator[dict[str, Any]]:
    """Exact words of each group: of what each rule keeps, and of the best take."""
    bench = Bench(model, limit=names, seed=SEED)
    if bench.recogniser is None:
        raise AnyGenError('the package pocketsphinx is not there: pip install "anygen[eval]"')
    for group, items in leading_codebooks.names_of(bench.world, names).items():
        if not group.startswith("other"):
            continue
        requests = [
            Request(image=bench.world.pictures[i], output="audio", via="text_only", seed=SEED + i, best_of=NUM)
            for i in items
        ]
        takes = drawn(model, requests)
        said = [tuple(bench.world.spoken_forms_of(i)) for i in items]
        is_right = understood(bench, takes, said)
        for rule, cost in rules().items():
            kept = [is_right[row][int(np.argmin([cost(take) for take in takes[row]]))] for row in sorted(is_right)]
            yield {"group": group, "kept": rule, "exact words": leading_codebooks.facts_of(proportion(kept))}
        best = proportion([any(right) for right in is_right.values()])
        yield {"group": group, "kept": "the best", "exact words": leading_codebooks.facts_of(best)}


def main() -> int:
    """Write a JSON of all figures, and print them; 2 where the model cannot be opened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("model", nargs="?", metavar="MODEL")
    parser.add_argument("--names", type=int, default=120, help="of each group")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    try:
        for row in measured(AnyGen.from_pretrained(options.model), options.names):
            print(row, flush=True)
            rows.append(row)
            write_json(options.out, {"seed": SEED, "rows": rows})
    except AnyGenError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
