"""What of a study is there, what can be done now, and where: the link between a study and a store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from learn2perturb.errors import CheckpointError, ConfigError, UnknownNameError
from learn2perturb.experiments.results import Answer, Results
from learn2perturb.experiments.spec import Pair, RunPlan, Study
from learn2perturb.experiments.store import MODEL, Store
from learn2perturb.experiments.tasks import (
    CELL,
    TRAIN,
    Task,
    attack_of,
    cell_address,
    row_name,
    training_address,
    weights_at,
)
from learn2perturb.records import Saved
from learn2perturb.training.metrics import read_metrics


@final
@dataclass(frozen=True)
class Network:
    """A network that is trained: where it is, the hash of its weights, the header of its file."""

    place: str
    weights: str
    header: dict[str, Any]


@final
@dataclass(eq=False)
class Ledger:
    """The addresses of a study's runs and cells in a store. Asked again, it looks again for what was missing."""

    study: Study
    store: Store
    _keys: dict[str, str] = field(default_factory=dict)
    _networks: dict[str, Network] = field(default_factory=dict)
    _expected: dict[str, dict[str, Any]] = field(default_factory=dict)
    _places: dict[tuple[str, str, str], tuple[str, Path]] = field(default_factory=dict)
    _records: dict[Path, Saved] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # What can be refused is refused before any work.
        headers = {run.title: self.header(run) for run in self.study.runs}
        for pair in self.study.all_pairs():
            attack_of(pair, headers[pair.run.title])

    def header(self, run: RunPlan) -> dict[str, Any]:
        """Return what the file of a network says of it; before it is trained, what it will say that others go by.

        Raises:
            ConfigError, UnknownNameError: its defense does not take its settings.
        """
        network = self.network(run)
        if network is not None:
            return network.header
        if run.title not in self._expected:
            self._expected[run.title] = _expected(run)
        return self._expected[run.title]

    def address(self, run: RunPlan) -> str:
        """Return the address of a run that is to be trained."""
        if run.title not in self._keys:
            self._keys[run.title] = training_address(run)
        return self._keys[run.title]

    def folder(self, run: RunPlan) -> Path:
        """Return the run folder of a run that is to be trained."""
        assert run.config is not None
        return self.store.run(run.config, self.address(run))

    def network(self, run: RunPlan) -> Network | None:
        """Return a trained network; None while it is not trained."""
        if run.title not in self._networks:
            facts = None if run.weights is not None else self.store.finished(self.folder(run))
            if run.weights is None and facts is None:
                return None
            place = run.weights or str(self.folder(run) / MODEL)
            weights, header = weights_at(place)
            if facts is not None and facts.weights != weights:
                raise CheckpointError(
                    f"the weights in {place} are not those that were trained there; remove its folder, and they are "
                    "trained again"
                )
            self._networks[run.title] = Network(place, weights, header)
        return self._networks[run.title]

    def networks(self, pair: Pair) -> dict[str, Network] | None:
        """Return the networks that a pair needs, by the title of their run; None while one is not trained."""
        found = {}
        for run in (pair.run, *pair.sources.values()):
            network = self.network(run)
            if network is None:
                return None
            found[run.title] = network
        return found

    def place(self, pair: Pair) -> tuple[str, Path] | None:
        """Return address and path of a pair's record; None while a network that it needs is not trained."""
        name = pair.run.title, pair.cell.title, "/".join(run.title for run in pair.sources.values())
        if name not in self._places:
            networks = self.networks(pair)
            if networks is None:
                return None
            own = networks[pair.run.title]
            sources = {label: networks[run.title].weights for label, run in pair.sources.items()}
            key = cell_address(pair, own.header, own.weights, sources)
            what = row_name(attack_of(pair, own.header)) if pair.cell.kind == "accuracy" else pair.cell.kind
            whose = f"{own.header.get('defense') or 'network'}-{own.header.get('registered_name') or 'custom'}"
            self._places[name] = key, self.store.cell(f"{whose}-{own.weights}", what, key)
        return self._places[name]

    def is_there(self, pair: Pair) -> bool:
        """Tell whether the record of a pair is there, whole."""
        return self.record(pair) is not None

    def record(self, pair: Pair) -> Saved | None:
        """Return the record of a pair, read once; None while it is not there, whole."""
        found = self.place(pair)
        if found is None:
            return None
        path = found[1]
        if path not in self._records:
            record = self.store.record(path, pair.cell.kind)
            if record is None:
                return None
            self._records[path] = record
        return self._records[path]

    def task(self, pair: Pair) -> Task | None:
        """Return the task that computes a record; None while a network that it needs is not trained."""
        networks, found = self.networks(pair), self.place(pair)
        if networks is None or found is None:
            return None
        places = {title: network.place for title, network in networks.items()}
        return Task(CELL, found[0], pair.title, found[1], pair.run, pair, places)

    def training(self, run: RunPlan) -> Task:
        """Return the task that trains a run."""
        return Task(TRAIN, self.address(run), run.title, self.folder(run), run)

    def missing(self) -> Iterator[RunPlan | Pair]:
        """Give what is not there yet: a run is evaluated before the next is trained."""
        for run in self.study.runs:
            if self.network(run) is None:
                yield run
            yield from (pair for pair in self.study.pairs(run) if not self.is_there(pair))

    def ready(self) -> Iterator[Task]:
        """Give the tasks that can be begun, the most important first."""
        for item in self.missing():
            task = self.training(item) if isinstance(item, RunPlan) else self.task(item)
            if task is not None:
                yield task

    def wanted(self) -> list[Path]:
        """Return the run folders and records that the study needs, there or not."""
        folders = [self.folder(run) for run in self.study.runs if run.weights is None]
        return folders + [found[1] for pair in self.study.all_pairs() if (found := self.place(pair)) is not None]

    def epochs(self, run: RunPlan) -> int:
        """Return how many epochs of a run are trained."""
        return len(self.history(run))

    def history(self, run: RunPlan) -> list[dict[str, Any]]:
        """Return the metrics of a run that is trained here, one dictionary an epoch."""
        if run.weights is not None:
            return []
        try:
            return read_metrics(self.folder(run))
        except CheckpointError:
            return []

    def results(self) -> Results:
        """Return what is there."""
        answers = []
        for pair in self.study.all_pairs():
            record, found = self.record(pair), self.place(pair)
            answers.append(Answer(pair, record, None if record is None or found is None else found[1]))
        return Results(
            self.study, tuple(answers), self.history, lambda run: None if run.config is None else self.folder(run)
        )  # fmt: skip


def _expected(run: RunPlan) -> dict[str, Any]:
    """Return what the header of a network that is to be trained will say of how it was trained and predicts.

    Raises:
        ConfigError, UnknownNameError: its defense does not take its settings.
    """
    assert run.config is not None
    try:
        defense = run.config.built_defense()
    except (ConfigError, UnknownNameError) as error:
        raise type(error)(f"run {run.title}: {error}") from None
    return {"config": run.config.to_dict(), "predictor": defense.predictor, "members": defense.members}
