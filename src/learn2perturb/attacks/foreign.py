"""Attacks of other libraries, run under this package's caller: checked, counted, modes kept, usable in ``evaluate``.

One call each: :func:`from_torchattacks`, :func:`from_foolbox`, :func:`from_adv_lib`, :func:`from_art`, and
:func:`from_function` for everything else. The library is imported only when its attack runs.
"""

from __future__ import annotations

import importlib
import inspect
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from learn2perturb.attacks.base import Attack
from learn2perturb.attacks.gradients import Average, mean_logits
from learn2perturb.attacks.query import Query
from learn2perturb.engine.random import isolated_rng, seed_everything, seed_torch
from learn2perturb.errors import ConfigError, InputError, MissingDependencyError

_RADIUS_NAMES = ("eps", "ε", "epsilon")
# Without dependencies where these would replace a newer requests (torchattacks) or do not build (visdom of adv-lib).
_INSTALL = {
    "torchattacks": "pip install --no-deps torchattacks",
    "foolbox": "pip install foolbox",
    "art": "pip install adversarial-robustness-toolbox",
}


def foreign_library(module: str) -> Any:
    """Import ``module`` of another library.

    Raises:
        MissingDependencyError: it is not installed.
    """
    library = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(f"{library} cannot be imported ({error}): {_INSTALL[library]}") from None


@final
class Victim(nn.Module):
    """The attacked model as other libraries want it: a module on a device, whose modes they may set in vain.

    Passes are counted, and each draws from a stream of its own: a library that seeds torch's generator (several do,
    at every call) cannot make a stochastic model repeat its draws.
    """

    def __init__(self, query: Query, x: Tensor, seed: int, eot: int, average: Average) -> None:
        super().__init__()
        # Libraries ask the first parameter for the device.
        self.place = nn.Parameter(torch.empty(0, dtype=x.dtype, device=x.device), requires_grad=False)
        self._query, self._seed, self._eot, self._average = query, seed, eot, average
        self._passes = 0
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, K) of fresh draws; with ``eot`` above 1, the average over that many."""
        with isolated_rng(torch_only=True):
            seed_torch(self._seed, "pass", self._passes)
            self._passes += 1
            if x.requires_grad:
                x = x.view_as(x)  # so that what comes back here is the gradient of this pass alone
                x.register_hook(self._query.watch.gradient)
            if self._eot == 1:
                logits = self._query.logits(x)
            else:
                logits = mean_logits(self._query.logits, x, self._eot, self._average)
        if logits.requires_grad:
            logits.register_hook(self._count)
        return logits

    def _count(self, gradient: Tensor) -> None:
        self._query.backwards += self._eot * len(gradient)


@dataclass(frozen=True)
class ForeignAttack(Attack):
    """An attack of another library; its images are projected onto the ball that ``eps`` and ``norm`` say.

    An infinite ``eps`` allows any image in [0, 1]: for attacks that look for the smallest perturbation.
    ``eot`` above 1 shows the library the model's averaged log-probabilities or logits (``eot_average``) over that many
    fresh draws; the graphs of all of them live at once, unlike in this package's own attacks.
    """

    minimum_norm: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eot > 1 and self.eot_average == "loss":
            raise ConfigError(
                "eot_average is 'loss', but the loss is the other library's affair: give 'probability' or 'logits'"
            )

    @abstractmethod
    def craft_in_library(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return the library's adversarial images."""

    @final
    def perturb(self, query: Query, x: Tensor, y: Tensor) -> Tensor:
        """Return what the library makes of ``x``; the caller's random generators are left alone but for one number."""
        seed = int(torch.randint(2**63 - 1, ()))
        with isolated_rng():
            seed_everything(seed, "library")
            model = Victim(query, x, seed, self.eot, self.eot_average)
            x_adv = self.craft_in_library(model, x.clone(), y.clone())
        if not isinstance(x_adv, Tensor) or x_adv.shape != x.shape:
            found = f"shape {tuple(x_adv.shape)}" if isinstance(x_adv, Tensor) else f"a {type(x_adv).__name__}"
            raise InputError(f"{type(self).__name__} returned {found}, not images of shape {tuple(x.shape)}")
        return x_adv.detach().to(x)


@dataclass(frozen=True)
class _Built(ForeignAttack):
    """An attack made by ``build(model, **settings)``, with ``eps`` passed on where ``build`` takes one.

    Attributes:
        build: the library's class, or a function that returns its attack.
        settings: further arguments of ``build``.
        radius_name: the argument of ``build`` that takes ``eps``; None where it takes none.
    """

    build: Callable[..., Any] = field(kw_only=True)
    settings: Mapping[str, Any] = field(default_factory=dict, kw_only=True, hash=False)
    radius_name: str | None = field(default=None, kw_only=True)

    def _build(self, *given: Any, **named: Any) -> Any:
        radius = {} if self.radius_name is None else {self.radius_name: self.eps}
        return self.build(*given, **named, **radius, **self.settings)


@final
@dataclass(frozen=True)
class TorchattacksAttack(_Built):
    """An attack of torchattacks: ``build(model, ...)`` gives an object that is called with images and labels."""

    def craft_in_library(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return ``build(model)(x, y)``."""
        attack = self._build(model)
        if self.targeted:
            attack.set_mode_targeted_by_label(quiet=True)
        return attack(x, y)


@final
@dataclass(frozen=True)
class AdvLibAttack(_Built):
    """An attack of adversarial-library: a function of model, inputs, labels, targeted."""

    def craft_in_library(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return ``build(model, inputs=x, labels=y, targeted=...)``."""
        return self._build(model=model, inputs=x, labels=y, targeted=self.targeted)


@final
@dataclass(frozen=True)
class ArtAttack(_Built):
    """An evasion attack of the Adversarial Robustness Toolbox: ``build(classifier, ...)`` gives it."""

    def craft_in_library(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return ``build(PyTorchClassifier(model)).generate(x, y)``."""
        classifiers = foreign_library("art.estimators.classification")
        with torch.no_grad():
            classes = model(x[:1]).shape[1]
        classifier = classifiers.PyTorchClassifier(
            model=model,
            loss=nn.CrossEntropyLoss(),
            input_shape=tuple(x.shape[1:]),
            nb_classes=classes,
            clip_values=(0.0, 1.0),
            device_type="gpu" if x.device.type == "cuda" else "cpu",
        )
        attack = self._build(classifier)
        if self.targeted:
            attack.set_params(targeted=True)
        return torch.from_numpy(attack.generate(x.cpu().numpy(), y.cpu().numpy()))


@final
@dataclass(frozen=True)
class FoolboxAttack(ForeignAttack):
    """An attack of foolbox; ``eps`` goes into its call, and an infinite one asks for the smallest perturbation."""

    attack: Any = field(kw_only=True)

    def craft_in_library(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return the images that foolbox clips to the ball, or its smallest perturbation."""
        foolbox = foreign_library("foolbox")
        criteria = foolbox.criteria
        criterion = criteria.TargetedMisclassification(y) if self.targeted else criteria.Misclassification(y)
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
        raw, clipped, _ = self.attack(wrapped, x, criterion, epsilons=None if self.eps == math.inf else self.eps)
        return raw if self.eps == math.inf else clipped


@final
@dataclass(frozen=True)
class FunctionAttack(_Built):
    """Any function ``build(model, x, y, ...)`` that returns adversarial images."""

    def craft_in_library(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return ``build(model, x, y)``; with ``targeted``, ``y`` holds the classes to reach."""
        return self._build(model, x, y)


_OURS = ("targeted", "eot", "eot_average", "seed")


def _built(kind: Callable[..., Any], build: Any, eps: float | None, norm: str, settings: dict[str, Any]) -> Any:
    """Return the attack; ``eps`` goes to ``build`` where that takes one, and is what it defaults to if not given."""
    if not callable(build):
        raise ConfigError(f"the attack is a {type(build).__name__}; give the library's class, or a function")
    try:
        parameters = dict(inspect.signature(build).parameters)
    except ValueError:  # compiled code does not say
        parameters = {}
    ours = {"eot_average": "probability"} | {name: settings.pop(name) for name in _OURS if name in settings}
    if "verbose" in parameters:
        settings = {"verbose": False} | settings
    name = next((name for name in _RADIUS_NAMES if name in parameters), None)
    default = parameters[name].default if name else None
    if eps is None and isinstance(default, int | float):
        eps = float(default)
    radius = math.inf if eps is None else eps
    return kind(
        radius, norm=norm, build=build, settings=settings, radius_name=name if eps is not None else None, **ours
    )


def from_torchattacks(
    build: Callable[..., Any], *, eps: float | None = None, norm: str = "linf", **settings: Any
) -> TorchattacksAttack:
    """Return an attack of torchattacks as one of ours: ``from_torchattacks(torchattacks.PGD, eps=8/255, steps=20)``.

    Args:
        build: its class, or a function of the model: ``lambda m: torchattacks.PGD(m, eps=8/255)``.
        eps: the radius, [0, 1] pixel scale: passed on where ``build`` takes one; its images are then projected onto
            that ball. By default that of ``build``; where neither has one, infinite: any image in [0, 1] is allowed.
        norm: of that ball, ``"linf"`` or ``"l2"``.
        settings: passed on, but for ``targeted``, ``eot``, ``eot_average`` (``"probability"`` or ``"logits"``) and
            ``seed``, which mean what they mean in every attack of this package.

    Raises:
        ConfigError: ``build`` is not callable, or a setting is not allowed.
    """
    return _built(TorchattacksAttack, build, eps, norm, settings)


def from_adv_lib(
    function: Callable[..., Tensor], *, eps: float | None = None, norm: str = "linf", **settings: Any
) -> AdvLibAttack:
    """Return an attack of adversarial-library as one of ours: ``from_adv_lib(carlini_wagner_l2, max_iterations=100)``.

    Arguments as in :func:`from_torchattacks`; ``eps`` is passed on under the function's own name for it (eps or ε).

    Raises:
        ConfigError: ``function`` is not callable, or a setting is not allowed.
    """
    return _built(AdvLibAttack, function, eps, norm, settings)


def from_art(build: Callable[..., Any], *, eps: float | None = None, norm: str = "linf", **settings: Any) -> ArtAttack:
    """Return an evasion attack of ART as one of ours: ``from_art(ProjectedGradientDescent, eps=8/255, max_iter=20)``.

    Arguments as in :func:`from_torchattacks`; ``build`` is its class or a function of the classifier. Progress bars are
    off unless ``verbose=True``.

    Raises:
        ConfigError: ``build`` is not callable, or a setting is not allowed.
    """
    return _built(ArtAttack, build, eps, norm, settings)


def from_function(
    function: Callable[..., Tensor], *, eps: float | None = None, norm: str = "linf", **settings: Any
) -> FunctionAttack:
    """Return any function ``(model, x, y) -> x_adv`` as an attack of ours; arguments as in :func:`from_torchattacks`.

    Raises:
        ConfigError: ``function`` is not callable, or a setting is not allowed.
    """
    return _built(FunctionAttack, function, eps, norm, settings)


def from_foolbox(attack: Any, *, eps: float | None = None, norm: str | None = None, **ours: Any) -> FoolboxAttack:
    """Return an attack of foolbox as one of ours: ``from_foolbox(foolbox.attacks.LinfPGD(steps=20), eps=8/255)``.

    Without ``eps`` foolbox looks for the smallest perturbation (``epsilons=None``). ``norm`` is by default that of the
    attack; ``ours`` are ``targeted``, ``eot``, ``eot_average`` and ``seed``.

    Raises:
        ConfigError: ``attack`` is no object of foolbox, or its norm is neither l_inf nor l2 and ``eps`` is given.
    """
    if isinstance(attack, type) or not callable(attack):
        kind = f"the class {attack.__name__}" if isinstance(attack, type) else f"a {type(attack).__name__}"
        raise ConfigError(f"attack is {kind}; give an object, such as foolbox.attacks.LinfPGD(steps=20)")
    order = getattr(getattr(attack, "distance", None), "p", None)
    norm = norm or ("linf" if order == float("inf") else "l2" if order == 2 else None)
    if norm is None and eps is not None:
        raise ConfigError(f"attack {attack!r} has norm {order!r}; only l_inf and l2 have a ball here: leave eps out")
    ours = {"eot_average": "probability"} | ours
    return FoolboxAttack(math.inf if eps is None else eps, norm=norm or "linf", attack=attack, **ours)
