"""Drivers: what turns codes or vokens into a condition, one feature a patch. Both have a learned null.

`VokenMapper` is MiniGPT-5's query decoder (arXiv 2310.02239) with one query a patch instead of one a text position.
Trained on the drawing alone it is ignored by the denoiser (measured), as MiniGPT-5's is without its caption loss: it is
also asked for the codes of the picture (`alignment`), and its condition is the features of the codes that it says,
with a correction that the drawing teaches.

Dimension key: B samples, P patches, K features of the condition, N vokens, D width of hidden states, W width inside, V
codes of the codebook.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from tokenizers_mm import compat  # noqa: F401  before diffusers
from tokenizers_mm.errors import InputError


class CodeEmbedder(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Codes to a condition.

    Args:
        codebook_size: entries of the codebook.
        dim: K.
        patches: P.
    """

    @register_to_config
    def __init__(self, *, codebook_size: int, dim: int = 64, patches: int = 64) -> None:
        super().__init__()
        self.table = nn.Embedding(codebook_size, dim)
        self.null_K = nn.Parameter(torch.randn(dim) * 0.02)
        self.patches = patches

    def forward(self, codes_BP: Tensor, drop: Tensor | None = None) -> Tensor:
        """Condition, B x P x K; `drop` (B, or B x P) says where it is the null.

        Raises:
            InputError: another number of patches.
        """
        if codes_BP.ndim != 2 or codes_BP.shape[1] != self.patches:
            raise InputError(f"this decoder draws from {self.patches} codes; got shape {tuple(codes_BP.shape)}")
        grid_BPK = self.table(codes_BP)
        if drop is None:
            return grid_BPK
        drop_BP = drop[:, None].expand(codes_BP.shape) if drop.ndim == 1 else drop
        return torch.where(drop_BP[..., None], self.null_K, grid_BPK)

    def null(self, batch: int) -> Tensor:
        """The condition that says nothing."""
        return self.null_K.expand(batch, self.patches, -1)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x_BPW: Tensor, context_BNW: Tensor) -> Tensor:
        q = self.q(x_BPW).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(context_BNW).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _MapperBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.read, self.mix = _Attention(width, heads), _Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_BPW: Tensor, context_BNW: Tensor) -> Tensor:
        x_BPW = x_BPW + self.read(self.norms[0](x_BPW), context_BNW)
        x_BPW = x_BPW + self.mix(y := self.norms[1](x_BPW), y)
        return x_BPW + self.mlp(self.norms[2](x_BPW))


class VokenMapper(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Hidden states at vokens to a condition: patch queries read the states.

    Args:
        hidden_dim: D.
        vokens: N.
        patches: P.
        dim: K.
        codebook_size: V, for `alignment`; None does without, and the condition is free.
        width: W.
        layers: of reading, mixing and MLP.
        heads: of attention.
        sharpness: times the logits, before features of codes are weighed for a drawing; training does without. At 1 the
            condition of an unsure mapper is a blend that the denoiser was never taught: of the codes it draws, 33 % are
            right, at 4 44 % (measured on the embedded model's emoji).
    """

    @register_to_config
    def __init__(
        self,
        *,
        hidden_dim: int,
        vokens: int,
        patches: int,
        dim: int,
        codebook_size: int | None = None,
        width: int = 192,
        layers: int = 2,
        heads: int = 4,
        sharpness: float = 4.0,
    ) -> None:
        super().__init__()
        self.sharpness = sharpness
        self.norm_in, self.embed = nn.LayerNorm(hidden_dim), nn.Linear(hidden_dim, width)
        self.places_NW = nn.Parameter(torch.randn(vokens, width) * 0.02)
        self.queries_PW = nn.Parameter(torch.randn(patches, width) * 0.5)
        self.blocks = nn.ModuleList(_MapperBlock(width, heads) for _ in range(layers))
        self.norm_out, self.out = nn.LayerNorm(width), nn.Linear(width, dim)
        self.null_PK = nn.Parameter(torch.randn(patches, dim) * 0.02)
        self.says = nn.Linear(width, codebook_size) if codebook_size else None
        self.features_VK: Tensor
        if codebook_size:
            self.register_buffer("features_VK", torch.randn(codebook_size, dim))
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    @torch.no_grad()
    def say_as(self, codes: CodeEmbedder) -> None:
        """Take the features, and the null, from which the denoiser was taught to draw each code."""
        assert self.says is not None, "a mapper without codebook_size says no codes"
        self.features_VK.copy_(codes.table.weight)
        self.null_PK.copy_(codes.null_K.expand_as(self.null_PK))

    def forward(self, states_BND: Tensor, drop: Tensor | None = None) -> Tensor:
        """Condition, B x P x K; `drop` (B) says where it is the null."""
        grid_BPK = self.condition(self.read(states_BND))
        return grid_BPK if drop is None else torch.where(drop[:, None, None], self.null_PK, grid_BPK)

    def read(self, states_BND: Tensor) -> Tensor:
        """What each patch's query found in the states, B x P x W."""
        context_BNW = self.embed(self.norm_in(states_BND)) + self.places_NW
        x_BPW = self.queries_PW.expand(len(states_BND), -1, -1)
        for block in self.blocks:
            x_BPW = block(x_BPW, context_BNW)
        return self.norm_out(x_BPW)

    def condition(self, x_BPW: Tensor) -> Tensor:
        """Condition of what was read: the mean features of the codes said, corrected; B x P x K."""
        free_BPK: Tensor = self.out(x_BPW)
        if self.says is None:
            return free_BPK
        logits_BPV = self.code_logits(x_BPW).float() * (1.0 if self.training else self.sharpness)
        return free_BPK + logits_BPV.softmax(-1).to(free_BPK.dtype) @ self.features_VK

    def code_logits(self, x_BPW: Tensor) -> Tensor:
        """What was read about the code of each patch, B x P x V."""
        assert self.says is not None, "a mapper without codebook_size says no codes"
        logits: Tensor = self.says(x_BPW)
        return logits

    def alignment(self, x_BPW: Tensor, codes_BP: Tensor) -> Tensor:
        """Cross-entropy of the codes that the decoder is to draw."""
        return F.cross_entropy(self.code_logits(x_BPW).float().flatten(0, 1), codes_BP.flatten())

    def null(self, batch: int) -> Tensor:
        """The condition that says nothing."""
        return self.null_PK.expand(batch, -1, -1)
