"""The evaluation of a bundle: judges know the truth, parts are kept, reports are whole and compare."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anygen.api import AnyGen
from anygen.data.emoji_pictures import FONT_PATHS
from anygen.documents import Document, Segment
from anygen.errors import ConfigError, InputError
from anygen.evaluation.suite import evaluate as suite
from anygen.evaluation.suite.answers import as_it_is
from anygen.evaluation.suite.bench import PACKAGES, Bench
from anygen.evaluation.suite.bits import bits_per_id
from anygen.evaluation.suite.compare import compare_reports, lines_of_comparison
from anygen.evaluation.suite.evaluate import evaluate_bundle, lines_of, part_names, row_list
from anygen.evaluation.suite.figures import EXPLAINED
from anygen.judging import BestOf
from anygen.request import Request
from anygen.stages.run import load_recipe

for package in ("jiwer", "skimage", "pocketsphinx", "pystoi"):
    pytest.importorskip(package, reason="the extra [eval] is not installed")
pytestmark = pytest.mark.skipif(
    not any(p.is_file() for p in FONT_PATHS) or not shutil.which("flite") or not shutil.which("espeak-ng"),
    reason="the emoji world needs the Debian packages fonts-noto-color-emoji, flite and espeak-ng",
)
FEW = ("text>image", "ask", "locate", "name", "audio>text", "scene:text>image,text")


@pytest.fixture(scope="module")
def bench(model: AnyGen) -> Bench:
    return Bench(model, limit=3, seed=0)


@pytest.fixture(scope="module")
def report_folder(model: AnyGen, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "r"
    evaluate_bundle(model, out, limit=3, directions=FEW)
    return out


def test_the_directions_are_every_pair_and_more() -> None:
    names = part_names()
    pairs = {f"{a}>{b}" for a in ("text", "image", "audio") for b in ("text", "image", "audio")}
    assert pairs <= set(names) and len(set(names)) == len(names)
    assert {"ask", "ask_aloud", "locate", "name", "image>text,audio", "text>image,audio", "audio>text,image"} <= set(
        names
    )


@pytest.mark.slow
def test_the_truth_gets_full_marks_from_every_judge(bench: Bench) -> None:
    perfect = {
        "nearest by pixels": 1, "nearest by edges and colours": 1, "SSIM": 1, "code agreement": 1, "exact caption": 1,
        "FID, edges and colours": 0, "KID, edges and colours": 0, "word error rate": 0, "character error rate": 0,
        "exact words": 1, "exact answer": 1, "mean IoU": 1, "IoU of a half or more": 1, "distance to a recording": 0,
        "another phrasing": 1,
    }  # fmt: skip
    seen = set()
    for part in (*suite.emoji_parts(), *suite.scene_parts()):
        if part.name in ("recordings through codes", "pictures through codes", "scenes through codes", "audio>audio"):
            continue
        told = dataclasses.replace(part, answer=as_it_is)
        for group, cases in part.cases(bench).items():
            assert 0 < len(cases) <= 3, (part.name, group)
            for name, score, of in suite._scores(bench, told, cases, as_it_is(bench, told, cases)):
                assert name in EXPLAINED
                if name in perfect and not of and group != "unheard voice":
                    assert score.value == pytest.approx(perfect[name], abs=1e-6), (part.name, group, name)
                    seen.add(name)
                if name == "exact answer, recogniser":  # it mishears a short word now and then
                    assert score.value > 0.6
    assert seen == set(perfect)


def test_recordings_are_in_the_voice_of_their_group_and_a_repeat_is_in_another(bench: Bench) -> None:
    parts = {part.name: part for part in suite.emoji_parts()}
    for name, other in (("recordings", False), ("recordings through codes", False), ("audio>audio", True)):
        for group, cases in parts[name].cases(bench).items():
            voice = "rms" if group == "unheard voice" else bench.voices[0]
            for case in cases:
                assert np.array_equal(
                    case.request.inputs[0].content.samples_T, bench.speak(case.said[0], voice).samples_T
                )  # type: ignore[union-attr]
                is_same = np.array_equal(case.truth["audio"].samples_T, bench.speak(case.said[0], voice).samples_T)  # type: ignore[union-attr]
                assert is_same != other, (name, group)


def test_wrong_answers_get_none(bench: Bench) -> None:
    for part in (*suite.emoji_parts(), *suite.scene_parts()):
        if "audio" in part.outputs or part.name in ("recordings", "text>text"):
            continue
        for group, cases in part.cases(bench).items():
            answers = as_it_is(bench, part, cases)
            turned = [*answers[1:], answers[0]]
            told = dataclasses.replace(part, answer=as_it_is)
            for name, score, of in suite._scores(bench, told, cases, turned):
                if (
                    name in ("nearest by pixels", "nearest by edges and colours", "exact caption", "exact words")
                    and not of
                ):
                    assert score.value < 0.5, (part.name, group, name)


def test_bits_are_those_of_each_document_alone_over_its_own_codebook(model: AnyGen, bench: Bench) -> None:
    picture = bench.world.pictures[5]
    documents = [
        Document((Segment("text", "a red apple"), Segment("image", picture, target=True)), "depict"),
        Document((Segment("image", picture), Segment("text", "one", target=True)), "caption"),
        Document((Segment("image", picture), Segment("text", "two cats left of a dog", target=True)), "caption"),
    ]
    before = model.bundle.model.config._attn_implementation
    together = bits_per_id(model, documents)
    assert model.bundle.model.config._attn_implementation == before
    plain = copy.deepcopy(model.bundle.model)
    plain.set_attn_implementation("eager")
    vocabulary, nats = model.bundle.vocabulary, {"image": [], "text": []}  # type: ignore[var-annotated]
    for document in documents:
        sequence = model.sequencer.build(document.encode(model.bundle.tokenizers))
        logits = plain(input_ids=torch.from_numpy(sequence.ids_S)[None], use_cache=False).logits[0].double()
        for place in np.flatnonzero(sequence.target_S[1:]):
            label = int(sequence.ids_S[place + 1])
            kind = next(r for r in vocabulary.ranges if r.start <= label < r.start + r.size)
            span = slice(kind.start, kind.start + kind.size) if kind.group == "image" else slice(None)
            if kind.group in nats:
                row = logits[place]
                nats[kind.group].append(float(torch.logsumexp(row[span], 0) - row[label]))
    assert len(nats["image"]) == 4 and set(together) == {"image", "text"}
    for modality, score in together.items():
        assert score.value == pytest.approx(np.mean(nats[modality]) / math.log(2), rel=1e-4)


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name == "src"]


def test_a_report_is_whole_and_its_page_holds_its_media(report_folder: Path) -> None:
    report = json.loads((report_folder / "report.json").read_text())
    rows = row_list(report)
    assert list(dict.fromkeys(row.direction for row in rows)) == [name for name in part_names() if name in FEW]
    groups = {direction: {r.figure.group for r in rows if r.direction == direction} for direction in FEW}
    assert groups["text>image"] == {"training names", "held-out names"}
    assert groups["audio>text"] == {"training names", "held-out names", "unheard voice"}
    assert groups["ask"] == {"how many", "left or right", "above or below"}
    for direction in FEW:
        names = {r.figure.name for r in rows if r.direction == direction}
        assert "seconds per sample" in names and any(name.startswith("bits per id") for name in names)
    for row in rows:
        low, high = row.figure.low, row.figure.high
        assert low is None or high is None or low <= row.figure.value + 1e-9 <= high + 2e-9, row
    page = Page()
    page.feed((report_folder / "index.html").read_text())
    assert "script" not in page.tags and {"img", "audio", "table"} <= set(page.tags)
    assert all(source.startswith("data:") for source in page.sources)
    glance = (report_folder / "index.html").read_text().partition("At a glance")[2].partition("</table>")[0]
    assert [f'<a href="#part-{n}">' in glance for n in range(1, len(FEW) + 2)] == [True] * len(FEW) + [False]
    assert len(lines_of(report)) == len(rows) + len(report["skipped"])
    assert not list(report_folder.parent.glob(".*"))


def test_answers_are_ranked_where_they_can_be_read_backwards(
    model: AnyGen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Request] = []
    generate_batch = model.generate_batch

    def listening(requests: Any) -> Any:
        asked.extend(requests)
        return generate_batch(requests)

    monkeypatch.setattr(model, "generate_batch", listening)
    report = evaluate_bundle(model, tmp_path / "r", limit=2, directions=["text>image", "image>text,audio"], best_of=3)
    assert report["best_of"] == 3
    numbers = {(len(r.inputs), r.outputs): r.best_of for r in asked}
    assert numbers[1, ("image",)] == 3 and numbers[1, ("text", "audio")] is None
    assert numbers[1, ("text",)] == 1, "the model's own transcripts are a judge's, not answers"
    usual = {"text>image": BestOf(number=2, temperature=0.7)}
    monkeypatch.setattr(model, "bundle", dataclasses.replace(model.bundle, best_of=usual))
    evaluate_bundle(model, tmp_path / "u", limit=1, directions=["text>image"])
    written = json.loads((tmp_path / "u" / "report.json").read_text(encoding="utf-8"))
    assert written["best_of"] == {"text>image": {"number": 2, "judge": "backward", "temperature": 0.7}}


@pytest.mark.slow
def test_stopped_it_goes_on_with_the_same_figures(
    model: AnyGen, report_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    measured = suite._measured

    def counting(bench: Bench, part: Any) -> Any:
        if len(done) == 2:
            done.append("stopped")
            raise KeyboardInterrupt
        done.append(part.name)
        return measured(bench, part)

    monkeypatch.setattr(suite, "_measured", counting)
    with pytest.raises(KeyboardInterrupt):
        evaluate_bundle(model, tmp_path / "r", limit=3, directions=FEW)
    report = evaluate_bundle(model, tmp_path / "r", limit=3, directions=FEW)
    done.remove("stopped")
    assert sorted(done) == sorted(FEW), "every part once"

    def figures(rows: list[Any]) -> list[Any]:
        return [row for row in rows if row.figure.name != "seconds per sample"]

    assert repr(figures(row_list(report))) == repr(figures(row_list(json.loads((report_folder / "report.json").read_text()))))  # fmt: skip
    assert (tmp_path / "r" / "index.html").is_file() and not list(tmp_path.glob(".*"))
    done.clear()
    evaluate_bundle(model, tmp_path / "s", limit=2, directions=["ask"], seed=1)
    assert done == ["ask"], "another limit or seed is another evaluation"


@pytest.mark.slow
def test_what_a_model_or_an_installation_lacks_is_left_out_and_said(
    model: AnyGen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in {*PACKAGES, *(name for name in sys.modules if name.partition(".")[0] in PACKAGES)}:
        monkeypatch.setitem(sys.modules, module, None)  # also what nobody asks for before it is imported
    blind = copy.copy(model)
    blind.bundle = dataclasses.replace(model.bundle, tokenizers={k: v for k, v in model.bundle.tokenizers.items() if k != "region"})  # fmt: skip
    report = evaluate_bundle(
        blind, tmp_path / "r", limit=2, directions=["audio>text", "text>image", "text>audio", "locate"]
    )
    names = {(row.direction, row.figure.name) for row in row_list(report)}
    assert ("audio>text", "exact words") in names and ("audio>text", "word error rate") not in names
    assert ("text>image", "nearest by pixels") in names and ("text>image", "SSIM") not in names
    assert {name for direction, name in names if direction == "text>audio"} <= {
        "bits per id, audio",
        "seconds per sample",
    }
    assert report["skipped"]["locate"] == "this model has no region"
    assert {what for _, what in PACKAGES.values()} <= set(report["skipped"])
    assert 'pip install "anygen[eval]"' in report["skipped"]["word and character error rates"]


def test_reports_compare(report_folder: Path, tmp_path: Path) -> None:
    rows = compare_reports(report_folder, report_folder / "report.json")
    assert len(rows) > 40 and all(row["difference"] in (0, None) and not row["is_apart"] for row in rows)
    report = json.loads((report_folder / "report.json").read_text())
    facts = next(f for f in report["figures"] if f["name"] == "exact answer")
    facts.update(value=0.9, low=0.8, high=0.95)
    (tmp_path / "b.json").write_text(json.dumps(report))
    (changed,) = [row for row in compare_reports(report_folder, tmp_path / "b.json") if row["difference"]]
    assert (
        changed["name"] == "exact answer"
        and changed["is_apart"]
        and changed["low"] < changed["difference"] < changed["high"]
    )
    marked = [
        line for line in lines_of_comparison(compare_reports(report_folder, tmp_path / "b.json")) if " * " in line
    ]
    assert len(marked) == 1 and "90.0 %" in marked[0]
    (tmp_path / "c.json").write_text(json.dumps(report | {"figures": []}))
    with pytest.raises(InputError, match="share no figure"):
        compare_reports(report_folder, tmp_path / "c.json")
    (tmp_path / "d.json").write_text('{"figures": []}')
    with pytest.raises(InputError, match="is not a report of anygen evaluate"):
        compare_reports(tmp_path / "d.json", report_folder)


def test_newcombes_interval_of_a_difference() -> None:
    from anygen.evaluation.report import Figure
    from anygen.evaluation.scores import proportion
    from anygen.evaluation.suite.compare import _difference
    from anygen.evaluation.suite.evaluate import Row

    def row(right: int, n: int) -> Row:
        score = proportion([True] * right + [False] * (n - right))
        return Row("d", Figure("exact answer", "g", score.value, score.low, score.high, n))

    found = _difference(row(48, 80), row(56, 70))  # Newcombe 1998, table II, example a: 56/70 - 48/80
    assert (round(found["low"], 4), round(found["high"], 4)) == (0.0524, 0.3339)


def test_a_recipe_names_known_directions(tmp_path: Path) -> None:
    path = tmp_path / "evaluate.yaml"
    path.write_text("stage: evaluate\ndirections: [smell>text]\n")
    with pytest.raises(ConfigError, match="unknown direction 'smell>text'"):
        load_recipe(path)
    with pytest.raises(InputError, match="unknown direction 'smell>text'"):
        suite.open_and_evaluate(None, tmp_path, limit=None, directions=["smell>text"], seed=0)
