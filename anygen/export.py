"""`anygen export`: a model as a plain Qwen3 directory, for programs that know nothing of anygen.

    config.json, generation_config.json, model*.safetensors     opened by transformers, vLLM, SGLang as they are
    vocabulary.json, layout.json                                 what the ids mean, and how blocks are written
    README.md                                                    the same for people, with the commands
    manifest.json                                                sha256 of every file

Tokenizers stay behind (they are named by fingerprint): such programs take ids and give ids.
"""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import Any, Literal

import jinja2
import torch

from anygen._version import __version__
from anygen.bundle import ANYGEN_JSON, bundle_folder, load_bundle
from anygen.errors import CheckpointError, InputError
from anygen.files import publishing, write_json
from anygen.layout import Layout
from anygen.model.causal import num_parameters
from anygen.stages.pretrain import load_pretrained
from anygen.vocabulary import TASKS, Vocabulary

DType = Literal["bf16", "fp32"]
MAX_SHARD = "5GB"
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def export_model(source: Path, out: Path, *, dtype: DType = "bf16") -> Path:
    """Write the model of a bundle, or of a pretrain stage's `model/`, to `out`, atomically; returns `out`.

    Raises:
        InputError: no such source, an unknown dtype, or `out` is a file or a folder that holds something.
        CheckpointError: the source is neither, or damaged.
    """
    if dtype not in _DTYPES:
        raise InputError(f"dtype must be {' or '.join(_DTYPES)}; got {dtype!r}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not an empty folder; nothing is written over: choose another, or remove it")
    model, vocabulary, layout = _open(source)
    page = _page(vocabulary, layout, model, source=source, dtype=dtype)
    model.to(_DTYPES[dtype])
    with publishing(out) as folder:
        model.save_pretrained(folder, max_shard_size=MAX_SHARD)
        write_json(folder / "vocabulary.json", vocabulary.manifest())
        write_json(folder / "layout.json", layout.to_json())
        (folder / "README.md").write_text(page + "\n", encoding="utf-8")
    return out


def _open(source: Path) -> tuple[Any, Vocabulary, Layout]:
    source = bundle_folder(source)
    if not source.is_dir():
        raise InputError(
            f"there is no model at {source}: expected a bundle, nano (the embedded one), or the folder model of a "
            "pretrain stage"
        )
    if (source / ANYGEN_JSON).is_file():
        bundle = load_bundle(source, device="cpu")
        return bundle.model, bundle.vocabulary, bundle.layout
    if not (source / "vocabulary.json").is_file():
        raise CheckpointError(
            f"{source} is neither a bundle ({ANYGEN_JSON}) nor a pretrained model (vocabulary.json): "
            "give RUN/bundle/NAME or RUN/pretrain/model"
        )
    return load_pretrained(source)


def _page(vocabulary: Vocabulary, layout: Layout, model: Any, *, source: Path, dtype: str) -> str:
    rows, columns = layout.native_grid_hw
    text = importlib.resources.files("anygen").joinpath("export.md.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, autoescape=False)  # noqa: S701  Markdown
    return environment.from_string(text).render(
        name=source.resolve().name,
        version=__version__,
        dtype=dtype,
        parameters=num_parameters(model),
        vocabulary=vocabulary,
        layout=layout,
        control={name: vocabulary.control(name) for name in vocabulary.control_names},
        tasks=TASKS,
        has_picture="image.0" in {r.name for r in vocabulary.ranges},
        rows=rows,
        columns=columns,
    )
