"""Where the answers of a part come from: the model, the tokenizers alone (a ceiling), or the truth itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from anygen.evaluation.suite.bench import Bench
from anygen.evaluation.suite.cases import Answer, Case, Part
from anygen.ranking import is_ranked


def generated(bench: Bench, part: Part, cases: Sequence[Case]) -> list[Answer]:
    """What the model makes of the requests."""
    requests = [case.request for case in cases]
    if bench.best_of is not None:  # one answer can be asked for of anything
        requests = [replace(r, best_of=bench.best_of) if bench.best_of == 1 or is_ranked(r) else r for r in requests]
    samples = bench.generate(part.name, requests)
    return [{modality: sample.of(modality)[0] for modality in part.outputs} for sample in samples]


def through_codes(bench: Bench, part: Part, cases: Sequence[Case]) -> list[Answer]:
    """The truth, encoded and decoded: what a perfect transformer would give."""
    tokenizers = bench.model.bundle.tokenizers
    return [{m: tokenizers[m].decode(tokenizers[m].encode(case.truth[m])) for m in part.outputs} for case in cases]


def as_it_is(bench: Bench, part: Part, cases: Sequence[Case]) -> list[Answer]:
    """The truth: what the judges make of the best there is."""
    return [{modality: case.truth[modality] for modality in part.outputs} for case in cases]
