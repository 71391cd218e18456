"""What a page is made of: records, views of studies, and run folders with their settings and metrics."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from learn2perturb import zoo
from learn2perturb.certification import Certification
from learn2perturb.diagnosis import Diagnosis
from learn2perturb.errors import CheckpointError, ConfigError
from learn2perturb.evaluation import AttackedImages, Evaluation
from learn2perturb.evaluation.attacked import beside
from learn2perturb.experiments.folder import CONTENTS, StudyFolder
from learn2perturb.experiments.view import View
from learn2perturb.reading import MOST_RECORD, MOST_SETTINGS, parse_json, parse_yaml, read_bytes, reading
from learn2perturb.runs.files import Weights
from learn2perturb.runs.noise_maps import FILE as NOISE_MAPS
from learn2perturb.runs.noise_maps import NoiseMaps

_KINDS: dict[str, type[Evaluation | Diagnosis | Certification | View]] = {
    kind.FORMAT: kind for kind in (Evaluation, Diagnosis, Certification, View)
}

_MOST = 1e300


@final
@dataclass(frozen=True)
class Training:
    """A run folder: its settings, a dictionary for each epoch, and maps of its noise or why they are not its own."""

    name: str
    config: dict[str, Any]
    epochs: tuple[dict[str, Any], ...]
    noise: NoiseMaps | None = None
    noise_misfit: str | None = None


@final
@dataclass(frozen=True)
class Material:
    """Everything that a page shows.

    Attributes:
        evaluations, diagnoses, certifications: records, each with the path that it was read from.
        trainings: run folders.
        views: tables and figures of studies, each once.
        studies: what folders of studies say of themselves.
        lost: records and run folders that a study was made of, and that are no longer where it says.
        images: path of a record -> the attacked images that are kept beside it.
        misfits: sentences on images that are not of the record that they lie beside.
        strangers: sentences on records and settings that are of other weights than those of the folder that they lie
            in, or of weights that nobody can read.
    """

    evaluations: list[tuple[str, Evaluation]] = field(default_factory=list)
    diagnoses: list[tuple[str, Diagnosis]] = field(default_factory=list)
    certifications: list[tuple[str, Certification]] = field(default_factory=list)
    trainings: list[Training] = field(default_factory=list)
    views: list[View] = field(default_factory=list)
    studies: list[StudyFolder] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    images: dict[str, AttackedImages] = field(default_factory=dict)
    misfits: list[str] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)

    @property
    def records(self) -> list[tuple[str, Evaluation | Diagnosis | Certification]]:
        """All records, each with the path that it was read from."""
        return [*self.evaluations, *self.diagnoses, *self.certifications]

    def __bool__(self) -> bool:
        return bool(self.evaluations or self.diagnoses or self.certifications or self.trainings or self.views)


def gather(sources: Iterable[str | os.PathLike[str]]) -> Material:
    """Return what the sources hold: records and views (JSON), run folders with every record in their ``evaluation``.

    ``zoo:NAME`` is the folder of a network that comes with the package.

    Of a folder of a study these are its views, and the records and run folders that it was made of.

    Raises:
        ConfigError: there is no such file, or nothing to show.
        CheckpointError: a record is damaged, or of a kind that has no page, or all are of other weights than lie there.
    """
    found = Material()
    for source in (Path(zoo.path_of(os.fspath(one))) for one in sources):
        if source.is_dir() and _format(source / CONTENTS) == StudyFolder.FORMAT:
            _gather_study(source, found)
        elif source.is_dir():
            _gather_run(source, found)
        elif source.is_file():
            _add(source, _format(source), found)
        else:
            raise ConfigError(
                f"{str(source)!r} is no run folder, no study and no record; give a folder of `train` or `study`, "
                "or a .json file"
            )
    if not found:
        if found.strangers:
            raise CheckpointError(" ".join(found.strangers))
        raise ConfigError(
            "there is nothing to show; give folders of runs or studies, or records of evaluate, diagnose and certify"
        )
    return found


def _gather_study(folder: Path, found: Material) -> None:
    """Add the views of a study, and the records and runs that they rest on."""
    study = StudyFolder.load(folder / CONTENTS)
    found.studies.append(study)
    for name in study.views:
        _add(folder / name, _format(folder / name), found)
    for name in study.records:
        path = folder / name
        if path.is_file():
            _add(path, _format(path), found)
        else:
            found.lost.append(name)
    for name in study.runs:
        if (folder / name).is_dir():
            _gather_run(folder / name, found)
        else:
            found.lost.append(name)


def _gather_run(folder: Path, found: Material) -> None:
    """Add a run folder, or a folder of records and views."""
    settings, metrics = folder / "config.yaml", folder / "metrics.jsonl"
    weights = Weights(folder.parent if folder.name == "evaluation" else folder)
    if settings.is_file():
        with reading(f"{settings} cannot be read", "restore it from a copy", CheckpointError):
            config = parse_yaml(read_bytes(settings, MOST_SETTINGS).decode())
        maps = folder / NOISE_MAPS
        noise = NoiseMaps.load(maps) if maps.is_file() else None
        reason = None if noise is None else weights.misfit({"weights": noise.weights})
        settled = config if isinstance(config, dict) else {}
        other = weights.stranger_to(settled)
        if other is not None:
            found.strangers.append(f"{settings} and the curves of its training are of another network: {other}.")
        noise = noise if reason is None else None
        found.trainings.append(Training(folder.name, settled, _epochs(metrics), noise, reason))
    known = {Path(path).resolve() for path, _ in found.records}
    for path in sorted({*folder.glob("*.json"), *folder.glob("evaluation/*.json")}):
        said = _format(path)
        if said in _KINDS and path.resolve() not in known:
            _add(path, said, found, weights)
    if weights.fault is not None:
        found.strangers.append(f"Nobody can tell whether the records in {folder} are of its weights: {weights.fault}.")


def _epochs(path: Path) -> tuple[dict[str, Any], ...]:
    """Return the lines of finished epochs; what a kill has torn, and what is no finite number, is left out."""
    lines = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = parse_json(text)
            except (ValueError, RecursionError):
                continue
            if isinstance(line, dict) and line.get("kind") == "epoch" and _is_epoch(line.get("epoch")):
                lines.append({key: value for key, value in line.items() if isinstance(value, dict) or _finite(value)})
    return tuple(lines)


def _is_epoch(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST


def _finite(value: Any) -> bool:
    # An integer of any length can be read, and none beyond floats can be drawn.
    return isinstance(value, int | float) and abs(value) < _MOST


def _format(path: Path) -> str:
    """Return what a file says it is; empty where it says nothing."""
    try:
        value = parse_json(read_bytes(path, MOST_RECORD))
    except (OSError, ValueError, RecursionError):
        return ""
    return str(value.get("format", "")) if isinstance(value, dict) else ""


def _add(path: Path, said: str, found: Material, weights: Weights | None = None) -> None:
    """Add the record at ``path``, which says that its format is ``said``, unless it is of other ``weights``."""
    if said not in _KINDS:
        raise CheckpointError(
            f"{path} is a {said or 'file of another kind'}, must be a record of evaluate, diagnose or certify, or a "
            "view of a study"
        )
    record = _KINDS[said].load(path)
    reason = weights.misfit(record.metadata) if weights is not None and not isinstance(record, View) else None
    if reason is not None:
        found.strangers.append(
            f"{path} is left out: {reason}. Run its command again for the weights here, or give the record itself."
        )
        return
    add_record(str(path), record, found)
    if isinstance(record, Evaluation):
        _add_images(path, record, found)


def add_record(path: str, record: object, found: Material) -> None:
    """Add a record that was read from ``path``."""
    if isinstance(record, Evaluation):
        found.evaluations.append((path, record))
    elif isinstance(record, Diagnosis):
        found.diagnoses.append((path, record))
    elif isinstance(record, View):
        found.views.append(record)
    elif isinstance(record, Certification):
        found.certifications.append((path, record))


def _add_images(path: Path, record: Evaluation, found: Material) -> None:
    """Add the images that are kept beside a record, if they are its own."""
    place = beside(path)
    if not place.exists():
        return
    images = AttackedImages.load(place)
    reason = images.misfit(record)
    if reason is None:
        found.images[str(path)] = images
    else:
        found.misfits.append(f"{place.name} is not of the record beside it and is left out: {reason}.")
