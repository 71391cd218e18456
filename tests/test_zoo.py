"""The networks that come with the package: their cards, their records, and their numbers computed again."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace

import pytest
import yaml

import learn2perturb as l2p
from learn2perturb import zoo
from learn2perturb.attacks import FGSM
from learn2perturb.cli.main import main
from learn2perturb.data import ImageData, load_data
from learn2perturb.diagnosis import Diagnosis
from learn2perturb.engine.identity import fingerprint_of_weights
from learn2perturb.errors import CheckpointError
from learn2perturb.evaluation import Evaluation
from learn2perturb.evaluation.result import CLEAN
from learn2perturb.runs.checkpoint import read_model
from learn2perturb.training import TrainConfig, read_config

N = 500  # real images on which each network is asked again
LEAST = 0.02  # accuracy that other hardware may change on them


def records(name: str, kind: type = Evaluation) -> list:
    found = []
    for path in sorted(zoo.folder(name).glob("evaluation/*.json")):
        if f'"{kind.FORMAT}"' in path.read_text()[:200]:
            found.append(kind.load(path))
    return found


def images_of(name: str) -> ImageData:
    settings = read_config(zoo.folder(name) / "config.yaml")
    if settings["dataset"] == "digits":
        return load_data("digits", "test")
    root = os.environ.get("LEARN2PERTURB_DATA_DIR")
    if not root:
        pytest.skip("LEARN2PERTURB_DATA_DIR names no folder with the real images")
    return load_data(settings["dataset"], "test", root=root)


def test_there_are_networks_and_they_are_small():
    assert {"learn2perturb-resnet20-cifar10-e40", "pgd_at-digits", "learn2perturb-digits"} <= set(zoo.names())
    size = sum(path.stat().st_size for path in zoo.FOLDER.rglob("*") if path.is_file() and path.suffix != ".pyc")
    assert size <= zoo.MOST_BYTES_IN_ALL
    with pytest.raises(CheckpointError, match="did you mean 'pgd_at-digits'"):
        zoo.folder("pgd_at-digit")


@pytest.mark.parametrize("name", zoo.names())
def test_a_card_holds_every_number_of_the_records_and_the_hash_of_the_weights(name):
    card, own = zoo.card(name), records(name)
    assert hashlib.sha256(zoo.weights(name).read_bytes()).hexdigest() in card
    assert zoo.weights(name).stat().st_size <= zoo.MOST_BYTES
    weights = fingerprint_of_weights(l2p.load(f"zoo:{name}"))
    for record in own + records(name, Diagnosis):
        assert record.metadata["model"] == f"zoo:{name}"
        assert record.metadata.get("weights", weights) == weights
        assert not any(word.startswith("/") for word in record.metadata.get("command", ()))
    rows = [row for record in own for row in record.rows]
    assert any(row.attack != CLEAN for row in rows)
    for row in rows:
        line = next(line for line in card.splitlines() if line.startswith((f"| {row.label} |", f"| {row.label} * |")))
        images = int(line.split("|")[3])
        assert images >= row.n
        if images == row.n:
            assert f"{100 * row.accuracy:.2f}" in line
            assert f"[{100 * row.interval.low:.2f}, {100 * row.interval.high:.2f}] | {row.n} | {row.draws} |" in line
    for diagnosis in records(name, Diagnosis):
        assert all(check.sentence in card.replace("\\|", "|") for check in diagnosis.checks)
    assert "data_dir" not in card and f"learn2perturb report zoo:{name}" in card


@pytest.mark.parametrize("name", zoo.names())
def test_the_settings_beside_a_network_are_those_it_was_trained_with(name):
    settings = read_config(zoo.folder(name) / "config.yaml")
    assert settings == read_model(zoo.weights(name))[1]["config"]
    assert settings["data_dir"] is None
    assert TrainConfig.from_dict(settings).built_defense()
    epochs = [json.loads(line)["epoch"] for line in (zoo.folder(name) / "metrics.jsonl").read_text().splitlines()]
    assert epochs == list(range(len(epochs))) and epochs
    kept = yaml.safe_load(zoo.card(name).rpartition("```yaml")[2].partition("```")[0])
    assert kept.items() <= settings.items()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name.endswith("-digits") else pytest.mark.slow) for name in zoo.names()]
)
def test_a_network_has_its_numbers_again_on_real_images(name):
    whole = images_of(name)
    model = l2p.load(f"zoo:{name}")
    rows = [(one, row) for one in records(name) for row in one.rows if row.noise]
    then = {row.attack.lower(): (one, row) for one, row in reversed(rows)}
    before, row = then["fgsm"]
    # Of all test images the first; of a part, which is balanced over the classes, that part.
    first = replace(whole, images=whole.images[:N], labels=whole.labels[:N])
    data = whole.take(N) if len(before.labels.unpack()) == N else first
    assert before.labels.unpack()[:N].tolist() == data.labels.tolist()
    found = l2p.evaluate(
        model, data, {"fgsm": FGSM(eps=row.eps)}, eps=row.eps, draws=row.draws, seed=before.seed, noise_off=False,
        predictor=row.predictor, members=row.members, progress=False,
    )  # fmt: skip
    for attack in (CLEAN, "fgsm"):
        record, old = then[attack]
        assert record.labels.unpack()[:N].tolist() == data.labels.tolist()
        now = found.row(attack, predictor=row.predictor)
        assert (now.stochastic, now.predictor) == (old.stochastic, old.predictor)
        # Both are means over as many draws of the same images: how far they scatter, their own draws say.
        spread = max(now.std or 0.0, old.std or 0.0) * (2 / now.draws) ** 0.5
        assert abs(now.accuracy - old.correct.unpack()[:, :N].mean()) <= 4 * spread + LEAST


def test_a_network_of_the_zoo_stands_wherever_a_run_does(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["report", "zoo:pgd_at-digits", "zoo:learn2perturb-digits", "--out", "page.html"]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "zoo:pgd_at-digits" in page and "zoo:learn2perturb-digits" in page
    capsys.readouterr()
    assert main(["compare", "zoo:learn2perturb-digits", "zoo:pgd_at-digits", "--pair", "eot-pgd20=pgd20"]) == 0
    assert "zoo:pgd_at-digits" in capsys.readouterr().out
    assert main(["report", "zoo:nothing"]) == 2
    assert main(["compare", "zoo:pgd_at-digits", "zoo:nothing"]) == 2
    assert capsys.readouterr().err.count("no network 'nothing' in the zoo") == 2


def test_list_zoo_shows_what_each_attack_left(capsys):
    assert main(["list", "zoo", "pgd_at-*", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == {f"zoo:{name}" for name in zoo.names() if name.startswith("pgd_at-")}
    (record,) = records("pgd_at-digits")
    said = rows["zoo:pgd_at-digits"]
    assert said["summary"] == zoo.summary("pgd_at-digits") and "trained on digits with pgd_at" in said["summary"]
    for row in record.rows:
        assert said["options"][row.label] == f"{100 * row.accuracy:.1f} % of {row.n}"
    (diagnosis,) = records("pgd_at-digits", Diagnosis)
    assert said["options"]["diagnosis"] == diagnosis.verdict
