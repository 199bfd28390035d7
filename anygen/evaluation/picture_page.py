"""`anygen evaluate TOKENIZER`: finds what belongs to a picture tokenizer, measures it, and writes a report and a page.

The page is one file without scripts; its pictures are in it. What it shows is chosen by rule, never by hand.
"""

from __future__ import annotations

import base64
import io
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from anygen._version import __version__
from anygen.evaluation.picture_coding import open_judge, reconstruct
from anygen.evaluation.picture_samples import Bytes, RealPictures
from anygen.evaluation.pictures import EXPLAINED, Evaluation, evaluate_pictures
from anygen.evaluation.report import check_out, data_of, rows_of, write_report
from tokenizers_mm.image import ImageTokenizer

NUM_SHOWN, NUM_WORST, NUM_CODES, NUM_PATCHES = 48, 16, 64, 12


@dataclass(frozen=True)
class Pair:
    """A picture beside its reconstruction, as one PNG."""

    uri: str
    label: str
    title: str


@dataclass(frozen=True)
class ShownCode:
    """A code, the patches that got it, and its own drawing."""

    code: int
    share: float
    """Of all codes of the sample."""
    drawn: str
    patches: str


def evaluate_folder(
    folder: Path, *, data: Path | None = None, teacher: Path | None = None, out: Path, limit: int | None = None
) -> dict[str, Any]:
    """Evaluate the picture tokenizer in a folder; writes `report.json` and `index.html` and returns the report.

    Args:
        folder: of the tokenizer, `RUN/image_tokenizer/tokenizer` or anywhere.
        data: folder of record shards; `RUN/data` by default.
        teacher: as `picture_coding.open_judge` takes it.
        out: where to write; an older evaluation there is replaced.
        limit: at most so many pictures of each kind and split.

    Raises:
        InputError: no data, or `out` holds something that is not an evaluation.
        AnyGenError: tokenizer, data or teacher are broken, or a package is missing.
    """
    out = check_out(out)
    data = data_of(folder, data)
    tokenizer = ImageTokenizer.load(folder)
    tokenizer.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    judge = open_judge(folder, teacher=teacher, device=tokenizer.device)
    real = RealPictures(data, tokenizer.config.side_px)
    evaluation = evaluate_pictures(tokenizer, real, judge, limit=limit)
    report = report_of(evaluation, tokenizer, real, {"tokenizer": str(folder), "data": str(data)})
    write_report(
        out,
        report,
        evaluation.figures,
        template="pictures.html.jinja",
        explained=EXPLAINED,
        galleries=_galleries(evaluation, real),
        codes=most_used_codes(evaluation, tokenizer, real),
    )
    return report


def report_of(
    evaluation: Evaluation, tokenizer: ImageTokenizer, real: RealPictures, names: dict[str, str]
) -> dict[str, Any]:
    """Everything but pictures, JSON-able: numbers that are not finite are null."""
    samples = evaluation.samples
    return {
        **names,
        "anygen": __version__,
        "codebook_size": tokenizer.codebook_size,
        "num_codebooks": tokenizer.num_codebooks,
        "codes_per_picture": math.prod(tokenizer.grid_hw) * tokenizer.num_codebooks,
        "side_px": real.side_px,
        "held_out_pictures": len(samples.held_out),
        "training_pictures": len(samples.train),
        "left_out_because_training_has_the_same_pixels": samples.num_seen,
        "figures": rows_of(evaluation.figures),
        "skipped": evaluation.skipped,
        "warnings": list(evaluation.warnings),
    }


def _galleries(evaluation: Evaluation, real: RealPictures) -> dict[str, list[Pair]]:
    """Heading -> pairs: the first of each kind, and the worst."""
    kinds: dict[str, list[int]] = {}
    for row, number in enumerate(evaluation.samples.held_out):
        kinds.setdefault(real.records[number].kind, []).append(row)
    chosen = {
        f"The first {NUM_SHOWN} held-out pictures of kind {kind}": rows[:NUM_SHOWN] for kind, rows in kinds.items()
    }
    worst = np.argsort(evaluation.psnr_db, kind="stable")[:NUM_WORST].tolist()
    chosen[f"The {NUM_WORST} held-out pictures with the lowest PSNR"] = worst
    return {heading: [_pair(evaluation, real, row) for row in rows] for heading, rows in chosen.items()}


def _pair(evaluation: Evaluation, real: RealPictures, row: int) -> Pair:
    number = evaluation.samples.held_out[row]
    both_HWC = np.concatenate([real.bytes_of([number])[0], evaluation.reconstructions[row]], axis=1)
    record = real.records[number]
    title = record.captions[0] if record.captions else record.key
    return Pair(_uri(both_HWC), f"{evaluation.psnr_db[row]:.1f} dB", title)


def most_used_codes(evaluation: Evaluation, tokenizer: ImageTokenizer, real: RealPictures) -> list[ShownCode]:
    """The most used codes of the first codebook, each with patches of different pictures, drawn at random."""
    codes_NT = evaluation.coded.codes_NKT[:, 0]
    hits_V = np.bincount(codes_NT.ravel(), minlength=tokenizer.codebook_size)
    generator = random.Random(0)
    shown = []
    for code in np.argsort(-hits_V, kind="stable")[:NUM_CODES].tolist():
        if not hits_V[code]:
            break
        rows = np.flatnonzero((codes_NT == code).any(axis=1)).tolist()
        rows = sorted(generator.sample(rows, min(NUM_PATCHES, len(rows))))
        places = [generator.choice(np.flatnonzero(codes_NT[row] == code).tolist()) for row in rows]
        numbers = [evaluation.coded.numbers[row] for row in rows]
        real_MHWC = patches_at(real.bytes_of(numbers), places, tokenizer)
        drawn_MHWC = patches_at(reconstruct(tokenizer, evaluation.coded, numbers), places, tokenizer)
        mean_HWC = drawn_MHWC.mean(axis=0).round().astype(np.uint8)
        strip_HWC = np.concatenate(list(real_MHWC), axis=1)
        shown.append(ShownCode(code, float(hits_V[code] / hits_V.sum()), _uri(mean_HWC), _uri(strip_HWC)))
    return shown


def patches_at(pictures_MHWC: Bytes, places: Sequence[int], tokenizer: ImageTokenizer) -> Bytes:
    """One patch of each picture; places count in row order."""
    side, columns = tokenizer.config.patch_px, tokenizer.grid_hw[1]
    corners = [(place // columns * side, place % columns * side) for place in places]
    return np.stack(
        [
            picture_HWC[top : top + side, left : left + side]
            for picture_HWC, (top, left) in zip(pictures_MHWC, corners, strict=True)
        ]
    )


def _uri(pixels_HWC: Bytes) -> str:
    """A PNG as a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
