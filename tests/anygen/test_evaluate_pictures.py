"""`anygen evaluate TOKENIZER`: figures whose value is known, and the whole road on a tiny run."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from anygen.cli import app
from anygen.data.records import Record, write_shard
from anygen.errors import CheckpointError, DataError, InputError, MissingDependency
from anygen.evaluation.fidelity import MAX_PSNR_DB, difference_of, mean_of, psnr, ssim
from anygen.evaluation.frechet import covariance, frechet_distance
from anygen.evaluation.picture_coding import code_pictures, open_judge, reconstruct
from anygen.evaluation.picture_page import evaluate_folder, patches_at
from anygen.evaluation.picture_samples import RealPictures, draw_samples, to_bytes
from anygen.evaluation.probes import PROBES, Task, bag_of_codes, ratio_of, tasks_of
from anygen.evaluation.scores import Score
from anygen.evaluation.tokenizers import kind_of
from tokenizers_mm.features import FeatureDecoder, FeatureDecoderConfig
from tokenizers_mm.image import ImageTokenizer
from tokenizers_mm.teacher import TeacherConfig

pytest.importorskip("sklearn", reason="the extra [eval] is not installed")
pytest.importorskip("skimage", reason="the extra [eval] is not installed")

TONES = ("light", "medium", "dark")


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def records(split: str, count: int, *, kind: str = "emoji") -> list[Record]:
    """Noise whose colour tells the skin tone; two subjects."""
    generator = np.random.default_rng(len(split) + 10 * len(kind))
    made = []
    for number in range(count):
        tone = number % 3
        pixels = generator.integers(0, 60, (16, 16, 3), dtype=np.uint8)
        pixels[..., tone] += 180
        name = f"{'man' if number % 2 else 'woman'} kneeling facing right, {TONES[tone]} skin tone"
        made.append(Record(f"{split}{kind}{number}", kind, (name,), png(pixels)))
    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Emoji and pairs; the last test picture is also in training."""
    folder = tmp_path_factory.mktemp("data")
    train = records("train", 40)
    write_shard(folder / "train-00000.tar", [*train, *records("train", 9, kind="pair")])
    write_shard(folder / "validation-00000.tar", [*records("validation", 12), Record("silent", "emoji", ("a",))])
    twin = Record("twin", "emoji", train[7].captions, train[7].picture)
    write_shard(folder / "test-00000.tar", [*records("test", 14), *records("test", 5, kind="pair"), twin])
    return folder


@pytest.fixture(scope="module")
def real(data: Path) -> RealPictures:
    return RealPictures(data, 16)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data: Path, image_tokenizer: ImageTokenizer) -> Path:
    """A run with a tokenizer, its feature decoder and a tiny random teacher in CLIP's layout."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    root = tmp_path_factory.mktemp("run")
    (root / "data").symlink_to(data)
    image_tokenizer.save(root / "image_tokenizer" / "tokenizer")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        size = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        teacher = CLIPVisionModel(CLIPVisionConfig(image_size=16, patch_size=8, **size))
        config = FeatureDecoderConfig(code_dim=4, width=16, depth=1, num_heads=2, deep_width=8, shallow_width=8)
        FeatureDecoder(config).save(root / "image_tokenizer" / "features")
    teacher.save_pretrained(root / "teacher" / "model")
    processor = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (root / "teacher" / "model" / "preprocessor_config.json").write_text(json.dumps(processor))
    return root


def test_psnr_and_ssim_of_known_pictures() -> None:
    generator = np.random.default_rng(0)
    picture = generator.integers(20, 200, (2, 16, 16, 3), dtype=np.uint8)
    assert psnr(picture, picture).tolist() == [MAX_PSNR_DB] * 2
    np.testing.assert_allclose(psnr(picture, picture + 5), 10 * np.log10(255**2 / 25))
    np.testing.assert_allclose(ssim(picture, picture), 1)
    worse = ssim(picture, generator.integers(20, 200, picture.shape, dtype=np.uint8))
    assert (worse < 0.3).all()


def test_ssim_is_that_of_wang_et_al() -> None:
    """Against the formula, at the one place where an 11 px window fits into an 11 px picture."""
    generator = np.random.default_rng(1)
    a, b = generator.integers(0, 256, (2, 1, 11, 11, 3), dtype=np.uint8)
    offsets = np.arange(-5, 6)
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(line, line)[..., None] / np.outer(line, line).sum()
    x, y = a[0].astype(float), b[0].astype(float)
    mean_x, mean_y = (window * x).sum((0, 1)), (window * y).sum((0, 1))
    var_x, var_y = (window * x**2).sum((0, 1)) - mean_x**2, (window * y**2).sum((0, 1)) - mean_y**2
    both = (window * x * y).sum((0, 1)) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    expected = ((2 * mean_x * mean_y + c1) * (2 * both + c2)) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    assert ssim(a, b)[0] == pytest.approx(expected.mean(), rel=1e-6)


def test_means_have_normal_intervals() -> None:
    values = np.random.default_rng(0).normal(3, 2, 400)
    score = mean_of(values)
    assert score.count == 400 and score.value == pytest.approx(values.mean())
    assert score.high - score.low == pytest.approx(2 * 1.96 * 2 / 20, rel=0.1)
    gap = difference_of(values + 1, values)
    assert gap.value == pytest.approx(1) and gap.high - gap.low == pytest.approx((score.high - score.low) * 2**0.5)
    assert mean_of(values[:0]).count == 0


def test_frechet_distance_is_that_of_two_normal_distributions() -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(20_000, 2)) * [1, 2] + [0, 3]
    y = generator.normal(size=(20_000, 2)) * [3, 1] + [1, 1]
    assert frechet_distance(x, y) == pytest.approx((1 + 4) + (1 - 3) ** 2 + (2 - 1) ** 2, rel=0.05)
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x))
    rotation = np.array([[0.6, -0.8], [0.8, 0.6]])
    assert frechet_distance(x @ rotation, y @ rotation) == pytest.approx(frechet_distance(x, y))
    few = generator.normal(size=(12, 30))
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6)


def test_few_samples_are_shrunk_as_ledoit_and_wolf_do() -> None:
    from sklearn.covariance import ledoit_wolf

    x = np.random.default_rng(0).normal(size=(30, 20)) * np.linspace(1, 4, 20)
    np.testing.assert_allclose(covariance(x, shrunk=True), ledoit_wolf(x)[0])
    np.testing.assert_allclose(covariance(x, shrunk=False), np.cov(x.T, bias=True))


def test_nearest_is_exact_in_any_blocks(real: RealPictures, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = list(range(len(real)))
    generator = np.random.default_rng(0)
    drawn = generator.integers(0, 256, (7, 16, 16, 3), dtype=np.uint8)
    pictures = real.bytes_of(numbers).astype(np.int64)
    expected = [int(np.square(pictures - one.astype(np.int64)).sum((1, 2, 3)).argmin()) for one in drawn]
    assert real.nearest(drawn, numbers).tolist() == real.classes[expected].tolist()
    monkeypatch.setattr("anygen.evaluation.picture_samples._BLOCK_VALUES", 3 * 768)
    assert real.nearest(drawn, numbers).tolist() == real.classes[expected].tolist()
    assert real.nearest(real.bytes_of(numbers), numbers[::-1]).tolist() == real.classes.tolist(), "twins are one class"


def test_samples_leave_out_what_training_has_seen(real: RealPictures) -> None:
    assert len(real) == 40 + 9 + 12 + 14 + 5 + 1, "a record without a picture does not count"
    twin = [record.key for record in real.records].index("twin")
    assert real.classes[twin] == 7 and real.is_seen(twin)
    samples = draw_samples(real)
    assert samples.num_seen == 1 and twin not in samples.held_out and len(samples.held_out) == 31
    assert len(samples.train) == 49 and all(real.splits[number] == "train" for number in samples.train)
    kinds = [real.records[number].kind for number in samples.same_kinds]
    assert (kinds.count("emoji"), kinds.count("pair")) == (26, 5) and set(samples.same_kinds) <= set(samples.train)
    few = draw_samples(real, limit=3)
    assert len(few.held_out) == 3 + 3 + 3 and len(few.train) == 6
    assert few == draw_samples(real, limit=3)


def test_data_without_a_held_out_split_are_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "train-00000.tar").symlink_to(data / "train-00000.tar")
    with pytest.raises(DataError, match="held-out ones"):
        RealPictures(tmp_path, 16)
    (tmp_path / "test-00000.tar").symlink_to(data / "train-00000.tar")
    with pytest.raises(DataError, match="nothing is held out"):
        draw_samples(RealPictures(tmp_path, 16))


def test_tasks_have_classes_that_can_be_learnt() -> None:
    held_out = records("test", 24)
    tasks, skipped = tasks_of(records("train", 30), held_out)
    assert [task.name for task in tasks] == ["subject", "skin tone"] and not skipped
    assert set(tasks[0].train_labels) == {"man kneeling", "woman kneeling"}
    assert set(tasks[1].held_out_labels) == {f"{tone} skin tone" for tone in TONES}
    tasks, skipped = tasks_of(records("train", 30), held_out[:19])
    assert not tasks and "needs 20 or more" in skipped["subject"]
    tasks, skipped = tasks_of(records("train", 12), held_out)
    assert [task.name for task in tasks] == ["subject"] and skipped["skin tone"].startswith("0 classes")
    rare = [*records("train", 30), Record("x", "emoji", ("owl",))]
    tasks, _ = tasks_of(rare, [*held_out, Record("y", "emoji", ("owl",))])
    assert len(tasks[0].train_rows) == 30 and 24 not in tasks[0].held_out_rows, "a class of one is left out"


@pytest.mark.parametrize("name", PROBES)
def test_probes_read_what_is_there_and_nothing_more(name: str) -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 300)
    means = generator.normal(size=(3, 10)) * 2
    features = (means[labels] + generator.normal(size=(300, 10))) * 100 + 1000
    features -= features.mean(0)
    words = [str(label) for label in labels]
    task = Task("t", tuple(range(200)), tuple(words[:200]), tuple(range(100)), tuple(words[200:]))
    assert PROBES[name](features[:200], features[200:], task).mean() > 0.95
    noise = generator.normal(size=(300, 10))
    assert PROBES[name](noise[:200], noise[200:], task).mean() < 0.5
    codes = np.where(generator.random((300, 1, 16)) < 0.5, labels[:, None, None], 3)
    bag = bag_of_codes(codes, 5)
    assert PROBES[name](bag[:200], bag[200:], task).mean() > 0.95


def test_bags_of_codes_keep_codebooks_apart() -> None:
    codes = np.array([[[0, 0, 0, 1], [1, 1, 1, 1]]])
    bag = bag_of_codes(codes, 3).toarray()[0]
    np.testing.assert_allclose(bag**2, [3 / 8, 1 / 8, 0, 0, 4 / 8, 0], rtol=1e-6)


def test_ratios_are_of_the_same_pictures() -> None:
    reference = np.arange(200) % 4 > 0
    assert ratio_of(reference, reference) == Score(1.0, 1.0, 1.0, 200)
    score = ratio_of(reference & (np.arange(200) % 3 > 0), reference)
    assert score.value == pytest.approx(2 / 3, abs=0.02) and 0.5 < score.low < score.value < score.high < 0.8


def test_coding_is_the_tokenizer_s_own(real: RealPictures, run: Path, image_tokenizer: ImageTokenizer) -> None:
    judge = open_judge(run / "image_tokenizer" / "tokenizer", device=torch.device("cpu"))
    assert judge.teacher is not None and judge.decoder is not None and not judge.missing
    numbers = list(range(70))  # more than a batch
    coded = code_pictures(image_tokenizer, real, judge, numbers)
    codes = image_tokenizer.encode_pixels(real.pixels(numbers))
    assert np.array_equal(coded.codes_NKT[:, 0], codes.numpy())
    drawn = reconstruct(image_tokenizer, coded, [66, 2])
    assert np.array_equal(drawn, to_bytes(image_tokenizer.decode_codes(codes[[66, 2]], (2, 2))))
    target = judge.teacher(real.pixels([66]), (2, 2))
    np.testing.assert_allclose(coded.from_teacher_ND[66], target.deep_BND[0].mean(0), atol=1e-5)
    predicted = judge.decoder(image_tokenizer.encoder.vectors_of(codes[[66]]), (2, 2))
    cosine = torch.cosine_similarity(predicted.shallow_BND[0], target.shallow_BND[0], dim=-1).mean()
    assert coded.cosines_N2[66, 1] == pytest.approx(float(cosine), abs=1e-5)


def test_patches_lie_in_row_order(image_tokenizer: ImageTokenizer) -> None:
    pictures = np.arange(2 * 16 * 16 * 3, dtype=np.int64).reshape(2, 16, 16, 3).astype(np.uint8)
    patches = patches_at(pictures, [1, 2], image_tokenizer)
    assert np.array_equal(patches[0], pictures[0, :8, 8:]) and np.array_equal(patches[1], pictures[1, 8:, :8])


def test_the_whole_road_from_the_command_line(run: Path, tmp_path: Path) -> None:
    folder, out = run / "image_tokenizer" / "tokenizer", tmp_path / "out"
    assert kind_of(folder) == "picture"
    result = CliRunner().invoke(app, ["evaluate", str(folder), "--out", str(out), "--json"], catch_exceptions=False)
    report = json.loads(result.stdout)
    assert report == json.loads((out / "report.json").read_text())
    figures = {(row["name"], row["group"]): row for row in report["figures"]}
    assert report["held_out_pictures"] == 31 and report["training_pictures"] == 49
    assert figures["PSNR", "held out"]["count"] == 31 and figures["PSNR", "held out, pair"]["count"] == 5
    assert figures["retrieval", "held out, among 67 emoji"]["count"] == 26
    assert (
        0 < figures["codes used", "held out"]["value"] <= figures["codes used", "held out and training"]["value"] <= 1
    )
    for probe in PROBES:
        of_codes, of_teacher = (figures[probe, f"skin tone, {name}"]["value"] for name in ("bag of codes", "teacher"))
        ratio = figures[f"{probe}, of the teacher's", "skin tone, bag of codes"]["value"]
        assert ratio == pytest.approx(of_codes / of_teacher)
        assert (probe, "skin tone, predicted from codes") in figures
    assert {"held out, deep", "held out, shallow"} == {g for n, g in figures if n == "cosine to the teacher"}
    assert figures["Fréchet distance", "held out, real to drawn"]["value"] > 0
    assert sum(name == "speed" for name, _ in figures) == 2
    page = (out / "index.html").read_text()
    assert page.count("original and reconstruction") == 26 + 5 + 16
    assert "http" not in re.sub(r'src="data:[^"]*"', "", page).replace('http-equiv="', "")
    again = CliRunner().invoke(
        app, ["evaluate", str(folder), "--out", str(out), "--limit", "8"], catch_exceptions=False
    )
    assert again.exit_code == 0 and "n=19" not in again.stdout and "n=21" in again.stdout  # 8 + 8 emoji, 5 pairs


def test_what_is_missing_is_told_and_the_rest_is_measured(run: Path, data: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone" / "tokenizer"
    ImageTokenizer.load(run / "image_tokenizer" / "tokenizer").save(alone)
    with pytest.raises(InputError, match="--data"):
        evaluate_folder(alone, out=tmp_path / "out")
    report = evaluate_folder(alone, data=data, out=tmp_path / "out", limit=4)
    names = {row["name"] for row in report["figures"]}
    assert {"PSNR", "SSIM", "retrieval", "perplexity", "speed"} <= names
    assert not {"cosine to the teacher", "Fréchet distance"} & names
    assert set(report["skipped"]) >= {"what needs the feature decoder", "what needs the teacher"}
    named = evaluate_folder(alone, data=data, teacher=run / "teacher" / "model", out=tmp_path / "out")
    assert "Fréchet distance" in {row["name"] for row in named["figures"]}
    assert "what needs the teacher" not in named["skipped"]
    with pytest.raises(CheckpointError):
        evaluate_folder(alone, data=data, teacher=data, out=tmp_path / "out")


def test_a_teacher_that_does_not_fit_is_refused(run: Path) -> None:
    folder = run / "image_tokenizer" / "tokenizer"
    (run / "image_tokenizer" / "features").rename(run / "image_tokenizer" / "kept")
    try:
        config = FeatureDecoderConfig(
            code_dim=4, width=16, depth=1, num_heads=2, deep_width=6, shallow_width=8, teacher=TeacherConfig()
        )
        FeatureDecoder(config).save(run / "image_tokenizer" / "features")
        with pytest.raises(InputError, match="predict 6 and 8"):
            open_judge(folder, device=torch.device("cpu"))
    finally:
        for file in (run / "image_tokenizer" / "features").iterdir():
            file.unlink()
        (run / "image_tokenizer" / "features").rmdir()
        (run / "image_tokenizer" / "kept").rename(run / "image_tokenizer" / "features")


def test_nothing_foreign_is_overwritten_and_options_belong_to_what_is_evaluated(run: Path, tmp_path: Path) -> None:
    folder = run / "image_tokenizer" / "tokenizer"
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(InputError, match="more than an evaluation"):
        evaluate_folder(folder, out=tmp_path)
    for arguments in (["evaluate", str(folder), "--direction", "text>image"], ["evaluate", "--data", str(tmp_path)]):
        with pytest.raises(InputError, match="--d"):
            CliRunner().invoke(app, arguments, catch_exceptions=False)


def test_absent_packages_are_named(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.linear_model", None)
    with pytest.raises(MissingDependency, match=r"anygen\[eval\]"):
        evaluate_folder(run / "image_tokenizer" / "tokenizer", out=tmp_path / "out")
