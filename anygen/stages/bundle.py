"""Stage `bundle`: model, vocabulary and tokenizers of a run as one directory that anyone can open."""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jinja2
from pydantic import AfterValidator, Field, model_validator

from anygen._version import __version__
from anygen.bundle import Bundle, bundle_folder, checked_via, load_bundle, save_bundle
from anygen.config import Config
from anygen.errors import ConfigError
from anygen.files import MANIFEST, read_json, sha256_of
from anygen.judging import BestOf, checked_best_of
from anygen.layout import Layout
from anygen.model.causal import num_parameters
from anygen.plan import Way
from anygen.sampling.choose import SamplingOptions
from anygen.stages.base import StageConfig, StageResult, check_elsewhere
from anygen.stages.from_bundle import PARTS, identity_of
from anygen.stages.pretrain import load_pretrained, open_tokenizers
from anygen.vocabulary import Vocabulary


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
    weights_of: Path | None = Field(None, exclude_if=lambda bundle: bundle is None)
    """A bundle whose transformer is taken, where the run trained none (`nano`: the embedded one). Tokenizers are the
    run's, or else the bundle's: they must have the same codes, but may decode them otherwise."""
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

    @model_validator(mode="before")
    @classmethod
    def _goes_on_from_there(cls, values: Any) -> Any:
        named = isinstance(values, dict) and values.get("weights_of") is not None
        return {**values, "earlier_run": values.get("earlier_run") or values["weights_of"]} if named else values

    def check(self) -> None:
        """A transformer that does not fit is told before anything is moved."""
        if self.weights_of is None:
            return
        check_elsewhere("weights_of", bundle_folder(self.weights_of), self.folder)
        for stage in ("pretrain", "vokens"):
            if (self.root / stage).is_dir() and not (self.root / stage).is_symlink():
                raise ConfigError(
                    f"weights_of takes the transformer of {self.weights_of}, but {self.root} has one of its own "
                    f"({stage}): leave weights_of out, or name another root"
                )
        bundle = load_bundle(self.weights_of, device="cpu")
        bundle.vocabulary.check(open_tokenizers(self.root, location_bins=bundle.vocabulary.range("region").size))

    def elsewhere(self) -> tuple[str, ...]:
        """The transformer comes from a bundle, where one is named."""
        return () if self.weights_of is None else ("pretrain",)

    def outside_inputs(self) -> Mapping[str, str]:
        """The bundle whose transformer is taken, and the tokenizers that it gets: else these come with pretrain."""
        if self.weights_of is None:
            return {}
        manifest = bundle_folder(self.weights_of) / MANIFEST
        made = {name: self.root / f"{name}_tokenizer" / "stage.json" for name in ("text", "image", "audio")}
        identities = {name: str(read_json(path)["identity"]) for name, path in made.items() if path.exists()}
        return identities | ({MANIFEST: sha256_of(manifest)} if manifest.is_file() else {})


def main(config: BundleConfig) -> StageResult:
    """Write the bundle; equal inputs give equal bytes."""
    model, vocabulary, layout, provenance = _transformer(config)
    tokenizers = open_tokenizers(config.root, location_bins=vocabulary.range("region").size)
    decoders = _decoders(config.root, of_vokens=config.weights_of is None)
    facts: dict[str, Any] = {
        "name": config.name,
        "decoders": sorted(decoders),
        "notes": config.notes,
        "parameters": num_parameters(model),
        "vocabulary": vocabulary,
        "layout": layout,
        "tokenizers": tokenizers,
        "metrics": provenance.get("figures", {}),
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


class _Transformer(NamedTuple):
    """A model, and the provenance of everything that goes with it."""

    model: Any
    vocabulary: Vocabulary
    layout: Layout
    provenance: dict[str, Any]


def _transformer(config: BundleConfig) -> _Transformer:
    """What the run has trained, or the bundle that `weights_of` names."""
    named = {"name": config.name, "anygen": __version__}
    if config.weights_of is not None:
        bundle = load_bundle(config.weights_of, device="cpu")
        told = _changed(bundle, config.root)
        return _Transformer(bundle.model, bundle.vocabulary, bundle.layout, {**bundle.provenance, **named, **told})
    stages = {
        path.parent.name: read_json(path)
        for path in sorted(config.root.glob("*/stage.json"))
        if path.parent.name not in ("bundle", "evaluate", "gallery")
    }
    trained = load_pretrained(_newest(config.root, "vokens", "pretrain") / "model")
    return _Transformer(*trained, provenance=named | _told(stages))


def _told(stages: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Recipes and figures of stages."""
    return {
        "recipes": {name: facts["config"] for name, facts in stages.items()},
        "figures": {name: figures for name, facts in stages.items() if (figures := _exact(facts))},
    }


def _changed(bundle: Bundle, root: Path) -> dict[str, Any]:
    """Provenance of a bundle whose parts are the run's: their recipes in place of its own, which `changed` keeps.

    The recipe of stage data remains that of the transformer; that of a part stands in `changed` too.
    """
    stages = {
        stage: facts
        for stage, (part, _) in PARTS.items()
        if (path := root / stage / "stage.json").exists()
        and (facts := read_json(path))["identity"] != identity_of(bundle.folder / part)
    }
    told, before = _told(stages), bundle.provenance
    if not stages:
        return {}
    data = root / "data" / "stage.json"
    recipes = told["recipes"] | ({"data": read_json(data)["config"]} if data.exists() else {})
    instead_of = {name: recipe for name, recipe in before.get("recipes", {}).items() if name in stages}
    changed = {"recipes": recipes, "instead_of": instead_of}
    return {
        "recipes": before.get("recipes", {}) | told["recipes"],
        "figures": {k: v for k, v in before.get("figures", {}).items() if k not in stages} | told["figures"],
        "changed": changed | ({"before": before["changed"]} if "changed" in before else {}),
    }


def _newest(root: Path, *stages: str) -> Path:
    """The folder of the first of these stages that was done; of the last where none was."""
    return next((root / stage for stage in stages if (root / stage / "stage.json").exists()), root / stages[-1])


def _decoders(root: Path, *, of_vokens: bool) -> dict[str, Path]:
    """The diffusion decoder of pictures: of stage `vokens`, else of stage `decoder`, else none."""
    made = [*([root / "vokens" / "decoder"] if of_vokens else []), root / "decoder" / "model"]
    done = [folder for folder in made if folder.is_dir() and (folder.parent / "stage.json").exists()]
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
