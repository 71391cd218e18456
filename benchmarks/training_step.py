"""Time one adversarial training step: textbook, plain gear, fast gear, taken in turn in one process.

    python benchmarks/training_step.py --defense learn2perturb

*Textbook* is the step as research code writes it: eager float32, NCHW, a whole ``loss.backward()`` in every step of the
attack, one noise map a forward pass (``--sharing`` does not change that). *plain* and *fast* are this package's gears.
Random images serve as well as real ones. The first step of each, with its compilation, is shown apart.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

import learn2perturb as l2p
from learn2perturb.data import ImageData
from learn2perturb.engine import gears
from learn2perturb.progress import Reporter
from learn2perturb.training.environment import environment
from learn2perturb.training.state import Training

EPS, STEP, STEPS = 8 / 255, 0.01, 7
CIFAR_STD = (0.2470, 0.2435, 0.2616)


def textbook(model_name: str, noisy: bool) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Return a training step written without any of this package's engine, attack or training code."""
    model = l2p.build_model(model_name)
    if noisy:
        l2p.perturb(model, sharing="per_batch")
    noise = l2p.noise_parameters(model)
    known = {id(parameter) for parameter in noise}
    weights = [parameter for parameter in model.parameters() if id(parameter) not in known]
    optimizers = [torch.optim.SGD(weights, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)]
    if noise:
        optimizers.append(torch.optim.SGD(noise, lr=0.1, momentum=0.9, nesterov=True))

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        model.eval()
        adversarial = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)
        for _ in range(STEPS):
            adversarial = adversarial.detach().requires_grad_()
            F.cross_entropy(model(adversarial), y).backward()
            moved = adversarial.detach() + STEP * adversarial.grad.sign()
            adversarial = (x + (moved - x).clamp(-EPS, EPS)).clamp(0, 1)
        model.train()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = 0.5 * F.cross_entropy(model(x), y) + 0.5 * F.cross_entropy(model(adversarial), y)
        if noise:
            loss = loss - 1e-4 * sum(theta.sqrt().sum() for theta in noise)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            for theta in noise:
                theta.clamp_(min=0.01)

    return step


def geared(name: str, arguments: argparse.Namespace, data: ImageData) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Return the training step of this package in the gear ``name``."""
    options = {"noise_delay": 0, "sharing": arguments.sharing} if arguments.defense == "learn2perturb" else {}
    config = l2p.TrainConfig(
        defense=arguments.defense, model=arguments.model, recipe="fast", epochs=1, batch_size=arguments.batch_size,
        engine=name, monitor=0, options=options,
    )  # fmt: skip
    training = Training(config.resolve(), None, data, None, Reporter(False))

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        with gears.running(training.gear):
            training.run_step(x, y)

    return step


def main() -> int:
    """Time the steps in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--defense", default="learn2perturb", choices=("learn2perturb", "pgd_at"))
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--sharing", default="per_example", choices=("per_example", "per_batch"))
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5, help="counted steps of each, taken in turn")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    size = arguments.batch_size
    images, y = torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8), torch.randint(0, 10, (size,))
    classes = tuple(map(str, range(10)))
    data = ImageData("random", images, y, classes, flip=True, crop_padding=4, mean=(0.5,) * 3, std=CIFAR_STD)
    x = images.float() / 255
    steps = {"textbook": textbook(arguments.model, arguments.defense == "learn2perturb")}
    steps |= {name: geared(name, arguments, data) for name in ("plain", "fast")}
    first: dict[str, float] = {}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(arguments.rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step(x, y)
            seconds = time.perf_counter() - start
            if turn:
                times[name].append(seconds)
            else:
                first[name] = seconds
    ratios = {
        name: statistics.median(a / b for a, b in zip(times["textbook"], times[name], strict=True)) for name in steps
    }
    table = {
        name: {
            "seconds": statistics.median(values),
            "fastest": min(values),
            "slowest": max(values),
            "images_per_second": size / statistics.median(values),
            "textbook_ratio": ratios[name],
            "first_step_seconds": first[name],
        }
        for name, values in times.items()
    }
    where = environment(torch.device("cpu"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if arguments.json:
        print(json.dumps({**table, "peak_gib": peak, "environment": where}, indent=1))
        return 0
    print(
        f"{arguments.defense}, {arguments.model}, {arguments.sharing}, batch {size}, PGD-{STEPS}, "
        f"{arguments.rounds} rounds\n"
        f"{where['processor']}, {where['torch_threads']} threads, torch {where['torch']}\n"
    )
    columns = ("median s", "fastest", "slowest", "images/s", "x textbook", "first step s")
    print(f"{'step':<10}" + "".join(f"{column:>13}" for column in columns))
    for name, row in table.items():
        print(
            f"{name:<10}{row['seconds']:>13.3f}{row['fastest']:>13.3f}{row['slowest']:>13.3f}"
            f"{row['images_per_second']:>13.1f}{row['textbook_ratio']:>13.2f}{row['first_step_seconds']:>13.2f}"
        )
    print(f"\npeak memory of the whole process: {peak:.2f} GiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
