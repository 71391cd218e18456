"""Checks 1, 3, 5, 7 and 8: what gradients alone must achieve."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from learn2perturb.attacks import ARC, FGSM, PGD, Attack
from learn2perturb.attacks.gradients import AVERAGES
from learn2perturb.attacks.pgd import EOT_DRAWS
from learn2perturb.diagnosis.budget import few
from learn2perturb.diagnosis.measure import Attacked, Bench
from learn2perturb.diagnosis.record import Curve, Point
from learn2perturb.diagnosis.verdict import Draft, Statement, percent
from learn2perturb.engine.finite import members_of
from learn2perturb.evaluation.intervals import Scores, accuracy_interval
from learn2perturb.evaluation.result import format_eps
from learn2perturb.evaluation.significance import beyond
from learn2perturb.sizes import whole_box

UNBOUNDED_LEFT = 0.01
CONVERGED = 0.005
BEST_AHEAD = 0.02


def with_eps(attack: PGD, eps: float) -> PGD:
    """Return the attack at another size, its steps scaled alike."""
    return dataclasses.replace(attack, eps=eps, step_size=min(attack.step_size * eps / attack.eps, eps))


def title(attack: PGD, *, stochastic: bool) -> str:
    """``EOT-PGD-20`` with noise, ``PGD-20`` without."""
    return f"{'EOT-' if stochastic and attack.eot > 1 else ''}PGD-{attack.steps}"


def iterative(bench: Bench, reported: Attacked) -> Draft:
    """1: EOT-PGD-20 leaves no more than EOT-FGSM."""
    attack = bench.attack
    single = FGSM(
        attack.eps, norm=attack.norm, loss=attack.loss, eot=attack.eot, eot_average=attack.eot_average
    )  # fmt: skip
    one = bench.attacked("one step (FGSM)", single, bench.budget.images)
    both = f"{attack.steps} steps leave {percent(reported.accuracy)}, one step {percent(one.accuracy)}"
    return Draft(
        1,
        both,
        (
            Statement(
                "the iterative attack leaves no more than the one-step attack",
                f"{both}: more steps make the attack weaker, so its gradients lead astray",
                reported.scores,
                one.scores,
            ),
        ),
        evidence={"iterative": reported.accuracy, "one step": one.accuracy},
    )


def unbounded(bench: Bench) -> Draft:
    """3: with the whole box to move in, nothing is left."""
    eps = whole_box(bench.attack.norm, bench.x[0].numel())
    steps = few(bench.budget.unbounded_steps)
    found = _unbounded(bench, "unbounded", eps, steps)
    if found.accuracy > UNBOUNDED_LEFT and steps < bench.budget.unbounded_steps:
        steps = bench.budget.unbounded_steps
        found = _unbounded(bench, f"unbounded, {steps} steps", eps, steps)
    left = percent(found.accuracy)
    text = f"with the whole range of pixels to move in, {steps} steps still leave {left} (allowed 1 %)"
    return Draft(
        3,
        f"with eps = {eps:.4g} and {steps} steps {left} are left",
        wrong=(f"{text}: the gradients do not lead where they must",) if beyond(found.accuracy, UNBOUNDED_LEFT) else (),
        evidence={"accuracy": found.accuracy},
    )


def _unbounded(bench: Bench, name: str, eps: float, steps: int) -> Attacked:
    # No random start: from random pixels many networks are wrong whatever their gradients say.
    whole = dataclasses.replace(
        bench.attack, eps=eps, step_size=min(2.5 / steps, 1.0) * eps, steps=steps, random_start=False, restarts=1,
        eot=bench.budget.unbounded_eot,
    )  # fmt: skip
    return bench.attacked(name, whole, bench.budget.some, rival=False)


def distortion(bench: Bench, clean: Attacked) -> tuple[Draft, Curve]:
    """5: accuracy does not rise with the size of the ball, and reaches chance."""
    budget = bench.budget
    base = dataclasses.replace(bench.attack, eot=budget.sweep_eot)
    sizes, chance = [0.0, *budget.eps_grid], 1 / bench.num_classes
    rows = [clean.first(budget.some)]
    for eps in budget.eps_grid:
        rows.append(_at_radius(bench, with_eps(base, eps), most=min(rows[-1].mean(), chance)).scores)
    claims = [
        Statement(
            f"accuracy does not rise from eps {format_eps(before) or 0} to {format_eps(after)}",
            f"accuracy rises from eps {format_eps(before) or 0} to {format_eps(after)}",
            rows[index + 1],
            rows[index],
        )
        for index, (before, after) in enumerate(itertools.pairwise(sizes))
    ]
    last, widest = rows[-1].mean(), format_eps(sizes[-1])
    claims.append(
        Statement(
            f"accuracy falls to chance ({percent(chance)}) at eps {widest}",
            f"at eps {widest} {percent(last)} are left, where chance is {percent(chance)}",
            rows[-1],
            chance,
        )
    )
    draft = Draft(
        5,
        f"accuracy falls from {percent(rows[0].mean())} to {percent(last)} at eps {widest}",
        tuple(claims),
        evidence={f"eps {format_eps(eps) or 0}": row.mean() for eps, row in zip(sizes, rows, strict=True)},
    )
    return draft, _curve(bench, "eps", sizes, rows)


def _at_radius(bench: Bench, attack: PGD, *, most: float) -> Attacked:
    """Return what ``attack`` leaves; far beyond the radius in question one draw does where it leaves ``most`` or less.

    Averages over draws would only cost more there.
    """
    name, n = f"eps {format_eps(attack.eps)}", bench.budget.some
    if bench.subject.stochastic and attack.eot > 1 and bench.budget.is_far(attack.eps):
        found = bench.attacked(name, dataclasses.replace(attack, eot=1), n, rival=False)
        if found.accuracy <= most:
            return found
        name += f", {attack.eot} draws"
    return bench.attacked(name, attack, n, rival=False)


def converged(bench: Bench, reported: Attacked) -> tuple[Draft, list[Curve]]:
    """7: four times the draws, or twice the steps, change nothing."""
    budget, attack = bench.budget, bench.attack
    claims: list[Statement] = []
    evidence: dict[str, float] = {}
    curves: list[Curve] = []
    told: list[str] = []
    if bench.subject.stochastic:
        rows = {}
        for draws in budget.draw_curve:
            if (draws, attack.restarts) == (attack.eot, 1):
                rows[draws] = reported.first(budget.some)
                continue
            more = dataclasses.replace(attack, eot=draws, restarts=1)
            rows[draws] = bench.attacked(f"{draws} draws", more, budget.some).scores
        curves.append(_curve(bench, "draws", list(rows), list(rows.values())))
        claims.append(_same("draws", budget.draw_curve[-1] // 4, budget.draw_curve[-1], rows, evidence, told))
    rows = {}
    for steps in budget.step_curve:
        longer = dataclasses.replace(attack, steps=steps, eot=budget.sweep_eot, restarts=1)
        rows[steps] = bench.attacked(f"{steps} steps", longer, budget.some).scores
    curves.append(_curve(bench, "steps", list(rows), list(rows.values())))
    claims.append(_same("steps", budget.step_curve[-1] // 2, budget.step_curve[-1], rows, evidence, told))
    return Draft(7, ", ".join(told), tuple(claims), evidence=evidence), curves


def _same(
    axis: str, few: int, many: int, rows: dict[int, Scores], evidence: dict[str, float], told: list[str]
) -> Statement:
    """Claim that ``many`` draws or steps leave as much as ``few``."""
    first, second = rows[few], rows[many]
    evidence |= {f"{count} {axis}": row.mean() for count, row in rows.items()}
    text = f"{few} {axis} leave {percent(first.mean())}, {many} {axis} {percent(second.mean())}"
    told.append(text)
    return Statement(
        f"{many} {axis} change no more than half a point against {few}",
        f"{text}: the attack has not converged, enlarge its budget",
        first,
        second,
        CONVERGED,
        absolute=True,
    )


def losses(bench: Bench, reported: Attacked) -> Draft:
    """8: the best of several losses, averages, kinds of draws, targets and restarts is hardly ahead of the reported."""
    budget = bench.budget
    n = budget.some
    base = dataclasses.replace(bench.attack, eot=budget.sweep_eot if bench.subject.stochastic else 1, restarts=1)
    candidates = [bench.attacked(name, attack, n) for name, attack in _variants(bench, base).items()]
    logits = bench.mean_logits("targets", bench.x[:n], budget.judge_draws)
    order = logits.scatter(1, bench.y[:n].unsqueeze(1), -torch.inf).argsort(dim=1, descending=True)
    aimed = dataclasses.replace(base, loss="margin", targeted=True)
    for rank in range(min(budget.targets, bench.num_classes - 1)):
        candidates.append(bench.attacked(f"target {rank + 1}", aimed, n, targets=order[:, rank]))
    first = dataclasses.replace(reported, x=reported.x[:n], scores=reported.first(n))
    pool = by_same_draws(bench, "best of", [first, *candidates])
    best = best_of(bench, "best of all losses and restarts", pool)
    first = pool[0]
    text = (
        f"the reported attack leaves {percent(first.accuracy)}, the best of {len(pool)} for each image "
        f"{percent(best.accuracy)}"
    )
    evidence = {"reported": first.accuracy, "best": best.accuracy} | {one.name: one.accuracy for one in pool[1:]}
    averaged = [one for one in candidates if one.name == "average probability"]
    for one in averaged:  # the attack on the predictor that averages probabilities, judged by that predictor
        evidence["mean probability"] = bench.vote("mean probability", one.x, bench.y[:n], budget.judge_draws)
    return Draft(
        8,
        text,
        (
            Statement(
                "the best of all losses, averages, draws, targets and restarts is at most 2 points ahead",
                f"{text}: the reported attack is too weak, report the best",
                first.scores,
                best.scores,
                BEST_AHEAD,
            ),
        ),
        missing=() if bench.num_classes > 2 else ("loss dlr, which needs three classes",),
        evidence=evidence,
    )


def _variants(bench: Bench, base: PGD) -> dict[str, Attack]:
    """Return name -> attack, each unlike ``base`` in one thing."""
    names = ("ce", "margin", "dlr") if bench.num_classes > 2 else ("ce", "margin")
    found: dict[str, Attack] = {f"loss {loss}": dataclasses.replace(base, loss=loss) for loss in names}
    found |= {f"average {one}": dataclasses.replace(base, eot_average=one) for one in AVERAGES if base.eot > 1}
    if bench.subject.stochastic:
        found |= {f"{one} draws": dataclasses.replace(base, eot_draws=one) for one in EOT_DRAWS}
    found = {name: attack for name, attack in found.items() if attack != base}
    if members_of(bench.subject.model) is not None:
        found["ARC"] = ARC(base.eps, norm=base.norm, steps=base.steps)
    found[f"{bench.budget.restarts} restarts"] = dataclasses.replace(base, restarts=bench.budget.restarts)
    return found


def by_same_draws(bench: Bench, purpose: str, pool: Sequence[Attacked]) -> list[Attacked]:
    """Score all attacks by the same fresh draws: of rare ones that a pass shares, each has as many as the others."""
    if not bench.subject.stochastic:
        return list(pool)
    return [dataclasses.replace(one, scores=bench.score(purpose, one.x, bench.subject)) for one in pool]


def best_of(bench: Bench, name: str, pool: Sequence[Attacked]) -> Attacked:
    """Return the best of ``pool`` for each image, with the scores that each has: of draws that choose nothing."""
    return bench.assembled(name, pool, _winners(bench, pool))


def _winners(bench: Bench, pool: Sequence[Attacked]) -> NDArray[np.int64]:
    """Return which of ``pool`` is the best for each image (n,), by draws that score nothing.

    What is judged is accuracy, so what chooses is how often an image is wrong; margins settle ties. First the best for
    each image, then, by other draws, the best of that and of the attacks as they are: where many are nearly alike,
    choosing for each image by few draws may lose to one that is a little better everywhere.
    """
    n, draws = len(pool[0].x), bench.budget.judge_draws
    y = bench.y[:n]
    wrong, margins = (
        torch.stack(parts)
        for parts in zip(
            *(bench.mean_success(f"best {number}", part.x, y, draws) for number, part in enumerate(pool)), strict=True
        )
    )
    mixed = margins.where(wrong == wrong.max(dim=0).values, -torch.inf).argmax(dim=0)
    again = torch.stack(
        [bench.mean_success(f"best entry {number}", part.x, y, draws)[0] for number, part in enumerate(pool)]
    )
    whole, parts = again.gather(0, mixed.unsqueeze(0)).mean(), again.mean(dim=1)
    chosen = mixed if whole >= parts.max() else torch.full_like(mixed, int(parts.argmax()))
    winners: NDArray[np.int64] = chosen.cpu().numpy()
    return winners


def _curve(bench: Bench, axis: str, at: list, rows: list[Scores]) -> Curve:  # type: ignore[type-arg]
    points = tuple(Point(float(value), row.mean(), accuracy_interval(row)) for value, row in zip(at, rows, strict=True))
    return Curve(axis, rows[0].n, points)  # type: ignore[arg-type]
