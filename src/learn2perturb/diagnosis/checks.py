"""The checks of a diagnosis, a list of objects: what each asks, needs, allows and costs, and where it is. No torch.

A check is a function that returns a ``Draft``; its parameters name what it needs of what all checks share.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

from learn2perturb import plugins
from learn2perturb.diagnosis.budget import Budget, few
from learn2perturb.errors import ConfigError

HOME = "learn2perturb.diagnosis."
# What is not to be trusted if a check failed; of several the first is said.
GRADIENTS = "GRADIENTS CANNOT BE TRUSTED"
DRAWS = "THE DRAWS CANNOT BE TRUSTED, nor averages over them"
NOISE = "THE NOISE HIDES GRADIENTS, attacks on it show little"
ATTACK = "THE REPORTED ATTACK IS TOO WEAK, report the lowest accuracy"
FAILURES = (GRADIENTS, DRAWS, NOISE, ATTACK)
# Passes with a gradient, of all images together, in a budget, of a model with noise or without.
Cost = Callable[[Budget, bool], float]


def _nothing(budget: Budget, stochastic: bool) -> float:
    return 0.0


@final
@dataclass(frozen=True, kw_only=True)
class CheckSpec:
    """A check.

    Attributes:
        number: by which records know it.
        name: what it shows where it passes, in a few words.
        question: what it asks.
        run: the function, or ``"module:function"`` in this package, imported when it is run.
        needs: of the model: ``gradients``, ``noise``; where it lacks one the check does not apply.
        threshold: what is allowed, or ``"module:CONSTANT"``; None: nothing beyond two standard errors.
        cost: what it takes beyond what all checks share.
        without_gradients: in place of ``run``, for a model that has no gradients.
        first: run before the others, whose results are listed after its own.
        failing: what is not to be trusted where it fails.
        key: its key figure: names of evidence, places in it, or ``"*"`` for the lowest of what is not named; or a text
            with names in braces.
    """

    number: int
    name: str
    question: str
    run: Callable[..., Any] | str
    needs: tuple[str, ...] = ("gradients",)
    threshold: float | str | None = None
    cost: Cost = _nothing
    without_gradients: Callable[..., Any] | str | None = None
    first: bool = False
    failing: str = ATTACK
    key: tuple[str | int, ...] | str = ()

    def called(self, shared: Mapping[str, Any], *, gradients: bool = True) -> Any:
        """Return what the check finds, given what it names of what is shared."""
        home = self.run if gradients or self.without_gradients is None else self.without_gradients
        function = _found(home) if isinstance(home, str) else home
        known = {**shared, "number": self.number}
        return function(**{name: known[name] for name in inspect.signature(function).parameters})

    @property
    def allowed(self) -> float:
        """The threshold, as a number."""
        value = _found(self.threshold) if isinstance(self.threshold, str) else self.threshold or 0.0
        return float(value)


def _found(home: str) -> Any:
    module, _, name = home.partition(":")
    return getattr(importlib.import_module(HOME + module), name)


# What checks may ask for: a model without gradients has a descent on values for the reported attack, and no clean one.
SHARED_BY_ALL = ("bench", "sources", "quiet", "claimed", "replay", "truth", "reported", "transfers", "rivals")
SHARED = (*SHARED_BY_ALL, "clean", "own")
# number -> check, in the order in which they are told
CHECKS: dict[int, CheckSpec] = {}


def register_check(spec: CheckSpec) -> CheckSpec:
    """Add a check to those that every diagnosis runs.

    Raises:
        ConfigError: its number is taken, or not above the others.
    """
    if spec.number <= max(CHECKS, default=0):
        raise ConfigError(f"check {spec.number} is no number above {max(CHECKS)}; records know checks by their numbers")
    known = {*SHARED, "number"} if "gradients" in spec.needs else {*SHARED_BY_ALL, "number"}
    asked = set() if isinstance(spec.run, str) else set(inspect.signature(spec.run).parameters)
    if asked - known:
        raise ConfigError(
            f"check {spec.number} ({spec.name}) asks for {', '.join(sorted(asked - known))}; what is shared: "
            f"{', '.join(sorted(known))}"
        )
    CHECKS[spec.number] = spec
    return spec


def own_checks() -> list[Callable[..., Any]]:
    """Return the functions of the checks that are none of this package's."""
    return [check.run for check in CHECKS.values() if callable(check.run)]


def gradient_passes(budget: Budget, *, stochastic: bool, sources: int) -> int:
    """Return about how many forward-and-backward passes of an image a diagnosis makes, to choose the execution mode."""
    return int(round(sum(passes_by_part(budget, stochastic=stochastic, sources=sources).values()), 6))


def passes_by_part(budget: Budget, *, stochastic: bool, sources: int) -> dict[str, float]:
    """Return the same of what all checks share, and of each check."""
    eot = budget.eot if stochastic else 1
    shared = float(budget.images * budget.steps * (eot + sources))  # the reported attack; sources mostly have no noise
    if stochastic:
        shared += budget.some * budget.square_queries * budget.square_draws / 3  # values only
    checks = {f"check {number}": float(check.cost(budget, stochastic)) for number, check in CHECKS.items()}
    return {"what all checks share": shared, **checks}


def _unbounded(budget: Budget, stochastic: bool) -> float:
    return budget.some * few(budget.unbounded_steps) * (budget.unbounded_eot if stochastic else 1)


def _random(budget: Budget, stochastic: bool) -> float:
    return budget.some * budget.samples * budget.sample_draws / 3 if stochastic else 0.0


def _sizes(budget: Budget, stochastic: bool) -> float:
    far = sum(budget.is_far(radius) for radius in budget.eps_grid)  # there one draw mostly leaves chance
    return budget.some * budget.steps * ((len(budget.eps_grid) - far) * (budget.sweep_eot if stochastic else 1) + far)


def _quiet(budget: Budget, stochastic: bool) -> float:
    return 2 * budget.images * budget.steps if stochastic else 0.0


def _converging(budget: Budget, stochastic: bool) -> float:
    if not stochastic:
        return budget.some * sum(budget.step_curve)
    return budget.some * (budget.steps * sum(budget.draw_curve) + budget.sweep_eot * sum(budget.step_curve))


def _losses(budget: Budget, stochastic: bool) -> float:
    if not stochastic:
        return budget.some * budget.steps * (4 + budget.restarts)
    # Two losses, two averages that cost a third more, held draws.
    return budget.some * budget.sweep_eot * budget.steps * (6 + budget.targets + budget.restarts)


for _spec in (
    CheckSpec(
        number=1, name="iterative beats one-step", failing=GRADIENTS, key=("iterative", "one step"),
        question="does an attack of many steps leave no more than one of a single step?", run="whitebox:iterative",
    ),
    CheckSpec(
        number=2, name="white-box beats black-box", failing=GRADIENTS, key=("white-box", "*"),
        question="does no attack without the model's gradients leave less than the attack by them?",
        run="blackbox:blackbox", without_gradients="gradientless:left",
    ),
    CheckSpec(
        number=3, name="an unbounded attack succeeds", failing=GRADIENTS, key=("accuracy",),
        question="is nothing left where pixels may move over their whole range?", cost=_unbounded,
        run="whitebox:unbounded", without_gradients="gradientless:unbounded", threshold="whitebox:UNBOUNDED_LEFT",
    ),
    CheckSpec(
        number=4, name="random search finds nothing new", failing=GRADIENTS, needs=(), cost=_random,
        question="do random points of the ball break hardly any image that the attack left?",
        run="blackbox:random_search", threshold="blackbox:NEW_BREAKS",
        key="{broken:.0f} of {left by gradients:.0f} images broken",
    ),
    CheckSpec(
        number=5, name="more distortion, more success", failing=GRADIENTS, key=(-2, -1), cost=_sizes, first=True,
        question="does accuracy fall with the size of the ball, and reach chance?", run="whitebox:distortion",
    ),
    CheckSpec(
        number=6, name="noise off holds too", failing=NOISE, key=("noise off", "white-box"), cost=_quiet,
        question="is the network without its noise as good as PGD training, and no help against the noisy one?",
        run="blackbox:noise_off", needs=("gradients", "noise"), threshold="blackbox:NOISE_OFF_BELOW",
    ),
    CheckSpec(
        number=7, name="the attack has converged", key=(-2, -1), cost=_converging, first=True,
        question="do four times the draws, or twice the steps, change nothing?", run="whitebox:converged",
        threshold="whitebox:CONVERGED",
    ),
    CheckSpec(
        number=8, name="no loss or restart matters much", key=("reported", "best"), cost=_losses,
        question="is the best of several losses, averages, draws, targets and restarts hardly ahead?",
        run="whitebox:losses", threshold="whitebox:BEST_AHEAD",
    ),
    CheckSpec(
        number=9, name="the draws are real", failing=DRAWS, needs=(), threshold="draws:TOLERANCE",
        question="do draws differ from pass to pass, and does their mean settle as that of independent ones does?",
        run="draws:real", key="slope {slope of gradient:.2f}",
    ),
    CheckSpec(
        number=10, name="the gradient is the function's", failing=GRADIENTS, threshold="truth:MEDIAN_OFF",
        question="do finite differences of the function agree with its gradient?", run="truth:true_gradient",
        key="{median:.2f} [{10 %:.2f}, {90 %:.2f}]",
    ),
):  # fmt: skip
    register_check(_spec)


def register_declared() -> None:
    """Add the checks that installed packages declare in ``learn2perturb.checks``; what cannot be one is left out."""
    for name, target, package in plugins.declared("checks"):
        module, _, attribute = target.partition(":")
        try:
            spec = getattr(importlib.import_module(module), attribute)
            if not isinstance(spec, CheckSpec):
                raise ConfigError(f"{target} is a {type(spec).__name__}; it must be a CheckSpec")
            if CHECKS.get(spec.number) != spec:  # its module may have registered it
                register_check(spec)
        except Exception as error:  # a broken package must not stop every diagnosis
            warnings.warn(f"check {name!r} of {package} is left out: {error}", stacklevel=2)


register_declared()
