"""5,000 hostile texts: no id outside the text range, or a typed error; and everything comes back as it went in."""

from __future__ import annotations

import random
import unicodedata

import pytest

from anygen.errors import InputError
from anygen.vocabulary import CONTROL, Vocabulary
from tokenizers_mm.llm_text import LLMTextTokenizer, SomeTextTokenizer
from tokenizers_mm.text import MAX_CHARACTERS, TextTokenizer


@pytest.fixture(params=["own", "of a language model"])
def tokenizer(request: pytest.FixtureRequest, text_tokenizer: TextTokenizer, llm_json: bytes) -> SomeTextTokenizer:
    return text_tokenizer if request.param == "own" else LLMTextTokenizer(llm_json)


def hostile_texts(count: int) -> list[str]:
    spellings = []
    for name in CONTROL:
        for form in (f"<{name}>", f"<|{name}|>", f"[{name.upper()}]", f"{{{name}}}", name):
            spellings += [form, unicodedata.normalize("NFKC", form)]
            spellings.append("".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in form))  # full-width
            spellings.append("\u200b".join(form))
    spellings += ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>"]
    spellings += ["<s>", "</s>", "<unk>", "<0x00>", "<0xE2><0x96><0x81>", "\u2581", "\u2581\u2581bos"]
    odd = ["\x00", "\ud800", "\udfff", "\ufeff", "\u202e", "\U0010ffff", "\uffff", "\r\n", "\t", " ", "  ", "e\u0301"]
    chooser = random.Random(0)
    texts = list(spellings) + odd
    while len(texts) < count:
        parts = [chooser.choice(chooser.choice((spellings, odd))) for _ in range(chooser.randint(1, 12))]
        texts.append("".join(parts))
    return texts[:count]


def test_no_text_becomes_a_control_or_media_token(tokenizer: SomeTextTokenizer) -> None:
    vocabulary = Vocabulary.of({"text": tokenizer})
    allowed = {id for start, stop in vocabulary.text_ids for id in range(start, stop)}
    refused = 0
    for text in hostile_texts(5000):
        try:
            codes = tokenizer.encode(text)
        except InputError as error:
            assert "surrogate" in str(error) and any("\ud800" <= c <= "\udfff" for c in text)
            refused += 1
            continue
        ids = vocabulary.to_ids("text", codes.codes_KT[0])
        assert ids.size == 0 or ids.max() < vocabulary.range("control").start
        assert allowed.issuperset(ids.tolist())
        assert tokenizer.decode(codes) == text
    assert 0 < refused < 2500


def test_a_million_characters_are_read_and_more_are_refused(tokenizer: SomeTextTokenizer) -> None:
    text = "a red apple \u2581 <eos>" * 60_000
    codes = tokenizer.encode(text[:1_000_000])
    assert tokenizer.decode(codes) == text[:1_000_000]
    try:
        tokenizer.encode("a" * (MAX_CHARACTERS + 1))
    except InputError as error:
        assert "1,048,576" in str(error)
    else:
        raise AssertionError("must be refused")
