"""Judges of scenes: what stands where in a picture, and how well a box fits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from PIL import Image

from anygen.data.scenes import Scene
from anygen.evaluation.fidelity import mean_of
from anygen.evaluation.scores import proportion
from anygen.evaluation.suite.bench import Bench
from anygen.evaluation.suite.cases import Case, Measured
from anygen.evaluation.suite.scene_reading import Read, SceneReader
from tokenizers_mm.media import Region


def judge_scenes(bench: Bench, cases: Sequence[Case], pictures: list[Image.Image]) -> Iterator[Measured]:
    """Counts, things and positions, as `SceneReader` reads them."""
    reader = _reader_of(bench)
    pairs = [(case.scene, reader.read(picture)) for case, picture in zip(cases, pictures, strict=True) if case.scene]
    assert len(pairs) == len(cases), "these cases are not about scenes"
    yield Measured("count", proportion([len(read) == len(scene.objects) for scene, read in pairs]))
    yield Measured("things", proportion([_names(scene) == Counter(r.name for r in read) for scene, read in pairs]))
    placed = [is_placed(scene, read) for scene, read in pairs if len(_names(scene)) == 2]
    yield Measured("position", proportion(placed))


def judge_boxes(bench: Bench, cases: Sequence[Case], regions: list[Region]) -> Iterator[Measured]:
    """Intersection over union; a point has none."""
    truths = [case.truth["region"] for case in cases]
    values_N = np.array([iou(t, r) for t, r in zip(truths, regions, strict=True) if isinstance(t, Region)])
    yield Measured("mean IoU", mean_of(values_N))
    yield Measured("IoU of a half or more", proportion((values_N >= 0.5).tolist()))


def is_placed(scene: Scene, read: Sequence[Read]) -> bool:
    """True where both kinds of a scene of two are read, each wholly on its side of the other."""
    first, second = _names(scene)
    axis = "column" if " left of " in scene.captions[0] else "row"
    places = [[getattr(r, axis) for r in read if r.name == name] for name in (first, second)]
    return bool(places[0] and places[1]) and max(places[0]) < min(places[1])


def iou(left: Region, right: Region) -> float:
    """Intersection over union of two boxes; 0 where one is a point or turned inside out.

    >>> iou(Region((0.0, 0.0, 0.5, 1.0)), Region((0.25, 0.0, 0.75, 1.0)))
    0.3333333333333333
    """
    if len(left.values) != 4 or len(right.values) != 4:
        return 0.0
    a, b = left.values, right.values
    both = (max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    shared, union = _area(both), _area(a) + _area(b) - _area(both)
    return shared / union if union else 0.0


def _area(box: tuple[float, ...]) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _names(scene: Scene) -> Counter[str]:
    """Kinds in the order of the first caption."""
    return Counter(placed.name for placed in scene.objects)


@lru_cache(maxsize=1)
def _reader_of(bench: Bench) -> SceneReader:
    return SceneReader([(thing.parts.subject, thing.char) for thing in bench.things], bench.world.font)
