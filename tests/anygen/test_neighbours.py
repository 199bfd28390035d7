"""Neighbours: the pictures that each picture could be mistaken for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from anygen.data.augmentation import AugmentationConfig
from anygen.data.neighbours import nearest_pictures
from anygen.data.pictures import PictureSet
from anygen.data.records import Record, RecordStore, write_shard
from anygen.data.sources import png_of
from anygen.errors import DataError
from anygen.stages.picture_phases import PictureBatches


def pictures_of(folder: Path, greys: list[int]) -> PictureSet:
    folder.mkdir()
    records = [Record(f"k{n}", "pair", (), png_of(Image.new("RGB", (16, 16), (g, g, g)))) for n, g in enumerate(greys)]
    write_shard(folder / "train-00000.tar", records)
    return PictureSet(RecordStore([folder / "train-00000.tar"]), 16)


def test_neighbours_are_the_nearest_others_and_never_twins(tmp_path: Path) -> None:
    greys = [0, 10, 11, 11, 100, 140, 255]
    found = nearest_pictures(pictures_of(tmp_path / "d", greys), 2).tolist()
    for item, neighbours in enumerate(found):
        others = sorted({grey for grey in greys if grey != greys[item]}, key=lambda grey: abs(grey - greys[item]))
        assert {greys[n] for n in neighbours} <= set(others[:2]), (greys[item], neighbours)
        assert greys[neighbours[0]] == others[0]


def test_too_few_pictures_are_told_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"2 pictures are too few .* neighbour_weight to 0"):
        nearest_pictures(pictures_of(tmp_path / "d", [0, 10]), 2)


def test_batches_bring_a_neighbour_of_each_picture_under_the_same_augmentation(tmp_path: Path) -> None:
    pictures = pictures_of(tmp_path / "d", [0, 30, 60, 90, 120, 150])
    neighbours = nearest_pictures(pictures, 2)

    def batches(augmentation: AugmentationConfig, *, compared: bool) -> PictureBatches:
        found = neighbours if compared else None
        return PictureBatches(pictures, pictures, batch_size=4, augmentation=augmentation, seed=3, neighbours_NK=found)

    plain = batches(AugmentationConfig(), compared=True)
    seen = set()
    for _ in range(12):
        items, pixels, others = plain.next()
        assert others is not None
        assert torch.equal(pixels, pictures.pixels(items))
        for item, other in zip(items, others, strict=True):
            match = [n for n in neighbours[item].tolist() if torch.equal(other, pictures.pixels([n])[0])]
            assert len(match) == 1
            seen.add((item, match[0]))
    assert len(seen) == 12, "each of the two neighbours has its turn"

    dim = AugmentationConfig(colour=0.5)
    with_others, without = batches(dim, compared=True), batches(dim, compared=False)
    items, pixels, others = with_others.next()
    same_items, same_pixels, none = without.next()
    assert items == same_items and torch.equal(pixels, same_pixels) and none is None and others is not None
    for item, picture, other in zip(items, pixels, others, strict=True):
        brightness = float(picture.mean() / pictures.pixels([item]).mean().clamp_min(1e-9))
        candidates = [float(other.mean() - brightness * pictures.pixels([n]).mean()) for n in neighbours[item].tolist()]
        assert item == 0 or min(map(abs, candidates)) < 1e-3
