"""Directions about one emoji: every pair of modalities, the same modality, and several answers at once.

Where sound is given or asked for, the text is what is said, as in training; else it is the noun phrase. Groups are
training names, held-out names, and, where sound is given, training names in the voice that was never in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from anygen.data.speech import HELD_OUT_VOICE
from anygen.data.tasks import Direction
from anygen.documents import Media
from anygen.evaluation.suite.answers import as_it_is, through_codes
from anygen.evaluation.suite.bench import Bench
from anygen.evaluation.suite.cases import Case, Groups, Judge, Part
from anygen.evaluation.suite.picture_judges import judge_pictures
from anygen.evaluation.suite.speech_judges import judge_codec, judge_speech
from anygen.evaluation.suite.text_judges import judge_captions, judge_rephrasings, judge_transcripts
from anygen.request import Request
from tokenizers_mm.codes import Modality

UNHEARD = "unheard voice"
DIRECTIONS = {
    "text>image": "Draw what a phrase names.",
    "audio>image": "Draw what is said.",
    "image>image": "Go on from a picture: another one of the same.",
    "image>text": "Name a picture.",
    "audio>text": "Write down what is said.",
    "text>text": "Say it in other words.",
    "text>audio": "Say a text.",
    "image>audio": "Say what a picture shows.",
    "audio>audio": "Say it again.",
    "image>text,audio": "Name a picture, then say it.",
    "text>image,audio": "Draw a text, then say it.",
    "audio>text,image": "Write down what is said, then draw it.",
}


def emoji_parts() -> list[Part]:
    """The ceilings first, then every direction."""
    pictures, sounds = "pictures through codes", "recordings through codes"
    one = frozenset[Modality]()
    ceilings = [
        Part(pictures, "The real pictures, encoded and decoded: what a perfect transformer would draw.", ("image",),
             partial(_groups, (), ("image",)), {"image": judge_pictures}, through_codes, one),
        Part("recordings", "The real recordings: what the judges of speech make of the best there is.", ("audio",),
             _recordings, {"audio": judge_speech}, as_it_is, one),
        Part(sounds, "The real recordings, encoded and decoded: what a perfect transformer would say.", ("audio",),
             _recordings, {"audio": judge_codec}, through_codes, one),
    ]  # fmt: skip
    return ceilings + [_part(name, about) for name, about in DIRECTIONS.items()]


def _part(name: str, about: str) -> Part:
    direction = Direction.parse(name)
    inputs: tuple[Modality, ...] = direction.inputs  # type: ignore[assignment]
    outputs: tuple[Modality, ...] = direction.targets  # type: ignore[assignment]
    judges: dict[Modality, Judge] = {"image": judge_pictures, "audio": judge_speech, "text": judge_captions}
    if "audio" in inputs:
        judges["text"] = judge_transcripts
    elif inputs == ("text",):
        judges["text"] = judge_rephrasings
    return Part(name, about, outputs, partial(_groups, inputs, outputs), judges, needs=frozenset(inputs))


def _groups(inputs: Sequence[Modality], outputs: tuple[Modality, ...], bench: Bench) -> Groups:
    voice = bench.voices[0] if bench.voices else ""
    groups = {name: [_case(bench, i, inputs, outputs, voice) for i in items] for name, items in bench.groups.items()}
    if "audio" in inputs and len(outputs) == 1:
        train = bench.groups["training names"]
        groups[UNHEARD] = [_case(bench, i, inputs, outputs, HELD_OUT_VOICE) for i in train]
    return groups


def _recordings(bench: Bench) -> Groups:
    """The names as they are said, in the voice of their group."""
    groups = _groups(("audio",), ("audio",), bench)
    return {
        name: [replace(case, truth={"audio": case.request.inputs[0].content}) for case in cases]  # type: ignore[dict-item]
        for name, cases in groups.items()
    }


def _case(bench: Bench, index: int, inputs: Sequence[Modality], outputs: tuple[Modality, ...], voice: str) -> Case:
    emoji, world = bench.world.emoji[index], bench.world
    has_sound = "audio" in (*inputs, *outputs)
    phrase = emoji.words_of(voice) if has_sound else emoji.parts.phrase
    given: dict[Modality, Media] = {"text": phrase, "image": world.pictures[index]}
    truth = dict(given)
    if has_sound:
        given["audio"] = bench.speak(phrase, voice)
        others = [other for other in bench.voices if other != voice]
        repeats = "audio" in inputs and "audio" in outputs and others
        truth["audio"] = bench.speak(phrase, others[0]) if repeats else given["audio"]
    captions = sorted(world.captions_of(index), key=lambda text: text != phrase)
    if inputs == ("text",) and outputs == ("text",):
        truth["text"] = captions[1]
    request = Request(**{m: given[m] for m in inputs}, output=outputs, seed=bench.seed + index)  # type: ignore[arg-type]
    return Case(
        request,
        {modality: truth[modality] for modality in outputs},
        texts=(phrase,) if "audio" in inputs else tuple(captions),
        said=(phrase,) if {"text", "audio"} & set(inputs) else tuple(world.spoken_forms_of(index)),
        emoji=index,
    )
