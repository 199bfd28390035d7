"""What a voken driver and its transformer are trained on: draw the picture, say its codes, decide to draw.

loss = flow + align + text, each with its weight (MiniGPT-5, arXiv 2310.02239). `flow` is the decoder's own loss with
the condition that the mapper makes of the hidden states at the vokens; `align` is the cross-entropy of the picture's
codes from that condition: without it a decoder learns to ignore vokens (measured). `text` is next-token prediction,
whose only label in a voken block is the begin token.

Deviations: alignment with the picture's own codes instead of a text encoder's caption features; weight 1 for the text
of a joint phase, whose transformer we trained ourselves.

Dimension key: M voken blocks, N vokens a block, D width, P patches, W width and K features of the mapper, V vocabulary,
R trained rows, C H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from anygen.evaluation.voken_gap import compare, shuffled
from anygen.model.loss import NextTokenLoss, TensorBatch
from anygen.seeding import borrowed_randomness
from anygen.training.parts import Part
from anygen.vocabulary import Vocabulary
from decoders.flow import flow_loss
from decoders.spans import gather_vokens


@dataclass(frozen=True, eq=False)
class VokenBatch:
    """Packed documents, and the picture of each of their voken blocks in order."""

    text: TensorBatch
    codes_MP: Tensor
    pixels_MCHW: Tensor
    """In [0, 1]."""

    def to(self, device: torch.device) -> VokenBatch:
        """The batch on another device."""
        return replace(
            self,
            text=self.text.to(device),
            codes_MP=self.codes_MP.to(device),
            pixels_MCHW=self.pixels_MCHW.to(device),
        )


@dataclass(frozen=True)
class VokenWeights:
    """Weights of the loss, and how it is sampled."""

    flow: float
    align: float
    text: float
    drop_share: float
    """Share of conditions replaced by the mapper's null."""
    flow_share: float
    """Share of a batch's pictures for which the flow loss, by far the dearest, is taken."""


class VokenRows(nn.Module):
    """The rows of a frozen model's input and output matrices that belong to vokens and their begin and end tokens.

    They are parameters of their own: nothing else of the matrices gets a gradient, or weight decay.
    """

    def __init__(self, model: Any, vocabulary: Vocabulary) -> None:
        super().__init__()
        controls = [vocabulary.control(name) for name in ("voken", "/voken")]
        self.ids_R: Tensor
        self.register_buffer("ids_R", torch.tensor([*controls, *vocabulary.vokens_N.tolist()]), persistent=False)
        embed, head = model.model.embed_tokens.weight.detach(), model.lm_head.weight.detach()
        self.input_RD = nn.Parameter(embed[self.ids_R].clone())
        self.output_RD = None if head.data_ptr() == embed.data_ptr() else nn.Parameter(head[self.ids_R].clone())

    @torch.no_grad()
    def start(self, model: Any, vocabulary: Vocabulary, grid_hw: tuple[int, int]) -> None:
        """Start where the model already writes a picture.

        The begin and end tokens are those of a picture of codes, the first two vokens its rows and columns, the others
        the mean of its codes, each with a little of its own. MiniGPT-5 starts from the mean of all rows.
        """
        embed_VD, codes = model.model.embed_tokens.weight.detach(), vocabulary.range("image.0")
        self.input_RD[:2] = embed_VD[[vocabulary.control("image"), vocabulary.control("/image")]]
        mean_D, own_ND = embed_VD[codes.start : codes.stop].mean(0), torch.randn_like(self.input_RD[2:])
        self.input_RD[2:] = mean_D + 0.5 * embed_VD.std() * own_ND
        shape = [vocabulary.numbers.start + number for number in grid_hw][: len(own_ND)]
        self.input_RD[2 : 2 + len(shape)] = embed_VD[shape]

    def matrices(self, model: Any) -> tuple[Tensor, Tensor]:
        """Input and output matrix with these rows in their places."""
        embed_VD = model.model.embed_tokens.weight.detach().index_copy(0, self.ids_R, self.input_RD)
        if self.output_RD is None:
            return embed_VD, embed_VD
        return embed_VD, model.lm_head.weight.detach().index_copy(0, self.ids_R, self.output_RD)

    @torch.no_grad()
    def write(self, model: Any) -> None:
        """Put the rows into the model."""
        embed_VD, head_VD = self.matrices(model)
        model.model.embed_tokens.weight.copy_(embed_VD)
        if self.output_RD is not None:
            model.lm_head.weight.copy_(head_VD)


def read_vokens(
    text: NextTokenLoss, batch: TensorBatch, vokens_N: Any, *, rows: VokenRows | None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Hidden states at the vokens, M x N x D, the text loss, and its report.

    Args:
        text: the transformer and its loss.
        batch: packed documents.
        vokens_N: ids of the vokens.
        rows: in place of the transformer's own.
    """
    if rows is None:
        hidden_TD, head_VD = text.read(batch), text.model.lm_head.weight
    else:
        embed_VD, head_VD = rows.matrices(text.model)
        hidden_TD = text.read(batch, embed_VD)
    loss, report = text.score(hidden_TD, batch, head_VD)
    states_MND, _ = gather_vokens(hidden_TD[None], batch.ids_T[None], first_voken=int(vokens_N[0]), count=len(vokens_N))
    return states_MND.float(), loss, report


class VokenLoss(nn.Module):
    """The loss of a phase.

    Args:
        model: a `Qwen3ForCausalLM`; it is trained where `rows` is None.
        vocabulary: of the model.
        decoder: a `FlowDecoder` with a voken mapper, which is trained; its denoiser is not.
        weights: of the terms.
        rows: the trained rows of a frozen model.
        model_lr_ratio: learning rate of a trained model over the mapper's.
    """

    def __init__(
        self,
        model: Any,
        vocabulary: Vocabulary,
        decoder: Any,
        *,
        weights: VokenWeights,
        rows: VokenRows | None,
        model_lr_ratio: float = 1.0,
    ) -> None:
        super().__init__()
        model.requires_grad_(rows is None)
        decoder.denoiser.requires_grad_(False)
        decoder.vokens.requires_grad_(True)
        self.text = NextTokenLoss(model, vocabulary, z_loss=0.0)
        self.rows, self.denoiser, self.mapper = rows, decoder.denoiser, decoder.vokens
        self._draw, self._weights, self._model_lr_ratio = decoder.__call__, weights, model_lr_ratio
        self._vokens_N = vocabulary.vokens_N

    def parts(self) -> Sequence[Part]:
        """Model or rows, then the mapper: each has its own clipping, and rows no weight decay."""
        mapper = Part(list(self.mapper.parameters()))
        if self.rows is not None:
            return Part(list(self.rows.parameters()), self._model_lr_ratio, decays=False), mapper
        return Part(list(self.text.parameters()), self._model_lr_ratio), mapper

    def forward(self, batch: VokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss, and its terms; a batch without voken pictures is one of text alone."""
        states_MND, text, report = self.read(batch)
        report = {"text": text.detach(), **report}
        if not len(states_MND):  # every parameter has its part, a 0, in every batch's graph
            nothing = sum((p.sum() * 0 for p in self.mapper.parameters()), torch.zeros((), device=text.device))
            return self._weights.text * text + nothing, report
        x_MPW = self.mapper.read(states_MND)
        align = self.mapper.alignment(x_MPW, batch.codes_MP)
        loss, report = self._weights.text * text + self._weights.align * align, report | {"align": align.detach()}
        if not self._weights.flow:
            return loss + self._unused(x_MPW), report
        num_flow = max(1, round(self._weights.flow_share * len(states_MND)))
        drop_M = torch.rand(num_flow) < self._weights.drop_share
        grid_MPK = self._dropped(self.mapper.condition(x_MPW[:num_flow]), drop_M)
        flow = self.flow(grid_MPK, batch.pixels_MCHW[:num_flow])
        return loss + self._weights.flow * flow, report | {"flow": flow.detach()}

    def _unused(self, x_MPW: Tensor) -> Tensor:
        """0, with every parameter in the graph that only the flow loss would reach."""
        return (self.mapper.out(x_MPW[:1]).sum() + self.mapper.null_PK.sum()) * 0

    def read(self, batch: VokenBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Hidden states at the vokens, M x N x D, the text loss, and its report."""
        return read_vokens(self.text, batch.text, self._vokens_N, rows=self.rows)

    @torch.no_grad()
    def gaps(self, batch: VokenBatch, encode: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Own vokens against another picture's: flow loss under the same noise, codes said, codes and PSNR of drawings.

        Each `gap` is what is lost with the other's; empty for a batch without two pictures.
        """
        states_MND, _, _ = self.read(batch)
        if len(states_MND) < 2:
            return {}
        others_MND = states_MND[shuffled(len(states_MND))]
        own, other = (self._figures(states, batch, encode) for states in (states_MND, others_MND))
        gaps = {f"{name}_gap": (other[name] - own[name]) * (1 if name == "flow" else -1) for name in own}
        return {name: value for name, value in own.items() if name != "flow"} | gaps

    def _figures(self, states_MND: Tensor, batch: VokenBatch, encode: Callable[[Tensor], Tensor]) -> dict[str, float]:
        x_MPW = self.mapper.read(states_MND)
        said = (self.mapper.code_logits(x_MPW).argmax(-1) == batch.codes_MP).double().mean()
        with borrowed_randomness(0):
            flow = self.flow(self.mapper.condition(x_MPW), batch.pixels_MCHW)
        drawn = self._draw(vokens=states_MND, generator=torch.Generator().manual_seed(0)).data_BCHW
        found = compare((drawn + 1) / 2, batch.pixels_MCHW, batch.codes_MP, encode)
        return {
            "flow": float(flow),
            "said": float(said),
            "agreement": float(found.agreement_B.mean()),
            "psnr": float(found.psnr_B.mean()),
        }

    def flow(self, grid_MPK: Tensor, pixels_MCHW: Tensor) -> Tensor:
        """The denoiser's loss under a condition."""
        return flow_loss(self.denoiser, pixels_MCHW * 2 - 1, grid_MPK)

    def _dropped(self, grid_MPK: Tensor, drop_M: Tensor) -> Tensor:
        return torch.where(drop_M.to(grid_MPK.device)[:, None, None], self.mapper.null(len(grid_MPK)), grid_MPK)
