"""Whether scenes that a model was trained on are easier for it than new ones: if not, more scenes would not help it.

    python benchmarks/scene_limits.py MODEL [--scenes 200] [--seed 0]

Asks "how many" and "where" of scenes that stage `data` makes from `--seed` (of its training split) and of scenes from
another seed, and prints the share of right counts and the mean IoU of boxes, with 95 % intervals.
"""

from __future__ import annotations

import argparse
from collections import Counter

import numpy as np

import anygen
from anygen.data.emoji_pictures import EmojiFont
from anygen.data.scenes import Scene, is_countable, make_scene
from anygen.evaluation.fidelity import mean_of
from anygen.evaluation.scores import proportion
from anygen.evaluation.suite.scene_judges import iou
from tokenizers_mm.media import Region

NEW_SEED = 1_000_003


def scenes_of(seed: int, count: int) -> list[Scene]:
    """The first scenes of the training split: of every 20, the first two are test and validation."""
    font = EmojiFont()
    things = [emoji for emoji in font.catalogue() if is_countable(emoji)]
    numbers = [n for n in range(2 * count + 20) if n % 20 > 1][:count]
    return [make_scene(things, font, side_px=64, generator=np.random.default_rng([seed, n])) for n in numbers]


def counted(model: anygen.AnyGen, scenes: list[Scene]) -> list[bool]:
    """Whether the first question of each scene, how many, is answered rightly."""
    right = []
    for scene in scenes:
        question, answer = scene.questions[0]
        content = [{"type": "image", "image": scene.picture}, {"type": "text", "text": question}]
        said = model.generate(content=content, output="text", task="answer", seed=0).text
        right.append((said or "").strip() == answer)
    return right


def overlaps(model: anygen.AnyGen, scenes: list[Scene]) -> list[float]:
    """IoU of the box of one thing of each scene, where one thing stands alone."""
    found = []
    for scene in scenes:
        names = Counter(placed.name for placed in scene.objects)
        alone = [placed for placed in scene.objects if names[placed.name] == 1]
        if alone:
            regions = model.generate(image=scene.picture, text=alone[0].name, output="region", seed=0).regions
            box = regions[0] if regions else None
            found.append(iou(alone[0].box, box) if isinstance(box, Region) else 0.0)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model = anygen.AnyGen.from_pretrained(options.model)
    for name, seed in (("scenes of its training", options.seed), ("new scenes", NEW_SEED)):
        scenes = scenes_of(seed, options.scenes)
        right, fit = proportion(counted(model, scenes)), mean_of(np.array(overlaps(model, scenes)))
        print(f"{name}: how many {right.value:.1%} ({right.low:.1%} to {right.high:.1%}) of {right.count}", end=", ")
        print(f"boxes {fit.value:.3f} ({fit.low:.3f} to {fit.high:.3f}) of {fit.count}", flush=True)


if __name__ == "__main__":
    main()
