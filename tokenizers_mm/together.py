"""What a module that is trained on several processes needs to be the same on each: sums, rows and draws of all of them.

Alone (no process group, or a group of one) every function returns what it was given and costs nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def has_others() -> bool:
    """True where there is more than this one."""
    return count() > 1


def is_first() -> bool:
    """True on the one process that speaks for all."""
    return not has_others() or dist.get_rank() == 0


def summed(values: Tensor) -> Tensor:
    """Sum over the processes, the same on each."""
    if not has_others():
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total


def averaged(values: Tensor) -> Tensor:
    """Mean over the processes, the same on each."""
    return summed(values) / count() if has_others() else values


def gathered(rows_SX: Tensor) -> Tensor:
    """The rows of all processes, in the order of ranks; every process has equally many. Without gradients."""
    if not has_others():
        return rows_SX
    rows_SX = rows_SX.detach().contiguous()
    if not len(rows_SX):
        return rows_SX
    parts = [torch.empty_like(rows_SX) for _ in range(count())]
    dist.all_gather(parts, rows_SX)
    return torch.cat(parts)


class _Gathered(torch.autograd.Function):
    """Rows of all processes; every process computes the same loss from them, so each has its rows' whole gradient."""

    @staticmethod
    def forward(ctx: Any, rows_SX: Tensor) -> Tensor:
        sizes = gathered(torch.tensor([len(rows_SX)], device=rows_SX.device)).tolist()
        padded = rows_SX.new_zeros(max(sizes), *rows_SX.shape[1:])
        padded[: len(rows_SX)] = rows_SX
        parts = gathered(padded).split(max(sizes))
        ctx.start, ctx.size = sum(sizes[: dist.get_rank()]), len(rows_SX)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient_SX: Tensor) -> Tensor:
        # gradients of parameters become means over the processes, and this part of them is in no other one
        return gradient_SX[ctx.start : ctx.start + ctx.size] * count()


def gathered_with_gradient(rows_SX: Tensor) -> Tensor:
    """The rows of all processes, in the order of ranks, as many as each has, for a loss that all of them compute whole.

    Gradients are right where those of parameters are averaged over the processes afterwards, as DDP does.
    """
    gathered_SX: Tensor = _Gathered.apply(rows_SX) if has_others() else rows_SX  # type: ignore[no-untyped-call]
    return gathered_SX


def firsts(values: Tensor) -> Tensor:
    """What the first process has, in place."""
    if has_others():
        dist.broadcast(values, src=0)
    return values


@contextlib.contextmanager
def same_draws(device: torch.device) -> Iterator[None]:
    """Inside, the global generator of every process is where the first one's is: all draw what one alone would draw."""
    if not has_others():
        yield
        return
    on_gpu = device.type == "cuda"
    own = torch.cuda.get_rng_state(device) if on_gpu else torch.get_rng_state()
    state = firsts(own.clone().to(device)).cpu()
    torch.cuda.set_rng_state(state, device) if on_gpu else torch.set_rng_state(state)
    yield
    if not is_first():  # the first goes on from here, as it would alone
        torch.cuda.set_rng_state(own, device) if on_gpu else torch.set_rng_state(own)


def train_as_one(codebook: Any) -> None:
    """Let a codebook of `vector_quantize_pytorch` start and replace its dead codes on the vectors of all processes.

    The library draws a number of vectors on every process, by the draws of each: equal on all, but other ones than a
    single process draws on the same batch. Its sums of the moving averages stay as they are.
    """
    if not has_others():
        return
    from vector_quantize_pytorch import vector_quantize_pytorch as library

    begin, replace = codebook.init_embed_, codebook.replace
    codebook.sample_fn = codebook.replace_sample_fn = library.batched_sample_vectors
    codebook.kmeans_all_reduce_fn = library.noop

    def begin_together(data_1SX: Tensor, mask: Tensor | None = None) -> None:
        if codebook.initted:
            return
        assert mask is None, "vectors of all processes are gathered whole"
        with same_draws(data_1SX.device):
            begin(gathered(data_1SX[0])[None])
        for tensor in (codebook.embed.data, codebook.embed_avg, codebook.cluster_size):
            firsts(tensor)  # k-means on a GPU adds in any order

    def replace_together(batch_samples: Tensor, batch_mask: Tensor, seq_mask: Tensor | None = None) -> None:
        assert seq_mask is None, "vectors of all processes are gathered whole"
        with same_draws(batch_samples.device):
            replace(gathered(batch_samples[0])[None], batch_mask)

    codebook.init_embed_, codebook.replace = begin_together, replace_together
