"""What one rank's batch takes from those of the others: sums, rows, the statistics of BatchNorm.

A process that trains alone is the only rank, and nothing is exchanged.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def joined() -> bool:
    """Whether other ranks train beside this process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class _Sum(torch.autograd.Function):
    """Every rank's values count in every rank's sum, and so does every sum's gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of all ranks' tensors of one shape, differentiable; every rank must ask for it.

    >>> sum_over_ranks(torch.ones(2))
    tensor([1., 1.])
    """
    return _Sum.apply(values) if joined() else values


def rows_over_ranks(rows: Tensor) -> tuple[Tensor, int]:
    """The rows ``[B, ...]`` of all ranks, rank by rank, without gradients; where one's own begin.

    Every rank must have as many.

    >>> rows_over_ranks(torch.ones(2, 3))[1]
    0
    """
    rows = rows.detach().contiguous()
    if not joined():
        return rows, 0
    found = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(found, rows)
    return torch.cat(found), dist.get_rank() * len(rows)


class BatchNormOverRanks(nn.BatchNorm1d):
    """BatchNorm of rows ``[B, D]`` whose batch is that of all ranks, on GPUs and CPUs alike.

    torch's SyncBatchNorm refuses CPU tensors. Running statistics are the same on all ranks, and
    stay as they were where a batch is not finite: such a step is refused, and must leave no trace.
    In eval mode it is BatchNorm1d.

    >>> BatchNormOverRanks(2)(torch.tensor([[1.0, 5.0], [3.0, 5.0]])).round().tolist()
    [[-1.0, 0.0], [1.0, 0.0]]
    """

    def forward(self, rows: Tensor) -> Tensor:
        """Rows ``[B, D]`` -> rows of mean 0 and deviation 1, scaled and shifted."""
        if not self.training:
            return super().forward(rows)
        wide = rows.double()  # a difference of sums, in one exchange, needs the digits
        sums = torch.cat([wide.sum(0), wide.square().sum(0), wide.new_tensor([len(rows)])])
        sums = sum_over_ranks(sums)
        count = sums[-1]
        mean, square = (sums[:-1] / count).chunk(2)
        variance = (square - mean.square()).clamp(min=0.0)
        normed = ((wide - mean) * (variance + self.eps).rsqrt()).to(rows.dtype)
        self._remember(mean.detach(), (variance * count / (count - 1).clamp(min=1.0)).detach())
        return normed if self.weight is None else torch.addcmul(self.bias, normed, self.weight)

    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        for kept, seen in ((self.running_mean, mean), (self.running_var, variance)):
            moved = kept.lerp(seen.to(kept.dtype), self.momentum)
            kept.copy_(torch.where(moved.isfinite(), moved, kept))
        self.num_batches_tracked += 1
