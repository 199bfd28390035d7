"""Stories: their layouts, records, shards and directions, and those of the emoji world."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from anygen.data.coded import CodedRecord, CodedStore, write_coded_shard
from anygen.data.pictures import NamedPictures
from anygen.data.records import Record, RecordStore, write_shard
from anygen.data.source import png_of
from anygen.data.sources import EmojiSource, StoriesSource
from anygen.data.tasks import Direction, DocumentStream
from anygen.documents import Vokens
from anygen.errors import ConfigError, DataError, InputError
from anygen.sequence import Sequencer
from anygen.stages.data import DataConfig
from anygen.stages.data import main as make_data
from anygen.stages.text_tokenizer import texts_of
from anygen.stages.tokenize import _encode
from tokenizers_mm.codes import Codes
from tokenizers_mm.image import ImageTokenizer

COLOURS = ["red", "green", "blue", "white", "black", "yellow"]


def png(colour: str = "red", side: int = 16) -> bytes:
    return png_of(Image.new("RGB", (side, side), colour))


def codes(number: int) -> Codes:
    return Codes(np.array([[number, 1, 2, 3]]), "image", (2, 2))


def vist_folder(root: Path, *, stories: int = 3, splits: tuple[str, ...] = ("train", "val", "test")) -> Path:
    """VIST in miniature: steps out of order, pictures in a folder a split."""
    (root / "sis").mkdir(parents=True)
    for split in splits:
        (root / "images" / split).mkdir(parents=True)
        groups = []
        for story in range(stories):
            for step in (2, 0, 1):
                photo = f"{split}{story}{step}"
                (root / "images" / split / f"{photo}.jpg").write_bytes(png(COLOURS[step]))
                row = {"story_id": str(100 + story), "photo_flickr_id": photo, "worker_arranged_photo_order": step}
                groups.append([row | {"text": f"[male] step {step} .", "original_text": f"He did  step {step}."}])
        content = {"info": {}, "images": [{"id": "1"}], "annotations": groups}
        (root / "sis" / f"{split}.story-in-sequence.json").write_text(json.dumps(content))
    return root


def minigpt5_folder(root: Path) -> Path:
    """MiniGPT-5's layout in miniature."""
    for split in ("train", "val"):
        (root / f"{split}_images").mkdir(parents=True)
        told, mapping = {}, {}
        for story in range(2):
            told[str(story)] = [
                {"caption": f"step {step} .", "image_id": f"{story}{step}", "sequence_index": step} for step in (1, 0)
            ]
            for step in range(2):
                name = f"{split}_images/00000{story}{step}.jpg"
                mapping[f"{story}{step}"] = name
                (root / name).write_bytes(png(COLOURS[step]))
        (root / f"{split}_cleaned.json").write_text(json.dumps(told))
        (root / f"{split}_image_mapping.json").write_text(json.dumps(mapping))
    return root


def colours_of(record: Record) -> list[Any]:
    def first_pixel(data: bytes) -> Any:
        with Image.open(io.BytesIO(data)) as picture:
            return picture.convert("RGB").getpixel((0, 0))

    return [part if isinstance(part, str) else first_pixel(part) for part in record.story]


# -- the source


def test_vist_is_read_in_the_order_of_its_steps_and_in_its_own_splits(tmp_path: Path) -> None:
    source = StoriesSource(path=vist_folder(tmp_path), pairs=False).open()
    items = source.items()
    assert {split: len(group) for split, group in items.items()} == {
        "train": 3,
        "validation": 3,
        "test": 3,
        "unheard": 0,
    }
    record = source.record(items["train"][0])
    red, green, blue = (255, 0, 0), (0, 128, 0), (0, 0, 255)
    assert colours_of(record) == ["He did step 0.", red, "He did step 1.", green, "He did step 2.", blue]
    assert record.kind == "story" and record.picture is None and not record.captions


def test_each_picture_with_its_text_is_a_record_too(tmp_path: Path) -> None:
    source = StoriesSource(path=vist_folder(tmp_path)).open()
    records = [source.record(item) for item in source.items()["train"]]
    assert len(records) == 3 * (1 + 3) and len({record.key for record in records}) == len(records)
    pair = records[1]
    assert pair.kind == "pair" and pair.captions == ("He did step 0.",) and pair.picture == records[0].story[1]


def test_minigpt5s_layout_is_read(tmp_path: Path) -> None:
    source = StoriesSource(path=minigpt5_folder(tmp_path), pairs=False).open()
    items = source.items()
    assert (len(items["train"]), len(items["validation"])) == (2, 2)
    assert colours_of(source.record(items["validation"][1])) == ["step 0 .", (255, 0, 0), "step 1 .", (0, 128, 0)]


def test_files_without_a_split_in_their_name_go_by_the_hash(tmp_path: Path) -> None:
    folder = vist_folder(tmp_path, stories=200, splits=("mine",))
    items = StoriesSource(path=folder, pairs=False).open().items()
    assert len(items["train"]) > 150 and items["validation"] and items["test"]


def damage(folder: Path, story: str, kind: str) -> None:
    path = folder / "sis" / "train.story-in-sequence.json"
    content = json.loads(path.read_text())
    rows = [group[0] for group in content["annotations"] if group[0]["story_id"] == story]
    if kind == "missing":
        (folder / "images" / "train" / f"{rows[0]['photo_flickr_id']}.jpg").unlink()
    elif kind == "broken":
        (folder / "images" / "train" / f"{rows[0]['photo_flickr_id']}.jpg").write_bytes(b"no picture")
    elif kind == "silent":
        rows[0]["original_text"] = rows[0]["text"] = "  "
    elif kind == "half":
        rows[0]["original_text"] = "\ud800"
    elif kind == "placeless":
        del rows[0]["worker_arranged_photo_order"]
    elif kind == "short":
        content["annotations"] = [g for g in content["annotations"] if g[0] not in rows[1:]]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "not in the folder"), ("broken", ""), ("silent", "says nothing"), ("half", "broken"),
        ("placeless", "worker_arranged_photo_order"), ("short", "1 steps"),
    ],
)  # fmt: skip
def test_a_story_that_cannot_be_told_is_left_out_and_counted(tmp_path: Path, kind: str, reason: str) -> None:
    folder = vist_folder(tmp_path / "vist")
    damage(folder, "101", kind)
    config = DataConfig(root=tmp_path / "run", sources=[StoriesSource(path=folder, pairs=False)])
    result = make_data(config)
    assert result.metrics == {"train_records": 2, "validation_records": 3, "test_records": 3, "bad_items": 1}
    (fault,) = json.loads((tmp_path / "run" / "data" / "train-00000.json").read_text())["bad"]
    assert fault.startswith("train.story-in-sequence.json 101: ") and reason in fault
    assert str(tmp_path) not in fault


def test_a_mapping_that_leads_outside_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(png())
    folder = minigpt5_folder(tmp_path / "d")
    path = folder / "train_image_mapping.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"00": "../secret.jpg"}))
    source = StoriesSource(path=folder, pairs=False).open()
    with pytest.raises(InputError, match="outside"):
        source.record(source.items()["train"][0])


@pytest.mark.parametrize("content", ["[", "[]", '{"annotations": [[{"text": "x"}]]}', '{"annotations": 3}'])
def test_a_file_of_another_shape_stops_the_stage(tmp_path: Path, content: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "train.story-in-sequence.json").write_text(content)
    with pytest.raises(DataError, match=r"train\.story"):
        StoriesSource(path=tmp_path).open()
    with pytest.raises(DataError, match="holds no SPLIT"):
        StoriesSource(path=tmp_path / "empty").open()


def test_the_listing_changes_with_what_lies_in_the_folder(tmp_path: Path) -> None:
    source = StoriesSource(path=vist_folder(tmp_path))
    first = source.listing()
    assert source.listing() == first
    (tmp_path / "images" / "train" / "train00.jpg").write_bytes(png(side=17))
    second = source.listing()
    annotations = tmp_path / "sis" / "val.story-in-sequence.json"
    annotations.write_text(annotations.read_text() + " ")
    assert len({first, second, source.listing()}) == 3
    assert StoriesSource(path=tmp_path / "nowhere").listing() is None


# -- records and shards

STORY = Record("s-1", "story", story=("a cat.", png("red"), "a dog comes.", png("blue"), "the end"))


def test_stories_come_back_from_record_shards_and_leave_other_records_alone(tmp_path: Path) -> None:
    both = Record("b", "pair", ("x",), png("green"), story=STORY.story)
    records = [STORY, Record("a", "pair", ("x",), png("green")), both]
    write_shard(tmp_path / "s.tar", records)
    store = RecordStore([tmp_path / "s.tar"])
    assert list(store) == records
    assert [store.has_picture(i) for i in range(3)] == [False, True, True]
    assert store.picture(0) is None and store.picture(2) == png("green")
    assert list(texts_of(RecordStore([tmp_path / "s.tar"])))[:3] == ["a cat.", "a dog comes.", "the end"]


def test_a_story_whose_picture_is_gone_is_told(tmp_path: Path) -> None:
    import tarfile

    write_shard(tmp_path / "s.tar", [STORY])
    with tarfile.open(tmp_path / "s.tar") as tar, tarfile.open(tmp_path / "t.tar", "w") as out:
        for member in tar:
            if "story-1" not in member.name:
                out.addfile(member, tar.extractfile(member))
    with pytest.raises(DataError, match="'s-1' is broken"):
        RecordStore([tmp_path / "t.tar"])[0]


def test_stories_are_coded_as_their_pictures_are_alone(tmp_path: Path, image_tokenizer: ImageTokenizer) -> None:
    records = [STORY, Record("a", "pair", ("x",), png("green")), Record("b", captions=("x",)), STORY]
    records[3] = Record("s-2", "story", picture=png("white"), story=(png("red"), "y"))
    write_shard(tmp_path / "s.tar", records)
    coded = list(_encode(RecordStore([tmp_path / "s.tar"]), image_tokenizer, None))
    red, green, blue, white = (
        image_tokenizer.encode(Image.new("RGB", (16, 16), c)) for c in ("red", "green", "blue", "white")
    )
    assert coded[0].story == ("a cat.", red, "a dog comes.", blue, "the end") and coded[0].picture is None
    assert (coded[1].picture, coded[1].story, coded[2].picture) == (green, (), None)
    assert coded[3].picture == white and coded[3].story == (red, "y")
    assert [r.story for r in _encode(RecordStore([tmp_path / "s.tar"]), None, None)] == [()] * 4
    write_coded_shard(tmp_path / "train-0", coded, facts={})
    assert list(CodedStore([tmp_path / "train-0"], facts={})) == coded


# -- directions

TOLD = CodedRecord("k", "story", story=("one", codes(1), "two", codes(2), "three", codes(3)))


def documents_of(direction: str, count: int = 60) -> list[Any]:
    parsed = Direction.parse(direction)
    return [parsed.document(TOLD, random.Random(seed)) for seed in range(count)]


def told(document: Any) -> tuple[list[Any], list[Any]]:
    parts: tuple[list[Any], list[Any]] = ([], [])
    for segment in document.segments:
        content = segment.content.picture if isinstance(segment.content, Vokens) else segment.content
        parts[segment.target].append(content)
    return parts


def test_a_picture_follows_from_all_that_was_told_before_it() -> None:
    seen = set()
    for document in documents_of("story:story>image"):
        given, asked = told(document)
        assert tuple(given + asked) == TOLD.story[: len(given) + 1] and isinstance(asked[0], Codes)
        assert document.task == ("depict" if len(given) == 1 else "answer"), "what a request for it would be"
        seen.add(len(given))
    assert seen == {1, 3, 5}


def test_a_text_follows_from_what_was_told_or_also_from_its_picture() -> None:
    for document in documents_of("story>text"):
        given, asked = told(document)
        assert tuple(given + asked) == TOLD.story[: len(given) + 1] and asked[0] in ("two", "three")
    for document in documents_of("story,image>text"):
        given, asked = told(document)
        place = TOLD.story.index(asked[0])
        assert tuple(given) == (*TOLD.story[:place], TOLD.story[place + 1])


def test_a_beginning_is_continued_to_the_end_in_turn() -> None:
    starts = set()
    for document in documents_of("story>text,image"):
        given, asked = told(document)
        assert tuple(given + asked) == TOLD.story and asked
        starts.add(len(given))
    assert starts == {1, 2, 3, 4, 5}


def test_as_vokens_only_what_is_asked_for_is_written() -> None:
    for direction in ("story>voken", "story>text,voken"):
        for document in documents_of(direction):
            for segment in document.segments:
                is_picture = segment.modality == "image"
                assert isinstance(segment.content, Vokens) == (is_picture and segment.target)
            assert all(told(document)[1])


def test_the_picture_behind_a_voken_block_is_found_in_the_records(tmp_path: Path) -> None:
    write_shard(tmp_path / "s.tar", [Record("k", "story", story=STORY.story), Record("p", picture=png("green"))])
    pictures = NamedPictures(RecordStore([tmp_path / "s.tar"]), 8)
    pixels = pictures.pixels(["k/1", "p", "k/0"])
    assert pixels.shape == (3, 3, 8, 8) and pixels.mean((2, 3)).round(decimals=2).tolist() == [
        [0, 0, 1], [0, pytest.approx(0.5, abs=0.01), 0], [1, 0, 0]
    ]  # fmt: skip
    assert pictures.pixels([]).shape == (0, 3, 8, 8)
    for missing in ("k", "k/2", "x"):
        with pytest.raises(DataError, match="no picture"):
            pictures.pixels([missing])
    keys = set()
    for document in documents_of("story>voken"):
        content = document.segments[-1].content
        assert isinstance(content, Vokens) and content.picture == codes(int(content.key[-1]) + 1)
        keys.add(content.key)
    assert keys == {"k/0", "k/1", "k/2"}


def test_directions_that_are_none_are_refused_and_others_stay_what_they_were() -> None:
    for wrong in ("story>audio", "story>", "story,image>image", "story,text>image", "story"):
        with pytest.raises(ConfigError, match="not a direction"):
            Direction.parse(wrong)
    assert Direction.parse("story:text>image") == Direction(("text",), ("image",), "story")
    with pytest.raises(DataError, match="has no image"):
        Direction.parse("story>image").document(CodedRecord("k", "story", story=("a", "b")), random.Random(0))
    alone = Direction.parse("story>image").document(CodedRecord("k", "story", story=(codes(1),)), random.Random(0))
    assert [s.target for s in alone.segments] == [True]


def test_a_stream_of_stories_is_built_and_read_back(
    tmp_path: Path, tokenizers: dict[str, Any], sequencer: Sequencer
) -> None:
    records = [CodedRecord(f"k{n}", "story", story=("two", codes(n), "a red apple", codes(n + 1))) for n in range(8)]
    write_coded_shard(tmp_path / "train-0", [*records, CodedRecord("p", "pair", ("x",), codes(4))], facts={})
    store = CodedStore([tmp_path / "train-0"], facts={})
    weights = dict.fromkeys(("story>image", "story>text,voken", "story,image>text", "image>text"), 1.0)
    stream = DocumentStream(store, weights, tokenizers, drop_share=0.2, free_share=0.2, seed=0)
    for number in range(60):
        document, dropped = stream(number)
        parsed = sequencer.parse(sequencer.build(document, drop_inputs=dropped).ids_S)
        assert parsed.complete
        if not dropped:
            assert parsed.document == document


# -- the emoji world


@pytest.fixture(scope="module")
def world() -> Any:
    return EmojiSource(num_stories=40, side_px=32, seed=3).open()


def test_emoji_stories_go_on_from_picture_to_picture(world: Any) -> None:
    items = {split: [i for i in group if hasattr(i, "index")] for split, group in world.items().items()}
    assert [len(items[split]) for split in ("train", "validation", "test", "unheard")] == [36, 2, 2, 0]
    events = set()
    for item in items["train"]:
        record = world.record(item)
        assert record == world.record(item) and record.kind == "story"
        texts = [part for part in record.story if isinstance(part, str)]
        pictures = [np.asarray(Image.open(io.BytesIO(p)).convert("RGB")) for p in record.story if isinstance(p, bytes)]
        assert 2 <= len(texts) == len(pictures) <= 4 and all(isinstance(p, str) for p in record.story[::2])
        there = texts[0].rstrip(".").split(" and ")
        for before, after, text in zip(pictures, pictures[1:], texts[1:], strict=False):
            quarters = [
                (before[y : y + 16, x : x + 16] != after[y : y + 16, x : x + 16]).any()
                for y in (0, 16)
                for x in (0, 16)
            ]
            assert sum(quarters) == 1, f"only one cell changes: {text}"
            event = text.rstrip(".").split()[-1] if text.endswith(("comes.", "leaves.")) else "turns"
            events.add(event)
            number = len(there) + {"comes": 1, "leaves": -1, "turns": 0}[event]
            filled = sum((after[y : y + 16, x : x + 16] != 255).any() for y in (0, 16) for x in (0, 16))
            assert filled == number, text
            there = there[:1] * number
    assert events == {"comes", "leaves", "turns"}


def test_a_world_without_stories_is_what_it_was() -> None:
    assert (
        "num_stories" not in EmojiSource().model_dump() and EmojiSource(num_stories=2).model_dump()["num_stories"] == 2
    )
