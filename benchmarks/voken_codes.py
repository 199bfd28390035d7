"""How many of a picture's codes can be read from vokens, and from the caption? Alignment alone, without a decoder.

    python benchmarks/voken_codes.py RUN vokens --steps 1200

RUN holds the stages data, text_tokenizer, image_tokenizer, tokenize and pretrain. A mapper (patch queries read the
states; a linear head of its full width says the codes) is trained on hidden states at vokens of a frozen transformer
(`vokens`), of one that is trained too (`joint`), or on the caption's input embeddings (`caption`). Printed every 50
steps on 192 held-out emoji: cross-entropy, the share of patches whose likeliest code is right, and the same with
another picture's states.

Dimension key: B pictures, N states, D width of states, P patches, W width inside.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anygen.data.coded import CodedStore
from anygen.data.tasks import DocumentStream
from anygen.documents import Vokens
from anygen.model import attention
from anygen.model.segments import Segments
from anygen.packing import collate
from anygen.sequence import Sequencer
from anygen.stages.pretrain import load_pretrained, open_tokenizers
from anygen.stages.tokenize import coded_facts
from anygen.stages.voken_losses import VokenRows
from decoders.spans import gather_vokens

BATCH, CAPTION_IDS, PATCHES, WIDTH = 32, 24, 64, 192


class Attention(nn.Module):
    """Multi-head attention that starts at 0."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)
        nn.init.zeros_(self.out.weight)

    def forward(self, x_BPW: Tensor, context_BNW: Tensor) -> Tensor:
        """Read `context_BNW`."""
        q = self.q(x_BPW).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(context_BNW).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mapper(nn.Module):
    """States to logits of the code of each patch."""

    def __init__(self, num_states: int, hidden: int, codebook: int) -> None:
        super().__init__()
        self.norm_in, self.embed = nn.LayerNorm(hidden), nn.Linear(hidden, WIDTH)
        self.places = nn.Parameter(torch.randn(num_states, WIDTH) * 0.02)
        self.queries = nn.Parameter(torch.randn(PATCHES, WIDTH) * 0.5)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norms": nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3)),
                    "read": Attention(),
                    "mix": Attention(),
                    "mlp": nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)),
                }
            )
            for _ in range(2)
        )
        self.norm_out, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, codebook)

    def forward(self, states_BND: Tensor) -> Tensor:
        """Logits, B x P x codebook."""
        context = self.embed(self.norm_in(states_BND)) + self.places
        x_BPW = self.queries.expand(len(states_BND), -1, -1)
        for layer in self.layers:
            x_BPW = x_BPW + layer["read"](layer["norms"][0](x_BPW), context)
            mixed = layer["norms"][1](x_BPW)
            x_BPW = x_BPW + layer["mix"](mixed, mixed)
            x_BPW = x_BPW + layer["mlp"](layer["norms"][2](x_BPW))
        return self.head(self.norm_out(x_BPW))


class Study:
    """A transformer, its vokens' rows and a mapper."""

    def __init__(self, run: Path, kind: str) -> None:
        self.kind = kind
        self.tokenizers = open_tokenizers(run, location_bins=100)
        self.model, self.vocabulary, layout = load_pretrained(run / "pretrain" / "model")
        self.model.set_attn_implementation(attention.register())
        self.model.requires_grad_(kind == "joint")
        self.sequencer = Sequencer(self.vocabulary, layout)
        self.facts = coded_facts(self.tokenizers["image"], self.tokenizers.get("audio"))  # type: ignore[arg-type]
        self.run = run
        torch.manual_seed(0)
        self.rows = VokenRows(self.model, self.vocabulary)
        self.rows.start(self.model, self.vocabulary, layout.native_grid_hw)
        hidden, book = self.model.config.hidden_size, self.vocabulary.range("image.0").size
        num_states = CAPTION_IDS if kind == "caption" else len(self.vocabulary.vokens_N)
        self.mapper = Mapper(num_states, hidden, book)

    def stream(self, split: str) -> DocumentStream:
        """Captions and voken pictures of a split."""
        store = CodedStore(sorted((self.run / "tokenize").glob(f"{split}-*")), facts=self.facts)
        mixture = {"emoji:text>voken": 1.0}
        return DocumentStream(store, mixture, self.tokenizers, drop_share=0, free_share=0, seed=1)

    def batch(self, stream: DocumentStream, number: int) -> tuple[Any, Tensor]:
        """Documents, and the codes of their pictures."""
        documents = [stream(number * BATCH + place)[0] for place in range(BATCH)]
        pictures = [d.segments[-1].content.picture for d in documents if isinstance(d.segments[-1].content, Vokens)]
        return documents, torch.tensor(np.stack([picture.codes_KT[0] for picture in pictures]))

    def logits(self, documents: Any) -> Tensor:
        """What the mapper says."""
        if self.kind == "caption":
            ids_BN = torch.full((BATCH, CAPTION_IDS), self.vocabulary.control("pad"))
            for place, document in enumerate(documents):
                codes = torch.from_numpy(document.segments[0].codes.codes_KT[0][:CAPTION_IDS].copy())
                ids_BN[place, : len(codes)] = codes
            return self.mapper(F.embedding(ids_BN, self.model.model.embed_tokens.weight.detach()))
        sequences = [self.sequencer.build(document) for document in documents]
        packed = collate([sequences], sum(map(len, sequences)), pad_id=0)
        embed = self.model.model.embed_tokens.weight
        embed = embed if self.kind == "joint" else embed.detach()
        ids_1T = torch.from_numpy(packed.ids_T)[None]
        hidden = self.model.model(
            inputs_embeds=F.embedding(ids_1T, embed.index_copy(0, self.rows.ids_R, self.rows.input_RD)),
            position_ids=torch.from_numpy(packed.positions_T)[None],
            segments=Segments(packed.lengths, torch.device("cpu")),
            use_cache=False,
        ).last_hidden_state
        first, count = int(self.vocabulary.vokens_N[0]), len(self.vocabulary.vokens_N)
        return self.mapper(gather_vokens(hidden, ids_1T, first_voken=first, count=count)[0].float())

    def groups(self) -> list[dict[str, Any]]:
        """What is trained, each with its rate."""
        groups: list[dict[str, Any]] = [{"params": list(self.mapper.parameters()), "lr": 1e-3}]
        if self.kind != "caption":
            groups.append({"params": list(self.rows.parameters()), "lr": 1e-2})
        if self.kind == "joint":
            groups.append({"params": list(self.model.parameters()), "lr": 2e-4})
        return groups


@torch.no_grad()
def report(study: Study, held_out: list[tuple[Any, Tensor]]) -> list[float]:
    """Cross-entropy, share of codes that are right, and with another picture's states."""
    figures = []
    for documents, codes_BP in held_out:
        logits = study.logits(documents).float()
        said = logits.argmax(-1)
        loss = F.cross_entropy(logits.flatten(0, 1), codes_BP.flatten())
        right, other = (said == codes_BP).float().mean(), (said.roll(1, 0) == codes_BP).float().mean()
        figures.append([float(loss), float(right), float(other)])
    return [round(float(value), 3) for value in np.mean(figures, 0)]


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("kind", choices=("vokens", "joint", "caption"))
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    study, steps = Study(arguments.run, arguments.kind), arguments.steps
    train, validation = study.stream("train"), study.stream("validation")
    held_out = [study.batch(validation, number) for number in range(6)]
    optimizer = torch.optim.AdamW(study.groups(), weight_decay=0.01, betas=(0.9, 0.95))
    rates = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        factor = min(1, (step + 1) / 50) * (0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        documents, codes_BP = study.batch(train, step)
        with torch.autocast("cpu", torch.bfloat16):
            logits = study.logits(documents)
        loss = F.cross_entropy(logits.float().flatten(0, 1), codes_BP.flatten())
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            print(arguments.kind, step + 1, *report(study, held_out), flush=True)


if __name__ == "__main__":
    main()
