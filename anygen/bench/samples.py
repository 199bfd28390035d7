"""The documents of a training benchmark: lengths of the emoji mix, packed for us and padded for the baseline.

One round is one packed batch. The padded baseline gets exactly its documents, shuffled and parted into equal batches of
about `Composition.documents_per_batch`; nothing is chosen by length. The packer runs for a while before the first
round, because its first rows take the longest documents out of a fresh pool.

Dimension key: S ids of one document, B documents of a padded batch, L ids of its longest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anygen.config import build, read_yaml
from anygen.data.coded import CodedStore
from anygen.data.tasks import DocumentStream
from anygen.errors import InputError
from anygen.layout import Layout
from anygen.packing import PackedBatch, Packer, unpack
from anygen.recipes_index import find_recipe
from anygen.sequence import Sequence, Sequencer
from anygen.stages.pretrain import PretrainConfig, open_tokenizers
from anygen.stages.tokenize import coded_facts
from anygen.vocabulary import Vocabulary
from tokenizers_mm.codes import IntArray

MIXTURE_RECIPE = "nano/pretrain.yaml"
PLAIN_TEXT = "emoji:text>text"
POOL = 256
_WARM_UP_DOCUMENTS = 8 * POOL

# 20,000 documents of the emoji mix (mean 94 ids) and 8,000 of its direction text>text (mean 22.5), counted
_SHARES = (0, .01, .02, .05, .1, .2, .3, .4, .5, .6, .7, .75, .8, .85, .9, .95, .98, .99, .999, 1)  # fmt: skip
_MIX = (8, 11, 13, 26, 58, 76, 78, 80, 82, 83, 86, 92, 116, 133, 155, 198, 237, 265, 329, 522)
_TEXT = (7, 10, 11, 12, 14, 16, 18, 20, 22, 24, 25, 26, 28, 29, 31, 37, 44, 47, 51, 53)

Example = Callable[[int], Sequence]


@dataclass(frozen=True)
class Composition:
    """How many documents the padded baseline takes at once, and which."""

    documents_per_batch: int
    plain_text_share: float
    """Share of documents that are short text alone, beside the emoji mix."""


COMPOSITIONS = {0.5: Composition(11, 0.0), 0.28: Composition(32, 0.5)}
"""Padding utilisation to a batch that has it: 11 documents of the emoji mix as it is; 32, half of them plain text."""


@dataclass(frozen=True, eq=False)
class Round:
    """The same documents for every contestant."""

    packed: PackedBatch
    num_rows: int
    documents: tuple[IntArray, ...]
    """In the order of the rows."""
    batches: tuple[tuple[IntArray, ...], ...]
    """The same documents as batches to pad."""

    @property
    def num_real(self) -> int:
        """Ids that are not padding."""
        return sum(map(len, self.documents))

    @property
    def num_labels(self) -> int:
        """Ids that are predicted: all but the first of each document."""
        return self.num_real - len(self.documents)

    @property
    def num_padded(self) -> int:
        """Ids that the padded baseline computes for them."""
        return sum(len(batch) * max(map(len, batch)) for batch in self.batches)


@dataclass(frozen=True)
class Samples:
    """Where documents come from."""

    example: Example
    composition: Composition
    source: str
    vocabulary_size: int
    """Ids are below it."""

    def rounds(self, count: int, *, row_length: int, num_rows: int, seed: int) -> list[Round]:
        """The packed batches that a training would have met after its first minutes."""
        packer = Packer(self.example, row_length=row_length, num_rows=num_rows, pool_size=POOL, pad_id=0)
        gone = 0
        while gone < _WARM_UP_DOCUMENTS:
            gone += len(packer.next_batch().lengths)
        generator = np.random.default_rng(seed)
        return [self._round(packer.next_batch(), num_rows, generator) for _ in range(count)]

    def _round(self, packed: PackedBatch, num_rows: int, generator: np.random.Generator) -> Round:
        pieces = zip(unpack(packed, packed.ids_T), unpack(packed, packed.predicts_T), strict=True)
        documents = tuple(ids_S for ids_S, predicts_S in pieces if predicts_S.any())  # the rest is padding
        order = generator.permutation(len(documents))
        parts = np.array_split(order, max(1, round(len(order) / self.composition.documents_per_batch)))
        return Round(packed, num_rows, documents, tuple(tuple(documents[i] for i in part) for part in parts))

    def utilisations(self, *, num_documents: int = 2048) -> dict[str, float]:
        """Padding utilisation of batches drawn in order, and of batches of like lengths (sorted in eights)."""
        lengths = np.array([len(self.example(number)) for number in range(num_documents)])
        sizes = sorted({8, 16, 32, self.composition.documents_per_batch})
        figures = {f"{size} documents": _utilisation(lengths, size) for size in sizes}
        own = self.composition.documents_per_batch
        blocks = [lengths[at : at + 8 * own] for at in range(0, num_documents - 8 * own + 1, 8 * own)]
        figures[f"{own} documents of like lengths"] = _utilisation(np.concatenate([np.sort(b) for b in blocks]), own)
        return figures


def _utilisation(lengths: IntArray, size: int) -> float:
    batches_NB = lengths[: len(lengths) // size * size].reshape(-1, size)
    return float(batches_NB.sum() / (batches_NB.max(1) * size).sum())


def synthetic_samples(composition: Composition, *, vocabulary_size: int, seed: int, length_factor: int = 1) -> Samples:
    """Random ids of text in documents whose lengths have the emoji mix's quantiles, times a factor."""
    num_text = vocabulary_size - Vocabulary.create(text=0).used  # not every control token is learned

    def example(number: int) -> Sequence:
        generator = np.random.default_rng([seed, number])
        quantiles = _TEXT if generator.random() < composition.plain_text_share else _MIX
        length = round(length_factor * float(np.interp(generator.random(), _SHARES, quantiles)))
        return Sequence(generator.integers(1, num_text, length), np.ones(length, np.bool_), ())

    times = f", times {length_factor}" if length_factor > 1 else ""
    return Samples(example, composition, f"lengths of the emoji mix{times}, random ids", vocabulary_size)


def samples_of_run(run: Path, composition: Composition, *, seed: int) -> Samples:
    """Training documents of a run, in the mixture of the nano recipe.

    Raises:
        InputError: the run has no coded shards.
        DataError: its shards fit neither its tokenizers nor the mixture.
    """
    shards = sorted((run / "tokenize").glob("train-*"))
    if not shards:
        raise InputError(f"{run} has no tokenize/train-*: pass the folder of a run after its stage tokenize")
    values = {**read_yaml(find_recipe(MIXTURE_RECIPE)), "root": str(run)}
    config = build(PretrainConfig, values, source=MIXTURE_RECIPE)
    tokenizers: Any = open_tokenizers(run, location_bins=config.location_bins)
    image, audio = tokenizers.get("image"), tokenizers.get("audio")
    layout = Layout(image_codebooks=image.num_codebooks, audio_codebooks=audio.num_codebooks)
    sequencer = Sequencer(Vocabulary.of(tokenizers, voken=config.vokens), layout)
    store = CodedStore(shards, facts=coded_facts(image, audio))

    def stream(directions: Iterable[str]) -> DocumentStream:
        weights = {direction: config.mixture[direction] for direction in directions}
        return DocumentStream(
            store, weights, tokenizers, drop_share=config.drop_share, free_share=config.free_share, seed=seed
        )

    mix, text = stream(config.mixture), stream([PLAIN_TEXT])

    def example(number: int) -> Sequence:
        is_text = np.random.default_rng([seed, number]).random() < composition.plain_text_share
        document, dropped = (text if is_text else mix)(number)
        return sequencer.build(document, drop_inputs=dropped)

    return Samples(example, composition, f"documents of {run} ({MIXTURE_RECIPE})", sequencer.vocabulary.size)
