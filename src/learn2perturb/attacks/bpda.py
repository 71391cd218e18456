"""BPDA: a network's own values, with the gradient of chosen submodules replaced by that of the identity or another."""

from __future__ import annotations

import contextlib
import fnmatch
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from learn2perturb.attacks.base import Attack
from learn2perturb.attacks.query import Query
from learn2perturb.engine import folding
from learn2perturb.errors import ConfigError, InputError

Backward = Callable[[Tensor], Tensor]
_NAMED = 8  # submodules in a refusal


@contextlib.contextmanager
def bpda(
    model: nn.Module, modules: str | Iterable[str | nn.Module], surrogate: Backward | None = None
) -> Iterator[nn.Module]:
    """Let gradients pass chosen submodules of ``model`` by way of ``surrogate`` for the body; values do not change.

    Forward ``m(x)``, backward that of ``s(x)``, where ``s(x)`` is near ``m(x)``: for rounding, JPEG and most input
    transforms the identity. Athalye, Carlini, Wagner, Obfuscated gradients give a false sense of security, 2018,
    section 4.1, https://arxiv.org/abs/1802.00420. Afterwards, also on failure, the model is as it was before.

    Args:
        model: the network.
        modules: globs of names of submodules, separated by commas (``"quantise"``, ``"pre.*"``), or a list of globs and
            submodules. Of nested ones the outermost counts.
        surrogate: of what the submodule gets, in the shape of its answer; None is the identity.

    Raises:
        ConfigError: the model is no module, or has no such submodule.
        InputError: (in a pass) the submodule or the surrogate does not map a tensor to one of the same shape.
    """
    if surrogate is not None and not callable(surrogate):
        raise ConfigError(f"surrogate is a {type(surrogate).__name__}, must be callable; None is the identity")
    handles = []
    found = submodules_of(model, modules)
    for name, module in found.items():
        kept: list[Tensor] = []
        handles.append(module.register_forward_pre_hook(_keeping(kept, name)))
        handles.append(module.register_forward_hook(_replacing(kept, name, surrogate)))
    try:
        with folding.unfolded(model, found.values()):
            yield model
    finally:
        for handle in handles:
            handle.remove()


@final
@dataclass(frozen=True)
class BPDA(Attack):
    """Run ``attack`` on the attacked network with the gradient of chosen submodules replaced, as :func:`bpda` does.

    Attributes:
        eps: replaces that of ``attack``; NaN, the default, leaves it, and so do the defaults of ``eot`` and
            ``eot_average``. Norm, loss and aim are those of ``attack``.
        attack: how images are crafted, by gradients.
        modules: globs of names of submodules, separated by commas.
        surrogate: see :func:`bpda`; None is the identity.
    """

    eps: float = math.nan
    eot: int = field(default=0, kw_only=True)
    eot_average: Any = field(default="", kw_only=True)
    attack: Attack | None = field(default=None, kw_only=True)
    modules: str = field(default="", kw_only=True)
    surrogate: Any = field(default=None, kw_only=True)

    minimum_norm: ClassVar[bool] = True  # where that of ``attack`` is

    def __post_init__(self) -> None:
        if not isinstance(self.attack, Attack) or not self.attack.needs_gradient or isinstance(self.attack, BPDA):
            raise ConfigError(f"attack must be one by gradients such as PGD(eps=8/255), got {self.attack!r}")
        if not isinstance(self.modules, str) or not self.modules.strip():
            raise ConfigError(f"modules must be globs of names of submodules such as 'quantise', got {self.modules!r}")
        taken = {name: getattr(self.attack, name) for name in ("norm", "loss", "targeted")}
        if isinstance(self.eps, float) and math.isnan(self.eps):
            taken["eps"] = self.attack.eps
        for name in ("eot", "eot_average"):
            if not getattr(self, name):
                taken[name] = getattr(self.attack, name)
        for name, value in taken.items():
            object.__setattr__(self, name, value)  # the spec is frozen once it is made
        super().__post_init__()

    @property
    def drops(self) -> bool:
        """Whether images leave the attack that is made."""
        return self.attack is not None and self.attack.drops

    @property
    def full_precision(self) -> bool:
        """Whether passes are in full precision: those of the attack that is made are, where it asks for that."""
        return False

    def perturb(self, query: Query, x: Tensor, y: Tensor) -> Tensor:
        """Return what the attack finds; it costs what the attack costs."""
        assert self.attack is not None
        if not isinstance(query.model, nn.Module):
            raise InputError(
                f"BPDA replaces the gradient of submodules, and the model is a {type(query.model).__name__}, which has "
                "none; give the network itself"
            )
        own = replace(self.attack.resized(self.eps), eot=self.eot, eot_average=self.eot_average)
        with bpda(query.model, self.modules, self.surrogate), query.part(own) as part:
            return own.search(part, x, y)


def submodules_of(model: Any, modules: str | Iterable[str | nn.Module]) -> dict[str, nn.Module]:
    """Return name -> submodule, the outermost of those asked for.

    Raises:
        ConfigError: nothing is of that name.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is a {type(model).__name__}, must be a module: bpda() works on its submodules")
    known = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    found: dict[str, nn.Module] = {}
    for wanted in modules.split(",") if isinstance(modules, str) else modules:
        if isinstance(wanted, nn.Module):
            hits = {name: module for name, module in known.items() if module is wanted}
        elif isinstance(wanted, str):
            hits = {name: module for name, module in known.items() if fnmatch.fnmatchcase(name, wanted.strip())}
        else:
            raise ConfigError(f"modules has a {type(wanted).__name__}; give globs of names, or submodules")
        if not hits:
            names = ", ".join([*list(known)[:_NAMED], *(["..."] if len(known) > _NAMED else [])]) or "none"
            what = repr(wanted) if isinstance(wanted, str) else type(wanted).__name__
            raise ConfigError(f"the model has no submodule {what}; it has: {names}")
        found |= hits
    if not found:
        raise ConfigError("modules is empty; give globs of names, or submodules")
    outermost = {module: name for name, module in found.items() if not any(name.startswith(f"{o}.") for o in found)}
    return {name: module for module, name in outermost.items()}  # one that is used under two names once


def _keeping(kept: list[Tensor], name: str) -> Callable[..., Any]:
    """Return a hook that keeps what the submodule gets, and gives it a copy: it may work in place, without a graph."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not args or not isinstance(args[0], Tensor):
            raise InputError(f"submodule {name!r} gets no tensor as its first argument, which its gradient could be of")
        kept[:] = [args[0]]
        return (args[0].detach().clone(), *args[1:])

    return hook


def _replacing(kept: list[Tensor], name: str, surrogate: Backward | None) -> Callable[..., Any]:
    """Return a hook that gives the submodule's answer with the gradient of the surrogate's."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
        stand_in = kept.pop() if surrogate is None else surrogate(kept.pop())
        shapes = [tuple(value.shape) if isinstance(value, Tensor) else type(value) for value in (stand_in, output)]
        if shapes[0] != shapes[1] or not isinstance(output, Tensor):
            what = "the identity" if surrogate is None else "the surrogate"
            raise InputError(
                f"submodule {name!r} answers with {shapes[1]} where {what} gives {shapes[0]}; give bpda() a surrogate "
                "that answers in its shape, or choose another submodule"
            )
        answer: Tensor = _Replaced.apply(stand_in, output)
        return answer

    return hook


@final
class _Replaced(torch.autograd.Function):
    """The values of one tensor with the gradient of another."""

    @staticmethod
    def forward(ctx: Any, stand_in: Tensor, output: Tensor) -> Tensor:
        ctx.dtype = stand_in.dtype
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        return outer[0].to(ctx.dtype), None
