"""The emoji world as a source: every emoji of the font drawn, captioned and spoken, and scenes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field

from anygen.data.emoji_names import captions
from anygen.data.emoji_pictures import Emoji, EmojiFont, on_white
from anygen.data.emoji_stories import make_story
from anygen.data.records import Record, Utterance
from anygen.data.scenes import is_countable, make_scene
from anygen.data.source import Items, Source, SourceConfig, SplitName, flac_of, png_of
from anygen.data.speech import HELD_OUT_VOICE, check_voices, speak, speaker_of
from anygen.errors import ConfigError


class EmojiSource(SourceConfig):
    """The emoji world: every emoji of the font drawn, captioned and spoken, and scenes of them."""

    kind: Literal["emoji"] = "emoji"
    side_px: int = Field(64, ge=8, le=1024)
    voices: tuple[str, ...] = ("awb", "kal", "kal16", "slt", "espeak:en-us", "espeak:en-gb+f3")
    """Voices in every split; flite voices or espeak:LANGUAGE+VARIANT, `@90` behind them for deeper and slower."""
    unheard_voices: tuple[str, ...] = (HELD_OUT_VOICE,)
    """Voices of the split `unheard` only."""
    num_scenes: int = Field(0, ge=0)
    """Scenes in all; every 20th goes to validation, every 20th to test."""
    spoken_scene_share: float = Field(0.0, ge=0, le=1, exclude_if=lambda share: not share)
    """Share of the scenes whose questions are asked and answered aloud, each scene by one of `voices`."""
    num_stories: int = Field(0, ge=0, exclude_if=lambda count: count == 0)
    """Stories of two to four scenes; every 20th goes to validation, every 20th to test."""
    max_emoji: int | None = Field(None, ge=1)
    """Take only this many emoji, spread over the whole list; None takes all."""
    seed: int = 0

    def open(self) -> Source:
        """The source itself."""
        held_out = {speaker_of(voice) for voice in (HELD_OUT_VOICE, *self.unheard_voices)}
        if shared := [voice for voice in self.voices if speaker_of(voice) in held_out]:
            raise ConfigError(f"voice {min(shared)!r} is held out for evaluation; take it out of `voices`")
        if self.spoken_scene_share and not self.voices:
            raise ConfigError("spoken_scene_share needs a voice that speaks the questions: name some in `voices`")
        return _EmojiWorld(self)


@dataclass(frozen=True)
class _Spoken:
    """An emoji and the voices that speak it in one split."""

    emoji: Emoji
    voices: tuple[str, ...]


@dataclass(frozen=True)
class _Told:
    """A story, by number."""

    index: int


class _EmojiWorld:
    def __init__(self, config: EmojiSource) -> None:
        check_voices((*config.voices, *config.unheard_voices))
        self.config = config
        self.font = EmojiFont()
        catalogue = self.font.catalogue()
        self.things = [emoji for emoji in catalogue if is_countable(emoji)]
        if config.max_emoji is not None and config.max_emoji < len(catalogue):
            chosen = np.linspace(0, len(catalogue) - 1, config.max_emoji).round().astype(int)
            catalogue = [catalogue[i] for i in chosen]
        self.catalogue = catalogue

    def items(self) -> Items:
        items: Items = {"train": [], "validation": [], "test": [], "unheard": []}
        for emoji in self.catalogue:
            items[emoji.split].append(_Spoken(emoji, self.config.voices))
            items["unheard"].append(_Spoken(emoji, self.config.unheard_voices))
        for index in range(self.config.num_scenes):
            items[_split_of(index)].append(index)
        for index in range(self.config.num_stories):
            items[_split_of(index)].append(_Told(index))
        return items

    def record(self, item: _Spoken | _Told | int) -> Record:
        if isinstance(item, _Told):
            return self._story(item.index)
        return self._scene(item) if isinstance(item, int) else self._emoji(item)

    def _emoji(self, item: _Spoken) -> Record:
        emoji = item.emoji
        utterances = [_utterance(emoji.words_of(voice), voice) for voice in item.voices]
        picture = png_of(on_white(self.font.draw(emoji.char, self.config.side_px)))
        return Record(emoji.key, "emoji", captions(emoji.parts), picture, tuple(utterances))

    def _scene(self, index: int) -> Record:
        generator = np.random.default_rng([self.config.seed, index])
        scene = make_scene(self.things, self.font, side_px=self.config.side_px, generator=generator)
        objects = tuple((placed.name, placed.box) for placed in scene.objects)
        return Record(
            f"scene-{index:07d}",
            "scene",
            scene.captions,
            png_of(scene.picture),
            (),
            objects,
            scene.questions,
            self._spoken(index, scene.questions),
        )

    def _story(self, index: int) -> Record:
        generator = np.random.default_rng([self.config.seed, index, 2])  # apart from the scenes
        story = make_story(self.things, self.font, side_px=self.config.side_px, generator=generator)
        return Record(
            f"story-{index:07d}", "story", story=tuple(part for text, scene in story for part in (text, png_of(scene)))
        )

    def _spoken(self, index: int, questions: tuple[tuple[str, str], ...]) -> tuple[tuple[Utterance, Utterance], ...]:
        chance = np.random.default_rng([self.config.seed, index, 1])  # apart from what draws the scene
        if chance.random() >= self.config.spoken_scene_share:
            return ()
        voice = self.config.voices[int(chance.integers(len(self.config.voices)))]
        return tuple((_utterance(question, voice), _utterance(answer, voice)) for question, answer in questions)


def _split_of(index: int) -> SplitName:
    splits: dict[int, SplitName] = {0: "test", 1: "validation"}
    return splits.get(index % 20, "train")


def _utterance(text: str, voice: str) -> Utterance:
    return Utterance(text, voice, flac_of(speak(text, voice)))
