"""Text tokens: SentencePiece with byte fallback and identity normalisation, lossless on every Unicode string.

Structure tokens are not in this model: no text, however written, can become one (`anygen.vocabulary` adds them by
offset). SentencePiece keeps one id, 0, for "unknown"; byte fallback means that no text encodes to it.

Source: Kudo and Richardson 2018, arXiv 1808.06226.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece

from tokenizers_mm.codes import Codes, Modality, check_codes, fingerprint_of
from tokenizers_mm.errors import CheckpointError, InputError

UNKNOWN = 0
MAX_CHARACTERS = 2**20
MODEL_FILE = "text.model"

# SentencePiece writes a space as U+2581. A literal U+2581 would come back as a space: it goes in as its UTF-8 bytes.
_SPACE_MARK = "\u2581"
_SPACE_MARK_BYTES = ("<0xE2>", "<0x96>", "<0x81>")


class TextTokenizer:
    r"""`str` to piece ids and back.

    >>> tokenizer = train_text_tokenizer(["a red apple", "a red cat"] * 20, vocabulary_size=300)
    >>> tokenizer.decode(tokenizer.encode("a red  cat\n\u2581 \U0001f408"))
    'a red  cat\n\u2581 \U0001f408'
    """

    modality: Modality = "text"
    num_codebooks = 1
    rate_hz = None
    grid_hw = None
    unused_codes = ((UNKNOWN, UNKNOWN + 1),)
    """[start, stop) of the codes that no text encodes to."""

    def __init__(self, model_bytes: bytes) -> None:
        self.model_bytes = model_bytes
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
        except (RuntimeError, UnicodeDecodeError, TypeError) as error:
            raise CheckpointError(f"not a SentencePiece model: {error}") from error
        self._space_mark_ids = [self._model.piece_to_id(piece) for piece in _SPACE_MARK_BYTES]
        if UNKNOWN in self._space_mark_ids:
            raise CheckpointError("the SentencePiece model has no byte pieces; train it with byte_fallback=True")

    @property
    def codebook_size(self) -> int:
        """Number of pieces."""
        return int(self._model.vocab_size())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the model."""
        return fingerprint_of({"kind": "sentencepiece"}, {"model": np.frombuffer(self.model_bytes, np.uint8)})

    def encode(self, text: str) -> Codes:
        """Text to 1 x T pieces, all of them in [1, codebook_size).

        Raises:
            InputError: not a string, longer than `MAX_CHARACTERS`, or holding lone surrogates (not valid Unicode text).
        """
        check_text(text)
        ids: list[int] = []
        for index, part in enumerate(text.split(_SPACE_MARK)):
            if index:
                ids += self._space_mark_ids
            ids += self._model.encode(part)
        return Codes(np.array([ids], dtype=np.int64).reshape(1, -1), "text")

    def decode(self, codes: Codes) -> str:
        """Pieces to text; bytes that are not UTF-8 (a model may sample them) come back as U+FFFD."""
        check_codes(codes, "text", self.codebook_size, 1)
        return str(self._model.decode(codes.codes_KT[0].tolist()))

    def piece_bytes(self, code: int) -> bytes:
        """The UTF-8 bytes that a code stands for; none for the unknown one."""
        piece = str(self._model.id_to_piece(code))
        if self._model.is_byte(code):
            return bytes([int(piece[3:5], 16)])
        return b"" if code == UNKNOWN else piece.replace(_SPACE_MARK, " ").encode("utf-8")

    def save(self, folder: Path) -> None:
        """Write the model file into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MODEL_FILE).write_bytes(self.model_bytes)

    @classmethod
    def load(cls, folder: Path) -> TextTokenizer:
        """Read what `save` wrote."""
        try:
            return cls((folder / MODEL_FILE).read_bytes())
        except OSError as error:
            raise CheckpointError(f"no text tokenizer in {folder}: expected {MODEL_FILE}") from error


def check_text(text: str) -> None:
    """Refuse what no text tokenizer takes.

    Raises:
        InputError: not a string, longer than `MAX_CHARACTERS`, or holding lone surrogates (not valid Unicode text).
    """
    if not isinstance(text, str):
        raise InputError(f"text must be a str; got {type(text).__name__}")
    if len(text) > MAX_CHARACTERS:
        raise InputError(f"text has {len(text):,} characters; at most {MAX_CHARACTERS:,} are read")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"text is not valid Unicode: lone surrogate at character {error.start}") from error


def train_text_tokenizer(sentences: Iterable[str], *, vocabulary_size: int) -> TextTokenizer:
    """BPE pieces for `sentences`; deterministic (one thread).

    The result has fewer than `vocabulary_size` pieces where the text has not enough different strings.
    """
    writer = io.BytesIO()
    lines = (sentence for sentence in sentences if sentence)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=writer,
            model_type="bpe",
            vocab_size=vocabulary_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=1.0,
            unk_id=UNKNOWN,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise InputError(f"cannot train a text tokenizer of {vocabulary_size} pieces: {error}") from error
    return TextTokenizer(writer.getvalue())
