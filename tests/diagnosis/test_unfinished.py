"""What is finished of a diagnosis is kept: a kill loses little, the same call goes on, nothing else is taken up."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from learn2perturb import load_data, perturb
from learn2perturb.attacks import Attack
from learn2perturb.cli.main import main
from learn2perturb.diagnosis import BUDGETS, QUICK, Diagnosis, diagnose
from learn2perturb.diagnosis.measure import Bench
from learn2perturb.engine.execution import FAST32, PLAIN
from learn2perturb.engine.ranks import Ranks
from learn2perturb.evaluation import Unfinished
from learn2perturb.evaluation.pieces import Pieces
from learn2perturb.evaluation.target import Target
from learn2perturb.records import to_json

TINY = dataclasses.replace(
    QUICK, name="tiny", images=6, some=4, scorings=2, eot=2, sweep_eot=1, steps=2, unbounded_steps=8, samples=3,
    judge_draws=2, eps_grid=(0.1, 0.5), draw_curve=(1, 4), step_curve=(1, 2), restarts=2, square_queries=4,
    square_draws=1, slope_images=2, slope_repeats=3, real_queries=4, descent_steps=2, descent_directions=2,
    surrogate_queries=8,
)  # fmt: skip
DATA = load_data("digits", "test", limit=12)
SETTINGS = {"budget": TINY, "eps": 0.1, "batch_size": 3, "engine": "plain", "progress": False}


class Killed(BaseException):
    """As Ctrl-C comes."""


class Stairs(nn.Module):
    """Its gradients are none of it, so that a surrogate and a descent on values are tried."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.levels = network, 8

    def forward(self, x: Tensor) -> Tensor:
        return self.network((x * self.levels).round() / self.levels + 0.01 * x)


def network(seed: int = 0, *, noisy: bool = True, stairs: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    plain: nn.Module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 10))
    plain = perturb(plain, input_shape=(1, 8, 8)) if noisy else plain
    return (Stairs(plain) if stairs else plain).eval()


def given() -> dict[str, object]:
    return {
        "model": network(stairs=True), "data": DATA, "claim": "51 % under fgsm by vote of 2",
        "sources": {"pgd_at": network(3, noisy=False)}, **SETTINGS,
    }  # fmt: skip


def told(found: Diagnosis) -> str:
    """Return the record without what no two runs share: times."""
    measured = tuple(dataclasses.replace(one, seconds=0.0) for one in found.measurements)
    metadata = {key: value for key, value in found.metadata.items() if key not in ("seconds", "date", "command")}
    return to_json(dataclasses.replace(found, measurements=measured, metadata=metadata))


@contextlib.contextmanager
def counted() -> Iterator[list[str]]:
    """Keep every piece in the body, however quick; list the attacks that are run."""
    found: list[str] = []
    real = Attack.run

    def run(self: Attack, *images: object) -> object:
        found.append(type(self).__name__)
        return real(self, *images)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Pieces, "WORTH", 0.0)
        patched.setattr(Pieces, "INTERVAL", 0.0)
        patched.setattr(Attack, "run", run)
        yield found


@pytest.fixture
def runs() -> Iterator[list[str]]:
    with counted() as found:
        yield found


@pytest.fixture(scope="module")
def whole() -> tuple[Diagnosis, list[str]]:
    """What a diagnosis finds that is not stopped, and the attacks that it runs."""
    with counted() as taken:
        return diagnose(**given()), taken


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with all pieces of that diagnosis."""
    folder = tmp_path_factory.mktemp("finished")
    with counted():
        diagnose(**given(), keep=Unfinished(folder))
    return folder


@pytest.fixture
def kept(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "kept"))


@pytest.fixture
def kill(monkeypatch):
    """Kill a diagnosis at the measurement of a given number."""
    real = Bench._keep

    def arm(at: int | None) -> None:
        numbers = itertools.count()

        def keep(self: Bench, *found: object, **more: object) -> None:
            if next(numbers) == at:
                raise Killed
            real(self, *found, **more)

        monkeypatch.setattr(Bench, "_keep", keep)

    return arm


@pytest.mark.parametrize("apart", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_again_and_again_no_attack_is_run_twice_and_the_record_is_the_same(
    apart, whole, runs, kill, tmp_path, capsys
):
    found, taken = whole
    assert len(found.measurements) > 30 and len(taken) > 40
    for at in range(2, len(found.measurements), apart):
        kill(at)
        with pytest.raises(Killed), Unfinished(tmp_path) as keep:
            diagnose(**given(), keep=keep)
    kill(None)
    with Unfinished(tmp_path) as keep:
        again = diagnose(**given(), keep=keep)
    assert told(again) == told(found)
    assert sorted(runs) == sorted(taken)
    assert "going on: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# What is changed, and how many batches are attacked again; None: all of them
CHANGES = {
    "nothing": ({}, 0),
    "the number of a claim": ({"claim": "40 % under fgsm by vote of 2"}, 0),
    "the rest of a claim": ({"claim": "51 % under fgsm by vote of 3"}, 4),
    "a source": ({"sources": {"pgd_at": network(4, noisy=False)}}, 4),
    "another source": ({"sources": given()["sources"] | {"twin": network(4, noisy=False)}}, 2),
    "weights": ({"model": network(1, stairs=True)}, None),
    "images": ({"data": load_data("digits", "train", limit=12)}, None),
    "seed": ({"seed": 1}, None),
    "batch size": ({"batch_size": 4}, None),
    "size": ({"eps": 0.11}, None),
    "norm": ({"norm": "l2"}, None),
    "budget": ({"budget": dataclasses.replace(TINY, scorings=3)}, None),
}


def test_only_what_is_of_the_same_work_is_taken_up(kept, runs, kill):
    for change, (changed, expected) in CHANGES.items():
        kill(None if expected is not None else 2)
        with contextlib.suppress(Killed):
            diagnose(**given() | changed, keep=Unfinished(kept))
        assert len(runs) == expected if expected is not None else runs, change
        runs.clear()


def test_another_engine_is_other_work():
    target = Target(network())
    assert target.identity(0, 3, PLAIN) == target.identity(0, 3, PLAIN) != target.identity(0, 3, FAST32)


def test_what_a_module_holds_beside_its_weights_counts(kept, runs, kill):
    model = network(stairs=True)
    model.levels = 9
    kill(2)
    with pytest.raises(Killed):
        diagnose(**given() | {"model": model}, keep=Unfinished(kept))
    assert runs


def test_damaged_files_are_done_again_with_a_warning(whole, kept, runs):
    (folder,) = kept.iterdir()
    files = sorted(folder.iterdir())
    for number, path in enumerate(files[:12]):
        content = path.read_bytes()
        path.write_bytes((content[:-9], b"", content[: len(content) // 2], os.urandom(50))[number % 4])
    files[-1].write_bytes(files[-2].read_bytes())  # a good file under the name of other work
    with pytest.warns(UserWarning, match="finished work is done again: .* is damaged"):
        again = diagnose(**given(), keep=Unfinished(kept))
    assert told(again) == told(whole[0])
    assert len(runs) < len(whole[1])


def test_a_disk_that_is_full_is_said_and_loses_nothing(whole, runs, tmp_path):
    place = tmp_path / "file"
    place.write_text("no folder")
    with pytest.warns(UserWarning, match="finished work is not kept: cannot write") as warned:
        found = diagnose(**given(), keep=Unfinished(place))
    assert told(found) == told(whole[0])
    assert len([one for one in warned if "not kept" in str(one.message)]) == 1


class OwnDraws(nn.Module):
    """Its noise is from a generator of its own, which no seed reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.generator = network(noisy=False), torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x) + torch.randn(len(x), 10, generator=self.generator)


def function(x: Tensor) -> Tensor:
    return x.flatten(1)[:, :10]


@pytest.mark.parametrize(
    ("model", "reason"), [(function, "the model is a function"), (OwnDraws().eval(), "draws of the model follow from")]
)
def test_what_cannot_be_kept_is_said(model, reason, runs, kill, tmp_path, capsys):
    kill(3)
    with pytest.raises(Killed):
        diagnose(model, DATA, **SETTINGS, keep=Unfinished(tmp_path))
    assert f"nothing is kept on the way, so a kill loses all: {reason}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_source_whose_weights_are_not_seen_is_attacked_again(runs, tmp_path):
    settings = given() | {"model": network(), "sources": {"theirs": function}, "claim": None}
    diagnose(**settings, keep=Unfinished(tmp_path))
    runs.clear()
    diagnose(**settings, keep=Unfinished(tmp_path))
    assert runs == ["PGD", "PGD"]


def test_several_processes_keep_nothing_and_say_so(monkeypatch):
    target = Target(network())
    assert target.unkept(DATA.images.float() / 255, 0) == ""
    monkeypatch.setattr("learn2perturb.evaluation.target.current", lambda: Ranks(0, 2))
    assert target.unkept(DATA.images.float() / 255, 0) == "several processes share the work"


WORDS = ["--dataset=digits", "--limit=6", "--batch-size=3", "--engine=plain", "--eps=0.1", "--device=cpu", "-q"]


def stairs() -> nn.Module:
    return network(stairs=True)


def test_the_verb_goes_on_and_tidies_up(runs, kill, tmp_path, capsys, monkeypatch):
    out = tmp_path / "records" / "one.json"
    monkeypatch.setitem(BUDGETS, "quick", TINY)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    words = ["diagnose", f"{Path(__file__).stem}:stairs", *WORDS, "--out", str(out)]
    kill(8)
    with pytest.raises(Killed):
        main(words)
    assert [path.suffix for path in out.parent.iterdir()] == [".partial"]
    begun = len(runs)
    kill(None)
    with monkeypatch.context() as patched:
        patched.setattr("learn2perturb.cli.diagnose.save_record", lambda *_: (_ for _ in ()).throw(OSError("no room")))
        assert main(words) == 1
    assert "going on: " in capsys.readouterr().err
    assert [path.suffix for path in out.parent.iterdir()] == [".partial"]  # still there: the record is not
    done = len(runs)
    assert main(words) == 0
    assert list(out.parent.iterdir()) == [out]
    assert Diagnosis.load(out).metadata["seconds"] > 0
    assert 5 < begun < done == len(runs)


KILLED = """
import itertools, os, signal, sys
import test_unfinished as home
from learn2perturb.cli.main import main
from learn2perturb.diagnosis.measure import Bench
from learn2perturb.evaluation.pieces import Pieces
from learn2perturb.evaluation.target import Target
home.BUDGETS["quick"] = home.TINY
Pieces.WORTH = Pieces.INTERVAL = 0.0
real, numbers = Bench._keep, itertools.count()
def keep(*found, **more):
    if next(numbers) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    real(*found, **more)
Bench._keep = keep
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_sigkill_loses_little(tmp_path):
    words = ["diagnose", "test_unfinished:stairs", *WORDS, "--json"]
    environment = os.environ | {"PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{Path(__file__).parent}"}

    def typed(at: int, out: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", KILLED, str(at), *words, "--out", str(tmp_path / out)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    assert typed(12, "a/one.json").returncode == -signal.SIGKILL
    again = typed(-1, "a/one.json")
    assert (again.returncode, "going on: " in again.stderr) == (0, True), again.stderr
    assert typed(-1, "b/one.json").returncode == 0
    assert told(Diagnosis.load(tmp_path / "a/one.json")) == told(Diagnosis.load(tmp_path / "b/one.json"))
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["one.json"]
