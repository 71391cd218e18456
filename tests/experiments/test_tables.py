"""Tables of the paper: the published numbers, every cell of the protocol, and cells that are not computed twice."""

from __future__ import annotations

import json

import pytest

from learn2perturb import build_model, load_data, perturb, records
from learn2perturb.cli.main import main
from learn2perturb.errors import ConfigError, UnknownNameError
from learn2perturb.experiments import tables
from learn2perturb.experiments.facts import published
from learn2perturb.experiments.tables import KAPPAS, PaperTable, Trained, reproduce

TINY = {
    "table3": {"steps": 2, "search_steps": 1, "draws": 2},
    "table5": {"population": 4, "generations": 1},
    "table6": {"steps": 1},
}


@pytest.fixture(scope="module")
def runs():
    """Return two untrained networks, the second with noise, said to be of the paper's defenses and data."""
    shape = (1, 8, 8)
    plain = build_model("digits_cnn", input_shape=shape)
    noisy = perturb(build_model("digits_cnn", input_shape=shape), input_shape=shape)
    data = load_data("digits", "test", limit=6)
    return [
        Trained("a/plain", "pgd_at", "resnet20", plain, data, 0.1, "one"),
        Trained("b/noisy", "learn2perturb", "resnet20", noisy, data, 0.1, "two"),
    ]


def test_published_numbers():
    three, five, six = (published(name) for name in TINY)
    assert len(three.cells) == 25
    assert len(five.cells) == 30
    assert len(six.cells) == 2 * 12 * 2
    assert five.cell(network="resnet20", pixels="1", defense="learn2perturb").mean == pytest.approx(0.7015)
    cell = six.cell(network="resnet18", source="adv_bnn", defense="pni", attack="pgd")
    assert (cell.mean, cell.std) == (pytest.approx(0.7151), pytest.approx(0.0002))
    assert three.cell(kappa="5.0", defense="none").mean == 0
    assert three.cell(kappa="0.1", defense="learn2perturb").suspect
    assert three.cell(kappa="1.0", defense="learn2perturb_r") is None
    with pytest.raises(UnknownNameError, match="unknown table 'table7'"):
        published("table7")


@pytest.mark.parametrize(("table", "cells"), [("table3", 3 * len(KAPPAS)), ("table5", 6), ("table6", 4)])
def test_every_cell_once_and_never_twice(table, cells, runs, tmp_path, monkeypatch):
    first = reproduce(table, runs, tmp_path, settings=TINY[table], draws=2, engine="plain")
    assert len(first.cells) == len({tuple(cell.labels.values()) for cell in first.cells}) == cells
    assert all(cell.n == 6 and 0 <= cell.accuracy <= 1 for cell in first.cells)
    assert records.load(tmp_path / f"{table}.json", PaperTable) == first
    lines = (tmp_path / f"{table}.md").read_text().splitlines()
    assert sum(line.startswith("|") for line in lines) == cells + 2
    # The data are not the paper's, so its numbers would be no comparison.
    assert all(cell.paper is None for cell in first.cells)

    computed = []
    real = tables.evaluate
    monkeypatch.setattr(
        tables, "evaluate", lambda *given, **named: computed.append(named["name"]) or real(*given, **named)
    )
    assert reproduce(table, runs, tmp_path, settings=TINY[table], draws=2, engine="plain") == first
    assert computed == []
    # One is lost and one damaged: these two are made anew, and are what they were.
    (tmp_path / first.cells[0].record).unlink()
    (tmp_path / first.cells[1].record).write_text("{")
    assert (
        reproduce(table, runs, tmp_path, settings=TINY[table], draws=2, engine="plain").cells[0].accuracy
        == first.cells[0].accuracy
    )
    assert len(computed) == 2


def test_the_papers_number_stands_beside_ours_and_suspect_ones_are_flagged(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_is_of_the_paper", lambda run, dataset: True)
    result = reproduce("table6", runs, tmp_path, settings=TINY["table6"], draws=1, engine="plain")
    numbers = [100 * cell.paper.mean for cell in result.cells]
    assert numbers == pytest.approx([58.86, 56.75, 70.66, 67.32])
    assert "58.86 +- 0.03 (suspect)" in str(result)
    assert "suspect: a/plain, b/noisy, fgsm, paper 58.86: close to the white-box" in str(result)


def test_other_weights_are_another_cell(runs, tmp_path):
    import dataclasses

    reproduce("table5", runs[:1], tmp_path, settings=TINY["table5"], draws=1, engine="plain")
    reproduce(
        "table5",
        [dataclasses.replace(runs[0], identity="three")],
        tmp_path,
        settings=TINY["table5"],
        draws=1,
        engine="plain",
    )
    assert len(list((tmp_path / "cells").iterdir())) == 6


def test_bad_input(runs, tmp_path):
    with pytest.raises(ConfigError, match="table6 needs at least two runs.*got 1"):
        reproduce("table6", runs[:1], tmp_path)
    with pytest.raises(ConfigError, match="a/plain is given twice"):
        reproduce("table5", [runs[0], runs[0]], tmp_path)
    with pytest.raises(ConfigError, match="FewPixel has no setting generation; it has: .*generations"):
        reproduce("table5", runs, tmp_path, settings={"generation": 3})
    with pytest.raises(ConfigError, match="no run is given"):
        reproduce("table5", [], tmp_path)


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_for_table5.py").write_text(
        "import learn2perturb as l\n\ndef net():\n    return l.build_model('digits_cnn', input_shape=(1, 8, 8))\n"
    )
    words = ["reproduce", "table5", "mine_for_table5:net", "--dataset", "digits", "--limit", "4", "--out", "there"]
    words += ["--set", "population=4", "--set", "generations=1", "--engine", "plain", "--device", "cpu"]
    assert main([*words, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["cells"]) == 3
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "| run | pixels | ours % | interval | paper % | n |" in out
    assert "Other settings than the paper's: population=4, generations=1." in out
    for bad, message in (
        (["reproduce", "table4", "x"], "unknown table 'table4'"),
        (["reproduce", "table5", "nowhere"], "nowhere does not exist"),
        ([*words, "--set", "steps"], "--set 'steps' is no KEY=VALUE; write --set steps=100"),
        (["reproduce", "table5"], "RUN"),
    ):
        assert main(bad) == 2
        assert message in capsys.readouterr().err
