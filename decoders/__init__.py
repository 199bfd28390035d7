"""Optional renderers: from a picture's or sound's codes, or from voken hidden states, to media by diffusion.

A bundle carries each of them as a folder `decoders/NAME/` in diffusers' layout. The renderers themselves come after
the first release; what stands here is how a bundle says which ones it has.
"""

from __future__ import annotations

from pathlib import Path

INDEX_FILE = "model_index.json"


def list_renderers(folder: Path) -> tuple[str, ...]:
    """Names of the renderers in a bundle's `decoders` folder, sorted; empty where there is none."""
    return tuple(sorted(path.parent.name for path in folder.glob(f"*/{INDEX_FILE}")))
