"""The training loop: stages, epochs, batches; checkpoints that resume bit for bit; a NaN or Ctrl-C loses nothing.

Every random number of a step is a function of (seed, step), and the order and augmentation of a batch of (seed, epoch,
batch). So a training resumed at any step goes on exactly as if it had never stopped, without any generator's state.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, final

from torch import Tensor, nn

from learn2perturb.brief import brief
from learn2perturb.data import check_labels
from learn2perturb.defenses import training_adversary
from learn2perturb.engine import compile_time, execution
from learn2perturb.engine.identity import fingerprint_of_weights
from learn2perturb.engine.modes import own_modes
from learn2perturb.engine.random import isolated_rng
from learn2perturb.engine.ranks import joined
from learn2perturb.errors import ConfigError, Interrupted, MissingDependencyError, TrainingError
from learn2perturb.progress import Reporter
from learn2perturb.records import clear_temporaries, make_folder
from learn2perturb.runs import lock
from learn2perturb.runs.files import checkpoints
from learn2perturb.runs.noise_maps import FILE as NOISE_MAPS
from learn2perturb.runs.noise_maps import NoiseMaps
from learn2perturb.training.config import TrainConfig
from learn2perturb.training.folder import METRICS, SETTINGS, check_folder, settings_text, write_settings
from learn2perturb.training.interrupt import Interrupt
from learn2perturb.training.loggers import Beginning, Logger, Loggers, build_logger
from learn2perturb.training.metrics import (
    MetricsFile,
    Totals,
    noise_report,
    noise_scales,
    noise_values,
    read_metrics,
)
from learn2perturb.training.restoring import UNPLANNED
from learn2perturb.training.state import Training, check_network

SHOWN = 8  # images that loggers are given at the end


@final
@dataclass(frozen=True)
class Run:
    """A finished training.

    Attributes:
        folder: the run folder, or None when nothing was to be written.
        model: the trained network, in eval mode.
        config: the resolved config.
        metrics: one dictionary an epoch.
    """

    __repr__ = brief

    folder: Path | None
    model: nn.Module
    config: TrainConfig
    metrics: list[dict[str, Any]] = field(repr=False, default_factory=list)


def train(
    config: TrainConfig,
    *,
    model: nn.Module | None = None,
    data: Any = None,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
    loggers: Sequence[Logger] = (),
) -> Run:
    """Train a network as ``config`` says; a run folder that holds an unfinished run of the same config is resumed.

    Args:
        config: see :class:`TrainConfig`; a recipe fills what it leaves open.
        model: a custom network, trained in place, in place of the registered one. It maps images in [0, 1] to
            logits.
        data: in place of the registered data set: a training set, or a pair (training set, set to monitor), each an
            ImageData, Dataset, DataLoader or pair of tensors.
        out: the run folder; None writes nothing.
        progress: show a progress bar, or plain lines off a terminal.
        loggers: of your own, beside those that ``config`` names.

    Raises:
        ConfigError: a setting is not allowed, or ``out`` holds another run.
        NonFiniteError: a loss or weight became NaN or infinite.
        DataError: the data are missing or damaged.
        Interrupted: a KeyboardInterrupt, after Ctrl-C, SIGTERM or SIGHUP; its text says what is saved.
    """
    if not isinstance(config, TrainConfig):
        raise ConfigError(f"config is a {type(config).__name__}; give a TrainConfig")
    if model is not None and not isinstance(model, nn.Module):
        raise ConfigError(f"model is a {type(model).__name__}; give a torch.nn.Module, or leave it out")
    config = config.resolve()
    if out is not None and not isinstance(out, (str, os.PathLike)):
        raise ConfigError(f"out is {out!r}; give the path of a run folder, or None to write nothing")
    folder = None if out is None else Path(out)
    with (
        _told(folder),
        joined() as ranks,
        _held(folder if ranks.first else None, config),
        Reporter(progress, silent=not ranks.first) as reporter,
        own_modes(),
        isolated_rng(),
    ):
        training = Training(config, model, data, folder, reporter, ranks)
        _check_alike(training)
        resumed = training.restore()
        if resumed and _unfinished(training):
            reporter.line(f"resuming {folder} at epoch {training.epoch}, batch {training.batch}")
        if training.out is not None:
            # A finished run that is called again was made where and by what the file says already.
            write_settings(training.out, config, training.device, where=not resumed or _unfinished(training))
        metrics = _Loop(training, loggers).run()
    training.finish()
    _write_noise_maps(training)
    return Run(folder, training.model, config, metrics)


def _write_noise_maps(training: Training) -> None:
    """Write the scale of the noise, place by place, of the network as it is to be used: a page shows it."""
    scales = noise_values(training.model)
    if training.out is not None and scales:
        maps = NoiseMaps.of(
            {name: value.numpy() for name, value in scales.items()}, fingerprint_of_weights(training.model)
        )
        maps.save(training.out / NOISE_MAPS)


def _check_alike(training: Training) -> None:
    """Refuse processes that were not started alike: one training has one config and one beginning."""
    if not training.ranks.alone:
        training.ranks.agree("settings", settings_text(training.config))
        training.ranks.agree("first weights", fingerprint_of_weights(training.model))


@contextmanager
def _held(folder: Path | None, config: TrainConfig) -> Iterator[None]:
    """Hold the run folder, made if it is not there, against other trainings."""
    if folder is None:
        yield
        return
    check_folder(folder, config)
    try:
        made = not folder.exists()
        make_folder(folder)
    except OSError as error:
        raise ConfigError(f"out {folder} cannot be made: {error.strerror or error}; give another place") from None
    try:
        with lock.held(folder):
            check_folder(folder, config)  # another training may have made it its own meanwhile
            clear_temporaries(folder)
            yield
    finally:
        if made and not (folder / SETTINGS).exists():  # nothing has begun: leave nothing behind
            with suppress(OSError):
                (folder / lock.NAME).unlink(missing_ok=True)
                folder.rmdir()


@contextmanager
def _told(folder: Path | None) -> Iterator[None]:
    """Let a training that is stopped end with what is saved of it, as the disk has it."""
    try:
        yield
    except KeyboardInterrupt as stop:
        saved = [] if folder is None else checkpoints(folder)
        kept = "nothing is saved"
        if saved:
            kept = f"the state is saved in {folder} (step {int(saved[-1].name)}); the same command again resumes"
        raise Interrupted.of(stop, kept) from None


@final
class _Loop:
    """Epochs and batches from where a training stands to its end, and what is written down on the way."""

    def __init__(self, training: Training, loggers: Sequence[Logger] = ()) -> None:
        self.training, self.folder = training, training.out
        self.file = MetricsFile(None if self.folder is None else self.folder / METRICS, training.metrics)
        self.loggers = Loggers(_wanted(training, loggers) if _unfinished(training) else [])
        # What the regulariser alone would have made of the noise after the last step.
        self.schedule = training.defense.schedule_only(training.settings, training.batches)
        if training.extended and training.settings.schedule not in UNPLANNED:
            self.schedule = None  # the epochs before had another learning rate
        self.expected = None
        if self.schedule is not None and training.step:
            self.expected = next(islice(self.schedule, training.step - 1, None))
        self.ranks = training.ranks
        say = partial(training.reporter.line, always=True)
        self.interrupt = Interrupt(say, saves=training.folder is not None, ranks=self.ranks)
        self.compiled = compile_time.seconds_spent()
        self.classes: int | None = None
        self.saved = time.monotonic()
        self.lines: list[dict[str, Any]] = []

    def run(self) -> list[dict[str, Any]]:
        """Train to the end; return the metrics of all epochs."""
        training = self.training
        if training.mode.compiled_rows and _unfinished(training):
            training.reporter.line(
                "compiling in the first steps: a minute or two, seconds once torch has it in its cache"
            )
        try:
            self.loggers.tell("begin", _beginning(training))
        except MissingDependencyError:
            self.file.close()
            raise
        try:
            with execution.running(training.mode), self.interrupt.listening():
                while _unfinished(training):
                    self._epoch()
                if self.loggers and self.lines:
                    self._show_images()
            if self.folder is not None and not checkpoints(self.folder):
                training.save(self.file)  # no epoch was asked for: the network as it starts can still be loaded
        finally:
            self.file.close()
            self.loggers.tell("end")
        return self.lines if training.folder is None else self._written()

    def _show_images(self) -> None:
        """Give the loggers a few monitored images, and what the training's adversary makes of them at the end."""
        training = self.training
        if training.monitor is None or not self.ranks.alone:
            return
        with isolated_rng(), training.averaged():
            x, y = (part[:SHOWN] for part in next(iter(training.monitor.epoch(0))))
            training.model.eval()
            crafted = training_adversary(training.settings).craft(training.model, training.mode.place_images(x), y)
        for name, images in (("images/clean", x), ("images/adversarial", crafted)):
            self.loggers.tell("images", name, images.detach().float().cpu().contiguous(), training.step)

    def _written(self) -> list[dict[str, Any]]:
        """Return the metrics of all epochs, on every process as the first has written them."""
        lines = self.ranks.told(lambda: "" if self.folder is None else json.dumps(read_metrics(self.folder)))
        epochs: list[dict[str, Any]] = json.loads(lines)
        return epochs

    def _epoch(self) -> None:
        """Train on every batch that is left of this epoch, then score, write down and save."""
        training = self.training
        self.saved, start, before = time.monotonic(), time.perf_counter(), training.seconds
        looks, seen, labels = training.looks_at_labels, 0, []
        for x, y in training.source.epoch(training.epoch, training.batch):
            if looks:
                labels.append(y)
            self._check_batch(x, y)
            training.run_step(x, y)
            seen += len(y)
            training.batch += 1
            training.seconds = before + time.perf_counter() - start
            self._after_step()
        training.look_at("train", training.source, labels, self.classes or 1)
        if training.batch != training.batches:
            raise TrainingError(
                f"the data gave {training.batch} batches in epoch {training.epoch} and promised {training.batches}; "
                "give a loader whose length is right"
            )
        self._after_epoch(start, seen)

    def _check_batch(self, x: Tensor, y: Tensor) -> None:
        """Try the network on the first images; check the labels of every batch, unless all were checked at once."""
        if self.classes is None:
            self.classes = check_network(self.training, x, y)
        elif not hasattr(self.training.source, "labels"):
            check_labels(y, self.classes)

    def _after_step(self) -> None:
        """Report, write a line now and then, save when it is due or asked for, and stop if that was asked for."""
        training, config = self.training, self.training.config
        self.expected = next(self.schedule) if self.schedule is not None else None
        training.reporter(training.step, training.epochs * training.batches, _label(training))
        if training.step % config.log_every == 0:
            training.check_finite()
            line = {"kind": "step", "step": training.step, "epoch": training.epoch}
            line |= _clean(training.totals.means())
            self.file.write(line)
            self.loggers.tell("step", line)
        due = time.monotonic() - self.saved > 60 * config.checkpoint_minutes
        if self.interrupt.asked() or (due and training.batch < training.batches):
            training.save(self.file)
            self.saved = time.monotonic()
        self.interrupt.check()

    def _after_epoch(self, start: float, seen: int) -> None:
        """Score, write the line of the epoch, save; ``seen`` images since ``start``."""
        training = self.training
        self.interrupt.after = "the scores of this epoch"
        line = self._epoch_values()
        if training.best is not None:
            with training.averaged():
                training.best.look(training.model, line[f"{training.monitored}_pgd"], training.epoch, training.step)
            line["best_epoch"] = training.best.epoch
        line["images_per_second"] = seen / (time.perf_counter() - start)
        if (spent := compile_time.seconds_spent() - self.compiled) > 0:
            line["compile_seconds"] = spent
            self.compiled += spent
        self.file.write(line)
        self.lines.append(line)
        if self.loggers:
            self.loggers.tell("epoch", line, noise_values(training.model))
        training.epoch, training.batch, training.seconds = training.epoch + 1, 0, 0.0
        training.totals = Totals(training.device)
        if not self.ranks.alone:
            self.ranks.agree("weights", fingerprint_of_weights(training.model))
        training.save(self.file)
        training.reporter.line(_epoch_line(training, line))
        if training.ended and training.epoch < training.epochs and training.best is not None:
            training.reporter.line(f"stopped early: no epoch was better than epoch {training.best.epoch + 1}")
        self.interrupt.asked()
        self.interrupt.check()
        self.interrupt.after = "this step"

    def _epoch_values(self) -> dict[str, Any]:
        """Return the line of the epoch that has just ended."""
        training = self.training
        line: dict[str, Any] = {"kind": "epoch", "epoch": training.epoch, "step": training.step}
        line |= _clean(training.totals.means()) | training.monitor_scores()
        line |= noise_report(training.model, self.expected)
        line["lr"] = float(training.optimizers["weights"].param_groups[0]["lr"])
        line["seconds"] = training.seconds
        return line


def _unfinished(training: Training) -> bool:
    return not training.ended


def _clean(values: dict[str, float]) -> dict[str, float]:
    """Round to what float32 sums carry, so that lines stay short."""
    return {key: float(f"{value:.7g}") for key, value in values.items()}


def _label(training: Training) -> str:
    return f"epoch {training.epoch + 1}/{training.epochs}"


def _epoch_line(training: Training, line: dict[str, Any]) -> str:
    parts = [f"epoch {line['epoch'] + 1}/{training.epochs}", f"loss {line['loss']:.3f}"]
    for key, name in (("clean_accuracy", "clean"), ("adversarial_accuracy", "adv")):
        if key in line:
            parts.append(f"train {name} {line[key]:.1%}")
    for kind in ("clean", "pgd"):
        if f"{training.monitored}_{kind}" in line:
            parts.append(f"{training.monitored} {kind} {line[f'{training.monitored}_{kind}']:.1%}")
    for symbol in noise_scales(line):
        parts.append(f"{symbol} {line[f'{symbol}_mean']:.4f}")
        if f"{symbol}_schedule" in line:
            parts.append(f"(schedule {line[f'{symbol}_schedule']:.4f})")
    parts.append(f"{line['images_per_second']:.0f} images/s")
    if line.get("compile_seconds", 0.0) >= 1:
        parts.append(f"(compiling took {line['compile_seconds']:.0f} s)")
    return "  ".join(parts)


def _beginning(training: Training) -> Beginning:
    name = training.config.describe() if training.out is None else training.out.name
    return Beginning(name, training.out, training.config.to_dict(), training.step)


def _wanted(training: Training, given: Sequence[Logger]) -> list[Logger]:
    """Return the loggers of the first process: those that the config names need a folder."""
    if not training.ranks.first:
        return []
    named = [*(["tensorboard"] if training.config.tensorboard else []), *training.config.loggers]
    return [*(build_logger(name) for name in dict.fromkeys(named) if training.out is not None), *given]
