"""Where the numbers of a training go besides ``metrics.jsonl``: TensorBoard, CSV, MLflow, Weights & Biases, custom.

A logger is told of the beginning, of lines as ``metrics.jsonl`` has them, of the noise and of images, and of the end.
It sees nothing that the training needs, so one that fails is dropped with a warning, and the training goes on.
"""

from __future__ import annotations

import csv
import importlib
import io
import secrets
import warnings
from abc import ABC
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from torch import Tensor

from learn2perturb.errors import ConfigError, MissingDependencyError, UnknownNameError
from learn2perturb.records import atomic_write
from learn2perturb.training.config import LOGGER_NAMES
from learn2perturb.training.metrics import noise_scales, read_metrics


@final
@dataclass(frozen=True)
class Beginning:
    """What a logger is told at first.

    Attributes:
        name: of the run.
        folder: the run folder; None where nothing is written.
        settings: of the training, as ``config.yaml`` has them.
        step: steps that are done already, where a run goes on.
    """

    name: str
    folder: Path | None
    settings: Mapping[str, Any]
    step: int


class Logger(ABC):
    """Does nothing: a base for loggers, which override what they want to hear of."""

    def begin(self, run: Beginning) -> None:
        """Hear of a training that begins or goes on."""

    def step(self, line: Mapping[str, Any]) -> None:
        """Hear of the means so far, every ``log_every`` steps."""

    def epoch(self, line: Mapping[str, Any], noise: Mapping[str, Tensor]) -> None:
        """Hear of the line of an epoch; ``noise``: the scale of the noise at each site, such as ``theta/bn1``."""

    def images(self, name: str, images: Tensor, step: int) -> None:
        """Hear of images (N, C, H, W) in [0, 1]: some that were attacked, and what they became."""

    def end(self) -> None:
        """Hear that the training has ended, or was stopped."""


def numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a line, those of the noise by site: ``theta/bn1``."""
    found = {
        key: float(value)
        for key, value in line.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and key not in ("epoch", "step")
    }
    for symbol in noise_scales(dict(line)):
        found |= {f"{symbol}/{site}": values["mean"] for site, values in line[symbol].items()}
    return found


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted keys, each value a number, a truth value or a text."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        elif value is not None:
            found[f"{prefix}{key}"] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return found


def _folder(run: Beginning) -> Path:
    assert run.folder is not None  # loggers that a config names are made where there is one
    return run.folder


@final
class TensorBoard(Logger):
    """Scalars, histograms of the noise, adversarial images, and the settings as hparams, in RUN/tensorboard."""

    def begin(self, run: Beginning) -> None:
        """Open the event file; events after the checkpoint that is resumed from are purged."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tensorboard's own deprecations are not the user's concern
            from torch.utils.tensorboard import SummaryWriter

            self._writer: Any = SummaryWriter(str(_folder(run) / "tensorboard"), purge_step=run.step)
        self._settings, self._last = flat(run.settings), {}  # type: ignore[var-annotated]

    def epoch(self, line: Mapping[str, Any], noise: Mapping[str, Tensor]) -> None:
        """Write scalars and histograms."""
        self._last = numbers(line)
        for key, value in self._last.items():
            self._writer.add_scalar(key, value, line["step"])
        for site, scale in noise.items():
            if scale.numel() > 1:
                self._writer.add_histogram(f"noise/{site}", scale.float(), line["step"])

    def images(self, name: str, images: Tensor, step: int) -> None:
        """Write a row of images."""
        self._writer.add_images(name, images, step)

    def end(self) -> None:
        """Write the settings beside what came of them, and close."""
        from torch.utils.tensorboard.summary import hparams

        if self._last:
            results = {f"final/{key}": value for key, value in self._last.items() if "/" not in key}
            for summary in hparams(self._settings, results):
                self._writer.file_writer.add_summary(summary)
            for key, value in results.items():
                self._writer.add_scalar(key, value)
        self._writer.close()


@final
class CSV(Logger):
    """One row an epoch in RUN/metrics.csv, written anew each time, so that a resumed run has no gap."""

    def begin(self, run: Beginning) -> None:
        """Note the folder."""
        self._folder = _folder(run)

    def epoch(self, line: Mapping[str, Any], noise: Mapping[str, Tensor]) -> None:
        """Write all epochs so far."""
        lines = [{"epoch": one["epoch"], "step": one["step"], **numbers(one)} for one in read_metrics(self._folder)]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(key for one in lines for key in one)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        atomic_write(self._folder / "metrics.csv", text.getvalue())


@final
class MLflow(Logger):
    """A run of MLflow, at $MLFLOW_TRACKING_URI; a resumed training goes on in the same run."""

    def begin(self, run: Beginning) -> None:
        """Start or go on with the run."""
        mlflow = _package("mlflow")
        self._mlflow, place = mlflow, _folder(run) / "mlflow.txt"
        known = place.read_text().strip() if place.is_file() else None
        started = mlflow.start_run(run_id=known) if known else mlflow.start_run(run_name=run.name)
        if not known:
            atomic_write(place, started.info.run_id)
            mlflow.log_params(flat(run.settings))

    def epoch(self, line: Mapping[str, Any], noise: Mapping[str, Tensor]) -> None:
        """Log the numbers of an epoch."""
        self._mlflow.log_metrics(numbers(line), step=line["step"])

    def end(self) -> None:
        """End the run."""
        self._mlflow.end_run()


@final
class WandB(Logger):
    """A run of Weights & Biases; with WANDB_MODE=offline it stays on this machine, in RUN."""

    def begin(self, run: Beginning) -> None:
        """Start or go on with the run."""
        wandb, place = _package("wandb"), _folder(run) / "wandb.txt"
        known = place.read_text().strip() if place.is_file() else secrets.token_hex(4)
        atomic_write(place, known)
        self._wandb = wandb
        self._run = wandb.init(
            project="learn2perturb", name=run.name, id=known, resume="allow", dir=str(_folder(run)),
            config=flat(run.settings),
        )  # fmt: skip

    def epoch(self, line: Mapping[str, Any], noise: Mapping[str, Tensor]) -> None:
        """Log the numbers of an epoch, and histograms of the noise."""
        scales = {
            f"noise/{site}": self._wandb.Histogram(scale.float().flatten().numpy()) for site, scale in noise.items()
        }
        self._run.log(numbers(line) | scales, step=line["step"])

    def images(self, name: str, images: Tensor, step: int) -> None:
        """Log images."""
        self._run.log({name: [self._wandb.Image(image.permute(1, 2, 0).numpy()) for image in images]}, step=step)

    def end(self) -> None:
        """End the run."""
        self._run.finish()


LOGGERS: dict[str, Callable[[], Logger]] = dict(zip(LOGGER_NAMES, (TensorBoard, CSV, MLflow, WandB), strict=True))


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise MissingDependencyError(
            f"logger {name!r} needs {name}, which is not installed: pip install 'learn2perturb[track]'"
        ) from None


def build_logger(name: str) -> Logger:
    """Return the logger of a name, or the one that ``module:Class`` makes.

    Raises:
        UnknownNameError: there is none of that name.
        ConfigError: the class cannot be imported, or is no :class:`Logger`.
    """
    module, colon, attribute = name.partition(":")
    if not colon:
        if name not in LOGGERS:
            raise UnknownNameError.of("logger", name, [*LOGGERS, "module:Class"])
        return LOGGERS[name]()
    try:
        made = getattr(importlib.import_module(module), attribute)()
    except Exception as error:
        raise ConfigError(
            f"logger {name!r} cannot be made ({type(error).__name__}: {error}); give a class that is called without "
            "arguments"
        ) from error
    if not isinstance(made, Logger):
        raise ConfigError(f"logger {name!r} is a {type(made).__name__}; it must be a learn2perturb.training.Logger")
    return made


@final
class Loggers:
    """All loggers of a training as one: what one of them cannot do is said once, and it is dropped."""

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self._loggers = list(loggers)

    def __bool__(self) -> bool:
        return bool(self._loggers)

    def tell(self, what: str, *told: Any) -> None:
        """Call the method ``what`` of each.

        Raises:
            MissingDependencyError: at the beginning, a package that a logger needs is not installed.
        """
        for logger in list(self._loggers):
            with self._dropping(logger, what):
                getattr(logger, what)(*told)

    @contextmanager
    def _dropping(self, logger: Logger, what: str) -> Iterator[None]:
        try:
            yield
        except MissingDependencyError:
            raise
        except Exception as error:
            self._loggers.remove(logger)
            warnings.warn(
                f"logger {type(logger).__name__} failed at {what} ({type(error).__name__}: {error}) and is left out; "
                "the training goes on",
                stacklevel=3,
            )
