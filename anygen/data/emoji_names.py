"""Names of emoji as captions, and the split that every modality shares.

A name of the `emoji` package, such as `man_kneeling_facing_right_dark_skin_tone`, is taken apart (who or what,
direction, hair, skin tones) and put together again in several phrasings. The split holds out combinations: a name
with exactly one skin tone goes to a bucket by the hash of (name without tone, tone), so every part of a held-out name
is seen in training, the whole is not.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "validation", "test"]

TONE = re.compile(r"_(light|medium-light|medium|medium-dark|dark)_skin_tone")
_HAIR = re.compile(r"^(man|woman|person)_(curly_hair|red_hair|white_hair|blond_hair|bald|beard)$")
_PEOPLE = re.compile(r"^(kiss|couple_with_heart|family)((?:_(?:man|woman|person|adult|child|boy|girl))+)$")
_FACING = "_facing_right"
_PLURAL_FIRST = ("women", "men", "people")
_SINGULAR_FIRST = ("man", "woman", "person", "face", "globe", "children")
_PLURAL_LAST = re.compile(r"(?:[^su']s|hands|glasses|skis|beads)$")
_SINGULAR_LAST = ("tennis", "fleur-de-lis", "rhinoceros", "Aries", "Pisces", "sunglasses")


def split(name: str) -> Split:
    """The split of an emoji, by rule.

    >>> split("cat"), split("waving_hand_dark_skin_tone"), split("kiss_man_man_dark_skin_tone_light_skin_tone")
    ('train', 'train', 'train')
    """
    tones = TONE.findall(name)
    if len(tones) != 1:
        return "train"
    bucket = int(hashlib.sha256(f"{TONE.sub('', name)}|{tones[0]}".encode()).hexdigest(), 16) % 10
    splits: dict[int, Split] = {0: "test", 1: "validation"}
    return splits.get(bucket, "train")


@dataclass(frozen=True)
class EmojiName:
    """The parts of a name."""

    subject: str
    """Who or what, and what they do: `man kneeling`, `flag of Norway`."""
    facing: str = ""
    hair: str = ""
    tones: tuple[str, ...] = ()

    @property
    def plain(self) -> str:
        """The words in their usual order, parts parted by commas."""
        parts = [f"{self.subject} {self.facing}".strip(), self.hair, *(f"{tone} skin tone" for tone in self.tones)]
        return ", ".join(part for part in parts if part)

    @property
    def phrase(self) -> str:
        """A noun phrase: `a man kneeling facing right with dark skin tone`."""
        features = [{"bald": "no hair", "beard": "a beard"}.get(self.hair, self.hair)] if self.hair else []
        if len(self.tones) == 1:
            features.append(f"{self.tones[0]} skin tone")
        elif self.tones:
            features.append(f"{' and '.join(self.tones)} skin tones")
        head = with_article(f"{self.subject} {self.facing}".strip())
        if not features:
            return head
        return f"{head} {'and' if ' with ' in head else 'with'} {' and '.join(features)}"


def parse_name(name: str, *, is_flag: bool = False) -> EmojiName:
    """Take a name of the `emoji` package apart.

    >>> parse_name("man_kneeling_facing_right_dark_skin_tone").phrase
    'a man kneeling facing right with dark skin tone'
    >>> parse_name("woman_medium-light_skin_tone_red_hair").plain
    'woman, red hair, medium-light skin tone'
    >>> parse_name("kiss_man_man_dark_skin_tone_light_skin_tone").phrase
    'a kiss of a man and a man with dark and light skin tones'
    >>> parse_name("Norway", is_flag=True).phrase
    'the flag of Norway'
    """
    tones = tuple(TONE.findall(name))
    rest = TONE.sub("", name)
    facing = ""
    if rest.endswith(_FACING):
        rest, facing = rest[: -len(_FACING)], "facing right"
    hair = ""
    if match := _HAIR.match(rest):
        rest, hair = match[1], match[2].replace("_", " ")
    if match := _PEOPLE.match(rest):
        people = [with_article(person) for person in match[2].strip("_").split("_")]
        subject = f"{match[1].replace('_', ' ')} of {', '.join(people[:-1])} and {people[-1]}"
        if len(people) == 1:
            subject = f"{match[1]} of {people[0]}"
    else:
        subject = rest.replace("_", " ").replace("\u2019", "'")
    return EmojiName(f"flag of {subject}" if is_flag else subject, facing, hair, tones)


def captions(name: EmojiName) -> tuple[str, ...]:
    """Every phrasing of a name.

    >>> captions(parse_name("red_apple"))
    ('red apple', 'a red apple', 'a picture of a red apple', 'red apple emoji')
    """
    return tuple(dict.fromkeys((name.plain, name.phrase, f"a picture of {name.phrase}", f"{name.plain} emoji")))


def spoken_forms(name: EmojiName) -> tuple[str, ...]:
    """The phrasings that are spoken: the short ones.

    >>> spoken_forms(parse_name("grapes"))
    ('grapes',)
    """
    return tuple(dict.fromkeys((name.plain, name.phrase)))


def with_article(noun: str) -> str:
    """`noun` behind `a`, `an`, `the` or nothing.

    >>> [with_article(n) for n in ("owl", "grapes", "women wrestling", "flag of Peru", "unicorn", "SOS button")]
    ['an owl', 'grapes', 'women wrestling', 'the flag of Peru', 'a unicorn', 'an SOS button']
    """
    if re.match(r"(?:flag of|sun|Statue|milky way)(?: |$)", noun):
        return f"the {noun}"
    if is_plural(noun):
        return noun
    vowel = re.match(r"(?:[aeioAEIO]|un[^i]|up|u[mr]|hour|[FHLMNRSX][A-Z])", noun) and not re.match(
        r"(?:one|eu|ewe)", noun
    )
    return f"{'an' if vowel else 'a'} {noun}"


def is_plural(noun: str) -> bool:
    """True for nouns that take no article, as far as the names of emoji need it."""
    head = re.split(r" (?:with|of|in|on|and|behind|from|at) ", noun)[0].split(" ")
    if head[0] in _PLURAL_FIRST:
        return True
    return bool(_PLURAL_LAST.search(head[-1])) and head[-1] not in _SINGULAR_LAST and head[0] not in _SINGULAR_FIRST


def pluralised(noun: str) -> str:
    """The plural of a countable noun.

    >>> [pluralised(n) for n in ("red apple", "fox", "butterfly", "smiling cat with heart-eyes", "mouse")]
    ['red apples', 'foxes', 'butterflies', 'smiling cats with heart-eyes', 'mice']
    """
    head, joint, tail = noun.partition(" with ")
    irregular = {
        "mouse": "mice",
        "goose": "geese",
        "wolf": "wolves",
        "leaf": "leaves",
        "tooth": "teeth",
        "sheep": "sheep",
    }
    *before, last = head.split(" ")
    if last in irregular:
        last = irregular[last]
    elif last in ("fish", "deer", "squid", "shrimp"):
        pass
    elif re.search(r"(?:s|x|ch|sh|tomato|potato|mango)$", last):
        last += "es"
    elif re.search(r"[^aeiou]y$", last):
        last = last[:-1] + "ies"
    else:
        last += "s"
    return " ".join([*before, last]) + joint + tail
