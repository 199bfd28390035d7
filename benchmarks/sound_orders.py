"""What the order of codebooks costs: flat, sequential, delay and coarse on one small transformer, budgets equal.

    python benchmarks/sound_orders.py RUN OUT [--orders flat delay] [--seeds 0 1] [--steps 800] [--voices slt]

RUN has `data/`, `text_tokenizer/` and `audio_tokenizer/tokenizer`, a codec of several codebooks. For each order and
seed the same transformer learns text -> speech and speech -> text, half and half, on short names (spoken_names.py).
Interrupted, it goes on where it was. It writes OUT/sound_orders.json, OUT/samples/ and a table.

Steps and ids a step are equal. `flat`, `sequential` and `delay` write the same K x T codes, so they see as many
utterances; `coarse` writes the first `--kept` books and sees more, and `coarse, equal utterances` takes fewer steps.
Bits are those of the sampler's own distribution (the softmax over the book that is next, temperature 1, no guidance),
given text and length. The first three split the same sum by the chain rule, so their totals compare; a book alone
does not, as in `flat` and `delay` finer books of earlier frames are given too. What `coarse` codes compares with the
same books of `sequential`, where nothing finer is given either.

Dimension key: K codebooks, S ids, C codes of one sound, V vocabulary, n utterances.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import spoken_names
import torch
from spoken_names import SPLITS, Recogniser, Spoken

from anygen.api import AnyGen
from anygen.config import build
from anygen.documents import Document, Segment
from anygen.files import read_json, write_json
from anygen.model.causal import num_parameters
from anygen.request import Request
from anygen.stages.base import open_text_tokenizer
from anygen.stages.bundle import BundleConfig
from anygen.stages.pretrain import PretrainConfig
from anygen.stages.run import run_stage
from tokenizers_mm.audio import AudioTokenizer
from tokenizers_mm.media import Audio

Doubles = npt.NDArray[np.float64]
EQUAL_UTTERANCES = "coarse, equal utterances"
VARIANTS = ("flat", "sequential", "delay", "coarse", EQUAL_UTTERANCES)
MODEL: dict[str, Any] = {
    "model": {"size": "nano", "width": 192, "mlp_width": 512, "head_width": 48, "max_positions": 1024},
    "mixture": {"text>audio": 1.0, "audio>text": 1.0},
    "loss_weights": {"text": 10.0},  # 5 pieces of text stand against 200 codes
    "free_share": 0.0,
    "rows_per_batch": 1,
}
ADAMW: dict[str, Any] = {"lr": 2e-3, "betas": [0.9, 0.95], "weight_decay": 0.1, "min_lr_ratio": 0.02}
LOOP: dict[str, Any] = {"log_every": 50, "save_every": 200}
SPEECH: dict[str, Any] = {"temperature": 0.4, "guidance_scale": 1.5}  # the defaults of nano
HEADS = (
    "order / seed", "group", "ids", "utterances seen", "bits/s", "of each book", "more than sequential",
    "hearing: WER", "speaking: WER, pocketsphinx", "WER, itself", "s a sample",
)  # fmt: skip
BATCH, NUM_WAVS = 32, 3


@dataclass(frozen=True)
class Settings:
    """What figures depend on, besides the codec; a folder of results holds one."""

    steps: int = 800
    tokens_per_step: int = 2048
    voices: tuple[str, ...] = ("slt",)
    max_duration_s: float = 1.5
    min_names: int = 3
    """Names that a word must occur in."""
    kept: int = 2
    """Books of `coarse`."""
    limit: int = 60
    """Utterances measured of each group."""


@dataclass(frozen=True)
class Budget:
    """What a variant gets: its order, the books that it codes, steps, and mean ids of a document."""

    order: str
    books: int
    steps: int
    ids: float


def budget(variant: str, settings: Settings, *, num_books: int, pieces: float, frames: float) -> Budget:
    """Equal steps or, for `EQUAL_UTTERANCES`, as many as show the utterances as often as all books would.

    >>> budget("coarse, equal utterances", Settings(steps=100), num_books=4, pieces=10, frames=10)
    Budget(order='coarse', books=2, steps=67, ids=40)
    """
    order = variant.split(",")[0]
    books = min(settings.kept, num_books) if order == "coarse" else num_books
    ids, all_ids = (10 + pieces + count * frames for count in (books, num_books))  # 10: what it is, how long
    share = ids / all_ids if variant == EQUAL_UTTERANCES else 1
    return Budget(order, books, round(settings.steps * share), ids)


def trained(root: Path, given: Budget, settings: Settings, seed: int) -> AnyGen:
    """A transformer that learned one order, in a run that has tokenizers and codes."""
    values = {
        **MODEL,
        "root": root,
        "layout": {
            "audio_order": given.order,
            "audio_kept": given.books if given.order == "coarse" else 0,
            "max_duration_s": settings.max_duration_s,
        },
        "row_length": settings.tokens_per_step,
        "loop": {**LOOP, "steps": given.steps, "seed": seed, "optimizer": {**ADAMW, "warmup_steps": given.steps // 15}},
    }
    run_stage(build(PretrainConfig, values, source="pretrain"))
    (bundle,) = run_stage(build(BundleConfig, {"root": root, "name": "study"}, source="bundle")).outputs
    return AnyGen.from_pretrained(bundle)


@torch.inference_mode()
def bits_by_book(model: AnyGen, spoken: Sequence[Spoken]) -> Doubles:
    """Bits of the codes of each book, n x num_kept: -log2 of what the sampler gives them at temperature 1, unguided."""
    order, vocabulary = model.sequencer.orders["audio"], model.bundle.vocabulary
    bits_nK = np.zeros((len(spoken), order.num_kept))
    for bits_K, s in zip(bits_nK, spoken, strict=True):
        segments = (Segment("text", s.text), Segment("audio", s.of_books(order.num_kept), target=True))
        document = Document(segments, "speak").encode(model.bundle.tokenizers)
        ids_S = torch.from_numpy(model.sequencer.build(document).ids_S)
        logits_SV = model.bundle.model(ids_S[None]).logits[0].float()
        book_C = order.codebook_S(segments[1].codes.num_steps)
        first = len(ids_S) - len(book_C) - 2  # </audio> and <eos> follow the codes
        for k in range(order.num_kept):
            place_C, book = torch.from_numpy(first + np.flatnonzero(book_C == k)), vocabulary.range(f"audio.{k}")
            nats_CA = -logits_SV[place_C - 1, book.start : book.stop].log_softmax(-1)
            bits_K[k] = nats_CA.gather(1, ids_S[place_C, None] - book.start).sum().item() / math.log(2)
    return bits_nK


def ratio(top_n: Doubles, bottom_n: Doubles) -> dict[str, float]:
    """Sum over sum, with a bootstrap 95 % interval over utterances.

    >>> ratio(np.array([1.0, 2.0]), np.array([2.0, 4.0]))
    {'value': 0.5, 'low': 0.5, 'high': 0.5, 'n': 2}
    """
    draws = np.random.default_rng(0).integers(0, len(top_n), (1000, len(top_n)))
    low, high = np.percentile(top_n[draws].sum(1) / bottom_n[draws].sum(1), [2.5, 97.5])
    return {"value": float(top_n.sum() / bottom_n.sum()), "low": float(low), "high": float(high), "n": len(top_n)}


def answers(model: AnyGen, requests: list[Request]) -> list[Any]:
    """One medium for each request."""
    found: list[Any] = []
    for start in range(0, len(requests), BATCH):
        outputs = model.generate_batch(requests[start : start + BATCH])
        found += [output.samples[0].segments[0].content for output in outputs]
    return found


def transcribed(model: AnyGen, spoken: Sequence[Spoken], sounds: Sequence[Audio]) -> dict[str, Any]:
    """How well the transformer hears what was spoken."""
    texts = answers(model, [Request(audio=a, output="text", temperature=0.0, max_new_tokens=64) for a in sounds])
    return spoken_names.word_errors([(s.text, text) for s, text in zip(spoken, texts, strict=True)])


def measure(model: AnyGen, spoken: Sequence[Spoken], recogniser: Recogniser | None, seed: int, wavs: Path) -> Any:
    """Every figure of one group of utterances."""
    seconds_n = np.array([s.audio.duration_s for s in spoken])
    bits_nK = bits_by_book(model, spoken)
    figures: dict[str, Any] = {
        "bits_per_second": ratio(bits_nK.sum(1), seconds_n),
        "bits_per_second_of_books": [ratio(bits_n, seconds_n) for bits_n in bits_nK.T],
        "bits": bits_nK.round(2).tolist(),
        "seconds": seconds_n.round(4).tolist(),
        "hearing": transcribed(model, spoken, [s.audio for s in spoken]),
    }
    start = time.perf_counter()
    requests = [Request(text=s.text, output="audio", seed=1000 * seed + i, **SPEECH) for i, s in enumerate(spoken)]
    sounds = answers(model, requests)
    figures["seconds_per_sample"] = (time.perf_counter() - start) / len(spoken)
    figures["round_trip_own"] = transcribed(model, spoken, sounds)
    if recogniser:
        figures["round_trip"] = spoken_names.errors_heard(recogniser, spoken, sounds)
    for number, (s, sound) in enumerate(zip(spoken[:NUM_WAVS], sounds, strict=False)):
        sound.save(Path(f"{wavs}-{number}-{spoken_names.spelled(s.text).replace(' ', '_')}.wav"))
    return figures


def compare(runs: dict[str, Any]) -> None:
    """Add to each run what it takes more than `sequential` of its seed, in bits/s of the books that it codes."""
    for name, figures in runs.items():
        base = runs.get(f"sequential/{name.split('/')[1]}", {})
        for group in SPLITS if base else ():
            own_nK, other_nK = (np.array(run[group]["bits"]) for run in (figures, base))
            more_n = own_nK.sum(1) - other_nK[:, : own_nK.shape[1]].sum(1)
            figures[group]["more_than_sequential"] = ratio(more_n, np.array(figures[group]["seconds"]))


def table(runs: dict[str, Any]) -> str:
    """The main figures as Markdown, with bootstrap 95 % intervals."""

    def shown(figure: dict[str, float] | None, scale: float = 100, unit: str = " %") -> str:
        value, low, high = (f"{(figure or {}).get(key, math.nan) * scale:.0f}" for key in ("value", "low", "high"))
        return f"{value}{unit} ({low} to {high})" if figure else "-"

    lines = [HEADS, ("---",) * len(HEADS)]
    for name, run in runs.items():
        for group in SPLITS:
            figures = run[group]
            bits = (figures["bits_per_second"], figures.get("more_than_sequential"))
            errors = [shown(figures.get(key)) for key in ("hearing", "round_trip", "round_trip_own")]
            books = " + ".join(f"{book['value']:.0f}" for book in figures["bits_per_second_of_books"])
            total, more = (shown(figure, 1, "") for figure in bits)
            counts = (f"{run['ids']:.0f}", f"{run['utterances_seen']:.0f}")
            lines.append((name, group, *counts, total, books, more, *errors, f"{figures['seconds_per_sample']:.2f}"))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def opened(path: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """The results so far; ends the program where they are of something else."""
    facts = json.loads(json.dumps(facts))  # as they are read again
    results: dict[str, Any] = read_json(path) if path.exists() else {**facts, "runs": {}}
    if any(results[name] != value for name, value in facts.items()):
        raise SystemExit(f"{path} is of another codec, other utterances or settings: choose another OUT")
    return results


def study(run: Path, out: Path, settings: Settings, variants: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Do what is missing in OUT; every figure so far."""
    (out / "samples").mkdir(parents=True, exist_ok=True)
    codec, text = AudioTokenizer.load(run / "audio_tokenizer" / "tokenizer"), open_text_tokenizer(run)
    choice = (settings.voices, settings.max_duration_s, settings.min_names)
    groups = spoken_names.chosen(run / "data", *choice, rate_hz=codec.sample_rate_hz)
    work, groups = spoken_names.encoded(groups, codec, out)
    path, data = out / "sound_orders.json", spoken_names.about(groups)
    results = opened(path, {"settings": asdict(settings), "codec": codec.fingerprint, "data": data})
    results |= {"command": shlex.join(sys.argv), "threads": torch.get_num_threads()}
    measured = {group: s[:: max(1, len(s) // settings.limit)][: settings.limit] for group, s in groups.items()}
    recogniser = spoken_names.open_recogniser(groups)
    if recogniser and "floors" not in results:
        kept = min(settings.kept, codec.num_codebooks)
        results["floors"] = {group: spoken_names.floors(codec, s, recogniser, kept) for group, s in measured.items()}
        write_json(path, results)
    pieces = float(np.mean([text.encode(s.text).num_steps for s in groups["train"]]))
    frames = float(np.mean([s.of_books(1).num_steps for s in groups["train"]]))
    for seed, variant in itertools.product(seeds, variants):
        name, start = f"{variant}/{seed}", time.perf_counter()
        if name in results["runs"]:
            print(f"{name}: done before", flush=True)
            continue
        given = budget(variant, settings, num_books=codec.num_codebooks, pieces=pieces, frames=frames)
        print(f"{name}: {given.steps} steps", flush=True)
        slug = name.replace(", ", "-").replace(" ", "-").replace("/", "-")
        (work / slug).mkdir(exist_ok=True)
        for folder in (run / "text_tokenizer", run / "audio_tokenizer", work / "tokenize"):
            if not (work / slug / folder.name).exists():
                (work / slug / folder.name).symlink_to(folder.resolve())
        model = trained(work / slug, given, settings, seed)
        figures = asdict(given) | {"utterances_seen": given.steps * settings.tokens_per_step / given.ids}
        figures |= {"train_s": time.perf_counter() - start, "parameters": num_parameters(model.bundle.model)}
        for group, spoken in measured.items():
            figures[group] = measure(model, spoken, recogniser, seed, out / "samples" / f"{slug}-{group}")
        results["runs"][name] = figures
        compare(results["runs"])
        write_json(path, results)
        print(f"{name}: {time.perf_counter() - start:.0f} s\n{table({name: figures})}", flush=True)
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, write and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--orders", nargs="+", choices=VARIANTS, default=VARIANTS, metavar="ORDER", help=str(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    for field in fields(Settings):
        options: dict[str, Any] = {"nargs": "+"} if field.name == "voices" else {"type": type(field.default)}
        parser.add_argument("--" + field.name.replace("_", "-"), default=field.default, **options)
    given = parser.parse_args(arguments)
    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("anygen").setLevel(logging.INFO)  # progress of training, every half minute
    settings = Settings(**{field.name: getattr(given, field.name) for field in fields(Settings)})
    results = study(given.run, given.out, settings, given.orders, given.seeds)
    for group, found in results.get("floors", {}).items():
        print(group, *(f"{name}: {e['value']:.1%}" for name, e in found.items()), sep="; ")
    print(table(results["runs"]))


if __name__ == "__main__":
    main()
