"""Whether scenes that a model was trained on are easier for it than new ones: if not, more scenes would not help it.

    python benchmarks/scene_limits.py MODEL [--scenes 200] [--seed 0] [--via nothing]

Asks "how many" and "where" of scenes that stage `data` makes from `--seed` (of its training split) and of scenes from
another seed, and prints the share of right counts and the mean IoU of boxes, with 95 % intervals: also apart for scenes
of one kind of thing and of two, where the name decides, and what the wrong answers are. And how many of the things that
scenes are made of are drawn by themselves, nearest of all real emoji to the right one, when asked for as `a red apple`.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Literal

import numpy as np

import anygen
from anygen.data.emoji_names import with_article
from anygen.data.emoji_pictures import EmojiFont
from anygen.data.scenes import NUMBER_WORDS, Scene, is_countable, make_scene
from anygen.evaluation.emoji import RealEmoji
from anygen.evaluation.fidelity import mean_of
from anygen.evaluation.scores import proportion
from anygen.evaluation.suite.scene_judges import iou
from anygen.request import Request

NEW_SEED = 1_000_003
Via = Literal["text", "nothing"] | None
ALONE, BESIDE = "one kind of thing", "two kinds"


def scenes_of(seed: int, count: int) -> list[Scene]:
    """The first scenes of the training split: of every 20, the first two are test and validation."""
    font = EmojiFont()
    things = [emoji for emoji in font.catalogue() if is_countable(emoji)]
    numbers = [n for n in range(2 * count + 20) if n % 20 > 1][:count]
    return [make_scene(things, font, side_px=64, generator=np.random.default_rng([seed, n])) for n in numbers]


def ask_counts(model: anygen.AnyGen, scenes: list[Scene], via: Via) -> dict[str, list[bool]]:
    """Of what is asked first of each scene, how many: right where the thing is alone, right beside another kind.

    And, of wrong answers beside another kind, those that are the number of all things.
    """
    found: dict[str, list[bool]] = {ALONE: [], BESIDE: [], "wrong ones that count all things": []}
    for scene in scenes:
        question, answer = scene.questions[0]
        content = [{"type": "image", "image": scene.picture}, {"type": "text", "text": question}]
        said = (model.generate(content=content, output="text", seed=0, via=via).text or "").strip()
        found[_kind_of(scene)].append(said == answer)
        if _kind_of(scene) == BESIDE and said != answer:
            found["wrong ones that count all things"].append(said == NUMBER_WORDS[len(scene.objects)])
    return found


def ask_boxes(model: anygen.AnyGen, scenes: list[Scene], via: Via) -> dict[str, list[float]]:
    """IoU of the box of one thing of each scene, where one such stands, alone and beside another kind.

    And, of boxes that miss it beside another kind (IoU below a half), those that fit something else.
    """
    found: dict[str, list[float]] = {ALONE: [], BESIDE: [], "misses that fit another thing": []}
    for scene in scenes:
        names = Counter(placed.name for placed in scene.objects)
        wanted = next((placed for placed in scene.objects if names[placed.name] == 1), None)
        if wanted is None:
            continue
        regions = model.generate(image=scene.picture, text=wanted.name, output="region", seed=0, via=via).regions
        fits = [iou(placed.box, regions[0]) if regions else 0.0 for placed in scene.objects]
        fit = fits[scene.objects.index(wanted)]
        found[_kind_of(scene)].append(fit)
        if _kind_of(scene) == BESIDE and fit < 0.5:
            found["misses that fit another thing"].append(float(max(fits) >= 0.5))
    return found


def draw_things(model: anygen.AnyGen) -> list[bool]:
    """Of each thing that scenes are made of, asked for by itself, whether the nearest real emoji is the right one."""
    real = RealEmoji(side_px=64)
    things = [number for number, emoji in enumerate(real.emoji) if is_countable(emoji)]
    names = [with_article(real.emoji[number].parts.subject) for number in things]
    outputs = model.generate_batch([Request(text=name, output="image", seed=0) for name in names])
    found = real.nearest_by_pixels([output.image for output in outputs])
    return [near == real.classes[number] for near, number in zip(found, things, strict=True)]


def _kind_of(scene: Scene) -> str:
    return ALONE if len({placed.name for placed in scene.objects}) == 1 else BESIDE


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--via", choices=("text", "nothing"), help="by way of a listing or not; as the bundle has it")
    options = parser.parse_args()
    model = anygen.AnyGen.from_pretrained(options.model)
    share = proportion(draw_things(model))
    print(
        f"things drawn by themselves: {share.value:.1%} ({share.low:.1%} to {share.high:.1%}) of {share.count}",
        flush=True,
    )
    for name, seed in (("scenes of its training", options.seed), ("new scenes", NEW_SEED)):
        scenes = scenes_of(seed, options.scenes)
        print(name)
        asked, fits = ask_counts(model, scenes, options.via), ask_boxes(model, scenes, options.via)
        asked = {"of all": asked[ALONE] + asked[BESIDE], **asked}
        fits = {"of all": fits[ALONE] + fits[BESIDE], **fits}
        for group, right in asked.items():
            share = proportion(right)
            print(f"  how many, {group}: {share.value:.1%} ({share.low:.1%} to {share.high:.1%}) of {share.count}")
        for group, values in fits.items():
            mean = mean_of(np.array(values))
            print(f"  boxes, {group}: {mean.value:.3f} ({mean.low:.3f} to {mean.high:.3f}) of {mean.count}", flush=True)


if __name__ == "__main__":
    main()
