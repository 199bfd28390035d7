"""Stage `tokenize` on a Ray cluster: Ray Data hands the shards out; what is done with one is the same as anywhere.

A shard that was encoded stays, so a cluster that loses nodes, or a stage that is stopped, goes on where it was.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from anygen import errors
from anygen.errors import AnyGenError, MissingDependency
from anygen.stages.tokenize import ShardEncoder, TokenizeConfig


class _Worker:
    """Holds the tokenizers; Ray makes as many as the recipe's `concurrency` says."""

    def __init__(self, config: TokenizeConfig) -> None:
        self._config = config

    @cached_property
    def _encoder(self) -> ShardEncoder:
        return ShardEncoder(self._config)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            self._encoder.encode(Path(row["shard"]))
        except AnyGenError as error:  # as data: Ray would bury it in its own errors, and leave the other shards undone
            return {"error": type(error).__name__, "message": str(error)}
        return {"error": "", "message": ""}


def encode_on_ray(config: TokenizeConfig, paths: list[Path]) -> None:
    """Encode the record shards at `paths`.

    Raises:
        MissingDependency: Ray is not installed.
        AnyGenError: of the first shard that could not be encoded, as it was raised; the others are done.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingDependency("on: ray needs Ray: pip install 'anygen[ray]', or use on: local") from error
    if not paths:
        return
    if not ray.is_initialized():
        ray.init(address=config.ray.address)
    config = config.model_copy(update={"root": config.root.absolute()})  # the nodes work in folders of their own
    rows = [{"shard": str(path.absolute())} for path in paths]
    coded = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        _Worker,
        fn_constructor_args=(config,),
        num_cpus=config.ray.num_cpus,
        num_gpus=config.ray.num_gpus,
        compute=ray.data.ActorPoolStrategy(size=min(config.ray.concurrency, len(rows))),
    )
    for row in coded.take_all():
        if row["error"]:
            raise getattr(errors, row["error"], AnyGenError)(row["message"])
