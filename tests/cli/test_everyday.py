"""What every verb offers: settings shown, dry runs, quiet and verbose, completion; rows that have names."""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess

import pytest
import yaml

import learn2perturb as l2p
from learn2perturb.cli.completion import SHELLS, completion
from learn2perturb.cli.main import VERBS, main
from learn2perturb.errors import ConfigError, UnknownNameError
from learn2perturb.presets import PRESETS, has_usual_step, named_row, preset, written_attack
from learn2perturb.progress import Reporter
from learn2perturb.registry import DEFENSES
from learn2perturb.terminal import verbosity
from learn2perturb.training.config import TrainConfig

TRAIN = ("train", "--dataset=digits", "--model=digits_cnn", "--recipe=fast", "--device=cpu", "--engine=plain")
TINY = ("--epochs=0", "--limit=64", "--monitor=0", "--tensorboard=false", "--defense=none")


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("runs") / "plain")
    assert main([*TRAIN, *TINY, "--out", folder]) == 0
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def printed(capsys, *words, code=0):
    capsys.readouterr()
    assert main([*words]) == code
    return capsys.readouterr().out


# --- settings and dry runs


def test_the_settings_of_a_training_are_a_file_that_gives_them_again(capsys, tmp_path):
    said = printed(capsys, *TRAIN, "--lr=0.05", "--options.gamma=1e-3", "--print-config")
    settings = yaml.safe_load(said)
    assert settings["lr"] == 0.05
    assert settings["options"]["gamma"] == 1e-3
    assert None not in (settings["epochs"], settings["batch_size"], settings["attack_steps"])
    (tmp_path / "again.yaml").write_text(said)
    assert yaml.safe_load(printed(capsys, "train", "--config=again.yaml", "--print-config")) == settings
    assert TrainConfig.from_dict(settings).resolve() == TrainConfig.from_dict(settings)


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (("evaluate", "RUN", "--draws=3", "--attack=strong=pgd:steps=9"), "draws", 3),
        (("diagnose", "RUN", "--claim=0.5"), "claim", "0.5"),
        (("certify", "RUN", "--n=500"), "n", 500),
    ],
)
def test_the_settings_of_a_verb_are_shown_and_nothing_is_done(words, key, value, network, capsys, tmp_path):
    words = [network if word == "RUN" else word for word in words]
    assert yaml.safe_load(printed(capsys, *words, "--print-config"))[key] == value
    assert json.loads(printed(capsys, *words, "--print-config", "--json"))[key] == value
    said = printed(capsys, *words, "--dry-run")
    assert said.startswith(f"{words[0]} {network}")
    assert said.splitlines()[-1] == "nothing was done (--dry-run)"
    assert not list(tmp_path.rglob("*.json"))


def test_a_dry_run_of_a_training_says_whether_a_run_goes_on(network, capsys, tmp_path):
    words = [*TRAIN, *TINY]
    assert "the run goes into new" in printed(capsys, *words, "--out=new", "--dry-run")
    assert not (tmp_path / "new").exists()
    assert "0 epochs of 0" in printed(capsys, *words, "--out", network, "--dry-run")
    assert main([*words, "--seed=9", "--out", network, "--dry-run"]) == 2
    assert "holds another run" in capsys.readouterr().err


@pytest.mark.parametrize("setting", ["--awp=0.01", "--consistency=1", "--eps=0", "--options.nonsense=1"])
@pytest.mark.parametrize("defense", DEFENSES.names())
def test_a_dry_run_refuses_what_the_training_would(defense, setting, capsys, tmp_path):
    words = [*TRAIN, *TINY, f"--defense={defense}", setting, "--out=new"]
    code = main([*words, "--dry-run"])
    refused = capsys.readouterr().err
    assert code == (2 if refused else 0)
    assert not refused or (main(words) == 2 and capsys.readouterr().err == refused)
    if defense == "mart" or "nonsense" in setting:
        assert refused or setting == "--eps=0"


@pytest.mark.parametrize("option", ["--print-config", "--dry-run"])
def test_what_is_wrong_is_refused_before_anything_is_shown(option, network, capsys):
    assert printed(capsys, "evaluate", network, "--attack=pgd:steps", option, code=2) == ""


# --- quiet and verbose


def test_quiet_says_nothing_of_progress_and_verbose_says_it_more_often(capsys):
    for amount, lines in ((-1, 0), (0, 1), (1, 1)):
        with verbosity(amount), Reporter() as reporter:
            reporter.line("epoch 1")
            assert reporter.interval == (5 if amount > 0 else 30)
        assert len(capsys.readouterr().err.splitlines()) == lines


def test_quiet_leaves_results_and_errors(network, capsys):
    assert main(["evaluate", network, "--attacks=none", "--limit=8", "-q", "--out=a.json"]) == 0
    out, err = capsys.readouterr()
    assert "clean" in out
    assert err == ""
    assert main(["evaluate", "nowhere", "-q"]) == 2
    assert "does not exist" in capsys.readouterr().err


# --- completion


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_knows_verbs_options_and_names(shell):
    script = completion(shell, VERBS)
    assert all(verb in script for verb in VERBS)
    assert "learn2perturb_r" in script
    assert "--print-config" in script
    assert shell != "bash" or "learn2perturb l2p" in " ".join(script.split()) or " l2p" in script.splitlines()[-1]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_script_for_bash_is_bash():
    done = subprocess.run(["bash", "-n"], input=completion("bash", VERBS), text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_unknown_shell_is_refused(capsys):
    assert main(["--print-completion", "powershell"]) == 2
    assert "give one of bash, zsh" in capsys.readouterr().err
    assert main(["--print-completion"]) == 2


# --- rows that have names


@pytest.mark.parametrize(
    ("text", "row", "attack", "settings"),
    [
        ("strong=pgd:steps=50,eot=20", "strong", "pgd", {"steps": 50, "eot": 20}),
        ("my row=fgsm", "my row", "fgsm", {}),
        ("pgd:steps=5", "pgd:steps=5", "pgd", {"steps": 5}),
        ("fgsm", "fgsm", "fgsm", {}),
        ("long=pgd20:steps=50", "long", "pgd", {"steps": 50, "step_size": 2 / 255}),
        ("eot-pgd7:eot=3", "eot-pgd7:eot=3", "pgd", {"steps": 7, "step_size": 0.01, "eot": 3}),
    ],
)
def test_an_attack_may_name_its_row(text, row, attack, settings):
    name, written = named_row(text)
    assert (name, written_attack(written)) == (row, (attack, settings))


@pytest.mark.parametrize("text", ["=pgd:steps=5", "a=", "a=:steps=5", "<b>=pgd"])
def test_what_names_no_row_is_refused(text):
    with pytest.raises(ConfigError, match="write strong=pgd"):
        named_row(text)


@pytest.mark.parametrize("name", PRESETS)
def test_settings_replace_those_of_a_preset(name):
    """It was said of pgd20:eot=20 that pgd20 is unknown, and whether pgd20 was meant."""
    attack, settings = preset(name, 10)
    assert written_attack(name) == (attack, settings)
    assert written_attack(f"{name}:norm=l2") == (attack, {**settings, "norm": "l2"})
    assert has_usual_step(f"{name}:norm=l2") and not has_usual_step(f"{name}:step_size=0.1")
    assert not has_usual_step("pgd:steps=5")


def test_what_is_no_attack_is_told_of_others_than_itself():
    with pytest.raises(UnknownNameError, match="'pgd21': did you mean 'pgd20'"):
        written_attack("pgd21:eot=20")


def test_a_preset_with_other_settings_has_the_usual_step_of_the_norm(network, capsys):
    words = ["evaluate", network, "--limit=8", "--norm=l2", "--eps=0.5", "--json", "--attacks=none"]
    assert main([*words, "--attack=pgd20:steps=30", "--attack=mine=pgd:steps=30,step_size=2/255"]) == 0
    notes = " ".join(json.loads(capsys.readouterr().out)["notes"])
    assert "mine reach" in notes and "pgd20:steps=30 reach" not in notes


def test_named_rows_are_in_the_table_and_two_of_one_name_are_refused(network, capsys):
    words = ["evaluate", network, "--limit=8", "--eps=0.1", "--attack=weak=pgd:steps=1", "--attack=strong=pgd:steps=3"]
    rows = json.loads(printed(capsys, *words, "--json", "--out=a.json"))["rows"]
    assert [row["attack"] for row in rows] == ["clean", "weak", "strong"]
    assert main([*words, "--attack=weak=fgsm"]) == 2
    assert "two attacks are named 'weak'" in capsys.readouterr().err


def test_settings_among_the_names_are_pointed_to_where_they_go(network, capsys):
    assert main(["evaluate", network, "--limit=8", "--attacks", "fgsm,pgd20:restarts=5"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "--attacks takes names alone, got 'pgd20:restarts=5'; an attack with settings is one --attack" in error


# --- what a notebook shows


def test_results_that_hold_arrays_are_shown_in_a_line_or_two():
    model, data = l2p.build_model("digits_cnn", input_shape=(1, 8, 8)), l2p.load_data("digits", "test", limit=20)
    attack = l2p.attacks.FGSM(0.1)
    result = l2p.evaluate(model, data, {"fgsm": attack}, progress=False)
    crafted = attack.run(model, data.images.float() / 255, data.labels)
    radii = l2p.certify(model, data, sigma=0.25, n=20, limit=2, progress=False)
    for value in (data, result, result.row("fgsm"), crafted, radii):
        text = repr(value)
        assert text.startswith(f"{type(value).__name__}(")
        assert len(text) < 500
        assert "\n" not in text
        assert "tensor" not in text
    assert "x_adv=<20 x 1 x 8 x 8>" in repr(crafted)
    assert "accuracy=" in repr(result.row("fgsm"))
    assert repr(attack) == "FGSM(eps=0.1, norm='linf', loss='ce', targeted=False, eot=1, eot_average='loss', seed=None)"


# --- several runs at once


def test_several_runs_are_evaluated_side_by_side(network, capsys, tmp_path):
    other = str(tmp_path / "other")
    assert main([*TRAIN, *TINY, "--seed=1", "--out", other]) == 0
    words = ["evaluate", network, "--limit=8", "--eps=0.1", "--attacks=fgsm", other]  # after an option, too
    said = printed(capsys, *words)
    assert said.count("record: ") == 2
    table = said.strip().splitlines()[-4:]
    assert table[0].split() == ["accuracy", "%", "clean", "fgsm"]
    assert [line.split()[0] for line in table[2:]] == ["plain", "other"]
    found = json.loads(printed(capsys, *words, "--json"))
    assert [one["model"] for one in found] == [network, other]
    assert printed(capsys, *words, "--dry-run").count("record: ") == 2


@pytest.mark.parametrize("option", ["--out=a.json", "--weights=a.pt", "--model=resnet20"])
def test_what_is_of_one_network_is_refused_with_several(option, network, capsys):
    assert main(["evaluate", network, "another", "--attacks=none", option]) == 2
    assert "is of one network, and 2 are named" in capsys.readouterr().err


def test_one_of_several_that_is_not_there_stops_before_any_work(network, capsys):
    before = sorted(pathlib.Path(network).rglob("*.json"))
    printed(capsys, "evaluate", network, "nowhere", "--attacks=none", "--limit=8", code=2)
    assert sorted(pathlib.Path(network).rglob("*.json")) == before
    assert main(["diagnose", network, "another"]) == 2
    assert "one word too many" in capsys.readouterr().err
