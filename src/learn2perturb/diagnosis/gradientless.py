"""The checks of a model that has no gradients: what attacks from values leave is all that can be found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from learn2perturb.attacks.rays import RayS
from learn2perturb.attacks.square import Square
from learn2perturb.diagnosis import blackbox, whitebox
from learn2perturb.diagnosis.measure import Attacked, Bench
from learn2perturb.diagnosis.verdict import Draft, percent
from learn2perturb.evaluation.significance import beyond
from learn2perturb.sizes import whole_box

BEST = "best without gradients"
NONE = "the model has no gradients"
_ADAPTIVE = (
    "an attacker who knows what is inside may find more: give a differentiable copy of the model as a source, and name "
    "what was left as the accuracy under attacks without gradients"
)


def shared(
    bench: Bench, transfers: Mapping[str, Attacked], adaptive: Mapping[str, Attacked], reason: str
) -> dict[str, Any]:
    """Return what the checks share; ``reason`` says why there are no gradients.

    The white-box attack is a descent on values. What asks about gradients does not
    apply; check 3 asks whether attacks from values can find anything at all.
    """
    bench.scored("clean", bench.x, kind="none")
    n = bench.budget.images
    rivals = {
        "a descent on values": blackbox.descent(bench, "reported"),
        f"Square ({bench.budget.square_queries} queries)": blackbox.searched(bench, n),
        **_by_labels(bench, n),
        **{f"transfer from {name}": one for name, one in transfers.items()},
        **adaptive,
    }
    best = whitebox.best_of(bench, BEST, [one for one in rivals.values() if len(one.x) == n])
    return {"rivals": rivals, "reported": best, "transfers": transfers, "reason": reason}


def _by_labels(bench: Bench, n: int) -> dict[str, Attacked]:
    """Search rays of signs by what is decided alone: of labels and votes, other attacks see no slope."""
    budget, attack = bench.budget, bench.attack
    if attack.norm not in RayS.norms:
        return {}
    rays = RayS(attack.eps, queries=budget.square_queries, eot=budget.square_draws)
    return {f"RayS ({rays.queries} queries)": bench.attacked("rays", rays, n)}


def left(reported: Attacked, rivals: Mapping[str, Attacked], transfers: Mapping[str, Attacked], reason: str) -> Draft:
    """2: what is left by the strongest attack without gradients."""
    none, best = f"{NONE} ({reason})", reported
    lowest = min(rivals, key=lambda name: rivals[name].accuracy)
    others = ", ".join(f"{name} {percent(one.accuracy)}" for name, one in rivals.items() if name != lowest)
    text = (
        f"{none}, so attacks from values decide: the strongest of them ({lowest}) leaves "
        f"{percent(rivals[lowest].accuracy)}, the best of all for each image {percent(best.accuracy)}"
    )
    evidence = {name: one.accuracy for name, one in rivals.items()} | {"best": best.accuracy}
    return Draft(
        2, f"{text} ({others})", missing=blackbox.missing_sources(transfers), notes=(_ADAPTIVE,), evidence=evidence
    )


def unbounded(bench: Bench) -> Draft:
    """3: with the whole box to move in, a search by values leaves nothing; where it does, it sees too little."""
    budget, attack = bench.budget, bench.attack
    square = Square(
        whole_box(attack.norm, bench.x[0].numel()),
        norm=attack.norm,
        queries=budget.square_queries,
        eot=budget.square_draws,
    )
    found = bench.attacked("unbounded", square, budget.some, rival=False)
    left = f"with the whole range of pixels to move in, Square leaves {percent(found.accuracy)}"
    powerless = f"{left} (allowed 1 %): attacks from values find too little of this model to show anything"
    return Draft(
        3,
        left,
        not_shown=powerless if beyond(found.accuracy, whitebox.UNBOUNDED_LEFT) else "",
        evidence={"accuracy": found.accuracy},
    )
