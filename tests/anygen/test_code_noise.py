"""Codes that are read as others: what is predicted stays true, what is read is of the same codebook."""

from __future__ import annotations

import numpy as np
import pytest

from anygen.data.code_noise import with_noise
from anygen.documents import Document, Segment
from anygen.layout import Layout
from anygen.packing import collate, split_long
from anygen.sequence import Sequence, Sequencer
from anygen.vocabulary import Vocabulary
from tokenizers_mm.codes import Codes

VOCABULARY = Vocabulary.create(text=300, image=(1, 64), audio=(2, 16))


@pytest.fixture
def sequence() -> Sequence:
    generator = np.random.default_rng(0)
    picture = Codes(generator.integers(0, 64, (1, 64)), "image", grid_hw=(8, 8))
    sound = Codes(generator.integers(0, 16, (2, 100)), "audio")
    text = Codes(generator.integers(0, 300, (1, 40)), "text")
    segments = (Segment("text", text), Segment("image", picture), Segment("audio", sound, target=True))
    return Sequencer(VOCABULARY, Layout(audio_codebooks=2)).build(Document(segments, task="speak"))


def test_only_codes_are_read_as_others_of_their_codebook(sequence: Sequence) -> None:
    noisy = with_noise(sequence, VOCABULARY, 0.25, np.random.default_rng(1))
    assert noisy.read_S is not None
    kinds_S = VOCABULARY.range_index(sequence.ids_S)
    assert np.array_equal(VOCABULARY.range_index(noisy.read_S), kinds_S), "an id left its codebook"
    is_code_S = np.array([VOCABULARY.ranges[kind].group in ("image", "audio") for kind in kinds_S])
    changed_S = noisy.read_S != sequence.ids_S
    assert not changed_S[~is_code_S].any() and is_code_S.sum() == 64 + 200
    assert 0.15 < changed_S[is_code_S].mean() < 0.3, "a quarter is chosen, some of them by chance as they were"
    assert noisy.ids_S is sequence.ids_S and noisy.target_S is sequence.target_S
    again = with_noise(sequence, VOCABULARY, 0.25, np.random.default_rng(1))
    assert np.array_equal(again.read_S, noisy.read_S)


def test_rows_read_the_noise_and_predict_the_truth(sequence: Sequence) -> None:
    noisy = with_noise(sequence, VOCABULARY, 0.5, np.random.default_rng(1))
    plain, packed = (collate([[one]], 512, pad_id=0) for one in (sequence, noisy))
    assert np.array_equal(packed.labels_T, plain.labels_T) and np.array_equal(packed.target_T, plain.target_T)
    assert np.array_equal(packed.ids_T[: len(noisy)], noisy.read_S)
    pieces = split_long(noisy, 240)
    assert len(pieces) == 2
    assert np.array_equal(np.concatenate([piece.read_S for piece in pieces]), noisy.read_S)
