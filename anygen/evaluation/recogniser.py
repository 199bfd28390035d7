"""An independent recogniser: pocketsphinx (extra [eval]), an acoustic model of its own, with a closed grammar.

It hears one of a list of texts or nothing. Texts with words that its dictionary lacks are no part of the list.
"""

from __future__ import annotations

import importlib
import importlib.util
import random
from collections.abc import Iterable, Sequence

from anygen.evaluation.scores import words_of
from tokenizers_mm.media import Audio

LIST_LENGTH, MAX_OWN = 500, 240
"""Texts of a list, and how many of them may be asked for: the rest is drawn from what else could have been said, so
that a figure does not depend on how many were measured."""
_RATE_HZ = 16_000
_GRAMMAR = "#JSGF V1.0;\ngrammar {name};\npublic <text> = {texts};\n"


def is_installed() -> bool:
    """True where the package is there."""
    return importlib.util.find_spec("pocketsphinx") is not None


def spelled(text: str) -> str:
    """A text as words of the recogniser's dictionary.

    >>> spelled("Man, medium-dark skin tone")
    'man medium dark skin tone'
    """
    return " ".join(words_of(text.replace("-", " ")))


class Recogniser:
    """Hears one of the texts that it was last told to listen for."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._decoder = importlib.import_module("pocketsphinx").Decoder(lm=None, loglevel="FATAL")
        self._count = 0
        self._known: dict[str, bool] = {}
        self.texts: frozenset[str] = frozenset()
        """What it listens for, spelled."""
        if names := list(texts):
            self.listen_for(names)

    def knows(self, text: str) -> bool:
        """True where its dictionary has every word."""
        name = spelled(text)
        if name not in self._known:
            self._known[name] = bool(name) and all(self._decoder.lookup_word(word) for word in name.split())
        return self._known[name]

    def listen_for(self, texts: Iterable[str]) -> None:
        """A new list in place of the last one."""
        self.texts = frozenset(spelled(text) for text in texts if self.knows(text))
        assert self.texts, "none of the texts is in the dictionary"
        self._count += 1
        name = f"texts{self._count}"
        self._decoder.add_jsgf_string(name, _GRAMMAR.format(name=name, texts=" | ".join(sorted(self.texts))))
        self._decoder.activate_search(name)
        if self._count > 1:
            self._decoder.remove_search(f"texts{self._count - 1}")

    def heard(self, audio: Audio) -> str:
        """The text that fits best; empty where none does."""
        samples_T = (audio.resampled(_RATE_HZ).samples_T.clip(-1, 1) * 32767).astype("<i2")
        if len(samples_T) < _RATE_HZ // 100:  # less than a frame
            return ""
        self._decoder.start_utt()
        self._decoder.process_raw(samples_T.tobytes(), full_utt=True)
        self._decoder.end_utt()
        found = self._decoder.hyp()
        return str(found.hypstr) if found else ""


def lists_of(wanted: Sequence[Sequence[str]], others: Sequence[str]) -> list[tuple[range, list[str]]]:
    """Ranges of utterances, and the list of texts to listen for in each: all that would be right, and others.

    Args:
        wanted: of each utterance the texts that would be right.
        others: everything that could be said.

    >>> [(rows, len(texts)) for rows, texts in lists_of([["a"], ["b"]], [str(n) for n in range(900)])]
    [(range(0, 2), 500)]
    """
    shuffled = sorted(others)
    random.Random(0).shuffle(shuffled)
    lists, start, own = [], 0, dict[str, None]()
    for row, texts in enumerate(wanted):
        if row > start and len(own) + len(texts) > MAX_OWN:
            lists.append((range(start, row), _filled(own, shuffled)))
            start, own = row, {}
        own.update(dict.fromkeys(texts))
    return [*lists, (range(start, len(wanted)), _filled(own, shuffled))] if wanted else []


def _filled(own: Iterable[str], others: Iterable[str]) -> list[str]:
    return list(dict.fromkeys([*own, *others]))[:LIST_LENGTH]
