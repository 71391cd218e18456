"""What is done for a study in one process: train a network, or compute the record of a cell, once and whole."""

from __future__ import annotations

import contextlib
import functools
import json
import signal
import socket
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, final

from torch import nn

from learn2perturb.attacks import Attack, Source, Transfer
from learn2perturb.attacks.spec import attacks_of_size
from learn2perturb.certification import certify
from learn2perturb.data import ImageData, load_data
from learn2perturb.diagnosis import diagnose
from learn2perturb.diagnosis.checks import own_checks
from learn2perturb.diagnosis.threat import threat_of_training
from learn2perturb.engine.devices import choose_device
from learn2perturb.engine.identity import fingerprint_of_images, fingerprint_of_state, fingerprint_of_weights
from learn2perturb.errors import ConfigError, DataError, Interrupted, Learn2PerturbError
from learn2perturb.evaluation import ImageKeeper, Unfinished, evaluate
from learn2perturb.evaluation.attacked import beside
from learn2perturb.evaluation.config import EvaluateConfig
from learn2perturb.evaluation.own_parts import own_parts
from learn2perturb.experiments.released import ReleasedScores, share_draws
from learn2perturb.experiments.spec import OWN, TWIN, Pair, RunPlan, Scoring
from learn2perturb.experiments.store import Finished, Store, address, code_in_address, run_address
from learn2perturb.naming import is_factory, made_by
from learn2perturb.noise import NoiseFree, is_stochastic, noise_spec
from learn2perturb.plugins import import_all
from learn2perturb.records import Saved, plain
from learn2perturb.runs.checkpoint import read_model
from learn2perturb.runs.files import MODEL, checkpoints, locate
from learn2perturb.runs.loading import load
from learn2perturb.runs.trained import (
    check_images,
    images_of,
    options_of,
    own_eps,
    own_norm,
    own_predictor,
    settings_of,
)
from learn2perturb.training.loop import train
from learn2perturb.training.metrics import read_metrics

TRAIN, CELL = "train", "cell"
DONE, STOPPED, FAILED, HELD = "done", "stopped", "failed", "held"
_IMAGES = 4  # broken and held ones that are kept beside a record, for its page
_UNNAMED = ("eps", "seed")  # a row has its eps beside its name


@final
@dataclass(frozen=True)
class Task:
    """What one process is asked to do; ``key`` is the address of what comes of it, ``path`` its place."""

    kind: str
    key: str
    title: str
    path: Path
    run: RunPlan
    pair: Pair | None = None
    places: Mapping[str, str] = field(default_factory=dict)  # run title -> where its network is

    def __str__(self) -> str:
        return f"train {self.title}" if self.kind == TRAIN else self.title


@final
@dataclass(frozen=True)
class Outcome:
    """How a task ended: ``done``, ``stopped`` (it goes on another time), ``failed``, ``held`` (by another process)."""

    state: str
    seconds: float = 0.0
    message: str = ""


# --- addresses


@functools.lru_cache(maxsize=16)
def data_address(dataset: str, split: str, data_dir: str | None, download: bool, options: str = "{}") -> str:
    """Return the fingerprint of all images and labels of a split; ``options`` of the data set as JSON."""
    data = load_data(dataset, split, root=data_dir, download=download, **json.loads(options))
    return fingerprint_of_images(data.images, data.labels)


def training_address(run: RunPlan) -> str:
    """Return the address of a training."""
    config = run.config
    assert config is not None
    options = json.dumps(config.dataset_options)
    return run_address(config, data_address(config.dataset, "train", config.data_dir, config.download, options))


@functools.lru_cache(maxsize=256)
def _weights_at(place: str, modified: float) -> tuple[str, dict[str, Any]]:
    state, header = read_model(Path(place))
    return fingerprint_of_state(state), header


def weights_at(place: str) -> tuple[str, dict[str, Any]]:
    """Return the fingerprint of the weights at a place, and their header."""
    if is_factory(place):
        model = network_at(place)
        return fingerprint_of_weights(model), {"noise": noise_spec(model), "defense": None, **own_parts(model)}
    path = locate(place)
    return _weights_at(str(path), path.stat().st_mtime)


def network_at(place: str) -> nn.Module:
    """Return the network of a run folder, a file, the zoo, or a ``module:function``.

    Raises:
        ConfigError: the function gives no module, whose weights an address needs.
    """
    if not is_factory(place):
        return load(place)
    model = made_by(place)
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"{place} gives a {type(model).__name__}; a study takes a torch.nn.Module, evaluate takes any"
        )
    return model


def cell_address(pair: Pair, header: Mapping[str, Any], weights: str, sources: Mapping[str, str]) -> str:
    """Return the address of a record: of weights, images, attack and scoring, whatever a study calls them."""
    dataset, data_dir, download = _data_of(pair, header)
    split = "test" if pair.cell.scoring.split == "test" else "train"
    settings = settings_of(header, pair.run.title)
    scoring = effective(pair, header)
    held_out = (settings.get("validation"), settings.get("seed")) if scoring.split == "validation" else None
    attack = attack_of(pair, header)
    return address(
        kind=pair.cell.kind,
        weights=weights,
        data=data_address(dataset, split, data_dir, download, json.dumps(options_of(settings, dataset))),
        held_out=held_out,
        attack=None if attack is None else {"type": type(attack).__name__, **plain(attack)},
        own=None if pair.cell.kind == "accuracy" else pair.cell.settings,
        scoring=plain(scoring),
        source=pair.cell.source if pair.cell.source == TWIN else None,
        sources=dict(sources) if pair.cell.kind == "diagnosis" else sorted(sources.values()),
        released=pair.cell.released,
        **_threat_in_address(pair, header),
        **code_in_address(
            header, own_parts(attacks=[attack], checks=own_checks() if pair.cell.kind == "diagnosis" else ())
        ),
    )


def _threat_in_address(pair: Pair, header: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of :func:`threat_of` is in an address; that of an attack is in its settings."""
    return {"eps": None} if pair.cell.kind == "accuracy" else threat_of(pair, header)


def eps_of(pair: Pair, header: Mapping[str, Any], norm: str = "linf") -> float:
    """Return the size of the attack in a norm: the cell's, else what the network was trained for, else the usual."""
    return float(own_eps(settings_of(header, pair.run.title), norm) if pair.cell.eps is None else pair.cell.eps)


def threat_of(pair: Pair, header: Mapping[str, Any]) -> dict[str, Any]:
    """Return size and norm of a diagnosis, as far as its claim does not say them; the l_inf size of a certificate."""
    named, eps = pair.cell.settings, pair.cell.eps
    own = named.get("eps") if named.get("eps") is not None else eps
    if pair.cell.kind == "certificate":
        return {"eps": eps_of(pair, header) if own is None else own}
    settings = settings_of(header, pair.run.title)
    norm, size = threat_of_training(settings, norm=named.get("norm"), eps=own, claim=named.get("claim"))
    return {"eps": size} | ({} if norm in (None, "linf") else {"norm": norm})


def is_random(pair: Pair, header: Mapping[str, Any]) -> bool:
    """Tell whether the network draws noise: by its defense, else by the noise in its file."""
    known = pair.run.stochastic
    return bool(header.get("noise")) if known is None else known


def effective(pair: Pair, header: Mapping[str, Any]) -> Scoring:
    """Return the scoring as it is done: without noise one draw, and no ensemble; ``own`` is what the defense has."""
    scoring = pair.cell.scoring
    if not is_random(pair, header) or pair.cell.released is not None:
        return replace(scoring, draws=1, predictor="single", members=None, noise_off=False)
    own, passes = own_predictor(header)
    predictor = own if scoring.predictor == OWN else scoring.predictor
    members = None
    if predictor != "single":
        members = scoring.members or passes or EvaluateConfig.members
    return replace(scoring, predictor=predictor, members=members)


def attack_of(pair: Pair, header: Mapping[str, Any]) -> Attack | None:
    """Return the attack of a cell, of its size; without noise it averages over no draws."""
    if pair.cell.attack is None:
        return None
    name, settings = pair.cell.attack
    (attack,) = attacks_of_size(
        {pair.cell.name: (name, dict(settings))}, partial(eps_of, pair, header),
        norm=own_norm(settings_of(header, pair.run.title)),
        usual_steps=(pair.cell.name,) if pair.cell.preset_step else (),
    ).values()  # fmt: skip
    if attack.sized and pair.cell.eps is not None:
        attack = attack.resized(pair.cell.eps)
    random = is_random(pair, header) if not pair.sources else True
    return replace(attack, eot=1) if attack.eot > 1 and (not random or pair.cell.source == TWIN) else attack


def row_name(attack: Attack | None) -> str:
    """Return what a row is called: seeds follow from it, so it says what is done and not what a study calls it."""
    if attack is None:
        return "clean"
    defaults = {item.name: item.default for item in fields(attack)}
    own = [(name, value) for name, value in plain(attack).items() if name not in _UNNAMED and value != defaults[name]]
    words = ",".join(f"{name}={value:.6g}" if isinstance(value, float) else f"{name}={value}" for name, value in own)
    return f"{type(attack).__name__}:{words}" if words else type(attack).__name__


def _data_of(pair: Pair, header: Mapping[str, Any]) -> tuple[str, str | None, bool]:
    run = pair.run
    if run.config is not None:
        return run.config.dataset, run.config.data_dir, run.config.download
    settings = settings_of(header, run.title)
    name = run.facts.get("dataset") or settings["dataset"]
    if not name:
        raise ConfigError(f"run {run.title}: {run.weights} does not say of which data it is; add dataset: NAME")
    return str(name), run.facts.get("data_dir") or settings.get("data_dir"), False


# --- doing it


def perform(
    store: Path, task: Task, *, seconds: float | None = None, device: str = "auto", progress: bool = False
) -> Outcome:
    """Do a task; ``seconds`` is when it is to save and stop.

    What is wrong is in the outcome, so that it travels between processes; only a signal of the user's is raised.
    """
    import_all()  # in a process of its own: the parts of the user's that the study was started with
    room, started = Store(store), time.monotonic()
    with room.held(task.key) as mine:
        if not mine:
            return Outcome(HELD)
        if _is_there(room, task):
            return Outcome(DONE)
        room.note("begun", task.key, str(task))
        with _ended_by(seconds) as clock:
            try:
                if task.kind == TRAIN:
                    _train(room, task, device, progress)
                else:
                    _compute(room, task, device, progress)
            except KeyboardInterrupt as stop:
                took = time.monotonic() - started
                room.note("stopped", task.key, str(task), seconds=round(took, 2))
                if clock.is_set():
                    return Outcome(STOPPED, took)
                raise Interrupted.of(stop, f"what is done is in {store}") from None
            except Learn2PerturbError as error:
                room.note("failed", task.key, str(task), message=str(error))
                return Outcome(FAILED, time.monotonic() - started, str(error))
        took = time.monotonic() - started
        room.note("ended", task.key, str(task), seconds=round(took, 2), kind=task.kind)
        return Outcome(DONE, took)


def _is_there(store: Store, task: Task) -> bool:
    if task.kind == TRAIN:
        return store.finished(task.path) is not None
    assert task.pair is not None
    return store.record(task.path, task.pair.cell.kind) is not None


@contextlib.contextmanager
def _ended_by(seconds: float | None) -> Iterator[threading.Event]:
    """Let this process be told to stop after ``seconds``, as by SIGTERM; the event says that it was this clock."""
    rung = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield rung
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number=number)

    before = signal.signal(signal.SIGTERM, stop)

    def ring() -> None:
        rung.set()
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    timer = threading.Timer(seconds, ring) if seconds is not None else None
    try:
        if timer is not None:
            timer.daemon = True
            timer.start()
        yield rung
    finally:
        if timer is not None:
            timer.cancel()
        signal.signal(signal.SIGTERM, before)


def _train(store: Store, task: Task, device: str, progress: bool) -> None:
    config = task.run.config
    assert config is not None
    _check_key(task, training_address(task.run))
    train(replace(config, device=device), out=task.path, progress=progress)
    newest = checkpoints(task.path)[-1] / MODEL
    state, header = read_model(newest)
    lines = read_metrics(task.path)
    facts = Finished(
        fingerprint_of_state(state), header.get("step"), sum(float(line.get("seconds", 0)) for line in lines),
        _where(task.path),
    )  # fmt: skip
    store.finish(task.path, newest, facts)


def _where(folder: Path) -> dict[str, Any]:
    from learn2perturb.reading import MOST_SETTINGS, parse_json, read_bytes

    found: dict[str, Any] = parse_json(read_bytes(folder / "environment.json", MOST_SETTINGS))
    return found


def _compute(store: Store, task: Task, device: str, progress: bool) -> None:
    """Compute the record of a cell and write it."""
    pair = task.pair
    assert pair is not None
    place = choose_device(device)
    where = task.places[pair.run.title]
    weights, header = weights_at(where)
    sources = {label: weights_at(task.places[run.title])[0] for label, run in pair.sources.items()}
    _check_key(task, cell_address(pair, header, weights, sources))
    work = _Work(task, pair, header, network_at(where).to(place), _images(pair, header), place, progress)
    _RECORDS[pair.cell.kind](work).save(task.path)


def _check_key(task: Task, found: str) -> None:
    """Refuse work whose result would stand under the address of another: other images, weights or package here.

    Raises:
        DataError: what this process reads is not what the study was laid out with.
    """
    if found != task.key:
        raise DataError(
            f"{task}: the images, weights or version of learn2perturb that this process ({socket.gethostname()}) reads "
            f"are not those of the study: they give {found}, and the study has {task.key}; compare data_dir and the "
            "installed package on both machines"
        )


def _images(pair: Pair, header: Mapping[str, Any]) -> ImageData:
    name, root, download = _data_of(pair, header)
    data = images_of(
        settings_of(header, pair.run.title), pair.run.title, dataset=name, root=root, split=pair.cell.scoring.split,
        download=download,
    )  # fmt: skip
    check_images(data, header, pair.run.title)
    return data


@final
@dataclass(frozen=True, eq=False)
class _Work:
    """A cell with all that its record is computed from."""

    task: Task
    pair: Pair
    header: Mapping[str, Any]
    model: nn.Module
    data: ImageData
    place: Any
    progress: bool

    def network(self, run: RunPlan) -> nn.Module:
        return network_at(self.task.places[run.title]).to(self.place)


def _accuracy(work: _Work) -> Saved:
    pair, model = work.pair, work.model
    cell, scoring = pair.cell, effective(pair, work.header)
    attack = attack_of(pair, work.header)
    name = row_name(attack)
    target: Any = model
    batch_size = scoring.batch_size
    source: Source | None = None
    if cell.released is not None:
        share_draws(model)
        target, batch_size, source = ReleasedScores(model), cell.released, Source(model, "itself")
    elif cell.source == TWIN:
        source = Source(NoiseFree(model), "its noise-off twin")
    elif pair.sources:
        ((_, other),) = pair.sources.items()
        source = Source(work.network(other), other.title)
    if attack is not None and source is not None:
        attack = Transfer(attack=attack, source=source)
        name = f"{name} from {source.name}"
    images = None if attack is None else ImageKeeper(_IMAGES)
    with warnings.catch_warnings(), Unfinished(work.task.path.parent) as keep:
        if cell.released is not None:  # that its answers depend on the batch is what this cell is there to show
            warnings.filterwarnings("ignore", message=".*depends on the other images of its batch")
        found = evaluate(
            target, work.data, {} if attack is None else {name: attack}, draws=scoring.draws,
            predictor=scoring.predictor, members=scoring.members or EvaluateConfig.members, clean=attack is None,
            noise_off=scoring.noise_off and is_stochastic(model),
            seed=scoring.seed, batch_size=batch_size, limit=scoring.limit, device=work.place, engine=scoring.engine,
            name=pair.run.title, progress=work.progress, keep=keep, images=images,
        )  # fmt: skip
    if images is not None and images.found is not None:
        images.found.save(beside(work.task.path))  # before the record, which says that the work is done
    return found


def _certificate(work: _Work) -> Saved:
    pair, scoring = work.pair, work.pair.cell.scoring
    with Unfinished(work.task.path.parent) as keep:
        return certify(
            work.model, work.data, **{**pair.cell.settings, **threat_of(pair, work.header)}, limit=scoring.limit,
            seed=scoring.seed, device=work.place, name=pair.run.title, progress=work.progress, keep=keep,
        )  # fmt: skip


def _diagnosis(work: _Work) -> Saved:
    pair, scoring = work.pair, work.pair.cell.scoring
    sources = {name: work.network(run) for name, run in pair.sources.items()}
    with Unfinished(work.task.path.parent) as keep:
        return diagnose(
            work.model, work.data, **{**pair.cell.settings, **threat_of(pair, work.header)}, sources=sources,
            limit=scoring.limit, seed=scoring.seed, device=work.place, engine=scoring.engine, name=pair.run.title,
            progress=work.progress, keep=keep,
        )  # fmt: skip


_RECORDS = {"accuracy": _accuracy, "certificate": _certificate, "diagnosis": _diagnosis}
