"""What decides on a claim: the attack that it names, its predictor, and the strongest attacks scored by fresh draws."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from learn2perturb.attacks import PGD, Attack, build_attack
from learn2perturb.checks import check_size
from learn2perturb.diagnosis.budget import Budget
from learn2perturb.diagnosis.claim import ANY, Claim, named
from learn2perturb.diagnosis.measure import Bench, digest
from learn2perturb.diagnosis.record import Measurement
from learn2perturb.diagnosis.trial import Trial, put_on_trial
from learn2perturb.engine.random import seed_everything
from learn2perturb.errors import ConfigError
from learn2perturb.evaluation.intervals import Scores
from learn2perturb.evaluation.passes import checked_logits
from learn2perturb.evaluation.predictors import AVERAGE, scores, winners
from learn2perturb.evaluation.result import format_eps
from learn2perturb.sizes import usual_eps

# Attacks that are scored once more, by draws that did not choose them.
FINALISTS = 4


@final
@dataclass(frozen=True)
class Decision:
    """The measurement of lowest accuracy, and the claim with its trial where there is one."""

    lowest: str
    claim: Claim | None = None
    trial: Trial | None = None


def limit_of(claim: Claim | None, limit: int | None) -> int | None:
    """Return how many images to use: those of the claim where nothing else is said.

    Raises:
        ConfigError: both are said, and differ.
    """
    if claim is None or claim.n is None:
        return limit
    if limit not in (None, claim.n):
        raise ConfigError(f"the claim is of {claim.n} images and limit is {limit}; give one of them")
    return claim.n


def check_images(claim: Claim | None, n: int) -> None:
    """Raise ConfigError if the claim is of more images than there are."""
    if claim is not None and claim.n is not None and claim.n != n:
        raise ConfigError(
            f"the claim is of {claim.n} images and the data hold {n}; give those, or leave out 'of N images'"
        )


def asked(
    claim: Claim | None, attack: PGD | None, eps: float | None, norm: str | None, budget: Budget
) -> tuple[PGD | None, float | None, str | None]:
    """Return the reported attack, the size and the norm that a claim asks for, where nothing else is given.

    Raises:
        ConfigError: the claim is of another norm or size than what is given.
    """
    if claim is None:
        return attack, eps, norm
    of_norm, of_size = (attack.norm, attack.eps) if isinstance(attack, PGD) else (norm, eps)
    if None not in (claim.norm, of_norm) and claim.norm != of_norm:
        raise ConfigError(f"the claim is of {claim.norm} and {of_norm} is to be diagnosed; give one of them")
    if claim.eps is not None and of_size is not None and not _alike(claim.eps, of_size):
        other = format_eps(of_size) if isinstance(of_size, int | float) else repr(of_size)
        raise ConfigError(
            f"the claim is of eps {format_eps(claim.eps)} and {other} is to be diagnosed; give one of them"
        )
    name, settings = named(claim.attack)
    if attack is not None:
        return attack, eps, norm
    norm, size = of_norm or claim.norm or "linf", of_size if of_size is not None else claim.eps
    if name != "pgd":
        return None, size, norm
    size = usual_eps(norm) if size is None else size
    check_size("eps", size, norm=norm)
    usual = {"step_size": size / 4, "steps": budget.steps, "eot": budget.eot}
    built = _built("pgd", {**usual, **settings, "eps": size, "norm": norm}, claim)
    assert isinstance(built, PGD)
    return built, None, None


def _alike(one: float, other: Any) -> bool:
    return isinstance(other, int | float) and math.isclose(one, other, rel_tol=1e-6)


def decide(bench: Bench, claim: Claim | None) -> Decision:
    """Run what the claim needs on top of the checks, score the strongest attacks afresh, and test the claim."""
    own: dict[str, Tensor] = {}
    if claim is not None:
        claim = claim.settled(norm=bench.attack.norm, eps=bench.attack.eps, n=len(bench.x))
        own = _named_attack(bench, claim)
        if claim.ensemble and bench.subject.stochastic:
            own |= _through(bench, claim)
    measured = _scored(bench, claim, own)
    lowest = min(measured, key=lambda one: one.accuracy).name
    if claim is None:
        return Decision(lowest)
    return Decision(lowest, claim, put_on_trial(measured, claim.accuracy, tried=list(bench.rivals)))


def _named_attack(bench: Bench, claim: Claim) -> dict[str, Tensor]:
    """Run the attack that the claim names, unless it is the reported one; return its images by its name."""
    name, settings = named(claim.attack)
    if name == ANY:
        return {}
    reported = bench.attack
    if name == "pgd" and all(getattr(reported, key, None) == value for key, value in settings.items()):
        return {"reported": bench.kept["reported"]} if "reported" in bench.rivals else {}
    usual: dict[str, Any] = {"eps": reported.eps, "norm": reported.norm}
    if bench.subject.stochastic:
        usual["eot"] = bench.budget.sweep_eot
    found = bench.attacked(claim.attack, _built(name, usual | settings, claim), bench.budget.some)
    return {found.name: found.x}


def _built(name: str, settings: dict[str, Any], claim: Claim) -> Attack:
    try:
        return build_attack(name, **settings)
    except ConfigError as error:
        raise ConfigError(f"the attack {claim.attack} of the claim: {error}") from None


def _through(bench: Bench, claim: Claim) -> dict[str, Tensor]:
    """Attack the ensemble through its own mean: as many draws in a gradient as passes make an answer."""
    average = AVERAGE[str(claim.predictor)]
    base = dataclasses.replace(bench.attack, eot=claim.members or 1, eot_average=average, restarts=1)
    found = [
        bench.attacked(f"through the mean, loss {loss}", dataclasses.replace(base, loss=loss), bench.budget.images)
        for loss in ("ce", "margin")
    ]
    return {one.name: one.x for one in found}


def _scored(bench: Bench, claim: Claim | None, own: Mapping[str, Tensor]) -> list[Measurement]:
    """Return the scorings of the strongest attacks and of the claim's own; of all, if nothing is random.

    Which are the strongest was told by the draws of the checks, so these are others.
    """
    rivals = sorted(bench.rivals, key=lambda name: bench.rivals[name])
    if not bench.subject.stochastic:
        return [bench.measured(name) for name in rivals]
    images, found = {**bench.kept, **own}, []
    for name in dict.fromkeys([*rivals[:FINALISTS], *own]):
        if name not in images:  # as the checks scored it
            found.append(bench.measured(name))
            continue
        label = f"{name}, {claim.predicted if claim is not None and claim.ensemble else 'fresh draws'}"
        bench.record(label, name, _answers(bench, images[name], claim))
        found.append(bench.measured(label))
    return found


def _answers(bench: Bench, x: Tensor, claim: Claim | None) -> Scores:
    """Return which answers of the claimed predictor are right, by draws that nothing else has seen.

    The same draws for every attack: the lowest of several is then no lower by the luck of its own.
    """
    rule, members = ("single", 1) if claim is None else (str(claim.predictor), claim.members or 1)
    with torch.no_grad(), bench.subject.ready() as model:

        def right(rows: slice, batch: int, draw: int) -> Tensor:
            seed_everything(bench.seed, "decision", batch, draw)
            answer = winners(scores(rule, lambda images: checked_logits(model, images), x[rows], members))
            return torch.from_numpy(answer == bench.y[rows].cpu().numpy())

        key = "decision", rule, members, digest(x)
        return bench.scorings(right, len(x), bench.budget.scorings, bench.subject, key)
