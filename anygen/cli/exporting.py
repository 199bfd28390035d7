"""Commands that hand a model on: `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    model: Annotated[Path, typer.Argument(help="Bundle, or the folder model of a pretrain stage.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not hold anything.")],
    dtype: Annotated[str, typer.Option(help="bf16 or fp32.")] = "bf16",
) -> None:
    """Write a plain Qwen3 directory for transformers, vLLM and SGLang, with a page that says what its ids mean."""
    from anygen.export import export_model

    print(export_model(model, out, dtype=dtype))  # type: ignore[arg-type]
