"""Speculative decoding: codes a pass of its schemes, and what a window gives in time.

    python benchmarks/speculative.py OUT.json [--model BUNDLE] [--parts schemes time] [--cases NAME ...] [--rounds 8]

- schemes: pictures of 8 x 8 codes, drawn by the fixed point of coupled races that the sampler uses and by the schemes
  of the papers, which accept by chance: speculative Jacobi decoding (arXiv 2410.01699) and its couplings (arXiv
  2510.24211), maximal and Gumbel. Codes a pass, by scheme, window, and what stands in for a code never guessed before.
- time: the sampler itself, plain and with windows, in turns: passes, seconds, and the ratio to plain of each round. One
  thread; process CPU time, which neighbours disturb least. A window that changes an id stops the run.

Dimension key: B rows, W ids of a window, D width, A codes of the codebook.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anygen.api import AnyGen
from anygen.bench.machine import machine_facts
from anygen.files import write_json
from anygen.request import Request
from anygen.sampling.choose import SamplingOptions, probabilities
from anygen.sampling.sampler import sample

PROMPTS = [
    *("a red apple", "a smiling cat with heart eyes", "the flag of Norway", "thumbs up: dark skin tone"),
    *("a house with a garden", "a woman running", "a blue car", "a crying face", "four o'clock", "a pizza"),
    *("two cats", "a dog left of a tree"),
]
WINDOWS = (4, 8, 16, 32)
TIMED_WINDOWS = (4, 8, 16)
SIDE = 8


# -- schemes


@dataclass(frozen=True)
class Guess:
    """A guess at one code, and the distribution that it was drawn from; None where it was not drawn."""

    id: int
    drawn_from_A: Tensor | None = None


class Draws:
    """Ways to draw a code at a position, given its distribution and the guess that stood there."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self._waits: dict[int, Tensor] = {}

    def race(self, position: int, p_A: Tensor, guess: Guess | None = None) -> int:
        """With the waits of the position: the same at every pass."""
        if position not in self._waits:
            self._waits[position] = torch.empty_like(p_A).exponential_(generator=self.generator)
        return int((p_A / self._waits[position]).argmax())

    def anew(self, position: int, p_A: Tensor, guess: Guess | None = None) -> int:
        """Independently."""
        return int((p_A / torch.empty_like(p_A).exponential_(generator=self.generator)).argmax())

    def coupled(self, position: int, p_A: Tensor, guess: Guess | None = None) -> int:
        """Kept with probability min(1, p/q), else from the residual: equal to the guess as often as can be."""
        if guess is None:
            return self.anew(position, p_A)
        q_A = torch.zeros_like(p_A) if guess.drawn_from_A is None else guess.drawn_from_A
        kept = p_A[guess.id] if guess.drawn_from_A is None else p_A[guess.id] / q_A[guess.id]
        if float(torch.rand((), generator=self.generator, dtype=torch.float64)) < float(kept):
            return guess.id
        residual_A = (p_A - q_A).clamp(min=0)
        residual_A[guess.id] = 0
        return self.anew(position, residual_A)


SCHEMES: dict[str, tuple[Callable[..., int], Callable[..., int]]] = {
    "fixed point": (Draws.race, Draws.race),
    "SJD": (Draws.coupled, Draws.anew),
    "SCD, maximal": (Draws.coupled, Draws.coupled),
    "SCD, Gumbel": (Draws.coupled, Draws.race),
}
"""How the next code is chosen, and how the guesses after it are renewed."""
STARTS = ("above", "before", "race", "random")


class Picture:
    """One picture of SIDE x SIDE codes, its prompt read with and without its text."""

    def __init__(self, model: AnyGen, text: str, options: SamplingOptions) -> None:
        self._engine, self._options = model.engine, options
        codes = model.bundle.vocabulary.range("image.0")
        self._range = (codes.start, codes.stop)
        side_px = SIDE * model.bundle.tokenizers["image"].config.patch_px  # type: ignore[attr-defined]
        state = model._states(Request(text=text, output="image", size=side_px))[0]
        head: list[int] = []
        while not state.walk.num_codes:
            head.append(state.walk.allowed[0][0])
            state.walk.push(head[-1])
        assert state.unconditional is not None
        self._prompts = [np.concatenate([prompt, np.array(head)]) for prompt in (state.prompt, state.unconditional)]

    def begin(self) -> Tensor:
        """Read the prompt; distribution of the first code."""
        self._cache = self._engine.new_cache(2, max(map(len, self._prompts)) + SIDE * SIDE)
        return self._distributions(self._engine.prefill(self._prompts, self._cache)[:, None])[0]

    def read(self, window: list[int]) -> Tensor:
        """Distribution after each code of the window, W x A."""
        self._lengths_B = self._cache.lengths_B.clone()
        ids_BW = torch.tensor([window, window]) + self._range[0]
        return self._distributions(self._engine.extend(ids_BW, self._cache))

    def keep(self, count: int) -> None:
        """Take back all but the first `count` codes of the window."""
        self._cache.lengths_B = self._lengths_B + count

    def _distributions(self, hidden_BWD: Tensor) -> Tensor:
        given_WA, dropped_WA = self._engine.logits(hidden_BWD.flatten(0, 1), (self._range,)).chunk(2)
        p_WA = probabilities(dropped_WA + self._options.guidance_scale * (given_WA - dropped_WA), self._options)
        return p_WA / p_WA.sum(-1, keepdim=True)


def draw(picture: Picture, scheme: str, start: str, window: int, seed: int) -> tuple[list[int], int]:
    """The codes of a picture, and the passes that they took."""
    choose, renew = SCHEMES[scheme]
    draws, random, total = Draws(seed), np.random.default_rng(seed), SIDE * SIDE
    last_A = picture.begin()
    codes, guesses, passes = [draws.race(0, last_A)], {}, 0
    while len(codes) < total:
        first = len(codes)
        known = list(codes)
        for position in range(first, min(first + window - 1, total)):
            if position not in guesses:
                near = {"above": known[-SIDE:][0], "before": known[-1], "race": -1, "random": -1}[start]
                if start == "race":
                    near = draws.race(position, last_A)
                guesses[position] = Guess(int(random.integers(len(last_A))) if start == "random" else near)
            known.append(guesses[position].id)
        p_WA = picture.read(known[first - 1 :][:window])
        passes, last_A = passes + 1, p_WA[-1]
        num_right = 0
        for offset, p_A in enumerate(p_WA[: total - first]):
            codes.append(choose(draws, first + offset, p_A, guesses.get(first + offset)))
            num_right = offset + 1
            if first + offset not in guesses or guesses[first + offset].id != codes[-1]:
                break
        for offset in range(num_right, min(len(p_WA), total - first)):
            position = first + offset
            renewed = renew(draws, position, p_WA[offset], guesses.get(position))
            guesses[position] = Guess(renewed, p_WA[offset])
        picture.keep(num_right)
    return codes, passes + 1


def compare_schemes(model: AnyGen, prompts: list[str]) -> list[dict[str, Any]]:
    """Codes a pass of every scheme, and of every start for the one in use."""
    defaults = model.bundle.defaults["image"]
    rows = []
    for name, options in (("default", defaults), ("temperature 1", dataclasses.replace(defaults, temperature=1.0))):
        pictures = [Picture(model, text, options) for text in prompts]
        variants = [(scheme, "above") for scheme in SCHEMES] + [("fixed point", start) for start in STARTS[1:]]
        for scheme, start in variants:
            row: dict[str, Any] = {"options": name, "scheme": scheme, "start": start}
            for window in WINDOWS:
                drawn = [draw(picture, scheme, start, window, seed) for seed, picture in enumerate(pictures)]
                row[f"window {window}"] = round(SIDE * SIDE * len(drawn) / sum(passes for _, passes in drawn), 2)
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


# -- time


def cases(model: AnyGen, text: str, seed: int) -> dict[str, Request]:
    """What is timed, by name."""
    side_px = SIDE * model.bundle.tokenizers["image"].config.patch_px  # type: ignore[attr-defined]
    picture = Request(text=text, output="image", size=side_px, seed=seed)
    return {
        "picture": picture,
        "2 pictures": dataclasses.replace(picture, num_samples=2),
        "4 pictures": dataclasses.replace(picture, num_samples=4),
        "picture, temperature 1": dataclasses.replace(picture, temperature=1.0),
        "picture, no guidance": dataclasses.replace(picture, guidance_scale=1.0),
        "sound": Request(text=text, output="audio", seed=seed),
    }


class Stopwatch:
    """Runs requests, counts passes and takes the time."""

    def __init__(self, model: AnyGen) -> None:
        self.model, self.passes = model, 0
        for name in ("step", "extend"):
            setattr(model.engine, name, self._counted(getattr(model.engine, name)))

    def _counted(self, method: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(*arguments: Any, **keywords: Any) -> Tensor:
            self.passes += 1
            return method(*arguments, **keywords)

        return counted

    def run(self, request: Request, window: int) -> tuple[float, float, int, list[list[int]]]:
        """CPU seconds, wall seconds, passes and ids."""
        states = self.model._states(dataclasses.replace(request, speculative_window=window))
        self.passes, wall, cpu = 0, time.perf_counter(), time.process_time()
        for _ in sample(self.model.engine, states):
            pass
        times = time.process_time() - cpu, time.perf_counter() - wall
        return *times, self.passes, [state.ids for state in states]


def compare_times(watch: Stopwatch, name: str, prompts: list[str], num_rounds: int) -> list[dict[str, Any]]:
    """Plain sampling and every window in turns, in an order that rotates."""
    found: dict[int, list[tuple[float, float, int]]] = {window: [] for window in (1, *TIMED_WINDOWS)}
    for index in range(-1, num_rounds):
        request = cases(watch.model, prompts[index % len(prompts)], index + 1)[name]
        ids: dict[int, Any] = {}
        for window in np.roll(list(found), index).tolist():
            *figures, ids[window] = watch.run(request, window)
            if index >= 0:  # the first round warms up
                found[window].append(tuple(figures))  # type: ignore[arg-type]
        assert all(these == ids[1] for these in ids.values()), f"{name}: a window changed ids"
    rows = [_time_row(window, found) for window in found]
    print(name, *map(json.dumps, rows), sep="\n", flush=True)
    return rows


def _time_row(window: int, found: dict[int, list[tuple[float, float, int]]]) -> dict[str, Any]:
    ratios = [plain[0] / this[0] for plain, this in zip(found[1], found[window], strict=True)]
    return {
        "window": window,
        "passes": round(statistics.mean(passes for *_, passes in found[window]), 1),
        "cpu_ms": round(1000 * statistics.median(cpu for cpu, *_ in found[window]), 1),
        "wall_ms": round(1000 * statistics.median(wall for _, wall, _ in found[window]), 1),
        "times_faster": {
            "median": round(statistics.median(ratios), 2),
            "smallest": round(min(ratios), 2),
            "largest": round(max(ratios), 2),
        },
    }


def main() -> None:
    """Run the parts and write the file after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default=None)
    parser.add_argument("--parts", nargs="+", default=["schemes", "time"], choices=["schemes", "time"])
    parser.add_argument("--cases", nargs="+", help="Of part time; all by default.")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--rounds", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, prompts = AnyGen.from_pretrained(arguments.model, device="cpu"), PROMPTS[: arguments.prompts]
    report = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    report |= {"command": "python benchmarks/speculative.py OUT.json", "machine": machine_facts(model.engine.device)}
    if "schemes" in arguments.parts:
        report["schemes"] = compare_schemes(model, prompts)
        write_json(arguments.out, report)
    if "time" in arguments.parts:
        watch = Stopwatch(model)
        for name in arguments.cases or cases(model, "", 0):
            report["time"] = report.get("time", {}) | {name: compare_times(watch, name, prompts, arguments.rounds)}
            write_json(arguments.out, report)


if __name__ == "__main__":
    main()
