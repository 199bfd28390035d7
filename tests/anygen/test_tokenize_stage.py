"""Stage `tokenize`: every utterance gets its own codes, however its record's sounds were grouped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from anygen.data.records import Record, RecordStore, Utterance, write_shard
from anygen.data.source import flac_of
from anygen.stages.tokenize import _encode
from tokenizers_mm.audio import AudioTokenizer
from tokenizers_mm.media import Audio

RATE_HZ = 8000


def test_every_utterance_gets_its_own_codes_with_any_number_of_threads(
    tmp_path: Path, audio_tokenizer: AudioTokenizer
) -> None:
    random = np.random.default_rng(0)
    records = []
    for number in range(70):  # more than are encoded at once
        lengths = random.integers(50, 4000, size=number % 4)
        sounds = [flac_of(Audio(0.1 * random.normal(size=n).astype(np.float32), RATE_HZ)) for n in lengths]
        utterances = tuple(Utterance(f"{number} {n}", f"v{n}", sound) for n, sound in enumerate(sounds))
        records.append(Record(f"r{number}", captions=("a",), utterances=utterances))
    write_shard(tmp_path / "train-00000.tar", records)
    threads = torch.get_num_threads()
    coded = {}
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            coded[count] = list(_encode(RecordStore([tmp_path / "train-00000.tar"]), None, audio_tokenizer))
    finally:
        torch.set_num_threads(threads)
    assert coded[1] == coded[3]
    assert [record.key for record in coded[1]] == [record.key for record in records]
    for record, found in zip(records, coded[1], strict=True):
        assert [(u.text, u.voice) for u in found.utterances] == [(u.text, u.voice) for u in record.utterances]
        assert [u.codes for u in found.utterances] == [audio_tokenizer.encode(u.sound) for u in record.utterances]
