"""One step of adversarial training: the baseline, each execution mode, and the roofline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from learn2perturb.cli.bench import baseline
from learn2perturb.cli.bench.roofline import Work, measure_rates, noise_numbers, one_pass
from learn2perturb.cli.bench.scene import Scene
from learn2perturb.cli.bench.settings import BenchSettings
from learn2perturb.cli.bench.timing import Worker, in_turn
from learn2perturb.engine import execution
from learn2perturb.engine.random import seed_torch
from learn2perturb.models import build_model
from learn2perturb.noise import perturb
from learn2perturb.progress import Reporter
from learn2perturb.training.config import TrainConfig
from learn2perturb.training.recorded import WARM_UPS
from learn2perturb.training.state import Training

Call = Callable[[], object]
# The training is so long that compiling is worth its cost; the first call shows that cost.
_EPOCHS = 100_000


def config_of(settings: BenchSettings, engine: str, device: str) -> TrainConfig:
    """Return the config of the training whose step is timed: recipe ``fast``, noise and adversary on from the start."""
    options = {"noise_delay": 0, "sharing": settings.sharing} if settings.defense == "learn2perturb" else {}
    return TrainConfig(
        defense=settings.defense, model=settings.model, recipe="fast", epochs=_EPOCHS, batch_size=settings.batch_size,
        attack_steps=settings.attack_steps, engine=engine, device=device, monitor=0, seed=settings.seed,
        options=options,
    ).resolve()  # fmt: skip


def baseline_call(scene: Scene, *, attack: bool = True, noise: bool = True) -> Call:
    """Return the baseline's step on the first batch, whole or without one of its parts."""
    settings = config_of(scene.settings, "plain", str(scene.device)).closed()
    settings = settings if attack else replace(settings, attack_steps=0)
    seed_torch(scene.settings.seed, "weights")
    noisy = noise and scene.settings.defense == "learn2perturb"
    step = baseline.training_step(
        baseline.network(scene.settings.model, scene.data, noise=noisy, device=scene.device), settings
    )
    x, y = scene.first_batch()
    return lambda: step(x, y)


def package_call(scene: Scene, name: str, *, attack: bool = True, noise: bool = True) -> Call:
    """Return the package's step in an execution mode on the first batch, whole or without one of its parts.

    Without attack is a ball of radius 0, so clean and adversarial passes stay; without noise is PGD training.
    """
    config = config_of(scene.settings, name, str(scene.device))
    config = config if attack else replace(config, eps=0.0)
    config = config if noise else replace(config, defense="pgd_at", options={})
    training = Training(config, None, scene.data, None, Reporter(False))
    x, y = scene.first_batch()

    def call() -> None:
        with execution.running(training.mode):
            training.run_step(x, y)

    return call


def needed(scene: Scene) -> Work:
    """Return what a step needs: the attack's passes and those that train, on a whole batch."""
    settings = scene.settings
    own = config_of(settings, "plain", "cpu").closed()
    x = scene.data.images[:2].float() / 255
    model = build_model(settings.model, num_classes=scene.data.num_classes, input_shape=scene.data.input_shape).eval()
    attacking = own.attack_steps * own.attack_eot
    training = bool(own.alpha) + bool(own.beta)
    size = len(scene.data)  # one batch
    work = one_pass(model, x, weights=False) * (attacking * size) + one_pass(model, x, weights=True) * (training * size)
    if settings.defense == "learn2perturb":
        perturb(model, input_shape=scene.data.input_shape)
        rows = size if settings.sharing == "per_example" else 1
        work += Work(draws=noise_numbers(model) * rows * (attacking + training))
    return work


def measure(settings: BenchSettings, reporter: Reporter) -> dict[str, dict[str, Any]]:
    """Time the steps; return an object for each execution mode, ``baseline`` and ``roofline`` among them.

    ``attack_share`` and ``noise_share`` are what the step costs more than the same step without attack, or without
    noise, timed in turn with it after the step itself has been: differences of medians, 0 where they are below it.
    """
    scene = Scene.of(settings)
    rounds, size = settings.rounds or 1, len(scene.data)
    whole = {"baseline": Worker(baseline_call(scene))}
    whole |= {name: _warmed(package_call(scene, name), scene.modes[name]) for name in scene.modes}
    timings = in_turn(whole, rounds, scene.device, reporter, "training steps")
    shares = _shares(scene, whole, reporter)
    work = needed(scene)
    roofline = measure_rates(scene.device, scene.dtype).roofline(work)
    shown = settings.shown("step") | {"threads": scene.where()["torch_threads"], "device": str(scene.device)}
    result: dict[str, dict[str, Any]] = {}
    for name, timing in timings.items():
        result[name] = {
            **timing.summary(size),
            "baseline_ratio": timing.ratio_to(timings["baseline"]),
            "roofline_share": roofline["seconds"] / timing.median,
            **shares[name],
            "settings": shown,
        }
    result |= {name: {"unavailable": reason} for name, reason in scene.refused.items()}
    result["roofline"] = {
        **roofline,
        "images_per_second": size / roofline["seconds"],
        "settings": shown,
        "environment": scene.where(),
    }
    return result


def _warmed(call: Call, mode: execution.ExecutionMode) -> Worker:
    """Return a worker whose first call goes on until the step is replayed, where steps are recorded."""
    calls = WARM_UPS + 2 if mode.recording else 1

    def warm() -> None:
        for _ in range(calls):
            call()

    return Worker(call, warm)


def _shares(scene: Scene, whole: dict[str, Worker], reporter: Reporter) -> dict[str, dict[str, float]]:
    noisy = scene.settings.defense == "learn2perturb"
    parts: dict[tuple[str, str], Worker] = {}
    for name, worker in whole.items():
        parts[name, "whole"] = Worker(worker.run)
        for part in ("attack", "noise") if noisy else ("attack",):
            left = {"attack": part != "attack", "noise": part != "noise"}
            if name == "baseline":
                parts[name, part] = Worker(baseline_call(scene, **left))
            else:
                parts[name, part] = _warmed(package_call(scene, name, **left), scene.modes[name])
    rounds = max(1, (scene.settings.rounds or 1) // 2)
    timings = in_turn(parts, rounds, scene.device, reporter, "steps without attack, without noise")
    shares: dict[str, dict[str, float]] = {}
    for name in whole:
        entire = timings[name, "whole"].median
        shares[name] = {"attack_share": 0.0, "noise_share": 0.0}
        for part in ("attack", "noise"):
            if (name, part) in timings:
                shares[name][f"{part}_share"] = max(0.0, 1 - timings[name, part].median / entire)
    return shares
