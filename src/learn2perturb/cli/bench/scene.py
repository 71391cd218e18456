"""What all measurements share: the device, the images, the available execution modes, the environment."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from learn2perturb.cli.bench.settings import BenchSettings
from learn2perturb.configs import ENGINES
from learn2perturb.data import ImageData, load_data, make_source
from learn2perturb.engine import execution
from learn2perturb.engine.devices import choose_device
from learn2perturb.engine.random import derive_seed
from learn2perturb.errors import ConfigError
from learn2perturb.runs.environment import environment

MODES = tuple(name for name in ENGINES if name != "auto")


@final
@dataclass(frozen=True)
class Scene:
    """Where and on what is measured.

    Attributes:
        settings: those of the benchmark, closed.
        device: that everything runs on.
        data: the images, in memory.
        modes: name to execution mode, of those available here.
        refused: name to reason, of the others.
    """

    settings: BenchSettings
    device: torch.device
    data: ImageData
    modes: dict[str, execution.ExecutionMode]
    refused: dict[str, str]

    @classmethod
    def of(cls, settings: BenchSettings) -> Scene:
        """Find device and execution modes, load or draw the images."""
        device = choose_device(settings.device)
        found, refused = {}, {}
        for name in MODES:
            try:
                found[name] = execution.select(name, device)
            except ConfigError as error:
                refused[name] = str(error)
        return cls(settings, device, _images(settings), found, refused)

    @property
    def fastest(self) -> str:
        """The name of the execution mode that long work takes here."""
        return execution.select("auto", self.device).name

    @property
    def dtype(self) -> torch.dtype:
        """The type of the matrix products of the fastest execution mode; the roofline is estimated in it."""
        return self.modes[self.fastest].dtype or torch.float32

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the images batch by batch, in [0, 1], on the device."""
        return make_source(self.data, batch_size=self.settings.batch_size, device=self.device).epoch(0)

    def first_batch(self) -> tuple[Tensor, Tensor]:
        """Return the first batch."""
        return next(self.batches())

    def where(self) -> dict[str, Any]:
        """Return versions and hardware, for the record."""
        return environment(self.device)


def _images(settings: BenchSettings) -> ImageData:
    count = settings.images or settings.batch_size
    if settings.dataset is not None:
        return load_data(settings.dataset, "train", root=settings.data_dir, limit=count)
    generator = torch.Generator().manual_seed(derive_seed(settings.seed, "images"))
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (count,), generator=generator)
    half = (0.5,) * 3
    return ImageData(
        "random", images, labels, tuple(map(str, range(10))), flip=True, crop_padding=4, mean=half, std=half
    )
