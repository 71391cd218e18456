"""The command line as a user meets it: help, exit codes, one-line errors, a whole cycle, Ctrl-C."""

from __future__ import annotations

import importlib
import json
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

import learn2perturb as l2p
from learn2perturb.cli.main import VERBS, main
from learn2perturb.evaluation import Evaluation

SMALL = ("--dataset=digits", "--model=digits_cnn", "--recipe=fast", "--engine=plain", "--device=cpu")
TINY = (*SMALL, "--epochs=2", "--limit=128", "--batch-size=32", "--monitor=32", "--attack-steps=1", "--eps=.1")


def python(*words: str, **settings) -> subprocess.CompletedProcess[str]:
    """Run the command line in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-m", "learn2perturb.cli.main", *words],
        capture_output=True, text=True, timeout=120, check=False, **settings,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> pathlib.Path:
    """A finished tiny run."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", *TINY, "--out", str(folder), "--options.gamma", "1e-3"]) == 0
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch) -> pathlib.Path:
    """An own working folder, with a few files that must survive."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    (tmp_path / "file.txt").write_text("mine")
    (tmp_path / "broken.yaml").write_text("a: [")
    (tmp_path / "list.yaml").write_text("- 1")
    (tmp_path / "word.yaml").write_text("epochs: soon")
    (tmp_path / "unknown.yaml").write_text("epoch: 3")
    return tmp_path


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- help and start-up


@pytest.mark.parametrize("words", [["--help"], *([verb, "--help"] for verb in VERBS)], ids=" ".join)
def test_help_has_an_example_and_does_not_wait_for_torch(words):
    code = (
        "import sys\nfrom learn2perturb.cli.main import main\n"
        f"code = main({words!r})\n"
        "print(code, 'torch' in sys.modules, 'rich' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines()[-1] == "0 False False", done.stderr
    assert "example:" in done.stdout


@pytest.mark.parametrize("verb", list(VERBS))
def test_the_example_of_a_verb_is_a_command_that_parses(verb):
    import shlex

    from learn2perturb.cli.options import Parser

    module = importlib.import_module(f"learn2perturb.cli.{verb}")
    program, named, *rest = shlex.split(module.EXAMPLE)
    assert (program, named) == ("learn2perturb", verb)
    parser = Parser()
    module.add_arguments(parser)
    parser.parse(rest)


def test_help_names_the_verbs_that_there_are_and_no_others(capsys):
    assert main(["--help"]) == 0
    section = capsys.readouterr().out.split("verbs:\n")[1].split("\n\n")[0]
    assert [line.split()[0] for line in section.splitlines()] == list(VERBS)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("learn2perturb ")


# --- bad input

RUN = "{run}"
BAD = {
    "no verb": ([], "choose one of demo, train"),
    "unknown verb": (["trian"], "did you mean 'train'"),
    "unknown option": (["train", "--modle", "x"], "did you mean '--model'"),
    "unknown option, nothing near": (["list", "models", "--quux"], "see learn2perturb list --help"),
    "one word too many": (["train", "extra"], "see learn2perturb train --help"),
    "unknown network": (["train", "--model", "resnet2"], "did you mean"),
    "unknown defense": (["train", "--defense", "learn2pertrub"], "did you mean 'learn2perturb'"),
    "unknown data set": (["train", "--dataset", "cifra10"], "did you mean 'cifar10'"),
    "unknown recipe": (["train", "--recipe", "quick"], "known: common, fast"),
    "no number": (["train", "--epochs", "x"], "not a whole number"),
    "no value": (["train", "--epochs"], "see learn2perturb train --help"),
    "eps in grey levels": (["train", "--eps", "8"], "write 8/255"),
    "eps over nothing": (["train", "--eps", "8/0"], "write 0.03 or 8/255"),
    "no truth value": (["train", "--nesterov", "maybe"], "write true or false"),
    "no mapping": (["train", "--options", "gamma"], "write --options.KEY VALUE"),
    "no value of a key": (["train", "--options.gamma"], "write --options.gamma VALUE"),
    "unknown option of the defense": (["train", *TINY, "--options.gama", "1"], "did you mean 'gamma'"),
    "wrong option of the defense": (["train", *TINY, "--options.gamma", "abc"], "options.gamma: 'abc' is not a number"),
    "unknown option of the network": (["train", *TINY, "--model_options.foo", "1"], "its options"),
    "no config": (["train", "--config", "nowhere.yaml"], "give a YAML file"),
    "config is no YAML": (["train", "--config", "broken.yaml"], "fix the file"),
    "config is a list": (["train", "--config", "list.yaml"], "must hold settings"),
    "config with a wrong value": (["train", "--config", "word.yaml"], "epochs: 'soon' is not a whole number"),
    "config with an unknown key": (["train", "--config", "unknown.yaml"], "did you mean 'epochs'"),
    "no data": (["train", "--dataset", "cifar10", "--data-dir", "nowhere"], "--data-dir"),
    "no such device": (["train", *TINY, "--device", "abacus"], "use cpu or cuda|use auto, cpu or cuda"),
    "out holds something else": (["train", *TINY, "--out", "notes"], "give another --out"),
    "out is a file": (["train", *TINY, "--out", "file.txt"], "give another --out"),
    "out below a file": (["train", *TINY, "--out", "file.txt/x"], "give another place"),
    "out holds another run": (["train", *TINY, "--out", RUN], "give another --out, or the same settings"),
    "no run named": (["evaluate"], "RUN"),
    "no such run": (["evaluate", "nowhere"], "give a run folder"),
    "no run in the folder": (["evaluate", "notes"], "give a run folder"),
    "no checkpoint": (["evaluate", "file.txt"], "use another checkpoint"),
    "unknown preset": (["evaluate", RUN, "--attacks", "fgms"], "did you mean 'fgsm'"),
    "empty list": (["evaluate", RUN, "--attacks", ","], "give at least one"),
    "attack not KEY=VALUE": (["evaluate", RUN, "--attack", "pgd:steps"], "write pgd:steps=20"),
    "unknown setting of an attack": (["evaluate", RUN, "--attack", "pgd:stesp=2"], "it has: eps"),
    "constant of an attack": (["evaluate", RUN, "--attack", "pgd:needs_gradient=2"], "it has: eps"),
    "wrong setting of an attack": (["evaluate", RUN, "--attack", "pgd:steps=abc"], "not a whole number"),
    "unknown attack": (["evaluate", RUN, "--attack", "foo:a=1"], "known: apgd"),
    "two eps": (["evaluate", RUN, "--attack", "fgsm:eps=.1", "--eps", ".2"], "give one of them"),
    "evaluation eps": (["evaluate", RUN, "--eps", "8"], "write 8/255"),
    "no draws": (["evaluate", RUN, "--draws", "0"], "at least 1, got 0"),
    "unknown predictor": (["evaluate", RUN, "--predictor", "best"], "known: mean_logits"),
    "unknown split": (["evaluate", RUN, "--split", "dev"], "allowed: test"),
    "no validation": (["evaluate", RUN, "--split", "validation"], "use --split test"),
    "record over a file": (["evaluate", RUN, "--out", "file.txt"], "give another --out"),
    "record over a folder": (["evaluate", RUN, "--out", "notes"], "give a file"),
    "unknown kind": (["list", "foo"], "known: attacks"),
    "no such name": (["list", "models", "foo*"], "known: digits_cnn"),
    "demo over a file": (["demo", "--out", "file.txt"], "give a folder"),
    "demo seed": (["demo", "--seed", "-1"], "whole number"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_is_one_line_that_names_the_fix_and_changes_nothing(case, here, trained, capsys):
    words, fix = BAD[case]
    before, run_before = contents(here), contents(trained)
    assert main([word.replace(RUN, str(trained)) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("learn2perturb: error: ")
    assert error.count("\n") == 1, error
    assert any(text in error for text in fix.split("|")), error
    assert contents(here) == before
    assert contents(trained) == run_before


def test_an_unexpected_error_is_one_line_too_and_a_traceback_with_debug(capsys, monkeypatch):
    from learn2perturb.cli import list as verb

    def fail(_):
        raise RuntimeError("a bug\nin two lines")

    monkeypatch.setattr(verb, "run", fail)
    assert main(["list", "models"]) == 1
    error = capsys.readouterr().err
    assert "RuntimeError: a bug in two lines" in error
    assert error.count("\n") == 1
    with pytest.raises(RuntimeError):
        main(["list", "models", "--debug"])
    monkeypatch.setenv("LEARN2PERTURB_DEBUG", "1")
    with pytest.raises(RuntimeError):
        main(["list", "models"])


def test_exit_codes_reach_the_shell():
    done = python("train", "--model", "resnet2")
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert python("--version").returncode == 0


# --- train, evaluate, list


def test_a_repeated_training_says_that_it_is_finished(trained, capsys):
    before = contents(trained / "checkpoints")
    assert main(["train", *TINY, "--out", str(trained), "--options.gamma", "1e-3"]) == 0
    assert "finished already: 2 epochs" in capsys.readouterr().out
    assert contents(trained / "checkpoints") == before


def test_train_prints_a_summary_for_programs(tmp_path, capsys):
    words = [word for word in TINY if not word.startswith("--epochs")]
    assert main(["train", *words, "--epochs=1", "--defense=none", "--out", str(tmp_path / "run"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["config"]["defense"] == "none"
    assert said["metrics"]["epoch"] == 0
    assert not said["finished_before"]
    assert said["next"] == f"learn2perturb evaluate {tmp_path / 'run'}"


def test_a_trained_run_is_evaluated_and_never_overwritten(trained, capsys):
    words = ["evaluate", str(trained), "--limit=20", "--draws=2", "--attacks=fgsm,eot-pgd7", "--eot=2", "--eps=.05,.1"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert re.search(r"eot-pgd7 +0.05 +on", printed)
    assert re.search(r"fgsm +0.1 +off", printed)
    assert "the steps of eot-pgd7 reach 0.07" in printed
    first = trained / "evaluation" / "test-limit20-seed0.json"
    record = Evaluation.load(first)
    assert record.row("eot-pgd7", eps=0.05).parameters["eot"] == 2
    assert main([*words, "--json", "--no-noise-off"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["record"].endswith("test-limit20-seed0-2.json")
    assert {row["noise"] for row in said["rows"]} == {True}
    assert [row["accuracy"] for row in said["rows"]] == [row.accuracy for row in record.rows if row.noise]
    assert Evaluation.load(first) == record


def test_the_eps_of_an_attack_is_its_own_else_that_of_the_run(trained, tmp_path, capsys):
    words = ["evaluate", str(trained), "--limit=8", "--draws=1", "--no-noise-off", "--attacks=fgsm"]
    words += ["--attack", "pgd:steps=1,eps=2/255", "--out", str(tmp_path / "r.json"), "--json"]
    assert main(words) == 0
    sizes = {row["attack"]: row["eps"] for row in json.loads(capsys.readouterr().out)["rows"]}
    assert sizes == {"clean": None, "fgsm": 0.1, "pgd:steps=1,eps=2/255": 2 / 255}
    assert main(words) == 0  # --out may replace a record


def test_a_run_on_own_data_is_not_scored_on_a_data_set_it_never_saw(tmp_path, capsys):
    data = l2p.load_data("digits", "train", limit=64)
    config = l2p.TrainConfig(
        defense="none", model="digits_cnn", recipe="fast", epochs=1, monitor=0, tensorboard=False
    )  # its field dataset has the default, cifar10
    l2p.train(config, data=(data.images, data.labels), model=l2p.build_model("digits_cnn", input_shape=(1, 8, 8)),
              out=tmp_path / "own", progress=False)  # fmt: skip
    assert main(["evaluate", str(tmp_path / "own"), "--limit", "20", "--attacks", "none"]) == 2
    assert "--dataset NAME" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "own"), "--limit", "20", "--attacks", "none", "--dataset", "digits"]) == 0


def test_eot_is_left_out_without_noise(tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", *TINY, "--defense=pgd_at", "--out", str(run)]) == 0
    words = ["evaluate", str(run), "--limit=8", "--attacks=pgd7,eot-pgd7", "--attack=pgd:steps=2,eot=2", "--json"]
    capsys.readouterr()
    assert main(words) == 0
    said = json.loads(capsys.readouterr().out)
    assert [row["attack"] for row in said["rows"]] == ["clean", "pgd7", "pgd:steps=2,eot=2"]
    assert "eot-pgd7 is left out" in said["notes"][0]


@pytest.mark.parametrize("kind", ["models", "attacks", "defenses", "datasets", "recipes"])
def test_list_shows_everything_and_its_options(kind, capsys):
    assert main(["list", kind]) == 0
    text = capsys.readouterr().out
    assert main(["list", kind, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows
    for row in rows:
        assert f"{row['name']}: {row['summary']}" in text
        assert all(f"    {name} = " in text for name in row["options"])


def test_list_takes_a_pattern(capsys):
    assert main(["list", "defenses", "learn2perturb*", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == ["learn2perturb", "learn2perturb_r"]
    assert rows["learn2perturb"]["year"] == 2020
    assert rows["learn2perturb_r"]["options"]["noise_from_loss"] is False


# --- Ctrl-C


def test_ctrl_c_saves_and_the_same_command_resumes(tmp_path):
    folder = tmp_path / "run"
    small = [word for word in TINY if not word.startswith(("--epochs", "--monitor"))]
    words = [
        "train",
        *small,
        "--epochs=8",
        "--monitor=0",
        "--log-every=1",
        "--out",
        str(folder),
        "--tensorboard=false",
    ]
    command = [sys.executable, "-m", "learn2perturb.cli.main", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        metrics = folder / "metrics.jsonl"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") > 2):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, error
    assert "Traceback" not in error
    last = error.splitlines()[-1]
    assert "the state is saved in" in last
    assert "the same command again resumes" in last
    done = python(*words, "--json")
    assert done.returncode == 0, done.stderr
    assert f"resuming {folder} at epoch" in done.stderr
    assert re.search(r"epoch 8/8  loss", done.stderr)
    assert "\x1b" not in done.stderr  # plain lines off a terminal
    said = json.loads(done.stdout)
    assert said["metrics"]["epoch"] == 7
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines() if '"kind": "step"' in line]
    assert steps == list(range(1, 33))
