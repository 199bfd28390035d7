"""A bundle: one directory that is everything, weights, vocabulary, tokenizers and defaults.

    config.json, model.safetensors     a plain Qwen3 checkpoint: transformers, vLLM and others open it as it is
    anygen.json                        format, vocabulary manifest, layout, sampling defaults, provenance
    tokenizers/{text,image,audio}/     tokenizers/audio is a transformers.EncodecModel
    decoders/*/                        optional diffusion renderers
    README.md, manifest.json           model card; sha256 of every file

safetensors and JSON only; nothing in a bundle chooses which code runs.
"""

from __future__ import annotations

import importlib.resources
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch

from anygen.documents import Tokenizers
from anygen.errors import CheckpointError, InputError
from anygen.files import MANIFEST, publishing, read_json, verify, write_json
from anygen.judging import BestOf, best_of_to_json, checked_best_of
from anygen.layout import Layout
from anygen.plan import Way, misfit
from anygen.sampling.choose import SamplingOptions
from anygen.vocabulary import Vocabulary
from decoders.carried import carried, open_renderer
from tokenizers_mm import compat  # noqa: F401  before transformers
from tokenizers_mm.audio import AudioTokenizer
from tokenizers_mm.codes import Modality
from tokenizers_mm.image import ImageTokenizer
from tokenizers_mm.llm_text import load_text_tokenizer
from tokenizers_mm.regions import RegionTokenizer
from tokenizers_mm.weights import UNREADABLE

FORMAT = 1
ANYGEN_JSON = "anygen.json"
MAX_SHARD = "14MB"


@dataclass(frozen=True)
class Bundle:
    """An opened bundle."""

    folder: Path
    model: Any
    """A `Qwen3ForCausalLM`, fp32."""
    vocabulary: Vocabulary
    layout: Layout
    tokenizers: Tokenizers
    defaults: Mapping[str, SamplingOptions]
    """Sampling options by modality, and for `control` ids."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    renderers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The diffusion decoders it carries: name (`image`) to what drives them (`codes`, `vokens`)."""
    via: Mapping[str, Way] = field(default_factory=dict)
    """Direction (`audio>image`) to what it writes before its answer, where nothing else is asked for."""
    best_of: Mapping[str, BestOf] = field(default_factory=dict)
    """Direction (`text>image`) to how many answers it draws for one that it keeps, and how it judges them."""
    _opened: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def renderer(self, name: str) -> Any:
        """A diffusion decoder (`decoders.decoder.FlowDecoder`), opened when first asked for.

        Raises:
            MissingDependency: diffusers is absent or broken.
            CheckpointError: it is damaged, or its grid is not that of the model's pictures.
        """
        if name not in self._opened:
            patches = self.layout.native_grid_hw[0] * self.layout.native_grid_hw[1]
            self._opened[name] = open_renderer(self.folder / "decoders" / name, device=self.model.device)
            drawn = getattr(self._opened[name], "num_patches", patches)  # a pretrained pipeline has no grid of codes
            if drawn != patches:
                del self._opened[name]
                raise CheckpointError(f"decoder {name!r} draws {drawn} patches, the model writes {patches}")
        return self._opened[name]


def default_bundle() -> Path:
    """The bundle embedded in the package.

    Raises:
        CheckpointError: this installation was built without it.
    """
    path = Path(str(importlib.resources.files("anygen"))) / "bundles" / "nano"
    if not (path / ANYGEN_JSON).is_file():
        raise CheckpointError(f"this installation holds no embedded bundle ({path}); pass the path of one")
    return path


def bundle_folder(name: str | Path | None) -> Path:
    """The folder of a bundle: None and `nano` are the embedded one, unless a folder here is called `nano`.

    Raises:
        CheckpointError: the embedded one is meant, and this installation was built without it.
    """
    if name is None or (str(name) == "nano" and not Path(name).exists()):
        return default_bundle()
    return Path(name)


def save_bundle(
    folder: Path,
    *,
    model: Any,
    vocabulary: Vocabulary,
    layout: Layout,
    tokenizers: Tokenizers,
    defaults: Mapping[str, SamplingOptions],
    provenance: Mapping[str, Any],
    card: str,
    decoders: Mapping[str, Path] | None = None,
    via: Mapping[str, str] | None = None,
    best_of: Mapping[str, BestOf] | None = None,
) -> None:
    """Publish a bundle atomically.

    Weights are written as bf16, in shards that git hosts accept; `model` is left in bf16. `decoders` are folders, by
    name, and copied as they are.
    """
    vocabulary.check(tokenizers)
    with publishing(folder) as temporary:
        model.to(torch.bfloat16).save_pretrained(temporary, max_shard_size=MAX_SHARD)
        for modality in ("text", "image", "audio"):
            if modality in tokenizers:
                tokenizers[modality].save(temporary / "tokenizers" / modality)  # type: ignore[attr-defined,index]
        for name, path in (decoders or {}).items():
            shutil.copytree(path, temporary / "decoders" / name, ignore=shutil.ignore_patterns(MANIFEST))
        write_json(
            temporary / ANYGEN_JSON,
            {
                "format": FORMAT,
                "vocabulary": vocabulary.manifest(),
                "layout": layout.to_json(),
                "defaults": {name: options.to_json() for name, options in defaults.items()},
                **({"via": dict(via)} if via else {}),
                **({"best_of": best_of_to_json(best_of)} if best_of else {}),
                "provenance": dict(provenance),
            },
        )
        (temporary / "README.md").write_text(card, encoding="utf-8")


def load_bundle(folder: str | Path | None = None, *, device: str = "auto") -> Bundle:
    """Open and check a bundle; None and `nano` open the embedded one.

    Raises:
        InputError: the path does not exist, or the device cannot be used.
        CheckpointError: not a bundle, of another format, damaged, or its parts do not belong together.
    """
    path = bundle_folder(folder)
    if not path.is_dir():
        fault = "is a file" if path.is_file() else "is not here"
        raise InputError(f"there is no bundle at {path}, which {fault}: expected a folder, or nano, the embedded model")
    if not (path / ANYGEN_JSON).is_file():
        raise CheckpointError(f"{path} is not a bundle: it has no {ANYGEN_JSON}")
    verify(path)
    facts = read_json(path / ANYGEN_JSON)
    try:
        if facts["format"] != FORMAT:
            raise CheckpointError(
                f"{path} has bundle format {facts['format']!r}; this version of anygen reads {FORMAT}"
            )
        vocabulary = Vocabulary.from_manifest(facts["vocabulary"])
        layout = Layout.from_json(facts["layout"])
        defaults = {str(name): SamplingOptions(**options) for name, options in facts["defaults"].items()}
        provenance = dict(facts["provenance"])
        via, best_of = checked_via(facts.get("via", {})), checked_best_of(facts.get("best_of", {}))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path / ANYGEN_JSON} is broken: {type(error).__name__}: {error}") from error
    target = _usable(device)
    tokenizers = load_tokenizers(path / "tokenizers", vocabulary, target)
    vocabulary.check(tokenizers)
    model = _load_model(path, vocabulary).to(target)
    renderers = carried(path / "decoders")
    return Bundle(path, model, vocabulary, layout, tokenizers, defaults, provenance, renderers, via, best_of)


def checked_via(facts: Mapping[str, Any]) -> dict[str, Way]:
    """What is written before answers, by direction.

    Raises:
        ValueError: no direction, or one of which a text cannot be written first, or not alone.
    """
    for direction, way in facts.items():
        inputs, _, outputs = direction.partition(">")
        if way not in get_args(Way) or not outputs or outputs == "any":
            raise ValueError(f"via holds directions, to any but 'any', each with one of {get_args(Way)}; got {facts!r}")
        if unfit := misfit(way, inputs.split(",") if inputs else (), outputs.split(",")):
            raise ValueError(f"via: {way!r} {unfit}; it cannot be that of {direction!r}")
    return dict(facts)


def _usable(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=torch.device(device)).device
    except (RuntimeError, AssertionError, TypeError, AttributeError) as error:
        raise InputError(
            f"device {device!r} cannot be used here: expected 'auto', 'cpu' or, with a GPU, 'cuda'"
        ) from error


def load_tokenizers(folder: Path, vocabulary: Vocabulary, device: torch.device) -> Tokenizers:
    """The tokenizers of every modality that the vocabulary has."""
    tokenizers: dict[Modality, Any] = {"text": load_text_tokenizer(folder / "text")}
    if "image" in vocabulary.modalities:
        tokenizers["image"] = ImageTokenizer.load(folder / "image").to(device)
    if "audio" in vocabulary.modalities:
        tokenizers["audio"] = AudioTokenizer.load(folder / "audio").to(device)
    if "region" in vocabulary.modalities:
        tokenizers["region"] = RegionTokenizer(vocabulary.range("region").size)
    return tokenizers


def _load_model(path: Path, vocabulary: Vocabulary) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config_json = read_json(path / "config.json")
    if not isinstance(config_json, dict) or config_json.get("model_type") != "qwen3" or "auto_map" in config_json:
        raise CheckpointError(f"{path / 'config.json'} is not of a plain Qwen3 model")
    if config_json.get("vocab_size") != vocabulary.size:
        raise CheckpointError(
            f"the model has {config_json.get('vocab_size')} ids, its vocabulary {vocabulary.size}: not of one bundle"
        )
    positions = config_json.get("max_position_embeddings")
    if not isinstance(positions, int) or positions < 1:
        raise CheckpointError(f"{path / 'config.json'} is broken: max_position_embeddings is {positions!r}")
    try:
        model, report = Qwen3ForCausalLM.from_pretrained(
            path,
            config=Qwen3Config.from_dict(config_json),
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except UNREADABLE as error:
        raise CheckpointError(f"the model in {path} cannot be read: {str(error).splitlines()[0]}") from error
    if report["missing_keys"] or report["mismatched_keys"] or report["unexpected_keys"]:
        raise CheckpointError(f"the weights in {path} do not fit its config.json")
    return model.eval().requires_grad_(False)
