"""Short spoken names that share their words, as material of a study: choice, split, codes, and who hears them again.

The independent recogniser is pocketsphinx (extra [eval]) with a grammar that knows these names only.

Dimension key: K codebooks, T code frames.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from anygen.data.coded import CodedRecord, CodedStore, CodedUtterance, write_coded_shard
from anygen.data.records import RecordStore
from anygen.evaluation.recogniser import Recogniser, is_installed, spelled
from anygen.evaluation.scores import word_error_rate, words_of
from anygen.files import is_published, write_json
from anygen.stages.run import STAGE_JSON
from anygen.stages.tokenize import coded_facts
from tokenizers_mm.audio import AudioTokenizer
from tokenizers_mm.codes import Codes, fingerprint_of
from tokenizers_mm.media import Audio

SPLITS = {"train": "train-00000", "held_out": "validation-00000"}
"""Group of utterances -> name of its coded shard."""


@dataclass(frozen=True, eq=False)
class Spoken:
    """One utterance."""

    key: str
    """Of the record: an emoji, whoever says its name."""
    text: str
    voice: str
    audio: Audio
    codes: Codes | None = None

    def of_books(self, count: int) -> Codes:
        """The codes of the first books."""
        assert self.codes is not None, f"{self.text!r} was not encoded"
        return Codes(self.codes.codes_KT[:count], "audio")


Groups = dict[str, list[Spoken]]


def chosen(data: Path, voices: Sequence[str], max_duration_s: float, min_names: int, *, rate_hz: int) -> Groups:
    """Utterances of the training shards: short, by these voices, each word in so many names; in two groups.

    Raises:
        SystemExit: nothing is left.
    """
    found = [
        Spoken(record.key, u.text, u.voice, u.audio(rate_hz))
        for record in RecordStore(data.glob("train-*.tar"))
        for u in record.utterances
        if u.voice in voices
    ]
    groups = split_off(shared_words([s for s in found if s.audio.duration_s <= max_duration_s], min_names))
    if not all(groups.values()):
        raise SystemExit("too few names are left: raise --max-duration-s, lower --min-names or add --voices")
    return groups


def shared_words(spoken: list[Spoken], min_names: int) -> list[Spoken]:
    """Leave out utterances with a word that fewer names have, until there is none."""
    while True:
        counts = names_by_word(spoken)
        kept = [s for s in spoken if all(counts[word] >= min_names for word in words_of(s.text))]
        if len(kept) == len(spoken):
            return spoken
        spoken = kept


def names_by_word(spoken: Iterable[Spoken]) -> Counter[str]:
    """In how many records each word is said."""
    return Counter(word for _, word in {(s.key, word) for s in spoken for word in words_of(s.text)})


def split_off(spoken: list[Spoken], share: float = 0.15) -> Groups:
    """Hold out a share of the records, by hash; every word stays in two records of training or more."""
    counts, held_out = names_by_word(spoken), set[str]()
    words: dict[str, set[str]] = {}
    for s in spoken:
        words.setdefault(s.key, set()).update(words_of(s.text))
    for key in sorted(words, key=lambda key: hashlib.sha256(key.encode()).digest()):
        if len(held_out) < share * len(words) and all(counts[word] > 2 for word in words[key]):
            held_out.add(key)
            counts -= Counter(words[key])
    train = [s for s in spoken if s.key not in held_out]
    return {"train": train, "held_out": [s for s in spoken if s.key in held_out]}


def about(groups: Groups) -> dict[str, Any]:
    """Sizes, and how many held-out texts are also said in training (of emoji few, of digits all)."""
    facts: dict[str, Any] = {}
    for group, found in groups.items():
        numbers = {"utterances": len(found), "names": len({s.key for s in found}), "words": len(names_by_word(found))}
        facts[group] = {**numbers, "seconds": sum(s.audio.duration_s for s in found)}
    known = {s.text for s in groups["train"]}
    return facts | {"held_out_texts_in_training": sum(s.text in known for s in groups["held_out"])}


def encoded(groups: Groups, codec: AudioTokenizer, out: Path) -> tuple[Path, Groups]:
    """The groups with their codes, encoded once for each codec and choice; and the folder of a run that holds them."""
    facts = coded_facts(None, codec)
    content = [(group, s.key, s.text, s.voice) for group, found in groups.items() for s in found]
    identity = fingerprint_of({"codec": facts, "utterances": content})
    folder = out / f"work-{identity[:12]}" / "tokenize"
    coded: Groups = {}
    for group, split in SPLITS.items():
        if not is_published(folder / split):
            print(f"encoding {len(groups[group])} utterances, {group}", flush=True)
            write_coded_shard(folder / split, (_record(s, codec) for s in groups[group]), facts=facts)
        records = CodedStore([folder / split], facts=facts)
        codes = [record.utterances[0].codes for record in records]
        coded[group] = [replace(s, codes=c) for s, c in zip(groups[group], codes, strict=True)]
    write_json(folder / STAGE_JSON, {"identity": identity, "config": {}, "metrics": {}})  # what stages look for
    return folder.parent, coded


def _record(spoken: Spoken, codec: AudioTokenizer) -> CodedRecord:
    utterance = CodedUtterance(spoken.text, spoken.voice, codec.encode(spoken.audio))
    return CodedRecord(f"{spoken.key}-{spoken.voice}", "pair", utterances=(utterance,))


def open_recogniser(groups: Groups) -> Recogniser | None:
    """The recogniser of these names, where its package is installed."""
    if not is_installed():
        print("pocketsphinx is not installed: the round trip is heard by the transformer itself only", flush=True)
        return None
    return Recogniser(s.text for found in groups.values() for s in found)


def errors_heard(recogniser: Recogniser, spoken: Sequence[Spoken], sounds: Sequence[Audio]) -> dict[str, Any]:
    """`word_errors` of sounds that should say what was spoken; names that the recogniser cannot spell are out."""
    pairs = [(spelled(s.text), audio) for s, audio in zip(spoken, sounds, strict=True)]
    return word_errors([(truth, recogniser.heard(audio)) for truth, audio in pairs if truth in recogniser.texts])


def floors(codec: AudioTokenizer, spoken: Sequence[Spoken], recogniser: Recogniser, kept: int) -> dict[str, Any]:
    """What the recogniser makes of true speech, and of it after the codec with all books and with the first ones."""
    counts = {"codec": codec.num_codebooks, f"codec, first {kept} books": kept}
    decoded = {name: [codec.decode(s.of_books(count)) for s in spoken] for name, count in counts.items()}
    sounds = {"original": [s.audio for s in spoken], **decoded}
    return {name: errors_heard(recogniser, spoken, found) for name, found in sounds.items()}


def word_errors(pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Word error rate of (truth, answer) pairs with its bootstrap interval, and the share of exact answers.

    >>> errors = word_errors([("red apple", "Red apple"), ("a cat", "a big dog")])
    >>> errors["value"], errors["exact"], errors["n"]
    (0.5, 0.5, 2)
    """
    score = word_error_rate([truth for truth, _ in pairs], [answer for _, answer in pairs])
    exact = sum(words_of(truth) == words_of(answer) for truth, answer in pairs) / max(1, len(pairs))
    return {"value": score.value, "low": score.low, "high": score.high, "n": len(pairs), "exact": exact, "pairs": pairs}
