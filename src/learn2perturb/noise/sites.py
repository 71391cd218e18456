"""Which submodules can be perturbed, which were asked for, and a good guess when none was.

One probe pass with random images records what every submodule takes and gives, how often it is called, and where
residual branches end.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from learn2perturb.engine.modes import in_mode
from learn2perturb.engine.random import isolated_rng
from learn2perturb.engine.tracing import tensors_in
from learn2perturb.errors import InputError, SiteError
from learn2perturb.noise.base import NoiseModule

Predicate = Callable[[str, nn.Module], bool]
Sites = str | Iterable[str] | Predicate

NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
)
CONVOLUTIONS = (nn.modules.conv._ConvNd,)
SELECTORS: dict[str, Predicate] = {
    "@convolutions": lambda name, module: isinstance(module, CONVOLUTIONS),
    "@norms": lambda name, module: isinstance(module, NORMS),
    "@linears": lambda name, module: isinstance(module, nn.Linear),
}
_ADDITIONS = (
    torch.add, torch.Tensor.add, torch.Tensor.add_, torch.Tensor.__add__, torch.Tensor.__radd__, torch.Tensor.__iadd__,
)  # fmt: skip


@final
@dataclass
class Call:
    """What one submodule was seen to do in the probe pass."""

    module: nn.Module
    times: int = 0
    input: Any = None
    output: Any = None


@final
@dataclass
class Probe:
    """What the probe pass saw: every call, in order, and what made the two sides of every residual addition."""

    calls: dict[str, Call] = field(default_factory=dict)
    branch_ends: list[str] = field(default_factory=list)
    shortcuts: list[str] = field(default_factory=list)


@final
class _Flow(TorchFunctionMode):
    """Follows tensors through one forward pass: which submodule made each, and after how many layers."""

    def __init__(self, probe: Probe) -> None:
        super().__init__()
        self.probe = probe
        self.depth: dict[int, int] = {}
        self.maker: dict[int, str] = {}
        self.giver: dict[int, str] = {}
        self.alive: list[Tensor] = []  # ids are only unique among living objects

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = tensors_in([*args, *(kwargs or {}).values()])
        if func in _ADDITIONS and len(operands) == 2 and operands[0].shape == operands[1].shape:
            self._addition(operands)
        depth = max((self.depth.get(id(value), 0) for value in operands), default=0)
        result = func(*args, **(kwargs or {}))
        for made in tensors_in([result]):
            self._note(made, depth)
        return result

    def _note(self, tensor: Tensor, depth: int) -> None:
        self.depth[id(tensor)] = max(depth, self.depth.get(id(tensor), 0))
        self.alive.append(tensor)

    def layer(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Record that a submodule made ``output``; a layer with weights makes it one deeper than what went in."""
        if not isinstance(output, Tensor):
            return
        self.giver.setdefault(id(output), name)  # innermost first: hooks of children run before their parent's
        if not isinstance(module, (*NORMS, *CONVOLUTIONS, nn.Linear)):
            return
        depth = max((self.depth.get(id(value), 0) for value in tensors_in(args)), default=0)
        self._note(output, depth + 1)
        self.maker.setdefault(id(output), name)

    def _addition(self, operands: list[Tensor]) -> None:
        """A sum of two activations: the deeper operand is the main branch, and what made it ends it.

        That is a layer, or the module that gave it: a LayerScale, an attention's dropout, a squeeze-and-excite.
        """
        if not all(id(value) in self.depth for value in operands):
            return
        made = [value for value in operands if id(value) in self.maker]
        depths = [self.depth[id(value)] for value in operands]
        if not made and depths[0] == depths[1]:
            return
        main = operands[depths.index(max(depths))]
        name = self.maker.get(id(main)) or self.giver.get(id(main))
        if name is not None and name not in self.probe.branch_ends:
            self.probe.branch_ends.append(name)
        self.probe.shortcuts += [self.maker[id(value)] for value in made if value is not main]


def submodules(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the named submodules that noise could go to: all but the root, noise, and what holds parametrisations."""
    for name, module in network.named_modules():
        if name and not isinstance(module, NoiseModule) and "parametrizations" not in name.split("."):
            yield name, module


def probe(network: nn.Module, input_shape: tuple[int, ...]) -> Probe:
    """Run one pass of two random images in eval mode and record it; modes, statistics and RNG are left as found.

    Raises:
        InputError: the network does not take images of ``input_shape``.
    """
    shape = tuple(input_shape) if isinstance(input_shape, Iterable) else ()
    if not shape or not all(isinstance(size, int) and size > 0 for size in shape):
        raise InputError(f"input_shape is {input_shape!r}; give the shape of one image, e.g. (3, 32, 32)")
    seen = Probe()
    flow = _Flow(seen)
    handles = []
    for name, module in submodules(network):

        def record(mod: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any, name: str = name) -> None:
            call = seen.calls.setdefault(name, Call(mod))
            call.times += 1
            call.input, call.output = (args[0] if args else None), output
            flow.layer(name, mod, (*args, *named.values()), output)

        handles.append(module.register_forward_hook(record, with_kwargs=True))
    parameter = next(network.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    dtype = parameter.dtype if parameter is not None else torch.float32
    try:
        with isolated_rng(torch_only=True), in_mode(network, False), torch.no_grad(), flow:
            network(torch.rand(2, *shape, device=device, dtype=dtype))
    except Exception as error:  # a stranger's network may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"the network failed on images of input_shape {shape}: {reason}; "
            "give the shape of one image it was made for"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return seen


def convolutions(seen: Probe) -> list[str]:
    """Return the names of the convolutions that were called, in the order of their calls."""
    return [name for name, call in seen.calls.items() if isinstance(call.module, CONVOLUTIONS)]


def matches(name: str, pattern: str) -> bool:
    """Tell whether a dotted ``name`` matches a glob: ``*`` stays within one part, ``**`` stands for any parts."""
    return _match(name.split("."), pattern.split("."))


def _match(parts: list[str], globs: list[str]) -> bool:
    if not globs:
        return not parts
    if globs[0] == "**":
        return any(_match(parts[i:], globs[1:]) for i in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], globs[0]) and _match(parts[1:], globs[1:])


def select(network: nn.Module, seen: Probe | list[str], sites: Sites) -> list[str]:
    """Return the names that ``sites`` asks for: a glob, a selector such as ``@convolutions``, names, or a predicate.

    ``seen`` is what the probe saw, or names; candidates for the message when nothing is found.

    Raises:
        SiteError: a name or a glob matches nothing; near names are listed.
    """
    names = dict(submodules(network))
    if callable(sites):
        chosen = [name for name, module in names.items() if sites(name, module)]
        if not chosen:
            raise SiteError(f"the predicate chose none of {len(names)} submodules; candidates: {_candidates(seen)}")
        return chosen
    patterns = [sites] if isinstance(sites, str) else list(sites) if isinstance(sites, Iterable) else []
    if not patterns or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise SiteError(f"sites is {sites!r}; give a glob, a list of names, or a predicate (name, module) -> bool")
    chosen = []
    for pattern in patterns:
        if pattern in SELECTORS:
            found = [name for name, module in names.items() if SELECTORS[pattern](name, module)]
        else:
            found = [name for name in names if matches(name, pattern)]
        if not found:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.5)
            hint = f"near: {', '.join(near)}; " if near else ""
            raise SiteError(f"site {pattern!r} matches no submodule; {hint}candidates: {_candidates(seen)}")
        chosen += [name for name in found if name not in chosen]
    return chosen


def guess(seen: Probe) -> list[str]:
    """Return the first norm (or convolution) and the end of every residual branch; without branches, every norm,
    else every convolution, else every linear layer but the last.

    In a post-activation network a branch ends in a norm, so this is Learn2Perturb's own placement (appendix A.1); in
    pre-activation networks and transformers it ends in a convolution or a linear layer.

    Raises:
        SiteError: the network has no such layer.
    """
    kinds = {"norm": NORMS, "convolution": CONVOLUTIONS, "linear": (nn.Linear,)}
    called = {
        kind: [name for name, call in seen.calls.items() if call.times == 1 and isinstance(call.module, types)]
        for kind, types in kinds.items()
    }
    ends = [name for name in seen.branch_ends if seen.calls[name].times == 1]
    if ends:
        order = list(seen.calls)
        before = [
            name
            for kind in ("norm", "convolution")
            for name in called[kind]
            if order.index(name) < min(order.index(end) for end in ends)
        ]
        stem = _stem(seen, before)
        return ([stem] if stem and stem not in ends else []) + ends
    for kind in ("norm", "convolution"):
        if called[kind]:
            return called[kind]
    if len(called["linear"]) > 1:
        return called["linear"][:-1]
    raise SiteError("no norm, convolution or linear layer to perturb was found; name the sites: sites='encoder.*'")


def _stem(seen: Probe, before: list[str]) -> str | None:
    """The end of the stem: a norm that directly follows the first convolution, else that convolution."""
    order = list(seen.calls)
    first = next((name for name in order if name in before and isinstance(seen.calls[name].module, CONVOLUTIONS)), None)
    if first is None or first in seen.shortcuts:
        return first  # a norm after it would be inside the first branch, and its noise would miss the shortcut
    for name in before:
        call = seen.calls[name]
        if isinstance(call.module, NORMS) and call.input is seen.calls[first].output:
            return name
    return first


def check(name: str, seen: Probe, place: str) -> tuple[tuple[int, ...], int]:
    """Return the feature shape at a site, without the batch, and the index of its channel dimension.

    Raises:
        SiteError: the site was not called, or more than once, or does not take (give) a tensor of features.
    """
    call = seen.calls.get(name)
    if call is None:
        raise SiteError(
            f"site {name!r} was not called in a forward pass, so noise there would do nothing; "
            f"candidates: {_candidates(seen)}"
        )
    if call.times > 1:
        raise SiteError(
            f"site {name!r} is called {call.times} times in one forward pass, so one noise map cannot serve it; "
            f"perturb a module that is called once; candidates: {_candidates(seen)}"
        )
    value = call.output if place == "output" else call.input
    if not isinstance(value, Tensor):
        raise SiteError(
            f"the {place} of site {name!r} ({type(call.module).__name__}) is a {type(value).__name__}, not a tensor; "
            f"perturb a submodule that gives one tensor; candidates: {_candidates(seen)}"
        )
    if value.dim() < 2 or not value.is_floating_point():
        raise SiteError(
            f"the {place} of site {name!r} has shape {tuple(value.shape)} and type {value.dtype}; "
            "noise needs floating-point features with a batch dimension"
        )
    shape = tuple(value.shape[1:])
    return shape, len(shape) - 1 if _channels_are_last(call.module, shape) else 0


def _channels_are_last(module: nn.Module, shape: tuple[int, ...]) -> bool:
    """Tell whether features have their channels last: tokens (N, L, D) have, images (N, C, H, W) have them first."""
    if isinstance(module, nn.Linear):
        return True
    if isinstance(module, nn.LayerNorm):
        # Over (C, H, W), or in the ``LayerNorm2d`` that torchvision and timm derive from it, it serves images.
        width = module.normalized_shape
        return len(width) == 1 and shape[-1] == width[0] and (type(module) is nn.LayerNorm or shape[0] != width[0])
    return len(shape) == 2 and not isinstance(module, (*NORMS, *CONVOLUTIONS))


def _candidates(seen: Probe | list[str], most: int = 12) -> str:
    """Name submodules that can be perturbed, norms first."""
    if isinstance(seen, Probe):
        calls = seen.calls
        good = [name for name, call in calls.items() if call.times == 1 and isinstance(call.output, Tensor)]
        good.sort(key=lambda name: not isinstance(calls[name].module, NORMS))
    else:
        good = seen
    more = f" and {len(good) - most} more" if len(good) > most else ""
    return (", ".join(good[:most]) or "none") + more
