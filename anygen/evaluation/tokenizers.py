"""Which tokenizer lies in a folder, and its evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from anygen.errors import InputError
from anygen.evaluation import picture_page, pictures, sound_page, sounds
from anygen.evaluation.report import lines_of
from tokenizers_mm.image import KIND


def kind_of(folder: Path) -> Literal["picture", "sound"] | None:
    """The tokenizer in a folder, whole or broken; None for everything else."""
    try:
        facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(facts, dict):
        return None
    if facts.get("kind") == KIND:
        return "picture"
    return "sound" if facts.get("model_type") == "encodec" else None


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
