"""The renderers that a bundle carries: which there are, told from their index alone, and one of them opened.

Each is a folder `decoders/NAME/` in diffusers' layout. Only opening one needs diffusers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from decoders.optional import load_diffusers
from tokenizers_mm.errors import CheckpointError
from tokenizers_mm.weights import UNREADABLE

INDEX_FILE = "model_index.json"
DRIVERS = ("codes", "vokens")


def carried(folder: Path) -> dict[str, tuple[str, ...]]:
    """The renderers in a bundle's `decoders` folder: name to what drives them; empty where there is none.

    Raises:
        CheckpointError: an index that cannot be read.
    """
    return {path.parent.name: _drivers(path) for path in sorted(folder.glob(f"*/{INDEX_FILE}"))}


def _drivers(path: Path) -> tuple[str, ...]:
    try:
        return tuple(name for name in DRIVERS if _index(path).get(name, [None])[0] is not None)
    except (AttributeError, TypeError, IndexError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(index, dict):
        raise CheckpointError(f"{path} cannot be read: it is not a JSON object")
    return index


def open_renderer(folder: Path | str, *, device: torch.device) -> Any:
    """The renderer in a folder, ready to draw.

    Raises:
        MissingDependency: diffusers is absent or broken.
        CheckpointError: it cannot be read.
    """
    load_diffusers().utils.logging.disable_progress_bar()
    from decoders.decoder import FlowDecoder
    from decoders.prompt import PromptDecoder

    if _index(Path(folder) / INDEX_FILE).get("_class_name") == PromptDecoder.__name__:
        return PromptDecoder.from_pretrained(folder).to(device)
    try:
        return FlowDecoder.from_pretrained(folder, local_files_only=True, dtype=torch.float32).to(device)
    except UNREADABLE as error:
        raise CheckpointError(f"the decoder in {folder} cannot be read: {str(error).splitlines()[0]}") from error
