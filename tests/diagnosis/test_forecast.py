"""How long a diagnosis takes: said before it starts, from one pass, and while it goes on."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from torch import Tensor

from learn2perturb.attacks import Attack
from learn2perturb.cli.main import main
from learn2perturb.diagnosis import CHECKS, diagnose, diagnosing, forecast
from learn2perturb.diagnosis.checks import gradient_passes
from learn2perturb.diagnosis.diagnosing import expected_seconds
from tests.diagnosis.test_unfinished import DATA, TINY, network


def silent(x: Tensor) -> Tensor:
    return x.detach().flatten(1)[:, :10]


@pytest.mark.parametrize("noisy", [True, False])
def test_the_seconds_are_those_of_the_passes(noisy, monkeypatch):
    monkeypatch.setattr(forecast, "_seconds_a_pass", lambda bench: 0.5 * len(bench.x))
    found = expected_seconds(network(noisy=noisy), DATA, budget=TINY, eps=0.1, sources=2, engine="plain")
    plan = dataclasses.replace(TINY, near=0.2)
    assert sum(found.values()) == pytest.approx(3 * gradient_passes(plan, stochastic=noisy, sources=2), rel=0.01)
    assert ("check 6" in found) == noisy and "check 9" not in found  # what takes nothing is not listed
    assert expected_seconds(silent, DATA, budget=TINY, eps=0.1) == {}


def test_one_pass_is_timed_and_no_attack_is_run(monkeypatch):
    steps = []
    real = Attack.run
    monkeypatch.setattr(Attack, "run", lambda self, *images: steps.append(self.steps) or real(self, *images))
    found = expected_seconds(network(), DATA, budget=TINY, eps=0.1, engine="plain")
    assert steps == [2, 2]
    assert 0 < sum(found.values()) < 60


def test_a_dry_run_says_how_long_it_takes(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setattr(forecast, "_seconds_a_pass", lambda _: 0.1)
    words = ["diagnose", f"{Path(__file__).stem}:network", "--dataset=digits", "--eps=0.1", "--device=cpu"]
    assert main([*words, "--full", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert re.search(
        r"^about \d+\.\d days for 7 parts, what all checks share alone .* a guess from one pass", out, re.M
    )
    assert "check 8" in out and "nothing was done (--dry-run)" in out
    assert main([*words, "--dry-run", "--json"]) == 0
    assert any(step.startswith("about ") for step in json.loads(capsys.readouterr().out)["steps"])
    monkeypatch.setattr(diagnosing, "expected_seconds", lambda *_, **__: pytest.fail("the network was timed"))
    assert main([*words, "--print-config"]) == 0


@pytest.mark.parametrize(("seconds", "said"), [(3000.0, True), (20.0, False)])
def test_what_it_is_going_to_take_is_said_before_it_starts(seconds, said, capsys, monkeypatch):
    class Stopped(Exception):
        pass

    def stop(*_: object, **__: object) -> None:
        raise Stopped

    monkeypatch.setattr(diagnosing, "seconds_by_part", lambda *_, **__: {"check 5": seconds, "check 8": 2 * seconds})
    monkeypatch.setattr(diagnosing, "run_checks", stop)
    with pytest.raises(Stopped):
        diagnose(network(), DATA, budget=TINY, eps=0.1, engine="plain")
    text = "about 2.5 h for 2 parts, check 8 alone 1.7 h: a guess from one pass of the network"
    assert (text.replace("1.7 h", "100.0 min") in capsys.readouterr().err) == said


def test_progress_says_at_which_check_it_is():
    told: list[str] = []
    diagnose(network(), DATA, budget=TINY, eps=0.1, engine="plain", progress=lambda *words: told.append(words[2]))
    stages = [label.rpartition(", ")[0] for label in told if ", " in label]
    order = list(dict.fromkeys(stages))
    assert order[0] == "what all checks share"
    assert order[1:3] == [f"check 5, 0 of {len(CHECKS)} checks done", f"check 7, 1 of {len(CHECKS)} checks done"]
    assert "check 7, 1 of 10 checks done, 4 draws (100%)" in told
