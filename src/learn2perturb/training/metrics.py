"""What a training measures, kept on the device, read once an epoch; ``metrics.jsonl`` has no gap and no double line."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, final

import torch
from torch import Tensor, nn

from learn2perturb.errors import CheckpointError
from learn2perturb.noise import named_noise
from learn2perturb.reading import read_bytes, reading
from learn2perturb.records import atomic_write
from learn2perturb.training.alternating import Iteration


def noise_scales(line: dict[str, Any]) -> list[str]:
    """Return what the line of an epoch calls the scales of the noise: ``theta``, ``alpha``, a law's own name."""
    return [key for key, value in line.items() if isinstance(value, dict) and f"{key}_mean" in line]


@final
class Totals:
    """Running sums of an epoch: they are saved with a checkpoint, so that a resumed epoch reports all of its steps."""

    def __init__(self, device: torch.device, state: dict[str, Tensor] | None = None) -> None:
        self._device = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
        # Names that are added together, and (sum, weight) of each as the rows of one tensor.
        self._sums: dict[tuple[str, ...], Tensor] = {
            (key,): value.to(self._device).view(1, 2) for key, value in (state or {}).items()
        }

    def add(self, values: Mapping[str, Tensor | float], weight: float) -> None:
        """Add each value with ``weight`` (examples or steps) to the mean of its name; no synchronisation."""
        if not values:
            return
        # A few launches for all of them: on a GPU a launch for each would take longer than the sums.
        numbers = torch.stack([torch.as_tensor(v, device=self._device).detach().double() for v in values.values()])
        pairs = torch.stack([numbers, torch.ones_like(numbers)], dim=1) * weight
        names = tuple(values)
        self._sums[names] = self._sums[names] + pairs if names in self._sums else pairs

    def add_iteration(self, iteration: Iteration, examples: int) -> None:
        """Add the losses, hits and slopes of one iteration."""
        losses = iteration.losses
        parts: dict[str, Tensor | None] = {
            "loss": losses.total,
            "clean_loss": losses.clean,
            "adversarial_loss": losses.adversarial,
            "clean_accuracy": None if losses.clean_correct is None else losses.clean_correct.double().mean(),
            "adversarial_accuracy": (
                None if losses.adversarial_correct is None else losses.adversarial_correct.double().mean()
            ),
            **losses.extra,
        }
        slopes = {
            "theta_loss_slope": iteration.loss_slope, "theta_regulariser_slope": iteration.regulariser_slope,
        }  # fmt: skip
        for group, weight in ((parts, examples), (slopes, 1)):
            self.add({key: value for key, value in group.items() if value is not None}, weight)

    def means(self) -> dict[str, float]:
        """Return the means so far; this waits for the device."""
        values = {key: pair.tolist() for key, pair in self._by_name().items()}
        result = {key: total / weight for key, (total, weight) in values.items() if weight}
        slope, regulariser = result.get("theta_loss_slope"), result.get("theta_regulariser_slope")
        if slope is not None and regulariser:
            result["theta_slope_ratio"] = slope / regulariser
        return result

    def state(self) -> dict[str, Tensor]:
        """Return the sums, on the CPU."""
        return {key: value.cpu() for key, value in self._by_name().items()}

    def _by_name(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for names, pairs in self._sums.items():
            for key, pair in zip(names, pairs, strict=True):
                found[key] = found[key] + pair if key in found else pair
        return found


def noise_report(model: nn.Module, schedule: float | None) -> dict[str, Any]:
    """Describe the learned noise per site: theta, PNI's |alpha|, Adv-BNN's sigma = exp(s), each under its own name.

    Mean, spread (standard deviation), extremes, and the departure from the schedule: the root mean square of
    ``theta - schedule``, where the schedule is what the regulariser alone gives (Learn2Perturb-R). A theta that merely
    follows it has learned nothing from the loss.
    """
    report: dict[str, Any] = {}
    for site, module in named_noise(model):
        if not module.noise_parameters():
            continue
        symbol, value = module.scale()
        scale = value.detach().double()
        described = {
            "mean": scale.mean().item(),
            "spread": scale.std(correction=0).item(),
            "minimum": scale.min().item(),
            "maximum": scale.max().item(),
        }
        if schedule is not None:
            described["departure"] = (scale - schedule).square().mean().sqrt().item()
        # Noise on a weight is named by the weight: one layer may have several.
        report.setdefault(symbol, {})[".".join([site, *module.moved])] = described
    for symbol, sites in list(report.items()):
        report[f"{symbol}_mean"] = sum(site["mean"] for site in sites.values()) / len(sites)
        if schedule is not None:
            report[f"{symbol}_schedule"] = schedule
            report[f"{symbol}_departure"] = max(site["departure"] for site in sites.values())
    return report


def noise_values(model: nn.Module) -> dict[str, Tensor]:
    """Return the scale of the learned noise at each site, by ``theta/bn1``, on the CPU."""
    found = {}
    for site, module in named_noise(model):
        if module.noise_parameters():
            symbol, value = module.scale()
            found[f"{symbol}/{'.'.join([site, *module.moved])}"] = value.detach().float().cpu()
    return found


@final
class MetricsFile:
    """Lines of JSON, appended; what a checkpoint says of them comes first, whatever the file has become since.

    Args:
        path: the file, or None to write nothing.
        text: what it is to hold so far; the rest of it is cut off, and a file that holds anything else is written anew.
    """

    def __init__(self, path: Path | None, text: bytes = b"") -> None:
        self._path, self._text = path, bytearray(text)
        self._file: BinaryIO | None = None
        if path is None:
            return
        try:
            there = path.read_bytes()
        except OSError:
            there = None
        if there is None or not there.startswith(text):
            atomic_write(path, text)
        self._file = open(path, "r+b")  # noqa: SIM115 - closed by close()
        self._file.truncate(len(text))
        self._file.seek(len(text))

    def write(self, line: dict[str, Any]) -> None:
        """Append one line."""
        content = (json.dumps(line) + "\n").encode()
        if self._file is not None:
            self._text += content
            with self._explained():
                self._file.write(content)
                self._file.flush()

    def sync(self) -> bytes:
        """Put all lines on disk and return them: they belong into the checkpoint."""
        if self._file is not None:
            with self._explained():
                self._file.flush()
                os.fsync(self._file.fileno())
        return bytes(self._text)

    def lost(self) -> bool:
        """Tell whether the file was deleted or moved since it was opened."""
        if self._path is None or self._file is None:
            return False
        try:
            return not os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))
        except OSError:
            return True

    def rewrite(self) -> None:
        """Write all lines again where they were."""
        if self._path is not None and self._file is not None:
            self._file.close()
            atomic_write(self._path, bytes(self._text))
            self._file = open(self._path, "ab")  # noqa: SIM115

    def close(self) -> None:
        """Close the file; what a full disk does not take has been reported, and is written again by the next resume."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"{self._path} cannot be written: {error.strerror or error}; free space, then the same command resumes"
            ) from None


def parse_metrics(content: bytes) -> tuple[list[dict[str, Any]], int | None]:
    """Return the lines of a ``metrics.jsonl`` up to the first that is damaged, and its number, None where none is.

    A last line without its end is one that was being written: it counts if it is whole, else it is left out.
    """
    found: list[dict[str, Any]] = []
    lines = content.split(b"\n")
    for number, raw in enumerate(lines, 1):
        if not raw:
            continue
        try:
            line = json.loads(raw)
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict) and isinstance(line.get("kind"), str):
            found.append(line)
        elif number == len(lines):
            break
        else:
            return found, number
    return found, None


def read_metrics(run: Path, kind: str = "epoch") -> list[dict[str, Any]]:
    """Return the lines of one kind (``epoch`` or ``step``) of a run's ``metrics.jsonl``.

    Raises:
        CheckpointError: a line is damaged, or the file cannot be read.
    """
    path = Path(run) / "metrics.jsonl"
    if not path.exists():
        return []
    with reading(f"{path} cannot be read", "give a run folder", CheckpointError):
        content = read_bytes(path, path.stat().st_size)
    lines, damaged = parse_metrics(content)
    if damaged is not None:
        raise CheckpointError(
            f"{path} is damaged in line {damaged}; run the training's command again: it puts the file right from the "
            "newest checkpoint"
        )
    return [line for line in lines if line["kind"] == kind]
