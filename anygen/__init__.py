"""AnyGen: one causal transformer in which text, pictures and sound are all tokens.

Importing this package costs next to nothing; torch is loaded when `AnyGen` or `generate` is first touched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from anygen._version import __version__

if TYPE_CHECKING:
    from anygen.api import AnyGen, generate

__all__ = ["AnyGen", "__version__", "generate"]


def __getattr__(name: str) -> Any:
    if name in ("AnyGen", "generate"):
        from anygen import api

        return getattr(api, name)
    raise AttributeError(f"module 'anygen' has no attribute {name!r}")
