"""Stage `data`: sources to record shards, `train-00000.tar` and so on, one split a name.

Every shard is made whole or not at all and is a pure function of the recipe, so a killed run goes on with the next
shard. Unusable items are left out, counted and named; a run stops only where a split has nothing else, or where more
are unusable than `max_bad_share` allows.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from anygen.data.records import Record, write_shard
from anygen.data.sources import AnySource, Source
from anygen.errors import DataError, InputError
from anygen.files import TEMPORARY, read_json, write_json
from anygen.stages.base import StageConfig, StageResult
from anygen.training.interrupts import StopRequest
from anygen.training.metrics import Progress

logger = logging.getLogger("anygen")
MAX_REASONS, MAX_EXAMPLES = 10, 3
_VARYING = re.compile(r"b'[^']*'|b\"[^\"]*\"|\d+")


class DataConfig(StageConfig):
    """Recipe of the stage."""

    stage: Literal["data"] = "data"
    sources: list[AnySource] = Field(min_length=1)
    """One or several sources, mixed in this order."""
    records_per_shard: int = Field(256, ge=1)
    max_bad_share: float = Field(1.0, ge=0, le=1)
    """Largest share of unusable items before the stage fails; 1 goes on whatever is unusable."""

    def outside_inputs(self) -> Mapping[str, str]:
        """What the sources list."""
        return {
            str(index): listing
            for index, source in enumerate(self.sources)
            if (listing := source.listing()) is not None
        }


def main(config: DataConfig) -> StageResult:
    """Make every shard that is not there yet."""
    config.folder.mkdir(parents=True, exist_ok=True)
    shards = _plan([(source.open(), source.repeat) for source in config.sources], config.records_per_shard)
    for split in ("train", "validation"):
        if not any(name.startswith(f"{split}-") for name, _ in shards):
            raise DataError(
                f"the sources hold {sum(len(items) for _, items in shards)} items, none of them in the split {split} "
                "(5 % are validation, by the hash of their name): add more, a hundred or so"
            )
    progress = Progress("data", sum(len(items) for _, items in shards))
    counts: dict[str, int] = {}
    bad: list[str] = []
    outputs: list[Path] = []
    with StopRequest() as stop, ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, items in shards:
            path = config.folder / name
            is_new = not path.exists()
            if is_new:
                _make_shard(path, items, pool)
            facts = read_json(path.with_suffix(".json"))
            bad += facts["bad"]
            if len(bad) > config.max_bad_share * sum(len(i) for _, i in shards):
                _remove_faulty([*outputs, path])
                raise DataError(
                    f"{len(bad)} items are unusable, above max_bad_share={config.max_bad_share}: " + _reasons(bad)[0]
                )
            if is_new:
                stop.check(f"shards up to {name} are in {config.folder}")
            outputs.append(path)
            split = name.rpartition("-")[0]
            counts[split] = counts.get(split, 0) + facts["items"] - len(facts["bad"])
            progress.advance(count=len(items))
    progress.close()
    if bad:
        logger.warning("left out %d of %d items:\n%s", len(bad), len(bad) + sum(counts.values()), _report(bad))
    for split in ("train", "validation"):
        if not counts[split]:
            _remove_faulty(outputs)
            raise DataError(f"every item of the split {split} is unusable; most often: {_reasons(bad)[0]}")
    metrics = {f"{split}_records": float(count) for split, count in counts.items()}
    return StageResult(config.folder, tuple(outputs), {**metrics, "bad_items": float(len(bad))})


def _plan(sources: list[tuple[Source, int]], records_per_shard: int) -> list[tuple[str, list[tuple[Source, Any]]]]:
    """(file name, items) of every shard; training items as often as their source says."""
    by_split: dict[str, list[tuple[Source, Any]]] = {}
    for source, repeat in sources:
        for split, items in source.items().items():
            times = repeat if split == "train" else 1
            by_split.setdefault(split, []).extend((source, item) for _ in range(times) for item in items)
    return [
        (f"{split}-{number:05d}.tar", items[start : start + records_per_shard])
        for split, items in by_split.items()
        for number, start in enumerate(range(0, len(items), records_per_shard))
    ]


def _make_shard(path: Path, items: list[tuple[Source, Any]], pool: ThreadPoolExecutor) -> None:
    """Write one shard and, beside it, a JSON that says which items were left out and why."""
    results = list(pool.map(_try_record, items))
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    write_shard(temporary, _with_unique_keys(r for r in results if isinstance(r, Record)))
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    faults = [fault for fault in results if isinstance(fault, str)]
    write_json(path.with_suffix(".json"), {"items": len(items), "bad": faults})
    temporary.rename(path)


def _report(bad: list[str]) -> str:
    reasons = _reasons(bad)
    more = [f"  and {len(reasons) - MAX_REASONS} other reasons"] if len(reasons) > MAX_REASONS else []
    return "\n".join([*(f"  {reason}" for reason in reasons[:MAX_REASONS]), *more])


def _reasons(bad: list[str]) -> list[str]:
    """Faults (`name: reason`) counted by reason, the most frequent first; numbers and quoted bytes may differ.

    >>> _reasons(["a.png: 3 x 0 pixels", "b.png: it is empty", "c.png: 0 x 9 pixels"])
    ['2 x 3 x 0 pixels (a.png, c.png)', '1 x it is empty (b.png)']
    """
    groups: dict[str, list[tuple[str, str]]] = {}
    for fault in bad:
        name, _, reason = fault.partition(": ")
        groups.setdefault(_VARYING.sub("#", reason), []).append((name, reason))
    ordered = sorted(groups.values(), key=len, reverse=True)
    return [f"{len(group)} x {group[0][1]} ({_first_names([name for name, _ in group])})" for group in ordered]


def _first_names(names: list[str]) -> str:
    return ", ".join([*names[:MAX_EXAMPLES], *(["..."] if len(names) > MAX_EXAMPLES else [])])


def _remove_faulty(shards: list[Path]) -> None:
    """Shards that miss items are made anew by the next run: by then the files may be repaired."""
    for shard in shards:
        if read_json(shard.with_suffix(".json"))["bad"]:
            shard.unlink()


def _with_unique_keys(records: Iterable[Record]) -> Iterator[Record]:
    """Two sources may use one key: in a shard the second record would hide the first."""
    seen: dict[str, int] = {}
    for record in records:
        count = seen[record.key] = seen.get(record.key, 0) + 1
        yield record if count == 1 else dataclasses.replace(record, key=f"{record.key}-{count}")


def _try_record(source_and_item: tuple[Source, Any]) -> Record | str:
    source, item = source_and_item
    try:
        return source.record(item)
    except (DataError, InputError) as error:
        return str(error)
