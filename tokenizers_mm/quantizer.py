"""The vector quantiser of VQ-KD: one codebook on the unit sphere, or that and residual ones behind it.

The work is done by `vector_quantize_pytorch.VectorQuantize`; ours are the defaults, BEiT v2's own update rule
as a reference, and the residual chain. Codebooks live in fp32 and are averaged over processes.

Dimension key: B pictures, N patches, S = B x N vectors, X code dimension, K codebooks, V entries of one.
"""

from __future__ import annotations

import difflib
import inspect
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from vector_quantize_pytorch import VectorQuantize
from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

from tokenizers_mm.config import Config
from tokenizers_mm.together import firsts, gathered, has_others, summed, train_as_one

_OURS = frozenset(
    """self dim codebook_size codebook_dim heads separate_codebook_per_head decay freeze_codebook kmeans_init
    kmeans_iters use_cosine_sim threshold_ema_dead_code commitment_weight straight_through rotation_trick channel_last
    accept_image_fmap accept_3d_fmap vq_bridge sync_codebook route_gradients_to_input affine_param
    affine_param_batch_decay affine_param_codebook_decay sync_affine_param in_place_codebook_optimizer ema_update
    learnable_codebook manual_ema_update manual_in_place_optimizer_update""".split()  # noqa: SIM905
)
"""Arguments of VectorQuantize that other fields decide, or with which a code is more than its entry in the codebook."""
_OPEN = frozenset(inspect.signature(VectorQuantize.__init__).parameters) - _OURS


class QuantizerConfig(Config):
    """How codes are found and how they learn. The defaults are those of the embedded model."""

    num_codebooks: int = Field(1, ge=1, le=16)
    """Above 1, further codebooks hold what the ones before left over (a residual quantiser)."""
    update: Literal["ema", "norm_ema", "gradient"] = "ema"
    """`ema`: sums and counts, weighted by hits. `norm_ema`: BEiT v2's rule, every code that was hit moves by the same
    share and none is replaced; at small scale it used 18 % of a codebook where `ema` used all. `gradient`: learned."""
    distance: Literal["cosine", "euclidean"] = "cosine"
    """Of the first codebook; residuals are always compared by Euclidean distance, for their length means something."""
    gradient: Literal["rotation", "straight_through"] = "rotation"
    """How gradients pass the codes: the rotation trick (arXiv 2410.06424) or unchanged, as `norm_ema` always does."""
    kmeans_start: bool = True
    """Start from k-means of the first batch, gathered from all processes; needs about 4 vectors a code."""
    kmeans_iters: int = Field(10, ge=1)
    options: dict[str, bool | int | float] = {}
    """Any other argument of VectorQuantize by its name, for instance `{stochastic_sample_codes: true}`."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for name in self.options.keys() - _OPEN:
            near = difflib.get_close_matches(name, _OPEN, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"it is one of {', '.join(sorted(_OPEN))}"
            raise ValueError(f"quantizer.options has no {name!r}; {hint}")
        if self.update != "gradient" and self.options.get("orthogonal_reg_weight"):
            raise ValueError("orthogonal_reg_weight does nothing while EMA moves the codes: use update: gradient")
        if self.update == "gradient" and self.distance == "cosine":
            raise ValueError("update: gradient needs distance: euclidean")
        if self.update == "norm_ema" and (self.distance != "cosine" or self.num_codebooks > 1 or self.options):
            raise ValueError("update: norm_ema is BEiT v2's rule: one cosine codebook, no other options")
        if self.options or self.update == "gradient":
            self._try()
        return self

    def _try(self) -> None:
        """What the library asserts only when it is built is told while the recipe is read."""
        try:
            with torch.random.fork_rng(devices=[]):
                make_quantizer(self, dim=2, codebook_size=2, decay=0.9, dead_hits=0.5)
        except AssertionError as error:
            reason = f": {error}" if str(error) else "; leave one of the options out"
            raise ValueError(f"VectorQuantize refuses this combination{reason}") from error


def make_quantizer(
    config: QuantizerConfig, *, dim: int, codebook_size: int, decay: float, dead_hits: float
) -> VectorQuantize | NormEMA | ResidualQuantizer:
    """A quantiser: vectors B x N x X to (quantised B x N x X, codes B x N or B x K x N, commitment loss).

    Build it after the process group, so that it averages its codebook over all processes.

    Args:
        config: see there.
        dim: of the vectors.
        codebook_size: entries of every codebook.
        decay: of the moving averages.
        dead_hits: a code is replaced when a batch hits it less often than this on average; 0 never replaces one.
    """
    if config.update == "norm_ema":
        return NormEMA(config, dim=dim, codebook_size=codebook_size, decay=decay)
    books = [
        VectorQuantize(
            dim=dim,
            codebook_size=codebook_size,
            use_cosine_sim=config.distance == "cosine" and book == 0,
            decay=decay,
            kmeans_init=config.kmeans_start,
            kmeans_iters=config.kmeans_iters,
            rotation_trick=config.gradient == "rotation",
            straight_through=config.gradient == "straight_through",
            threshold_ema_dead_code=dead_hits,
            ema_update=config.update == "ema",
            learnable_codebook=config.update == "gradient",
            # The library asks once, at its first use in the process, whether there are others, and remembers it.
            sync_codebook=has_others(),
            # Of several codebooks each would pass the gradient once: the sum passes it instead.
            route_gradients_to_input=config.num_codebooks == 1,
            **config.options,
        )
        for book in range(config.num_codebooks)
    ]
    if config.gradient == "rotation" and not config.options.get("stochastic_sample_codes"):
        for book in books:
            book._codebook.gumbel_sample = nearest
    for book in books:
        train_as_one(book._codebook)
    if len(books) == 1:
        return books[0]  # not in a list of one: tokenizers saved before there were several keep their tensor names
    return ResidualQuantizer(books, normalises=config.distance == "cosine", rotates=config.gradient == "rotation")


def nearest(similarity_HSV: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    """The nearest codes, H x S, and one-hot rows H x S x V: VectorQuantize's own choice without its int64 rows.

    Those were a sixth of a training step with 8,192 codes on a CPU.
    """
    codes_HS = similarity_HSV.argmax(dim=-1)
    return codes_HS, torch.zeros_like(similarity_HSV).scatter_(-1, codes_HS[..., None], 1.0)


class ResidualQuantizer(nn.Module):
    """Codebooks in a row, each for what the ones before left over; the quantised vector is the sum."""

    def __init__(self, books: list[VectorQuantize], *, normalises: bool, rotates: bool) -> None:
        super().__init__()
        self.books = nn.ModuleList(books)
        self._normalises, self._rotates = normalises, rotates

    def forward(self, z_BNX: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors to (their sum of codes, codes B x K x N, commitment loss)."""
        z_BNX = F.normalize(z_BNX, dim=-1) if self._normalises else z_BNX
        rest_BNX, total_BNX, codes, losses = z_BNX, torch.zeros_like(z_BNX), [], []
        for book in self.books:
            quantised_BNX, codes_BN, loss = book(rest_BNX)
            total_BNX = total_BNX + quantised_BNX.detach()
            rest_BNX = rest_BNX - quantised_BNX.detach()
            codes.append(codes_BN)
            losses.append(loss.sum())
        if self.training:
            total_BNX = rotate_to(z_BNX, total_BNX) if self._rotates else z_BNX + (total_BNX - z_BNX).detach()
        return total_BNX, torch.stack(codes, dim=1), torch.stack(losses).sum()


class _Vectors(nn.Module):
    """Buffers under the library's names."""

    def __init__(self, embed_VX: Tensor, *, is_started: bool) -> None:
        super().__init__()
        self.initted: Tensor
        self.embed: Tensor
        self.register_buffer("initted", torch.tensor(is_started))
        self.register_buffer("embed", embed_VX[None])


class NormEMA(nn.Module):
    """BEiT v2's codebook (arXiv 2208.06366): unit vectors; each code that was hit moves towards the mean of its hits.

    k-means starts from the first batch of all processes, where BEiT v2 lets every process start on its own.
    """

    def __init__(self, config: QuantizerConfig, *, dim: int, codebook_size: int, decay: float) -> None:
        super().__init__()
        self.decay, self._config = decay, config
        generator = torch.Generator().manual_seed(0)
        embed_VX = F.normalize(torch.randn(codebook_size, dim, generator=generator), dim=-1)
        self._codebook = _Vectors(embed_VX, is_started=not config.kmeans_start)

    @property
    def codebook(self) -> Tensor:
        """V x X, on the unit sphere."""
        return self._codebook.embed[0]

    def forward(self, z_BNX: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors to (their codes' vectors, codes B x N, commitment loss)."""
        z_BNX = F.normalize(z_BNX, dim=-1)
        flat_SX = z_BNX.detach().flatten(0, 1)
        if not self._codebook.initted:
            self._start(flat_SX)
        codes_S = (flat_SX @ self.codebook.T).argmax(dim=-1)
        quantised_BNX = self.codebook[codes_S].view_as(z_BNX).clone()
        if self.training:
            self._update(flat_SX, codes_S)
        loss = F.mse_loss(z_BNX, quantised_BNX)
        passed_BNX = z_BNX + (quantised_BNX - z_BNX).detach()
        return passed_BNX if self.training else quantised_BNX, codes_S.view(z_BNX.shape[:2]), loss

    @torch.no_grad()
    def _update(self, flat_SX: Tensor, codes_S: Tensor) -> None:
        hits_V, sums_VX = (summed(part) for part in _hits(flat_SX, codes_S, len(self.codebook)))
        means_VX = F.normalize(sums_VX / hits_V.clamp_min(1)[:, None], dim=-1)
        moved_VX = F.normalize(self.decay * self.codebook + (1 - self.decay) * means_VX, dim=-1)
        self.codebook.copy_(torch.where((hits_V > 0)[:, None], moved_VX, self.codebook))

    @torch.no_grad()
    def _start(self, flat_SX: Tensor) -> None:
        everyone_SX = gathered(flat_SX)
        generator = torch.Generator().manual_seed(0)
        places_V = torch.randint(len(everyone_SX), (len(self.codebook),), generator=generator)
        if len(everyone_SX) >= len(self.codebook):
            places_V = torch.randperm(len(everyone_SX), generator=generator)[: len(self.codebook)]
        self.codebook.copy_(everyone_SX[places_V.to(flat_SX.device)])
        for _ in range(self._config.kmeans_iters):
            codes_S = (everyone_SX @ self.codebook.T).argmax(dim=-1)
            hits_V, sums_VX = _hits(everyone_SX, codes_S, len(self.codebook))
            self.codebook.copy_(torch.where((hits_V > 0)[:, None], F.normalize(sums_VX, dim=-1), self.codebook))
        firsts(self.codebook)
        self._codebook.initted.fill_(True)


def codebooks_of(quantizer: nn.Module) -> Tensor:
    """The codes' vectors, K x V x X."""
    if isinstance(quantizer, ResidualQuantizer):
        books: Any = quantizer.books
        return torch.stack([book.codebook for book in books])
    codebook_VX: Any = quantizer.codebook
    found: Tensor = codebook_VX[None]
    return found


def is_started(quantizer: nn.Module) -> bool:
    """False before the first batch gave the codebooks their vectors."""
    books: Any = quantizer.books if isinstance(quantizer, ResidualQuantizer) else [quantizer]
    return all(bool(book._codebook.initted) for book in books)


def _hits(flat_SX: Tensor, codes_S: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Hits of every code and the sum of the vectors that hit it."""
    hits_V = torch.bincount(codes_S, minlength=num_codes).to(flat_SX.dtype)
    sums_VX = torch.zeros(num_codes, flat_SX.shape[1], device=flat_SX.device, dtype=flat_SX.dtype)
    sums_VX.index_add_(0, codes_S, flat_SX)
    return hits_V, sums_VX
