"""The norm of a threat in training and evaluation: a size is of one norm, and is never used in another."""

from __future__ import annotations

import json

import pytest

from learn2perturb.attacks.spec import attacks_of_size
from learn2perturb.cli.main import main
from learn2perturb.diagnosis.threat import threat_of_training
from learn2perturb.errors import ConfigError
from learn2perturb.evaluation import Evaluation
from learn2perturb.experiments.study_file import read_study
from learn2perturb.experiments.tasks import attack_of, threat_of
from learn2perturb.registry import ATTACKS
from learn2perturb.runs.checkpoint import read_model
from learn2perturb.runs.files import locate

TRAIN = ["train", "--model", "digits_cnn", "--dataset", "digits", "--recipe", "fast", "--epochs", "1", "--limit", "16",
         "--monitor", "0", "--tensorboard", "false", "--attack-steps", "1", "--defense", "pgd_at"]  # fmt: skip
JUDGE = ["--attacks", "fgsm,pgd20,square,cw", "--draws", "2", "--limit", "4", "--json"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("norms") / "run"
    assert main([*TRAIN, "--norm", "l2", "--eps", "0.7", "--out", str(out)]) == 0
    return out


def rows(capsys):
    """Return attack -> norm and size of the rows of a record."""
    said = json.loads(capsys.readouterr().out)
    record = Evaluation.load(said["record"])
    attacks = {}
    for row in record.rows:
        own = row.parameters or {}
        attacks[row.attack] = (own.get("norm"), own.get("eps"), own.get("step_size"))
    return attacks, said["notes"]


def test_a_run_trained_in_l2_is_attacked_in_l2_at_its_size(run, capsys):
    capsys.readouterr()
    assert main(["evaluate", str(run), *JUDGE]) == 0
    attacks, notes = rows(capsys)
    assert {attacks[name][:2] for name in ("fgsm", "pgd20", "square")} == {("l2", 0.7)}
    assert attacks["pgd20"][2] == pytest.approx(0.7 * 0.01 / (8 / 255))  # not the step of l_inf
    assert "attacks are in l2, the norm of the run's training; --norm linf attacks it in l_inf" in notes


def test_its_size_is_never_one_of_l_inf(run, capsys):
    capsys.readouterr()
    assert main(["evaluate", str(run), "--norm", "linf", *JUDGE]) == 0
    attacks, _ = rows(capsys)
    assert {attacks[name][:2] for name in ("fgsm", "pgd20")} == {("linf", 8 / 255)}


def test_another_norm_needs_its_size(run, tmp_path, capsys):
    assert main([*TRAIN, "--norm", "l2", "--out", str(tmp_path / "new")]) == 2
    assert "norm is 'l2' and no eps is given" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--norm", "l3", *JUDGE]) == 2
    assert "norm is 'l3'; allowed: linf, l2" in capsys.readouterr().err


def test_an_attack_of_another_norm_than_the_table_is_never_given_its_size(run, capsys):
    capsys.readouterr()
    # rays knows l_inf alone; the run is of l2
    assert main(["evaluate", str(run), "--attack", "rays:queries=4", "--attack", "pgd:norm=linf,steps=2", *JUDGE]) == 0
    attacks, _ = rows(capsys)
    assert attacks["rays:queries=4"][1] == attacks["pgd:norm=linf,steps=2"][1] == 8 / 255
    own = "pgd100=pgd:norm=l2,steps=2,step_size=0.2"  # a step that is written stays, whatever its row is called
    assert main(["evaluate", str(run), "--norm", "linf", "--attack", own, *JUDGE]) == 0
    assert rows(capsys)[0]["pgd100"] == ("l2", 0.7, 0.2)


@pytest.mark.parametrize("entry", [one for one in ATTACKS if not one.facts.get("needs")], ids=lambda one: one.name)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_every_attack_is_of_the_size_of_its_norm(entry, norm):
    sizes = {"linf": 0.03, "l2": 0.7, "l0": 9.0}
    written = {"": {}, "of l2": {"norm": "l2"}, "of linf": {"norm": "linf"}, "sized": {"eps": 1.0}}
    for settings in written.values():
        if settings.get("norm", "linf") not in entry.load().norms:
            continue
        (attack,) = attacks_of_size({"row": (entry.name, settings)}, sizes.__getitem__, norm=norm).values()
        if "eps" in settings or not attack.sized:
            assert attack.eps == settings.get("eps", attack.eps)
        else:
            assert attack.eps == sizes[attack.norm]
        assert attack.norm == settings.get("norm", attack.norm)
        if "norm" not in settings and norm in attack.norms and not attack.minimum_norm:
            assert attack.norm == norm


STUDY = """
runs: {{mine: {{weights: {run}}}}}
cells:
  as trained: {{attack: pgd20}}
  named: {{attack: {{name: pgd20, norm: l2}}}}
  other: {{attack: {{name: pgd20, norm: linf}}}}
  nothing: {{attack: pgd20, eps: 0}}
  half: {{attack: pgd20, eps: 0.35}}
  judged: {{diagnose: {{budget: quick}}}}
  sized: {{diagnose: {{budget: quick}}, eps: 0.2}}
  certified: {{certify: {{n: 100}}}}
"""


def test_a_study_decides_norm_and_size_as_the_verbs_do(run, tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(STUDY.format(run=run))
    study = read_study(str(file))
    header = read_model(locate(run))[1]
    found = {pair.cell.name: attack_of(pair, header) for pair in study.all_pairs()}
    step = pytest.approx(0.7 * 0.01 / (8 / 255))  # not that of l_inf, whatever the cell is called
    for name in ("as trained", "named"):
        assert (found[name].norm, found[name].eps, found[name].step_size) == ("l2", 0.7, step), name
    assert (found["other"].norm, found["other"].eps) == ("linf", 8 / 255)
    assert (found["nothing"].norm, found["nothing"].eps) == ("l2", 0.0)
    assert (found["half"].norm, found["half"].eps) == ("l2", 0.35)
    pairs = {pair.cell.name: pair for pair in study.all_pairs()}
    assert threat_of(pairs["judged"], header) == {"eps": 0.7, "norm": "l2"}
    assert threat_of(pairs["sized"], header) == {"eps": 0.2, "norm": "l2"}
    assert threat_of(pairs["certified"], header) == {"eps": 8 / 255}


def test_a_diagnosis_is_in_the_norm_of_the_training_and_never_of_the_size_of_another():
    trained, plain = {"norm": "l2", "eps": 0.7}, {}
    assert threat_of_training(trained) == threat_of_training(trained, norm="l2") == ("l2", 0.7)
    assert threat_of_training(trained, eps=0.1) == ("l2", 0.1)
    assert threat_of_training(trained, norm="linf") == ("linf", 8 / 255)
    assert threat_of_training(trained, claim="51 % under pgd20") == ("l2", 0.7)
    assert threat_of_training(trained, claim="51 % under pgd20 with 8/255") == (None, None)  # the claim says both
    assert threat_of_training(plain) == (None, 8 / 255)
    assert threat_of_training({"eps": 0.1}, claim=0.51) == (None, 0.1)
    with pytest.raises(ConfigError, match="norm is 'l2' and no eps is given"):
        threat_of_training({"eps": 0.1}, norm="l2")
