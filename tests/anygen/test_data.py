"""Records, sources, coded shards, orders, tasks: deterministic, safe to read, nothing lost."""

from __future__ import annotations

import dataclasses
import io
import json
import random
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from anygen.data.coded import CodedRecord, CodedStore, CodedUtterance, write_coded_shard
from anygen.data.order import Mixture, Permutation
from anygen.data.records import Record, RecordStore, Utterance, write_shard
from anygen.data.sources import FolderSource, WebDatasetSource, flac_of, png_of, split_by_key
from anygen.data.tasks import Direction, DocumentStream, known_at_random
from anygen.documents import Holed
from anygen.errors import AnyGenError, CheckpointError, ConfigError, DataError
from anygen.stages.data import DataConfig
from anygen.stages.data import main as make_data
from anygen.stages.run import run_stage
from tokenizers_mm.codes import Codes
from tokenizers_mm.media import Audio, Region

PNG = png_of(Image.new("RGB", (4, 4), "red"))
FLAC = flac_of(Audio(np.sin(np.arange(800) / 9).astype(np.float32) * 0.3, 8000))
RECORD = Record(
    "a-1",
    "scene",
    ("a cat", "cat"),
    PNG,
    (Utterance("a cat", "slt", FLAC), Utterance("cat", "espeak:en-us+f3", FLAC), Utterance("cat", "slt@90", FLAC)),
    (("cat", Region((0.0, 0.1, 0.5, 1.0))),),
    (("how many cats are there?", "one"),),
)


def test_records_come_back_and_shards_are_equal_bytes(tmp_path: Path) -> None:
    records = [RECORD, Record("b", captions=("only text",)), Record("c", picture=PNG)]
    for name in ("x.tar", "y.tar"):
        assert write_shard(tmp_path / name, records) == 3
    assert (tmp_path / "x.tar").read_bytes() == (tmp_path / "y.tar").read_bytes()
    store = RecordStore([tmp_path / "x.tar"])
    assert list(store) == records
    assert store.keys() == ["a-1", "b", "c"]
    assert [store.has_picture(i) for i in range(3)] == [True, False, True]
    assert [store.num_sounds(i) for i in range(3)] == [3, 0, 0]
    assert store[0].utterances[0].audio(16_000).rate_hz == 16_000


def test_shards_of_other_tools_are_read(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "w.tar", "w") as tar:
        for name, data in (("000.jpg", PNG), ("000.txt", b"a photo\n"), ("./001.wav", FLAC), ("001.txt", b"hello")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    first, second = RecordStore([tmp_path / "w.tar"])
    assert first.captions == ("a photo",) and first.picture == PNG
    assert second.utterances == (Utterance("hello", "voice", FLAC),)
    write_shard(tmp_path / "ours.tar", [first, second])
    assert RecordStore([tmp_path / "ours.tar"])[1].utterances == second.utterances


def test_two_captions_of_one_file_are_two_records(tmp_path: Path) -> None:
    rows = [{"file_name": "cat.png", "text": text} for text in ("a cat", "a tabby")]
    source = FolderSource(path=folder_of(tmp_path / "d", rows)).open()
    records = [source.record(item) for group in source.items().values() for item in group]
    write_shard(tmp_path / "s.tar", records)
    assert sorted(record.captions for record in RecordStore([tmp_path / "s.tar"])) == [("a cat",), ("a tabby",)]
    with pytest.raises(AssertionError, match="two records have the key"):
        write_shard(tmp_path / "t.tar", [records[0], records[0]])


def test_a_folder_may_say_what_a_mixture_calls_its_records(tmp_path: Path) -> None:
    rows = [{"file_name": "cat.png", "text": "a cat"}, {"file_name": "cat.flac", "text": "meow"}]
    folder = folder_of(tmp_path / "d", rows)
    (folder / "cat.flac").write_bytes(FLAC)
    for named, kind in (({}, "pair"), ({"record_kind": "answers"}, "answers")):
        config = FolderSource(path=folder, **named)  # type: ignore[arg-type]
        records = [config.open().record(item) for group in config.open().items().values() for item in group]
        write_shard(tmp_path / f"{kind}.tar", records)
        assert [record.kind for record in RecordStore([tmp_path / f"{kind}.tar"])] == [kind] * 2
        assert ("record_kind" in config.model_dump()) == bool(named), "recipes of before stay what they were"
    for wrong in ("a>b:c", "Scene 1", ""):
        with pytest.raises(ValueError, match="record_kind"):
            FolderSource(path=folder, record_kind=wrong)


def test_bad_items_are_counted_again_after_a_restart(tmp_path: Path) -> None:
    names = [f"cat{i}.png" for i in range(99)]
    good = next(n for n in names if split_by_key(n) == "validation")
    bad = [n for n in names if split_by_key(n) == "train"][:3]
    source = FolderSource(path=folder_of(tmp_path / "d", [{"file_name": n, "text": n} for n in (good, *bad)]))
    (tmp_path / "d" / good).write_bytes(PNG)
    config = DataConfig(root=tmp_path / "a", sources=[source], records_per_shard=1, max_bad_share=0.5)
    for _ in range(2):  # the second time some bad shards lie there already
        with pytest.raises(DataError, match="items are unusable"):
            make_data(config)
    for name in bad:
        (tmp_path / "d" / name).write_bytes(PNG)
    assert make_data(config).metrics == {"train_records": 3, "validation_records": 1, "bad_items": 0}, "repaired files"


def evil_tar(path: Path, name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> Path:
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, link
        tar.addfile(info)
    return path


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("../x.png", tarfile.REGTYPE),
        ("/etc/x.png", tarfile.REGTYPE),
        ("a/b.png", tarfile.REGTYPE),
        ("x.png", tarfile.SYMTYPE),
        ("x.png", tarfile.LNKTYPE),
        ("x.png", tarfile.CHRTYPE),
        ("x.png", tarfile.FIFOTYPE),
        ("..", tarfile.REGTYPE),
        ("./../x.npy", tarfile.REGTYPE),
        ("a/b.npy", tarfile.REGTYPE),
        ("x.npy", tarfile.SYMTYPE),
        ("x", tarfile.REGTYPE),
    ],
)
def test_members_that_no_shard_has_are_refused(tmp_path: Path, name: str, kind: bytes) -> None:
    with pytest.raises(DataError, match="plain files"):
        RecordStore([evil_tar(tmp_path / "e.tar", name, kind, "/etc/passwd")])


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_members_of_other_types_are_ignored_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shard = tar_of(tmp_path / "w.tar", {"0.png": PNG, "0.npy": b"x", "0.seg.pth": b"x", ".nfs1": b"x", "1.npy": b"x"})
    assert list(RecordStore([shard])) == [Record("0", picture=PNG)], "a key with nothing to read is no record"
    (warning,) = caplog.messages
    assert "ignored 4 members" in warning and "'0.npy'" in warning


def test_a_class_is_the_caption_where_there_is_no_other(tmp_path: Path) -> None:
    classes = {"0.cls": b"great_tit\n", "1.cls": b"7", "2.cls": b"bird", "2.txt": b"a tit"}
    shard = tar_of(tmp_path / "w.tar", classes)
    assert [record.captions for record in RecordStore([shard])] == [("great tit",), (), ("a tit",)]


def test_mutated_shards_are_typed_errors(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.tar", [RECORD, dataclasses.replace(RECORD, key="again")])
    whole = (tmp_path / "x.tar").read_bytes()
    chooser = np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(int(chooser.integers(1, 8))):
            data[int(chooser.integers(len(data)))] = int(chooser.integers(256))
        (tmp_path / "m.tar").write_bytes(data[: int(chooser.integers(1, len(data) + 1))])
        try:
            for record in RecordStore([tmp_path / "m.tar"]):
                for utterance in record.utterances:
                    utterance.audio(8000)
        except AnyGenError:
            pass
    with pytest.raises(DataError, match="no record shards"):
        RecordStore([])


def folder_of(root: Path, rows: list[dict[str, Any]]) -> Path:
    root.mkdir()
    (root / "cat.png").write_bytes(PNG)
    (root / "hi.flac").write_bytes(FLAC)
    (root / "broken.png").write_text("no picture")
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def test_the_folder_source_reads_pictures_and_sounds_and_counts_bad_items(tmp_path: Path) -> None:
    rows = [
        {"file_name": "cat.png", "text": "a cat"},
        {"file_name": "hi.flac", "text": "hi", "speaker": "bob"},
        {"file_name": "broken.png", "text": "x"},
        {"file_name": "absent.png", "text": "x"},
        {"file_name": "../../etc/passwd", "text": "x"},
        {"file_name": "notes.doc", "text": "x"},
    ]
    names = [f"{i}.png" for i in range(99)]
    good = [next(n for n in names if split_by_key(n) == split) for split in ("train", "validation")]
    rows += [{"file_name": name, "text": "a cat"} for name in good]
    source = FolderSource(path=folder_of(tmp_path / "d", rows), held_out_field="speaker", held_out_value="bob")
    for name in good:
        (tmp_path / "d" / name).write_bytes(PNG)
    config = DataConfig(root=tmp_path / "run", sources=[source])
    result = make_data(config)
    assert result.metrics["bad_items"] == 4
    assert result.metrics["train_records"] + result.metrics.get("unheard_records", 0) <= len(rows) - 4
    records = [r for p in result.outputs for r in RecordStore([p])] if result.outputs else []
    assert {r.captions for r in records} == {("a cat",), ("hi",)}
    assert any(p.name.startswith("unheard") for p in result.outputs)
    with pytest.raises(DataError, match="above max_bad_share"):
        make_data(DataConfig(root=tmp_path / "strict", sources=[source], max_bad_share=0.1))


@pytest.mark.parametrize(
    "line",
    [
        "{", "[]", "{}", '{"file_name": 3}', "null", "[" * 100_000, '{"file_name": "a\\u0000.png"}',
        '{"file_name": "\\ud800.png"}', '{"file_name": "a.png", "text": "\\ud800"}', '{"file_name": "a.png", "text": ["a"]}',
    ],
)  # fmt: skip
def test_broken_metadata_names_the_line(tmp_path: Path, line: str) -> None:
    root = folder_of(tmp_path / "d", [{"file_name": "cat.png", "text": "a cat"}])
    with (root / "metadata.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match="line 2"):
        FolderSource(path=root).open()
    with pytest.raises(DataError, match=r"nowhere is not a folder; expected one with pictures or a metadata\.jsonl"):
        FolderSource(path=tmp_path / "nowhere").open()


def test_what_was_left_out_is_counted_by_reason_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = [f"n{i}.png" for i in range(60)]
    folder = folder_of(tmp_path / "d", [{"file_name": name, "text": "x"} for name in names])
    for name in names[5:]:
        (folder / name).write_bytes(PNG)
    for name in names[5:8]:
        (folder / name).write_text("notes")
    result = make_data(DataConfig(root=tmp_path / "a", sources=[FolderSource(path=folder)]))
    assert result.metrics["bad_items"] == 8
    (message,) = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    first, *reasons = message.splitlines()
    assert first == "left out 8 of 60 items:"
    assert reasons[0].startswith("  5 x cannot read the picture: No such file") and reasons[0].endswith(", ...)")
    assert reasons[1].startswith("  3 x it is not a readable picture")
    assert all(name in message for name in names[5:8]), "examples are named"


def test_a_split_of_nothing_but_bad_items_stops_the_run_until_it_is_repaired(tmp_path: Path) -> None:
    names = [f"n{i}.png" for i in range(40)]
    folder = folder_of(tmp_path / "d", [{"file_name": name, "text": "x"} for name in names])
    held_out = [name for name in names if split_by_key(name) == "validation"]
    for name in set(names) - set(held_out):
        (folder / name).write_bytes(PNG)
    config = DataConfig(root=tmp_path / "a", sources=[FolderSource(path=folder)])
    with pytest.raises(DataError, match=rf"every item of the split validation is unusable.*{held_out[0]}"):
        make_data(config)
    (folder / held_out[0]).write_bytes(PNG)
    assert make_data(config).metrics["validation_records"] == 1


def test_a_broken_picture_in_a_tar_is_named_and_left_out(tmp_path: Path) -> None:
    records = [Record(f"k{i}", captions=("a cat",), picture=PNG[:-20] if i == 7 else PNG) for i in range(60)]
    write_shard(tmp_path / "w.tar", records)
    result = make_data(DataConfig(root=tmp_path / "a", sources=[WebDatasetSource(path=tmp_path / "w.tar")]))
    assert result.metrics["bad_items"] == 1
    faults = [f for path in result.outputs for f in json.loads(path.with_suffix(".json").read_text())["bad"]]
    assert len(faults) == 1 and faults[0].startswith("k7: the picture is not a readable picture")


# -- plain folders


def tree_of(root: Path) -> Path:
    ending = {"JPEG": "JPG", "BMP": "bmp", "GIF": "gif", "WEBP": "webp", "PNG": "png"}
    for number, (kind, suffix) in enumerate(ending.items()):
        folder = root / ("great_tit" if number % 2 else "great_tit/nest")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 20), "red").save(folder / f"{number}.{suffix}", kind)
    (root / "loose.png").write_bytes(PNG)
    (root / "notes.txt").write_text("notes")
    (root / "great_tit" / "hi.flac").write_bytes(FLAC)
    for hidden in (".secret.png", ".cache/x.png"):
        (root / hidden).parent.mkdir(exist_ok=True)
        (root / hidden).write_bytes(PNG)
    return root


def items_of(source: FolderSource) -> list[Any]:
    return [item for items in source.open().items().values() for item in items]


def test_a_plain_folder_gives_its_pictures_and_sounds_with_their_class_as_caption(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = FolderSource(path=tree_of(tmp_path / "d"), picture_side_px=10)
    opened = source.open()
    ignored, bare = caplog.messages
    assert "ignored 1 files that are no pictures and no sounds" in ignored
    assert "1 of 7 files have no caption" in bare and "first: 'loose.png'. Put it in a class folder" in bare
    for split, rows in opened.items().items():
        assert rows == sorted(rows, key=lambda row: row["file_name"])
        assert all(split_by_key(row["file_name"]) == split for row in rows)
    rows = items_of(source)
    captions = {row["file_name"]: opened.record(row).captions for row in rows}
    classed = {"great_tit/1.bmp", "great_tit/3.webp", *(f"great_tit/nest/{n}" for n in ("0.JPG", "2.gif", "4.png"))}
    sound = opened.record(next(row for row in rows if row["file_name"] == "great_tit/hi.flac"))
    assert captions == {**{name: ("great tit",) for name in (*classed, "great_tit/hi.flac")}, "loose.png": ()}
    assert sound.picture is None and sound.utterances[0].text == "great tit"
    for row in rows:
        if row["file_name"].endswith(".flac"):
            continue
        picture = Image.open(io.BytesIO(opened.record(row).picture or b""))
        assert picture.size == ((4, 4) if row["file_name"] == "loose.png" else (10, 5))
    assert len({opened.record(row).key for row in rows}) == 7


def test_metadata_decides_alone_where_there_is_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tree_of(tmp_path / "d")
    (root / "metadata.jsonl").write_text(json.dumps({"file_name": "loose.png", "text": "a cat"}))
    assert [row["file_name"] for row in items_of(FolderSource(path=root))] == ["loose.png"] and not caplog.messages
    names = [("loose.png", "a cat"), ("loose.png", None), ("great_tit/1.bmp", " ")]
    (root / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": n, "text": t}) for n, t in names))
    rows = items_of(FolderSource(path=root))
    assert sorted(row["text"] for row in rows) == ["", "", "a cat"], "one file may stand in several lines"
    (warning,) = caplog.messages
    assert "1 of 2 files have no caption" in warning and "first: 'great_tit/1.bmp'. Write it as text in" in warning


def test_a_plain_folder_is_listed_by_names_and_sizes(tmp_path: Path) -> None:
    source = FolderSource(path=tree_of(tmp_path / "d"))
    listings = [source.listing()]
    (source.path / ".hidden.png").write_bytes(PNG)
    (source.path / "more.txt").write_text("notes")
    assert source.listing() == listings[0], "only what is read counts"
    for change in (
        lambda: (source.path / "new.png").write_bytes(PNG),
        lambda: (source.path / "new.png").write_bytes(PNG + b"x"),
        lambda: (source.path / "new.png").rename(source.path / "old.png"),
    ):
        change()
        listings.append(source.listing())
    assert len(set(listings)) == 4 and None not in listings
    assert FolderSource(path=tmp_path / "nowhere").listing() is None


def test_links_out_of_a_plain_folder_are_refused(tmp_path: Path) -> None:
    root = tree_of(tmp_path / "d")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "private.png").write_bytes(PNG)
    (root / "link.png").symlink_to(tmp_path / "out" / "private.png")
    (root / "folder").symlink_to(tmp_path / "out")
    (root / "circle.png").symlink_to("circle.png")
    source = FolderSource(path=root)
    rows = {row["file_name"]: row for row in items_of(source)}
    assert "folder/private.png" not in rows
    with pytest.raises(DataError, match=r"link\.png: it leads outside its folder"):
        source.open().record(rows["link.png"])
    with pytest.raises(AnyGenError, match=r"circle\.png: "):
        source.open().record(rows["circle.png"])


def test_a_folder_without_pictures_and_sounds_says_what_it_needs(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(
        DataError, match=r"holds no pictures or sounds \(png, .*, ogg\) and no metadata\.jsonl; put them"
    ):
        FolderSource(path=tmp_path).open()


def test_large_photographs_are_shrunk_to_the_same_picture(tmp_path: Path) -> None:
    wave = np.sin(np.arange(800) / 40)[:, None] * np.cos(np.arange(640) / 30)[None]
    picture = Image.fromarray(((np.stack([wave, -wave, wave * 0.5], -1) + 1) * 127.5).astype(np.uint8))
    picture.save(tmp_path / "a.jpg", quality=95)
    picture.save(tmp_path / "b.png")
    source = FolderSource(path=tmp_path, picture_side_px=50)
    small = [Image.open(io.BytesIO(source.open().record(row).picture or b"")) for row in items_of(source)]
    assert [p.size for p in small] == [(40, 50)] * 2
    assert np.abs(np.subtract(*(np.asarray(p, dtype=float) for p in small))).mean() < 2


def test_metadata_of_windows_and_without_a_caption(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "d", [])
    (root / "metadata.jsonl").write_text('\ufeff{"file_name": "cat.png", "text": null}\n', encoding="utf-8")
    (root / "cat.png").write_bytes(PNG)
    opened = FolderSource(path=root).open()
    (item,) = [item for items in opened.items().values() for item in items]
    assert opened.record(item).captions == ()


def test_a_folder_whose_files_change_is_another_input(tmp_path: Path) -> None:
    source = FolderSource(path=folder_of(tmp_path / "d", [{"file_name": "new.png", "text": "a cat"}]))
    absent = source.listing()
    (tmp_path / "d" / "new.png").write_bytes(PNG)
    assert source.listing() != absent and source.listing() == source.listing()


def test_the_webdataset_source_splits_by_key(tmp_path: Path) -> None:
    records = [Record(f"k{i}", captions=(f"caption {i}",), picture=PNG) for i in range(60)]
    write_shard(tmp_path / "w.tar", records)
    source = WebDatasetSource(path=tmp_path).open()
    items = source.items()
    assert sum(len(v) for v in items.values()) == 60 and items["validation"] and items["test"]
    for split, indices in items.items():
        assert all(split_by_key(source.record(i).key) == split for i in indices)
    with pytest.raises(DataError):
        WebDatasetSource(path=tmp_path / "nothing").open()


def test_data_stage_is_deterministic_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    names = [f"cat{i}.png" for i in range(40)]
    few = [n for n in names if split_by_key(n) == "train"][:5] + [n for n in names if split_by_key(n) == "validation"][
        :2
    ]
    source = FolderSource(path=folder_of(tmp_path / "d", [{"file_name": name, "text": name} for name in few]))
    for name in few:
        (tmp_path / "d" / name).write_bytes(PNG)
    runs = []
    for name in ("a", "b"):
        result = make_data(DataConfig(root=tmp_path / name, sources=[source], records_per_shard=2))
        runs.append({p.name: p.read_bytes() for p in result.outputs})
    assert runs[0] == runs[1] and len(runs[0]) == 4
    victim = tmp_path / "a" / "data" / sorted(runs[0])[1]
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "a" / "data").glob("*.tar") if p != victim}
    victim.unlink()
    make_data(DataConfig(root=tmp_path / "a", sources=[source], records_per_shard=2))
    assert victim.read_bytes() == runs[0][victim.name]
    assert kept == {p: p.stat().st_mtime_ns for p in kept}, "whole shards are not made again"


def test_a_stage_first_sweeps_up_what_a_killed_one_left(tmp_path: Path) -> None:
    names = [f"cat{i}.png" for i in range(60)]
    source = FolderSource(path=folder_of(tmp_path / "d", [{"file_name": name, "text": name} for name in names]))
    for name in names:
        (tmp_path / "d" / name).write_bytes(PNG)
    left = tmp_path / "a" / "data" / ".tmp-1-model"
    left.mkdir(parents=True)
    run_stage(DataConfig(root=tmp_path / "a", sources=[source]))
    assert not left.exists()


def test_data_without_a_validation_split_say_so(tmp_path: Path) -> None:
    name = next(f"cat{i}.png" for i in range(99) if split_by_key(f"cat{i}.png") == "train")
    source = FolderSource(path=folder_of(tmp_path / "d", [{"file_name": name, "text": "a cat"}]))
    with pytest.raises(DataError, match="none of them in the split validation"):
        make_data(DataConfig(root=tmp_path / "a", sources=[source]))


def test_training_items_are_repeated_and_held_out_ones_are_not(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.tar", [Record(f"{i:03}", captions=("x",)) for i in range(99)])
    counts = []
    for repeat in (1, 3):
        source = WebDatasetSource(path=tmp_path / "x.tar", repeat=repeat)
        metrics = make_data(DataConfig(root=tmp_path / str(repeat), sources=[source])).metrics
        counts.append((metrics["train_records"], metrics["validation_records"]))
        assert ("repeat" in source.model_dump()) == (repeat > 1), "older recipes stay what they were"
    assert counts[1] == (3 * counts[0][0], counts[0][1])


def test_records_of_two_sources_with_one_key_are_both_kept(tmp_path: Path) -> None:
    keys = [f"{i:03}" for i in range(99)]
    train, held_out = (next(k for k in keys if split_by_key(k) == s) for s in ("train", "validation"))
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_shard(tmp_path / folder / "x.tar", [Record(k, captions=(f"{folder} {k}",)) for k in (train, held_out)])
    sources = [WebDatasetSource(path=tmp_path / folder) for folder in ("a", "b")]
    result = make_data(DataConfig(root=tmp_path / "r", sources=sources))
    captions = {caption for record in RecordStore(result.outputs) for caption in record.captions}
    assert captions == {f"{folder} {key}" for folder in ("a", "b") for key in (train, held_out)}


def test_a_folder_that_grew_is_another_input(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "d", [{"file_name": "cat.png", "text": "a cat"}])
    config = DataConfig(root=tmp_path / "a", sources=[FolderSource(path=folder)])
    before = config.outside_inputs()
    with (folder / "metadata.jsonl").open("a") as file:
        file.write(json.dumps({"file_name": "hi.flac", "text": "hi"}) + "\n")
    assert before and config.outside_inputs() != before


def test_unusual_line_separators_in_texts_survive(tmp_path: Path) -> None:
    rows = [{"file_name": "cat.png", "text": "a\u2028cat\u0085here"}]
    folder = folder_of(tmp_path / "d", [])
    (folder / "metadata.jsonl").write_text(json.dumps(rows[0], ensure_ascii=False) + "\n", encoding="utf-8")
    source = FolderSource(path=folder).open()
    items = [item for group in source.items().values() for item in group]
    assert source.record(items[0]).captions == ("a\u2028cat\u0085here",)
    write_coded_shard(tmp_path / "s", [CodedRecord("a", "pair", ("a\u2028cat\u0085here",))], facts={})
    assert [record.captions for record in CodedStore([tmp_path / "s"], facts={})] == [("a\u2028cat\u0085here",)]


# -- coded shards


CODED = [
    CodedRecord(
        "a",
        "emoji",
        ("a cat", "cat"),
        Codes(np.array([[1, 2, 3, 4]]), "image", (2, 2)),
        (
            CodedUtterance("a cat", "slt", Codes(np.array([[5, 6], [7, 8]]), "audio")),
            CodedUtterance("a cat", "awb", Codes(np.array([[15, 1], [2, 3]]), "audio")),
        ),
    ),
    CodedRecord("b", "scene", ("two cats",), Codes(np.array([[9, 9, 9, 9]]), "image", (2, 2)), (),
                (("cat", Region((0.0, 0.0, 0.5, 0.5))), ("dog", Region((0.5, 0.5, 1.0, 1.0)))), (("how many?", "two"),)),
    CodedRecord("c", "pair", ("words",)),
]  # fmt: skip


def test_coded_shards_come_back_and_know_their_tokenizers(tmp_path: Path) -> None:
    facts = {"image": "x"}
    write_coded_shard(tmp_path / "s0", CODED[:2], facts=facts)
    write_coded_shard(tmp_path / "s1", CODED[2:], facts=facts)
    store = CodedStore([tmp_path / "s1", tmp_path / "s0"], facts=facts)
    assert len(store) == 3 and list(store) == CODED
    with pytest.raises(DataError, match="other tokenizers"):
        CodedStore([tmp_path / "s0"], facts={"image": "y"})
    with pytest.raises(DataError, match="no coded shards"):
        CodedStore([], facts=facts)
    codes = tmp_path / "s0" / "codes.bin"
    codes.write_bytes(codes.read_bytes()[:-2])
    with pytest.raises(CheckpointError, match=r"codes\.bin"):
        CodedStore([tmp_path / "s0"], facts=facts)


def test_codes_beyond_uint16_are_refused(tmp_path: Path) -> None:
    big = CodedRecord("a", "pair", (), Codes(np.array([[70_000]]), "image", (1, 1)))
    with pytest.raises(DataError, match="uint16"):
        write_coded_shard(tmp_path / "s", [big], facts={})
    assert not (tmp_path / "s").exists()


# -- orders


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**40))
def test_permutations_are_permutations(size: int, seed: int) -> None:
    permutation = Permutation(size, seed)
    assert sorted(permutation(i) for i in range(size)) == list(range(size))


def test_permutations_look_random_and_depend_on_the_seed() -> None:
    orders = [[Permutation(1000, seed)(i) for i in range(1000)] for seed in range(20)]
    assert len({tuple(o) for o in orders}) == 20
    means = [np.corrcoef(o, np.arange(1000))[0, 1] for o in orders]
    assert max(abs(m) for m in means) < 0.15
    fixed = [sum(o[i] == i for i in range(1000)) for o in orders]
    assert np.mean(fixed) < 4


def test_mixture_keeps_proportions_and_epochs() -> None:
    mixture = Mixture({"a": 3, "b": 1, "zero": 0}, {"a": 40, "b": 7, "zero": 0}, seed=1)
    draws = [mixture(n) for n in range(4000)]
    counts = {kind: sum(d.kind == kind for d in draws) for kind in ("a", "b")}
    assert counts == {"a": 3000, "b": 1000}
    items = [d.item for d in draws if d.kind == "a"]
    for epoch in range(10):
        assert sorted(items[40 * epoch : 40 * epoch + 40]) == list(range(40))
    assert items[:40] != items[40:80]
    assert len({d.seed for d in draws}) == 4000
    assert mixture(1234) == Mixture({"a": 3, "b": 1}, {"a": 40, "b": 7}, seed=1)(1234), "no hidden state"


@pytest.mark.parametrize("weights", [{}, {"a": 0}, {"a": -1}, {"b": 1}, {"a": 1, "c": 1e-9}])
def test_impossible_mixtures(weights: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Mixture(weights, {"a": 5, "c": 5}, seed=0)


# -- tasks


@pytest.mark.parametrize("text", ["", "text", "text>", "text>smell", "text-image", ">", "foo:bar"])
def test_directions_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="not a direction"):
        Direction.parse(text)


def test_documents_hold_what_belongs_together() -> None:
    record = CODED[0]
    for text, modalities, targets in (
        ("text>image", ("text", "image"), (False, True)),
        ("image>text,audio", ("image", "text", "audio"), (False, True, True)),
        ("audio>audio", ("audio", "audio"), (False, True)),
        (">image", ("image",), (True,)),
    ):
        document = Direction.parse(text).document(record, random.Random(0))
        assert tuple(s.modality for s in document.segments) == modalities
        assert tuple(s.target for s in document.segments) == targets
    spoken = Direction.parse("text>audio").document(record, random.Random(0))
    assert spoken.segments[0].content == "a cat", "the text is what is said"
    both = Direction.parse("text>text").document(record, random.Random(0))
    assert {s.content for s in both.segments} == {"a cat", "cat"}, "two phrasings"
    voices = Direction.parse("audio>audio").document(record, random.Random(0))
    assert voices.segments[0].content != voices.segments[1].content, "two voices"
    asked = Direction.parse("ask").document(CODED[1], random.Random(0))
    assert [s.modality for s in asked.segments] == ["image", "text", "text"] and asked.task == "answer"
    located = Direction.parse("locate").document(CODED[1], random.Random(0))
    assert located.segments[2].content in [region for _, region in CODED[1].objects] and located.task == "locate"


def test_a_name_that_several_things_have_is_located_at_the_first() -> None:
    boxes = [Region((0.1 * i, 0.1 * i, 0.1 * i + 0.5, 0.1 * i + 0.5)) for i in range(4)]
    record = dataclasses.replace(CODED[1], objects=tuple(zip(("cat", "dog", "cat", "dog"), boxes, strict=True)))
    documents = [Direction.parse("locate").document(record, random.Random(seed)) for seed in range(40)]
    told = {(document.segments[1].content, document.segments[2].content) for document in documents}
    assert told == {("cat", boxes[0]), ("dog", boxes[1])}


@pytest.mark.parametrize(("name", "words"), [("infill_image", {"a cat", "cat"}), ("infill_audio", {"a cat"})])
def test_infilling_goes_from_what_is_known_and_mostly_the_text_to_the_whole(name: str, words: set[str]) -> None:
    direction, shares, texts = Direction.parse(name), set(), []
    for seed in range(200):
        document = direction.document(CODED[0], random.Random(seed))
        holed, target = document.segments[0].content, document.segments[-1]
        assert isinstance(holed, Holed) and document.task == "infill" and target.target
        assert holed == Holed(target.codes, holed.known_KT), "the known codes are the target's"
        assert (holed.known_KT == holed.known_KT[0]).all(), "what is missing is missing in every codebook"
        shares.add(int((~holed.known_KT[0]).sum()))
        texts += [str(s.content) for s in document.segments[1:-1]]
    assert shares == ({1, 2, 4} if name == "infill_image" else {1, 2}), "rectangles and spans of every size"
    assert set(texts) == words and 130 < len(texts) < 190


def test_what_is_missing_of_a_picture_is_a_rectangle() -> None:
    codes = Codes(np.zeros((2, 35), int), "image", (5, 7))
    for seed in range(100):
        missing = ~known_at_random(codes, random.Random(seed))[0].reshape(5, 7)
        assert missing.any() and np.array_equal(missing, np.outer(missing.any(1), missing.any(0)))
    assert known_at_random(Codes(np.zeros((2, 0), int), "audio"), random.Random(0)).shape == (2, 0)


def test_directions_know_which_records_they_fit(tmp_path: Path) -> None:
    wordless = CodedRecord("w", "emoji", utterances=(CodedUtterance(" ", "slt", CODED[0].utterances[0].codes),))
    write_coded_shard(tmp_path / "s", [*CODED, wordless], facts={})
    store = CodedStore([tmp_path / "s"], facts={})
    expected = {
        "text>image": [0, 1],
        "scene:text>image": [1],
        "text>audio": [0],
        "ask": [1],
        "locate": [1],
        "quiz": [1],
        "quiz_listed": [1],
        "infill_image": [0, 1],
        "scene:infill_image": [1],
        "infill_audio": [0, 3],
        "audio>text": [0],
        "audio>audio": [0, 3],
        "text>text": [0, 1, 2],
        ">image": [0, 1],
        "emoji:image>text,audio": [0],
        "nothing:text>text": [],
    }
    directions = {text: Direction.parse(text) for text in expected}
    assert {t: store.numbers(d.kind, d.needs, d.lacks).tolist() for t, d in directions.items()} == expected


def test_no_document_says_that_a_sound_without_words_says_nothing() -> None:
    (said, *_), infill = CODED[0].utterances, Direction.parse("infill_audio")
    silent = dataclasses.replace(said, text=" ")
    half = dataclasses.replace(CODED[0], utterances=(silent, said))
    for seed in range(20):
        assert Direction.parse("audio>text").document(half, random.Random(seed)).segments[1].content == "a cat"
        alone = infill.document(dataclasses.replace(half, utterances=(silent,)), random.Random(seed))
        assert [segment.modality for segment in alone.segments] == ["audio", "audio"]


def test_the_stream_is_a_pure_function_of_the_number(tmp_path: Path, tokenizers: dict[str, Any]) -> None:
    write_coded_shard(tmp_path / "s0", CODED, facts={})
    store = CodedStore([tmp_path / "s0"], facts={})
    weights = {"text>image": 2, "text>audio": 1, "locate": 1}
    streams = [DocumentStream(store, weights, tokenizers, drop_share=0.25, free_share=0.25, seed=3) for _ in range(2)]
    forwards = [streams[0](n) for n in range(200)]
    backwards = [streams[1](n) for n in reversed(range(200))][::-1]
    assert forwards == backwards
    assert 25 < sum(dropped for _, dropped in forwards) < 75
    assert 25 < sum(document.task is None for document, _ in forwards) < 75
    with pytest.raises(ConfigError, match=r"asks for 'pair:text>image'"):
        DocumentStream(store, {"pair:text>image": 1}, tokenizers, drop_share=0, free_share=0, seed=0)
