"""The measures of the emoji world, on answers whose score is known."""

from __future__ import annotations

import math
import random
import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from anygen.data.emoji_names import captions
from anygen.data.emoji_pictures import FONT_PATHS, EmojiFont
from anygen.data.scenes import is_countable, make_scene
from anygen.data.speech import speak
from anygen.evaluation.cider import Cider
from anygen.evaluation.edges import EdgeSpace
from anygen.evaluation.emoji import RealEmoji
from anygen.evaluation.frechet import kernel_distance
from anygen.evaluation.recogniser import LIST_LENGTH, lists_of
from anygen.evaluation.scores import (
    character_error_rate,
    num_word_errors,
    proportion,
    ratio,
    word_error_rate,
    words_of,
)
from anygen.evaluation.suite.scene_judges import iou, is_placed
from anygen.evaluation.suite.scene_reading import Read, SceneReader
from anygen.evaluation.voices import Voices, aligned_mel_distance
from tokenizers_mm.media import Audio, Region

pytest.importorskip("jiwer", reason="the extra [eval] is not installed")
needs_font = pytest.mark.skipif(not any(p.is_file() for p in FONT_PATHS), reason="needs fonts-noto-color-emoji")
needs_flite = pytest.mark.skipif(shutil.which("flite") is None, reason="needs the Debian package flite")


@pytest.mark.parametrize(
    ("truth", "answer", "errors"),
    [
        ("a red apple", "a red apple", 0),
        ("a red apple", "A RED, apple!", 0),
        ("a red apple", "a read apple", 1),
        ("a red apple", "", 3),
        ("", "two words", 2),
        ("man, dark skin tone", "man medium-dark skin tone", 1),
    ],
)
def test_word_errors(truth: str, answer: str, errors: int) -> None:
    assert num_word_errors(truth, answer) == errors


def test_rates_and_intervals() -> None:
    score = word_error_rate(["a b", "c d"] * 50, ["a b", "c x"] * 50)
    assert score.value == 0.25 and score.low < 0.25 < score.high and score.count == 100
    assert score.examples[0] == ("c d", "c x")
    share = proportion([True, False] * 200, [("t", "a")] * 400)
    assert share.value == 0.5 and 0.44 < share.low < 0.46 and len(share.examples) == 20
    assert math.isnan(proportion([]).value) and math.isnan(word_error_rate([], []).value)
    assert words_of("Mx Claus, T-Rex's") == ["mx", "claus", "t-rex's"]
    assert character_error_rate(["abcd", "ef"], ["abxd", ""]).value == 3 / 6
    skewed = ratio([0, 0, 0, 9], [1, 1, 1, 1])
    assert skewed.value == 9 / 4 and skewed.low == 0 and 2.25 < skewed.high <= 9


def slow_cider(candidate: str, references: list[str], sets: list[list[str]]) -> float:
    """Equations 2 and 5 of arXiv 1411.5726, word for word."""

    def grams(text: str, n: int) -> Counter[tuple[str, ...]]:
        words = text.split()
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    total = 0.0
    for n in (1, 2, 3, 4):
        idf = {g: math.log(len(sets) / max(1, sum(any(g in grams(t, n) for t in s) for s in sets)))
               for text in [candidate, *references] for g in grams(text, n)}  # fmt: skip
        for reference in references:
            c, s = ({g: count * idf[g] for g, count in grams(text, n).items()} for text in (candidate, reference))
            norms = [math.sqrt(sum(v * v for v in vector.values())) for vector in (c, s)]
            if all(norms):
                dot = sum(min(c[g], s[g]) * s[g] for g in c if g in s)
                difference = len(candidate.split()) - len(reference.split())
                total += 10 * math.exp(-(difference**2) / (2 * 6**2)) * dot / (norms[0] * norms[1]) / len(references)
    return total / 4


def test_cider_is_the_formula_of_the_paper() -> None:
    sets = [
        ["a red apple on a table", "one red apple"],
        ["a cat on a mat", "the cat"],
        ["a red cat", "a cat of red"],
        ["x"],
    ]
    cider = Cider(sets)
    candidates = [
        "a red apple on a table",
        "a a a a cat on on on",
        "red",
        "nothing known here at all",
        "the cat on a table",
    ]
    for candidate in candidates:
        for references in sets:
            assert cider.score(candidate, references) == pytest.approx(slow_cider(candidate, references, sets))
    assert cider.score("a red apple on a table", ["a red apple on a table"]) == pytest.approx(10)
    assert cider.score("a red apple on a table a red apple on a table", ["a red apple on a table"]) < 6, (
        "clipped and damped"
    )


def test_kernel_distance_is_the_unbiased_estimate_over_pairs() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 4)) + 0.5, rng.normal(size=(7, 4))
    unit = np.sqrt(np.square(y - y.mean(0)).mean())
    a, b = (x - y.mean(0)) / unit, (y - y.mean(0)) / unit

    def k(p: np.ndarray, q: np.ndarray) -> float:
        return float((p @ q / 4 + 1) ** 3)

    slow = [k(a[i], a[j]) + k(b[i], b[j]) - k(a[i], b[j]) - k(a[j], b[i]) for i in range(7) for j in range(7) if i != j]
    found = kernel_distance(x, y)
    assert found.value == pytest.approx(np.mean(slow)) and found.low < found.value < found.high
    assert kernel_distance(y, y).value == pytest.approx(0), "a set is no distance from itself"
    assert kernel_distance(10 * x, 10 * y).value == pytest.approx(found.value), "whatever the unit"


def test_edges_and_colours_both_count() -> None:
    pytest.importorskip("skimage", reason="the extra [eval] is not installed")
    rng = np.random.default_rng(0)
    shapes = [np.kron(rng.random((4, 4)) > 0.5, np.ones((8, 8))) for _ in range(6)]
    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (230, 230, 40)]
    pictures = [
        Image.fromarray(np.where(shape[:, :, None] > 0, np.array(colour), 255).astype(np.uint8))
        for shape in shapes
        for colour in colours
    ]
    space = EdgeSpace(pictures)
    assert space.nearest(pictures).tolist() == list(range(24))
    noisy = [
        Image.fromarray((np.asarray(p) * 0.8 + rng.integers(0, 50, (32, 32, 3))).astype(np.uint8)) for p in pictures
    ]
    assert (space.nearest(noisy) == np.arange(24)).mean() > 0.9
    features = space.features(pictures)
    num_edges = features.shape[1] - 48
    assert np.var(features[:, :num_edges], axis=0).sum() == pytest.approx(np.var(features[:, num_edges:], axis=0).sum())
    assert space.components(pictures).shape == (24, 32) and abs(space.components(pictures).mean(0)).max() < 1e-9


def test_the_recogniser_is_asked_for_as_many_texts_whatever_is_measured() -> None:
    others = [f"text {n}" for n in range(900)]
    wanted = [[f"own {n}", f"an own {n}"] for n in range(300)]
    lists = lists_of(wanted, others)
    assert [row for rows, _ in lists for row in rows] == list(range(300))
    for rows, texts in lists:
        assert len(texts) == len(set(texts)) == LIST_LENGTH
        assert {text for row in rows for text in wanted[row]} <= set(texts)
    assert lists_of([], others) == []
    assert lists_of(wanted[:2], others) == lists_of(wanted[:2], others[::-1]), "the rest is drawn by rule"


@needs_flite
def test_voices_are_told_apart_and_a_sound_is_near_its_recording() -> None:
    texts = ["a red apple", "the flag of Norway", "two cats", "a man with dark skin tone", "a rocket"]
    voices = Voices({voice: [speak(text, voice) for text in texts] for voice in ("slt", "awb", "kal")})
    for voice in ("slt", "awb", "kal"):
        name, similarity = voices.nearest(speak("a guitar and a wolf", voice))
        assert name == voice and similarity > 0.5
    apple = speak("a red apple", "slt")
    slower = Audio(np.interp(np.arange(0, len(apple.samples_T), 0.9), np.arange(len(apple.samples_T)), apple.samples_T).astype(np.float32), apple.rate_hz)  # fmt: skip
    same, tempo, other, words = (
        aligned_mel_distance(sound, apple)
        for sound in (apple, slower, speak("a red apple", "awb"), speak("three rockets", "awb"))
    )
    assert same == 0 and 0 < tempo < other < words


@needs_font
def test_real_scenes_are_read_back_and_swapped_ones_are_not_in_place() -> None:
    font = EmojiFont()
    things = [emoji for emoji in font.catalogue() if is_countable(emoji)]
    reader = SceneReader([(thing.parts.subject, thing.char) for thing in things], font)
    counts, names, places, swapped = [], [], [], []
    for seed in range(60):
        scene = make_scene(things, font, side_px=64, generator=np.random.default_rng([5, seed]))
        read = reader.read(scene.picture)
        counts.append(len(read) == len(scene.objects))
        names.append(Counter(r.name for r in read) == Counter(o.name for o in scene.objects))
        if len({o.name for o in scene.objects}) == 2:
            places.append(is_placed(scene, read))
            swapped.append(is_placed(scene, [Read(r.name, 1 - r.row, 1 - r.column) for r in read]))
    assert min(map(np.mean, (counts, names, places))) >= 0.95, list(map(np.mean, (counts, names, places)))
    assert not any(swapped) and len(places) > 20
    assert reader.read(Image.new("RGB", (64, 64), "white")) == []


def test_intersection_over_union() -> None:
    whole = Region((0.0, 0.0, 1.0, 1.0))
    assert iou(whole, whole) == 1 and iou(whole, Region((0.5, 0.5))) == 0
    assert iou(whole, Region((0.0, 0.0, 0.5, 0.5))) == 0.25
    assert iou(Region((0.0, 0.0, 0.4, 1.0)), Region((0.5, 0.0, 1.0, 1.0))) == 0
    assert iou(whole, Region((0.9, 0.9, 0.1, 0.1))) == 0, "turned inside out"


@pytest.mark.slow
@needs_font
def test_retrieval_finds_the_real_thing_and_counts_twins_as_one() -> None:
    world = RealEmoji(32)
    for index in range(0, len(world.emoji), 400):
        assert world.nearest(world.pictures[index]) == world.classes[index]
    names = {emoji.name: index for index, emoji in enumerate(world.emoji)}
    norway, bouvet = names["Norway"], names["Bouvet_Island"]
    assert world.classes[norway] == world.classes[bouvet]
    assert set(captions(world.emoji[bouvet].parts)) <= world.captions_of(norway)
    assert world.classes[names["cat"]] != world.classes[names["dog"]]
    assert set(world.spoken_forms_of(norway)) < world.captions_of(norway)
    held_out, twin = world.held_out(), names["snowboarder_light_skin_tone"]
    assert world.emoji[twin].split != "train" and world.classes[twin] == world.classes[names["snowboarder"]]
    assert twin not in held_out and 300 < len(held_out) < 400, "the font draws it like one that was seen"
    groups = world.groups(7)
    assert groups == world.groups(7) and [len(items) for items in groups.values()] == [7, 7]
    assert not set(groups["held-out names"]) - set(held_out)


@pytest.mark.slow
@needs_font
def test_the_fast_search_is_the_search() -> None:
    world = RealEmoji(16)
    real = np.stack([np.asarray(p, dtype=np.float64).ravel() for p in world.pictures])
    rng, chosen = np.random.default_rng(0), random.Random(0).sample(range(len(world.emoji)), 40)
    for index in chosen:
        pixels = np.asarray(world.pictures[index], dtype=np.float64) * 0.7 + rng.normal(size=(16, 16, 3)) * 40 + 40
        noisy = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        slow = int(np.square(real - np.asarray(noisy, dtype=np.float64).ravel()).sum(1).argmin())
        assert world.nearest(noisy) == world.classes[slow]
