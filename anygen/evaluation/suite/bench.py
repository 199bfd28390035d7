"""What every part of an evaluation works with: the model, the real emoji, voices, and who listens."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from anygen.api import AnyGen
from anygen.data.emoji_names import spoken_forms
from anygen.data.emoji_source import EmojiSource
from anygen.data.scenes import Scene, is_countable, make_scene
from anygen.data.speech import HELD_OUT_VOICE, check_voices, speak
from anygen.errors import DataError, MissingDependency
from anygen.evaluation.cider import Cider
from anygen.evaluation.emoji import RealEmoji
from anygen.evaluation.recogniser import Recogniser, is_installed
from anygen.evaluation.voices import Voices
from anygen.request import Request
from anygen.results import Sample
from anygen.training.metrics import Progress
from tokenizers_mm.media import Audio

BATCH = 48
_ENROLLED = 15
"""Recordings by which a voice is known."""
_SCENES = 7_777
"""Seed of the scenes; the recipes' own are drawn from other seeds."""
PACKAGES = {
    "jiwer": ("jiwer", "word and character error rates"),
    "skimage": ("scikit-image", "SSIM, the space of edges and colours, Fréchet and kernel distances"),
    "pocketsphinx": ("pocketsphinx", "what an independent recogniser hears"),
    "pystoi": ("pystoi", "STOI, ESTOI and PESQ of the codec"),
    "scipy": ("scipy", "how like a known voice speech is, and how far from its recordings"),
}
"""Module -> package, and what is left out without it."""


class Bench:
    """A model on the emoji world.

    Args:
        model: to evaluate.
        limit: at most so many cases of a group; None takes all names (and 1,000 scenes).
        seed: the request about emoji or scene i is drawn from seed + i.
        best_of: answers that are drawn for one that is kept, where one input has one answer of another modality; None
            as the model does by itself.
    """

    def __init__(self, model: AnyGen, *, limit: int | None, seed: int, best_of: int | None = None) -> None:
        self.model, self.limit, self.seed, self.best_of = model, limit, seed, best_of
        image = model.bundle.tokenizers.get("image")
        self.world = RealEmoji(image.config.side_px if image is not None else 64)  # type: ignore[attr-defined]
        self.skipped = {
            what: f'the package {package} is not there: pip install "anygen[eval]"'
            for module, (package, what) in PACKAGES.items()
            if not self.has(module)
        }
        self.voices = self._training_voices()
        """Voices of the training data that can be spoken here; the first speaks the inputs."""

    @staticmethod
    def has(module: str) -> bool:
        """True where an optional package is there."""
        return importlib.util.find_spec(module) is not None

    @cached_property
    def groups(self) -> dict[str, list[int]]:
        """Emoji of training and held-out names."""
        return self.world.groups(self.limit)

    @property
    def num_scenes(self) -> int:
        """Scenes of a group."""
        return self.limit or 1000

    @lru_cache(maxsize=4096)  # noqa: B019  a bench lives as long as its evaluation
    def speak(self, text: str, voice: str) -> Audio:
        """A real recording."""
        return speak(text, voice)

    @lru_cache(maxsize=4096)  # noqa: B019
    def scene(self, number: int) -> Scene:
        """A scene that is in no recipe's data."""
        generator = np.random.default_rng([_SCENES, number])
        return make_scene(self.things, self.world.font, side_px=self.world.side_px, generator=generator)

    @cached_property
    def things(self) -> list[Any]:
        """Emoji that scenes are made of."""
        return [emoji for emoji in self.world.emoji if is_countable(emoji)]

    @cached_property
    def recogniser(self) -> Recogniser | None:
        """The independent listener."""
        return Recogniser() if is_installed() else None

    @cached_property
    def sayings(self) -> list[str]:
        """Every phrasing that voices speak."""
        return sorted({form for emoji in self.world.emoji for form in spoken_forms(emoji.parts)})

    @cached_property
    def known_voices(self) -> Voices:
        """The training voices, by recordings of a few names."""
        emoji = self.world.emoji[:: max(1, len(self.world.emoji) // _ENROLLED)][:_ENROLLED]
        return Voices({voice: [self.speak(e.words_of(voice), voice) for e in emoji] for voice in self.voices})

    @cached_property
    def cider(self) -> Cider:
        """Knows which words are common among the captions of all emoji."""
        return Cider(sorted(self.world.captions_of(index)) for index in range(len(self.world.emoji)))

    def generate(self, title: str, requests: Sequence[Request]) -> list[Sample]:
        """The first sample of each request, in batches."""
        progress = Progress(title, len(requests))
        samples: list[Sample] = []
        for start in range(0, len(requests), BATCH):
            samples += [o.samples[0] for o in self.model.generate_batch(requests[start : start + BATCH])]
            progress.advance(count=len(requests[start : start + BATCH]))
        progress.close()
        return samples

    def transcribe(self, sounds: Sequence[Audio], seeds: Sequence[int | None]) -> list[str]:
        """What the model itself hears."""
        pairs = zip(sounds, seeds, strict=True)
        requests = [Request(audio=audio, output="text", seed=seed, best_of=1) for audio, seed in pairs]
        return [str(sample.of("text")[0]) for sample in self.generate("own transcript", requests)]

    def _training_voices(self) -> tuple[str, ...]:
        recipe = self.model.bundle.provenance.get("recipes", {}).get("data", {})
        sources = [source for source in recipe.get("sources", ()) if source.get("kind") == "emoji"]
        wanted = tuple(sources[0]["voices"]) if sources else EmojiSource().voices
        found = []
        for voice in sorted(wanted, key=lambda name: name != "slt"):  # the clearest first, where it is one of them
            try:
                check_voices((voice, HELD_OUT_VOICE))
                found.append(voice)
            except (MissingDependency, DataError) as error:
                self.skipped[f"voice {voice}"] = str(error)
        return tuple(found)
