"""BatchNorm over the rows of several processes: what one process computes from the whole batch.

PyTorch's own SyncBatchNorm is for cards only, and replaces the layers of a network. This is a function in the place of
``torch.nn.functional.batch_norm``, on every device: layers, their names and running statistics stay what they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from learn2perturb.engine.ranks import Ranks, Share

_ops = torch.ops.aten


@final
class _Normalised(torch.autograd.Function):
    """``(x - mean) / sqrt(var + eps) * weight + bias``, mean and var being those of all rows of all processes.

    The kernels are those of BatchNorm in eval mode. Their gradient takes mean and variance for constants; what these
    add is linear in x: ``-weight/sqrt(var + eps) * (mean(g) + x_hat mean(g x_hat))``, means over all rows.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float, count: Tensor,
        ranks: Ranks,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps, ctx.count, ctx.ranks = eps, count, ranks
        normalised: Tensor = _ops.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0]
        return normalised

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        gradient = gradients[0].contiguous(memory_format=_layout(x))
        _, of_weight, of_bias = _ops.native_batch_norm_backward(
            gradient, x, weight, mean, var, None, None, False, ctx.eps, [False, True, True]
        )
        sums = ctx.ranks.sum(torch.stack([of_weight, of_bias]).to(mean.dtype)) / ctx.count
        inverse = (var + ctx.eps).rsqrt()
        scale = weight * inverse
        # ``scale g - slope x - offset``, in two passes over the numbers: the second term is a normalisation by
        # mean 0 and variance 1, whose kernel is the fastest there is for ``a + b x`` of each channel.
        slope = scale * inverse * sums[0]
        offset = scale * sums[1] - slope * mean
        moved = _ops.native_batch_norm(
            x, -slope, -offset, torch.zeros_like(mean), torch.ones_like(var), False, 0.0, 0.0
        )[0]
        scale = scale.view(1, -1, *[1] * (x.ndim - 2))
        if moved.dtype == gradient.dtype == scale.dtype:
            moved.addcmul_(gradient, scale)
        else:
            moved = (moved + gradient * scale).to(x.dtype)
        return moved, of_weight, of_bias, None, None, None, None, None


def _layout(x: Tensor) -> torch.memory_format:
    last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def batch_norm(
    share: Share,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Return what ``torch.nn.functional.batch_norm`` gives for these rows within the whole batch of ``share``."""
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    mean, var, count = _statistics(share, input.detach())
    with torch.no_grad():
        for running, value in ((running_mean, mean), (running_var, var * (count / (count - 1)))):
            if running is not None:
                running.mul_(1 - momentum).add_(value.to(running.dtype), alpha=momentum)
    weight = mean.new_ones(len(mean)) if weight is None else weight
    bias = mean.new_zeros(len(mean)) if bias is None else bias
    return _Normalised.apply(input, weight, bias, mean, var, eps, count, share.ranks)


@torch.no_grad()
def average_running_statistics(modules: Iterable[nn.Module], share: Share) -> None:
    """Replace running statistics that each process has of its own rows by their mean over the rows of all."""
    own = [
        buffer
        for module in modules
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
        for buffer in (module.running_mean, module.running_var)
        if buffer is not None
    ]
    for buffer in own:
        buffer.mul_(share.weight)
    share.ranks.add_up(own)


def _statistics(share: Share, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and biased variance of each channel over all rows, from those of every process, and their number."""
    mean, var = _ops.batch_norm_update_stats(x, None, None, 0.0)
    table = mean.new_zeros(share.ranks.world, 3, len(mean))
    # The number of values goes with them: a loss may run a part of its rows only, and not equally many everywhere.
    table[share.ranks.rank] = torch.stack([mean, var, torch.full_like(mean, x.numel() // x.shape[1])])
    means, variances, counts = share.ranks.sum(table).unbind(1)
    count = counts.sum(0)
    weights = counts / count
    mean = (weights * means).sum(0)
    return mean, (weights * (variances + (means - mean).square())).sum(0), count
