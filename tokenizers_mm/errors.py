"""Typed errors of the whole project, rooted in `AnyGenError`.

A message says what was got, what was expected and what to do. The command line prints the message alone and leaves with
`exit_code`: 2 where the user's call or configuration is wrong, 1 where the work itself failed.
"""

from __future__ import annotations


class AnyGenError(Exception):
    """Base of every error that AnyGen raises on purpose."""

    exit_code = 1


class InputError(AnyGenError, ValueError):
    """A value or file that the user passed cannot be used."""

    exit_code = 2


class ConfigError(AnyGenError, ValueError):
    """A recipe, an override or a combination of settings is wrong."""

    exit_code = 2


class DataError(AnyGenError, ValueError):
    """Stored data (a shard, a metadata file, token codes) is broken or does not fit."""


class CheckpointError(AnyGenError, RuntimeError):
    """A checkpoint or bundle is missing, damaged or of another kind."""


class TrainingError(AnyGenError, RuntimeError):
    """Training had to stop; the last good checkpoint is intact."""


class MissingDependency(AnyGenError, ImportError):
    """An optional package or system program is needed and absent."""
