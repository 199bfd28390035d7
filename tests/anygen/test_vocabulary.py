"""The vocabulary: ranges, offsets, manifest."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anygen.errors import CheckpointError, DataError
from anygen.vocabulary import CONTROL, Vocabulary

sizes = st.integers(0, 50)


@given(st.integers(1, 300), sizes, st.integers(0, 3), sizes, sizes, sizes)
def test_ranges_tile_the_ids_and_offsets_are_inverse(
    text: int, image: int, books: int, audio: int, region: int, voken: int
) -> None:
    vocabulary = Vocabulary.create(text=text, image=(1, image), audio=(books, audio), region=region, voken=voken)
    covered = np.concatenate([np.arange(r.start, r.stop) for r in vocabulary.ranges])
    assert covered.tolist() == list(range(vocabulary.used))
    assert vocabulary.size % 128 == 0 and 0 <= vocabulary.size - vocabulary.used < 128
    for index, r in enumerate(vocabulary.ranges):
        codes = np.arange(r.size)
        ids = vocabulary.to_ids(r.name, codes)
        assert (vocabulary.range_index(ids) == index).all()
        assert (vocabulary.to_codes(r.name, ids) == codes).all()


def test_order_is_text_control_image_audio_region_voken(vocabulary: Vocabulary) -> None:
    assert [r.name for r in vocabulary.ranges] == [
        "text", "control", "image.0", "audio.0", "audio.1", "region", "voken"
    ]  # fmt: skip


def test_control_ids_are_positions_in_an_append_only_list() -> None:
    # Bundles on disk depend on these positions: a failure here means that old models would be misread.
    assert CONTROL[:16] == (
        "pad", "bos", "eos", "input", "target", "drop", "text", "/text", "image", "/image", "audio", "/audio",
        "region", "/region", "voken", "/voken",
    )  # fmt: skip
    vocabulary = Vocabulary.create(text=100)
    assert vocabulary.control("eos") == 102
    assert vocabulary.numbers.start == 164 and vocabulary.numbers.size == 256


@pytest.mark.parametrize("name", ["text", "image.0", "audio.1", "region"])
def test_codes_outside_a_range_are_refused(vocabulary: Vocabulary, name: str) -> None:
    r = vocabulary.range(name)
    with pytest.raises(DataError, match=name):
        vocabulary.to_ids(name, np.array([0, r.size]))
    with pytest.raises(DataError, match=name):
        vocabulary.to_ids(name, np.array([-1]))
    with pytest.raises(DataError, match=name):
        vocabulary.to_codes(name, np.array([r.stop]))


def test_unknown_range_names_the_known_ones(vocabulary: Vocabulary) -> None:
    with pytest.raises(DataError, match=r"video.*image\.0"):
        vocabulary.range("video")


def test_manifest_round_trip(vocabulary: Vocabulary) -> None:
    again = Vocabulary.from_manifest(vocabulary.manifest())
    assert again == vocabulary and again.fingerprint == vocabulary.fingerprint


def _broken(change: Any) -> Any:
    manifest = copy.deepcopy(Vocabulary.create(text=10, image=(1, 4)).manifest())
    change(manifest)
    return manifest


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(format=99),
        lambda m: m.pop("ranges"),
        lambda m: m["ranges"][1].update(start=11),
        lambda m: m["ranges"].reverse(),
        lambda m: m["ranges"][0].update(size=-3),
        lambda m: m["ranges"][0].update(size="many"),
        lambda m: m["control"].__setitem__(0, "oops"),
        lambda m: m.update(size=1),
        lambda m: m["numbers"].update(start=0),
        lambda m: m.update(fingerprints=[1]),
    ],
)
def test_broken_manifests_are_typed_errors(change: Any) -> None:
    with pytest.raises(CheckpointError):
        Vocabulary.from_manifest(_broken(change))


def test_check_refuses_missing_and_foreign_tokenizers(vocabulary: Vocabulary, tokenizers: dict[str, Any]) -> None:
    vocabulary.check(tokenizers)
    with pytest.raises(CheckpointError, match="audio tokenizer of this vocabulary is missing"):
        vocabulary.check({k: v for k, v in tokenizers.items() if k != "audio"})
    from tokenizers_mm.regions import RegionTokenizer

    with pytest.raises(CheckpointError, match="region tokenizer is not the one"):
        vocabulary.check({**tokenizers, "region": RegionTokenizer(11)})
