"""Stage `vokens`, on a tiny world: what is trained and what is not, the gap, batches without pictures, exact resume."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_decoder
from PIL import Image

from anygen.data.coded import CodedRecord, CodedStore, write_coded_shard
from anygen.data.pictures import NamedPictures
from anygen.data.records import Record, RecordStore, write_shard
from anygen.data.tasks import DocumentStream
from anygen.grammar import Block, Grammar, Plan
from anygen.model import attention
from anygen.model.loss import LossWeights
from anygen.sampling.choose import SamplingOptions
from anygen.sampling.engine import Engine
from anygen.sampling.sampler import SampleState, sample
from anygen.sequence import Sequencer
from anygen.stages.decoder import encoder_of
from anygen.stages.voken_losses import VokenLoss, VokenRows, VokenWeights
from anygen.stages.voken_phases import VokenData, VokenTraining
from anygen.training.loop import LoopConfig, train
from anygen.training.schedule import OptimizerConfig
from anygen.vocabulary import Vocabulary
from decoders.carried import open_renderer

COLOURS = {"red": (220, 30, 30), "green": (20, 200, 40), "blue": (30, 40, 220), "white": (250, 250, 250)}


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, tokenizers: dict[str, Any], sequencer: Sequencer, vocabulary: Vocabulary
) -> Any:
    """Data of four plain pictures with their names, as stage `vokens` meets them."""
    folder = tmp_path_factory.mktemp("world")
    records, coded = [], []
    for name, colour in COLOURS.items():
        file = io.BytesIO()
        picture = Image.new("RGB", (16, 16), colour)
        picture.save(file, "PNG")
        records.append(Record(name, "emoji", (f"a {name} apple",), file.getvalue()))
        coded.append(CodedRecord(name, "emoji", (f"a {name} apple",), tokenizers["image"].encode(picture)))
    write_shard(folder / "train-00000.tar", records)
    write_coded_shard(folder / "train-00000", coded, facts={})

    def data(mixture: dict[str, float], documents: int = 4) -> VokenData:
        stream = DocumentStream(
            CodedStore([folder / "train-00000"], facts={}), mixture, tokenizers,
            drop_share=0.0, free_share=0.0, seed=0,
        )  # fmt: skip
        pictures = NamedPictures(RecordStore([folder / "train-00000.tar"]), 16)
        return VokenData(stream, pictures, sequencer, LossWeights(vocabulary, {}, inputs=0.0), documents)

    return data


WEIGHTS = VokenWeights(flow=1.0, align=1.0, text=0.1, drop_share=0.1, flow_share=0.5)


@pytest.fixture
def made(tmp_path: Path, tiny_model: Any, vocabulary: Vocabulary, layout: Any) -> Any:
    """A fresh model, and a decoder with a mapper."""
    model = copy.deepcopy(tiny_model)
    for parameter in model.model.layers.parameters():  # so that states depend on what came before, untrained as it is
        if parameter.ndim == 2:
            parameter.data.mul_(8)
    model.set_attn_implementation(attention.register())
    tiny_decoder(tmp_path / "tiny", layout, vocabulary, hidden_dim=model.config.hidden_size)
    return model, open_renderer(tmp_path / "tiny", device=torch.device("cpu"))


def frozen_losses(made: Any, vocabulary: Vocabulary, **changed: float) -> VokenLoss:
    model, decoder = made
    torch.manual_seed(0)
    rows = VokenRows(model, vocabulary)
    rows.start(model, vocabulary, (2, 2))
    return VokenLoss(model, vocabulary, decoder, weights=replace(WEIGHTS, **changed), rows=rows, model_lr_ratio=5.0)


def loop(steps: int) -> LoopConfig:
    optimizer = OptimizerConfig(lr=3e-3, weight_decay=0.1, warmup_steps=2)
    return LoopConfig(steps=steps, precision="fp32", save_every=3, log_every=5, device="cpu", optimizer=optimizer)


def state_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_the_first_phase_trains_the_rows_of_vokens_and_the_mapper_alone(
    made: Any, world: Any, vocabulary: Vocabulary, tokenizers: dict[str, Any], tmp_path: Path
) -> None:
    model, decoder = made
    before, denoiser, mapper = state_of(model), state_of(decoder.denoiser), state_of(decoder.vokens)
    losses = frozen_losses(made, vocabulary)
    data = world({"emoji:text>voken": 1.0})
    encode = encoder_of(tokenizers["image"])
    trainee = VokenTraining(losses, data, data, encode)
    untrained = losses.gaps(data.batch(0), encode)
    figures = train(trainee, loop(100), tmp_path / "run", title="test")
    losses.rows.write(model)  # type: ignore[union-attr]
    after = state_of(model)
    embed = "model.embed_tokens.weight"
    moved = (after[embed] != before[embed]).any(1).nonzero()[:, 0].tolist()
    r = vocabulary.range("voken")
    assert moved == [vocabulary.control("voken"), vocabulary.control("/voken"), *range(r.start, r.stop)]
    assert all(torch.equal(after[name], before[name]) for name in before if name not in (embed, "lm_head.weight"))
    assert all(torch.equal(t, denoiser[name]) for name, t in decoder.denoiser.state_dict().items())
    assert any(not torch.equal(t, mapper[name]) for name, t in decoder.vokens.state_dict().items())
    assert untrained["said"] <= 0.3 and untrained["psnr_gap"] < 0.05, untrained
    assert figures["validation_said"] >= 0.85 and figures["validation_said_gap"] >= 0.8, "vokens tell pictures apart"
    assert figures["validation_flow_gap"] > 0.5 and figures["validation_psnr_gap"] > 0.1, "and the denoiser heeds them"
    assert figures["validation_control_nats"] < 3.6, (
        "the decision to draw is learned: of two labels of 6.6 nats each, one; <eos> after it cannot be"
    )


def test_a_phase_of_reading_learns_without_the_denoiser(
    made: Any, world: Any, vocabulary: Vocabulary, tokenizers: dict[str, Any], tmp_path: Path
) -> None:
    losses, data = frozen_losses(made, vocabulary, flow=0.0), world({"emoji:text>voken": 1.0})
    losses.denoiser.forward = None  # type: ignore[assignment]  a call would fail
    loss, report = losses(data.batch(0))
    loss.backward()
    assert "flow" not in report and all(p.grad is not None for p in losses.mapper.parameters())
    optimizer = torch.optim.AdamW([{"params": list(part.parameters)} for part in losses.parts()], lr=3e-3)
    for number in range(40):
        optimizer.zero_grad()
        losses(data.batch(number))[0].backward()
        optimizer.step()
    assert float(losses(data.batch(0))[1]["align"]) < 0.5 * float(report["align"])


def test_stopped_and_resumed_equals_never_stopped(
    made: Any, world: Any, vocabulary: Vocabulary, tokenizers: dict[str, Any], tmp_path: Path
) -> None:
    data = world({"emoji:text>voken": 1.0})
    encode = encoder_of(tokenizers["image"])
    results = []
    for name, stops in (("whole", [7]), ("stopped", [3, 7])):
        again = copy.deepcopy(made)
        for steps in stops:
            losses = frozen_losses(copy.deepcopy(again), vocabulary)
            config = loop(7)
            if steps == 3:  # as if it had been killed after its first checkpoint
                with pytest.raises(KeyboardInterrupt):
                    train(_Killed(losses, data, data, encode), config, tmp_path / name, title="test")
            else:
                train(VokenTraining(losses, data, data, encode), config, tmp_path / name, title="test")
        results.append(state_of(losses))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


class _Killed(VokenTraining):
    def next_batch(self) -> Any:
        if self.state()["number"] == 5:
            raise KeyboardInterrupt
        return super().next_batch()


def test_a_batch_without_pictures_trains_on_text_alone(made: Any, world: Any, vocabulary: Vocabulary) -> None:
    losses = VokenLoss(made[0], vocabulary, made[1], weights=WEIGHTS, rows=None)
    loss, report = losses(world({"emoji:image>text": 1.0}).batch(0))
    assert "flow" not in report and "align" not in report
    loss.backward()
    for parameter in losses.mapper.parameters():
        assert parameter.grad is not None and not parameter.grad.any(), "in the graph, and untouched"
    embed = made[0].model.embed_tokens.weight
    assert torch.isfinite(loss) and embed.grad.any()
    assert losses.gaps(world({"emoji:image>text": 1.0}).batch(0), lambda pixels: pixels) == {}


def test_the_second_phase_trains_the_transformer_with_its_own_clipping(
    made: Any, world: Any, vocabulary: Vocabulary
) -> None:
    losses = VokenLoss(made[0], vocabulary, made[1], weights=WEIGHTS, rows=None, model_lr_ratio=0.2)
    mixture = {"emoji:text>voken": 1.0, "emoji:image>text": 1.0}
    loss, report = losses(world(mixture, 8).batch(0))
    loss.backward()
    assert {"flow", "align", "text", "text_nats", "control_nats"} <= report.keys()
    model, mapper = losses.parts()
    assert (model.lr_ratio, mapper.lr_ratio) == (0.2, 1.0)
    trained = {id(p) for part in (model, mapper) for p in part.parameters}
    assert trained == {id(p) for p in losses.parameters() if p.requires_grad}
    assert all(p.grad is not None for p in made[0].parameters())
    assert not any(p.requires_grad for p in losses.denoiser.parameters())


def test_pictures_and_codes_are_those_of_the_documents_in_order(world: Any, tokenizers: dict[str, Any]) -> None:
    batch = world({"emoji:text>voken": 1.0, "emoji:image>text": 1.0}, 12).batch(3)
    assert len(batch.codes_MP) == len(batch.pixels_MCHW) > 2
    codes = tokenizers["image"].encode_pixels(batch.pixels_MCHW).reshape(len(batch.codes_MP), -1)
    assert torch.equal(codes, batch.codes_MP)
    again = world({"emoji:text>voken": 1.0, "emoji:image>text": 1.0}, 12).batch(3)
    assert torch.equal(again.text.ids_T, batch.text.ids_T) and torch.equal(again.pixels_MCHW, batch.pixels_MCHW)


def test_states_of_training_are_those_of_the_sampler(
    made: Any, world: Any, vocabulary: Vocabulary, sequencer: Sequencer
) -> None:
    """Packed teacher forcing with trained rows, against cached generation once they are written into the model."""
    losses = frozen_losses(made, vocabulary)
    data = world({"emoji:text>voken": 1.0})
    with torch.no_grad():
        expected, _, _ = losses.read(data.batch(0))
    losses.rows.write(made[0])  # type: ignore[union-attr]
    engine = Engine(made[0].eval())
    options = {name: SamplingOptions() for name in ("text", "image", "audio", "region", "control")}
    plan = Plan((Block("image", as_vokens=True),))
    states = []
    for number in range(4):
        document, _ = data.stream(number)
        given = type(document)(tuple(s for s in document.segments if not s.target), document.task)
        walk = Grammar(sequencer).start(plan, 20)
        prompt = sequencer.prompt(given)
        states.append(SampleState(prompt, None, walk, options, torch.Generator().manual_seed(0)))
    for _ in sample(engine, states):
        pass
    found = torch.stack([state.vokens[0] for state in states])
    assert np.ptp([len(state.prompt) for state in states]) > 0, "at different positions"
    assert (found - expected).abs().max() < 1e-5
