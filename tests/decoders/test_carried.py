"""How a bundle says which renderers it carries, and what drives them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from decoders.carried import carried
from tokenizers_mm.errors import CheckpointError


def test_renderers_are_folders_with_an_index_that_names_their_drivers(tmp_path: Path) -> None:
    assert carried(tmp_path / "decoders") == {}
    written = {
        "image": {"codes": ["decoders", "CodeEmbedder"], "vokens": [None, None]},
        "audio": {"codes": ["decoders", "CodeEmbedder"], "vokens": ["decoders", "VokenMapper"]},
    }
    for name, index in written.items():
        (tmp_path / "decoders" / name).mkdir(parents=True)
        (tmp_path / "decoders" / name / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "decoders" / "notes").mkdir()
    assert carried(tmp_path / "decoders") == {"audio": ("codes", "vokens"), "image": ("codes",)}


@pytest.mark.parametrize("text", ["", "[]", '{"codes": []}', '{"codes": 3}'])
def test_a_broken_index_is_a_typed_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "model_index.json").write_text(text)
    with pytest.raises(CheckpointError, match="model_index"):
        carried(tmp_path)
