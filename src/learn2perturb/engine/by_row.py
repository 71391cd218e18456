"""Whether a network answers each row of a batch by itself, with draws of its own: then copies of images are draws.

A pass over few images leaves a processor waiting. Where every row of a batch has draws of its own, one pass over k
copies of the images is k draws of each. It is not where rows share a draw (noise on weights, one map for a batch, a
norm or a member that is picked for all), and then k copies would be one draw, counted k times. So only what is known is
trusted: layers and networks that are declared here to work on each row alone, noise that says so of itself. A class
that is not declared, a subclass of one that is, a hook or a forward function that somebody put in: one pass a draw.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from learn2perturb.engine import execution, folding, ranks

Hook = TypeVar("Hook", bound=Callable[..., object])
Kind = TypeVar("Kind", bound=type[nn.Module])


class _Drawing(Protocol):
    @property
    def draws_by_row(self) -> bool: ...


# Classes that compute each row from that row alone, and draw nothing; what an instance must be for it.
_EXACT: dict[type[nn.Module], Callable[[Any], bool]] = {
    **dict.fromkeys((nn.Sequential, nn.Identity, nn.Conv2d, nn.Linear, nn.ReLU), lambda layer: True),
    nn.BatchNorm2d: lambda norm: norm.running_mean is not None,  # in eval mode, as all must be
}
_DRAWING: set[type[nn.Module]] = set()


def exact_by_row(kind: Kind) -> Kind:
    """Declare of a class (not of its subclasses) that its own code takes each row alone and draws nothing."""
    _EXACT[kind] = lambda module: True
    return kind


def draws_by_row(kind: Kind) -> Kind:
    """Declare of a class of noise (not of its subclasses) that its property ``draws_by_row`` can be trusted."""
    _DRAWING.add(kind)
    return kind


def hook_by_row(hook: Hook) -> Hook:
    """Declare of a forward hook that it does nothing but call noise, which answers for itself."""
    hook.by_row = True  # type: ignore[attr-defined]
    return hook


def copies_are_draws(model: object) -> bool:
    """Tell whether the answers of ``model`` to copies of an image in one batch are independent draws, as of passes.

    False where that is not known, and where nothing is drawn.
    """
    if not isinstance(model, nn.Module) or torch_module._has_any_global_hook():
        return False
    modules = list(model.modules())
    return all(map(_is_known, modules)) and any(type(module) in _DRAWING for module in modules)


def draws_at_once(model: object, x: Tensor) -> int:
    """Return how many draws of images ``x`` (N, C, H, W) to make in one pass, so that it is full and no more than that.

    1 where the execution mode makes one pass a draw, where copies are no draws (see :func:`copies_are_draws`), and for
    the share of a batch that a process has, whose rows are numbered.
    """
    if not execution.current().full_passes or type(x) is not Tensor or ranks.current_share() is not None:
        return 1
    # More would be faster still, and take more memory than an attack on a batch of that size does.
    times = execution.rows_of_a_full_pass(x) // max(len(x), 1)
    return times if times > 1 and copies_are_draws(model) else 1


def _is_known(module: nn.Module) -> bool:
    """Tell whether a module is as it was declared: in eval mode, with no function or hook put in from outside."""
    kind = type(module)
    if kind in _DRAWING:
        known = cast(_Drawing, module).draws_by_row
    else:
        known = kind in _EXACT and _EXACT[kind](module)
    replaced = {name for name in vars(module) if callable(getattr(kind, name, None))}
    return (
        known
        and not module.training
        and (not replaced or (replaced == {"forward"} and folding.is_folded(module)))
        and not (module._backward_hooks or module._backward_pre_hooks or module._compiled_call_impl)
        and all(
            getattr(hook, "by_row", False)
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        )
    )
