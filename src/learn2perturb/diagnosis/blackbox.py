"""Checks 2, 4 and 6: what needs no gradient of the model itself, and what its noise-off twin tells."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from learn2perturb.attacks import BPDA
from learn2perturb.attacks.balls import BALLS
from learn2perturb.attacks.losses import margin
from learn2perturb.attacks.square import Square
from learn2perturb.attacks.surrogate import Substitute, distil
from learn2perturb.diagnosis.measure import Attacked, Bench, Subject, digest
from learn2perturb.diagnosis.verdict import Draft, Statement, percent
from learn2perturb.engine.random import derive_seed, seed_everything
from learn2perturb.evaluation.intervals import Scores
from learn2perturb.evaluation.origin import identity_of
from learn2perturb.evaluation.passes import Model, checked_logits
from learn2perturb.evaluation.significance import TWO_SIGMA, beyond, exceeds

# name -> what it is; any other source that is given is used as well
SOURCES = {
    "undefended": "a network trained on clean images",
    "pgd_at": "a PGD-trained network",
    "twin": "an independent training of the same defense",
}
OWN = "own noise-off twin"
SURROGATE = "a surrogate trained on its answers"
NEW_BREAKS = 0.01
NOISE_OFF_BELOW = 0.05


def transferred(bench: Bench, sources: Mapping[str, Subject], quiet: Subject | None) -> dict[str, Attacked]:
    """Craft the reported attack on every source, score it on our model.

    ``quiet``: the model with its noise switched off, where that can be had, which gives one more source.
    """
    found = {}
    for name, source in {**({} if quiet is None else {OWN: quiet}), **sources}.items():
        # A source with noise costs a whole EOT attack; one without a twentieth of it.
        n = bench.budget.some if source.stochastic else bench.budget.images
        found[name] = bench.attacked(f"transfer from {name}", bench.attack, n, source=source, victim=bench.subject)
    return found


def surrogate(bench: Bench, images: Tensor) -> Subject:
    """Return a network trained on the model's own answers at and near ``images``: a source that is always there."""
    budget, attack, subject = bench.budget, bench.attack, bench.subject

    def learned(_: int) -> dict[str, Tensor]:
        with subject.ready() as model:
            network = distil(
                model, images, queries=budget.surrogate_queries, seed=derive_seed(bench.seed, "surrogate"),
                draws=budget.square_draws if subject.stochastic else 1, eps=attack.eps, norm=attack.norm,
                progress=bench.progress,
            )  # fmt: skip
        return network.state_dict()

    (weights,) = bench.each(learned, 1, ("surrogate", budget.surrogate_queries, digest(images)))
    network = Substitute.of(images, bench.num_classes)
    network.load_state_dict(weights)
    network.eval().requires_grad_(False)
    return Subject(network, stochastic=False, identity=identity_of(network))


def searched(bench: Bench, n: int) -> Attacked:
    """Run Square on the first ``n`` images."""
    budget, attack = bench.budget, bench.attack
    square = Square(attack.eps, norm=attack.norm, queries=budget.square_queries, eot=budget.square_draws)
    return bench.attacked("square", square, n)


def replaced(bench: Bench, model: Model, modules: str) -> dict[str, Attacked]:
    """Run the reported attack with the gradient of these submodules of ``model`` replaced by the identity's.

    ``model`` is ours as it was given: what asks it for values only has no submodules.
    """
    source = dataclasses.replace(bench.subject, model=model, gradient=True)
    name = f"BPDA through {modules}"
    return {name: bench.attacked(name, BPDA(attack=bench.attack, modules=modules), bench.budget.images, source=source)}


def descent(bench: Bench, name: str) -> Attacked:
    """Descend on values, whatever gradients the model has."""
    source = dataclasses.replace(bench.subject, gradient=False)
    return bench.attacked(name, bench.attack, bench.budget.images, source=source)


def rivals_of(
    square: Attacked, transfers: Mapping[str, Attacked], adaptive: Mapping[str, Attacked]
) -> dict[str, Attacked]:
    """Return all that the white-box attack is held against, as it is to be called."""
    return {**{f"transfer from {name}": one for name, one in transfers.items()}, "Square": square, **adaptive}


def blackbox(bench: Bench, own: Attacked, rivals: Mapping[str, Attacked], transfers: Mapping[str, Attacked]) -> Draft:
    """2: no attack without the model's gradients leaves less than the white-box attack."""
    square = rivals["Square"]
    missing = missing_sources(transfers)
    claims = tuple(not_beaten(name, rival, own.first(len(rival.x))) for name, rival in rivals.items())
    lowest = min(rivals, key=lambda name: rivals[name].accuracy)
    good = not_shown = ""
    if not transfers:
        not_shown = (
            f"Square leaves {percent(square.accuracy)}, the white-box attack "
            f"{percent(own.first(len(square.x)).mean())}; but no source to transfer from is there"
        )
    else:
        good = (
            f"the white-box attack leaves {percent(own.accuracy)}, the strongest black-box one ({lowest}) "
            f"{percent(rivals[lowest].accuracy)}"
        )
    evidence = {"white-box": own.accuracy} | {name: rival.accuracy for name, rival in rivals.items()}
    return Draft(2, good, claims, missing=missing, not_shown=not_shown, evidence=evidence)


def missing_sources(transfers: Mapping[str, Attacked]) -> tuple[str, ...]:
    """Return which of the usual sources were not given, in words."""
    return tuple(f"transfer from {name} ({what})" for name, what in SOURCES.items() if name not in transfers)


def not_beaten(name: str, rival: Attacked, own: Scores) -> Statement:
    """Claim that the white-box attack, which left ``own``, leaves no more than a rival without gradients."""
    return Statement(
        f"the white-box attack leaves no more than {name}",
        f"{name} leaves {percent(rival.accuracy)}, the white-box attack {percent(own.mean())}: the model's "
        "own gradients are worth less than none",
        own,
        rival.scores,
    )


def random_search(bench: Bench, reported: Attacked) -> Draft:
    """4: random points of the ball break hardly any image that gradients did not."""
    budget, attack = bench.budget, bench.attack
    n = budget.some
    y = bench.y[:n]
    held = bench.mean_margin("gradients judged", reported.x[:n], y, budget.judge_draws) < 0
    clean = bench.mean_margin("clean judged", bench.x[:n], y, budget.judge_draws) < 0
    left = held & clean
    count = int(left.sum())
    evidence = {"left by gradients": float(count), "samples": float(budget.samples)}
    if not count:
        return Draft(4, f"gradients left none of {n} images, so nothing remained to be searched", evidence=evidence)
    x, y = bench.x[:n][left], y[left]
    finalists = _best_samples(bench, x, y)
    judged = bench.each(
        lambda k: _margin(bench, f"finalist {k}", finalists[k], y), len(finalists), ("finalists", digest(finalists, y))
    )
    margins = torch.stack(judged)
    best = finalists[margins.argmax(dim=0), torch.arange(count, device=x.device)]
    # Judged once more by draws that chose nothing: the best of several means is too high by luck.
    broken = int((_margin(bench, "judged", best, y) > 0).sum())
    share = broken / count
    evidence |= {"broken": float(broken), "share": share}
    text = (
        f"{budget.samples} random points broke {broken} of the {count} images that gradients left ({attack.norm} ball)"
    )
    error = (max(share, NEW_BREAKS) * (1 - max(share, NEW_BREAKS)) / count) ** 0.5
    refuted = broken > 1 and exceeds(share, NEW_BREAKS, error) < TWO_SIGMA
    return Draft(
        4,
        text,
        wrong=(f"{text}, allowed 1 %: gradients miss what chance finds",) if refuted else (),
        evidence=evidence,
    )


def _best_samples(bench: Bench, x: Tensor, y: Tensor) -> Tensor:
    """Return the ``finalists`` random points of largest mean margin for each image, (F, n, C, H, W)."""
    budget, attack = bench.budget, bench.attack
    points = x.expand(budget.finalists, *x.shape).clone()
    margins = torch.full((budget.finalists, len(x)), -torch.inf, device=x.device, dtype=torch.float64)
    rows = torch.arange(len(x), device=x.device)

    def candidate(sample: int) -> Tensor:
        seed_everything(bench.seed, "random point", sample)
        return (x + BALLS[attack.norm].random(x, attack.eps)).clamp_(0, 1)

    def judged(sample: int) -> Tensor:
        found = _margin(bench, f"random point {sample}", candidate(sample), y, budget.sample_draws).double()
        bench.spend(len(x) * budget.sample_draws / 3, "random points", (sample + 1) / budget.samples)
        return found

    key = "random points", attack.norm, attack.eps, budget.sample_draws, digest(x, y)
    for sample, found in enumerate(bench.each(judged, budget.samples, key)):
        worst = margins.argmin(dim=0)
        better = found > margins[worst, rows]
        if bool(better.any()):  # drawn once more: kept, they would be so many times the images
            points[worst[better], rows[better]] = candidate(sample)[better]
            margins[worst[better], rows[better]] = found[better]
    return points


def _margin(bench: Bench, purpose: str, x: Tensor, y: Tensor, draws: int | None = None) -> Tensor:
    """Return the mean margin (n) of these images over fresh draws."""
    asked = bench.budget.judge_draws if draws is None else draws
    seed_everything(bench.seed, purpose)
    total = torch.zeros(len(x), device=x.device)
    with torch.no_grad(), bench.subject.ready() as model:
        for _ in range(asked if bench.subject.stochastic else 1):
            parts = [
                margin(checked_logits(model, images), labels)
                for images, labels in zip(x.split(bench.batch_size), y.split(bench.batch_size), strict=True)
            ]
            total += torch.cat(parts)
    return total


def noise_off(
    bench: Bench,
    reported: Attacked,
    sources: Mapping[str, Subject],
    transfers: Mapping[str, Attacked],
    quiet: Subject | None,
) -> Draft:
    """6: without its noise the network is no worse than PGD training or than with it, and does not betray the noisy."""
    if quiet is None:
        return Draft(
            6,
            not_shown="the model's noise cannot be switched off here: it is none of this package's; give its noise-off "
            "twin (noise_off=, --noise-off)",
            missing=("the noise-off twin",),
        )
    n = bench.budget.images
    off = bench.attacked("noise off", bench.attack, n, source=quiet, victim=quiet)
    transfer = transfers[OWN]
    own = f"examples of the noise-off twin leave {percent(transfer.accuracy)}, the white-box attack "
    own += percent(reported.accuracy)
    claims = [
        Statement(
            "the white-box attack leaves no more than transfer from the noise-off twin",
            f"{own}: the noise only hides the gradients",
            reported.first(len(transfer.x)),
            transfer.scores,
        )
    ]
    evidence = {"noise off": off.accuracy, "transfer": transfer.accuracy, "white-box": reported.accuracy}
    kept = f"with its noise off the network keeps {percent(off.accuracy)}, with it on {percent(reported.accuracy)}"
    # The lesser of the two: a network that is stronger without its noise does not live on it, however strong PGD is.
    name, baseline = "its own noise on", reported
    if "pgd_at" in sources:
        trained = bench.attacked("pgd_at itself", bench.attack, n, source=sources["pgd_at"], victim=sources["pgd_at"])
        evidence["pgd_at"] = trained.accuracy
        kept += f", PGD training {percent(trained.accuracy)}"
        if trained.accuracy < reported.accuracy:
            name, baseline = "PGD training", trained
    elif beyond(reported.accuracy - off.accuracy, NOISE_OFF_BELOW):
        return Draft(
            6,
            claims=tuple(claims),
            not_shown=f"{kept}; {own}; but no PGD-trained network is there to compare with",
            missing=(f"pgd_at ({SOURCES['pgd_at']})",),
            evidence=evidence,
        )
    claims.append(
        Statement(
            f"without its noise the network is at most 5 points below {name}",
            f"{kept}: it lives on its noise",
            baseline.scores,
            off.scores,
            NOISE_OFF_BELOW,
            strict=True,
        )
    )
    return Draft(6, f"{kept}; {own}", tuple(claims), evidence=evidence)
