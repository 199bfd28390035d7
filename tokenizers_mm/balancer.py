"""EnCodec's loss balancer: a loss's weight is its share of the gradient, whatever the loss's own scale.

Source: EnCodec, arXiv 2210.13438, section 3.4, equation 4. Dimension key: B sounds, T samples.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tokenizers_mm.together import averaged, count


class Balancer(nn.Module):
    """Several losses of one output to a single loss whose gradient there has the asked-for shares.

    The gradient of loss i at the output is divided by a moving average of its norm and multiplied by
    `weights[i] / sum of the weights of the losses that are present`. The averages are buffers: a resumed run goes on
    as if it had not been stopped.

    Args:
        weights: share of each loss by its name, above 0.
        decay: of the moving averages.

    >>> balancer = Balancer({"small": 1.0, "large": 1.0})
    >>> leaf = torch.tensor([[3.0, 4.0]], requires_grad=True)
    >>> gradient = balancer({"small": 0.001 * leaf[:, 0].sum(), "large": 1000 * leaf[:, 1].sum()}, leaf)
    >>> [round(value, 3) for value in gradient[0].tolist()]
    [0.5, 0.5]
    """

    def __init__(self, weights: Mapping[str, float], *, decay: float = 0.999) -> None:
        super().__init__()
        if not weights or min(weights.values()) <= 0:
            raise ValueError(f"weights above 0 are needed, got {dict(weights)}")
        self.weights, self._decay, self._names = dict(weights), decay, list(weights)
        self._sums: Tensor
        self._counts: Tensor
        self.register_buffer("_sums", torch.zeros(len(weights)))
        self.register_buffer("_counts", torch.zeros(len(weights)))

    def forward(self, losses: Mapping[str, Tensor], output_BT: Tensor) -> Tensor:
        """The balanced gradient at the output, B x T.

        Args:
            losses: 0-d, each computed from `output_BT`; some of the named ones may be absent.
            output_BT: what the losses were computed from, with requires_grad; rows are sounds.
        """
        total = sum(self.weights[name] for name in losses)
        balanced_BT = torch.zeros_like(output_BT)
        for name, loss in losses.items():
            (gradient_BT,) = torch.autograd.grad(loss, output_BT, retain_graph=True)
            gradient_BT = gradient_BT / count()  # of the mean over all processes
            norm = self._averaged(self._names.index(name), gradient_BT.flatten(1).norm(dim=1).mean())
            balanced_BT += self.weights[name] / total * gradient_BT / norm.clamp_min(1e-12)
        return balanced_BT

    @torch.no_grad()
    def _averaged(self, place: int, norm: Tensor) -> Tensor:
        """The moving average, without bias to its start; the same on all processes."""
        norm = averaged(norm)
        self._sums[place] = self._decay * self._sums[place] + (1 - self._decay) * norm
        self._counts[place] = self._decay * self._counts[place] + (1 - self._decay)
        return self._sums[place] / self._counts[place]


def with_gradient(value: Tensor, output_BT: Tensor, gradient_BT: Tensor) -> Tensor:
    """A loss that shows `value` and whose gradient at `output_BT`, averaged over processes, is `gradient_BT`."""
    carrier = (output_BT * gradient_BT.detach()).sum() * count()
    return carrier + (value - carrier).detach()
