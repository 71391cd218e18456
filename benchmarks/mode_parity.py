"""Train the same subset of CIFAR-10 in every execution mode, over several seeds: do they give the same robust accuracy?

    python benchmarks/mode_parity.py --data-dir .data

Two epochs on the first ``--images`` training images for each seed; then clean and PGD-20 accuracy on ``--test`` test
images, scored in float32. A mode agrees where its mean over seeds is within one point of plain's, or within the spread
of the seeds: two standard errors of the difference of the means.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time

import torch

import learn2perturb as l2p
from learn2perturb.engine import execution
from learn2perturb.progress import Reporter
from learn2perturb.runs.environment import environment
from learn2perturb.training.state import Training

MODES = ("plain", "fast", "fast-compiled")  # the last as long trainings are: attack and training passes
ATTACK = l2p.attacks.PGD(step_size=2 / 255, steps=20)


def trained(mode: str, seed: int, train: object, arguments: argparse.Namespace) -> torch.nn.Module:
    """Train in one execution mode, from the weights and in the order that the seed gives."""
    config = l2p.TrainConfig(
        defense=arguments.defense, model=arguments.model, recipe="fast", epochs=arguments.epochs, seed=seed,
        engine=mode.split("-")[0], monitor=0,
    )  # fmt: skip
    training = Training(config.resolve(), None, train, None, Reporter(False))
    if mode == "fast-compiled":  # whether it is worth it is not the question here
        rows = config.resolve().batch_size or 128
        training.mode = execution.select("fast", training.device, attacked_pixels=math.inf, rows=rows)
    with execution.running(training.mode):
        for epoch in range(arguments.epochs):
            training.epoch = epoch
            for batch, (x, y) in enumerate(training.source.epoch(epoch)):
                training.batch = batch
                training.run_step(x, y)
    return training.model


def agrees(found: list[float], wanted: list[float]) -> tuple[float, float, bool]:
    """Return the difference of the means, the spread of the seeds, and whether the one is within the other or 0.01."""
    difference = statistics.mean(found) - statistics.mean(wanted)
    spread = 2 * math.sqrt(sum(statistics.variance(v) / len(v) for v in (found, wanted)))
    return difference, spread, abs(difference) <= max(0.01, spread)


def main() -> int:
    """Train, attack, compare; exit 1 if a mode disagrees."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--defense", default="learn2perturb")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="without plain, nothing is compared")
    parser.add_argument("--data-dir")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    train = l2p.load_data("cifar10", "train", root=arguments.data_dir).take(arguments.images)
    test = l2p.load_data("cifar10", "test", root=arguments.data_dir).take(arguments.test)
    scores: dict[str, dict[str, list[float]]] = {mode: {"clean": [], "pgd20": []} for mode in arguments.modes}
    for seed in range(arguments.seeds):
        for mode in arguments.modes:
            start = time.perf_counter()
            model = trained(mode, seed, train, arguments)
            seconds = time.perf_counter() - start
            result = l2p.evaluate(model, test, {"pgd20": ATTACK}, draws=3, noise_off=False, engine="plain", seed=seed)
            for row in result.rows:
                scores[mode][row.attack].append(row.accuracy)
            last = {kind: values[-1] for kind, values in scores[mode].items()}
            shown = ", ".join(f"{kind} {value:.2%}" for kind, value in last.items())
            print(f"seed {seed}, {mode}: {shown}, trained in {seconds:.0f} s", file=sys.stderr, flush=True)
    fine = True
    compared: dict[str, dict[str, tuple[float, float, bool]]] = {}
    for mode in [mode for mode in scores if mode != "plain" and "plain" in scores]:
        compared[mode] = {kind: agrees(scores[mode][kind], scores["plain"][kind]) for kind in scores[mode]}
        fine &= all(ok for *_, ok in compared[mode].values())
    if arguments.json:
        print(json.dumps({"scores": scores, "compared": compared, "environment": environment(torch.device("cpu"))}))
        return 0 if fine else 1
    print(f"{arguments.defense}, {arguments.model}, {arguments.images} images, {arguments.epochs} epochs, "
          f"{arguments.seeds} seeds, {arguments.test} test images\n")  # fmt: skip
    print(f"{'mode':<24}{'clean':>20}{'PGD-20':>20}")
    for mode, kinds in scores.items():
        cells = [f"{statistics.mean(v):.2%} +- {statistics.stdev(v):.2%}" for v in kinds.values()]
        print(f"{mode:<24}" + "".join(f"{cell:>20}" for cell in cells))
    for mode, kinds in compared.items():
        for kind, (difference, spread, ok) in kinds.items():
            print(f"{mode} - plain, {kind}: {difference:+.2%}, seeds' spread {spread:.2%}: {'ok' if ok else 'APART'}")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
