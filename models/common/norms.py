"""Batch norm over the rows of all ranks, which gives what one process would: torch's SyncBatchNorm refuses CPUs."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmkernels.distributed.gathered import GatheredRows
from mmkernels.distributed.ranks import group_of


class BatchNormOverRanks(_BatchNorm):
    """Takes the place of a batch norm; names, weights and running statistics stay."""

    def __init__(self, norm: _BatchNorm, group: dist.ProcessGroup) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, affine=False)
        self.affine, self.weight, self.bias = norm.affine, norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.ranks = group_of(group).ranks

    def _check_input_dim(self, input: Tensor) -> None:
        """Any shape [B, C, ...] will do."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, ...] -> the same shape."""
        if not self.training:
            return super().forward(x)
        values = x.float()  # under autocast too, as torch's
        variance, mean = torch.var_mean(values, [0, *range(2, x.dim())], correction=0)
        own = torch.cat([values.new_full((1,), x.numel() // x.shape[1]), mean, variance])
        of_ranks = GatheredRows.apply(own[None], [1] * self.ranks.size, self.ranks).double()
        counts, means, variances = of_ranks.split([1, self.num_features, self.num_features], 1)
        mean = (counts * means).sum(0) / counts.sum()
        variance = (counts * (variances + (means - mean) ** 2)).sum(0) / counts.sum()
        self._track(mean.detach(), variance.detach(), counts.detach().sum())
        factor = (variance + self.eps).rsqrt()
        shape = [1, -1, *[1] * (x.dim() - 2)]
        y = (values - mean.float().view(shape)) * factor.float().view(shape)
        if self.affine:
            y = y * self.weight.float().view(shape) + self.bias.float().view(shape)
        return y.to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Let the running statistics follow, with the unbiased variance, as torch does."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), self.momentum)


def norms_over_ranks(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Replace every batch norm within ``model``."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, _BatchNorm):
                setattr(module, name, BatchNormOverRanks(child, group))
