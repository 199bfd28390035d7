"""Stage `gallery`: a page of what the bundle generates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from anygen.api import AnyGen
from anygen.errors import DataError
from anygen.files import sha256_of
from anygen.gallery.build import build_gallery
from anygen.gallery.exhibits import load_exhibits
from anygen.stages.base import StageConfig, StageResult


class GalleryConfig(StageConfig):
    """Recipe of the stage."""

    stage: Literal["gallery"] = "gallery"
    prompts: Path | None = None
    """A prompts file; None takes the one in the package."""

    def outside_inputs(self) -> Mapping[str, str]:
        """Hash of the prompts file."""
        return {"prompts": sha256_of(self.prompts)} if self.prompts and self.prompts.is_file() else {}


def main(config: GalleryConfig) -> StageResult:
    """Build the page from the run's bundle."""
    bundles = sorted(path.parent for path in (config.root / "bundle").glob("*/anygen.json"))
    if not bundles:
        raise DataError(f"{config.root / 'bundle'} holds no bundle: run the stage bundle first")
    page = build_gallery(AnyGen.from_pretrained(bundles[0]), config.folder / "page", load_exhibits(config.prompts))
    return StageResult(config.folder, (page,), {})
