"""The training loop: stages, epochs, batches; checkpoints that resume bit for bit; a NaN or Ctrl-C loses nothing.

Every random number of a step is a function of (seed, step), and the order and augmentation of a batch of (seed, epoch,
batch). So a training resumed at any step goes on exactly as if it had never stopped, without any generator's state.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn

from learn2perturb.data import BatchSource, ImageData, load_data, make_source
from learn2perturb.defenses import Clock, Defense, Losses, Stage, build_defense, forward, training_adversary
from learn2perturb.engine import gears
from learn2perturb.engine.devices import checked_device
from learn2perturb.engine.random import derive_seed, isolated_rng, seed_torch
from learn2perturb.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    InputError,
    Learn2PerturbError,
    NonFiniteError,
    TrainingError,
)
from learn2perturb.models import build_model
from learn2perturb.progress import Reporter
from learn2perturb.records import atomic_write
from learn2perturb.training.alternating import Optimizers, iterate
from learn2perturb.training.checkpoint import (
    RESUME_FORMAT,
    VERSION,
    checkpoints,
    model_bytes,
    read_model,
    read_resume,
    write_checkpoint,
)
from learn2perturb.training.config import TrainConfig
from learn2perturb.training.environment import environment
from learn2perturb.training.metrics import MetricsFile, Totals, read_metrics, theta_report

# Where a resumed training may differ from what the run folder says: none of these change what is computed.
_FREE = ("device", "data_dir", "download", "checkpoint_minutes", "tensorboard", "log_every")


@dataclass(frozen=True)
class Run:
    """A finished training.

    Attributes:
        folder: the run folder, or None when nothing was to be written.
        model: the trained network, in eval mode.
        config: the resolved config.
        metrics: one dictionary an epoch.
    """

    folder: Path | None
    model: nn.Module
    config: TrainConfig
    metrics: list[dict[str, Any]] = field(repr=False, default_factory=list)


def choose_device(name: str) -> torch.device:
    """Return the device called ``name``; ``auto`` is CUDA, then MPS, then the CPU.

    Raises:
        ConfigError: there is no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    return checked_device(name)


def _sources(config: TrainConfig, data: Any, device: torch.device) -> tuple[BatchSource, BatchSource | None, str]:
    """Return training batches, batches to monitor, and what the latter are."""
    if data is None:
        train_set: Any = load_data(config.dataset, "train", root=config.data_dir, download=config.download)
        watched: Any = load_data(config.dataset, "test", root=config.data_dir) if not config.validation else None
    elif isinstance(data, (tuple, list)) and len(data) == 2 and not isinstance(data[0], (torch.Tensor, np.ndarray)):
        train_set, watched = data
    else:
        train_set, watched = data, None
    label = "test"
    if config.validation:
        if not isinstance(train_set, ImageData):
            raise DataError("validation splits the package's own data sets; give yours as data=(train, validation)")
        train_set, watched = train_set.split(config.validation, config.seed)
        label = "validation"
    batch_size = config.batch_size or 128
    train = make_source(
        train_set, batch_size=batch_size, shuffle=True, augment=config.augment is not False, seed=config.seed,
        device=device, limit=config.limit,
    )  # fmt: skip
    monitor = None
    if config.monitor and watched is not None:
        monitor = make_source(watched, batch_size=250, device=device, seed=config.seed, limit=config.monitor)
    return train, monitor, label


class _Interrupt:
    """Turns Ctrl-C and SIGTERM into a flag that is read between steps; a second signal stops at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: Any) -> None:
            if self.received is not None:
                raise KeyboardInterrupt
            self.received = number

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Training:
    """The state of one training: built from the config, moved forward step by step, saved, restored."""

    def __init__(
        self, config: TrainConfig, model: nn.Module | None, data: Any, out: Path | None, reporter: Reporter
    ) -> None:
        self.config, self.out, self.reporter = config, out, reporter
        self.device = choose_device(config.device)
        self.defense: Defense = build_defense(config.defense, config.options)
        self.source, self.monitor, self.monitored = _sources(config, data, self.device)
        self.batches = self.source.num_batches
        self.plan: tuple[Stage, ...] = self.defense.stages(config)
        self.epochs = sum(stage.epochs for stage in self.plan)
        pixels = self.epochs * self.source.num_examples * math.prod((self.source.input_shape or (0,))[1:])
        self.gear = gears.select(config.engine, self.device, pixels=pixels)
        self.own_network = model is not None
        self.model = self._build(model).to(self.device)
        self.gear.place(self.model)
        self.epoch, self.batch, self.stage = 0, 0, -1
        self.optimizers: Optimizers = {}
        self.totals = Totals(self.device)
        self.metrics_bytes = 0
        self.seconds = 0.0
        self.last_good: Path | None = None

    def _build(self, model: nn.Module | None) -> nn.Module:
        config, shape = self.config, self.source.input_shape
        if shape is None:
            raise DataError("the training data do not say their image shape; give at least one batch (N, C, H, W)")
        self.input_shape = shape
        seed_torch(config.seed, "weights")
        if model is None:
            classes = self.source.num_classes
            if classes is None:
                raise DataError("the number of classes is not known from these data; give train() your own model")
            for name in ("num_classes", "input_shape"):
                if name in config.model_options:
                    raise ConfigError(f"model_options has {name!r}, which follows from the data; leave it out")
            model = build_model(config.model, num_classes=classes, input_shape=shape, **config.model_options)
        return self.defense.prepare(model, shape)

    # -- position ---------------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        return self.epoch * self.batches + self.batch

    def clock(self) -> Clock:
        start = 0
        for index, stage in enumerate(self.plan):
            if self.epoch < start + stage.epochs or index == len(self.plan) - 1:
                return Clock(self.epoch, self.batch, self.batches, index, self.epoch - start)
            start += stage.epochs
        raise ConfigError("the defense has no stages; return at least one from stages()")

    def enter_stage(self, clock: Clock) -> None:
        """Build the optimisers of the stage that the clock is in, if they are not the current ones."""
        if clock.stage == self.stage:
            return
        # Optimisers are built over every parameter, also those that a delay has frozen so far.
        self.optimizers = self.plan[clock.stage].optimizers(self.model)
        self.stage = clock.stage
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["base_lr"] = group["lr"]

    # -- saving and restoring ---------------------------------------------------------------------------------------

    def metadata(self) -> dict[str, Any]:
        return {
            "config": self.config.to_dict(),
            "input_shape": list(self.input_shape),
            "defense": self.config.defense,
            "predictor": self.defense.predictor,
            "own_network": self.own_network,
            "epoch": self.epoch,
        }

    def save(self, metrics: MetricsFile) -> None:
        if self.out is None:
            return
        for name, tensor in self.model.state_dict().items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise NonFiniteError(f"weight {name!r} is not finite after step {self.step}; {self._mend()}")
        resume = {
            "format": RESUME_FORMAT,
            "version": VERSION,
            "epoch": self.epoch,
            "batch": self.batch,
            "stage": self.stage,
            "batches": self.batches,
            "gear": self.gear.name,
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "totals": self.totals.state(),
            "seconds": self.seconds,
            "metrics_bytes": metrics.sync(),
        }
        self.last_good = write_checkpoint(self.out, self.step, model_bytes(self.model, self.metadata()), resume)

    def restore(self) -> bool:
        """Go to the newest checkpoint of the run folder, if there is one."""
        found = checkpoints(self.out) if self.out is not None else []
        if not found:
            return False
        resume = read_resume(found[-1])
        if resume["batches"] != self.batches:
            raise CheckpointError(
                f"{self.out} was trained with {resume['batches']} batches an epoch, these data give {self.batches}; "
                "give the same data, or another --out"
            )
        if resume["gear"] != self.gear.name:
            raise CheckpointError(
                f"{self.out} was trained in gear {resume['gear']!r} and this would be {self.gear.name!r}; "
                f"set engine={resume['gear']!r}, or another --out"
            )
        state, _ = read_model(found[-1] / "model.safetensors")
        try:
            self.model.load_state_dict(state)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{self.out} holds a run of another network ({reason}); give another --out") from None
        self.gear.place(self.model)
        self.epoch, self.batch = resume["epoch"], resume["batch"]
        if resume["stage"] >= 0:
            self.optimizers = self.plan[resume["stage"]].optimizers(self.model)
            self.stage = resume["stage"]
            for name, optimizer in self.optimizers.items():
                optimizer.load_state_dict(resume["optimizers"][name])
        self.totals = Totals(self.device, resume["totals"])
        self.metrics_bytes, self.seconds = resume["metrics_bytes"], resume["seconds"]
        self.last_good = found[-1]
        # Interrupted between the last step of an epoch and its scores: what the step had switched must be so again.
        self.defense.begin_step(self.model, self.clock())
        return True

    def _mend(self) -> str:
        kept = f"the last good checkpoint is {self.last_good}" if self.last_good else "there is no checkpoint yet"
        return f"{kept}; lower lr (it is {self.config.lr:g}), or use engine 'plain'"

    # -- going forward ----------------------------------------------------------------------------------------------

    def run_step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        clock = self.clock()
        self.enter_stage(clock)
        factor = self.plan[clock.stage].factor(clock)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
        seed_torch(self.config.seed, "step", clock.step)
        self.model.train()
        self.defense.begin_step(self.model, clock)
        x = self.gear.place_images(x)

        def check(losses: Losses) -> None:
            # One synchronisation a step; on the CPU it is free. The update that would spread a NaN is not made.
            if not math.isfinite(losses.total.item()):
                raise NonFiniteError(
                    f"the loss is {losses.total.item()} at step {clock.step} (epoch {clock.epoch}, batch "
                    f"{clock.batch}); "
                    f"{self._mend()}"
                )

        iteration = iterate(
            self.defense, self.model, clock, self.optimizers,
            lambda: self.defense.loss(self.model, x, y, clock, self.config), check,
        )  # fmt: skip
        self.totals.add_iteration(iteration, len(y))

    @torch.no_grad()
    def monitor_scores(self) -> dict[str, float]:
        """Score the monitored images, clean and under the training adversary; one draw each."""
        if self.monitor is None:
            return {}
        self.model.eval()
        seed_torch(self.config.seed, "monitor", self.epoch)
        attack = training_adversary(self.config)
        hits = torch.zeros(2, dtype=torch.int64, device=self.device)
        count = 0
        for x, y in self.monitor.epoch(0):
            x = self.gear.place_images(x)
            adversarial = attack.craft(self.model, x, y)
            hits += torch.stack([(forward(self.model, z).argmax(1) == y).sum() for z in (x, adversarial)])
            count += len(y)
        clean, pgd = (hits / max(count, 1)).tolist()
        return {f"{self.monitored}_clean": clean, f"{self.monitored}_pgd": pgd, f"{self.monitored}_n": count}


def _settings(config: TrainConfig) -> str:
    """Return the text of ``config.yaml``.

    Raises:
        ConfigError: a setting is no plain value.
    """
    try:
        return yaml.safe_dump(config.to_dict(), sort_keys=False)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"a setting is no plain value ({reason}); use numbers, text, lists and mappings") from None


def _left_behind(path: Path) -> bool:
    """Tell whether ``path`` is the temporary file of a training that was killed while it wrote ``config.yaml``."""
    return path.name.startswith(".config.yaml.") and path.suffix == ".tmp"


def _check_folder(out: Path, config: TrainConfig) -> None:
    """Refuse to train into a folder that holds something else.

    Raises:
        ConfigError: it holds another run, or other files.
    """
    path = out / "config.yaml"
    if path.exists():
        try:
            before = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); give another --out") from None
        if not isinstance(before, dict):
            raise CheckpointError(f"{path} holds no settings; give another --out")
        now = yaml.safe_load(_settings(config))  # as it reads after a round trip: tuples are lists there
        differing = [key for key in now if key not in _FREE and now[key] != before.get(key)]
        if differing:
            shown = ", ".join(f"{key} ({before.get(key)!r} there, {now[key]!r} now)" for key in differing[:4])
            raise ConfigError(f"{out} holds another run: {shown} differ; give another --out, or the same settings")
    elif out.exists() and (not out.is_dir() or any(not _left_behind(path) for path in out.iterdir())):
        raise ConfigError(f"{out} exists and is no run folder; give another --out so that nothing in it is lost")


def train(
    config: TrainConfig,
    *,
    model: nn.Module | None = None,
    data: Any = None,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Run:
    """Train a network as ``config`` says; a run folder that holds an unfinished run of the same config is resumed.

    Args:
        config: see :class:`TrainConfig`; a recipe fills what it leaves open.
        model: a network of one's own, trained in place, in place of the registered one. It maps images in [0, 1] to
            logits.
        data: in place of the registered data set: a training set, or a pair (training set, set to monitor), each an
            ImageData, Dataset, DataLoader or pair of tensors.
        out: the run folder; None writes nothing.
        progress: show a progress bar, or plain lines off a terminal.

    Raises:
        ConfigError: a setting is not allowed, or ``out`` holds another run.
        NonFiniteError: a loss or weight became NaN or infinite.
        DataError: the data are missing or damaged.
    """
    if not isinstance(config, TrainConfig):
        raise ConfigError(f"config is a {type(config).__name__}; give a TrainConfig")
    if model is not None and not isinstance(model, nn.Module):
        raise ConfigError(f"model is a {type(model).__name__}; give a torch.nn.Module, or leave it out")
    config = config.resolve()
    if out is not None and not isinstance(out, (str, os.PathLike)):
        raise ConfigError(f"out is {out!r}; give the path of a run folder, or None to write nothing")
    folder = None if out is None else Path(out)
    if folder is not None:
        _check_folder(folder, config)
    with Reporter(progress) as reporter, isolated_rng():
        training = _Training(config, model, data, folder, reporter)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            atomic_write(folder / "config.yaml", _settings(config))
            atomic_write(folder / "environment.json", json.dumps(environment(training.device), indent=1))
        resumed = training.restore()
        if resumed and training.epoch < training.epochs:
            reporter.line(f"resuming {folder} at epoch {training.epoch}, batch {training.batch}")
        metrics = _run(training)
    training.model.eval()
    return Run(folder, training.model, config, metrics)


def _run(training: _Training) -> list[dict[str, Any]]:
    """Train from where ``training`` stands to the end; return the metrics of all epochs."""
    config, folder = training.config, training.out
    sink = Path(os.devnull) if folder is None else folder / "metrics.jsonl"
    file = MetricsFile(sink, 0 if folder is None else training.metrics_bytes)
    board = _tensorboard(training) if config.tensorboard and folder is not None and _unfinished(training) else None
    schedule = training.defense.schedule_only(config, training.batches)
    expected = None
    if schedule is not None and training.step:
        expected = next(islice(schedule, training.step - 1, None))
    lines: list[dict[str, Any]] = []
    interrupt = _Interrupt()
    checked = False
    try:
        with gears.running(training.gear), interrupt.listening():
            while _unfinished(training):
                start, seen, saved = time.perf_counter(), 0, time.monotonic()
                before = training.seconds
                for x, y in training.source.epoch(training.epoch, training.batch):
                    if not checked:
                        _check_network(training, x, y)
                        checked = True
                    training.run_step(x, y)
                    seen += len(y)
                    training.batch += 1
                    training.seconds = before + time.perf_counter() - start
                    expected = next(schedule) if schedule is not None else None
                    training.reporter(training.step, training.epochs * training.batches, _label(training))
                    if training.step % config.log_every == 0:
                        line = {"kind": "step", "step": training.step, "epoch": training.epoch}
                        file.write(line | _clean(training.totals.means()))
                    due = time.monotonic() - saved > 60 * config.checkpoint_minutes
                    if interrupt.received is not None or (due and training.batch < training.batches):
                        training.save(file)
                        saved = time.monotonic()
                    if interrupt.received is not None:
                        raise KeyboardInterrupt
                if training.batch != training.batches:
                    raise TrainingError(
                        f"the data gave {training.batch} batches in epoch {training.epoch} and promised "
                        f"{training.batches}; give a loader whose length is right"
                    )
                line = {"kind": "epoch", "epoch": training.epoch, "step": training.step}
                line |= _clean(training.totals.means()) | training.monitor_scores()
                line |= theta_report(training.model, expected)
                line["lr"] = training.optimizers["weights"].param_groups[0]["lr"]
                line["seconds"] = training.seconds
                line["images_per_second"] = seen / (time.perf_counter() - start)
                file.write(line)
                lines.append(line)
                if board is not None:
                    _to_board(board, line)
                training.epoch, training.batch, training.seconds = training.epoch + 1, 0, 0.0
                training.totals = Totals(training.device)
                training.save(file)
                training.reporter.line(_epoch_line(training, line))
    finally:
        file.close()
        if board is not None:
            board.close()
    return lines if folder is None else read_metrics(folder)


def _check_network(training: _Training, x: torch.Tensor, y: torch.Tensor) -> None:
    """Try the network on two images before the first step; it is in eval mode, so nothing of it moves.

    Raises:
        InputError: it does not take these images, gives no logits, or has fewer classes than there are labels.
    """
    training.model.eval()
    with isolated_rng(), torch.no_grad():
        try:
            logits = training.model(x[:2])
        except Learn2PerturbError:
            raise
        except Exception as error:  # a stranger's network may raise anything
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise InputError(
                f"the network failed on images of shape {tuple(x.shape[1:])}: {reason}; give images of the size it was "
                "made for"
            ) from error
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or len(logits) != len(x[:2]):
        what = f"shape {tuple(logits.shape)}" if isinstance(logits, torch.Tensor) else f"a {type(logits).__name__}"
        raise InputError(f"the network gives {what} for {len(x[:2])} images; it must give logits (N, classes); wrap it")
    highest = int(getattr(training.source, "labels", y).max())
    if highest >= logits.shape[1]:
        raise InputError(
            f"label {highest} is outside 0..{logits.shape[1] - 1}, the network's classes; check data and network"
        )


def _unfinished(training: _Training) -> bool:
    return training.epoch < training.epochs


def _clean(values: dict[str, float]) -> dict[str, float]:
    """Round to what float32 sums carry, so that lines stay short."""
    return {key: float(f"{value:.7g}") for key, value in values.items()}


def _label(training: _Training) -> str:
    return f"epoch {training.epoch + 1}/{training.epochs}"


def _epoch_line(training: _Training, line: dict[str, Any]) -> str:
    parts = [f"epoch {line['epoch'] + 1}/{training.epochs}", f"loss {line['loss']:.3f}"]
    for key, name in (("clean_accuracy", "clean"), ("adversarial_accuracy", "adv")):
        if key in line:
            parts.append(f"train {name} {line[key]:.1%}")
    for kind in ("clean", "pgd"):
        if f"{training.monitored}_{kind}" in line:
            parts.append(f"{training.monitored} {kind} {line[f'{training.monitored}_{kind}']:.1%}")
    if "theta_mean" in line:
        parts.append(f"theta {line['theta_mean']:.4f}")
        if "theta_schedule" in line:
            parts.append(f"(schedule {line['theta_schedule']:.4f})")
    parts.append(f"{line['images_per_second']:.0f} images/s")
    return "  ".join(parts)


def _tensorboard(training: _Training) -> Any:
    """Open the event writer; events after the checkpoint that is resumed from are purged."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tensorboard's own deprecations are not the user's concern
        from torch.utils.tensorboard import SummaryWriter

        assert training.out is not None
        return SummaryWriter(str(training.out / "tensorboard"), purge_step=training.step)


def _to_board(board: Any, line: dict[str, Any]) -> None:
    for key, value in line.items():
        if isinstance(value, (int, float)) and key not in ("epoch", "step"):
            board.add_scalar(key, value, line["step"])
    for site, values in line.get("theta", {}).items():
        board.add_scalar(f"theta/{site}", values["mean"], line["step"])


def run_seed(config: TrainConfig, *parts: int | str) -> int:
    """Return a seed that belongs to a training and a purpose."""
    return derive_seed(config.seed, *parts)
