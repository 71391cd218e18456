"""What lies in the folder of a study: its views, and where the records and runs are that they rest on. No torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, final

from learn2perturb import records
from learn2perturb.experiments.results import Results

CONTENTS = "study.json"


@final
@dataclass(frozen=True)
class StudyFolder(records.Saved):
    """The contents of a folder of views.

    Attributes:
        notes: of the study.
        views: names of files in this folder, in the order of the study.
        records, runs: paths of records and run folders, relative to this folder.
        missing, wanted: cells without a record, and how many there are in all.
    """

    FORMAT: ClassVar[str] = "learn2perturb.study_folder"
    VERSION: ClassVar[int] = 1

    name: str
    title: str
    level: str | None
    notes: tuple[str, ...]
    views: tuple[str, ...]
    records: tuple[str, ...]
    runs: tuple[str, ...]
    missing: int
    wanted: int


def contents(results: Results, views: Sequence[str], folder: Path) -> StudyFolder:
    """Return what ``folder`` holds of a study, and where the rest is."""
    study = results.study
    runs = [place for run in study.runs if (place := results.folder(run)) is not None and place.is_dir()]
    paths = [answer.path for answer in results.answers if answer.path is not None]
    return StudyFolder(
        study.name, study.title, study.level, study.notes, tuple(views), _relative(paths, folder),
        _relative(runs, folder), results.missing, len(results.answers),
    )  # fmt: skip


def _relative(paths: Sequence[Path], folder: Path) -> tuple[str, ...]:
    """Return paths as seen from a folder, so that both may be moved together; one that is shared once."""
    return tuple(dict.fromkeys(Path(os.path.relpath(path, folder)).as_posix() for path in paths))
