"""Running the checks: what they share is computed once, and each is called with what its parameters name of that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from learn2perturb.diagnosis import blackbox, gradientless, truth
from learn2perturb.diagnosis.budget import really_searched
from learn2perturb.diagnosis.checks import CHECKS, CheckSpec
from learn2perturb.diagnosis.measure import Attacked, Bench, Subject
from learn2perturb.diagnosis.record import Curve
from learn2perturb.diagnosis.verdict import Draft
from learn2perturb.engine.random import seed_everything

NO_NOISE = "the model has no noise to switch off"


def run_checks(
    bench: Bench,
    sources: Mapping[str, Subject],
    quiet: Subject | None,
    learned: Callable[[], Tensor],
    *,
    adaptive: Callable[[], Mapping[str, Attacked]],
    claimed: bool,
    replay: str,
    blind: str,
) -> tuple[list[Draft], list[Curve]]:
    """Return the drafts of all checks, in the order of their numbers, and their curves.

    Args:
        bench: the model and its images.
        sources: networks that attacks are transferred from.
        quiet: the model without its noise, where that can be had.
        learned: gives images from which a surrogate learns, beside those that are attacked.
        adaptive: runs the attacks that the user knows to fit.
        claimed: whether the model is said to be random, or is.
        replay: how its draws are known to be replayed, if they are.
        blind: why the model has no gradients, or nothing.
    """
    bench.stage = "what all checks share"
    told = None if blind else truth.truth_of(bench)
    if told is None or not told.near:
        # Nothing passes before what needs no gradient was tried: a source that is always there, and a real search.
        bench.budget = really_searched(bench.budget)
        images = torch.cat([bench.x, learned()])
        sources = {**sources, blackbox.SURROGATE: blackbox.surrogate(bench, images)}
    shared: dict[str, Any] = {
        "bench": bench, "sources": sources, "quiet": quiet, "claimed": claimed, "replay": replay, "truth": told,
    }  # fmt: skip
    if told is None:
        shared |= gradientless.shared(bench, blackbox.transferred(bench, sources, quiet), adaptive(), blind)
    else:
        shared |= _by_gradients(bench, told, sources, quiet, adaptive)
    drafts: dict[int, Draft] = {}
    curves: dict[int, list[Curve]] = {}
    for done, check in enumerate(sorted(CHECKS.values(), key=lambda one: not one.first)):
        bench.stage = f"check {check.number}, {done} of {len(CHECKS)} checks done"
        drafts[check.number], curves[check.number] = _run(check, shared, claimed=claimed, blind=bool(blind))
    bench.stage = "decision"
    return [drafts[number] for number in CHECKS], [curve for number in CHECKS for curve in curves[number]]


def _by_gradients(
    bench: Bench,
    told: truth.Truth,
    sources: Mapping[str, Subject],
    quiet: Subject | None,
    adaptive: Callable[[], Mapping[str, Attacked]],
) -> dict[str, Any]:
    """Return what the checks of a model with gradients share: the reported attack, and all that it is held against."""
    clean = bench.scored("clean", bench.x, kind="none")
    reported = bench.attacked("reported", bench.attack, bench.budget.images)
    own = truth.best_by_gradients(bench, reported) if told.leads else reported
    square = blackbox.searched(bench, bench.budget.some if told.near else bench.budget.images)
    transfers = blackbox.transferred(bench, sources, quiet)
    rivals = blackbox.rivals_of(square, transfers, adaptive())
    return {"clean": clean, "reported": reported, "own": own, "transfers": transfers, "rivals": rivals}


def _run(check: CheckSpec, shared: Mapping[str, Any], *, claimed: bool, blind: bool) -> tuple[Draft, list[Curve]]:
    if blind and "gradients" in check.needs and check.without_gradients is None:
        return Draft(check.number, does_not_apply=gradientless.NONE), []
    if not claimed and "noise" in check.needs:
        return Draft(check.number, does_not_apply=NO_NOISE), []
    # A check of someone's own may draw as it likes: what was done before, and by which process, leaves no trace.
    seed_everything(shared["bench"].seed, "check", check.number)
    found = check.called(shared, gradients=not blind)
    draft, curves = found if isinstance(found, tuple) else (found, [])
    return draft, [curves] if isinstance(curves, Curve) else list(curves)
