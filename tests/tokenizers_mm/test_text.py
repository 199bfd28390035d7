"""SentencePiece text: lossless on any Unicode, deterministic, typed errors."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizers_mm.codes import Codes
from tokenizers_mm.errors import CheckpointError, DataError, InputError
from tokenizers_mm.text import TextTokenizer, train_text_tokenizer

TOKENIZER = train_text_tokenizer(["a red apple", "two cats  left of a dog"] * 30, vocabulary_size=300)


@settings(max_examples=500, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=60))
def test_round_trip_of_any_text(text: str) -> None:
    codes = TOKENIZER.encode(text)
    assert codes.codes_KT.shape[0] == 1
    assert codes.num_steps == 0 or int(codes.codes_KT.min()) >= 1
    assert TOKENIZER.decode(codes) == text


@pytest.mark.parametrize(
    "text", ["", " ", "  a  ", "\u2581", "a\u2581 \u2581b", "\n\t\r\n", "\x00", "e\u0301 \ufb01", "<0x41>"]
)
def test_round_trip_of_awkward_texts(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_training_is_deterministic_and_saved_models_are_equal(tmp_path: Path) -> None:
    again = train_text_tokenizer(["a red apple", "two cats  left of a dog"] * 30, vocabulary_size=300)
    assert again.model_bytes == TOKENIZER.model_bytes and again.fingerprint == TOKENIZER.fingerprint
    TOKENIZER.save(tmp_path)
    loaded = TextTokenizer.load(tmp_path)
    assert loaded.fingerprint == TOKENIZER.fingerprint
    assert loaded.encode("two cats") == TOKENIZER.encode("two cats")


def test_bytes_that_are_not_utf8_decode_to_replacement_characters() -> None:
    broken = Codes(TOKENIZER.encode("\u00e9").codes_KT[:, :1], "text")
    assert "\ufffd" in TOKENIZER.decode(broken)


def test_bad_input() -> None:
    with pytest.raises(InputError, match="surrogate at character 1"):
        TOKENIZER.encode("a\ud800")
    with pytest.raises(InputError, match="must be a str; got bytes"):
        TOKENIZER.encode(b"a")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="must be below"):
        TOKENIZER.decode(Codes([[TOKENIZER.codebook_size]], "text"))  # type: ignore[arg-type]


@pytest.mark.parametrize("model", [b"", b"junk", TOKENIZER.model_bytes[: len(TOKENIZER.model_bytes) // 2]])
def test_broken_models(model: bytes) -> None:
    with pytest.raises(CheckpointError):
        TextTokenizer(model)


def test_missing_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected text\.model"):
        TextTokenizer.load(tmp_path)
