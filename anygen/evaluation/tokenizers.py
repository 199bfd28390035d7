"""Which tokenizer lies in a folder, and its evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from anygen.errors import InputError
from anygen.evaluation import picture_page, pictures, sound_page, sounds
from anygen.evaluation.report import lines_of


def kind_of(folder: Path) -> Literal["picture", "sound"] | None:
    """The tokenizer in a folder; None for everything else."""
    if picture_page.is_picture_tokenizer(folder):
        return "picture"
    return "sound" if sound_page.is_sound_tokenizer(folder) else None


def evaluate_tokenizer(
    folder: Path, *, data: Path | None, teacher: Path | None, out: Path, limit: int | None
) -> tuple[dict[str, Any], list[str]]:
    """Evaluate it; its report, also as lines of text.

    Raises:
        InputError: a teacher for sounds.
        AnyGenError: as its evaluation tells.
    """
    if kind_of(folder) == "picture":
        report = picture_page.evaluate_folder(folder, data=data, teacher=teacher, out=out, limit=limit)
        return report, lines_of(report, pictures.EXPLAINED)
    if teacher:
        raise InputError("--teacher is for picture tokenizers; this is a sound tokenizer")
    report = sound_page.evaluate_folder(folder, data=data, out=out, limit=limit)
    return report, lines_of(report, sounds.EXPLAINED)
