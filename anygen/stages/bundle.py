"""Stage `bundle`: model, vocabulary and tokenizers of a run as one directory that anyone can open."""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import Annotated, Any, Literal

import jinja2
from pydantic import AfterValidator, Field

from anygen._version import __version__
from anygen.bundle import checked_via, save_bundle
from anygen.config import Config
from anygen.files import read_json
from anygen.judging import BestOf, checked_best_of
from anygen.model.causal import num_parameters
from anygen.plan import Way
from anygen.sampling.choose import SamplingOptions
from anygen.stages.base import StageConfig, StageResult
from anygen.stages.pretrain import load_pretrained, open_tokenizers


class OptionsConfig(Config):
    """Sampling defaults of one modality; see `anygen.sampling.choose.SamplingOptions`."""

    temperature: float = Field(1.0, ge=0, le=100)
    top_k: int = Field(0, ge=0, le=2**31)
    top_p: float = Field(1.0, ge=1e-6, le=1)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=1e-6, le=100)
    guidance_scale: float = Field(1.0, ge=0, le=100)


class BundleConfig(StageConfig):
    """Recipe of the stage."""

    stage: Literal["bundle"] = "bundle"
    name: str
    """Name in provenance and on the model card."""
    defaults: dict[Literal["text", "image", "audio", "region", "control"], OptionsConfig] = {}
    """Sampling options by modality of the id that is drawn."""
    via: Annotated[dict[str, Way], AfterValidator(checked_via)] = Field({}, exclude_if=lambda via: not via)
    """Direction (`"audio>image": text`) to what is written before the answer and kept out of it."""
    best_of: Annotated[dict[str, BestOf], AfterValidator(checked_best_of)] = Field(
        {}, exclude_if=lambda usual: not usual
    )
    """Direction (`"text>image": 8`) to how many answers are drawn for one that is kept; see `BestOf`."""
    notes: str = ""
    """Paragraph for the model card: data, licences, limits."""


def main(config: BundleConfig) -> StageResult:
    """Write the bundle; equal inputs give equal bytes."""
    model, vocabulary, layout = load_pretrained(_newest(config.root, "vokens", "pretrain") / "model")
    tokenizers = open_tokenizers(config.root, location_bins=vocabulary.range("region").size)
    stages = {
        path.parent.name: read_json(path)
        for path in sorted(config.root.glob("*/stage.json"))
        if path.parent.name not in ("bundle", "evaluate", "gallery")
    }
    provenance = {
        "name": config.name,
        "anygen": __version__,
        "recipes": {name: facts["config"] for name, facts in stages.items()},
        "figures": {name: figures for name, facts in stages.items() if (figures := _exact(facts))},
    }
    decoders = _decoders(config.root)
    facts: dict[str, Any] = {
        "name": config.name,
        "decoders": sorted(decoders),
        "notes": config.notes,
        "parameters": num_parameters(model),
        "vocabulary": vocabulary,
        "layout": layout,
        "tokenizers": tokenizers,
        "metrics": provenance["figures"],
        "version": __version__,
    }
    save_bundle(
        config.folder / config.name,
        model=model,
        vocabulary=vocabulary,
        layout=layout,
        tokenizers=tokenizers,
        defaults={name: SamplingOptions(**options.model_dump()) for name, options in config.defaults.items()},
        provenance=provenance,
        card=_card(facts),
        decoders=decoders,
        via=config.via,
        best_of=config.best_of,
    )
    size = sum(p.stat().st_size for p in (config.folder / config.name).rglob("*") if p.is_file())
    return StageResult(config.folder, (config.folder / config.name,), {"megabytes": size / 1e6})


def _newest(root: Path, *stages: str) -> Path:
    """The folder of the first of these stages that was done; of the last where none was."""
    return next((root / stage for stage in stages if (root / stage / "stage.json").exists()), root / stages[-1])


def _decoders(root: Path) -> dict[str, Path]:
    """The diffusion decoder of pictures: of stage `vokens`, else of stage `decoder`, else none."""
    made = [folder for folder in (root / "vokens" / "decoder", root / "decoder" / "model") if folder.is_dir()]
    done = [folder for folder in made if (folder.parent / "stage.json").exists()]
    return {"image": done[0]} if done else {}


def _exact(stage: dict[str, Any]) -> dict[str, float]:
    """The figures that a resumed run repeats to the last bit: means over the last steps begin anew at a restart."""
    has_trained = any(key.endswith("loop") for key in stage["config"])
    figures: dict[str, float] = stage["metrics"]
    return {name: value for name, value in figures.items() if not has_trained or name.startswith("validation_")}


def _card(facts: dict[str, Any]) -> str:
    source = importlib.resources.files("anygen.stages").joinpath("card.md.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, autoescape=False)  # noqa: S701  Markdown
    return environment.from_string(source).render(facts)
