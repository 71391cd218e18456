"""The store: trained networks and records, each under an address that follows from what it is. A plain folder.

::

    runs/NAME-ADDRESS/            run folder; model.safetensors and finished.json once it is trained
    cells/WEIGHTS/NAME-ADDRESS.json  Evaluation, Certification or Diagnosis; with NAME-ADDRESS.images.npz beside it
    events.jsonl                  a line for everything that was begun and that ended: where, how long
    locks/                        who is at work on what; a lock goes with its process

It may be copied while nothing is at work in it, and merged with another (:meth:`Store.merge`).
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from learn2perturb.certification.record import Certification
from learn2perturb.data.transforms import Transforms
from learn2perturb.diagnosis.record import Diagnosis
from learn2perturb.errors import CheckpointError, ConfigError
from learn2perturb.evaluation.attacked import beside
from learn2perturb.evaluation.own_parts import named_parts, own_parts
from learn2perturb.evaluation.result import Evaluation
from learn2perturb.naming import function_of, is_factory
from learn2perturb.plugins import PARTS, codes_of
from learn2perturb.reading import MOST_RECORD, parse_json, read_bytes, reading
from learn2perturb.records import Saved, atomic_write, make_folder, plain
from learn2perturb.registry import DEFENSES, MODELS, NOISES
from learn2perturb.runs.lock import taken
from learn2perturb.training.config import TrainConfig

# Raised whenever the same settings give other numbers than before: what is in a store then stays for what it was.
NUMERICS = 1
FINISHED = "finished.json"
MODEL = "model.safetensors"
# What a training is not changed by.
_FREE = ("data_dir", "download", "device", "tensorboard", "loggers", "log_every", "checkpoint_minutes")
RECORDS: Mapping[str, type[Saved]] = {
    "accuracy": Evaluation, "certificate": Certification, "diagnosis": Diagnosis,
}  # fmt: skip


def address(**facts: Any) -> str:
    """Return 16 hexadecimal digits that follow from ``facts``, plain values, and from the numeric version."""
    text = json.dumps({"numerics": NUMERICS, **plain(facts)}, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def run_address(config: TrainConfig, data: str) -> str:
    """Return the address of a training: of its resolved config, its data, and the code of the user's own parts."""
    settings = {key: value for key, value in config.deciding().items() if key not in _FREE}
    return address(kind="run", config=settings, data=data, **code_in_address(parts_of(config)))


def parts_of(config: TrainConfig) -> dict[str, Any]:
    """Return the user's own parts that a training follows from, beside its data."""
    laws = [(NOISES, value) for value in config.options.values()]
    named = named_parts((DEFENSES, config.defense), (MODELS, config.model), *laws)
    functions: list[Any] = [] if not is_factory(config.model) else [function_of(config.model)]
    functions += [] if config.transforms is None else [step for _, step in Transforms(config.transforms).steps]
    return {PARTS: named + own_parts(others=functions).get(PARTS, [])}


def code_in_address(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``{"code": ...}`` of parts for an address; nothing where all are of this package."""
    codes = {name: code for one in parts for name, code in codes_of(one).items()}
    return {"code": codes} if codes else {}


@final
@dataclass(frozen=True)
class Finished:
    """What is known of a network that is trained: the hash of its weights, how long it took, where."""

    weights: str
    step: int | None
    seconds: float
    where: Mapping[str, Any]


@final
class Store:
    """A folder of trained networks and records."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"store {self.folder} is a file; give a folder")

    # --- trainings

    def run(self, config: TrainConfig, key: str) -> Path:
        """Return the run folder of a training."""
        return self.folder / "runs" / f"{_slug(_name(config))}-{key}"

    def finished(self, folder: Path) -> Finished | None:
        """Return what is known of a trained network; None while it is not finished.

        Raises:
            CheckpointError: what is there is damaged.
        """
        path = folder / FINISHED
        if not path.exists() or not (folder / MODEL).exists():
            return None
        with reading(f"{path} is damaged", f"remove {folder}, and it is trained again", CheckpointError):
            values = parse_json(read_bytes(path, MOST_RECORD))
            found = Finished(values["weights"], values["step"], float(values["seconds"]), dict(values["where"]))
            if not isinstance(found.weights, str):
                raise ValueError("weights is no text")
        return found

    def finish(self, folder: Path, model: Path, facts: Finished) -> None:
        """Keep the last weights of a training, and drop what only resuming needs."""
        atomic_write(folder / MODEL, model.read_bytes())
        atomic_write(folder / FINISHED, json.dumps(plain(facts), indent=1))
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    # --- records

    def cell(self, network: str, name: str, key: str) -> Path:
        """Return where the record of a cell is, whether or not it is there."""
        return self.folder / "cells" / _slug(network) / f"{_slug(name)}-{key}.json"

    def record(self, path: Path, kind: str) -> Saved | None:
        """Return a record; None where there is none, or a damaged one, which is to be computed anew."""
        if not path.exists():
            return None
        try:
            return RECORDS[kind].load(path)
        except CheckpointError:
            return None

    # --- who is at work, and what was done

    @contextlib.contextmanager
    def held(self, key: str) -> Iterator[bool]:
        """Hold an address for the body; False if another process has it."""
        place = make_folder(self.folder / "locks") / key
        with taken(place) as mine:
            yield mine

    def note(self, what: str, key: str, title: str, **facts: Any) -> None:
        """Add a line to ``events.jsonl``: ``begun``, ``ended``, ``stopped``, ``failed``."""
        line = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "what": what, "address": key,
            "title": title, "process": os.getpid(), "host": platform.node(), **facts,
        }  # fmt: skip
        make_folder(self.folder)
        # One write of a short line: lines of several processes do not mix.
        descriptor = os.open(self.folder / "events.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(descriptor, (json.dumps(line) + "\n").encode())
        finally:
            os.close(descriptor)

    def events(self) -> list[dict[str, Any]]:
        """Return the lines of ``events.jsonl``; a torn last line is left out."""
        path = self.folder / "events.jsonl"
        if not path.exists():
            return []
        found = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict):
                    found.append(event)
        return found

    # --- the whole

    def merge(self, other: Store) -> tuple[int, list[str]]:
        """Add what ``other`` holds and this store does not; return the number of files, and what was left out and why.

        A training that both have, with other weights (another machine rounds otherwise), stays as it is here; the
        records of the other's weights come along, under addresses of their own.
        """
        added, left = 0, []
        for folder in sorted((other.folder / "runs").glob("*/")):
            theirs = other.finished(folder)
            place = self.folder / "runs" / folder.name
            ours = self.finished(place) if place.exists() else None
            if ours is not None:
                if theirs is not None and theirs.weights != ours.weights:
                    left.append(f"{folder.name} was trained in both, to other weights; those of {self.folder} stay")
                continue
            if theirs is None and place.exists():
                left.append(f"{folder.name} is unfinished in both; that of {self.folder} stays")
                continue
            with self.held(_address_of(folder)) as mine:
                if not mine:
                    left.append(f"{folder.name} is at work in {self.folder}; merge again when it has ended")
                    continue
                shutil.rmtree(place, ignore_errors=True)
                added += _copied(folder, place)
        for path in sorted((other.folder / "cells").rglob("*.json")):
            place = self.folder / path.relative_to(other.folder)
            if not place.exists():
                images = beside(path)
                if images.exists():
                    atomic_write(beside(place), images.read_bytes())
                atomic_write(place, path.read_bytes())
                added += 1
        lines = {json.dumps(event, sort_keys=True) for event in self.events()}
        new = [event for event in other.events() if json.dumps(event, sort_keys=True) not in lines]
        if new:
            every = sorted([*self.events(), *new], key=lambda event: str(event.get("date")))
            atomic_write(self.folder / "events.jsonl", "".join(json.dumps(event) + "\n" for event in every))
        return added, left

    def collect(self, wanted: Iterable[Path], *, dry: bool = False) -> list[Path]:
        """Remove the run folders and records that are not ``wanted``; return them. What is at work stays."""
        keep = set(wanted)
        gone = []
        for path in [*sorted((self.folder / "runs").glob("*/")), *sorted((self.folder / "cells").rglob("*.json"))]:
            if path in keep:
                continue
            with contextlib.nullcontext(True) if dry else self.held(_address_of(path)) as mine:
                if not mine:
                    continue
                gone.append(path)
                if not dry:
                    if path.is_dir():
                        shutil.rmtree(path)
                    else:
                        path.unlink()
                        beside(path).unlink(missing_ok=True)
        if not dry:
            for folder in (self.folder / "cells").glob("*/"):
                with contextlib.suppress(OSError):
                    folder.rmdir()  # if it is empty
        return gone


def _copied(source: Path, target: Path) -> int:
    """Copy a run folder, what marks it as finished last; return the number of files."""
    paths = sorted((path for path in source.rglob("*") if path.is_file() and not path.name.startswith(".")),
                   key=lambda path: path.name == FINISHED)  # fmt: skip
    for path in paths:
        atomic_write(target / path.relative_to(source), path.read_bytes())
    return len(paths)


def _address_of(path: Path) -> str:
    return path.name.removesuffix(".json").rpartition("-")[2]


def _name(config: TrainConfig) -> str:
    return f"{config.defense}-{config.model}-{config.dataset}-seed{config.seed}"


def _slug(text: str) -> str:
    """Return what may be a part of a file's name."""
    return re.sub(r"[^\w.=+-]+", "-", text).strip("-.")[:100] or "unnamed"
