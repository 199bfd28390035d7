"""Do vokens say more than the caption? Held-out emoji drawn from vokens, from other pictures' vokens, from captions.

    anygen train recipes/nano/vokens.yaml --root RUN
    python benchmarks/vokens.py RUN OUT

The baseline is the same decoder with a mapper of the same size that reads the caption through the transformer's input
embeddings: the same data in the same order, the same losses, as many steps. Figures are means over held-out pictures
with bootstrap intervals of 95 %; differences are taken picture by picture.
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from anygen.data.pictures import NamedPictures
from anygen.evaluation.voken_gap import Drawn, Interval, compare, shuffled
from anygen.files import read_json, write_json
from anygen.model import attention
from anygen.model.loss import LossWeights
from anygen.sequence import Sequencer
from anygen.stages.base import open_records
from anygen.stages.decoder import encoder_of
from anygen.stages.pretrain import load_pretrained, open_tokenizers
from anygen.stages.voken_losses import VokenBatch, VokenLoss, VokenRows, VokenWeights
from anygen.stages.voken_phases import VokenData, VokenTraining
from anygen.stages.vokens import VokensConfig, open_stream, start_decoder
from anygen.training.checkpoint import checkpoints
from anygen.training.loop import train
from decoders.carried import open_renderer
from decoders.drivers import VokenMapper

CAPTION_IDS = 24
"""Longer captions are cut; emoji names have up to about twenty ids."""


class CaptionLoss(VokenLoss):
    """The loss with input embeddings of the caption in place of hidden states at vokens."""

    def parts(self) -> Any:
        """The mapper alone."""
        return super().parts()[1:]

    def read(self, batch: VokenBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Embeddings of each document's first text, M x CAPTION_IDS x D, 0 where it is shorter; no text loss."""
        vocabulary, embed_VD = self.vocabulary, self.text.model.model.embed_tokens.weight.detach()
        states_MLD = embed_VD.new_zeros(len(batch.codes_MP), CAPTION_IDS, embed_VD.shape[1])
        for place, ids in enumerate(torch.split(batch.text.ids_T, list(batch.text.segments.lengths))):
            start = int((ids == vocabulary.control("text")).nonzero()[0]) + 1
            stop = min(int((ids == vocabulary.control("/text")).nonzero()[0]), start + CAPTION_IDS)
            states_MLD[place, : stop - start] = embed_VD[ids[start:stop]]
        return states_MLD, torch.zeros(()), {}

    vocabulary: Any = None


@torch.no_grad()
def measure(losses: VokenLoss, draw: Any, data: VokenData, encode: Any, batches: int) -> tuple[Drawn, Drawn]:
    """Drawings of held-out pictures from their own states, and from another picture's."""
    found: list[tuple[Drawn, Drawn]] = []
    for number in range(batches):
        batch = data.batch(number)
        states = losses.read(batch)[0]
        pair = []
        for these in (states, states[shuffled(len(states))]):
            drawn = draw(vokens=these, generator=torch.Generator().manual_seed(number)).data_BCHW
            pair.append(compare((drawn + 1) / 2, batch.pixels_MCHW, batch.codes_MP, encode))
        found.append((pair[0], pair[1]))
    return joined([own for own, _ in found]), joined([other for _, other in found])


def load_step(losses: VokenLoss, folder: Path, step: int) -> None:
    """The weights that a training had at a step whose checkpoint is there."""
    found = next(path for path in checkpoints(folder / "checkpoints") if int(path.name.split("-")[1]) == step)
    tensors = load_file(found / "state.safetensors")
    named = {name.removeprefix("module."): t for name, t in tensors.items() if name.startswith("module.")}
    missing, unexpected = losses.load_state_dict(named, strict=False)
    assert not unexpected and set(missing) <= {"text.model.lm_head.weight"}, (missing, unexpected)
    losses.eval()


def joined(parts: list[Drawn]) -> Drawn:
    """Figures of several batches as one."""
    return Drawn(np.concatenate([part.agreement_B for part in parts]), np.concatenate([part.psnr_B for part in parts]))


def facts(own: Drawn, other: Drawn) -> dict[str, Any]:
    """Means, and what is lost with another picture's states."""
    return {
        name: {
            "own": asdict(Interval.of(getattr(own, f"{name}_B"))),
            "shuffled": asdict(Interval.of(getattr(other, f"{name}_B"))),
            "gap": asdict(Interval.of(getattr(own, f"{name}_B") - getattr(other, f"{name}_B"))),
        }
        for name in ("agreement", "psnr")
    }


def main() -> None:
    """Train the baseline where it is not there, measure, write OUT/vokens.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--batches", type=int, default=8, help="of 32 pictures")
    parser.add_argument("--at", type=int, help="compare the checkpoints of this step; without it, train to the end")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run = arguments.run
    recorded = run / "vokens" / "stage.json"
    config = VokensConfig(**(read_json(recorded)["config"] | {"root": run})) if recorded.exists() else None
    if config is None:
        config = VokensConfig(**(json.loads((arguments.out / "config.json").read_text()) | {"root": run}))
    model, vocabulary, layout = load_pretrained(run / "pretrain" / "model")
    model.set_attn_implementation(attention.register())
    tokenizers = open_tokenizers(run, location_bins=vocabulary.range("region").size)
    image: Any = tokenizers["image"]
    encode, seed = encoder_of(image), config.frozen_loop.seed

    def data(split: str) -> VokenData:
        stream = open_stream(config, tokenizers, config.mixture, split, seed=seed)
        pictures = NamedPictures(open_records(run, split), image.config.side_px)
        weights = LossWeights(vocabulary, {}, inputs=0.0)
        return VokenData(stream, pictures, Sequencer(vocabulary, layout), weights, config.documents_per_batch)

    def losses(kind: Any, decoder: Any, rows: VokenRows) -> Any:
        weights = VokenWeights(config.flow_weight, config.align_weight, 0.0, config.drop_share, config.flow_share)
        return kind(copy.deepcopy(model), vocabulary, decoder, weights=weights, rows=rows)

    baseline = open_renderer(run / "decoder" / "model", device=torch.device("cpu"))
    torch.manual_seed(0)
    baseline.register_modules(
        vokens=VokenMapper(
            hidden_dim=model.config.hidden_size, vokens=CAPTION_IDS, patches=baseline.num_patches,
            dim=baseline.denoiser.config.condition_dim, codebook_size=vocabulary.range("image.0").size,
            **config.mapper.model_dump(),
        )
    )  # fmt: skip
    baseline.vokens.say_as(baseline.codes)
    caption = losses(CaptionLoss, baseline, VokenRows(model, vocabulary))
    caption.vocabulary = vocabulary
    trainee = VokenTraining(caption, data("train"), data("validation"), encode)
    if not arguments.at:
        train(trainee, config.frozen_loop, arguments.out / "caption", title="caption baseline")

    at = arguments.at or config.frozen_loop.steps
    decoder = start_decoder(config, model.config.hidden_size, vocabulary)
    vokens = losses(VokenLoss, decoder, VokenRows(model, vocabulary))
    load_step(vokens, run / "vokens" / "frozen", at)
    load_step(caption, arguments.out / "caption", at)
    held_out = data("test")
    result: dict[str, Any] = {"pictures": arguments.batches * config.documents_per_batch, "steps": at}
    result["config"] = config.model_dump(mode="json", exclude={"root"})
    own, other = measure(vokens, decoder, held_out, encode, arguments.batches)
    result["vokens"] = facts(own, other)
    own_caption, other_caption = measure(caption, baseline, held_out, encode, arguments.batches)
    result["caption"] = facts(own_caption, other_caption)
    result["vokens_minus_caption"] = {
        name: asdict(Interval.of(getattr(own, f"{name}_B") - getattr(own_caption, f"{name}_B")))
        for name in ("agreement", "psnr")
    }
    codes = []
    for number in range(arguments.batches):
        batch = held_out.batch(number)
        drawn = decoder(codes=batch.codes_MP, generator=torch.Generator().manual_seed(number)).data_BCHW
        codes.append(compare((drawn + 1) / 2, batch.pixels_MCHW, batch.codes_MP, encode))
    reference = joined(codes)
    result["true_codes"] = {n: asdict(Interval.of(getattr(reference, f"{n}_B"))) for n in ("agreement", "psnr")}
    write_json(arguments.out / "vokens.json", result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
