"""BatchNorm folded into the convolution before it, for passes in eval mode: there it is affine, so one layer does.

Pairs are found by tracing one pass, so any network is served whose structure allows it; what does not fit stays as it
is. Nothing is copied or replaced: for the length of a context the two layers answer with other forward functions, and
hooks, noise among them, run as always.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from learn2perturb.engine.random import isolated_rng
from learn2perturb.engine.tracing import tensors_in
from learn2perturb.engine.weights import maker

Pair = tuple[nn.Conv2d, nn.BatchNorm2d]
Hook = TypeVar("Hook", bound=Callable[..., object])
# The modules of a network, and the numbers of the hooks of each, which are not given twice.
_Structure = list[tuple[weakref.ref[nn.Module], tuple[int, ...]]]

# What was traced, with what it was traced of: of a network with another layer or hook nothing is known.
_plans: weakref.WeakKeyDictionary[nn.Module, tuple[_Structure, list[Pair]]] = weakref.WeakKeyDictionary()
# What folded convolutions answer with: made once and filled anew in every context, because compiled code knows them by
# identity and would be compiled again for new ones.
_forwards: weakref.WeakKeyDictionary[nn.Conv2d, functools.partial[Tensor]] = weakref.WeakKeyDictionary()


@final
class _Uses(TorchFunctionMode):
    """Counts how often each tensor goes into a computation: a torch function that gives anything but a plain value."""

    def __init__(self) -> None:
        super().__init__()
        self.count: dict[int, int] = {}
        self.alive: list[Tensor] = []  # ids are only unique among living objects

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, (bool, int, float, torch.Size, torch.dtype, torch.device)):
            return result  # x.dim() or x.shape computes nothing from the values
        for value in tensors_in([*args, *(kwargs or {}).values()]):
            self.count[id(value)] = self.count.get(id(value), 0) + 1
            self.alive.append(value)
        return result


def _trace(network: nn.Module, x: Tensor) -> list[Pair]:
    """Find convolutions, called once, whose output goes to one BatchNorm, called once, and nowhere else."""
    uses = _Uses()
    made: dict[int, nn.Conv2d] = {}
    taken: list[tuple[Tensor, nn.BatchNorm2d]] = []
    calls: dict[nn.Module, int] = {}

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls[module] = calls.get(module, 0) + 1
        if isinstance(module, nn.Conv2d):
            made[id(output)] = module
            uses.alive.append(output)
        elif isinstance(module, nn.BatchNorm2d) and args:
            taken.append((args[0], module))

    layers = [module for module in network.modules() if isinstance(module, (nn.Conv2d, nn.BatchNorm2d))]
    handles = [module.register_forward_hook(after) for module in layers]
    try:
        with isolated_rng(torch_only=True), torch.no_grad(), uses:
            network(x)
    finally:
        for handle in handles:
            handle.remove()
    return [
        (made[id(tensor)], norm)
        for tensor, norm in taken
        if id(tensor) in made and uses.count.get(id(tensor)) == 1 and calls[norm] == 1 and calls[made[id(tensor)]] == 1
    ]


def input_only(hook: Hook) -> Hook:
    """Declare of a forward pre-hook that it changes inputs only: the weights of its module are what they are."""
    hook.input_only = True  # type: ignore[attr-defined]
    return hook


def reads_input(hook: Hook) -> Hook:
    """Declare of a forward hook that it looks at what goes into its module: of a folded norm that is not it."""
    hook.reads_input = True  # type: ignore[attr-defined]
    return hook


def _computes(network: nn.Module) -> bool:
    """Tell whether a pass may compute weights first (old weight_norm, prune): a pre-hook that says nothing may."""
    hooks = (hook for module in network.modules() for hook in module._forward_pre_hooks.values())
    return not all(getattr(hook, "input_only", False) for hook in hooks)


def _can_fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> bool:
    """Tell whether the two do what their classes say, with nothing between them: no hook, frozen statistics."""
    return not (
        norm.training
        # A subclass may do more: standardise its weight, pad, or apply an activation after the norm.
        or type(conv).forward is not nn.Conv2d.forward
        or type(conv)._conv_forward is not nn.Conv2d._conv_forward
        or type(norm).forward is not nn.BatchNorm2d.forward
        or norm.running_mean is None
        or conv.padding_mode != "zeros"
        or conv._forward_hooks
        or norm._forward_pre_hooks
        or any(getattr(hook, "reads_input", False) for hook in norm._forward_hooks.values())
        or "forward" in conv.__dict__
        or "forward" in norm.__dict__
    )


@torch.no_grad()
def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the one convolution that does what the two layers do."""
    assert norm.running_mean is not None and norm.running_var is not None
    # Once each: where a weight is noisy, every look at it is another draw.
    gain, offset, own = norm.weight, norm.bias, conv.bias
    scale = torch.rsqrt(norm.running_var + norm.eps)
    scale = scale if gain is None else scale * gain
    shift = -norm.running_mean if own is None else own - norm.running_mean
    bias = shift * scale if offset is None else torch.addcmul(offset, shift, scale)
    return conv.weight * scale.view(-1, 1, 1, 1), bias


def _constant_forward(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> functools.partial[Tensor]:
    """Return the folded forward of ``conv``: the object of the last time, filled anew, where it fits."""
    weight, bias = _fold(conv, norm)
    kept = _forwards.get(conv)
    new = {"weight": weight, "bias": bias}
    # It holds no reference to the layer, which would keep it alive.
    shape = {name: getattr(conv, name) for name in ("stride", "padding", "dilation", "groups")}
    if (
        kept is not None
        and all(_alike(kept.keywords[name], tensor) for name, tensor in new.items())
        and all(kept.keywords[name] == value for name, value in shape.items())
    ):
        for name, tensor in new.items():
            kept.keywords[name].copy_(tensor)
        return kept
    _forwards[conv] = functools.partial(F.conv2d, **new, **shape)
    return _forwards[conv]


def _noisy_forward(conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Fold at every pass: the weights of the two layers are drawn, or computed, anew for each."""
    return conv._conv_forward(x, *_fold(conv, norm))


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)


def _identity(x: Tensor) -> Tensor:
    return x


def is_folded(layer: nn.Module) -> bool:
    """Tell whether ``layer`` answers with a forward function of :func:`folded` whose weights are constants."""
    forward = layer.__dict__.get("forward")
    kept = _forwards.get(layer) if isinstance(layer, nn.Conv2d) else _identity
    return forward is not None and forward is kept


def pairs(network: nn.Module, x: Tensor) -> list[Pair]:
    """Return the pairs of ``network`` that can be folded, traced once with images like ``x`` and remembered.

    ``network`` must be in eval mode. A network that cannot be traced has none.
    """
    structure = _structure(network)
    traced, found = _plans.get(network, ([], []))
    if structure != traced:
        try:
            found = _trace(network, x[:1])
        except Exception:
            return []
        _plans[network] = (structure, found)
    return found


def _structure(network: nn.Module) -> _Structure:
    return [(weakref.ref(module), (*module._forward_pre_hooks, *module._forward_hooks)) for module in network.modules()]


@contextlib.contextmanager
def unfolded(network: nn.Module, modules: Iterable[nn.Module]) -> Iterator[None]:
    """Run the body, inside that of :func:`folded`, with nothing folded where a layer in ``modules`` is.

    For hooks that come late and look between the two layers.
    """
    inside = {layer for module in modules for layer in module.modules()}
    held = {layer: layer.__dict__["forward"] for layer in network.modules() if _answers_folded(layer)}
    held = held if inside & held.keys() else {}
    try:
        for layer in held:
            del layer.forward
        yield
    finally:
        for layer, forward in held.items():
            layer.forward = forward


def _answers_folded(layer: nn.Module) -> bool:
    return is_folded(layer) or getattr(layer.__dict__.get("forward"), "func", None) is _noisy_forward


@contextlib.contextmanager
def folded(network: nn.Module, x: Tensor) -> Iterator[int]:
    """Run the passes of the body with BatchNorm folded where possible; yields how many pairs are.

    The weights of the fold are constants: gradients reach the images, not the convolution and norm. Weights that are
    parametrised, as noisy ones are, or that a pre-hook may compute, are folded anew in every pass.
    """
    if "_orig_mod" in network._modules:  # of torch.compile; naming its class would import the compiler: seconds
        yield 0
        return
    done: list[nn.Module] = []
    computed = _computes(network)
    try:
        for conv, norm in pairs(network, x):
            if not _can_fold(conv, norm):
                continue
            made = any(parametrize.is_parametrized(layer) or maker(layer, "weight") for layer in (conv, norm))
            forward = (
                functools.partial(_noisy_forward, conv, norm) if computed or made else _constant_forward(conv, norm)
            )
            conv.forward = forward  # type: ignore[method-assign]
            norm.forward = _identity  # type: ignore[method-assign, assignment]
            done += [conv, norm]
        yield len(done) // 2
    finally:
        for module in done:
            del module.forward
