"""Loading with augmentation: a DataLoader of single images, our source in each mode, and the roofline."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.data import DataLoader

from learn2perturb.cli.bench import baseline
from learn2perturb.cli.bench.roofline import Work, measure_rates
from learn2perturb.cli.bench.scene import Scene
from learn2perturb.cli.bench.settings import BenchSettings
from learn2perturb.cli.bench.timing import Worker, in_turn
from learn2perturb.data import make_source
from learn2perturb.engine import execution
from learn2perturb.progress import Reporter


def _loader(scene: Scene) -> Worker:
    settings = scene.settings
    loader: Iterable[Any] = DataLoader(
        baseline.OneByOne(scene.data), batch_size=settings.batch_size, shuffle=True, num_workers=settings.workers
    )

    def read() -> None:
        for x, y in loader:
            x.to(scene.device), y.to(scene.device)

    return Worker(read)


def _source(scene: Scene, mode: execution.ExecutionMode) -> Worker:
    settings = scene.settings
    source = make_source(
        scene.data, batch_size=settings.batch_size, shuffle=True, augment=True, seed=settings.seed, device=scene.device
    )

    def read() -> None:
        for x, _ in source.epoch(0):
            mode.place_images(x)

    return Worker(read)


def measure(settings: BenchSettings, reporter: Reporter) -> dict[str, dict[str, Any]]:
    """Time an epoch of reading; return an object for each mode, ``baseline`` (the DataLoader) and ``roofline``."""
    scene = Scene.of(settings)
    images = len(scene.data)
    workers = {"baseline": _loader(scene)} | {name: _source(scene, mode) for name, mode in scene.modes.items()}
    timings = in_turn(workers, settings.rounds or 1, scene.device, reporter, "epochs of reading")
    # Every pixel is read as a byte and written as a float32, at least: five bytes.
    roofline = measure_rates(scene.device, torch.float32).roofline(Work(values=scene.data.images.numel() * 5 / 4))
    shown = settings.shown("data") | {"threads": scene.where()["torch_threads"], "device": str(scene.device)}
    result: dict[str, dict[str, Any]] = {
        name: {
            **timing.summary(images),
            "baseline_ratio": timing.ratio_to(timings["baseline"]),
            "roofline_share": roofline["seconds"] / timing.median,
            "settings": shown,
        }
        for name, timing in timings.items()
    }
    result |= {name: {"unavailable": reason} for name, reason in scene.refused.items()}
    result["roofline"] = {
        **roofline,
        "images_per_second": images / roofline["seconds"],
        "settings": shown,
        "environment": scene.where(),
    }
    return result
