"""Do vokens say more than the caption? Held-out emoji drawn from vokens, from other pictures' vokens, from captions.

    python benchmarks/vokens.py RUN OUT [--bundle FOLDER] [--recipe recipes/nano/vokens.yaml]

RUN holds the stages data, the tokenizers, tokenize, and either pretrain and decoder or nothing of them: then they are
taken from a bundle, the embedded one by default. Stage `vokens` is trained there, where it was not; beside it, in
OUT/caption, the baseline: the same decoder with a mapper of the same size that reads the caption through the
transformer's input embeddings, on the same data in the same order, with the same losses, phases and steps.

Figures are means over the test split with bootstrap intervals of 95 %; differences are taken picture by picture. `said`
is the share of patches whose likeliest code is right; `agreement` the share whose code is read again in the drawing.
Pictures are drawn from the mapper's condition, and (`codes_said`) by the driver for codes from the likeliest codes.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from anygen.bundle import default_bundle, load_bundle
from anygen.data.pictures import NamedPictures
from anygen.evaluation.voken_gap import Floats, Interval, compare, shuffled
from anygen.files import publishing, write_json
from anygen.model import attention
from anygen.model.loss import LossWeights
from anygen.seeding import borrowed_randomness, seed_of
from anygen.sequence import Sequencer
from anygen.stages.base import open_records
from anygen.stages.decoder import encoder_of
from anygen.stages.pretrain import load_pretrained, open_tokenizers
from anygen.stages.voken_base import open_stream
from anygen.stages.voken_losses import VokenBatch, VokenLoss, VokenRows, VokenWeights
from anygen.stages.voken_phases import VokenData, VokenTraining
from anygen.stages.vokens import VokensConfig
from anygen.stages.vokens import main as train_vokens
from anygen.training.loop import train
from decoders.carried import open_renderer
from decoders.drivers import VokenMapper

CAPTION_IDS = 24
"""Longer captions are cut; emoji names have up to about twenty ids."""


class CaptionLoss(VokenLoss):
    """The loss with input embeddings of the caption in place of hidden states at vokens."""

    vocabulary: Any = None

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


class Study:
    """What both sides share."""

    def __init__(self, config: VokensConfig) -> None:
        self.config = config
        self.model, self.vocabulary, layout = load_pretrained(config.root / "pretrain" / "model")
        self.sequencer = Sequencer(self.vocabulary, layout)
        self.tokenizers = open_tokenizers(config.root, location_bins=self.vocabulary.range("region").size)
        image: Any = self.tokenizers["image"]
        self.encode, self._side_px = encoder_of(image), image.config.side_px

    def data(self, split: str, seed: int) -> VokenData:
        """A split as the stage sees it."""
        stream = open_stream(self.config, self.tokenizers, self.config.mixture, split, seed=seed)
        pictures = NamedPictures(open_records(self.config.root, split), self._side_px)
        weights = LossWeights(self.vocabulary, {}, inputs=0.0)
        return VokenData(stream, pictures, self.sequencer, weights, self.config.documents_per_batch)

    def losses(self, kind: Any, model: Any, decoder: Any, *, rows: VokenRows | None = None, flow: float = 1.0) -> Any:
        """Of the stage's kind, or the baseline's."""
        model.set_attn_implementation(attention.register())
        shares = {"drop_share": self.config.drop_share, "flow_share": self.config.flow_share}
        weights = VokenWeights(flow=flow, align=self.config.align_weight, text=0.0, **shares)
        losses = kind(model, self.vocabulary, decoder, weights=weights, rows=rows)
        losses.vocabulary = self.vocabulary
        return losses

    def train_baseline(self, folder: Path) -> None:
        """All phases of the recipe; FOLDER/decoder is the result."""
        decoder = open_renderer(self.config.root / "decoder" / "model", device=torch.device("cpu"))
        with borrowed_randomness(seed_of(self.config.frozen_loop.seed, "mapper")):
            mapper = VokenMapper(
                hidden_dim=self.model.config.hidden_size, vokens=CAPTION_IDS, patches=decoder.num_patches,
                dim=decoder.denoiser.config.condition_dim, codebook_size=self.vocabulary.range("image.0").size,
                **self.config.mapper.model_dump(),
            )  # fmt: skip
        mapper.say_as(decoder.codes)
        decoder.register_modules(vokens=mapper)
        phases = {
            "reading": (self.config.reading_loop, 0.0),
            "frozen": (self.config.frozen_loop, self.config.flow_weight),
        }
        for name, (loop, flow) in phases.items():
            if loop is None:
                continue
            model = copy.deepcopy(self.model)
            losses = self.losses(CaptionLoss, model, decoder, rows=VokenRows(model, self.vocabulary), flow=flow)
            splits = [self.data(split, seed_of(loop.seed, name)) for split in ("train", "validation")]
            train(VokenTraining(losses, *splits, self.encode), loop, folder / name, title=f"caption, {name}")
        with publishing(folder / "decoder") as place:
            decoder.save_small(place)


@dataclass(frozen=True, eq=False)
class Figures:
    """Of each of B pictures."""

    said: Floats
    agreement: Floats
    psnr: Floats
    codes_said_agreement: Floats
    codes_said_psnr: Floats

    @classmethod
    @torch.no_grad()
    def of(cls, study: Study, decoder: Any, states: Tensor, batch: VokenBatch, seed: int) -> Figures:
        """Pictures of a batch from states; the noise is the same for all ways of drawing."""
        codes_MP = decoder.vokens.code_logits(decoder.vokens.read(states)).argmax(-1)
        found = []
        for condition in ({"vokens": states}, {"codes": codes_MP}):
            drawn = decoder(**condition, generator=torch.Generator().manual_seed(seed)).data_BCHW
            found.append(compare((drawn + 1) / 2, batch.pixels_MCHW, batch.codes_MP, study.encode))
        said = (codes_MP == batch.codes_MP).double().mean(1).numpy()
        return cls(said, found[0].agreement_B, found[0].psnr_B, found[1].agreement_B, found[1].psnr_B)

    @classmethod
    def joined(cls, parts: list[Figures]) -> Figures:
        """Several batches as one."""
        return cls(*(np.concatenate([vars(part)[name] for part in parts]) for name in vars(parts[0])))

    def minus(self, other: Figures) -> dict[str, Any]:
        """Differences picture by picture, with intervals."""
        return {name: asdict(Interval.of(values - vars(other)[name])) for name, values in vars(self).items()}

    def means(self) -> dict[str, Any]:
        """Means, with intervals."""
        return {name: asdict(Interval.of(values)) for name, values in vars(self).items()}


@torch.no_grad()
def measure(study: Study, kind: Any, model: Any, decoder: Any, batches: int) -> tuple[Figures, Figures]:
    """Pictures of the test split, each once, from their own states and from another picture's."""
    losses, data = study.losses(kind, model, decoder).eval(), study.data("test", seed=0)
    found: list[tuple[Figures, Figures]] = []
    for number in range(batches):
        batch = data.batch(number)
        states = losses.read(batch)[0]
        pair = [Figures.of(study, decoder, s, batch, number) for s in (states, states[shuffled(len(states))])]
        found.append((pair[0], pair[1]))
    return Figures.joined([own for own, _ in found]), Figures.joined([other for _, other in found])


@torch.no_grad()
def from_true_codes(study: Study, decoder: Any, batches: int) -> dict[str, Any]:
    """The same pictures drawn from their own codes: what no driver can pass."""
    data, found = study.data("test", seed=0), []
    for number in range(batches):
        batch = data.batch(number)
        drawn = decoder(codes=batch.codes_MP, generator=torch.Generator().manual_seed(number)).data_BCHW
        found.append(compare((drawn + 1) / 2, batch.pixels_MCHW, batch.codes_MP, study.encode))
    names = ("agreement", "psnr")
    return {n: asdict(Interval.of(np.concatenate([getattr(part, f"{n}_B") for part in found]))) for n in names}


def from_bundle(run: Path, bundle: Path) -> None:
    """Model and decoder of a bundle as stages `pretrain` and `decoder` leave them."""
    opened = load_bundle(bundle, device="cpu")
    with publishing(run / "pretrain" / "model") as folder:
        opened.model.save_pretrained(folder)
        write_json(folder / "vocabulary.json", opened.vocabulary.manifest())
        write_json(folder / "layout.json", opened.layout.to_json())
    shutil.copytree(bundle / "decoders" / "image", run / "decoder" / "model", dirs_exist_ok=True)


def main() -> None:
    """Train what is not there, measure, write OUT/vokens.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bundle", type=Path, help="the embedded one by default")
    parser.add_argument("--recipe", type=Path, default=Path("recipes/nano/vokens.yaml"))
    parser.add_argument("--batches", type=int, default=5, help="of as many pictures as the recipe's documents")
    parser.add_argument("--only", choices=("vokens", "caption"), help="train this side, and stop")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run, out = arguments.run, arguments.out
    config = VokensConfig(**(yaml.safe_load(arguments.recipe.read_text(encoding="utf-8")) | {"root": run}))
    if not (run / "pretrain").exists():
        from_bundle(run, arguments.bundle or default_bundle())
    if not (run / "vokens" / "decoder").exists() and arguments.only != "caption":
        train_vokens(config)
    study = Study(config)
    if not (out / "caption" / "decoder").exists() and arguments.only != "vokens":
        study.train_baseline(out / "caption")
    if arguments.only is None:
        result = compared(study, out, arguments.batches)
        write_json(out / "vokens.json", result)
        print(json.dumps(result, indent=1))


def compared(study: Study, out: Path, batches: int) -> dict[str, Any]:
    """All figures."""
    cpu, run = torch.device("cpu"), study.config.root
    read_model, _, _ = load_pretrained(run / "vokens" / "model")
    sides = {
        "vokens": (VokenLoss, read_model, open_renderer(run / "vokens" / "decoder", device=cpu)),
        "caption": (CaptionLoss, study.model, open_renderer(out / "caption" / "decoder", device=cpu)),
    }
    found = {name: measure(study, *side, batches) for name, side in sides.items()}
    result: dict[str, Any] = {"pictures": len(found["vokens"][0].said)}
    result["config"] = study.config.model_dump(mode="json", exclude={"root"})
    for name, (own, other) in found.items():
        result[name] = {"own": own.means(), "shuffled": other.means(), "gap": own.minus(other)}
    result["vokens_minus_caption"] = found["vokens"][0].minus(found["caption"][0])
    result["true_codes"] = from_true_codes(study, sides["vokens"][2], batches)
    return result


if __name__ == "__main__":
    main()
