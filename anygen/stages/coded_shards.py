"""Where a training's coded shards lie: in the run, in another folder, or at a URL behind a cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from anygen.config import Config
from anygen.data.coded import ShardPlace
from anygen.data.remote import ShardCache

LOOKAHEAD = 4096
"""Examples before it is needed that a remote shard is fetched."""


class ShardsConfig(Config):
    """Coded shards outside of the run; its tokenizers must be those that made them."""

    url: str
    """Folder of the shards' folders, or a URL that fsspec reads: `s3://bucket/tokens`, `gs://...`, `hf://datasets/...`.
    What lies there is not looked at when a finished run is run again: other shards need another URL."""
    cache: Path = Field(Path("~/.cache/anygen/shards"), exclude=True)
    """Where copies of remote shards lie; processes and runs may share it."""
    cache_gib: float = Field(64.0, gt=0, exclude=True)
    """Room for whole shards; those that were used longest ago make room for others."""
    shards_per_block: int = Field(0, ge=0, exclude_if=lambda count: count == 0)
    """Where the cache cannot hold all shards: how many a direction goes through at a time. 0 shuffles all records."""


def places_of(shards: ShardsConfig | None, root: Path, split: str) -> Sequence[Path] | Sequence[ShardPlace]:
    """The shards of a split, in no order."""
    if shards is not None and "://" in shards.url:
        cache = ShardCache(shards.url, shards.cache, limit_bytes=shards.cache_gib * 2**30)
        return cache.shards(f"{split}-*")
    folder = root / "tokenize" if shards is None else Path(shards.url).expanduser()
    return list(folder.glob(f"{split}-*"))
