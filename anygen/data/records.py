"""Records on disk: WebDataset tar shards, written deterministically, read by random access and never extracted.

A record is everything that says the same thing: a picture, captions, spoken utterances, placed objects, questions. In
a shard it is `{key}.json` (captions and the rest), `{key}.png` (or .jpg, .webp) and one `{key}.{voice}.flac` (or
.wav, .ogg) an utterance; questions and answers that are spoken are `{key}.asked:0:{voice}.flac` and
`{key}.answered:0:{voice}.flac`, and the pictures of a story `{key}.story-0.png` and so on. Shards of other tools are
read as they are: `{key}.txt` is a caption, `{key}.wav` an utterance of that text; where there is no other caption,
`{key}.cls` is one, unless it is only a number. Members of other types are not read.
"""

from __future__ import annotations

import io
import json
import logging
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anygen.errors import DataError
from tokenizers_mm.media import Audio, Region, load_sound

logger = logging.getLogger("anygen")
PICTURE_TYPES = ("png", "jpg", "jpeg", "webp")
SOUND_TYPES = ("flac", "wav", "ogg")
MAX_MEMBER_BYTES = 50 * 2**20
MAX_MEMBERS = 1_000_000
_MEMBER = re.compile(
    r"^(?:\./)?(?P<key>[\w-]{1,200})\.(?P<field>(?:[\w+:@-]{1,80}\.)?(?P<type>png|jpg|jpeg|webp|flac|wav|ogg|txt|cls|json))$"
)
_ASKED, _ANSWERED, _STORY = "asked:", "answered:", "story-"
_HIDDEN_OR_UNREAD = re.compile(r"^(?:\./)?(?:[\w-]{1,200}(?:\.[\w+:@-]{1,80}){1,8}|\.[\w+:-][\w.+:-]{0,199})$")
"""What a shard may hold beside what is read: `{key}.npy`, `{key}.seg.pth`, `.nfs0001`; no folder and no `..`."""


@dataclass(frozen=True)
class Utterance:
    """One spoken text; the sound is encoded (FLAC, WAV or OGG)."""

    text: str
    voice: str
    sound: bytes = field(repr=False)

    def audio(self, rate_hz: int) -> Audio:
        """The sound, decoded and resampled."""
        return load_sound(self.sound, rate_hz=rate_hz)


@dataclass(frozen=True)
class Record:
    """Everything that says the same thing, in every modality that is there."""

    key: str
    kind: str = "pair"
    """`emoji`, `scene` or, for a user's own data, `pair`."""
    captions: tuple[str, ...] = ()
    picture: bytes | None = field(default=None, repr=False)
    utterances: tuple[Utterance, ...] = ()
    objects: tuple[tuple[str, Region], ...] = ()
    """(name, box) of what is in the picture."""
    questions: tuple[tuple[str, str], ...] = ()
    """(question, answer) about the picture."""
    spoken_questions: tuple[tuple[Utterance, Utterance], ...] = ()
    """The same, spoken; apart from `utterances`, which say what the whole record says."""
    story: tuple[str | bytes, ...] = field(default=(), repr=False)
    """Texts and encoded pictures that follow one another; apart from `captions` and `picture`."""


def write_shard(path: Path, records: Iterable[Record]) -> int:
    """Write records into one tar, byte for byte the same each time; returns how many."""
    count, seen = 0, set()
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for record in records:
            assert record.key not in seen, f"two records have the key {record.key}: one would hide the other"
            seen.add(record.key)
            for name, data in _members(record):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            count += 1
    return count


def _members(record: Record) -> Iterator[tuple[str, bytes]]:
    facts: dict[str, Any] = {
        "kind": record.kind,
        "captions": record.captions,
        "utterances": [{"text": u.text, "voice": u.voice} for u in record.utterances],
        "objects": [{"name": name, "region": region.values} for name, region in record.objects],
        "questions": record.questions,
    }
    spoken = {
        f"{role}{number}:{utterance.voice}": utterance
        for number, pair in enumerate(record.spoken_questions)
        for role, utterance in zip((_ASKED, _ANSWERED), pair, strict=True)
    }
    if spoken:  # other shards stay byte for byte what they were
        facts["spoken_questions"] = [[{"text": u.text, "voice": u.voice} for u in p] for p in record.spoken_questions]
    pictures = [part for part in record.story if isinstance(part, bytes)]
    if record.story:  # a text, or a picture's number
        numbers = iter(range(len(pictures)))
        facts["story"] = [part if isinstance(part, str) else next(numbers) for part in record.story]
    yield f"{record.key}.json", json.dumps(facts, ensure_ascii=False).encode()
    if record.picture is not None:
        yield f"{record.key}.{_picture_type(record.picture)}", record.picture
    for utterance in record.utterances:
        yield f"{record.key}.{utterance.voice}.flac", utterance.sound
    for name, utterance in spoken.items():
        yield f"{record.key}.{name}.flac", utterance.sound
    for number, picture in enumerate(pictures):
        yield f"{record.key}.{_STORY}{number}.{_picture_type(picture)}", picture


def _picture_type(data: bytes) -> str:
    if data.startswith(b"\x89PNG"):
        return "png"
    return "webp" if data[8:12] == b"WEBP" else "jpg"


class RecordStore:
    """Records of several tar shards, by index. Members are read where they lie; nothing is ever unpacked to disk.

    Raises:
        DataError: a shard is missing, broken, or holds what a shard must not (links, devices, odd names, too much).
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self.paths = sorted(paths)
        if not self.paths:
            raise DataError("no record shards (*.tar) were found")
        self._entries: list[tuple[Path, str, dict[str, tuple[int, int]]]] = []
        for path in self.paths:
            self._entries += [(path, key, members) for key, members in _index(path).items()]

    def __len__(self) -> int:
        return len(self._entries)

    def keys(self) -> list[str]:
        """The key of every record, in order."""
        return [key for _, key, _ in self._entries]

    def has_picture(self, index: int) -> bool:
        """True where a record has a picture of its own, not only a story's; reads nothing."""
        return any(_is_picture(name) for name in self._entries[index][2])

    def num_sounds(self, index: int) -> int:
        """Utterances of a record; reads nothing."""
        return len(self.voices(index))

    def voices(self, index: int) -> list[str]:
        """The voices that say a record, `voice` where its sound has no name, in no order; reads nothing."""
        parts = [name.rpartition(".") for name in self._entries[index][2]]
        named = [voice or "voice" for voice, _, kind in parts if kind in SOUND_TYPES]
        return [voice for voice in named if not voice.startswith((_ASKED, _ANSWERED))]

    def utterance(self, index: int, voice: str) -> Utterance:
        """What one of `voices` says of a record.

        Raises:
            DataError: its sound is there, but the record's JSON does not say what it is.
        """
        found = next((u for u in self[index].utterances if u.voice == voice), None)
        if found is None:
            path, key, _ = self._entries[index]
            raise DataError(f"{path}: record {key!r} has a sound of {voice!r}, which its utterances do not list")
        return found

    def picture(self, index: int, *, of_story: int | None = None) -> bytes | None:
        """The encoded picture of a record, or one of its story's by number; its sounds are not read."""
        path, _, members = self._entries[index]
        wanted = (lambda name: name.startswith(f"{_STORY}{of_story}.")) if of_story is not None else _is_picture
        place = next((place for name, place in members.items() if wanted(name)), None)
        if place is None:
            return None
        with path.open("rb") as file:
            return _read_at(file, *place)

    def __getitem__(self, index: int) -> Record:
        path, key, members = self._entries[index]
        with path.open("rb") as file:
            return _read_record(path, key, {name: _read_at(file, *place) for name, place in members.items()})

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))


def _is_picture(name: str) -> bool:
    return name.split(".")[-1] in PICTURE_TYPES and not name.startswith(_STORY)


def _index(path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Key -> field -> (offset, size), in the shard's order."""
    index: dict[str, dict[str, tuple[int, int]]] = {}
    ignored: list[str] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for count, member in enumerate(tar):
                if count >= MAX_MEMBERS:
                    raise DataError(f"{path} has more than {MAX_MEMBERS:,} members: split it into smaller shards")
                if member.isdir():
                    continue
                match = _MEMBER.match(member.name)
                if member.isreg() and match is None and _HIDDEN_OR_UNREAD.match(member.name):
                    ignored.append(member.name)
                    continue
                if not member.isreg() or match is None:
                    raise DataError(
                        f"{path} holds {member.name!r}; a shard holds plain files named KEY.TYPE or KEY.NAME.TYPE only"
                    )
                if member.size > MAX_MEMBER_BYTES:
                    raise DataError(
                        f"{path}: {member.name!r} has {member.size:,} bytes; at most {MAX_MEMBER_BYTES:,} are read"
                    )
                index.setdefault(match["key"], {})[match["field"]] = (member.offset_data, member.size)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is not a readable tar shard: {error}") from error
    if ignored:
        logger.warning("%s: ignored %d members of types that are not read; first: %r", path, len(ignored), ignored[0])
    return index


def _read_at(file: Any, offset: int, size: int) -> bytes:
    file.seek(offset)
    data: bytes = file.read(size)
    if len(data) != size:
        raise DataError(f"{file.name} is cut short: expected {size} bytes at {offset}, got {len(data)}")
    return data


def _read_record(path: Path, key: str, fields: dict[str, bytes]) -> Record:
    try:
        facts = json.loads(fields["json"]) if "json" in fields else {}
        captions = facts.get("captions", [])
        if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            raise TypeError(f"captions are a list of texts, not {captions!r:.80}")
        if "txt" in fields:
            captions = [*captions, fields["txt"].decode("utf-8").strip()]
        if not captions and "cls" in fields:
            label = fields["cls"].decode("utf-8").strip()
            captions = [] if label.isdigit() or not label else [label.replace("_", " ")]  # a bare number says nothing
        sounds = {
            name.rpartition(".")[0] or "voice": data
            for name, data in fields.items()
            if name.split(".")[-1] in SOUND_TYPES
        }
        spoken = facts.get("utterances")
        if spoken is None:  # a shard of another tool: each sound says the first caption
            spoken = [{"text": captions[0] if captions else "", "voice": voice} for voice in sounds]
        return Record(
            key,
            str(facts.get("kind", "pair")),
            tuple(captions),
            next((data for name, data in fields.items() if _is_picture(name)), None),
            tuple(Utterance(str(u["text"]), str(u["voice"]), sounds[u["voice"]]) for u in spoken),
            tuple((str(o["name"]), Region(tuple(o["region"]))) for o in facts.get("objects", ())),
            tuple((str(q), str(a)) for q, a in facts.get("questions", ())),
            tuple(_spoken_pair(number, pair, sounds) for number, pair in enumerate(facts.get("spoken_questions", ()))),
            tuple(_story_part(part, fields) for part in facts.get("story", ())),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: record {key!r} is broken: {type(error).__name__}: {error}") from error


def _story_part(part: Any, fields: dict[str, bytes]) -> str | bytes:
    if isinstance(part, str):
        return part
    return {name.rpartition(".")[0]: data for name, data in fields.items()}[f"{_STORY}{int(part)}"]


def _spoken_pair(number: int, pair: Any, sounds: dict[str, bytes]) -> tuple[Utterance, Utterance]:
    asked, answered = (
        Utterance(str(u["text"]), str(u["voice"]), sounds[f"{role}{number}:{u['voice']}"])
        for role, u in zip((_ASKED, _ANSWERED), pair, strict=True)
    )
    return asked, answered
