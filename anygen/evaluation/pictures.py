"""The figures of a picture tokenizer, on pictures that were never in training: what its codes mean and how they draw.

Dimension key: N pictures, K codebooks, T codes of one codebook, D features, H x W pixels, C colours.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from anygen.evaluation.fidelity import MAX_PSNR_DB, SSIM_WINDOW_PX, Doubles, difference_of, mean_of, psnr, ssim
from anygen.evaluation.frechet import frechet_distance, is_too_small
from anygen.evaluation.picture_coding import (
    BATCH,
    Coded,
    Judge,
    code_pictures,
    codes_of,
    deep_features,
    reconstruct,
)
from anygen.evaluation.picture_samples import Bytes, RealPictures, Samples, draw_samples
from anygen.evaluation.probes import PROBES, Features, bag_of_codes, check_packages, ratio_of, tasks_of
from anygen.evaluation.report import Explained, Figure, figure_of
from anygen.evaluation.scores import proportion
from tokenizers_mm.image import ImageTokenizer
from tokenizers_mm.usage import usage_of

MAX_SEARCHED = 1000
"""Held-out reconstructions whose nearest real picture is searched."""
_SPEED_BATCHES = 4
_MIN_FRECHET = 20

EXPLAINED: Explained = {
    "codes used": ("%", "Share of the codebook that occurs."),
    "perplexity": ("codes", "exp of the entropy of the codes' use: as many codes, used alike, would be as rich."),
    "perplexity / codebook size": ("%", "1 where all codes are used alike. Few pictures cannot fill a large codebook."),
    "cosine to the teacher": ("", "Of what the codes predict and what the teacher sees, mean over patches."),
    "linear probe": ("%", "Accuracy of logistic regression fitted on training pictures; features mean over patches."),
    "kNN": ("%", "Accuracy of the 20 nearest training pictures by cosine, weighted as in DINO."),
    "linear probe, of the teacher's": ("%", "The accuracy divided by that on the teacher's own features."),
    "kNN, of the teacher's": ("%", "The accuracy divided by that on the teacher's own features."),
    "PSNR": ("dB", f"Mean of the pictures' own, on 8-bit RGB; at most {MAX_PSNR_DB:.0f} a picture."),
    "PSNR gap": ("dB", "Training less held out, as many pictures of each kind: what was learnt by heart."),
    "SSIM": ("", "Wang et al. 2004: Gaussian window, sigma 1.5; mean of the three colours, where they took grey."),
    "SSIM gap": ("", "Training less held out."),
    "retrieval": ("%", "The nearest real picture to a reconstruction, by squared pixel error, is the right one."),
    "Fréchet distance": (
        "",
        "In the space of the teacher's mean deep features: not comparable with an FID in Inception's.",
    ),
    "speed": ("pictures/s", f"Batches of {BATCH}, after one that does not count, pixels and codes in memory."),
}


@dataclass(frozen=True)
class Evaluation:
    """The figures, and what the page shows."""

    figures: tuple[Figure, ...]
    skipped: dict[str, str]
    """What was not measured -> why."""
    warnings: tuple[str, ...]
    samples: Samples
    coded: Coded
    """Of the held-out pictures, then of the training sample."""
    reconstructions: Bytes
    """Of the held-out pictures, N x H x W x C."""
    psnr_db: Doubles
    """Of the held-out pictures."""


def evaluate_pictures(
    tokenizer: ImageTokenizer, real: RealPictures, judge: Judge, *, limit: int | None = None
) -> Evaluation:
    """Measure everything that can be measured.

    Args:
        tokenizer: on its device.
        real: the pictures, at the tokenizer's side.
        judge: feature decoder and teacher, as far as there are.
        limit: at most so many pictures of each kind and split.

    Raises:
        MissingDependency: scikit-learn or scikit-image are not there; told before any work.
        DataError: no picture is held out.
    """
    check_packages()
    samples = draw_samples(real, limit=limit)
    coded = code_pictures(tokenizer, real, judge, (*samples.held_out, *samples.train))
    drawn = reconstruct(tokenizer, coded, samples.held_out)
    work = _Work(tokenizer, real, judge, samples, coded, drawn)
    figures = [
        *work.usage(),
        *work.cosines(),
        *work.probes(),
        *work.fidelity(),
        *work.retrieval(),
        *work.frechet(),
        *work.speed(),
    ]
    psnr_db = work.psnr_db
    return Evaluation(tuple(figures), work.skipped, tuple(work.warnings), samples, coded, drawn, psnr_db)


class _Work:
    def __init__(
        self,
        tokenizer: ImageTokenizer,
        real: RealPictures,
        judge: Judge,
        samples: Samples,
        coded: Coded,
        drawn_NHWC: Bytes,
    ) -> None:
        self.tokenizer, self.real, self.judge = tokenizer, real, judge
        self.samples, self.coded, self.drawn_NHWC = samples, coded, drawn_NHWC
        self.num_held_out = len(samples.held_out)
        self.originals_NHWC = real.bytes_of(samples.held_out)
        self.psnr_db = psnr(self.originals_NHWC, drawn_NHWC)
        self.kinds = np.array([real.records[number].kind for number in samples.held_out])
        self.skipped = {f"what needs the {name}": why for name, why in judge.missing.items()}
        self.warnings: list[str] = []

    def usage(self) -> Iterator[Figure]:
        """Of held-out pictures, and with the training sample."""
        size = self.tokenizer.codebook_size
        for group, count in (("held out", self.num_held_out), ("held out and training", len(self.coded.numbers))):
            codes_NKT = self.coded.codes_NKT[:count]
            for book in range(self.tokenizer.num_codebooks):
                used, perplexity = usage_of(torch.from_numpy(codes_NKT[:, book]), size)
                where = f"{group}, codebook {book + 1}" if self.tokenizer.num_codebooks > 1 else group
                yield Figure("codes used", where, used, None, None, count)
                yield Figure("perplexity", where, perplexity, None, None, count)
                yield Figure("perplexity / codebook size", where, perplexity / size, None, None, count)

    def cosines(self) -> Iterator[Figure]:
        """Of the held-out pictures."""
        for column, layer in zip(self.coded.cosines_N2[: self.num_held_out].T, ("deep", "shallow"), strict=False):
            yield figure_of("cosine to the teacher", f"held out, {layer}", mean_of(column))

    def probes(self) -> Iterator[Figure]:
        """Every classifier on every set of labels and every kind of features."""
        records = [self.real.records[number] for number in self.coded.numbers]
        tasks, skipped = tasks_of(records[self.num_held_out :], records[: self.num_held_out])
        self.skipped |= {f"probes of {name}": why for name, why in skipped.items()}
        features = self._features()
        for task in tasks:
            train_rows = [row + self.num_held_out for row in task.train_rows]
            for probe, classify in PROBES.items():
                right = {
                    name: classify(table[train_rows], table[list(task.held_out_rows)], task)
                    for name, table in features.items()
                }
                for name, hits in right.items():
                    yield figure_of(probe, f"{task.name}, {name}", proportion(hits.tolist()))
                for name in right if "teacher" in right else ():
                    if name != "teacher":
                        ratio = ratio_of(right[name], right["teacher"])
                        yield figure_of(f"{probe}, of the teacher's", f"{task.name}, {name}", ratio)

    def _features(self) -> dict[str, Features]:
        tables = {"predicted from codes": self.coded.from_codes_ND, "teacher": self.coded.from_teacher_ND}
        bag = bag_of_codes(self.coded.codes_NKT, self.tokenizer.codebook_size)
        return {name: table for name, table in tables.items() if table.shape[1]} | {"bag of codes": bag}

    def fidelity(self) -> Iterator[Figure]:
        """PSNR and SSIM of held-out pictures, by kind, and how much better training pictures are."""
        originals_NHWC = self.real.bytes_of(self.samples.same_kinds)
        drawn_NHWC = reconstruct(self.tokenizer, self.coded, self.samples.same_kinds)
        yield from self._compare("PSNR", self.psnr_db, psnr(originals_NHWC, drawn_NHWC))
        if self.real.side_px < SSIM_WINDOW_PX:
            self.skipped["SSIM"] = f"its window is {SSIM_WINDOW_PX} px, the pictures are {self.real.side_px} px"
            return
        held_out_N = ssim(self.originals_NHWC, self.drawn_NHWC)
        yield from self._compare("SSIM", held_out_N, ssim(originals_NHWC, drawn_NHWC))

    def _compare(self, name: str, held_out_N: Doubles, train_N: Doubles) -> Iterator[Figure]:
        yield figure_of(name, "held out", mean_of(held_out_N))
        for kind in sorted(set(self.kinds)) if len(set(self.kinds)) > 1 else ():
            yield figure_of(name, f"held out, {kind}", mean_of(held_out_N[self.kinds == kind]))
        yield figure_of(name, "training", mean_of(train_N))
        yield figure_of(f"{name} gap", "all kinds", difference_of(train_N, held_out_N))

    def retrieval(self) -> Iterator[Figure]:
        """Among all real emoji where there are any, else among all real pictures."""
        kinds = [record.kind for record in self.real.records]
        among = [n for n, kind in enumerate(kinds) if kind == "emoji" or "emoji" not in kinds]
        searched = set(among)
        rows = [row for row, number in enumerate(self.samples.held_out) if number in searched]
        if not rows:
            self.skipped["retrieval"] = "no emoji is held out"
            return
        rows = sorted(random.Random(0).sample(rows, min(MAX_SEARCHED, len(rows))))
        found = self.real.nearest(self.drawn_NHWC[rows], among)
        right = found == self.real.classes[[self.samples.held_out[row] for row in rows]]
        what = "emoji" if "emoji" in kinds else "pictures"
        yield figure_of("retrieval", f"held out, among {len(among):,} {what}", proportion(right.tolist()))

    def frechet(self) -> Iterator[Figure]:
        """Of the held-out pictures and their reconstructions."""
        if self.judge.teacher is None:
            return
        if self.num_held_out < _MIN_FRECHET:
            self.skipped["Fréchet distance"] = f"{self.num_held_out} held-out pictures; needs {_MIN_FRECHET} or more"
            return
        real_ND = self.coded.from_teacher_ND[: self.num_held_out]
        drawn_ND = deep_features(self.judge.teacher, self.drawn_NHWC, self.tokenizer)
        if is_too_small(*real_ND.shape):
            self.warnings.append(
                f"Fréchet distance: {self.num_held_out} pictures are too few for {real_ND.shape[1]} features (under "
                "two a feature); the covariances are shrunk (Ledoit and Wolf), so it compares with no other sample size"
            )
        distance = frechet_distance(real_ND, drawn_ND)
        yield Figure("Fréchet distance", "held out, real to drawn", distance, None, None, self.num_held_out)

    def speed(self) -> Iterator[Figure]:
        """Of encoding and decoding."""
        numbers = [self.coded.numbers[i % len(self.coded.numbers)] for i in range(BATCH)]
        pixels_BCHW = self.real.pixels(numbers)
        codes = codes_of(self.tokenizer, self.coded.codes_NKT[self.coded.rows_of(numbers)])
        device = self.tokenizer.device
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        where = f"{where}, threads: {torch.get_num_threads()}" if device.type == "cpu" else where
        # Both give their results on the CPU, so the clock needs no other synchronisation.
        for name, work in (
            ("encoding", lambda: self.tokenizer.encode_pixels(pixels_BCHW)),
            ("decoding", lambda: self.tokenizer.decode_codes(codes, self.tokenizer.grid_hw)),
        ):
            work()
            start = time.perf_counter()
            for _ in range(_SPEED_BATCHES):
                work()
            rate_hz = _SPEED_BATCHES * BATCH / (time.perf_counter() - start)
            yield Figure("speed", f"{name}, {where}", rate_hz, None, None, _SPEED_BATCHES * BATCH)
