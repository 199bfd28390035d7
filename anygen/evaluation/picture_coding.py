"""Sample pictures through a picture tokenizer and past its teacher, once: codes, features and reconstructions.

Dimension key: N pictures, K codebooks, T codes of one codebook, D features, H x W pixels, C colours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from anygen.errors import CheckpointError, ConfigError, InputError
from anygen.evaluation.picture_samples import Bytes, RealPictures, to_bytes
from anygen.training.metrics import Progress
from tokenizers_mm.features import FeatureDecoder
from tokenizers_mm.image import ImageTokenizer
from tokenizers_mm.teacher import TeacherConfig, VisionTeacher

BATCH = 64
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Judge:
    """What looks at pictures with the teacher's eyes, as far as it is there."""

    decoder: FeatureDecoder | None
    """From codes to what the teacher would see."""
    teacher: VisionTeacher | None
    missing: dict[str, str]
    """Name of what is not there -> why."""


def open_judge(tokenizer: Path, *, teacher: Path | None = None, device: torch.device) -> Judge:
    """The feature decoder beside a tokenizer, and the teacher that its configuration names.

    Args:
        tokenizer: a picture tokenizer's folder; the decoder lies in `../features`, a run's own teacher in
        `../../teacher/model`.
        teacher: another folder of the same teacher in transformers' layout.
        device: where both are to work.

    Raises:
        CheckpointError, ConfigError: what is there, or was named here, is broken.
        InputError: the features of the teacher named here are not those that the decoder predicts.
    """
    beside = tokenizer.resolve().parent
    missing: dict[str, str] = {}
    decoder = None
    if (beside / "features").is_dir():
        decoder = FeatureDecoder.load(beside / "features").to(device)
    else:
        missing["feature decoder"] = f"there is no {beside / 'features'}: training writes it beside the tokenizer"
    config = decoder.config.teacher if decoder else TeacherConfig()
    path = teacher or config.path or beside.parent / "teacher" / "model"
    eyes = None
    try:
        eyes = VisionTeacher.open(config.model_copy(update={"path": path})).to(device)
    except (CheckpointError, ConfigError) as error:
        if teacher is not None:
            raise
        missing["teacher"] = f"{error}; name its folder with --teacher"
    if decoder and eyes:
        _check_widths(decoder, eyes, path)
    return Judge(decoder, eyes, missing)


def _check_widths(decoder: FeatureDecoder, teacher: VisionTeacher, path: Path) -> None:
    expected = (decoder.config.deep_width, decoder.config.shallow_width)
    if (teacher.deep_width, teacher.shallow_width) != expected:
        raise InputError(
            f"the teacher in {path} has {teacher.deep_width} deep and {teacher.shallow_width} shallow features; the "
            f"tokenizer was trained to predict {expected[0]} and {expected[1]}: name the teacher it was trained against"
        )


@dataclass(frozen=True)
class Coded:
    """Pictures by number, and what became of them; empty arrays (N x 0) where decoder or teacher are not there."""

    numbers: tuple[int, ...]
    codes_NKT: npt.NDArray[np.int64]
    from_codes_ND: Floats
    """What the decoder predicts, deep, mean over patches."""
    from_teacher_ND: Floats
    """The teacher's own deep features, mean over patches."""
    cosines_N2: Floats
    """Of prediction and teacher, deep and shallow, mean over patches."""

    def rows_of(self, numbers: Sequence[int]) -> list[int]:
        """The rows of some of the pictures."""
        place = {number: row for row, number in enumerate(self.numbers)}
        return [place[number] for number in numbers]


def code_pictures(tokenizer: ImageTokenizer, real: RealPictures, judge: Judge, numbers: Sequence[int]) -> Coded:
    """Encode pictures; batch by batch, so that memory holds one batch of features of patches."""

    def look(batch: Sequence[int]) -> tuple[npt.NDArray[Any], ...]:
        pixels_BCHW = real.pixels(batch)
        codes = tokenizer.encode_pixels(pixels_BCHW)
        codes_BKT = codes.reshape(len(codes), tokenizer.num_codebooks, -1)
        return (codes_BKT.numpy(), *(part.float().cpu().numpy() for part in _see(tokenizer, judge, pixels_BCHW, codes)))

    return Coded(tuple(numbers), *_batched("encoding", look, numbers))


@torch.inference_mode()
def _see(tokenizer: ImageTokenizer, judge: Judge, pixels_BCHW: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Predicted and real deep features and the cosines, B x D, B x D and B x 2."""
    nothing = torch.empty(len(codes), 0)
    predicted = judge.decoder and judge.decoder(
        tokenizer.encoder.vectors_of(codes.to(tokenizer.device)), tokenizer.grid_hw
    )
    real = judge.teacher and judge.teacher(pixels_BCHW.to(tokenizer.device), tokenizer.grid_hw)
    cosines = nothing
    if predicted and real:
        pairs = ((predicted.deep_BND, real.deep_BND), (predicted.shallow_BND, real.shallow_BND))
        cosines = torch.stack([F.cosine_similarity(a.float(), b, dim=-1).mean(dim=1) for a, b in pairs], dim=1)
    deep = [features.deep_BND.mean(dim=1) if features else nothing for features in (predicted, real)]
    return deep[0], deep[1], cosines


def reconstruct(tokenizer: ImageTokenizer, coded: Coded, numbers: Sequence[int]) -> Bytes:
    """The pictures that some of the codes give, N x H x W x C."""

    def draw(rows: Sequence[int]) -> tuple[npt.NDArray[Any], ...]:
        return (to_bytes(tokenizer.decode_codes(codes_of(tokenizer, coded.codes_NKT[rows]), tokenizer.grid_hw)),)

    drawn: Bytes = _batched("decoding", draw, coded.rows_of(numbers))[0]
    return drawn


def codes_of(tokenizer: ImageTokenizer, codes_NKT: npt.NDArray[np.int64]) -> Tensor:
    """Codes as the tokenizer takes them: without the axis of codebooks where there is one."""
    codes = torch.from_numpy(codes_NKT)
    return codes[:, 0] if tokenizer.num_codebooks == 1 else codes


def deep_features(teacher: VisionTeacher, pictures_NHWC: Bytes, tokenizer: ImageTokenizer) -> Floats:
    """The teacher's deep features of pictures, mean over patches, N x D."""

    @torch.inference_mode()
    def look(rows: Sequence[int]) -> tuple[npt.NDArray[Any], ...]:
        pixels_BCHW = torch.from_numpy(pictures_NHWC[rows]).permute(0, 3, 1, 2).float().to(tokenizer.device) / 255
        return (teacher(pixels_BCHW, tokenizer.grid_hw).deep_BND.mean(dim=1).cpu().numpy(),)

    features: Floats = _batched("looking", look, range(len(pictures_NHWC)))[0]
    return features


def _batched(
    title: str, work: Callable[[Sequence[int]], tuple[npt.NDArray[Any], ...]], items: Sequence[int]
) -> list[npt.NDArray[Any]]:
    """Every array that `work` gives for batches of items, joined."""
    progress = Progress(title, len(items))
    parts = []
    for start in range(0, len(items), BATCH):
        batch = list(items[start : start + BATCH])
        parts.append(work(batch))
        progress.advance(count=len(batch))
    progress.close()
    return [np.concatenate(column) for column in zip(*parts, strict=True)]
