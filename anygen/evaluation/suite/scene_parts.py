"""Directions about scenes: drawing and naming them, questions in writing and aloud, boxes in and out.

Scenes are new arrangements of things of the training data; their positions, counts and answers are exact.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator

from anygen.documents import Media
from anygen.evaluation.suite.answers import as_it_is, through_codes
from anygen.evaluation.suite.bench import Bench
from anygen.evaluation.suite.cases import Case, Groups, Judge, Part
from anygen.evaluation.suite.scene_judges import judge_boxes, judge_scenes
from anygen.evaluation.suite.speech_judges import judge_spoken_answers
from anygen.evaluation.suite.text_judges import judge_answers, judge_captions
from anygen.request import Request
from tokenizers_mm.codes import Modality

SCENES = "new scenes"
_MOST = 40
"""Scenes that are looked at for one case, at most."""
_IMAGE, _TEXT, _AUDIO, _REGION = (frozenset[Modality]({m}) for m in ("image", "text", "audio", "region"))  # type: ignore[arg-type]


def scene_parts() -> list[Part]:
    """What the reader makes of real scenes first, then every direction."""
    read: dict[Modality, Judge] = {"image": judge_scenes}
    named: dict[Modality, Judge] = {"text": judge_captions}
    told = "Draw a scene, then say it in other words."
    trust = "Real scenes, read from their pixels: how far the reader can be trusted."
    return [
        Part("scenes as they are", trust, ("image",), _depicted, read, as_it_is),
        Part("scenes through codes", "Real scenes, encoded and decoded.", ("image",), _depicted, read, through_codes),
        Part("scene:text>image", "Draw a scene.", ("image",), _depicted, read, needs=_TEXT),
        Part("scene:text>image,text", told, ("image", "text"), _depicted_and_told, read | named, needs=_TEXT),
        Part("scene:image>text", "Say what a scene holds.", ("text",), _captioned, named, needs=_IMAGE),
        Part("ask", "Answer a question about a picture.", ("text",), _asked, {"text": judge_answers},
             needs=_IMAGE | _TEXT),
        Part("ask_aloud", "Answer a spoken question about a picture, aloud.", ("audio",), _asked_aloud,
             {"audio": judge_spoken_answers}, needs=_IMAGE | _AUDIO),
        Part("spoken answers as they are", "Real recordings of the answers: how far the recogniser can be trusted.",
             ("audio",), _asked_aloud, {"audio": judge_spoken_answers}, as_it_is),
        Part("locate", "Where is it? A name to its box.", ("region",), _located, {"region": judge_boxes},
             needs=_IMAGE | _TEXT),
        Part("name", "What is here? A box to the name of what is in it.", ("text",), _named, {"text": judge_answers},
             needs=_IMAGE | _REGION),
    ]  # fmt: skip


def _depicted(bench: Bench) -> Groups:
    return {SCENES: list(_drawings(bench, ("image",)))}


def _depicted_and_told(bench: Bench) -> Groups:
    return {SCENES: list(_drawings(bench, ("image", "text")))}


def _drawings(bench: Bench, outputs: tuple[Modality, ...]) -> Iterator[Case]:
    for number in range(bench.num_scenes):
        scene = bench.scene(number)
        request = Request(text=scene.captions[0], output=outputs, seed=bench.seed + number)
        truth: dict[Modality, Media] = {"image": scene.picture, "text": scene.captions[-1]}
        yield Case(request, {m: truth[m] for m in outputs}, texts=scene.captions, scene=scene)


def _captioned(bench: Bench) -> Groups:
    cases = []
    for number in range(bench.num_scenes):
        scene = bench.scene(number)
        request = Request(image=scene.picture, output="text", seed=bench.seed + number)
        cases.append(Case(request, {"text": scene.captions[0]}, texts=scene.captions, scene=scene))
    return {SCENES: cases}


def _asked(bench: Bench) -> Groups:
    groups: Groups = {}
    for group, number, question, answer in _questions(bench):
        picture = bench.scene(number).picture
        request = Request(image=picture, text=question, output="text", seed=bench.seed + number)
        groups.setdefault(group, []).append(Case(request, {"text": answer}, texts=(answer,)))
    return groups


def _asked_aloud(bench: Bench) -> Groups:
    groups: Groups = {}
    voice = bench.voices[0]
    for group, number, question, answer in _questions(bench):
        picture, sound = bench.scene(number).picture, bench.speak(question, voice)
        request = Request(image=picture, audio=sound, output="audio", seed=bench.seed + number)
        groups.setdefault(group, []).append(Case(request, {"audio": bench.speak(answer, voice)}, said=(answer,)))
    return groups


def _questions(bench: Bench) -> Iterator[tuple[str, int, str, str]]:
    """Group, number of the scene, question and answer: as many of each group, one of a group from each scene."""
    counts: Counter[str] = Counter()
    for number in range(_MOST * bench.num_scenes):
        found = {_kind_of(question): (question, answer) for question, answer in bench.scene(number).questions}
        for kind, (question, answer) in found.items():
            if counts[kind] < bench.num_scenes:
                counts[kind] += 1
                yield kind, number, question, answer
        if len(counts) == 3 and min(counts.values()) == bench.num_scenes:
            return


def _kind_of(question: str) -> str:
    if question.startswith("how many"):
        return "how many"
    return "left or right" if " left of " in question or " right of " in question else "above or below"


def _located(bench: Bench) -> Groups:
    cases: list[Case] = []
    for number in range(_MOST * bench.num_scenes):
        scene = bench.scene(number)
        counts = Counter(placed.name for placed in scene.objects)
        alone = [placed for placed in scene.objects if counts[placed.name] == 1]
        if alone and len(cases) < bench.num_scenes:
            placed = random.Random(number).choice(alone)
            request = Request(image=scene.picture, text=placed.name, output="region", seed=bench.seed + number)
            cases.append(Case(request, {"region": placed.box}))
    return {SCENES: cases}


def _named(bench: Bench) -> Groups:
    cases = []
    for number in range(bench.num_scenes):
        scene = bench.scene(number)
        placed = random.Random(number).choice(scene.objects)
        content = ({"type": "image", "image": scene.picture}, {"type": "region", "region": placed.box})
        request = Request(content=content, output="text", seed=bench.seed + number)
        cases.append(Case(request, {"text": placed.name}, texts=(placed.name,)))
    return {SCENES: cases}
