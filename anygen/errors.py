"""The project's typed errors, under the name that users import them by."""

from __future__ import annotations

from tokenizers_mm.errors import (
    AnyGenError,
    CheckpointError,
    ConfigError,
    DataError,
    InputError,
    MissingDependency,
    TrainingError,
)

__all__ = [
    "AnyGenError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "InputError",
    "MissingDependency",
    "TrainingError",
]
