"""Questions asked and answered aloud, and boxes that are named: from the scene to the document."""

from __future__ import annotations

import dataclasses
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from anygen.data.coded import RECORDS, CodedStore, write_coded_shard
from anygen.data.emoji_pictures import FONT_PATHS
from anygen.data.emoji_source import EmojiSource
from anygen.data.records import Record, RecordStore, Utterance, write_shard
from anygen.data.shard_index import Has
from anygen.data.sources import flac_of
from anygen.data.tasks import Direction
from anygen.errors import ConfigError, DataError
from anygen.stages.tokenize import _encode
from tokenizers_mm.audio import AudioTokenizer
from tokenizers_mm.media import Audio, Region

QUESTIONS = (("how many cats are there?", "one"), ("what is left of the cat?", "a dog"))
OBJECTS = (("cat", Region((0.5, 0.0, 1.0, 0.5))), ("dog", Region((0.0, 0.0, 0.5, 0.5))), ("dog", Region((0.0, 0.5, 0.5, 1.0))))  # fmt: skip


def said(text: str, seed: int) -> Utterance:
    noise = np.random.default_rng(seed).normal(size=700 + 90 * seed) * 0.1
    return Utterance(text, "espeak:en-gb+f3", flac_of(Audio(noise.astype(np.float32), 8000)))


def scene() -> Record:
    spoken = tuple((said(q, 2 * i + 1), said(a, 2 * i + 2)) for i, (q, a) in enumerate(QUESTIONS))
    return Record("s", "scene", ("a cat",), None, (said("a cat", 0),), OBJECTS, QUESTIONS, spoken)


def test_records_come_back_and_their_spoken_questions_are_no_utterances(tmp_path: Path) -> None:
    records = [scene(), dataclasses.replace(scene(), key="t", spoken_questions=())]
    write_shard(tmp_path / "a.tar", records)
    store = RecordStore([tmp_path / "a.tar"])
    assert list(store) == records
    assert [store.num_sounds(i) for i in range(2)] == [1, 1], "what says the record, not what is asked about it"
    silent = dataclasses.replace(scene(), spoken_questions=())
    write_shard(tmp_path / "b.tar", [silent])
    assert (
        b"asked:" in (tmp_path / "a.tar").read_bytes() and b"spoken_questions" not in (tmp_path / "b.tar").read_bytes()
    )


def test_a_shard_that_lacks_a_spoken_answer_is_a_data_error(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [scene()])
    told = b'"text": "a dog", "voice": "espeak:en-gb+f'
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes().replace(told + b"3", told + b"4"))
    with pytest.raises(DataError, match=r"record 's' is broken: KeyError: 'answered:1:espeak:en-gb\+f4'"):
        list(RecordStore([tmp_path / "a.tar"]))


def test_every_spoken_question_gets_its_own_codes(tmp_path: Path, audio_tokenizer: AudioTokenizer) -> None:
    records = [
        scene(),
        dataclasses.replace(scene(), key="t", spoken_questions=()),
        dataclasses.replace(scene(), key="u"),
    ]
    write_shard(tmp_path / "train-00000.tar", records)
    coded = list(_encode(RecordStore([tmp_path / "train-00000.tar"]), None, audio_tokenizer))
    for record, found in zip(records, coded, strict=True):
        assert [u.codes for u in found.utterances] == [audio_tokenizer.encode(u.sound) for u in record.utterances]
        for pair, spoken in zip(record.spoken_questions, found.spoken_questions, strict=True):
            assert [(u.text, u.voice) for u in spoken] == [(u.text, u.voice) for u in pair]
            assert [u.codes for u in spoken] == [audio_tokenizer.encode(u.sound) for u in pair]
    write_coded_shard(tmp_path / "coded", coded, facts={})
    store = CodedStore([tmp_path / "coded"], facts={})
    assert list(store) == coded
    assert store.numbers("", Has.SPOKEN_QUESTIONS, Has(0)).tolist() == [0, 2]
    assert b"spoken_questions" not in (tmp_path / "coded" / RECORDS).read_bytes().splitlines()[1]


def test_documents_of_boxes_and_spoken_questions(audio_tokenizer: AudioTokenizer, tmp_path: Path) -> None:
    write_shard(tmp_path / "train-00000.tar", [scene()])
    (record,) = _encode(RecordStore([tmp_path / "train-00000.tar"]), None, audio_tokenizer)
    draws = [Direction.parse("ask_aloud").document(record, random.Random(seed)) for seed in range(30)]
    assert {tuple(s.modality for s in d.segments) for d in draws} == {("image", "audio", "audio")}
    assert {tuple(s.target for s in d.segments) for d in draws} == {(False, False, True)}
    pairs = [tuple(u.codes for u in pair) for pair in record.spoken_questions]
    found = [pairs.index(tuple(s.content for s in d.segments[1:])) for d in draws]  # type: ignore[arg-type]
    assert set(found) == {0, 1} and all(d.task == "answer" for d in draws), "an answer follows its own question"
    names = {Direction.parse("name").document(record, random.Random(seed)).segments[1:] for seed in range(60)}
    assert {(given.content, target.content) for given, target in names} == {(box, name) for name, box in OBJECTS}
    assert all(given.modality == "region" and target.modality == "text" and target.target for given, target in names)
    assert Direction.parse("name").needs == Has.PICTURE | Has.OBJECTS
    assert Direction.parse("scene:ask_aloud").needs == Has.PICTURE | Has.SPOKEN_QUESTIONS


def test_the_share_is_recorded_only_where_it_is_used_and_needs_a_voice() -> None:
    assert "spoken_scene_share" not in EmojiSource().model_dump(mode="json")
    assert EmojiSource(spoken_scene_share=0.5).model_dump(mode="json")["spoken_scene_share"] == 0.5
    with pytest.raises(ConfigError, match="name some in `voices`"):
        EmojiSource(voices=(), spoken_scene_share=0.5).open()


@pytest.mark.skipif(
    not any(path.is_file() for path in FONT_PATHS) or shutil.which("flite") is None,
    reason="needs the Debian packages fonts-noto-color-emoji and flite",
)
def test_a_share_of_the_scenes_is_asked_aloud_and_nothing_else_changes() -> None:
    plain = EmojiSource(voices=("slt", "awb"), num_scenes=24).open()
    some = EmojiSource(voices=("slt", "awb"), num_scenes=24, spoken_scene_share=0.5).open()
    records = [(plain.record(i), some.record(i)) for i in range(24)]
    assert all(b == dataclasses.replace(a, spoken_questions=b.spoken_questions) for a, b in records)
    spoken = [b for _, b in records if b.spoken_questions]
    assert 4 < len(spoken) < 20
    assert {pair[0].voice for b in spoken for pair in b.spoken_questions} == {"slt", "awb"}
    for record in spoken:
        assert tuple((q.text, a.text) for q, a in record.spoken_questions) == record.questions
        assert len({u.voice for pair in record.spoken_questions for u in pair}) == 1, "one voice a scene"
