"""`Codes` and what every tokenizer promises."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tokenizers_mm.codes import Codes, check_codes, fingerprint_of
from tokenizers_mm.errors import DataError, InputError
from tokenizers_mm.media import Region
from tokenizers_mm.regions import RegionTokenizer


@pytest.mark.parametrize(
    ("array", "modality", "grid"),
    [
        (np.zeros(3, int), "text", None),
        (np.zeros((1, 3)), "text", None),
        (np.array([[-1]]), "text", None),
        (np.zeros((1, 4), int), "image", None),
        (np.zeros((1, 4), int), "image", (1, 3)),
        (np.zeros((1, 4), int), "audio", (2, 2)),
    ],
)
def test_impossible_codes_are_refused(array: Any, modality: Any, grid: Any) -> None:
    with pytest.raises(DataError):
        Codes(array, modality, grid)


def test_codes_are_values() -> None:
    source = np.array([[1, 2]])
    codes = Codes(source, "audio")
    source[0, 0] = 9
    assert codes == Codes(np.array([[1, 2]], np.int32), "audio")
    assert codes != Codes(np.array([[1, 2]]), "text")
    assert hash(codes) == hash(Codes(np.array([[1, 2]]), "audio"))
    with pytest.raises(ValueError, match="read-only"):
        codes.codes_KT[0, 0] = 5


def test_check_codes() -> None:
    check_codes(Codes(np.zeros((1, 0), int), "audio"), "audio", 4, 2)
    with pytest.raises(DataError, match="modality"):
        check_codes(Codes(np.zeros((1, 1), int), "audio"), "text", 4, 2)
    with pytest.raises(DataError, match="codebooks"):
        check_codes(Codes(np.zeros((3, 1), int), "audio"), "audio", 4, 2)
    with pytest.raises(DataError, match="below 4"):
        check_codes(Codes(np.array([[4]]), "audio"), "audio", 4, 2)


def test_fingerprints_see_every_change() -> None:
    arrays = {"w": np.arange(4.0)}
    base = fingerprint_of({"a": 1}, arrays)
    assert base == fingerprint_of({"a": 1}, {"w": np.arange(4.0)})
    assert base != fingerprint_of({"a": 2}, arrays)
    assert base != fingerprint_of({"a": 1}, {"w": np.arange(4.0, dtype=np.float32)})
    assert base != fingerprint_of({"a": 1}, {"v": np.arange(4.0)})
    assert base != fingerprint_of({"a": 1}, {"w": np.arange(4.0).reshape(2, 2)})


def test_every_tokenizer_keeps_the_protocol(tokenizers: dict[str, Any]) -> None:
    samples = {
        "text": "a cat",
        "image": np.zeros((16, 16, 3), np.uint8),
        "audio": (np.zeros(800, np.float32), 8000),
        "region": Region((0.5, 0.5)),
    }
    for modality, tokenizer in tokenizers.items():
        codes = tokenizer.encode(samples[modality])
        assert codes.modality == tokenizer.modality == modality
        assert codes.num_codebooks == tokenizer.num_codebooks
        assert codes.codes_KT.max() < tokenizer.codebook_size
        assert (tokenizer.rate_hz is not None) == (modality == "audio")
        assert (tokenizer.grid_hw is not None) == (modality == "image")
        assert len(tokenizer.fingerprint) == 64
        tokenizer.decode(codes)


def test_regions_round_to_the_nearest_bin() -> None:
    tokenizer = RegionTokenizer(11)
    for value in np.linspace(0, 1, 57):
        (back, _) = tokenizer.decode(tokenizer.encode(Region((float(value), 1.0)))).values
        assert abs(back - value) <= 0.05 + 1e-9
    with pytest.raises(DataError, match="2 or 4 coordinates"):
        tokenizer.decode(Codes(np.zeros((1, 3), int), "region"))
    for values in ((0.1,), (0.1, 1.2), (0.1, 0.2, 0.3), (float("nan"), 0.0)):
        with pytest.raises(InputError):
            Region(values)
