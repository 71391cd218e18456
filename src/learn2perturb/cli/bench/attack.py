"""PGD and EOT-PGD on a network with random weights: the baseline, each execution mode, and the roofline."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from learn2perturb.attacks import PGD
from learn2perturb.cli.bench import baseline
from learn2perturb.cli.bench.roofline import Work, measure_rates, noise_numbers, one_pass
from learn2perturb.cli.bench.scene import Scene
from learn2perturb.cli.bench.settings import BenchSettings
from learn2perturb.cli.bench.timing import Timing, Worker, in_turn
from learn2perturb.engine import execution
from learn2perturb.engine.random import seed_torch
from learn2perturb.models import build_model
from learn2perturb.noise import perturb
from learn2perturb.progress import Reporter

Craft = Callable[[PGD, Tensor, Tensor], Tensor]
STEP_SIZE = 2 / 255


def attacks_of(settings: BenchSettings) -> dict[str, PGD]:
    """Return the attacks by name; a network without noise has equal gradients in every draw, so PGD alone."""
    steps = settings.attack_steps or 1
    pgd = PGD(step_size=STEP_SIZE, steps=steps)
    found = {f"pgd{steps}": pgd}
    if settings.defense == "learn2perturb":
        found[f"eot-pgd{steps}"] = replace(pgd, eot=settings.eot)
    return found


def _network(scene: Scene) -> nn.Module:
    settings, data = scene.settings, scene.data
    seed_torch(settings.seed, "weights")
    model = build_model(settings.model, num_classes=data.num_classes, input_shape=data.input_shape)
    if settings.defense == "learn2perturb":
        perturb(model, input_shape=data.input_shape, sharing=settings.sharing)
    return model.to(scene.device).eval()


def _baseline(scene: Scene) -> Craft:
    noisy = scene.settings.defense == "learn2perturb"
    seed_torch(scene.settings.seed, "weights")
    model = baseline.network(scene.settings.model, scene.data, noise=noisy, device=scene.device).eval()

    def craft(attack: PGD, x: Tensor, y: Tensor) -> Tensor:
        return baseline.attack(
            model, x, y, eps=attack.eps, step_size=attack.step_size, steps=attack.steps, eot=attack.eot
        )

    return craft


def _package(scene: Scene, mode: execution.ExecutionMode) -> Craft:
    model = mode.place(_network(scene))

    def craft(attack: PGD, x: Tensor, y: Tensor) -> Tensor:
        with execution.running(mode):
            return attack(model, mode.place_images(x), y)

    return craft


def _worker(craft: Craft, attack: PGD, batches: Iterable[tuple[Tensor, Tensor]]) -> Worker:
    def over_all(attack: PGD) -> None:
        for x, y in batches:
            craft(attack, x, y)

    # One step compiles and allocates what all of them need.
    return Worker(lambda: over_all(attack), lambda: over_all(replace(attack, steps=1, eot=1)))


def needed(scene: Scene, attack: PGD, batches: Iterable[tuple[Tensor, Tensor]]) -> Work:
    """Return what an attack on all batches needs, the check of its success left out."""
    settings, data = scene.settings, scene.data
    model = build_model(settings.model, num_classes=data.num_classes, input_shape=data.input_shape).eval()
    sizes = [len(y) for _, y in batches]
    passes = attack.steps * attack.eot
    work = one_pass(model, data.images[:2].float() / 255, weights=False) * (passes * sum(sizes))
    if settings.defense == "learn2perturb":
        perturb(model, input_shape=data.input_shape)
        rows = sum(sizes) if settings.sharing == "per_example" else len(sizes)
        work += Work(draws=noise_numbers(model) * rows * passes)
    return work


def measure(settings: BenchSettings, reporter: Reporter) -> dict[str, dict[str, Any]]:
    """Time the attacks; return an object for each execution mode: one object for each attack, and their sums."""
    scene = Scene.of(settings)
    batches, images = list(scene.batches()), len(scene.data)
    attacks = attacks_of(settings)
    crafts = {"baseline": _baseline(scene)} | {name: _package(scene, mode) for name, mode in scene.modes.items()}
    workers = {
        (name, label): _worker(craft, attack, batches)
        for label, attack in attacks.items()
        for name, craft in crafts.items()
    }
    timings = in_turn(workers, settings.rounds or 1, scene.device, reporter, "attacks")
    rates = measure_rates(scene.device, scene.dtype)
    rooflines = {label: rates.roofline(needed(scene, attack, batches)) for label, attack in attacks.items()}
    shown = settings.shown("attack") | {"threads": scene.where()["torch_threads"], "device": str(scene.device)}

    def numbers(timing: Timing, label: str) -> dict[str, Any]:
        return {
            **timing.summary(images),
            "baseline_ratio": timing.ratio_to(timings["baseline", label]),
            "roofline_share": rooflines[label]["seconds"] / timing.median,
        }

    result: dict[str, dict[str, Any]] = {}
    for name in crafts:
        seconds = sum(timings[name, label].median for label in attacks)
        each = {label: numbers(timings[name, label], label) for label in attacks}
        result[name] = {"seconds": seconds, "images_per_second": images / seconds, **each, "settings": shown}
    result |= {name: {"unavailable": reason} for name, reason in scene.refused.items()}
    least = sum(roofline["seconds"] for roofline in rooflines.values())
    each = {
        label: {**roofline, "images_per_second": images / roofline["seconds"]} for label, roofline in rooflines.items()
    }
    result["roofline"] = {
        "seconds": least,
        "images_per_second": images / least,
        **each,
        "settings": shown,
        "environment": scene.where(),
    }
    return result
