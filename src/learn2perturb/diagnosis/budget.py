"""How much work a diagnosis does. ``quick`` is minutes on a CPU, ``full`` is for a report. Knows no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, final

from learn2perturb.errors import ConfigError, UnknownNameError
from learn2perturb.sizes import reach, sweep


@final
@dataclass(frozen=True)
class Budget:
    """The numbers of images, draws, steps and queries of each check.

    A model without noise needs one draw wherever a number of draws stands here.

    Attributes:
        name: what the record calls it.
        images: in the cheap checks; ``some`` in the costly ones: the first of the same images.
        scorings: fresh draws that score each attack.
        eot: draws averaged in each gradient of the reported attack.
        steps: of the reported attack.
        sweep_eot: draws in each gradient where many attacks are compared (sizes, steps, losses, restarts).
        unbounded_steps, unbounded_eot: of the attack with the whole box (check 3), where an eighth of the steps fails.
        samples, sample_draws: random points of the ball for each image, and draws that each is judged by (check 4).
        finalists, judge_draws: best points kept for each image, and fresh draws that judge them.
        eps_grid: radii of check 5, rising, in the norm that is diagnosed; empty: from a quarter of eps, each twice the
            one before, until the grey image is in reach of every image. A grid that ends before is extended.
        draw_curve: numbers of draws in a gradient; the last is compared with the one a quarter of it (check 7).
        step_curve: numbers of steps; the last is compared with half of it (check 7).
        restarts: of check 8.
        targets: classes tried by the targeted attack, likeliest first.
        square_queries, square_draws: of Square, and draws averaged in each query.
        real_queries: of Square where the gradients are not the function's, or there are none, if that is more.
        descent_steps, descent_directions: of the descent on values (SPSA), and directions of each estimate.
        surrogate_queries: images that the model is asked about to train a surrogate of it.
        slope_images, slope_repeats: images and repetitions from which the variance of gradients is told (check 9).
        near: radius up to which check 5 averages over draws; beyond it tries one draw first. None: twice eps.
    """

    name: str
    images: int
    some: int
    scorings: int
    eot: int
    steps: int
    sweep_eot: int
    unbounded_steps: int
    unbounded_eot: int
    samples: int
    sample_draws: int
    finalists: int
    judge_draws: int
    eps_grid: tuple[float, ...]
    draw_curve: tuple[int, ...]
    step_curve: tuple[int, ...]
    restarts: int
    targets: int
    square_queries: int
    square_draws: int
    slope_images: int
    slope_repeats: int
    real_queries: int = 1000
    descent_steps: int = 40
    descent_directions: int = 16
    surrogate_queries: int = 10_000
    near: float | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.type == "int" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{item.name} of the budget is {value!r}, must be a whole number >= 1")
        if self.some > self.images:
            raise ConfigError(f"some is {self.some} and images {self.images}; allowed: some <= images")
        for name, part in (("draw_curve", 4), ("step_curve", 2)):
            curve = getattr(self, name)
            if list(curve) != sorted(set(curve)) or not curve or curve[-1] % part or curve[-1] // part not in curve:
                raise ConfigError(f"{name} is {curve}; it must rise, and hold its last number divided by {part}")
        if self.near is not None and not self.near > 0:
            raise ConfigError(f"near is {self.near!r}; it is a radius above 0, or None: twice eps")
        if list(self.eps_grid) != sorted(set(self.eps_grid)) or any(eps <= 0 for eps in self.eps_grid):
            raise ConfigError(f"eps_grid is {self.eps_grid}; it must rise from above 0, such as (2/255, 4/255)")

    def is_far(self, radius: float) -> bool:
        """Tell whether nearly every image is broken at this radius, by any attack that is one."""
        return self.near is not None and radius > self.near


# Sized for two CPU cores and a ResNet-V1(20) on 32 x 32 images, where an attack pass takes about 1 ms an image.
QUICK = Budget(
    name="quick", images=200, some=100, scorings=10, eot=8, steps=20, sweep_eot=4, unbounded_steps=200,
    unbounded_eot=1, samples=200, sample_draws=1, finalists=3, judge_draws=20, eps_grid=(),
    draw_curve=(1, 8, 32), step_curve=(5, 20, 50, 100), restarts=5, targets=1, square_queries=300, square_draws=4,
    slope_images=8, slope_repeats=24,
)  # fmt: skip
FULL = Budget(
    name="full", images=1000, some=1000, scorings=10, eot=20, steps=20, sweep_eot=20, unbounded_steps=200,
    unbounded_eot=5, samples=10_000, sample_draws=2, finalists=5, judge_draws=100, eps_grid=(),
    draw_curve=(1, 5, 20, 80), step_curve=(5, 20, 50, 100, 200), restarts=5, targets=9, square_queries=5000,
    square_draws=20, slope_images=16, slope_repeats=48, real_queries=5000,
    descent_steps=100, descent_directions=32, surrogate_queries=50_000,
)  # fmt: skip
BUDGETS = {"quick": QUICK, "full": FULL}


def budget_of(budget: str | Budget, **changes: Any) -> Budget:
    """Return the budget of that name, or the one given, with changes.

    Raises:
        UnknownNameError: no budget has that name.
        ConfigError: a number is not allowed.
    """
    if isinstance(budget, str):
        if budget not in BUDGETS:
            raise UnknownNameError.of("budget", budget, BUDGETS)
        budget = BUDGETS[budget]
    if not isinstance(budget, Budget):
        raise ConfigError(f"budget is a {type(budget).__name__}; give 'quick', 'full' or a Budget")
    return replace(budget, **changes) if changes else budget


def budget_from(values: Mapping[str, Any]) -> Budget:
    """Return the budget of plain values, as a record keeps it.

    Raises:
        UnknownNameError: a key is no number of a budget.
        ConfigError: a number is missing or not allowed.
    """
    known = {item.name: item for item in fields(Budget)}
    for name in values:
        if name not in known:
            raise UnknownNameError.of("number of a budget", name, known)
    missing = [name for name, item in known.items() if name not in values and item.default is MISSING]
    if missing:
        raise ConfigError(f"the budget lacks {', '.join(missing)}; give all numbers, or 'quick' or 'full'")
    numbers: dict[str, Any] = {name: tuple(item) if isinstance(item, list) else item for name, item in values.items()}
    return Budget(**numbers)


def few(steps: int) -> int:
    """Return the steps of the attack that is tried first where ``steps`` are allowed: it ends most networks."""
    return max(1, steps // 8)


def resized(budget: Budget, images: int) -> Budget:
    """Return the budget for ``images`` images, if there are fewer, or the user wants another number."""
    return replace(budget, images=images, some=min(budget.some, images))


def with_grid(budget: Budget, norm: str, eps: float, pixels: int) -> Budget:
    """Return the budget with the radii of check 5 for ``eps``: they go beyond it, and to where accuracy is chance.

    And with the one beyond which they are far.
    """
    grid = budget.eps_grid or sweep(norm, eps, pixels)
    last = reach(norm, eps, pixels)
    near = 2 * eps if budget.near is None else budget.near
    return replace(budget, eps_grid=grid if grid[-1] >= last * (1 - 1e-9) else (*grid, last), near=near)


def really_searched(budget: Budget) -> Budget:
    """Return the budget for a model whose gradients tell little: Square is what decides, and gets queries for it."""
    return replace(budget, square_queries=max(budget.square_queries, budget.real_queries))


def value_queries(budget: Budget, *, stochastic: bool) -> int:
    """Return about how many images a model without gradients is asked about, at most."""
    draws, judged, scored = (budget.square_draws, budget.judge_draws, budget.scorings) if stochastic else (1, 1, 1)
    each = (1 + budget.descent_steps) * (1 + 2 * budget.descent_directions)
    each += 2 * budget.square_queries * draws  # of Square and of RayS
    searched = (budget.samples * budget.sample_draws if stochastic else budget.samples) + budget.finalists * judged
    return budget.images * (each + searched + 8 * judged + 6 * scored) + budget.surrogate_queries * draws
