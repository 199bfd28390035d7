"""`anygen inspect`: what a path holds, in facts.

Bundles, tokenizers, runs, checkpoints, shards, recipes, generated files.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from anygen.errors import AnyGenError, CheckpointError, InputError
from anygen.files import MANIFEST, is_published, read_json

Facts = dict[str, Any]


def inspect_path(path: Path) -> Facts:
    """Facts about a path, JSON-able; `kind` says what it is.

    Raises:
        InputError: the path does not exist, or is nothing that anygen writes or reads.
        AnyGenError: it is, but broken.
    """
    from tokenizers_mm.weights import UNREADABLE

    if str(path) == "nano":
        from anygen.bundle import bundle_folder

        path = bundle_folder(path)
    if not path.exists():
        raise InputError(f"there is nothing at {path}")
    for test, describe in _KINDS:
        if test(path):
            try:
                return describe(path)
            except AnyGenError:
                raise
            except (*UNREADABLE, SyntaxError, IndexError, struct.error) as error:
                raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    raise InputError(f"{path} is not a bundle, run, tokenizer, checkpoint, shard, recipe or generated file")


def _bundle(path: Path) -> Facts:
    from anygen.bundle import load_bundle
    from anygen.judging import best_of_to_json
    from anygen.model.causal import num_parameters

    bundle = load_bundle(path, device="cpu")
    return {
        "kind": "bundle",
        "name": bundle.provenance.get("name"),
        "parameters": num_parameters(bundle.model),
        "megabytes": round(sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) / 1e6, 2),
        "ids": bundle.vocabulary.size,
        "ranges": {r.name: [r.start, r.stop] for r in bundle.vocabulary.ranges},
        "layout": bundle.layout.to_json(),
        "defaults": {name: options.to_json() for name, options in bundle.defaults.items()},
        "via": dict(bundle.via),
        "best_of": best_of_to_json(bundle.best_of),
        "diffusion decoders": {name: list(drivers) for name, drivers in bundle.renderers.items()},
    }


def _run(path: Path) -> Facts:
    from anygen.stages.catalogue import STAGES
    from anygen.stages.run import STAGE_JSON

    stages = {}
    for stage in STAGES:
        folder = path / stage
        if (folder / STAGE_JSON).exists():
            stages[stage] = {"done": True, "metrics": read_json(folder / STAGE_JSON)["metrics"]}
        elif folder.is_dir():
            stages[stage] = {"done": False}
    return {"kind": "run", "stages": stages}


def _checkpoint(path: Path) -> Facts:
    from safetensors import safe_open

    with safe_open(path / "state.safetensors", "np") as file:
        names = list(file.keys())
    state = read_json(path / "state.json")
    return {
        "kind": "checkpoint",
        "step": state["step"],
        "module_tensors": sum(name.startswith("module.") for name in names),
        "optimizer_tensors": sum(name.startswith("optimizer.") for name in names),
        "undamaged": is_published(path),
    }


def _picture_tokenizer(path: Path) -> Facts:
    from tokenizers_mm.image import ImageTokenizer

    tokenizer = ImageTokenizer.load(path)
    return {
        "kind": "picture tokenizer",
        "grid": list(tokenizer.grid_hw),
        "codebooks": tokenizer.num_codebooks,
        "codes": tokenizer.codebook_size,
        "parameters": sum(p.numel() for m in (tokenizer.encoder, tokenizer.pixel_head) for p in m.parameters()),
        "fingerprint": tokenizer.fingerprint,
    }


def _sound_tokenizer(path: Path) -> Facts:
    from anygen.stages.published_codec import codec_facts
    from tokenizers_mm.audio import AudioTokenizer

    return {"kind": "sound tokenizer", **codec_facts(AudioTokenizer.load(path))}


def _is_tokenizer_of(kind: str) -> Callable[[Path], bool]:
    def test(path: Path) -> bool:
        from anygen.evaluation.tokenizers import kind_of

        return kind_of(path) == kind

    return test


def _coded_shard(path: Path) -> Facts:
    lines = (path / "records.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    return {
        "kind": "coded shard",
        "records": len(lines),
        "codes": (path / "codes.bin").stat().st_size // 2,
        "tokenizers": read_json(path / "facts.json"),
        "undamaged": is_published(path),
    }


def _record_shard(path: Path) -> Facts:
    from anygen.data.records import RecordStore

    store = RecordStore([path])
    first = store[0] if len(store) else None
    return {
        "kind": "record shard",
        "records": len(store),
        "pictures": sum(store.has_picture(i) for i in range(len(store))),
        "sounds": sum(store.num_sounds(i) for i in range(len(store))),
        "first": None if first is None else {"key": first.key, "kind": first.kind, "captions": list(first.captions)},
    }


def _recipe(path: Path) -> Facts:
    from anygen.stages.run import load_recipe

    return {"kind": "recipe", **load_recipe(path).model_dump(mode="json")}


def _picture(path: Path) -> Facts:
    from PIL import Image

    with Image.open(path, formats=("PNG",)) as picture:
        text = picture.info.get("anygen")
        size = list(picture.size)
    if not isinstance(text, str):
        raise InputError(f"{path} was not generated by anygen, or its provenance was stripped")
    return {"kind": "generated picture", "size": size, "provenance": json.loads(text)}


def _answer(path: Path) -> Facts:
    """A text or sound of `Output.save`, or its JSON: the provenance lies in the JSON."""
    if (path.parent / "anygen.json").is_file():
        raise InputError(f"{path} is part of a bundle: inspect {path.parent}")
    sidecar = path if path.suffix == ".json" else path.with_name(f"{path.name.split('-')[0]}.json")
    facts = read_json(sidecar) if sidecar.is_file() else {}
    if "request" not in facts or (path != sidecar and path.name not in facts.get("files", ())):
        raise InputError(f"{path} was not generated by anygen, or the JSON that lay beside it is gone")
    return {"kind": "generated answer", **{name: value for name, value in facts.items() if name != "ids"}}


_KINDS: list[tuple[Callable[[Path], bool], Callable[[Path], Facts]]] = [
    (lambda p: (p / "anygen.json").is_file(), _bundle),
    (_is_tokenizer_of("picture"), _picture_tokenizer),
    (_is_tokenizer_of("sound"), _sound_tokenizer),
    (lambda p: (p / "state.safetensors").is_file(), _checkpoint),
    (lambda p: (p / "records.jsonl").is_file() and (p / MANIFEST).is_file(), _coded_shard),
    (lambda p: p.is_dir() and any(p.glob("*/started.json")), _run),
    (lambda p: p.suffix == ".tar", _record_shard),
    (lambda p: p.suffix in (".yaml", ".yml"), _recipe),
    (lambda p: p.suffix == ".png", _picture),
    (lambda p: p.suffix in (".json", ".txt", ".wav"), _answer),
]
