"""How a bundle says which renderers it carries."""

from __future__ import annotations

from pathlib import Path

from decoders import list_renderers


def test_renderers_are_folders_with_a_model_index(tmp_path: Path) -> None:
    assert list_renderers(tmp_path / "decoders") == ()
    for name in ("voken", "flow"):
        (tmp_path / "decoders" / name).mkdir(parents=True)
        (tmp_path / "decoders" / name / "model_index.json").write_text("{}")
    (tmp_path / "decoders" / "notes").mkdir()
    assert list_renderers(tmp_path / "decoders") == ("flow", "voken")
