"""What RobustBench wants to know of a model, filled from the records of a run; what they do not say stays null."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from learn2perturb.attacks import AutoAttack
from learn2perturb.data.cifar import PUBLISHED
from learn2perturb.engine import execution
from learn2perturb.evaluation.result import CLEAN, Evaluation, Row, format_eps
from learn2perturb.registry import DEFENSES, MODELS

FIELDS = (
    *("link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue", "architecture"),
    *("eps", "clean_acc", "reported", "autoattack_acc", "external", "footnote", "unreliable"),
)
_AUTOATTACK = AutoAttack.__name__
_NORM = "linf"  # of the eps that a run is trained for
# Settings of AutoAttack that are no budget: more draws in a gradient, or what they are averaged of, weaken nothing.
_FREE = ("eps", "norm", "seed", "eot", "eot_average")
_Found = tuple[Evaluation, Row]
_BY_HAND = ("link", "venue", "reported", "external", "unreliable")


@final
@dataclass(frozen=True)
class RobustBenchEntry:
    """The fields of a RobustBench model-info file, and why each one that is null is so."""

    info: dict[str, Any]
    notes: tuple[str, ...]


@final
@dataclass(frozen=True)
class _Threat:
    """What a row must be of, to say something of the network that is exported.

    ``weights`` maps the hash of weights to whether the noise of the rows that count is on: the rows of a noisy network
    with its noise off are those of the plain one.
    """

    weights: Mapping[str, bool]
    dataset: str | None
    predictor: str
    members: int | None
    eps: float | None

    def objections(self, evaluation: Evaluation, row: Row) -> list[str]:
        """Return why ``row`` says nothing of this network under this threat; nothing where it does."""
        found = [*self._to_record(evaluation, row)]
        # Without noise all predictors are one and the same.
        if row.stochastic and row.predictor != self.predictor:
            found.append(f"it is of predictor {row.predictor}, not {self.predictor}")
        elif row.stochastic and self.members is not None and row.members != self.members:
            found.append(f"it is of {row.members} passes an answer, not {self.members}")
        if row.attack_type == _AUTOATTACK:
            found += _to_attack(evaluation, row, self.eps)
        return found

    def _to_record(self, evaluation: Evaluation, row: Row) -> list[str]:
        metadata, found = evaluation.metadata, []
        weights = metadata.get("file") or metadata.get("weights")
        if weights is None:
            found.append("its record holds no hash of the weights (of an older version): evaluate again")
        elif weights not in self.weights:
            found.append(f"it is of other weights ({weights}, exported are {' or '.join(self.weights) or 'unknown'})")
        elif row.noise != self.weights[weights]:
            found.append(f"its noise was {'on' if row.noise else 'off'}")
        if self.dataset is None or metadata.get("data") != self.dataset:
            found.append(f"it is of {metadata.get('data')}, not of {self.dataset or 'a data set with a name'}")
        elif metadata.get("split") != "test" or row.n != PUBLISHED.get((self.dataset, "test"), (row.n,))[0]:
            total = PUBLISHED.get((self.dataset, "test"))
            count = f"the {total[0]:,} test images" if total else "all test images"
            found.append(f"it is of {row.n:,} images, not known to be {count} of {self.dataset}")
        return found


def _to_attack(evaluation: Evaluation, row: Row, eps: float | None) -> list[str]:
    found = []
    norm, size = row.parameters.get("norm"), row.eps
    if norm != _NORM:
        found.append(f"its norm is {norm}, not {_NORM}")
    if size is None or eps is None or not math.isclose(size, eps, abs_tol=1e-9):
        found.append(f"its eps is {format_eps(size) or 'not known'}, not {format_eps(eps) or 'known of the run'}")
    published = AutoAttack()
    for item in dataclasses.fields(published):
        wanted, used = getattr(published, item.name), row.parameters.get(item.name)
        if item.name not in _FREE and used != wanted:
            found.append(f"its {item.name} is {used!r}, not {wanted!r} as published")
    if evaluation.metadata.get("engine") not in (execution.PLAIN.name, execution.FAST32.name):
        found.append(
            f"it was crafted in execution mode {evaluation.metadata.get('engine')!r}, not in float32 ('plain')"
        )
    return found


def model_info(
    header: Mapping[str, Any],
    evaluations: Sequence[Evaluation],
    *,
    weights: Mapping[str, bool] | None = None,
    noise: bool = True,
) -> RobustBenchEntry:
    """Return a RobustBench model-info file, https://github.com/RobustBench/robustbench (model_info/).

    An accuracy is filled only from a record of exactly these weights, on all test images of the data set of the run,
    by its own predictor; that under AutoAttack only from version ``standard`` with its published budget, l_inf, at the
    ``eps`` of the run. Of several such rows the lowest counts.

    Args:
        header: that of the run's ``model.safetensors``: its network, defense, data set and config.
        evaluations: records to look in.
        weights: hash of the exported weights (``engine.identity``) -> whether the noise is on in the rows that count.
        noise: False describes the network without its noise.
    """
    config = header.get("config") or {}
    dataset, eps = header.get("dataset", config.get("dataset")), config.get("eps")
    sites = len(header.get("noise") or []) if noise else 0
    predictor = (header.get("predictor") if noise else None) or "single"
    members = None if predictor == "single" else header.get("members")
    threat = _Threat(weights or {}, dataset, predictor, members, eps)
    auto, no_auto = _lowest(threat, evaluations, _AUTOATTACK)
    clean, no_clean = _lowest(threat, evaluations, None, None if auto is None else auto[0].metadata.get("images"))
    info: dict[str, Any] = dict.fromkeys(FIELDS)
    info |= {
        "additional_data": False if dataset else None,  # a run reads one data set
        "number_forward_passes": _passes(predictor, members, clean),
        "dataset": dataset,
        "architecture": _architecture(header.get("registered_name")),
        "eps": format_eps(eps) or None,
        "clean_acc": _percent(clean),
        "autoattack_acc": _percent(auto),
        "footnote": _footnote(sites, clean, auto),
    }
    info |= _paper(header.get("defense", config.get("defense")))
    why = dict.fromkeys(_BY_HAND, "no record says it; fill it in by hand")
    why |= {"clean_acc": no_clean, "autoattack_acc": no_auto}
    notes = [f"{key} is null: {why.get(key, 'the run does not say')}" for key in FIELDS if info[key] is None]
    if sites:
        notes.append(
            f"RobustBench wants deterministic networks, and this one draws noise at {sites} sites; the plain network "
            "is another one, with accuracies of its own (--without-noise)"
        )
    return RobustBenchEntry(info, tuple(notes))


def _lowest(
    threat: _Threat, evaluations: Sequence[Evaluation], kind: str | None, images: str | None = None
) -> tuple[_Found | None, str]:
    """Return the row of lowest accuracy among those of ``kind`` (None: clean) that count, and why there is none."""
    found, reasons = [], []
    for evaluation in evaluations:
        for row in evaluation.rows:
            if row.attack_type != kind or (kind is None and row.attack != CLEAN):
                continue
            objections = threat.objections(evaluation, row)
            if images is not None and evaluation.metadata.get("images") != images:
                objections.append("it is of other images than the attacked ones")
            if objections:
                reasons.append(f"{row.label} of {evaluation.metadata.get('model')}: {', '.join(objections)}")
            else:
                found.append((evaluation, row))
    if not found:
        return None, "; ".join(dict.fromkeys(reasons)) or f"no record has a row of {kind or CLEAN}"
    return min(found, key=lambda pair: pair[1].accuracy), ""


def _passes(predictor: str, members: int | None, clean: _Found | None) -> int | None:
    """Return how many passes one answer takes."""
    if predictor == "single":
        return 1
    return members if clean is None else clean[1].members


def _percent(found: _Found | None) -> str | None:
    return None if found is None else f"{100 * found[1].accuracy:.2f}"


def _architecture(name: str | None) -> str | None:
    return MODELS.entry(name).about if name is not None and name in MODELS else name


def _paper(defense: str | None) -> dict[str, str | None]:
    """Return title and authors of the defense's paper, registered as ``Authors, title``."""
    if defense is None or defense not in DEFENSES:
        return {"name": defense}
    entry = DEFENSES.entry(defense)
    authors, together, title = entry.paper.partition(" et al., ")
    return {"name": title, "authors": f"{authors} et al."} if together else {"name": entry.paper or entry.about}


def _footnote(sites: int, clean: _Found | None, auto: _Found | None) -> str | None:
    """Say what the numbers do not: the noise, how many images and draws, and what AutoAttack it was."""
    parts = []
    if sites:
        parts.append(f"Randomised: noise at {sites} sites, on at test time.")
    if clean is not None:
        row = clean[1]
        draws = f", mean of {row.draws} draws" if row.draws > 1 else ""
        parts.append(f"Clean accuracy on {row.n} images{draws}.")
    if auto is not None:
        row = auto[1]
        draws = f", mean of {row.draws} draws" if row.draws > 1 else ""
        parts.append(
            f"AutoAttack {row.parameters['version']}, {_NORM} {format_eps(row.eps)}, on {row.n} images{draws}."
        )
    return " ".join(parts) or None
