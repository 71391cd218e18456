"""AutoAttack: strong attacks in a fixed order, each image's worst; stochastic models are judged by many draws."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from learn2perturb.attacks.apgd import APGD
from learn2perturb.attacks.base import Attack
from learn2perturb.attacks.fab import FAB
from learn2perturb.attacks.inputs import check_images
from learn2perturb.attacks.losses import margin
from learn2perturb.attacks.probing import apart, passes_differ
from learn2perturb.attacks.query import Model, Query
from learn2perturb.attacks.runs import best_of, per_image
from learn2perturb.attacks.square import Square
from learn2perturb.checks import check_choice, check_count
from learn2perturb.engine import execution
from learn2perturb.engine.answers import logits_of
from learn2perturb.engine.modes import in_mode, own_modes
from learn2perturb.engine.random import derive_seed, isolated_rng, seed_everything

VERSIONS = ("standard", "rand")


@final
@dataclass(frozen=True)
class AutoAttack(Attack):
    """``standard``: APGD-CE, APGD-T, FAB-T, Square. ``rand``: APGD-CE and APGD-DLR, for stochastic models, with EOT.

    Croce, Hein, Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks, 2020,
    https://arxiv.org/abs/2003.01690. On a deterministic model each part gets the images that the ones before left
    standing. On a stochastic model every part attacks every image, and each image keeps the point that fools most of
    ``draws`` fresh passes, then that of largest mean margin; see :func:`auto_attack_report` for the published protocol.

    Attributes:
        version: ``"standard"`` or ``"rand"`` (published with ``eot=20``, so registered as ``autoattack_rand``).
        steps, targets, queries: gradients of an APGD or FAB run, wrong classes of the targeted parts, Square's budget.
        draws: fresh passes that choose among the parts' points, on a stochastic model.
    """

    loss: str = field(default="margin", kw_only=True)
    version: Literal["standard", "rand"] = field(default="standard", kw_only=True)
    steps: int = field(default=100, kw_only=True)
    targets: int = field(default=9, kw_only=True)
    queries: int = field(default=5000, kw_only=True)
    draws: int = field(default=20, kw_only=True)

    can_target: ClassVar[bool] = False
    losses: ClassVar[tuple[str, ...]] = ("margin",)  # what judges; each part has its own

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("version", self.version, VERSIONS)
        for name in ("steps", "targets", "queries", "draws"):
            check_count(name, getattr(self, name))

    def parts(self, num_classes: int) -> dict[str, Attack]:
        """Return the attacks in order; with fewer classes than DLR needs, the margin takes its place."""
        shared: dict[str, Any] = {"norm": self.norm, "eot": self.eot, "eot_average": self.eot_average}
        first = APGD(self.eps, self.steps, loss="ce", **shared)
        if self.version == "rand":
            dlr = "dlr" if num_classes >= 3 else "margin"
            return {"apgd-ce": first, "apgd-dlr": dataclasses.replace(first, loss=dlr)}
        dlr = "dlr" if num_classes >= 4 else "margin"
        return {
            "apgd-ce": first,
            "apgd-t": dataclasses.replace(first, loss=dlr, targets=self.targets),
            "fab-t": FAB(self.eps, steps=self.steps, targets=self.targets, early_stop=True, **shared),
            # As published: the schedule of 10,000 queries, cut off.
            "square": Square(self.eps, queries=self.queries, rescale=False, **shared),
        }

    @property
    def drops(self) -> bool:
        """Whether images of a deterministic model leave once they are broken."""
        return True

    def perturb(self, query: Query, x: Tensor, y: Tensor) -> Tensor:
        """Return the worst of the parts' points."""
        drop = query.deterministic(x)

        parts = list(self.parts(query.num_classes(x)).values())

        def run(left: Tensor, some: range) -> tuple[Tensor, Tensor]:
            part, images, labels = parts[some.start], x[left], y[left]
            with query.part(part) as own:
                candidate = part.search(own, images, labels)
            if not drop:
                return candidate, torch.zeros(len(left), dtype=torch.bool, device=x.device)
            return candidate, query.broken(candidate, labels, query.score(candidate, labels, 1))

        return best_of(query, x, y, run, len(parts), drop=drop, draws=1 if drop else self.draws)


@final
@dataclass(frozen=True, eq=False)
class AutoAttackReport:
    """What AutoAttack leaves of N images, judged by M fresh draws and, beside it, as published.

    Attributes:
        attack: the spec.
        stochastic: whether two passes over the same images differ.
        draws: M; 1 for a deterministic model.
        clean: accuracy before the attack, mean over M draws.
        parts: name -> accuracy (mean over M draws) on that part's points; on a deterministic model, after that part.
        accuracy, std: mean and standard deviation over M draws, none of which chose the points.
        headline: the published protocol: the share of images that are right in one draw before the attack and in one
            at the points of every part. One unlucky draw counts as a break, so it is the worst of several draws.
        x_adv: (N, C, H, W) the worst points.
        correct: (M, N) bool, at ``x_adv``.
    """

    attack: AutoAttack
    stochastic: bool
    draws: int
    clean: float
    parts: dict[str, float]
    accuracy: float
    std: float
    headline: float
    x_adv: Tensor
    correct: Tensor

    def __str__(self) -> str:
        rows = [("clean", self.clean), *self.parts.items(), ("all, each image's worst", self.accuracy)]
        if self.stochastic:
            rows.append(("published headline: any one wrong draw", self.headline))
        width = max(len(name) for name, _ in rows)
        count = f"{len(self.x_adv)} images, mean of {self.draws} fresh draws" if self.stochastic else "deterministic"
        lines = [f"AutoAttack {self.attack.version}, {self.attack.norm} {self.attack.eps:.4g}: {count}"]
        return "\n".join(lines + [f"  {name.ljust(width)}  {value:.1%}" for name, value in rows])


@own_modes()
def auto_attack_report(
    model: Model, x: Tensor, y: Tensor, attack: AutoAttack, *, draws: int = 20, batch_size: int = 256
) -> AutoAttackReport:
    """Attack ``x`` (N, C, H, W) with labels ``y`` (N,), ``batch_size`` images at a time, and report both protocols.

    Points are chosen by ``attack.draws`` fresh draws and judged by ``draws`` others. With a seed in ``attack`` the
    report is a function of it; every batch and part has a stream of its own.

    Raises:
        InputError: images, labels or logits are not as an attack wants them.
    """
    check_count("draws", draws)
    check_count("batch_size", batch_size)

    def margins(images: Tensor, labels: Tensor, count: int, *purpose: int | str) -> Tensor:
        """Return (count, n) margins, positive where the prediction is wrong."""
        stream = _stream(attack.seed, "judge", *purpose)
        with stream, in_mode(model, False), torch.no_grad(), execution.full_precision():
            return torch.stack([margin(logits_of(model, images), labels) for _ in range(count)])

    def seeded(part: Attack, *purpose: int | str) -> Attack:
        return part if attack.seed is None else dataclasses.replace(part, seed=derive_seed(attack.seed, *purpose))

    check_images(model, x, y)
    with in_mode(model, False):
        stochastic = passes_differ(lambda images: logits_of(model, images), x)
        with apart("probe"):
            names = attack.parts(logits_of(model, x[:1]).shape[1])
    draws, choosing = (draws, attack.draws) if stochastic else (1, 1)
    totals: dict[str, list[Tensor]] = {name: [] for name in ("clean", *names, "worst", "headline", "x_adv")}
    for batch, (images, labels) in enumerate(zip(x.split(batch_size), y.split(batch_size), strict=True)):
        clean = margins(images, labels, draws, "clean", batch) <= 0
        totals["clean"].append(clean)
        worst = images.detach().clone()
        share, mean = (torch.full((len(images),), -torch.inf, device=x.device) for _ in range(2))
        standing = clean[0].clone()
        left = standing.clone() if not stochastic else torch.ones_like(standing)
        for name, part in names.items():
            points = worst.clone()
            if bool(left.any()):
                points[left] = seeded(part, name, batch).run(model, images[left], labels[left]).x_adv
            chosen = margins(points, labels, choosing, name, batch)
            wrong, gap = (chosen > 0).float().mean(dim=0), chosen.mean(dim=0)
            better = torch.where(wrong == share, gap > mean, wrong > share)
            worst = torch.where(per_image(better), points, worst)
            share, mean = torch.where(better, wrong, share), torch.where(better, gap, mean)
            totals[name].append(margins(points, labels, draws, name, batch, "scored") <= 0)
            standing &= chosen[0] <= 0
            if not stochastic:
                left = standing.clone()
        totals["worst"].append(margins(worst, labels, draws, "worst", batch) <= 0)
        totals["headline"].append(standing)
        totals["x_adv"].append(worst)

    def accuracy(name: str) -> float:
        return torch.cat(totals[name], dim=-1).double().mean().item()

    correct = torch.cat(totals["worst"], dim=1)
    each = correct.double().mean(dim=1)
    return AutoAttackReport(
        attack, stochastic, draws, accuracy("clean"), {name: accuracy(name) for name in names}, accuracy("worst"),
        each.std().item() if len(each) > 1 else 0.0, accuracy("headline"), torch.cat(totals["x_adv"]), correct,
    )  # fmt: skip


@contextlib.contextmanager
def _stream(seed: int | None, *purpose: int | str) -> Iterator[None]:
    """Draw from a stream of its own, if there is a seed; else from torch's generator."""
    if seed is None:
        yield
        return
    with isolated_rng():
        seed_everything(seed, *purpose)
        yield
