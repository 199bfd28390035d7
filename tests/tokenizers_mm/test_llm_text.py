"""Text tokens of a language model: lossless, its own ids, its special tokens out of reach, odd files refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers as library
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizers_mm.codes import Codes
from tokenizers_mm.errors import CheckpointError, DataError, InputError
from tokenizers_mm.llm_text import TOKENIZER_JSON, LLMTextTokenizer, load_text_tokenizer
from tokenizers_mm.text import TextTokenizer

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")


@pytest.fixture(scope="module")
def tokenizer(llm_json: bytes) -> LLMTextTokenizer:
    return LLMTextTokenizer(llm_json)


def is_used(tokenizer: LLMTextTokenizer, code: int) -> bool:
    return not any(start <= code < stop for start, stop in tokenizer.unused_codes)


@settings(max_examples=500, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=60))
def test_round_trip_of_any_text(tokenizer: LLMTextTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_in_a_text_are_plain_characters(tokenizer: LLMTextTokenizer) -> None:
    for text in [*SPECIAL, *(f"a {word}{word} b" for word in SPECIAL), "".join(SPECIAL), "<|im_<|im_end|>end|>"]:
        codes = tokenizer.encode(text)
        assert all(is_used(tokenizer, code) for code in codes.codes_KT[0].tolist()), text
        assert tokenizer.decode(codes) == text


def test_codes_are_the_ids_of_the_language_model(tokenizer: LLMTextTokenizer, llm_json: bytes) -> None:
    theirs = library.Tokenizer.from_str(llm_json.decode())
    for text in ("a red apple", "how many apples are there?", "hi!!", "\u00e9t\u00e9 \U0001f408", " \n\n two 2", ""):
        assert tokenizer.encode(text).codes_KT[0].tolist() == theirs.encode(text, add_special_tokens=False).ids
    specials = [theirs.token_to_id(word) for word in SPECIAL]
    assert tokenizer.unused_codes == ((min(specials), max(specials) + 1),)
    assert tokenizer.codebook_size == max(specials) + 1
    assert is_used(tokenizer, 0), "id 0 is a piece like any other here"
    assert theirs.encode("e\u0301").ids != tokenizer.encode("e\u0301").codes_KT[0].tolist(), "NFC is not lossless"


def test_special_tokens_in_the_middle_of_the_ids_are_left_out(llm_json: bytes) -> None:
    facts = json.loads(llm_json)
    words = ["<|pad|>", "red!"]
    shifted = {word: n for n, word in enumerate(words)}
    shifted |= {piece: code + 2 for piece, code in facts["model"]["vocab"].items()}
    facts["model"] |= {"vocab": shifted, "ignore_merges": True}
    facts["added_tokens"] = [
        {**facts["added_tokens"][0], "id": 0, "content": "<|pad|>"},
        {**facts["added_tokens"][0], "id": 1, "content": "red!"},
    ]
    tokenizer = LLMTextTokenizer(json.dumps(facts).encode())
    assert tokenizer.unused_codes == ((0, 2),) and tokenizer.codebook_size == len(shifted)
    for text in words:
        codes = tokenizer.encode(text)
        assert min(codes.codes_KT[0]) >= 2 and tokenizer.decode(codes) == text
    assert tokenizer.decode(Codes([[0, 1]], "text")) == ""  # type: ignore[arg-type]


def test_pieces_and_their_bytes(tokenizer: LLMTextTokenizer, text_tokenizer: TextTokenizer) -> None:
    for one in (tokenizer, text_tokenizer):
        codes = one.encode("a red caf\u00e9 \u2581").codes_KT[0].tolist()
        assert b"".join(one.piece_bytes(code) for code in codes) == "a red caf\u00e9 \u2581".encode()
        assert all(one.piece_bytes(code) == b"" for start, stop in one.unused_codes for code in range(start, stop))
    assert tokenizer.spell(b" red") == tokenizer.encode(" red").codes_KT[0].tolist()
    for byte in range(256):
        (code,) = tokenizer.spell(bytes([byte]))
        assert tokenizer.piece_bytes(code) == bytes([byte])
    half = tokenizer.spell("\u00e9".encode()[:1])
    assert tokenizer.decode(Codes([half], "text")) == "\ufffd"  # type: ignore[arg-type]


def test_saved_and_found_again(tokenizer: LLMTextTokenizer, text_tokenizer: TextTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "llm")
    assert (tmp_path / "llm" / TOKENIZER_JSON).read_bytes() == tokenizer.json_bytes
    assert load_text_tokenizer(tmp_path / "llm").fingerprint == tokenizer.fingerprint
    text_tokenizer.save(tmp_path / "own")
    assert load_text_tokenizer(tmp_path / "own").fingerprint == text_tokenizer.fingerprint
    text_tokenizer.save(tmp_path / "llm")
    with pytest.raises(CheckpointError, match="holds two text tokenizers"):
        load_text_tokenizer(tmp_path / "llm")
    with pytest.raises(CheckpointError, match=r"expected tokenizer\.json"):
        LLMTextTokenizer.load(tmp_path / "own")


def test_the_fingerprint_is_of_the_codes_alone(tokenizer: LLMTextTokenizer) -> None:
    facts = json.loads(tokenizer.json_bytes)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in facts["model"]["merges"]]
    old_style = {**facts, "model": {**facts["model"], "merges": merges}, "post_processor": None}
    assert LLMTextTokenizer(json.dumps(old_style, indent=2).encode()).fingerprint == tokenizer.fingerprint
    fewer = {**facts, "model": {**facts["model"], "merges": merges[:-1]}}
    assert LLMTextTokenizer(json.dumps(fewer).encode()).fingerprint != tokenizer.fingerprint


def test_bad_input(tokenizer: LLMTextTokenizer) -> None:
    with pytest.raises(InputError, match="surrogate at character 1"):
        tokenizer.encode("a\ud800")
    with pytest.raises(InputError, match="must be a str; got bytes"):
        tokenizer.encode(b"a")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="must be below"):
        tokenizer.decode(Codes([[tokenizer.codebook_size]], "text"))  # type: ignore[arg-type]


def model_of(facts: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {**facts, "model": {**facts["model"], **fields}}


def added(facts: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {**facts, "added_tokens": [{**facts["added_tokens"][0], **fields}]}


def merged_piece(facts: dict[str, Any]) -> dict[str, Any]:
    """A special token that merges make too."""
    piece = "".join(facts["model"]["merges"][-1])
    return added(facts, content=piece, id=facts["model"]["vocab"][piece])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: model_of(f, type="WordPiece"), "a 'WordPiece' model"),
        (lambda f: model_of(f, type="Unigram", vocab=[["a", 0.0]]), "a 'Unigram' model"),
        (lambda f: model_of(f, dropout=0.1), "no dropout"),
        (lambda f: model_of(f, end_of_word_suffix="</w>"), "end of words"),
        (lambda f: model_of(f, vocab={"a": 0}, merges=[]), "no token for 255 of the 256 bytes"),
        (lambda f: model_of(f, vocab={**f["model"]["vocab"], "~~": 5}), "one id to several"),
        (lambda f: model_of(f, merges=[["nothing", "here"]]), "cannot be opened"),
        (lambda f: model_of(f, vocab=[1, 2]), "not a tokenizer"),
        (lambda f: {**f, "normalizer": {"type": "Lowercase"}}, "normalises text by Lowercase"),
        (lambda f: {**f, "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}]}}, "by NFKC"),
        (lambda f: {**f, "pre_tokenizer": None}, "does not write text as bytes"),
        (lambda f: {**f, "pre_tokenizer": {"type": "WhitespaceSplit"}}, "by WhitespaceSplit"),
        (
            lambda f: {**f, "pre_tokenizer": {**f["pre_tokenizer"]["pretokenizers"][1], "add_prefix_space": True}},
            "by ByteLevel",
        ),
        (
            lambda f: {**f, "pre_tokenizer": {**f["pre_tokenizer"]["pretokenizers"][0], "behavior": "Removed"}},
            "by Split",
        ),
        (merged_piece, "is an ordinary piece too"),
        (lambda f: added(f, id=2**30), "ids up to 1,073,741,824"),
        (lambda f: {}, "KeyError"),
        (lambda f: [], "not a tokenizer"),
    ],
)
def test_what_is_not_lossless_or_not_a_tokenizer_is_refused(
    llm_json: bytes, change: Callable[[Any], Any], says: str
) -> None:
    with pytest.raises(CheckpointError, match=says):
        LLMTextTokenizer(json.dumps(change(json.loads(llm_json))).encode())


@pytest.mark.parametrize("content", [b"", b"junk", b"\xff\xfe", b'{"model"', b"null"])
def test_files_that_are_no_json(content: bytes) -> None:
    with pytest.raises(CheckpointError, match="not a tokenizer"):
        LLMTextTokenizer(content)
