"""Passes on images that differ from others in a window: each layer computes anew only what the window reaches.

A candidate of a few-pixel attack is an image with another pixel. After a 3 x 3 convolution 3 x 3 features differ from
those of the image, after the next 5 x 5, and so on; all others are known from one pass on the image itself, which many
candidates share. ``Windowed`` is a batch of such candidates that a network takes as any tensor: layers that are known
here (convolution, BatchNorm, activation, addition, shortcut) keep to the windows, every other function is given the
whole batch. The result is that of the whole batch up to rounding: a convolution adds the same products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from learn2perturb.engine import execution
from learn2perturb.engine.answers import scale_of

# Above this share of the feature map a window costs more than the whole: reading and index arithmetic are added.
_LARGEST_SHARE = 0.5
_ROUNDING = 1e-4  # of logits in float32, as a share of the largest
COMPARED = 8  # examples of which windows are compared with whole images before they are used
# Image points of one pass: on a CPU what stays near its cache (64 images of 32 x 32), on a card what fills it.
_POINTS = {"cpu": 2**16}
_POINTS_ELSEWHERE = 2**23
# Candidates of which only windows are computed are small, and each pass also takes the images they come from: so many
# times as many in one pass. ResNet-20, 32 x 32: 1.2 times as fast as whole images with 64 of them, 1.55 with 512.
_IN_WINDOWS = 8


@final
@dataclass(frozen=True, eq=False)
class _Parts:
    """Features of M examples, each those of one of B bases but for a window of h x w.

    Attributes:
        base: (B, C, H, W) features of the bases.
        owner: (M,) which base each example differs from.
        top, left: (M,) the first row and column of its window, which lies inside the map.
        values: (M, C, h, w) what the window holds.
    """

    base: Tensor
    owner: Tensor
    top: Tensor
    left: Tensor
    values: Tensor

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of the whole batch, (M, C, H, W)."""
        return (len(self.owner), self.base.shape[1], self.base.shape[2], self.base.shape[3])

    def each(self, function: Callable[[Tensor], Tensor]) -> _Parts:
        """Return the features after a function of single places."""
        return _Parts(function(self.base), self.owner, self.top, self.left, function(self.values))

    def read(self, top: Tensor, left: Tensor, size: Sequence[int], padding: Sequence[int] = (0, 0)) -> Tensor:
        """Return (M, C, *size): of each example what begins at row ``top``, column ``left`` (M,), zeros in the padding.

        What the windows reach beyond that is read along and cut off.
        """
        (above, below), (before, after) = (
            _beyond(own - first, inner, outer)
            for own, first, inner, outer in zip(
                (self.top, self.left), (top, left), self.values.shape[2:], size, strict=True
            )
        )
        vertical, horizontal = padding
        edges = (0, 0, horizontal + before, horizontal + after, vertical + above, vertical + below)
        bases = F.pad(_last(self.base), edges)
        padded = (size[0] + above + below, size[1] + before + after)
        found = _gather(bases, self.owner, top + vertical, left + horizontal, padded)
        _scatter(self.values, found, self.top - top + above, self.left - left + before)
        return found[:, above : above + size[0], before : before + size[1]].permute(0, 3, 1, 2)

    def widened(self, other: _Parts) -> _Parts | None:
        """Return the same features with the windows of ``other``, or None where these do not hold all that differs."""
        for first, second, dim in ((other.top, self.top, 2), (other.left, self.left, 3)):
            size, own = other.values.shape[dim], self.values.shape[dim]
            if not bool(((first <= second) & (second + own <= first + size)).all()):
                return None
        values = self.read(other.top, other.left, other.values.shape[2:])
        return _Parts(self.base, self.owner, other.top, other.left, values)

    def whole(self) -> Tensor:
        """Return the whole batch (M, C, H, W)."""
        batch = _last(self.base).index_select(0, self.owner)
        _scatter(self.values, batch, self.top, self.left)
        return batch.permute(0, 3, 1, 2)


@final
class Windowed(Tensor):
    """A batch (M, C, H, W) whose examples differ from ``base`` (B, C, H, W) in windows of one size.

    To a network it is a tensor of that shape. The first function that is not known here makes it a whole batch, for
    good, so that functions that work in place do so on what is read later.

    Args:
        base: (B, C, H, W).
        owner: (M,) which of these each example differs from.
        top, left: (M,) the first row and column of the windows, which lie inside the image.
        values: (M, C, h, w) what the windows hold.
    """

    _parts: _Parts | None
    _whole: Tensor | None

    @staticmethod
    def __new__(
        cls: type[Windowed], base: Tensor, owner: Tensor, top: Tensor, left: Tensor, values: Tensor
    ) -> Windowed:
        """Make the batch."""
        return cls._of(_Parts(base, owner, top, left, values))

    @classmethod
    def _of(cls, parts: _Parts) -> Windowed:
        made: Windowed = Tensor._make_wrapper_subclass(
            cls, parts.shape, dtype=parts.values.dtype, device=parts.values.device
        )
        made._parts, made._whole = parts, None
        return made

    def whole(self) -> Tensor:
        """Return the whole batch; from here on it is one."""
        if self._parts is not None:
            self._whole, self._parts = self._parts.whole(), None
        assert self._whole is not None
        return self._whole

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Keep to the windows where the function is known here; else call it on whole batches."""
        kwargs = dict(kwargs or {})
        if _needs_no_values(func) and args[0]._parts is not None:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        kept = cls._kept(func, args, kwargs)
        if kept is not None:
            return kept
        return func(*(_whole(one) for one in args), **{name: _whole(one) for name, one in kwargs.items()})

    @classmethod
    def _kept(cls, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Windowed | None:
        """Return what the function gives, in windows; None where it does not keep to them."""
        in_place = func in _IN_PLACE or bool(kwargs.get("inplace"))
        func = _IN_PLACE.get(func, func)
        treatment, first = _TREATMENTS.get(func), args[0] if args else None
        windowed = [one for one in args if isinstance(one, cls)]
        if treatment is None or "out" in kwargs or not windowed or any(one._parts is None for one in windowed):
            return None
        given = [one._parts if isinstance(one, cls) else one for one in args]
        parts = treatment(func, given, {name: value for name, value in kwargs.items() if name != "inplace"})
        if parts is None or not in_place:
            return None if parts is None else cls._of(parts)
        if not isinstance(first, cls) or parts.values.dtype != first.dtype:
            return None
        first._parts = parts
        return first

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch calls the class method that its stubs do not know
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Refuse what has gone past ``__torch_function__``: there are no values behind the shape."""
        raise NotImplementedError(f"{func} on a batch of windows")


def serve(model: object) -> bool:
    """Tell whether passes on windows may be tried: in this execution mode, and on a network that is not compiled."""
    return execution.current().windows and isinstance(model, nn.Module) and "_orig_mod" not in model._modules


def rows_at_once(x: Tensor, in_windows: bool = False) -> int:
    """Return how many examples of the size of ``x`` (N, C, H, W) fill a pass, whole or ``in_windows``."""
    points = _POINTS.get(x.device.type, _POINTS_ELSEWHERE)
    return max(1, points // x[0, 0].numel()) * (_IN_WINDOWS if in_windows else 1)


def agree(logits_of: Callable[[Tensor], Tensor], whole: Tensor, windowed: Windowed) -> bool:
    """Tell whether a model answers to a batch in windows as to the ``whole`` one, but for the rounding of float32."""
    expected = logits_of(whole)
    try:
        found = logits_of(windowed)
    except Exception:  # a function that takes tensors of its own kind alone; whole batches suit every model
        return False
    return torch.allclose(found, expected, rtol=0.0, atol=_ROUNDING * (1 + scale_of(expected)))


def _whole(value: Any) -> Any:
    """Return ``value`` with whole batches in place of windows, also inside tuples and lists."""
    if isinstance(value, Windowed):
        return value.whole()
    return type(value)(_whole(one) for one in value) if type(value) in (tuple, list) else value


def _needs_no_values(func: Any) -> bool:
    return func in _OF_ANY_TENSOR or any(getattr(func, "__self__", None) is known for known in _ATTRIBUTES)


def _last(features: Tensor) -> Tensor:
    """Return features (N, C, H, W) as (N, H, W, C), in that order in memory, from a multiple of 16 numbers on."""
    found = features.permute(0, 2, 3, 1).contiguous()
    return found.clone() if found.storage_offset() % 16 else found


def _beyond(start: Tensor, inner: int, outer: int) -> tuple[int, int]:
    """Return how far ``inner`` places from ``start`` (M,) on reach beyond ``outer`` places from 0 on, at either end."""
    lowest, highest = (int(one) for one in start.aminmax())
    return max(-lowest, 0), max(highest + inner - outer, 0)


def _gather(features: Tensor, example: Tensor, top: Tensor, left: Tensor, size: Sequence[int]) -> Tensor:
    """Return (M, *size, C): what each ``example`` (M,) of dense features has from its row and column (M,) on."""
    length = _run_length(size[1])
    found = _runs(features, length).index_select(0, _first_places(features, example, top, left, size))
    found = found if found.dtype == features.dtype else found.view(features.dtype)  # a view by type has no gradient
    return found.view(len(example), *size, -1)


def _scatter(values: Tensor, features: Tensor, top: Tensor, left: Tensor) -> None:
    """Write windows (M, C, h, w) into dense features (M, H, W, C), each from its row and column (M,) on."""
    size, example = values.shape[2:], torch.arange(len(features), device=top.device)
    length = _run_length(size[1])
    runs = _runs(_last(values), length)[::length]
    _runs(features, length).index_copy_(0, _first_places(features, example, top, left, size), runs)


def _run_length(width: int) -> int:
    """Return how many places in a row are copied at once: with a gradient one, since torch's of overlaps is wrong."""
    return 1 if torch.is_grad_enabled() else width


def _runs(features: Tensor, length: int) -> Tensor:
    """Return a view of dense features (N, H, W, C): each row is one of all runs of ``length`` places, which overlap.

    16 bytes are a number of it where that is possible: single places, or numbers, take thrice as long to copy.
    """
    flat, size = features.view(-1), features.shape[-1]
    units = 16 // features.element_size()
    if size % units == 0 and not torch.is_grad_enabled():
        flat, size = flat.view(torch.complex128), size // units
    if length == 1:
        return flat.view(-1, size)
    return flat.as_strided((len(flat) // size - length + 1, length * size), (size, 1))


def _first_places(features: Tensor, example: Tensor, top: Tensor, left: Tensor, size: Sequence[int]) -> Tensor:
    """Return where the runs of windows (M, *size) begin, as numbers of places in dense features (N, H, W, C)."""
    down = torch.arange(size[0], device=top.device)
    across = torch.arange(0, size[1], _run_length(size[1]), device=top.device)
    rows = (example * features.shape[1] + top)[:, None] + down
    return ((rows * features.shape[2] + left[:, None])[:, :, None] + across).flatten()


# -- functions that keep to the windows: of parts and other arguments to parts, None where they do not ----------------


def _pointwise(func: Callable[..., Tensor], args: list[Any], kwargs: dict[str, Any]) -> _Parts | None:
    """An activation: a function of single places, with settings that are no tensors."""
    parts, *others = args
    if not isinstance(parts, _Parts) or any(isinstance(one, Tensor) for one in (*others, *kwargs.values())):
        return None
    return parts.each(lambda features: func(features, *others, **kwargs))


def _converted(func: Callable[..., Tensor], args: list[Any], kwargs: dict[str, Any]) -> _Parts | None:
    """``x.to(dtype)``."""
    fits = len(args) == 2 and isinstance(args[1], torch.dtype) and not kwargs
    return _pointwise(func, args, kwargs) if fits else None


def _normalised(func: Callable[..., Tensor], args: list[Any], kwargs: dict[str, Any]) -> _Parts | None:
    """BatchNorm in eval mode."""
    parts, *others = args
    training = kwargs.get("training", args[5] if len(args) > 5 else False)
    if training or not isinstance(parts, _Parts):
        return None
    return parts.each(lambda features: func(features, *others, **kwargs))


def _combined(func: Callable[..., Tensor], args: list[Any], kwargs: dict[str, Any]) -> _Parts | None:
    """Arithmetic with a number for all places, or with the features of another layer."""
    one, other = args if len(args) == 2 else (None, None)
    if isinstance(one, _Parts) and isinstance(other, _Parts):
        return _of_two(func, one, other, kwargs)
    if isinstance(one, _Parts) and _is_same_everywhere(other):
        return one.each(lambda features: func(features, other, **kwargs))
    if isinstance(other, _Parts) and _is_same_everywhere(one):
        return other.each(lambda features: func(one, features, **kwargs))
    return None


def _of_two(func: Callable[..., Tensor], one: _Parts, other: _Parts, kwargs: dict[str, Any]) -> _Parts | None:
    if one.owner is not other.owner or one.shape != other.shape:
        return None
    if one.values[0].numel() < other.values[0].numel():
        widened = one.widened(other)
        pair = None if widened is None else (widened, other)
    elif one.values.shape == other.values.shape and one.top is other.top and one.left is other.left:
        pair = one, other
    else:
        widened = other.widened(one)
        pair = None if widened is None else (one, widened)
    if pair is None:
        return None
    first, second = pair
    base, values = func(first.base, second.base, **kwargs), func(first.values, second.values, **kwargs)
    return _Parts(base, first.owner, first.top, first.left, values)


def _is_same_everywhere(value: Any) -> bool:
    """Tell whether ``value`` is a number, or one for each channel, the same for all examples and places."""
    if not isinstance(value, Tensor):
        return isinstance(value, int | float)
    return value.ndim == 0 or (value.ndim in (3, 4) and value.numel() == value.shape[-3])


def _convolved(func: Callable[..., Tensor], args: list[Any], kwargs: dict[str, Any]) -> _Parts | None:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given: dict[str, Any] = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    given |= dict(zip(names, args, strict=False)) | kwargs
    parts, padding = given["input"], given["padding"]
    if not isinstance(parts, _Parts) or isinstance(padding, str):
        return None
    stride, padding, dilation = (_pair(given[name]) for name in ("stride", "padding", "dilation"))
    reach = [step * (size - 1) for step, size in zip(dilation, given["weight"].shape[2:], strict=True)]
    places = [
        _reached(first, parts.values.shape[dim], parts.base.shape[dim], *of_axis)
        for first, dim, of_axis in zip(
            (parts.top, parts.left), (2, 3), zip(stride, padding, reach, strict=True), strict=True
        )
    ]
    if _is_large(places):
        return None
    top, left = (place.first * step - pad for place, step, pad in zip(places, stride, padding, strict=True))
    needed = [(place.count - 1) * step + far + 1 for place, step, far in zip(places, stride, reach, strict=True)]
    rest = {name: given[name] for name in ("weight", "bias", "stride", "dilation", "groups")}
    values = func(parts.read(top, left, needed, padding), **rest)
    base = func(parts.base, padding=padding, **rest)
    return _Parts(base, parts.owner, places[0].first, places[1].first, values)


def _sliced(func: Callable[..., Tensor], args: list[Any], kwargs: dict[str, Any]) -> _Parts | None:
    """``x[:, :, ::2, ::2]``: every so many rows and columns."""
    parts, index = args
    if not (isinstance(index, tuple) and len(index) == 4 and all(isinstance(one, slice) for one in index)):
        return None
    steps = [one.step or 1 for one in index]
    if any(one.start is not None or one.stop is not None for one in index) or steps[:2] != [1, 1]:
        return None
    places = [
        _reached(first, parts.values.shape[dim], parts.base.shape[dim], steps[dim], 0, 0)
        for first, dim in ((parts.top, 2), (parts.left, 3))
    ]
    if _is_large(places):
        return None
    top, left = (place.first * step for place, step in zip(places, steps[2:], strict=True))
    needed = [(place.count - 1) * step + 1 for place, step in zip(places, steps[2:], strict=True)]
    values = parts.read(top, left, needed)[index]
    return _Parts(parts.base[index], parts.owner, places[0].first, places[1].first, values)


def _padded(func: Callable[..., Tensor], args: list[Any], kwargs: dict[str, Any]) -> _Parts | None:
    """Channels of a number added before or after."""
    parts, sizes, *others = args
    if len(sizes) != 6 or any(sizes[:4]):
        return None
    return parts.each(lambda features: func(features, sizes, *others, **kwargs))


@final
@dataclass(frozen=True, eq=False)
class _Place:
    """Along one axis: the first place of each window, (M,), how many places it has, and how many the map has."""

    first: Tensor
    count: int
    size: int


def _reached(first: Tensor, count: int, size: int, stride: int, padding: int, reach: int) -> _Place:
    """Return where a window of ``count`` places from ``first`` on reaches, by a kernel that spans ``reach + 1``.

    Output o reads the inputs from ``o stride - padding`` on. Windows that would stick out are moved inside: they then
    hold features that do not differ, which does no harm.
    """
    outputs = (size + 2 * padding - reach - 1) // stride + 1
    wide = min((count - 1 + reach) // stride + 1, outputs)
    start = -torch.div(-(first + padding - reach), stride, rounding_mode="floor")
    return _Place(start.clamp(0, outputs - wide), wide, outputs)


def _is_large(places: Sequence[_Place]) -> bool:
    rows, columns = places
    return rows.count * columns.count > _LARGEST_SHARE * rows.size * columns.size


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else [value[0], value[-1]]


Treatment = Callable[[Callable[..., Any], list[Any], dict[str, Any]], _Parts | None]
_ACTIVATIONS = (
    F.relu, torch.relu, F.relu6, F.gelu, F.silu, F.leaky_relu, F.elu, F.softplus, F.hardswish, F.hardtanh,
    torch.sigmoid, Tensor.sigmoid, torch.tanh, Tensor.tanh, torch.clamp, Tensor.clamp, Tensor.relu, Tensor.float,
    Tensor.contiguous, Tensor.clone,
)  # fmt: skip
_ARITHMETIC = (
    torch.add, torch.sub, torch.mul, torch.div, Tensor.add, Tensor.sub, Tensor.mul, Tensor.div, Tensor.__add__,
    Tensor.__radd__, Tensor.__sub__, Tensor.__mul__, Tensor.__rmul__, Tensor.__truediv__,
)  # fmt: skip
_TREATMENTS: dict[Any, Treatment] = {
    **dict.fromkeys(_ACTIVATIONS, _pointwise),
    **dict.fromkeys(_ARITHMETIC, _combined),
    Tensor.to: _converted,
    F.batch_norm: _normalised,
    F.conv2d: _convolved,
    Tensor.__getitem__: _sliced,
    F.pad: _padded,
}
_IN_PLACE: dict[Any, Any] = {
    Tensor.__iadd__: Tensor.add, Tensor.add_: Tensor.add, Tensor.__isub__: Tensor.sub, Tensor.sub_: Tensor.sub,
    Tensor.__imul__: Tensor.mul, Tensor.mul_: Tensor.mul, Tensor.__itruediv__: Tensor.div, Tensor.div_: Tensor.div,
    Tensor.relu_: Tensor.relu, torch.relu_: Tensor.relu,
}  # fmt: skip
# What is known of a tensor without its values. Windows count as laid out channels first.
_ATTRIBUTES = (Tensor.shape, Tensor.dtype, Tensor.device, Tensor.ndim, Tensor.requires_grad, Tensor.is_leaf)
_OF_ANY_TENSOR = (Tensor.dim, Tensor.size, Tensor.numel, Tensor.is_floating_point, Tensor.is_contiguous, Tensor.__len__)
