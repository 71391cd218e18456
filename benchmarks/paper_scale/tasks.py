"""What one process of a slice does: train a run, evaluate its missing cells, or measure the machine."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import learn2perturb as l2p
from benchmarks.paper_scale.plan import Cell, Plan
from benchmarks.paper_scale.state import State
from learn2perturb.attacks import Source, Transfer
from learn2perturb.attacks.spec import build_attacks
from learn2perturb.checks import fraction
from learn2perturb.cli import evaluate as verb
from learn2perturb.cli.bench.floor import measure_rates
from learn2perturb.cli.bench.scene import Scene
from learn2perturb.cli.bench.settings import BENCHED, BenchSettings
from learn2perturb.cli.bench.step import needed
from learn2perturb.cli.main import main as learn2perturb
from learn2perturb.cli.options import Parser
from learn2perturb.engine.devices import choose_device
from learn2perturb.engine.modes import in_mode
from learn2perturb.errors import TrainingError
from learn2perturb.noise import NoiseFree, Perturbation, noise_modules
from learn2perturb.records import atomic_write
from learn2perturb.runs.checkpoint import read_model
from learn2perturb.runs.loading import locate
from learn2perturb.training import TrainConfig

FLOOR, TRAIN, EVALUATE = "floor", "train", "evaluate"


@dataclass(frozen=True)
class Task:
    """What a process is started for."""

    kind: str
    run: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.run}".strip()


def cells_of(plan: Plan, run: str) -> list[Cell]:
    """Return the cells that a run is evaluated in."""
    return [cell for cell in plan.cells if not cell.noisy or plan.is_noisy(run)]


def missing_cells(plan: Plan, state: State, run: str) -> list[Cell]:
    """Return the cells of a finished run that can be computed now: not there yet, and what they need is there."""
    if state.weights(run) is None:
        return []
    found = []
    for cell in cells_of(plan, run):
        source = plan.source_of(run, cell)
        if not state.cell(run, cell.name).exists() and (source is None or state.weights(source) is not None):
            found.append(cell)
    return found


def ready(plan: Plan, state: State) -> Iterator[Task]:
    """Give the tasks that can be begun, the most important first: a run is evaluated before the next is trained."""
    if not state.floors.exists():
        yield Task(FLOOR)
    for run in plan.runs:
        if not state.is_finished(run):
            yield Task(TRAIN, run)
        elif missing_cells(plan, state, run):
            yield Task(EVALUATE, run)


def perform(plan: Plan, state: State, task: Task, device: str) -> None:
    """Do a task in this process, whose working folder is that of the state.

    Raises:
        TrainingError: a command within failed; its message is in the log.
    """
    if task.kind == FLOOR:
        _floors(plan, state, device)
        return
    with state.held(task.run) as mine:
        if not mine:
            raise TrainingError(f"{task.run} is held by another process; wait for it")
        if task.kind == TRAIN:
            config = TrainConfig.from_dict({**plan.config(task.run).to_dict(), "device": device})
            l2p.train(config, out=state.run(task.run))
            state.finish(task.run)
        else:
            state.finish(task.run)
            for cell in missing_cells(plan, state, task.run):
                _evaluate(plan, state, task.run, cell, device)


def _floors(plan: Plan, state: State, device: str) -> None:
    """Reckon the least time of a step of each training, from what this machine is measured to do; seconds in all."""
    found = {}
    rates = None
    for config in map(TrainConfig.resolve, plan.runs.values()):
        if config.defense not in BENCHED:
            continue
        settings = BenchSettings.of("step", {
            "defense": config.defense, "model": config.model, "batch_size": config.batch_size,
            "attack_steps": config.attack_steps, "device": device,
        })  # fmt: skip
        scene = Scene.of(settings)
        rates = rates or measure_rates(scene.device, scene.dtype)
        found[f"{config.defense} {config.model}"] = {**rates.floor(needed(scene)), "environment": scene.where()}
    atomic_write(state.floors, json.dumps(found, indent=1))


def _command(words: list[str]) -> None:
    if learn2perturb(words):
        raise TrainingError(f"learn2perturb {' '.join(words)} failed; its message is above")


def _evaluate(plan: Plan, state: State, run: str, cell: Cell, device: str) -> None:
    """Compute one cell and store its record, whole or not at all."""
    print(f"{run}: {cell.name}", flush=True)
    path = state.cell(run, cell.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Relative, so that no path of this machine gets into a record.
    compute(plan, run, cell, device, path, lambda name: str(state.run(name).relative_to(state.folder)))


def compute(plan: Plan, run: str, cell: Cell, device: str, path: Path, where: Callable[[str], str]) -> None:
    """Compute a cell of a run into the record ``path``; ``where`` says what to load for a run: a folder, ``zoo:NAME``.

    Raises:
        TrainingError: ``learn2perturb evaluate`` failed.
    """
    words = [*plan.words(cell), "--device", device, "--out", str(path)]
    if cell.is_verb:
        _command(["evaluate", where(run), *words])
        return
    parser = Parser(prog="cell")
    verb.add_arguments(parser)
    given = parser.parse([run, *words])
    place = choose_device(device)
    model = l2p.load(where(run)).to(place)
    data = l2p.load_data(plan.config(run).dataset, "test", limit=given.limit)
    (attack,) = build_attacks(verb.attack_specs(given)).values()
    if given.eps is not None:
        attack = replace(attack, eps=fraction(given.eps))
    predictors, members, _ = verb.chosen_predictors(given, read_model(locate(where(run)))[1])
    target: nn.Module | ReleasedScores = model
    source: nn.Module = model
    draws, size, name = given.draws, given.batch_size, cell.source
    if cell.released is not None:
        share_draws(model)
        # The statistics that the scoring passes update are those that the next batch is attacked with, as there.
        target, draws, size, name = ReleasedScores(model), 1, cell.released, "itself"
        predictors, members = ["single"], 1
    elif cell.source == "twin":
        source, name = NoiseFree(model), "its noise-off twin"
    else:
        source = l2p.load(where(str(plan.source_of(run, cell)))).to(place)
    with warnings.catch_warnings():
        if cell.released is not None:  # that its answers depend on the batch is what this cell is there to show
            warnings.filterwarnings("ignore", message=".*depends on the other images of its batch")
        result = l2p.evaluate(
            target, data, {cell.name: Transfer(attack=attack, source=Source(source, name))}, draws=draws,
            predictor=predictors, members=members, noise_off=False, seed=given.seed, batch_size=size, device=place,
            engine=given.engine, name=where(run),
        )  # fmt: skip
    print(result)
    result.save(path)


def share_draws(model: nn.Module) -> None:
    """Let all rows of a batch share one draw of feature noise, as in the released code; weight noise does so anyway."""
    for module in noise_modules(model):
        if isinstance(module, Perturbation):
            module.sharing = "per_batch"


class ReleasedScores:
    """Score as the released code does: BatchNorm in train mode, so with the statistics of the batch that is scored.

    No module, so that the evaluation does not put it into eval mode. The running statistics are updated by the test
    images, as there: each batch is attacked with what those before it left behind. Beside the released code's one
    pass a batch there are those that the evaluation itself makes to look at the model.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network

    def __call__(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) to logits (N, K)."""
        with in_mode(self._network, True), torch.no_grad():
            return self._network(x)
