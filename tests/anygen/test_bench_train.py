"""The training benchmark: same documents, same computation or no times, undisturbed windows or none."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anygen.bench import contestants, machine, train
from anygen.bench.contestants import Field, GateError
from anygen.bench.machine import Window, measure_limits, timed
from anygen.bench.samples import COMPOSITIONS, Round, Samples, samples_of_run, synthetic_samples
from anygen.bench.train import SETUPS, TrainBenchConfig, bench_train, lines
from anygen.cli import main
from anygen.data.coded import CodedRecord, CodedUtterance, write_coded_shard
from anygen.errors import InputError
from anygen.sequence import Sequence
from anygen.stages.tokenize import coded_facts
from anygen.vocabulary import Vocabulary
from tokenizers_mm.codes import Codes
from tokenizers_mm.media import Region

ROOT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")


def samples_at(utilisation: float) -> Samples:
    return synthetic_samples(COMPOSITIONS[utilisation], vocabulary_size=1024, seed=1)


def small_round(vocabulary_size: int = 700) -> Round:
    samples = synthetic_samples(COMPOSITIONS[0.5], vocabulary_size=vocabulary_size, seed=0)
    return samples.rounds(1, row_length=600, num_rows=1, seed=0)[0]


@pytest.fixture(scope="module")
def field() -> Field:
    return Field(SETUPS["smoke"].model, Vocabulary.create(text=704), CPU, compiled=False)


@pytest.mark.parametrize("utilisation", COMPOSITIONS)
def test_a_round_holds_the_same_documents_packed_and_padded(utilisation: float) -> None:
    samples = samples_at(utilisation)
    rounds = samples.rounds(3, row_length=2048, num_rows=2, seed=0)
    for r in rounds:
        packed = np.concatenate(r.documents)
        real = len(r.packed.ids_T) - r.packed.num_padding
        assert len(packed) == r.num_real == real
        batched = sorted(document.tobytes() for batch in r.batches for document in batch)
        assert batched == sorted(document.tobytes() for document in r.documents)
        sizes = [len(batch) for batch in r.batches]
        assert max(sizes) - min(sizes) <= 1
        assert (
            abs(np.mean(sizes) - samples.composition.documents_per_batch) < samples.composition.documents_per_batch / 2
        )
        assert r.num_padded == sum(contestants.padded_batch(batch)["input_ids"].numel() for batch in r.batches)
        assert r.num_labels == int(r.packed.predicts_T.sum())


@pytest.mark.parametrize("utilisation", COMPOSITIONS)
def test_batches_have_the_utilisation_they_are_named_after_and_rows_are_full(utilisation: float) -> None:
    samples = samples_at(utilisation)
    rounds = samples.rounds(12, row_length=2048, num_rows=2, seed=0)
    real = sum(r.num_real for r in rounds)
    assert abs(real / sum(r.num_padded for r in rounds) - utilisation) < 0.06
    own = samples.utilisations()[f"{samples.composition.documents_per_batch} documents"]
    assert abs(own - utilisation) < 0.03
    assert real / sum(len(r.packed.ids_T) for r in rounds) >= 0.99
    # a fresh pool would give its longest documents first
    lengths = np.array([len(samples.example(number)) for number in range(3000)])
    assert abs(real / sum(len(r.documents) for r in rounds) / lengths.mean() - 1) < 0.15


def test_padding_of_a_row_is_no_document() -> None:
    def example(number: int) -> Sequence:
        return Sequence(np.full(7 + 4 * (number % 2), 1 + number), np.ones(7 + 4 * (number % 2), np.bool_), ())

    (r,) = Samples(example, COMPOSITIONS[0.5], "", 10_000).rounds(1, row_length=12, num_rows=3, seed=0)
    assert r.packed.num_padding == 3 * 12 - r.num_real > 0
    assert {len(document) for document in r.documents} <= {7, 11} and r.num_labels == r.num_real - 3


def test_like_lengths_pad_less_and_larger_batches_more() -> None:
    figures = samples_at(0.5).utilisations()
    assert figures["8 documents"] > figures["16 documents"] > figures["32 documents"]
    assert figures["11 documents of like lengths"] > figures["8 documents"]


def test_all_contestants_train_the_same_weights(field: Field) -> None:
    r = small_round()
    before = [p.detach().clone() for p in field.model.parameters()]
    ours, padded = field.contestants[:2]
    losses = [float(field.gradients(padded, padded.prepare(r), bf16=False))]
    for _ in range(3):
        field.step(ours, ours.prepare(r), bf16=True)
    losses.append(float(field.gradients(padded, padded.prepare(r), bf16=False)))
    assert losses[1] < losses[0]  # what ours learnt, padded knows
    with torch.no_grad():
        for parameter, value in zip(field.model.parameters(), before, strict=True):
            parameter.copy_(value)


def test_the_gate_lets_equals_through_and_stops_others(field: Field, monkeypatch: pytest.MonkeyPatch) -> None:
    r = small_round()
    figures = field.gate(r)
    assert set(figures) == {"padded", "ours", "flattened"}
    for figure in figures.values():
        assert figure["loss_difference"] <= 1e-5 and figure["gradient_difference"] <= 1e-4
    leaky = [dataclasses.replace(contestant, gated=True) for contestant in field.contestants]
    monkeypatch.setattr(field, "contestants", leaky)  # the one without a document mask must now pass too
    with pytest.raises(GateError, match="unmasked does not compute what padded does"):
        field.gate(r)


def test_the_gate_sees_a_wrong_gradient_behind_a_right_loss(field: Field, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = field.contestants[0]

    def scaled(batch: Any) -> torch.Tensor:
        loss = ours.loss(batch)
        return loss * 1.01 - loss.detach() * 0.01

    wrong = [dataclasses.replace(ours, loss=scaled), *field.contestants[1:]]
    monkeypatch.setattr(field, "contestants", wrong)
    with pytest.raises(GateError, match=r"gradients differ by 0\.01"):
        field.gate(small_round())


def test_a_closed_gate_prints_no_time_and_leaves_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(contestants, "TOLERANCE", -1.0)
    with pytest.raises(SystemExit) as leaving:
        main(["bench", "train", "--size", "smoke", "--rounds", "1"])
    captured = capsys.readouterr()
    assert leaving.value.code == 1
    assert captured.out == "" and "nothing is timed" in captured.err


@pytest.mark.parametrize("utilisation", COMPOSITIONS)
def test_the_command_prints_a_table_and_one_json_object_last(
    utilisation: float, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(
            [
                "bench",
                "train",
                "--size",
                "smoke",
                "--rounds",
                "2",
                "--utilisation",
                str(utilisation),
                "--peak-tflops",
                "2",
            ]
        )
    assert leaving.value.code == 0
    *table, last = capsys.readouterr().out.strip().split("\n")
    report = json.loads(last)
    assert report["command"].split()[0] == "anygen"
    assert lines(report) == table
    ours, padded = report["contestants"]["ours"], report["contestants"]["padded"]
    assert padded["ratio_to_padded"] == {"median": 1.0, "min": 1.0, "max": 1.0, "rounds": 2}
    clock = f"{report['clock']}_s"
    ratios = [window["padded"][clock] / window["ours"][clock] for window in report["windows"]]
    assert ours["ratio_to_padded"]["max"] == pytest.approx(max(ratios))
    rates = [window["real"] / window["ours"][clock] for window in report["windows"]]
    assert ours["real_tokens_per_s"]["min"] == pytest.approx(min(rates))
    tflops = np.median(rates) * report["model"]["gflop_per_token"] / 1e3
    fastest = max(report["limits"]["gemm_bf16_tflops"].values())
    assert ours["mfu_of_measured_gemm"] == pytest.approx(tflops / fastest)
    assert ours["mfu_of_given_peak"] == pytest.approx(tflops / 2)
    assert [name for name, c in report["contestants"].items() if not c["same_computation"]] == ["unmasked"]


@pytest.mark.parametrize(("num_clean", "clock", "num_rounds"), [(5, "wall", 5), (4, "cpu", 8)])
def test_disturbed_rounds_are_dropped_and_too_few_clean_ones_fall_back(
    field: Field, monkeypatch: pytest.MonkeyPatch, num_clean: int, clock: str, num_rounds: int
) -> None:
    samples = synthetic_samples(COMPOSITIONS[0.5], vocabulary_size=700, seed=0)
    rounds = samples.rounds(8, row_length=600, num_rows=1, seed=0)
    threads_seen = []

    def fake(work: Any, device: torch.device) -> Window:
        threads_seen.append(torch.get_num_threads())
        number = len(threads_seen) - 1
        is_dirty = number // len(field.contestants) >= num_clean and number % len(field.contestants) == 1
        return Window(2.0, 1.0, 0.5 if is_dirty else 0.01)

    monkeypatch.setattr(train, "timed", fake)
    monkeypatch.setattr(field, "step", lambda *_, **__: None)
    torch.set_num_threads(2)
    try:
        windows, chosen = train._windows(field, rounds, bf16=True)
    finally:
        torch.set_num_threads(1)
    assert chosen == clock and len(windows) == num_rounds
    assert [r for r, _ in windows] == rounds[:num_rounds]
    once = 8 * len(field.contestants)
    assert threads_seen == [2] * once + ([1] * once if clock == "cpu" else [])


def test_every_contestant_opens_a_round_in_turn(field: Field, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(field, "step", lambda contestant, *_, **__: order.append(contestant.name))
    names = [contestant.name for contestant in field.contestants]
    train._play(field, [small_round()] * len(names), bf16=True)
    timed_order = order[len(names) :]  # after the warm-up
    assert timed_order[:: len(names)] == names
    assert all(
        sorted(timed_order[at : at + len(names)]) == sorted(names) for at in range(0, len(timed_order), len(names))
    )


def test_a_window_counts_what_others_took(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = iter([10.0, 10.0 + 5.0])
    monkeypatch.setattr(machine, "_busy_s", lambda: next(busy))
    clocks = {"perf_counter": iter([0.0, 10.0]), "process_time": iter([0.0, 4.0])}
    for name, values in clocks.items():
        monkeypatch.setattr(machine.time, name, lambda values=values: next(values))
    window = timed(lambda: None, CPU)
    assert (window.wall_s, window.cpu_s) == (10.0, 4.0)
    assert window.others == pytest.approx(0.1) and not window.clean
    assert Window(1.0, 1.0, None).clean and Window(1.0, 1.0, 0.06).clean


def test_limits_leave_the_precision_of_products_as_it_was() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        limits = measure_limits(CPU, clock="cpu", repeats=1, small=True)
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)
    assert limits["copy_gb_s"] > 0
    assert all(value > 0 for name in ("bf16", "fp32") for value in limits[f"gemm_{name}_tflops"].values())


def test_documents_of_a_run(tmp_path: Path, tokenizers: dict[str, Any]) -> None:
    run = tmp_path / "run"
    tokenizers["text"].save(run / "text_tokenizer")
    tokenizers["image"].save(run / "image_tokenizer" / "tokenizer")
    tokenizers["audio"].save(run / "audio_tokenizer" / "tokenizer")
    random = np.random.default_rng(0)

    def record(number: int, kind: str) -> CodedRecord:
        picture = Codes(random.integers(0, 32, (1, 4)), "image", grid_hw=(2, 2))
        sounds = tuple(
            CodedUtterance("a cat", voice, Codes(random.integers(0, 16, (2, 5 + number)), "audio")) for voice in "ab"
        )
        scene = {
            "objects": (("cat", Region((0.1, 0.2, 0.3, 0.4))),),
            "questions": (("how many?", "one"),),
            "spoken_questions": (sounds,),
        }
        return CodedRecord(
            f"{kind}{number}", kind, ("a cat", "two cats"), picture, sounds, **(scene if kind == "scene" else {})
        )

    facts = coded_facts(tokenizers["image"], tokenizers["audio"])
    records = [record(number, kind) for number in range(6) for kind in ("emoji", "scene")]
    write_coded_shard(run / "tokenize" / "train-00000", records, facts=facts)
    mix, half_text = (samples_of_run(run, COMPOSITIONS[u], seed=0) for u in COMPOSITIONS)
    for samples in (mix, half_text):
        documents = [samples.example(number).ids_S for number in range(200)]
        assert max(int(ids_S.max()) for ids_S in documents) < samples.vocabulary_size
        assert [ids_S.tolist() for ids_S in documents] == [samples.example(n).ids_S.tolist() for n in range(200)]
    picture_begin = Vocabulary.of(tokenizers).control("image")
    with_pictures = [np.mean([picture_begin in s.example(n).ids_S for n in range(300)]) for s in (mix, half_text)]
    assert 0.35 < with_pictures[1] / with_pictures[0] < 0.65  # the other half is plain text


def test_what_cannot_be_measured_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"0\.5, 0\.28"):
        bench_train(TrainBenchConfig(size="smoke", utilisation=0.4))
    with pytest.raises(InputError, match="has no tokenize/"):
        bench_train(TrainBenchConfig(size="smoke", data=tmp_path))


def test_the_script_for_a_gpu_runs_every_part_dry(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "benchmarks" / "gpu_training.py"), str(tmp_path / "gpu.json"), "--dry-run"]
    done = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert {"attention", "mfu", "packed", "fsdp"} <= set(report)
    assert max(report["attention"]["packed"]["errors"].values()) <= 2e-2
    assert report["fsdp"]["losses"][2:] == report["fsdp"]["losses_resumed"]
