"""How long the rest of a study takes: from steps and passes that are measured here, before it starts."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch.nn.functional import cross_entropy

from learn2perturb.certification.config import CertifyConfig
from learn2perturb.data import load_data
from learn2perturb.defenses.settings import Settings
from learn2perturb.engine.devices import choose_device
from learn2perturb.engine.random import isolated_rng
from learn2perturb.evaluation.pace import guessed_passes
from learn2perturb.experiments.ledger import Ledger
from learn2perturb.experiments.spec import Pair, RunPlan
from learn2perturb.experiments.tasks import attack_of, effective
from learn2perturb.reading import MOST_SETTINGS, parse_json, read_bytes
from learn2perturb.runs.environment import environment
from learn2perturb.training.config import TrainConfig
from learn2perturb.training.loop import train

_IMAGES = 32  # of a measured step
_BEGINNING = 1.0  # seconds until a task is at its work: images and weights are read
_DIAGNOSIS_PASSES = 40_000  # of an image, about, of a quick diagnosis


@final
@dataclass(frozen=True)
class Pace:
    """Seconds an image: of a step of training, of a forward pass, of a forward and backward pass."""

    step: float
    forward: float
    both: float


@final
class Estimates:
    """Seconds that trainings and cells of a study take on this machine; each kind of network is measured once."""

    def __init__(self, ledger: Ledger, device: str) -> None:
        self.ledger, self.device = ledger, device
        self._paces: dict[Any, Pace] = {}
        self._seen = _trained_here(ledger)

    def training(self, run: RunPlan) -> float:
        """Return about how long the rest of a training takes."""
        config = run.config
        assert config is not None
        settings: Settings = config.closed()
        left = max(0, settings.epochs - self.ledger.epochs(run))
        images = config.limit or _size(config)
        images = round(images * (1 - config.validation))
        step = self._seen.get(_kind(config)) or self.pace(config).step
        monitored = config.monitor * (settings.attack_steps + 2) * self.pace(config).both
        return _BEGINNING + left * (images * step + monitored)

    def cell(self, pair: Pair) -> float:
        """Return about how long a record takes to compute."""
        config = self._config(pair)
        pace = self.pace(config)
        header = self.ledger.header(pair.run)
        scoring = pair.cell.scoring
        images = scoring.limit or _size(config, scoring.split)
        return _BEGINNING + self._computing(pair, pace, header, images)

    def _computing(self, pair: Pair, pace: Pace, header: Mapping[str, Any], images: int) -> float:
        scoring = effective(pair, header)
        if pair.cell.kind == "certificate":
            draws = pair.cell.settings.get("n", CertifyConfig.n)
            draws += pair.cell.settings.get("n0", CertifyConfig.n0)
            return float(images * draws * pace.forward)
        if pair.cell.kind == "diagnosis":
            return min(images, 200) * _DIAGNOSIS_PASSES * pace.both
        attack = attack_of(pair, header)
        passes = guessed_passes(attack) if attack is not None else 0.0
        scorings = scoring.draws * (scoring.members or 1)
        each = pace.both if attack is not None and attack.needs_gradient else pace.forward
        rows = 1 + scoring.noise_off
        return images * rows * (passes * each + scorings * pace.forward)

    def pace(self, config: TrainConfig) -> Pace:
        """Return the measured pace of a kind of network and training."""
        kind = _kind(config)
        if kind not in self._paces:
            self._paces[kind] = _measured(config, self.device)
        return self._paces[kind]

    def _config(self, pair: Pair) -> TrainConfig:
        if pair.run.config is not None:
            return pair.run.config
        network = self.ledger.network(pair.run)
        assert network is not None
        header = network.header
        model, defense = header.get("registered_name") or "resnet20", header.get("defense") or "none"
        dataset = pair.run.facts.get("dataset") or header.get("dataset") or "cifar10"
        return TrainConfig(model=model, defense=defense, dataset=str(dataset), recipe="common").resolve()


def _kind(config: TrainConfig) -> tuple[Any, ...]:
    return config.defense, config.model, config.dataset, config.engine, config.attack_steps, config.batch_size


def _size(config: TrainConfig, split: str = "train") -> int:
    name = "test" if split == "test" else "train"
    return len(load_data(config.dataset, name, root=config.data_dir, **config.dataset_options))


def _trained_here(ledger: Ledger) -> dict[Any, float]:
    """Return seconds an image of a step, by kind, of what was trained on this machine for this study."""
    found: dict[Any, float] = {}
    here = environment(torch.device("cpu"))["processor"]
    for run in ledger.study.runs:
        if run.config is None:
            continue
        if _processor(ledger, run) != here:
            continue
        rates = [line["images_per_second"] for line in ledger.history(run) if line.get("images_per_second")]
        if rates:
            found[_kind(run.config)] = 1 / sorted(rates)[len(rates) // 2]
    return found


def _processor(ledger: Ledger, run: RunPlan) -> Any:
    """Return on what a run was trained, or is being trained."""
    folder = ledger.folder(run)
    facts = ledger.store.finished(folder)
    if facts is not None:
        return facts.where.get("processor")
    path = folder / "environment.json"
    return parse_json(read_bytes(path, MOST_SETTINGS)).get("processor") if path.exists() else None


def _measured(config: TrainConfig, device: str) -> Pace:
    """Train two steps on a few images in float32, and time passes of the network."""
    # Nothing is compiled for two steps; the fast mode may be twice as fast as what is said.
    short = replace(
        config, engine="plain", epochs=2, limit=_IMAGES, batch_size=_IMAGES, monitor=0, validation=0.0, device=device,
        tensorboard=False, milestones=[], adversarial_delay=0, download=False,
    )  # fmt: skip
    with _quietly(), isolated_rng():
        run = train(short, progress=False)
        rate = run.metrics[-1]["images_per_second"]
        model, place = run.model, choose_device(device)
        data = load_data(config.dataset, "test", root=config.data_dir, **config.dataset_options).take(_IMAGES)
        x, y = (data.images.float() / 255).to(place), data.labels.to(place)
        model = model.to(place)

        def forward() -> None:
            with torch.no_grad():
                model(x)

        def both() -> None:
            images = x.clone().requires_grad_()
            torch.autograd.grad(cross_entropy(model(images), y), images)

        return Pace(1 / rate, _seconds(forward) / len(y), _seconds(both) / len(y))


def _seconds(work: Any) -> float:
    work()
    start = time.perf_counter()
    for _ in range(3):
        work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / 3


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
