"""The one door to diffusers, which is an extra: absent or broken, it is one typed error that says what to install."""

from __future__ import annotations

import importlib
from typing import Any

from tokenizers_mm import compat  # noqa: F401  before diffusers
from tokenizers_mm.errors import MissingDependency


def load_diffusers() -> Any:
    """The package diffusers.

    Raises:
        MissingDependency: it is not installed, or cannot be imported.
    """
    try:
        module = importlib.import_module("diffusers")
        _ = module.DiffusionPipeline  # lazy: what is broken shows when a class is asked for
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise MissingDependency(
            "diffusion decoders need the package diffusers, which cannot be imported "
            f"({type(error).__name__}: {error}); pip install 'anygen[diffusion]'"
        ) from error
    return module
