"""How long the rest of a study takes: from steps and passes that are measured here, before it starts.

What is measured is the time of the processor in one thread, so that other work on it does not count: several threads
wait for each other, which takes the processor's time, and the longer the more it has to do. What more of them gain is
seen once for each network. Each pass is made in the execution mode that the training or evaluation will select, but for
what that mode compiles.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from learn2perturb.certification.config import CertifyConfig
from learn2perturb.data import ImageData, load_data
from learn2perturb.defenses.settings import Settings
from learn2perturb.engine import execution
from learn2perturb.engine.answers import ask, plain_logits
from learn2perturb.engine.devices import choose_device
from learn2perturb.engine.random import isolated_rng
from learn2perturb.evaluation.pace import guessed_passes, guessed_seconds
from learn2perturb.experiments.ledger import Ledger
from learn2perturb.experiments.spec import Pair, RunPlan
from learn2perturb.experiments.tasks import attack_of, effective, is_random
from learn2perturb.reading import MOST_SETTINGS, parse_json, read_bytes
from learn2perturb.runs.environment import environment
from learn2perturb.training.config import TrainConfig
from learn2perturb.training.loop import train
from learn2perturb.training.state import mode_of

_IMAGES = 32  # of a measured step or pass, at most
_MOST_SECONDS = 4.0  # that all measured steps of training take together, and each pass: a plan is there in seconds
_BEGINNING = 1.0  # seconds until a task is at its work: images and weights are read
_DIAGNOSIS_PASSES = 40_000  # of an image, about, of a quick diagnosis
_COMPILED = 5 / 6  # of the time of a pass of an attack is left where it is compiled (engine/execution.py)


@final
@dataclass(frozen=True)
class Pace:
    """Seconds an image: of a step of training, of a forward pass, of a forward and backward pass, all in ``plain``.

    ``ratios``: by the name of an execution mode, how long a forward and backward pass takes in it, in those of plain.
    """

    step: float
    forward: float
    both: float
    ratios: dict[str, float] = field(default_factory=dict)


@final
class Estimates:
    """Seconds that trainings and cells of a study take on this machine; each kind of network is measured once."""

    def __init__(self, ledger: Ledger, device: str) -> None:
        self.ledger, self.device = ledger, device
        self._paces: dict[Any, Pace] = {}
        self._sets: dict[Any, tuple[int, ImageData]] = {}
        self._last: tuple[Any, _Timing] | None = None
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
        pace = self.pace(config)
        mode = mode_of(config, choose_device(self.device), images=settings.epochs * images, shape=self._shape(config))
        ratio = self._ratio(config, mode)
        step = self._seen.get(_kind(config)) or pace.step * ratio
        monitored = config.monitor * (settings.attack_steps + 2) * pace.both * ratio
        return _BEGINNING + left * (images * step + monitored)

    def cell(self, pair: Pair) -> float:
        """Return about how long a record takes to compute."""
        config = self._config(pair)
        pace = self.pace(config)
        header = self.ledger.header(pair.run)
        scoring = pair.cell.scoring
        images = scoring.limit or self._set(config, scoring.split)[0]
        return _BEGINNING + self._computing(pair, pace, header, images, config)

    def _computing(self, pair: Pair, pace: Pace, header: Mapping[str, Any], images: int, config: TrainConfig) -> float:
        scoring = effective(pair, header)
        if pair.cell.kind == "certificate":
            draws = pair.cell.settings.get("n", CertifyConfig.n)
            draws += pair.cell.settings.get("n0", CertifyConfig.n0)
            return float(images * draws * pace.forward)
        if pair.cell.kind == "diagnosis":
            passes = min(images, 200) * _DIAGNOSIS_PASSES
            return passes * pace.both * self._in_engine(scoring.engine, config, passes)
        attack, attacked = attack_of(pair, header), 0.0
        if attack is not None:  # scoring is in plain, whatever the attack is made in
            random = is_random(pair, header)
            in_all = images * guessed_passes(attack, stochastic=random)
            ratio = self._in_engine(scoring.engine, config, in_all)
            attacked = ratio * guessed_seconds(attack, 1, forward=pace.forward, both=pace.both, stochastic=random)
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
        """Time passes of the network, and two steps of its training where these are quick: nothing is compiled."""
        images = self._set(config, "train")[1]
        short = self._short(config)
        timing = self._timing(config)
        forward, both, rows = timing.forward, timing.both, timing.rows
        # What a step is in passes is known from the same training of another network, else from its settings.
        trainer = _trainer(config)
        alike = [one.step / one.both for (*_, other), one in self._paces.items() if other == trainer]
        step = both * (alike[0] if alike else _passes_of_a_step(config.closed()))
        if 2 * rows * step < self._left:
            with _one_thread():
                clock = _Clock(timing.device)
                run = train(replace(short, limit=rows, batch_size=rows), data=images, progress=False)
                wall, own = clock.read()
            seen = timing.gain * own / wall / run.metrics[-1]["images_per_second"]
            # On a machine that stalls two steps can come out far too fast; no step is quicker than half its passes.
            step = max(seen, both * _passes_of_a_step(config.closed()) / 2)
            self._left -= own
        return Pace(step, forward, both)

    def _short(self, config: TrainConfig) -> TrainConfig:
        """Return the config of two steps in eager float32."""
        return replace(
            config, engine="plain", epochs=2, monitor=0, validation=0.0, device=self.device, tensorboard=False,
            milestones=[], adversarial_delay=0, keep_best=False, early_stopping=0, init_from=None, transforms=None,
        )  # fmt: skip

    def _timing(self, config: TrainConfig) -> _Timing:
        """Return the passes of the network of ``config``; of the last one that was asked for they are kept."""
        kind = _network(config)
        if self._last is None or self._last[0] != kind:
            images = self._set(config, "train")[1]
            short = replace(self._short(config), epochs=0, limit=2, batch_size=2)
            model = train(short, data=images, progress=False).model
            self._last = kind, _Timing(model, images, choose_device(self.device))
        return self._last[1]

    def _in_engine(self, engine: str, config: TrainConfig, passes: float) -> float:
        """Return how long so many passes of an attack take in the mode that ``engine`` selects for them."""
        pixels = passes * math.prod(self._shape(config)[1:])
        return self._ratio(config, execution.select(engine, choose_device(self.device), pixels=pixels))

    def _ratio(self, config: TrainConfig, mode: execution.ExecutionMode) -> float:
        """Return how long work in ``mode`` takes, in the time of ``plain``."""
        if mode.name == execution.PLAIN.name:
            return 1.0
        ratios = self.pace(config).ratios
        if mode.name not in ratios:
            with _quietly(), isolated_rng():
                ratios[mode.name] = self._timing(config).ratio(mode)
        return ratios[mode.name] * (_COMPILED if mode.compiled_rows else 1.0)

    def _shape(self, config: TrainConfig) -> tuple[int, ...]:
        return tuple(self._set(config, "train")[1].images.shape[1:])

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
    return _network(config), config.engine, _trainer(config)


def _network(config: TrainConfig) -> tuple[Any, ...]:
    """Return what says how long a pass takes."""
    return config.model, config.dataset, config.batch_size, config.defense


def _trainer(config: TrainConfig) -> tuple[Any, ...]:
    """Return what says how many passes a step of a training takes, and of what."""
    closed = config.closed()
    adversary = closed.attack_steps, closed.attack_eot, closed.beta > 0
    extras = closed.objective, closed.loss, closed.loss_draws, closed.alpha > 0, closed.awp > 0, closed.consistency > 0
    return (config.defense, *adversary, *extras)


def _passes_of_a_step(settings: Settings) -> float:
    """Return about how many forward and backward passes a step takes: those of its adversary, and of its loss."""
    trades = settings.objective == "trades"
    adversarial = trades or settings.beta > 0
    draws = settings.loss_draws if settings.loss == "averaged" else 1
    terms = (trades or settings.alpha > 0) + adversarial * (2 if settings.consistency else 1)
    adversary = settings.attack_steps * settings.attack_eot if adversarial else 0
    # The weights are moved against the loss by a pass of its own.
    return float(draws * (adversary + terms * (2 if settings.awp else 1)))


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


@final
class _Clock:
    """Seconds since it was made: of the wall, and of this process alone where it computes itself."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._wall, self._own = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        """Return both, the second never longer: several threads take more of the processor than passes of the clock."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        wall, own = time.perf_counter() - self._wall, time.process_time() - self._own
        return wall, min(wall, own) if self._device.type == "cpu" else wall


@final
class _Timing:
    """Passes of a network over images, timed.

    Attributes:
        rows: images of a pass: one of a large network takes as long as all of a small one.
        gain: how long a pass takes in all threads, in the time of one: 1 where other work leaves them nothing.
        forward, both: seconds an image of a pass forward, and of one forward and backward, in ``plain``.
    """

    def __init__(self, model: nn.Module, data: ImageData, device: torch.device) -> None:
        self.device, self._model = device, model.to(device).eval()
        self._images, self._labels = (data.images.float() / 255).to(device), data.labels.to(device)
        self._forward(1)  # the first pass of a process is slower than any other
        with _one_thread():
            one = max(self._seconds(self._forward, 1), 1e-9)
            self.rows = max(1, min(len(self._images), int(_MOST_SECONDS / 40 / one)))
            forward, both = (self._seconds(work, self.rows) / self.rows for work in (self._forward, self._both))
        self.gain = self._gain(both * self.rows)
        self.forward, self.both = self.gain * forward, self.gain * both

    def _gain(self, one_thread: float) -> float:
        threads = torch.get_num_threads()
        if threads == 1 or self.device.type != "cpu":
            return 1.0
        took = []
        for _ in range(3):
            clock = _Clock(self.device)
            self._both(self.rows)
            took.append(clock.read()[0])
        return min(1.0, max(min(took) / one_thread, 1 / threads))

    def ratio(self, mode: execution.ExecutionMode) -> float:
        """Return how long a pass forward and back takes in ``mode``, without what it compiles, in those of plain."""
        eager = replace(execution.eager(mode), fused_noise=False)
        eager.place(self._model)
        x = eager.place_images(self._images[: self.rows])
        with _one_thread():
            try:
                with execution.running(eager), execution.attacking(self._model, x, True):
                    self._both(self.rows)
                    found = self._seconds(self._both, self.rows)
            finally:
                execution.PLAIN.place(self._model)
            # Beside each other, so that both have met the same machine.
            return found / self._seconds(self._both, self.rows)

    def _forward(self, rows: int) -> None:
        with torch.no_grad():
            ask(self._model, self._images[:rows])

    def _both(self, rows: int) -> None:
        x = execution.current().place_images(self._images[:rows]).clone().requires_grad_()
        torch.autograd.grad(cross_entropy(plain_logits(ask(self._model, x)), self._labels[:rows]), x)

    def _seconds(self, work: Callable[[int], None], rows: int) -> float:
        """Return the seconds of a pass, the quicker of two."""
        took = []
        for _ in range(2):
            clock = _Clock(self.device)
            work(rows)
            took.append(clock.read()[1])
        return max(min(took), 1e-9)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
