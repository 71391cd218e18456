"""Time this package's attacks against other libraries: same network, images and budget.

They are torchattacks, foolbox, adversarial-library, and pyautoattack (`pip install --no-deps pyautoattack`).

    python benchmarks/against_peers.py --data-dir .data --plain runs/cifar10-pgd_at --noisy runs/cifar10-learn2perturb

The contestants run in turn in one process and the median of the rounds counts. Ours run in the execution mode
``--engine`` (``fast`` is bfloat16, channels_last, folded), as ``evaluate(engine=...)`` runs them; theirs are called as
their own documentation does, in float32. *ours, compiled* is ours as long runs make it (300,000 attacked images of 32 x
32 and more); shorter ones would not earn the compilation back. What every attack leaves is scored in float32, with
fresh draws that no attack has seen. The first run of each, with any compilation, is a short one and not counted.
``memory`` is the peak of one process for EOT-PGD with 80 draws a gradient against one with 1.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import math
import resource
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import learn2perturb as l2p
from learn2perturb.attacks import APGD, CW, PGD, Attack, AutoAttack, FewPixel
from learn2perturb.engine import execution
from learn2perturb.engine.random import seed_everything
from learn2perturb.runs.environment import environment

EPS, STEP = 8 / 255, 2 / 255
DRAWS = 10  # scorings of what is left of a stochastic network
Run = Callable[[nn.Module, Tensor, Tensor], Tensor]
_kept: list[torch.library.Library] = []  # operators vanish with the object that defined them


@dataclass(frozen=True)
class Contest:
    """One attack, ours and theirs, at one budget."""

    title: str
    goal: float  # times the fastest of theirs
    images: int
    noisy: bool
    ours: Attack
    theirs: dict[str, Callable[[int], Run]]  # name -> a short (1) or full (0) run
    warm_up: dict[str, int]  # settings of ours that make a short run
    judged_at: float | None = None  # l2 radius of minimum-norm attacks


def torchattack(name: str, short: dict[str, int], **settings) -> Callable[[int], Run]:
    """Return a run of an attack of torchattacks."""

    def make(warm_up: int) -> Run:
        build = getattr(importlib.import_module("torchattacks"), name)
        chosen = {**settings, **(short if warm_up else {})}
        return lambda model, x, y: build(model, **chosen)(x, y)

    return make


def foolbox_pgd(steps: int) -> Callable[[int], Run]:
    """Return a run of foolbox's PGD."""

    def make(warm_up: int) -> Run:
        foolbox = importlib.import_module("foolbox")
        attack = foolbox.attacks.LinfPGD(abs_stepsize=STEP, steps=1 if warm_up else steps)

        def run(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            return attack(foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device), x, y, epsilons=EPS)[1]

        return run

    return make


def published_autoattack(warm_up: int) -> Run:
    """Return a run of AutoAttack as its authors wrote it, in the package pyautoattack; APGD alone warms it up.

    That of torchattacks is none: its parts make 10 steps, where 100 are the attack.
    """

    def run(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        which = {"version": "custom", "attacks": ["apgd-ce"]} if warm_up else {"version": "standard"}
        found = importlib.import_module("pyautoattack").AutoAttack(model, norm="Linf", eps=EPS, **which)
        if warm_up:
            found.apgd.n_iter, found.apgd.n_restarts = 3, 1
        return found.run_standard_evaluation(x, y)[0]

    return run


@functools.cache
def import_adv_lib() -> types.ModuleType:
    """Import adversarial-library without what it imports and its attacks do not need."""
    sys.modules.setdefault("visdom", types.ModuleType("visdom"))
    try:
        importlib.import_module("torchvision")
    except RuntimeError:  # built for another torch: two empty operators will do, as in tests/compat/conftest.py
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)
    return importlib.import_module("adv_lib.attacks")


def adv_lib(name: str, short: dict[str, int], **settings) -> Callable[[int], Run]:
    """Return a run of an attack of adversarial-library."""

    def make(warm_up: int) -> Run:
        function = getattr(import_adv_lib(), name)
        chosen = {**settings, **(short if warm_up else {})}
        return lambda model, x, y: function(model=model, inputs=x, labels=y, **chosen)

    return make


CONTESTS = {
    "pgd": Contest(
        "PGD-20", 2.5, 500, False, PGD(EPS, STEP, 20),
        {
            "torchattacks": torchattack("PGD", {"steps": 1}, eps=EPS, alpha=STEP, steps=20),
            "foolbox": foolbox_pgd(20),
        },
        {"steps": 1},
    ),
    "eot": Contest(
        "EOT-PGD, 20 steps of 20 draws", 2.5, 32, True, PGD(EPS, STEP, 20, eot=20),
        {"torchattacks": torchattack("EOTPGD", {"steps": 1}, eps=EPS, alpha=STEP, steps=20, eot_iter=20)},
        {"steps": 1},
    ),
    "apgd": Contest(
        "APGD-CE, 50 steps", 1.5, 128, False, APGD(EPS, 50),
        {
            "torchattacks": torchattack("APGD", {"steps": 3}, eps=EPS, steps=50),
            "adv_lib": adv_lib("apgd", {"n_iter": 3}, eps=EPS, norm=math.inf, n_iter=50, loss_function="ce"),
        },
        {"steps": 3},
    ),
    "cw": Contest(
        "C&W l2, 5 searches of 60 steps", 1.5, 32, False, CW(steps=60, search_steps=5, lr=0.01, initial_c=0.1),
        {
            "adv_lib": adv_lib(
                "carlini_wagner_l2", {"max_iterations": 10},
                max_iterations=60, binary_search_steps=5, learning_rate=0.01, initial_const=0.1,
            )
        },
        {"steps": 2}, judged_at=0.5,
    ),
    "one_pixel": Contest(
        "one pixel, population 100, 10 generations", 3.0, 32, False, FewPixel(1, population=100, generations=10),
        {"torchattacks": torchattack("OnePixel", {"steps": 1}, pixels=1, steps=10, popsize=100)},
        {"generations": 1},
    ),
    "autoattack": Contest(
        "AutoAttack, standard", 3.0, 64, False, AutoAttack(EPS),
        {"published": published_autoattack},
        {"steps": 2, "queries": 10},
    ),
}  # fmt: skip


def accuracy(model: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor, draws: int, judged_at: float | None) -> float:
    """Return the accuracy left, over fresh draws; with ``judged_at``, what lies farther away counts as clean."""
    if judged_at is not None:
        near = (x_adv - x).flatten(1).norm(dim=1) <= judged_at
        x_adv = torch.where(near.view(-1, 1, 1, 1), x_adv, x)
    scores = []
    with torch.no_grad():
        for draw in range(draws):
            seed_everything(0, "score", draw)
            predicted = torch.cat([model(part).argmax(1) for part in x_adv.split(250)])
            scores.append((predicted == y).float())
    return torch.cat(scores).mean().item()


def run_contest(contest: Contest, model: nn.Module, x: Tensor, y: Tensor, rounds: int, engine: str) -> dict:
    """Return seconds, ratio and accuracy of each contestant."""
    mode = execution.select(engine, x.device)
    ours_by_mode = {"ours": mode}
    if mode.folding and isinstance(contest.ours, PGD):
        ours_by_mode["ours, compiled"] = execution.with_compiled_attack(mode, math.inf, len(x))

    def ours(attack: Attack, mode: execution.ExecutionMode) -> Run:
        def run(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            with execution.running(mode):
                return attack(model, mode.place_images(x), y).contiguous()

        return run

    runs = {name: ours(contest.ours, mode) for name, mode in ours_by_mode.items()}
    runs |= {name: make(0) for name, make in contest.theirs.items()}
    short = {name: ours(replace(contest.ours, **contest.warm_up), mode) for name, mode in ours_by_mode.items()}
    short |= {name: make(1) for name, make in contest.theirs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    found: dict[str, Tensor] = {}
    first: dict[str, float] = {}  # a short attack, and whatever is compiled or allocated once
    for turn in range(rounds + 1):
        for name in runs:
            seed_everything(turn, name)
            start = time.perf_counter()
            x_adv = (runs if turn else short)[name](model, x, y)
            taken = time.perf_counter() - start
            if turn:
                times[name].append(taken)
                found[name] = x_adv.detach()
            else:
                first[name] = taken
    seconds = {name: statistics.median(values) for name, values in times.items()}
    fastest = min(seconds[name] for name in contest.theirs)
    draws = DRAWS if contest.noisy else 1
    table = {}
    for name in runs:
        delta = (found[name] - x).flatten(1)
        fooled = model(found[name]).argmax(1) != y
        table[name] = {
            "seconds": seconds[name],
            "rounds": times[name],
            "first_call_seconds": first[name],
            "ratio": fastest / seconds[name],
            "accuracy": accuracy(model, x, y, found[name], draws, contest.judged_at),
            "linf": delta.abs().max().item(),
            "median_l2_of_successes": delta.norm(dim=1)[fooled].median().item() if fooled.any() else None,
        }
    return {
        "title": contest.title, "images": len(x), "goal": contest.goal, "judged_at_l2": contest.judged_at,
        "met_by": [name for name in ours_by_mode if table[name]["ratio"] >= contest.goal], "contestants": table,
    }  # fmt: skip


def peak_memory(arguments: argparse.Namespace, draws: int) -> float:
    """Return the peak memory, GiB, of a process that attacks with ``draws`` a gradient."""
    command = [
        sys.executable, __file__, "--memory-of", str(draws), "--noisy", arguments.noisy, "--data-dir",
        arguments.data_dir, "--threads", str(arguments.threads), "--engine", arguments.engine,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def images(arguments: argparse.Namespace, count: int) -> tuple[Tensor, Tensor]:
    """Return the first test images in [0, 1] and their labels."""
    data = l2p.load_data("cifar10", "test", root=arguments.data_dir, limit=count)
    return data.images.float() / 255, data.labels


def memory_of(arguments: argparse.Namespace) -> None:
    """Attack one batch and print the peak memory of this process, GiB."""
    x, y = images(arguments, 64)
    mode = execution.select(arguments.engine, x.device)
    with execution.running(mode):
        PGD(EPS, STEP, 1, eot=arguments.memory_of)(l2p.load(arguments.noisy), mode.place_images(x), y)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def show(result: dict) -> None:
    """Print one table."""
    judged = f", judged at l2 {result['judged_at_l2']}" if result["judged_at_l2"] else ""
    print(f"\n{result['title']}, {result['images']} images{judged}")
    print(
        f"{'':<16}{'seconds':>9}{'ratio':>8}{'first call s':>14}{'accuracy %':>12}{'largest linf':>14}{'median l2':>11}"
    )
    for name, row in result["contestants"].items():
        l2 = row["median_l2_of_successes"]
        print(
            f"{name:<16}{row['seconds']:>9.2f}{row['ratio']:>8.2f}{row['first_call_seconds']:>14.2f}"
            f"{100 * row['accuracy']:>12.2f}{row['linf']:>14.4f}"
            f"{'-' if l2 is None else format(l2, '.3f'):>11}"
        )
    met = ", ".join(f"{name!r}" for name in result["met_by"])
    print(f"goal: {result['goal']:g} times the fastest of theirs: {f'met by {met}' if met else 'NOT met'}", flush=True)


def main() -> int:
    """Run the contests and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--plain", default="runs/cifar10-pgd_at", help="run of a network without noise")
    add("--noisy", default="runs/cifar10-learn2perturb", help="run of a network with noise")
    add("--data-dir", default=".data", help="folder of CIFAR-10")
    add("--images", type=int, help="images in every contest (default: its own, 32 to 500)")
    add("--only", default=",".join((*CONTESTS, "memory")), help="of %(default)s")
    add("--rounds", type=int, default=3, help="counted runs of each contestant, taken in turn (default 3)")
    add("--threads", type=int, default=torch.get_num_threads(), help="of torch (default %(default)s)")
    add("--engine", default="auto", help="execution mode of ours: auto, plain, fast")
    add("--memory-of", type=int, help=argparse.SUPPRESS)
    add("--json", metavar="FILE", help="write everything there, too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    chosen = arguments.only.split(",")
    unknown = [name for name in chosen if name not in (*CONTESTS, "memory")]
    if unknown or arguments.rounds < 1 or (arguments.images or 1) < 1:
        parser.error(f"unknown: {', '.join(unknown)}" if unknown else "--rounds and --images must be at least 1")
    if arguments.memory_of:
        memory_of(arguments)
        return 0

    where = environment(torch.device("cpu"))
    print(f"{where['processor']}, {arguments.threads} threads, torch {where['torch']}, {arguments.rounds} rounds")
    results = {}
    for name in [name for name in CONTESTS if name in chosen]:
        contest = CONTESTS[name]
        model = l2p.load(arguments.noisy if contest.noisy else arguments.plain)
        x, y = images(arguments, arguments.images or contest.images)
        results[name] = run_contest(contest, model, x, y, arguments.rounds, arguments.engine)
        show(results[name])
    if "memory" in chosen:
        one, many = peak_memory(arguments, 1), peak_memory(arguments, 80)
        results["memory"] = {"gib_1_draw": one, "gib_80_draws": many, "ratio": many / one, "met": many <= 1.1 * one}
        print(
            f"\nEOT-PGD, 64 images, peak memory: {one:.3f} GiB with 1 draw, {many:.3f} with 80: {many / one:.3f} times"
        )
        print(f"goal: at most 1.1 times: {'met' if results['memory']['met'] else 'NOT met'}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"environment": where, "results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
