"""Several processes judge a network together: the record is the one that a single process gives."""

from __future__ import annotations

import json
import subprocess
import sys

import torch

import learn2perturb as l2p
from learn2perturb.certification import certify
from learn2perturb.cli.main import main
from learn2perturb.models import build_model
from learn2perturb.noise import perturb
from tests.distributed.processes import together
from tests.distributed.test_as_one import DIGITS

# What a clock, a machine or a process says.
_OWN = {"date", "seconds", "checksum"}


def noisy():
    torch.manual_seed(3)
    return perturb(build_model("digits_cnn", num_classes=10, input_shape=(1, 8, 8)), input_shape=(1, 8, 8))


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


def test_certify(tmp_path):
    def work():
        return certify(
            noisy(), DIGITS[1], method="smoothing", sigma=0.2, n0=7, n=41, limit=9, batch_size=50, progress=False
        )

    check(work, tmp_path, count=3)


def test_what_one_process_does_is_refused_to_several(monkeypatch, capsys):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    assert main(["diagnose", "runs/none"]) == 2
    assert "diagnose is the work of one process, and this is number 1 of 2" in capsys.readouterr().err


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "learn2perturb", "--version"], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.startswith("learn2perturb ")
