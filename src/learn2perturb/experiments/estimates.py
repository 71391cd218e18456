"""How long the rest of a study takes: from steps and passes that are measured here, before it starts."""

from __future__ import annotations

import contextlib
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from learn2perturb.certification.config import CertifyConfig
from learn2perturb.data import ImageData, load_data
from learn2perturb.defenses.settings import Settings
from learn2perturb.engine.devices import choose_device
from learn2perturb.engine.random import isolated_rng
from learn2perturb.evaluation.pace import guessed_seconds
from learn2perturb.experiments.ledger import Ledger
from learn2perturb.experiments.spec import Pair, RunPlan
from learn2perturb.experiments.tasks import attack_of, effective
from learn2perturb.reading import MOST_SETTINGS, parse_json, read_bytes
from learn2perturb.runs.environment import environment
from learn2perturb.training.config import TrainConfig
from learn2perturb.training.loop import train

_IMAGES = 32  # of a measured step or pass, at most
_MOST_SECONDS = 4.0  # that all measured steps of training take together, and each pass: a plan is there in seconds
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
        self._sets: dict[Any, tuple[int, ImageData]] = {}
        self._left = _MOST_SECONDS
        self._seen = _trained_here(ledger)

    def training(self, run: RunPlan) -> float:
        """Return about how long the rest of a training takes."""
        config = run.config
        assert config is not None
        settings: Settings = config.closed()
        left = max(0, settings.epochs - self.ledger.epochs(run))
        images = config.limit or self._set(config, "train")[0]
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
        images = scoring.limit or self._set(config, scoring.split)[0]
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
        attacked = 0.0 if attack is None else guessed_seconds(attack, 1, forward=pace.forward, both=pace.both)
        scorings = scoring.draws * (scoring.members or 1)
        rows = 1 + scoring.noise_off
        return images * rows * (attacked + scorings * pace.forward)

    def pace(self, config: TrainConfig) -> Pace:
        """Return the measured pace of a kind of network and training."""
        kind = _kind(config)
        if kind not in self._paces:
            with _quietly(), isolated_rng():
                self._paces[kind] = self._measured(config)
        return self._paces[kind]

    def _measured(self, config: TrainConfig) -> Pace:
        """Time passes of the network, and two steps of its training where these are quick."""
        images = self._set(config, "train")[1]
        # Nothing is compiled for two steps; the fast mode may be twice as fast as what is said.
        short = replace(
            config, engine="plain", epochs=2, monitor=0, validation=0.0, device=self.device, tensorboard=False,
            milestones=[], adversarial_delay=0, keep_best=False, early_stopping=0, init_from=None, transforms=None,
        )  # fmt: skip
        model = train(replace(short, epochs=0, limit=2, batch_size=2), data=images, progress=False).model
        forward, both, rows = _passes(model, images, choose_device(self.device))
        kind = _kind(config)
        # What a step is in passes is known from the same training of another network, else from its adversary.
        alike = [one.step / one.both for other, one in self._paces.items() if _trainer(other) == _trainer(kind)]
        step = both * (alike[0] if alike else _passes_of_a_step(config.closed()))
        if 2 * rows * step < self._left:
            start = time.perf_counter()
            run = train(replace(short, limit=rows, batch_size=rows), data=images, progress=False)
            step = 1 / run.metrics[-1]["images_per_second"]
            self._left -= time.perf_counter() - start
        return Pace(step, forward, both)

    def _set(self, config: TrainConfig, split: str) -> tuple[int, ImageData]:
        """Return how many images a data set has, and the first of them; it is read once."""
        name = "test" if split == "test" else "train"
        key = config.dataset, name, config.data_dir, json.dumps(config.dataset_options, default=repr)
        if key not in self._sets:
            data = load_data(config.dataset, name, root=config.data_dir, **config.dataset_options)
            self._sets[key] = len(data), data.take(min(len(data), _IMAGES))
        return self._sets[key]

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


def _trainer(kind: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return what of a kind says how many passes a step of it takes."""
    defense, _, *_, attack_steps, _ = kind
    return defense, attack_steps


def _passes_of_a_step(settings: Settings) -> float:
    """Return about how many forward and backward passes a step takes: those of its adversary, and of its loss."""
    return 2.0 + (settings.attack_steps * settings.attack_eot if settings.beta else 0)


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


def _passes(model: nn.Module, data: ImageData, device: torch.device) -> tuple[float, float, int]:
    """Return seconds an image of a pass forward, of one forward and backward, and of how many images they were."""
    model = model.to(device).eval()
    images, labels = (data.images.float() / 255).to(device), data.labels.to(device)

    def forward(rows: int) -> None:
        with torch.no_grad():
            model(images[:rows])

    def both(rows: int) -> None:
        x = images[:rows].clone().requires_grad_()
        torch.autograd.grad(cross_entropy(model(x), labels[:rows]), x)

    forward(1)  # the first pass of a process is slower than any other
    # One image of a large network takes as long as all of a small one.
    rows = max(1, min(len(images), int(_MOST_SECONDS / 40 / max(_seconds(forward, 1), 1e-9))))
    return _seconds(forward, rows) / rows, _seconds(both, rows) / rows, rows


def _seconds(work: Callable[[int], None], rows: int) -> float:
    """Return the seconds of a pass, the quicker of two."""
    took = []
    for _ in range(2):
        start = time.perf_counter()
        work(rows)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        took.append(time.perf_counter() - start)
    return min(took)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
