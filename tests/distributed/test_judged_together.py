"""Several processes judge a network together: the record is the one that a single process gives."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import learn2perturb as l2p
from learn2perturb.certification import certify
from learn2perturb.cli.main import main
from learn2perturb.diagnosis import BUDGETS, QUICK
from learn2perturb.engine import ranks
from learn2perturb.engine.shared_work import each
from learn2perturb.errors import ConfigError, InputError, TrainingError
from learn2perturb.models import build_model
from learn2perturb.noise import perturb
from tests.distributed.processes import ended, started, together
from tests.distributed.test_as_one import DIGITS

CPU = torch.device("cpu")
# What a clock, a machine or a process says.
_OWN = {"date", "seconds", "checksum"}


def noisy():
    torch.manual_seed(3)
    return perturb(build_model("digits_cnn", num_classes=10, input_shape=(1, 8, 8)), input_shape=(1, 8, 8)).eval()


def stripped(value):
    if isinstance(value, dict):
        return {key: stripped(one) for key, one in value.items() if key not in _OWN}
    return [stripped(one) for one in value] if isinstance(value, list) else value


def record(work, folder):
    folder.mkdir(parents=True, exist_ok=True)
    work().save(folder / "record.json")
    return stripped(json.loads((folder / "record.json").read_text()))


def check(work, tmp_path, count=2):
    one = record(work, tmp_path / "one")
    for rank, found in enumerate(together(count, lambda rank: record(work, tmp_path / str(rank)), tmp_path / "ranks")):
        assert found == one, f"process {rank}"


def test_evaluate(tmp_path):
    attacks = {"pgd": l2p.attacks.PGD(0.1, 0.03, 3), "square": l2p.attacks.Square(eps=0.1, queries=20)}

    def work():
        return l2p.evaluate(
            noisy(), DIGITS[1], attacks, draws=3, limit=55, batch_size=10, engine="plain", progress=False,
        )  # fmt: skip

    check(work, tmp_path, count=3)


def test_evaluate_of_a_loader_is_done_by_each(tmp_path):
    images = DIGITS[1].images[:30].float() / 255

    def work():
        loader = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(images, DIGITS[1].labels[:30]), batch_size=10
        )
        return l2p.evaluate(noisy(), loader, {"fgsm": l2p.attacks.FGSM(0.1)}, draws=2, progress=False)

    check(work, tmp_path)


def test_evaluate_of_draws_that_seeds_do_not_decide_is_done_by_each(tmp_path):
    def work():
        return l2p.evaluate(Drawing().eval(), DIGITS[1], draws=2, limit=20, batch_size=5, progress=False)

    check(work, tmp_path)


def test_certify(tmp_path):
    def work():
        return certify(
            noisy(), DIGITS[1], method="smoothing", sigma=0.2, n0=7, n=41, limit=9, batch_size=50, progress=False
        )

    check(work, tmp_path, count=3)


TINY = dataclasses.replace(
    QUICK, name="tiny", images=15, some=9, scorings=3, eot=2, sweep_eot=1, steps=3, unbounded_steps=8,
    unbounded_eot=1, samples=5, sample_draws=1, finalists=3, judge_draws=2, eps_grid=(0.1, 0.4), draw_curve=(1, 4),
    step_curve=(3, 6), restarts=2, targets=2, square_queries=20, square_draws=1, slope_images=3, slope_repeats=4,
    real_queries=30, descent_steps=3, descent_directions=2, surrogate_queries=60,
)  # fmt: skip


class Masked(nn.Module):
    """A network behind a staircase: its gradients are nearly always zero."""

    def __init__(self):
        super().__init__()
        self.inner = quiet()
        self.training = False

    def forward(self, x):
        return (8 * self.inner((4 * x).round() / 4)).round() / 8


class Drawing(nn.Module):
    """A network whose noise is drawn by a generator of its own, which goes on from pass to pass."""

    def __init__(self):
        super().__init__()
        self.inner = quiet()
        self.generator = torch.Generator().manual_seed(5)

    def forward(self, x):
        return self.inner(x + 0.1 * torch.randn(x.shape, generator=self.generator))


def quiet():
    """Return a network that knows the digits: what attacks leave of it depends on every draw."""
    torch.manual_seed(3)
    network = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10, bias=False)).eval()
    with torch.no_grad():
        features = network[:3](DIGITS[0].images.float() / 255)
        wanted = nn.functional.one_hot(DIGITS[0].labels, 10).float() - 0.1
        ridge = features.T @ features + 1e-3 * torch.eye(64)
        network[3].weight.copy_(10 * torch.linalg.solve(ridge, features.T @ wanted).T)
    return network


def shaken():
    return perturb(quiet(), sites="0", input_shape=(1, 8, 8)).eval()


def diagnosis(model):
    sources = {"undefended": quiet()}
    return l2p.diagnose(model, DIGITS[1], budget=TINY, eps=0.15, batch_size=5, sources=sources, progress=False)


@pytest.mark.parametrize("model", [Masked, quiet])
def test_diagnose(model, tmp_path):
    check(lambda: diagnosis(model()), tmp_path)


def test_work_is_shared_by_number(tmp_path):
    def work(rank):
        with ranks.joined() as here:
            done = []
            found = each(lambda n: done.append(n) or (torch.tensor([n / 3]), {"n": n}, None), 5, here, CPU)
            return done, [(one[0].item(), one[1:]) for one in found], each(lambda n: n, 0, here, CPU)

    values = [(torch.tensor([n / 3]).item(), ({"n": n}, None)) for n in range(5)]
    assert together(3, work, tmp_path) == [([0, 3], values, []), ([1, 4], values, []), ([2], values, [])]


@pytest.mark.parametrize(
    ("error", "said"),
    [(InputError("out of paper; refill it"), "out of paper; refill it"), (KeyboardInterrupt(), "stopped by Ctrl-C")],
)
def test_a_process_that_ends_in_a_diagnosis_is_named(error, said, tmp_path):
    network = quiet()

    def work(rank):
        def model(x):
            if rank == 1 and len(x) == 5:  # a whole batch
                raise error
            return network(x)

        return diagnosis(model)

    found = ended(started(2, work, tmp_path), tmp_path)
    assert found[1] == (type(error).__name__, str(error))
    assert found[0] == ("ElsewhereError", f"process 1 of 2 failed: {said}")


def stopping():
    """Return a network in whose first whole batch process 1 sends Ctrl-C to both."""
    network, rank = quiet(), os.environ["RANK"]
    Path(f"pid{rank}").write_text(str(os.getpid()))

    def model(x):
        if len(x) == 5 and rank == "1":
            for number in "01":
                os.kill(int(Path(f"pid{number}").read_text()), signal.SIGINT)
        return network(x)

    return model


def test_ctrl_c_is_said_once(tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(BUDGETS, "quick", TINY)
    words = ["diagnose", f"{__name__}:stopping", "--dataset", "digits", "--batch-size", "5", "--out", "record.json"]
    with contextlib.chdir(tmp_path):
        assert together(2, lambda rank: main(words), tmp_path / "ranks") == [130, 130]
        assert not Path("record.json").exists()
    said = [line for line in capfd.readouterr().err.splitlines() if "Ctrl-C" in line]
    assert said == ["learn2perturb: stopped by Ctrl-C; type the same command again"]


@pytest.mark.parametrize("changed", ["seed", "images", "weights"])
def test_processes_that_judge_different_things_are_refused(changed, tmp_path):
    def work(rank):
        torch.manual_seed(rank if changed == "weights" else 0)
        model = build_model("digits_cnn", num_classes=10, input_shape=(1, 8, 8)).eval()
        images, labels = DIGITS[1].images[:20], DIGITS[1].labels[:20]
        data = (images.roll(rank, 0) if changed == "images" else images, labels)
        settings = {"seed": rank if changed == "seed" else 0, "batch_size": 5, "progress": False}
        verb = {0: l2p.evaluate, 1: certify, 2: l2p.diagnose}
        own = {0: {}, 1: {"method": "smoothing", "sigma": 0.2, "n0": 2, "n": 5}, 2: {"budget": TINY}}
        said = []
        for number in verb:
            with pytest.raises(TrainingError) as caught:
                verb[number](model, data, **own[number], **settings)
            said.append(str(caught.value))
        return said

    for said in together(2, work, tmp_path):
        assert all(text.startswith(f"process 1 of 2 has other {changed} than process 0") for text in said), said


def test_a_black_box_is_asked_by_one_process(tmp_path):
    def work(rank):
        box = l2p.black_box(lambda images: np.zeros(len(images), dtype=int), num_classes=10)
        with pytest.raises(ConfigError, match="a black box, and 2 processes"):
            l2p.evaluate(box, DIGITS[1], progress=False)

    together(2, work, tmp_path)


def test_one_command_diagnoses_and_the_first_process_speaks(tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(BUDGETS, "quick", TINY)

    def diagnosed(name):
        out = tmp_path / f"{name}.json"
        words = ["diagnose", f"{__name__}:shaken", "--dataset", "digits", "--batch-size", "5", "--out", str(out)]
        return lambda rank: main([*words, "--figures", str(tmp_path / "figures")]), out

    (alone, one), (shared, two) = diagnosed("one"), diagnosed("two")
    assert alone(0) == 0
    said = capfd.readouterr().out
    assert together(2, shared, tmp_path / "ranks") == [0, 0]
    assert capfd.readouterr().out == said.replace(str(one), str(two))
    records = [stripped(json.loads(file.read_text())) for file in (one, two)]
    for record in records:
        record["metadata"].pop("command")
    assert records[0] == records[1]


def test_what_one_process_does_is_refused_to_several(monkeypatch, capsys):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    assert main(["study", "none"]) == 2
    assert "study is the work of one process, and this is number 1 of 2" in capsys.readouterr().err


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "learn2perturb", "--version"], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.startswith("learn2perturb ")
