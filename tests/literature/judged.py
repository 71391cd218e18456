"""Diagnose the zoo: what each defense is, what is found of it, and a Markdown table of both."""

from __future__ import annotations

import functools
import time
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from learn2perturb.attacks import PGD, Square
from learn2perturb.data import load_data
from learn2perturb.diagnosis import Diagnosis, diagnose
from learn2perturb.engine.random import isolated_rng
from learn2perturb.errors import InputError
from learn2perturb.terminal import markdown_row
from tests.literature.networks import EPS, SOURCES, base, sources
from tests.literature.zoo import Entry

IMAGES = 200
DRAWS = 10
# Two standard errors of a difference on 200 images, most of which agree.
MISSED = 0.06
HEAD = ("defense", "paper", "kind", "adaptive", "reported", "lowest", "failed", "not shown", "verdict", "s")


@dataclass(frozen=True, eq=False)
class Judged:
    """An entry, its diagnosis (None where it was refused, and why), and the seconds that it took.

    A masked defense may pass every check only with a figure that attacks which know it confirm: without gradients, the
    attacks from values may be all that is needed.
    """

    entry: Entry
    found: Diagnosis | None
    refusal: str
    seconds: float

    def numbers(self, status: str) -> list[int]:
        """Return the checks of that status."""
        return [check.number for check in self.found.checks if check.status == status] if self.found else []

    @property
    def passed_all(self) -> bool:
        """Whether every check that applies passed."""
        return self.found is not None and not self.numbers("failed") and not self.numbers("not shown")

    @property
    def lowest(self) -> float:
        """Return the lowest accuracy that the diagnosis found."""
        return 1.0 if self.found is None else self.found.measurement(self.found.lowest).accuracy

    @functools.cached_property
    def wrong(self) -> str:
        """``false pass`` or ``false alarm``, or nothing."""
        if self.entry.kind == "masked":
            return "false pass" if self.passed_all and self.lowest > adaptive_accuracy(self.entry) + MISSED else ""
        failed = set(self.numbers("failed"))
        if self.entry.lives_on_noise:  # what check 6 is there to say
            failed.discard(6)
        return "false alarm" if failed or self.refusal else ""


def judged(entry: Entry, *, seed: int = 0, names: tuple[str, ...] = SOURCES, limit: int = IMAGES) -> Judged:
    """Return the quick diagnosis of ``entry``, with its noise-off twin and the sources of these names."""
    model, digits = entry.model(), load_data("digits", "test")
    quiet = None if entry.noise_off is None else entry.noise_off().eval()
    given = sources(names)
    started, found, refusal = time.perf_counter(), None, ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            found = diagnose(
                model, digits, eps=EPS, sources=given, noise_off=quiet, engine="plain", seed=seed, limit=limit,
                progress=False,
            )  # fmt: skip
        except InputError as error:
            refusal = str(error)
    return Judged(entry, found, refusal, time.perf_counter() - started)


@functools.cache
def adaptive_accuracy(entry: Entry, seed: int = 0) -> float:
    """Return what is left by the best of the attacks that know the defense, for each image, judged by fresh draws."""
    model, digits = entry.model(), load_data("digits", "test")
    rows = torch.arange(0, len(digits.labels), len(digits.labels) // IMAGES)[:IMAGES]
    x, y = digits.images[rows].float() / 255, digits.labels[rows]
    shown = model if entry.adaptive is None else entry.adaptive().eval()
    eot = DRAWS if entry.kind == "random" else 1
    gradients = [PGD(EPS, EPS / 8, 100, loss=loss, eot=eot, seed=seed) for loss in ("ce", "margin")]
    pool = [attack.craft(source, x, y) for attack in gradients for source in (shown, base("undefended"))]
    pool.append(Square(EPS, queries=1000, eot=1 if eot == 1 else 4, seed=seed).craft(model, x, y))
    with isolated_rng():
        torch.manual_seed(seed)
        chosen = torch.stack([_right(model, images, y) for images in pool]).argmin(dim=0)
        worst = torch.stack(pool)[chosen, torch.arange(len(y))]
        return float(_right(model, worst, y).mean())


def _right(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the share of fresh draws in which each image is right (n,)."""
    with torch.no_grad():
        return torch.stack([(model(x).argmax(dim=1) == y).float() for _ in range(DRAWS)]).mean(dim=0)


def row(judged: Judged, adaptive: float) -> str:
    """Return the row of the table."""
    entry, found = judged.entry, judged.found
    cells = [entry.name, entry.paper, entry.kind, f"{100 * adaptive:.1f}"]
    if found is None:
        return markdown_row((*cells, "", "", "", "", "refused", f"{judged.seconds:.0f}"))
    figures = [f"{100 * found.measurement(name).accuracy:.1f}" for name in ("reported", found.lowest)]
    checks = [", ".join(map(str, judged.numbers(status))) for status in ("failed", "not shown")]
    return markdown_row((*cells, *figures, *checks, judged.wrong or found.verdict, f"{judged.seconds:.0f}"))
