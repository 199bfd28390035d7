"""Every direction of a model on the emoji world, where truth is exact.

text -> picture and sound -> picture   the nearest of all real emoji, by mean squared pixel error, is the right one
picture -> text                        the caption is one of the picture's own, in any phrasing
sound -> text                          word error rate of the transcript
text -> sound                          word error rate of the model's own transcript of what it said (round trip)
picture -> sound                       the same, against the nearest of the phrasings that voices speak (one or two)

Training names, held-out names (validation and test) and the voice that was never in training are reported apart.
Emoji whose pictures are identical in the font count as one: no model could tell them apart.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from anygen.api import AnyGen
from anygen.data.emoji_names import captions, spoken_forms
from anygen.data.emoji_pictures import EmojiFont, on_white
from anygen.data.speech import HELD_OUT_VOICE, check_voices, speak
from anygen.errors import MissingDependency
from anygen.request import Request
from anygen.training.metrics import Progress
from tokenizers_mm.media import Audio

FIGURES = {
    "text>image": "accuracy",
    "image>text": "accuracy",
    "audio>text": "word error rate",
    "text>audio": "word error rate",
    "image>audio": "word error rate",
    "audio>image": "accuracy",
}
"""What is measured in each direction."""
DIRECTIONS = tuple(FIGURES)
_BATCH = 48


@dataclass(frozen=True)
class Score:
    """One figure with its 95 % interval."""

    value: float
    low: float
    high: float
    count: int
    examples: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    """(truth, answer) of some failures."""


class RealEmoji:
    """The real emoji: pictures, captions and voices to compare with."""

    def __init__(self, side_px: int) -> None:
        self.font, self.side_px = EmojiFont(), side_px
        self.emoji = self.font.catalogue()

    @cached_property
    def pictures(self) -> list[Image.Image]:
        """Every emoji, drawn."""
        return [on_white(self.font.draw(emoji.char, self.side_px)) for emoji in self.emoji]

    @cached_property
    def classes(self) -> npt.NDArray[np.int64]:
        """Class of every emoji: the index of the first one with the same pixels."""
        first: dict[bytes, int] = {}
        return np.array([first.setdefault(picture.tobytes(), index) for index, picture in enumerate(self.pictures)])

    @cached_property
    def _pixels(self) -> npt.NDArray[np.float32]:
        return np.stack([_flat(picture) for picture in self.pictures])

    def nearest(self, picture: Image.Image) -> int:
        """Class of the real emoji with the smallest mean squared pixel error."""
        errors = np.square(self._pixels - _flat(picture.resize((self.side_px, self.side_px)))).sum(axis=1)
        return int(self.classes[int(errors.argmin())])

    def captions_of(self, index: int) -> set[str]:
        """Captions that are right for a picture: its own, and those of emoji that look exactly like it."""
        return {caption for i in self._twins_of(index) for caption in captions(self.emoji[i].parts)}

    def spoken_forms_of(self, index: int) -> list[str]:
        """Of these captions, those that voices speak."""
        return sorted({form for i in self._twins_of(index) for form in spoken_forms(self.emoji[i].parts)})

    def held_out(self) -> list[int]:
        """Emoji outside the training split, but for those that look exactly like one in it."""
        seen = {int(self.classes[i]) for i, emoji in enumerate(self.emoji) if emoji.split == "train"}
        return [i for i, emoji in enumerate(self.emoji) if emoji.split != "train" and int(self.classes[i]) not in seen]

    def _twins_of(self, index: int) -> list[int]:
        return [int(i) for i in np.flatnonzero(self.classes == self.classes[index])]


def evaluate_emoji(
    model: AnyGen,
    *,
    limit: int | None = None,
    directions: Sequence[str] = DIRECTIONS,
    voice: str = "slt",
    seed: int = 0,
) -> dict[str, dict[str, Score]]:
    """Scores by direction and group (`train`, `held_out`, and for speech in `unheard_voice`).

    Args:
        model: to evaluate.
        limit: at most so many names a group, drawn with a fixed seed; None takes all.
        directions: some of `DIRECTIONS`.
        voice: a training voice that speaks the inputs.
        seed: of the samples.
    """
    check_voices((voice, HELD_OUT_VOICE))
    if any(FIGURES[direction] == "word error rate" for direction in directions):
        num_word_errors("a", "a")  # a missing package is told before an hour of generation
    world = RealEmoji(model.bundle.tokenizers["image"].config.side_px)  # type: ignore[attr-defined]
    groups = {
        "train": [i for i, emoji in enumerate(world.emoji) if emoji.split == "train"],
        "held_out": world.held_out(),
    }
    if limit is not None:
        groups = {
            name: sorted(random.Random(0).sample(items, min(limit, len(items)))) for name, items in groups.items()
        }
    run = _Run(model, world, seed)
    scores: dict[str, dict[str, Score]] = {}
    for direction in directions:
        measure = run.measures[direction]
        scores[direction] = {name: measure(items, voice) for name, items in groups.items()}
        if direction in ("audio>text", "audio>image"):
            scores[direction]["unheard_voice"] = measure(groups["train"], HELD_OUT_VOICE)
    return scores


class _Run:
    def __init__(self, model: AnyGen, world: RealEmoji, seed: int) -> None:
        self.model, self.world, self.seed = model, world, seed
        self.measures: dict[str, Callable[[list[int], str], Score]] = {
            "text>image": self.text_to_image,
            "image>text": self.image_to_text,
            "audio>text": self.audio_to_text,
            "text>audio": self.text_to_audio,
            "image>audio": self.image_to_audio,
            "audio>image": self.audio_to_image,
        }

    def text_to_image(self, items: list[int], voice: str) -> Score:
        requests = [Request(text=self._phrase(i), output="image", seed=self.seed + i) for i in items]
        return self._retrieval(items, self._generate("text>image", requests, "image"))

    def audio_to_image(self, items: list[int], voice: str) -> Score:
        sounds = [self._speak(i, voice)[1] for i in items]
        requests = [Request(audio=s, output="image", seed=self.seed + i) for i, s in zip(items, sounds, strict=True)]
        return self._retrieval(items, self._generate("audio>image", requests, "image"))

    def image_to_text(self, items: list[int], voice: str) -> Score:
        requests = [Request(image=self.world.pictures[i], output="text", seed=self.seed + i) for i in items]
        texts = self._generate("image>text", requests, "text")
        right = [text in self.world.captions_of(i) for i, text in zip(items, texts, strict=True)]
        return proportion(right, [(self._phrase(i), text) for i, text in zip(items, texts, strict=True)])

    def audio_to_text(self, items: list[int], voice: str) -> Score:
        spoken = [self._speak(i, voice) for i in items]
        return word_error_rate([text for text, _ in spoken], self._transcribe([sound for _, sound in spoken], items))

    def text_to_audio(self, items: list[int], voice: str) -> Score:
        texts = [self.world.emoji[i].words_of(voice) for i in items]
        requests = [Request(text=t, output="audio", seed=self.seed + i) for i, t in zip(items, texts, strict=True)]
        return word_error_rate(texts, self._transcribe(self._generate("text>audio", requests, "audio"), items))

    def image_to_audio(self, items: list[int], voice: str) -> Score:
        requests = [Request(image=self.world.pictures[i], output="audio", seed=self.seed + i) for i in items]
        heard = self._transcribe(self._generate("image>audio", requests, "audio"), items)
        truths = [self.world.spoken_forms_of(i) for i in items]
        nearest = [min(truth, key=lambda t: num_word_errors(t, h)) for truth, h in zip(truths, heard, strict=True)]
        return word_error_rate(nearest, heard)

    def _phrase(self, index: int) -> str:
        """The noun phrase of an emoji."""
        return self.world.emoji[index].parts.phrase

    def _speak(self, index: int, voice: str) -> tuple[str, Audio]:
        text = self.world.emoji[index].words_of(voice)
        return text, speak(text, voice)

    def _transcribe(self, sounds: list[Audio], items: list[int]) -> list[str]:
        requests = [Request(audio=s, output="text", seed=self.seed + i) for i, s in zip(items, sounds, strict=True)]
        return self._generate("audio>text", requests, "text")

    def _generate(self, title: str, requests: list[Request], modality: str) -> list[Any]:
        progress = Progress(title, len(requests))
        media = []
        for start in range(0, len(requests), _BATCH):
            outputs = self.model.generate_batch(requests[start : start + _BATCH])
            media += [output.samples[0].of(modality)[0] for output in outputs]
            progress.advance(count=len(outputs))
        progress.close()
        return media

    def _retrieval(self, items: list[int], pictures: list[Image.Image]) -> Score:
        found = [self.world.nearest(picture) for picture in pictures]
        right = [int(self.world.classes[i]) == f for i, f in zip(items, found, strict=True)]
        return proportion(right, [(self._phrase(i), self._phrase(f)) for i, f in zip(items, found, strict=True)])


def proportion(right: Sequence[bool], pairs: Sequence[tuple[str, str]] = ()) -> Score:
    """Share of True with its Wilson interval.

    >>> score = proportion([True] * 8 + [False] * 2)
    >>> [round(v, 2) for v in (score.value, score.low, score.high)]
    [0.8, 0.49, 0.94]
    """
    n, z = len(right), 1.96
    if n == 0:
        return Score(math.nan, math.nan, math.nan, 0)
    p = sum(right) / n
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    failures = [pair for pair, good in zip(pairs, right, strict=True) if not good] if pairs else []
    low, high = (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)
    return Score(p, max(0.0, low), min(1.0, high), n, tuple(failures[:20]))


def word_error_rate(truths: Sequence[str], answers: Sequence[str]) -> Score:
    """Word errors over words, case and punctuation apart, with a bootstrap interval over utterances."""
    errors = np.array([num_word_errors(truth, answer) for truth, answer in zip(truths, answers, strict=True)])
    words = np.array([len(words_of(truth)) for truth in truths])
    if not words.sum():
        return Score(math.nan, math.nan, math.nan, 0)
    generator = np.random.default_rng(0)
    draws = generator.integers(0, len(words), (500, len(words)))
    low, high = np.percentile(errors[draws].sum(1) / words[draws].sum(1), [2.5, 97.5])
    failures = [pair for pair, count in zip(zip(truths, answers, strict=True), errors, strict=True) if count]
    return Score(float(errors.sum() / words.sum()), float(low), float(high), len(words), tuple(failures[:20]))


def num_word_errors(truth: str, answer: str) -> int:
    """Substituted, deleted and inserted words (jiwer)."""
    try:
        import jiwer
    except ImportError as error:
        raise MissingDependency('evaluation needs the package jiwer: pip install "anygen[eval]"') from error
    left, right = words_of(truth), words_of(answer)
    if not left or not right:
        return max(len(left), len(right))
    counts = jiwer.process_words(" ".join(left), " ".join(right))
    return int(counts.substitutions + counts.deletions + counts.insertions)


def words_of(text: str) -> list[str]:
    """Lower-case words without punctuation.

    >>> words_of("Man, medium-dark skin tone!")
    ['man', 'medium-dark', 'skin', 'tone']
    """
    kept = "".join(c if c.isalnum() or c in "-' " else " " for c in text.lower())
    return kept.split()


def _flat(picture: Image.Image) -> npt.NDArray[np.float32]:
    return (np.asarray(picture.convert("RGB"), dtype=np.float32) / 255).ravel().astype(np.float32)
