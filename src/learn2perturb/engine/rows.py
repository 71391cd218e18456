"""Passes on a part of a batch that draw, normalise and differentiate as passes on the whole batch do.

Random numbers are a stream: the first rows of a batch take the first numbers. So each process draws the rows of the
whole batch and keeps its own, or goes past those of others (see ``stream``): all streams stay in step, and every row
has the draw that it has in one process. Which draws have rows is seen from their shape, so that an attack, a loss or a
network of anyone's needs to know nothing of it. What a pass takes from all rows at once (the statistics of BatchNorm, a
gradient of the weights) is summed over the processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from learn2perturb.engine import ranks
from learn2perturb.engine.batch_norm import batch_norm
from learn2perturb.engine.ranks import Share
from learn2perturb.engine.stream import fill_between

Treatment = Callable[[Share, Callable[..., Any], Sequence[Any], dict[str, Any]], Any]


@final
class _OfAShare(TorchFunctionMode):
    """Sees every call of a torch function in the body, and treats those that differ on a part of a batch."""

    def __init__(self, share: Share) -> None:
        super().__init__()
        self.share = share

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        treatment = _TREATMENTS.get(func)
        if treatment is None or ranks.current_share() is None:
            return func(*args, **(kwargs or {}))
        return treatment(self.share, func, args, dict(kwargs or {}))


@contextlib.contextmanager
def sharded(share: Share) -> Iterator[None]:
    """Run the passes of the body on one share of a batch, as if it were the batch."""
    with ranks.sharing(share), contextlib.nullcontext() if share.whole else _OfAShare(share):
        yield


def shared_by_all(shared: bool = True) -> contextlib.AbstractContextManager[None]:
    """Return the context of what no row has (where ``shared``): it is the same on every process, whatever its shape."""
    return ranks.sharing(None) if shared and ranks.current_share() is not None else contextlib.nullcontext()


def deviation(values: Tensor) -> Tensor:
    """Return the unbiased standard deviation of features (N, ...), over the whole batch that they are a part of."""
    share = ranks.current_share()
    if share is None:
        return values.std()
    count = values.numel() // share.rows * share.total
    mean = share.ranks.sum(values.sum()) / count
    return (share.ranks.sum((values - mean).square().sum()) / (count - 1)).sqrt()


def mean_of_rows(values: Tensor) -> Tensor:
    """Return the mean over the last dimension, which is rows, of the whole batch that they are a part of."""
    share, own = ranks.current_share(), values.mean(dim=-1)
    return own if share is None else share.ranks.sum(own * share.weight)


# -- draws ------------------------------------------------------------------------------------------------------------


def _times(share: Share, value: Any) -> int:
    """Return how many times the rows of this share a size or tensor has, in blocks as of ``cat``; 0: it has no rows."""
    if isinstance(value, nn.Parameter) or not isinstance(value, (Tensor, tuple, list)):
        return 0
    size = value.shape if isinstance(value, Tensor) else value
    if not size or not isinstance(size[0], int) or size[0] % share.rows:
        return 0
    times = size[0] // share.rows
    return times if times == 1 or len(size) > 1 else 0


def _own(share: Share, wide: Tensor, times: int) -> Tensor:
    """Return the rows of this share of what was drawn for the whole batch, so many times."""
    if times == 1:
        return wide[share.start : share.stop]
    return wide.unflatten(0, (times, share.total))[:, share.start : share.stop].flatten(0, 1)


def _blank(share: Share, like: Tensor, times: int) -> Tensor:
    """Return memory for the whole batch, so many times, laid out as ``like`` is."""
    last = like.ndim == 4 and not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    size = (times * share.total, *like.shape[1:])
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=layout)


def _widened(share: Share, value: Any) -> Any:
    """Return a size of the whole batch, or a tensor whose rows of this share are those of ``value``."""
    times = _times(share, value)
    if not times:
        return value
    if not isinstance(value, Tensor):
        return (times * share.total, *value[1:])
    # The rows of others are never looked at; copies of these are values that any function allows.
    places = (torch.arange(share.total, device=value.device) - share.start).clamp(0, share.rows - 1)
    return value.unflatten(0, (times, share.rows))[:, places].flatten(0, 1)


def _drawn(share: Share, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A function that gives random rows: called for the whole batch."""
    if args and isinstance(args[0], int) and func in (torch.rand, torch.randn):
        args = (tuple(args),)  # sizes one by one
    times = max((_times(share, value) for value in (*args, *kwargs.values())), default=0)
    if not times:
        return func(*args, **kwargs)
    if func in _LIKE:
        wide = [_blank(share, args[0], times), *args[1:]]
    else:
        wide = [_widened(share, value) for value in args]
    return _own(share, func(*wide, **{key: _widened(share, value) for key, value in kwargs.items()}), times)


def _picked(share: Share, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """``multinomial``: a row of probabilities for each row, or a pick for each row from the same probabilities."""
    chances, *others = args
    if chances.ndim > 1:
        return _drawn(share, func, args, kwargs)
    if others[:1] != [share.rows]:
        return func(*args, **kwargs)
    return func(chances, share.total, *others[1:], **kwargs)[share.start : share.stop]


def _filled(share: Share, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A method that fills a tensor with random rows."""
    target, *others = args
    times = _times(share, target)
    if not times:
        return func(*args, **kwargs)
    if func is Tensor.normal_ and times == 1 and "generator" not in kwargs:
        row = target.numel() // share.rows
        if fill_between(target, share.start * row, (share.total - share.stop) * row, *others, **kwargs):
            return target
    wide = _blank(share, target, times)
    func(wide, *(_widened(share, value) for value in others), **kwargs)
    target.copy_(_own(share, wide, times))
    return target


def _dropped(share: Share, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A dropout: a factor for each number, which is what it makes of ones."""
    values, *others = [kwargs.pop("input"), *args] if "input" in kwargs else args
    training = kwargs.get("training", others[1] if len(others) > 1 else True)
    inplace = kwargs.pop("inplace", others.pop(2) if len(others) > 2 else False)
    times = _times(share, values)
    if not training or not times:
        return func(values, *others, **kwargs)
    kept = _own(share, func(_blank(share, values, times).fill_(1), *others, **kwargs), times)
    return values.mul_(kept) if inplace else values * kept


# -- what a pass takes from all rows ----------------------------------------------------------------------------------


def _normed(share: Share, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """BatchNorm: by the statistics of the whole batch, unless each process is to have its own."""
    if share.own_statistics:
        return func(*args, **kwargs)
    return batch_norm(share, *args, **kwargs)


def _differentiated(share: Share, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A gradient of weights: of the mean loss of the whole batch. One of images is each row's own."""
    outputs, inputs = args[:2]
    wanted = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    given = args[2] if len(args) > 2 else kwargs.get("grad_outputs")
    if given is not None or not all(isinstance(one, nn.Parameter) for one in wanted):
        return func(*args, **kwargs)
    parts = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    found = func([part * share.weight for part in parts], wanted, *args[2:], **kwargs)
    return tuple(None if one is None else ranks.differentiable_sum(one, share.ranks) for one in found)


_LIKE = (torch.rand_like, torch.randn_like, torch.randint_like)
_DRAWN = (
    torch.rand, torch.randn, torch.randint, torch.normal, torch.bernoulli, torch.poisson,
    F.alpha_dropout, F.feature_alpha_dropout, F.rrelu, F.gumbel_softmax, *_LIKE,
)  # fmt: skip
_FILLED = (
    Tensor.normal_, Tensor.uniform_, Tensor.bernoulli_, Tensor.exponential_, Tensor.random_, Tensor.cauchy_,
    Tensor.geometric_, Tensor.log_normal_,
)  # fmt: skip
_DROPPED = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout, torch.feature_dropout)
_TREATMENTS: dict[Any, Treatment] = {
    **dict.fromkeys(_DRAWN, _drawn),
    **dict.fromkeys(_FILLED, _filled),
    **dict.fromkeys(_DROPPED, _dropped),
    torch.multinomial: _picked,
    F.batch_norm: _normed,
    torch.autograd.grad: _differentiated,
}
