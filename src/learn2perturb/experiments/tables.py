"""Tables 3, 5 and 6 of the Learn2Perturb paper on whatever networks are trained, resumable cell by cell."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from learn2perturb import records
from learn2perturb.attacks import CW, FGSM, PGD, Attack, FewPixel, Source, Transfer
from learn2perturb.attacks.base import Model
from learn2perturb.errors import CheckpointError, ConfigError, DataError
from learn2perturb.evaluation import Evaluation, Interval, evaluate
from learn2perturb.evaluation.config import EvaluateConfig
from learn2perturb.experiments.facts import PAPER_EOT, Published, of_trained_runs
from learn2perturb.noise import is_stochastic
from learn2perturb.progress import Progress, shown
from learn2perturb.terminal import markdown_row

KAPPAS = (0.0, 0.1, 1.0, 2.0, 5.0)
PIXELS = (1, 2, 3)


@dataclass(frozen=True, eq=False)
class Trained:
    """A network to be put into a table.

    Attributes:
        name: of the run.
        defense, network: registered names, by which the paper's number is found; empty if unknown.
        model: the network itself, or any callable from images to logits.
        data: the images it is scored on.
        eps: the radius it was trained for, which table 6 attacks with.
        identity: changes when the weights do; a cell is computed anew then.
    """

    name: str
    defense: str
    network: str
    model: Model
    data: Any
    eps: float
    identity: str = ""


@dataclass(frozen=True)
class Cell:
    """One number, ours beside the paper's. ``labels`` name it; ``record`` is the evaluation it was read from."""

    labels: dict[str, str]
    accuracy: float
    std: float | None
    interval: Interval
    n: int
    l2: float
    paper: Published | None
    record: str


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper computed on trained networks: cells in order, and what differs from the paper's protocol."""

    FORMAT: ClassVar[str] = "learn2perturb.paper_table"
    VERSION: ClassVar[int] = 1

    name: str
    title: str
    cells: tuple[Cell, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return markdown(self)


@dataclass(frozen=True, eq=False)
class _Planned:
    labels: dict[str, str]
    target: Trained
    attack: Attack
    names: dict[str, str]  # of the paper's cell
    source: str = ""


def reproduce(
    table: str,
    runs: Sequence[Trained],
    out: Path,
    *,
    settings: Mapping[str, Any] | None = None,
    limit: int | None = None,
    draws: int = EvaluateConfig.draws,
    eot: int = PAPER_EOT,
    seed: int = EvaluateConfig.seed,
    batch_size: int = EvaluateConfig.batch_size,
    engine: str = EvaluateConfig.engine,
    progress: Progress | bool | None = True,
) -> PaperTable:
    """Compute ``table3`` (C&W), ``table5`` (few pixels) or ``table6`` (transfer) on ``runs``; write it into ``out``.

    A cell that ``out`` holds already, of the same weights, attack, images and seed, is read and not computed again.

    Args:
        table: its name.
        runs: trained networks; table 6 takes all ordered pairs of them.
        out: a folder: ``TABLE.json``, ``TABLE.md``, and the evaluation of each cell in ``cells/``.
        settings: replaces settings of the attacks, such as ``{"steps": 100}``; the notes say so.
        limit: so many images only, balanced over the classes.
        draws: scorings with fresh draws.
        eot: draws averaged by the attacks on a stochastic network.
        seed: of attacks and scoring.
        batch_size: images in a pass.
        engine: the gear that attacks craft in.
        progress: as that of :func:`learn2perturb.evaluation.evaluate`.

    Raises:
        ConfigError: a setting is not allowed, or table 6 has fewer than two runs.
        UnknownNameError: no such table.
        DataError: the runs of table 6 have images of different sizes.
    """
    facts = of_trained_runs(table)
    if not runs:
        raise ConfigError("no run is given; give at least one that is trained")
    doubles = sorted({run.name for run in runs if sum(other.name == run.name for other in runs) > 1})
    if doubles:
        raise ConfigError(f"{', '.join(doubles)} is given twice; give each run once")
    changed = dict(settings or {})
    planned = list(_PLANS[table](runs, changed, eot))
    common: dict[str, Any] = {"limit": limit, "draws": draws, "seed": seed}
    cells = []
    with shown(progress) as told:
        for number, plan in enumerate(planned, start=1):
            what = f"cell {number}/{len(planned)}: {', '.join(plan.labels.values())}"
            path = out / "cells" / _file_name(plan, common)
            evaluation = _stored(path)
            if evaluation is None:
                evaluation = evaluate(
                    plan.target.model, plan.target.data, {"attack": plan.attack}, noise_off=False,
                    batch_size=batch_size, engine=engine, name=plan.target.name, progress=_labelled(told, what),
                    **common,
                )  # fmt: skip
                evaluation.save(path)
            row = evaluation.row("attack")
            paper = facts.cell(**plan.names) if _is_of_the_paper(plan.target, facts.dataset) else None
            score = row.accuracy, row.std, row.interval, row.n, row.l2
            cells.append(Cell(plan.labels, *score, paper, f"cells/{path.name}"))
    result = PaperTable(table, facts.title, tuple(cells), tuple(_notes(table, cells, changed, limit, eot)))
    records.save(out / f"{table}.json", result)
    records.atomic_write(out / f"{table}.md", markdown(result))
    return result


def _labelled(progress: Progress, what: str) -> Progress:
    return lambda done, total, _: progress(done, total, what)


def _is_of_the_paper(run: Trained, dataset: str) -> bool:
    return getattr(run.data, "name", None) == dataset


def _made(kind: type[Attack], settings: Mapping[str, Any], **own: Any) -> Attack:
    """Return the attack with its own settings, and those of the user's that it knows."""
    known = {item.name for item in dataclasses.fields(kind)}
    unknown = sorted(settings.keys() - known)
    if unknown:
        raise ConfigError(f"{kind.__name__} has no setting {', '.join(unknown)}; it has: {', '.join(sorted(known))}")
    return kind(**{**own, **settings})


def _table3(runs: Sequence[Trained], settings: Mapping[str, Any], eot: int) -> Iterator[_Planned]:
    for run, kappa in itertools.product(runs, KAPPAS):
        random = isinstance(run.model, nn.Module) and is_stochastic(run.model)
        # The paper keeps what one draw let pass; beside it what stands over fresh draws.
        for keep, protocol in (("single", "one draw (paper)"), ("mean", "mean of fresh draws"))[not random :]:
            attack = _made(CW, settings, confidence=kappa, keep=keep, eot=eot)
            labels = {"run": run.name, "kappa": f"{kappa:g}", "kept by": protocol if random else "no noise"}
            yield _Planned(labels, run, attack, {"kappa": f"{kappa:.1f}", "defense": run.defense})


def _table5(runs: Sequence[Trained], settings: Mapping[str, Any], eot: int) -> Iterator[_Planned]:
    for run, pixels in itertools.product(runs, PIXELS):
        attack = _made(FewPixel, settings, eps=pixels, eot=eot)
        names = {"network": run.network, "pixels": str(pixels), "defense": run.defense}
        yield _Planned({"run": run.name, "pixels": str(pixels)}, run, attack, names)


def _table6(runs: Sequence[Trained], settings: Mapping[str, Any], eot: int) -> Iterator[_Planned]:
    if len(runs) < 2:
        raise ConfigError(f"table6 needs at least two runs, a source and a target, got {len(runs)}; give more")
    shapes = {tuple(run.data.input_shape) for run in runs}
    if len(shapes) > 1:
        raise DataError(
            f"the runs of table6 have images of different sizes, {sorted(shapes)}; give runs of one data set"
        )
    for source, target in itertools.permutations(runs, 2):
        crafted = {"fgsm": FGSM(target.eps, eot=eot), "pgd": _made(PGD, settings, eps=target.eps, eot=eot)}
        for name, attack in crafted.items():
            transfer = Transfer(attack=attack, source=Source(source.model, source.name))
            names = {"network": target.network, "source": source.defense, "defense": target.defense, "attack": name}
            if source.network != target.network:
                names["network"] = ""  # the paper's pairs are of one network
            labels = {"source": source.name, "target": target.name, "attack": name}
            yield _Planned(labels, target, transfer, names, source=source.identity)


_PLANS: dict[str, Callable[[Sequence[Trained], Mapping[str, Any], int], Iterator[_Planned]]] = {
    "table3": _table3,
    "table5": _table5,
    "table6": _table6,
}


def _file_name(plan: _Planned, common: Mapping[str, Any]) -> str:
    """Return a name that is readable, and another one for any other weights, attack, images or seed."""
    data = getattr(plan.target.data, "name", "")
    key = [plan.labels, plan.target.identity, plan.source, records.plain(plan.attack), type(plan.attack).__name__, data]
    # Earlier versions took the first images: what they stored is of others.
    key += ["balanced"] if common.get("limit") else []
    digest = hashlib.sha256(json.dumps([key, dict(common)], sort_keys=True).encode()).hexdigest()[:12]
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(plan.labels.values())).strip("-")[-80:]
    return f"{readable}-{digest}.json"


def _stored(path: Path) -> Evaluation | None:
    """Return the evaluation in ``path``; None where there is none, or a damaged one, which is made anew."""
    if not path.exists():
        return None
    try:
        return Evaluation.load(path)
    except CheckpointError:
        return None


def _notes(
    table: str, cells: Sequence[Cell], settings: Mapping[str, Any], limit: int | None, eot: int
) -> Iterator[str]:
    yield (
        "Accuracy in %, over all images (the paper does not say); intervals of 95 % over images and draws; fresh draws "
        "score."
    )
    if settings:
        text = ", ".join(f"{name}={value}" for name, value in settings.items())
        yield f"Other settings than the paper's: {text}."
    if limit is not None:
        yield f"{limit} images only, balanced over the classes."
    if eot > 1:
        yield f"The attacks average {eot} draws; the paper's do not."
    for cell in cells:
        if cell.paper is not None and cell.paper.suspect is not None:
            where = ", ".join(cell.labels.values())
            yield f"suspect: {where}, paper {100 * cell.paper.mean:.2f}: {cell.paper.suspect}."
    if table == "table3":
        yield "The paper does not state the network of table 3; its numbers stand beside any."


def markdown(table: PaperTable) -> str:
    """Return the table in Markdown, the paper's number beside ours."""
    if not table.cells:
        return f"# {table.name}: {table.title}\n"
    names = list(table.cells[0].labels)
    least = table.name == "table3"
    head = [*names, "ours %", "interval", *(["mean l2"] if least else []), "paper %", "n"]
    lines = [f"# {table.name}: {table.title}", "", markdown_row(head), "|" + "---|" * len(head)]
    for cell in table.cells:
        ours = f"{100 * cell.accuracy:.2f}" + ("" if cell.std is None else f" +- {100 * cell.std:.2f}")
        interval = f"[{100 * cell.interval.low:.2f}, {100 * cell.interval.high:.2f}]"
        paper = "" if cell.paper is None else str(cell.paper)
        words = [*cell.labels.values(), ours, interval, *([f"{cell.l2:.3f}"] if least else []), paper, str(cell.n)]
        lines.append(markdown_row(words))
    return "\n".join([*lines, "", *(f"- {note}" for note in table.notes), ""])
