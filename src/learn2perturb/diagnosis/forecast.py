"""How long a diagnosis takes: a guess from one pass of its model, before anything is attacked."""

from __future__ import annotations

import dataclasses

from learn2perturb.diagnosis.checks import passes_by_part
from learn2perturb.diagnosis.measure import Bench
from learn2perturb.engine import execution
from learn2perturb.engine.halving import Halving
from learn2perturb.engine.random import isolated_rng
from learn2perturb.evaluation.parts import attacked

_STEPS = 2  # that are timed


def seconds_by_part(bench: Bench, *, sources: int) -> dict[str, float]:
    """Return about how many seconds each part takes, with so many ``sources``; the model has gradients."""
    one = _seconds_a_pass(bench)
    parts = passes_by_part(bench.budget, stochastic=bench.subject.stochastic, sources=sources)
    return {part: one * passes for part, passes in parts.items() if passes}


def _seconds_a_pass(bench: Bench) -> float:
    """Time steps of the reported attack on one batch, for each image: twice, since the first prepares what it needs."""
    attack = dataclasses.replace(bench.attack, steps=_STEPS, eot=1, restarts=1, seed=0)
    rows = bench.batches(len(bench.x))[0]
    with isolated_rng(), bench.subject.ready() as model, execution.running(bench.mode):
        x, y = bench.mode.place_images(bench.x[rows]), bench.y[rows]
        return min(attacked(attack, model, x, y, Halving()).seconds for _ in range(2)) / (_STEPS * len(x))
