"""Text tokens of a language model: byte-level BPE from its `tokenizer.json`, lossless, special tokens out of reach.

Codes are the language model's own token ids, so rows of its embedding can be kept as they are. Two things differ from
the tokenizer that it was trained with, both on purpose:

* Added tokens (`<|im_end|>`, `<think>`, ...) are taken out: whoever writes one writes plain characters. Their ids stay
  in the codebook, and `unused_codes` names them.
* Text is not normalised to NFC: what goes in comes out. Text that is in NFC already, nearly all there is, has the
  codes that the language model knows.

Source: byte-level BPE, Radford et al. 2019 (GPT-2).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from tokenizers_mm.codes import Codes, Modality, check_codes, fingerprint_of
from tokenizers_mm.errors import CheckpointError
from tokenizers_mm.text import MODEL_FILE, TextTokenizer, check_text

TOKENIZER_JSON = "tokenizer.json"
MAX_CODES = 2**20

# GPT-2 writes each byte as a character that can be seen: printable ones as themselves, the others from U+0100 on.
_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_HIDDEN = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + n): byte for n, byte in enumerate(_HIDDEN)}


class LLMTextTokenizer:
    """`str` to token ids of a language model and back; made from the bytes of a `tokenizer.json`.

    Raises:
        CheckpointError: not a tokenizer.json, or of a kind that is not lossless byte-level BPE.
    """

    modality: Modality = "text"
    num_codebooks = 1
    rate_hz = None
    grid_hw = None

    def __init__(self, json_bytes: bytes) -> None:
        self.json_bytes = json_bytes
        try:
            facts = json.loads(json_bytes)
            self._reduced, self.codebook_size = _reduced(facts)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"not a tokenizer.json of byte-level BPE: {type(error).__name__}: {error}") from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(self._reduced))
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(f"tokenizer.json cannot be opened: {error}") from error
        self._pieces = {code: piece for piece, code in self._reduced["model"]["vocab"].items()}

    @cached_property
    def unused_codes(self) -> tuple[tuple[int, int], ...]:
        """[start, stop) of the codes that no text encodes to: special tokens, and numbers that stand for nothing."""
        edges = [-1, *sorted(self._pieces), self.codebook_size]
        return tuple((low + 1, high) for low, high in itertools.pairwise(edges) if high > low + 1)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of what decides the codes; how the file is written does not count."""
        return fingerprint_of({"kind": "byte-level BPE", "codes": self.codebook_size, "tokenizer": self._reduced})

    def encode(self, text: str) -> Codes:
        """Text to 1 x T codes, none of them in `unused_codes`.

        Raises:
            InputError: not a string, too long, or holding lone surrogates; as `TextTokenizer.encode`.
        """
        check_text(text)
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return Codes(np.array([ids], dtype=np.int64).reshape(1, -1), "text")

    def decode(self, codes: Codes) -> str:
        """Codes to text; bytes that are not UTF-8 come back as U+FFFD, unused codes as nothing."""
        check_codes(codes, "text", self.codebook_size, 1)
        return str(self._tokenizer.decode(codes.codes_KT[0].tolist(), skip_special_tokens=False))

    def piece_bytes(self, code: int) -> bytes:
        """The UTF-8 bytes that a code stands for; none for an unused one."""
        return bytes(_BYTE_OF[character] for character in self._pieces.get(code, ""))

    def spell(self, content: bytes) -> list[int]:
        """Codes of bytes, which need not be whole characters."""
        try:
            return self.encode(content.decode("utf-8")).codes_KT[0].tolist()
        except UnicodeDecodeError:
            return [self._code_of_byte[byte] for byte in content]

    @cached_property
    def _code_of_byte(self) -> dict[int, int]:
        vocab = self._reduced["model"]["vocab"]
        return {byte: vocab[character] for character, byte in _BYTE_OF.items()}

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` into `folder`, byte for byte as it came."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TOKENIZER_JSON).write_bytes(self.json_bytes)

    @classmethod
    def load(cls, folder: Path) -> LLMTextTokenizer:
        """Read the `tokenizer.json` of a folder, of ours or of a published checkpoint.

        Raises:
            CheckpointError: there is none, or it cannot be used.
        """
        try:
            return cls((folder / TOKENIZER_JSON).read_bytes())
        except OSError as error:
            raise CheckpointError(f"no text tokenizer in {folder}: expected {TOKENIZER_JSON}") from error


SomeTextTokenizer = TextTokenizer | LLMTextTokenizer


def load_text_tokenizer(folder: Path) -> SomeTextTokenizer:
    """The text tokenizer of a run or bundle, of either kind: the file that is there says which.

    Raises:
        CheckpointError: no file, or one of each kind.
    """
    if not (folder / TOKENIZER_JSON).is_file():
        return TextTokenizer.load(folder)
    if (folder / MODEL_FILE).is_file():
        raise CheckpointError(f"{folder} holds two text tokenizers, {MODEL_FILE} and {TOKENIZER_JSON}: remove one")
    return LLMTextTokenizer.load(folder)


def _reduced(facts: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """What is used of a tokenizer.json, with everything that is not lossless left out or refused; and the codes."""
    model = facts["model"]
    if model.get("type") != "BPE" or model.get("dropout") or model.get("byte_fallback"):
        raise CheckpointError(f"the tokenizer is a {model.get('type')!r} model; expected byte-level BPE, no dropout")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise CheckpointError("the tokenizer marks the inside or the end of words, which is not lossless")
    _check_normalizer(facts.get("normalizer"))
    _check_splitters(list(_splitters(facts.get("pre_tokenizer"))))
    merges = [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in model["merges"]]
    added = {int(token["id"]): bool(token.get("special")) for token in facts.get("added_tokens") or []}
    num_codes = max([*model["vocab"].values(), *added]) + 1
    if num_codes > MAX_CODES:
        raise CheckpointError(f"the tokenizer has ids up to {num_codes - 1:,}; at most {MAX_CODES:,} are read")
    if len({*model["vocab"].values()}) != len(model["vocab"]):
        raise CheckpointError("the tokenizer gives one id to several pieces")
    vocab = _without(added, model["vocab"], merged={"".join(merge) for merge in merges})
    if missing := _BYTE_OF.keys() - vocab.keys():
        raise CheckpointError(f"the tokenizer has no token for {len(missing)} of the 256 bytes: not byte-level BPE")
    plain = {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": bool(model.get("ignore_merges"))}
    parts = {"pre_tokenizer": facts["pre_tokenizer"], "decoder": {"type": "ByteLevel", **_BYTE_LEVEL}}
    return {"version": "1.0", "added_tokens": [], **parts, "model": plain}, num_codes


_BYTE_LEVEL = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}


def _without(added: dict[int, bool], vocab: dict[str, int], *, merged: set[str]) -> dict[str, int]:
    """`vocab` without added tokens, but for those that are ordinary pieces too."""
    kept = {}
    for piece, code in vocab.items():
        ordinary = piece in merged or piece in _BYTE_OF
        if code in added and added[code] and ordinary:
            raise CheckpointError(f"the special token {piece!r} is an ordinary piece too: text could become it")
        if (code not in added or ordinary) and all(character in _BYTE_OF for character in piece):
            kept[piece] = code
    return kept


def _check_normalizer(normalizer: dict[str, Any] | None) -> None:
    parts = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    if odd := [part["type"] for part in parts if part["type"] != "NFC"]:
        raise CheckpointError(f"the tokenizer normalises text by {odd[0]}, which is not lossless; expected NFC or none")


def _splitters(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if part is None:
        return
    if part["type"] != "Sequence":
        yield part
    for inner in part.get("pretokenizers", ()):
        yield from _splitters(inner)


def _check_splitters(parts: list[dict[str, Any]]) -> None:
    for part in parts:
        removes = part.get("behavior") == "Removed" or part.get("add_prefix_space", False)
        if part["type"] not in ("ByteLevel", "Split", "Digits") or removes:
            raise CheckpointError(f"the tokenizer splits text by {part['type']} in a way that is not lossless")
    if [part["type"] for part in parts].count("ByteLevel") != 1:
        raise CheckpointError("the tokenizer does not write text as bytes (ByteLevel): expected byte-level BPE")
