"""Where noise acts: on what a submodule gives or takes, by a hook; on a parameter of it, by a parametrisation.

A weight is drawn when its layer reads it: once for each call of the layer, as in the code of PNI and Adv-BNN, so once
in a forward pass unless the pass calls the layer again (``parametrize.cached()`` then holds one draw). All images of a
batch share that draw.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, final

from torch import Tensor, nn
from torch.nn.utils import parametrize

from learn2perturb.engine import by_row, folding
from learn2perturb.errors import ConfigError, SiteError

if TYPE_CHECKING:
    from learn2perturb.noise.base import NoiseModule

CHILD = "perturbation"
FEATURES = ("output", "input")


# Module-level functions, not closures: a network with noise can be pickled, deep-copied and compiled.
@by_row.hook_by_row
def _perturb_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return module.perturbation.perturb(output)  # type: ignore[operator, union-attr]


@by_row.hook_by_row
@folding.input_only
def _perturb_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (module.perturbation.perturb(args[0]), *args[1:])  # type: ignore[operator, union-attr]


def drop_hook(hooks: dict[int, Any], function: Any) -> None:
    """Remove ``function`` from a hook table. By identity, because handles do not survive a deep copy."""
    for key, hook in list(hooks.items()):
        if hook is function or getattr(hook, "hook", None) is function:
            del hooks[key]


class Place(ABC):
    """A place of a submodule: how noise gets there and away again, and where it is then found."""

    of_features: ClassVar[bool]

    @property
    @abstractmethod
    def path(self) -> str:
        """Name of the noise below its submodule."""

    @property
    def moved(self) -> dict[str, str]:
        """State-dict keys of the plain submodule that are others while it is perturbed: ``{plain: now}``."""
        return {}

    @abstractmethod
    def described(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """Return what a description says of the place and of the shape of what is there."""

    @abstractmethod
    def refusal(self, noise: NoiseModule, parent: nn.Module) -> str | None:
        """Return why ``parent`` cannot take ``noise``, with the fix, or None where it can."""

    @abstractmethod
    def attach(self, noise: NoiseModule, parent: nn.Module) -> None:
        """Put ``noise`` into ``parent``."""

    @abstractmethod
    def detach(self, parent: nn.Module) -> None:
        """Take it out again; ``parent`` is then as it was before."""

    def check(self, noise: NoiseModule, value: Tensor) -> None:
        """Raise SiteError where ``value`` is none that ``noise`` was made for."""
        return


@final
class FeaturePlace(Place):
    """What a submodule gives (``output``), or the first of what it takes (``input``).

    The noise is a child of the submodule, applied by a forward hook. Called as a layer it is the identity, because a
    container that runs its children in order (``nn.Sequential``) runs this one too.
    """

    of_features: ClassVar[bool] = True

    def __init__(self, side: str) -> None:
        self.side = side

    @property
    def path(self) -> str:
        """Name of the noise below its submodule."""
        return CHILD

    def described(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """Return shape and side."""
        return {"feature_shape": list(shape), "place": self.side}

    def refusal(self, noise: NoiseModule, parent: nn.Module) -> str | None:
        """Refuse a submodule that has noise on its features."""
        return "is perturbed already; call remove_noise(network) first" if hasattr(parent, CHILD) else None

    def attach(self, noise: NoiseModule, parent: nn.Module) -> None:
        """Make the noise a child of ``parent``, applied by a hook on its output or input."""
        parent.add_module(CHILD, noise)
        if self.side == "output":
            parent.register_forward_hook(_perturb_output)
        else:
            parent.register_forward_pre_hook(_perturb_input)

    def detach(self, parent: nn.Module) -> None:
        """Remove child and hook."""
        delattr(parent, CHILD)
        drop_hook(parent._forward_hooks, _perturb_output)
        drop_hook(parent._forward_pre_hooks, _perturb_input)

    def check(self, noise: NoiseModule, value: Tensor) -> None:
        """Refuse features that a scale of this granularity does not fit.

        Raises:
            SiteError: they have another shape.
        """
        shape, expected = tuple(value.shape[1:]), noise.shape
        if noise.granularity == "element":
            fits = shape == expected
        else:
            fits = len(shape) == len(expected) and (
                noise.granularity == "layer" or shape[noise.channel_dim] == expected[noise.channel_dim]
            )
        if not fits:
            raise SiteError(
                f"site {noise.site!r} has features of shape {shape} but its {noise.granularity}-wise noise was made "
                f"for {expected}; feed images of the size that perturb() was given, or perturb with that input_shape, "
                "or use granularity='channel'"
            )


@final
class WeightPlace(Place):
    """A parameter of a layer, through ``torch.nn.utils.parametrize``: any network, no layer classes of our own."""

    of_features: ClassVar[bool] = False

    def __init__(self, tensor: str) -> None:
        self.tensor = tensor
        self._order: list[str] = []

    @property
    def path(self) -> str:
        """Name of the noise below its layer: where PyTorch keeps a parametrisation."""
        return f"parametrizations.{self.tensor}.0"

    @property
    def moved(self) -> dict[str, str]:
        """The plain weight, which PyTorch keeps under another name while it is parametrised."""
        return {self.tensor: f"parametrizations.{self.tensor}.original"}

    def described(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """Return shape and name of the parameter."""
        return {"shape": list(shape), "tensor": self.tensor}

    def refusal(self, noise: NoiseModule, parent: nn.Module) -> str | None:
        """Refuse a layer whose tensor is not there, is made by something else, or has another shape."""
        if parametrize.is_parametrized(parent, self.tensor):
            return f"has a parametrised {self.tensor} already; call remove_noise(network), or remove_parametrizations"
        own = parent._parameters.get(self.tensor)
        if own is None:
            return f"({type(parent).__name__}) has no parameter {self.tensor!r} of its own; choose a layer that has"
        if tuple(own.shape) != noise.shape:
            return (
                f"has a {self.tensor} of shape {tuple(own.shape)}, the noise was made for {noise.shape}; fix the spec"
            )
        return None

    def attach(self, noise: NoiseModule, parent: nn.Module) -> None:
        """Parametrise the tensor of ``parent``."""
        self._order = list(parent._parameters)
        noise.to(parent._parameters[self.tensor].dtype)  # type: ignore[union-attr]
        # unsafe: without PyTorch's check, which would draw.
        parametrize.register_parametrization(parent, self.tensor, noise, unsafe=True)
        _made_copyable(parent)

    def detach(self, parent: nn.Module) -> None:
        """Give ``parent`` its plain tensor back, at its place among the parameters.

        Of a law that keeps a part with its noise off, which it must be, that is the tensor as it then is.
        """
        chain = parent.parametrizations[self.tensor]  # type: ignore[index]
        kept = any(noise.keeps for noise in chain)
        parametrize.remove_parametrizations(parent, self.tensor, leave_parametrized=kept)
        own = parent._parameters
        for name in [name for name in self._order if name in own]:
            own[name] = own.pop(name)


def place_of(name: str) -> Place:
    """Return the place called ``output`` or ``input``, or the parameter of that name.

    Raises:
        ConfigError: it is no name.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ConfigError(f"place is {name!r}; it must be 'output', 'input' or the name of a parameter: 'weight'")
    return FeaturePlace(name) if name in FEATURES else WeightPlace(name)


# --- copies of a parametrised layer ---------------------------------------------------------------------------------
#
# PyTorch gives a parametrised layer a class of its own, refuses to pickle it, and lets deep copies share that class, so
# that removing a parametrisation from the copy breaks the original. A copy made here gets a class of its own.


def _rebuilt(kind: type[nn.Module], state: dict[str, Any]) -> nn.Module:
    return _parametrized(kind.__new__(kind), state)


def _parametrized(layer: nn.Module, state: dict[str, Any]) -> nn.Module:
    """Fill a blank layer of the plain class from the ``__dict__`` of a parametrised one, and parametrise it too."""
    state = {**state, "_modules": dict(state["_modules"]), "_parameters": dict(state["_parameters"])}
    lists = state["_modules"].pop("parametrizations")
    layer.__dict__.update(state)
    for tensor, chain in lists.items():
        layer.register_parameter(tensor, chain.original)
        for noise in chain:
            parametrize.register_parametrization(layer, tensor, noise, unsafe=True)
    return _made_copyable(layer)


def _reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
    return _rebuilt, (parametrize.type_before_parametrizations(self), self.__dict__)


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    kind: type[nn.Module] = parametrize.type_before_parametrizations(self)
    twin = memo[id(self)] = kind.__new__(kind)
    return _parametrized(twin, copy.deepcopy(self.__dict__, memo))


def _made_copyable(layer: nn.Module) -> nn.Module:
    for name, method in (("__reduce_ex__", _reduce), ("__deepcopy__", _deepcopy)):
        setattr(type(layer), name, method)
    return layer
