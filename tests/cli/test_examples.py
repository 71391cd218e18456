"""Every example runs and does what it says."""

from __future__ import annotations

import json
import pathlib
import re
import runpy
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def load(monkeypatch):
    """Import an example under its file's name, as the registry needs it."""

    def read(name: str):
        monkeypatch.syspath_prepend(str(EXAMPLES))
        monkeypatch.delitem(sys.modules, name, raising=False)
        return __import__(name)

    return read


def test_every_example_is_tested():
    # The first in tests/compat, the others here.
    names = ["finetune_timm", "own_attack", "own_data", "own_defense", "own_network", "own_noise"]
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == names


def test_own_defense(load, monkeypatch):
    from learn2perturb import registry

    entries = dict(registry.DEFENSES._entries)
    monkeypatch.setattr(registry.DEFENSES, "_entries", entries)
    result = load("own_defense").main(epochs=2)
    assert "soft_at" in entries
    assert result.row("pgd20").accuracy > 0.3 < result.row("clean").accuracy


@pytest.mark.parametrize(
    ("name", "row", "registry"), [("own_attack", "momentum", "ATTACKS"), ("own_data", "pgd10", "DATASETS")]
)
def test_own_attack_and_own_data(load, monkeypatch, name, row, registry):
    from learn2perturb import registry as registries

    ours = getattr(registries, registry)
    monkeypatch.setattr(ours, "_entries", dict(ours._entries))
    result = load(name).main(epochs=1)
    assert ours.own()
    assert result.row("clean").accuracy > result.row(row).accuracy or name == "own_data"
    assert [part["module"] for part in result.metadata["parts"]] == [name]


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = json.loads((EXAMPLES / "first_steps.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    code = "\n".join(cells)
    assert "EPOCHS, LIMIT = 2, 400" in code
    (tmp_path / "notebook.py").write_text(code.replace("EPOCHS, LIMIT = 2, 400", "EPOCHS, LIMIT = 1, 64"))
    runpy.run_path(str(tmp_path / "notebook.py"))
    assert re.search(
        r"^learn2perturb  clean [0-9.]+ %  pgd [0-9.]+ %  eot-pgd [0-9.]+ %$", capsys.readouterr().out, re.M
    )
    assert all(not cell.get("outputs") for cell in notebook["cells"])  # no results of one machine


def test_own_noise_as_a_script(capsys, monkeypatch):
    from learn2perturb import registry

    monkeypatch.setattr(registry.NOISES, "_entries", dict(registry.NOISES._entries))
    runpy.run_path(str(EXAMPLES / "own_noise.py"), run_name="__main__")
    fresh, replayed = (float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()[:2])
    assert fresh > 0 == replayed


def test_own_network_as_a_script(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["own_network.py", "2"])
    runpy.run_path(str(EXAMPLES / "own_network.py"), run_name="__main__")
    row = re.search(r"eot-pgd20 +0.06 +on +single +([0-9.]+)", capsys.readouterr().out)
    assert row is not None
    assert float(row[1]) > 80
