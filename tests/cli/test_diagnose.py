"""``diagnose``, ``certify`` and ``compare`` at the command line, on a tiny run and on a factory."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex

import pytest
import torch

from learn2perturb.certification import Certification
from learn2perturb.cli import sources
from learn2perturb.cli.main import main
from learn2perturb.cli.subject import read_run
from learn2perturb.diagnosis import Diagnosis, budget
from learn2perturb.evaluation import Comparison
from learn2perturb.runs.loading import load

TINY = dataclasses.replace(
    budget.QUICK, name="quick", images=16, some=8, scorings=2, eot=2, sweep_eot=1, steps=4, unbounded_steps=5,
    samples=3, judge_draws=2, eps_grid=(8 / 255, 128 / 255), draw_curve=(1, 4), step_curve=(2, 4), restarts=2,
    square_queries=5, square_draws=1, slope_images=2, slope_repeats=4, real_queries=8, descent_steps=2,
    descent_directions=2, surrogate_queries=32,
)  # fmt: skip
TRAIN = (
    "train", "--dataset=digits", "--model=digits_cnn", "--recipe=fast", "--engine=plain", "--device=cpu", "--epochs=1",
    "--limit=64", "--batch-size=32", "--monitor=0", "--attack-steps=1", "--eps=.1", "--tensorboard=false",
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diagnose") / "run"
    assert main([*TRAIN, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """A budget of a second, in an empty working folder."""
    monkeypatch.setitem(budget.BUDGETS, "quick", TINY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_is_diagnosed_with_sources_that_are_trained(trained, quick, capsys):
    words = ["diagnose", str(trained), "--quick", "--train-sources", "--figures", "figures"]
    assert main([*words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["eps"] == 0.1
    assert [check["number"] for check in said["checks"]] == list(range(1, 11))
    assert said["checks"][1]["missing"] == []
    assert {path.name for path in (trained / "sources").iterdir()} == {"undefended", "pgd_at", "twin"}
    assert sorted(path.name for path in (quick / "figures").iterdir()) == [
        f"accuracy-against-{axis}.png" for axis in ("draws", "eps", "steps")
    ]
    own = read_run(str(trained))[1]["seed"]
    seeds = {name: read_run(str(trained / "sources" / name))[1]["seed"] for name in ("undefended", "pgd_at", "twin")}
    assert own not in seeds.values()  # a twin of the same seed would be the network itself, no stranger
    first, second = (load(place).conv1.weight for place in (trained, trained / "sources" / "twin"))
    assert not torch.equal(first, second)
    record = Diagnosis.load(said["record"])
    assert (record.verdict, record.seed) == (said["verdict"], 0)
    assert set(record.metadata["sources"]) == {"undefended", "pgd_at", "twin"}
    assert main(["diagnose", str(trained), "--strict", "--source", f"pgd_at={trained / 'sources' / 'pgd_at'}"]) == (
        0 if record.verdict == "trusted" else 1
    )
    said = capsys.readouterr().out
    assert "\n9   the draws are real " in said
    assert "missing: transfer from twin" in said
    assert "diagnosis-test-seed0-2.json" in said


def test_a_claim_decides_what_strict_means(trained, quick, capsys):
    words = ["diagnose", str(trained), "--strict", "--json", "--claim"]
    assert main([*words, "99.9 % under pgd4"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["verdict"] == "refuted"
    assert (said["claim"]["text"], said["claim"]["accuracy"]) == (
        "99.9 % under pgd4 l_inf with 0.1 of 16 images", 0.999
    )  # fmt: skip
    found = said["claim"]["found"]
    assert found["interval"][0] <= found["accuracy"] <= found["interval"][1] < 0.999
    assert found["how"].startswith("PGD(")
    repeat = next(text for text in said["advice"] if "learn2perturb diagnose" in text)
    assert f"diagnose {trained} --quick --claim '99.9 % under pgd4' --seed 0" in repeat
    assert main(shlex.split(repeat.partition("learn2perturb ")[2])) == 0
    assert capsys.readouterr().out.startswith("REFUTED: claimed 99.9 % under pgd4")
    assert main([*words, "1 % with 0.05"]) == 1  # nothing is below it, but 16 images confirm nothing
    said = json.loads(capsys.readouterr().out)
    assert (said["verdict"], said["eps"]) == ("not shown", 0.05)


def test_a_factory_is_diagnosed_and_certified(quick, capsys):
    (quick / "mine_for_diagnose.py").write_text(
        "from learn2perturb import build_model\n"
        "def network():\n    return build_model('digits_cnn', input_shape=(1, 8, 8)).eval()\n"
    )
    assert main(["diagnose", "mine_for_diagnose:network", "--dataset=digits", "--eps=0.1"]) == 0
    assert re.search("\n6 +noise off holds too +does not apply\n", capsys.readouterr().out)
    words = ["certify", "mine_for_diagnose:network", "--dataset=digits", "--sigma=1/4", "--n=50", "--limit=3"]
    assert main([*words, "--json", "--figures", "figures"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["method"], said["sigma"], said["images"]) == ("smoothing", 0.25, 3)
    assert Certification.load(said["record"]).n == 50
    assert (quick / "figures" / "certified-accuracy.png").stat().st_size > 1000


@pytest.mark.parametrize("function", ["predict", "factory"])
def test_a_function_of_arrays_is_diagnosed(function, quick, capsys):
    (quick / "of_arrays.py").write_text(
        "import numpy as np\n"
        "weight = np.random.default_rng(0).normal(size=(64, 10))\n"
        "def predict(images):\n    return (images.reshape(len(images), -1) @ weight).argmax(axis=1)\n"
        "def factory():\n    return predict\n"
    )
    words = ["diagnose", f"of_arrays:{function}", "--black-box", "--dataset=digits", "--queries-per-second=1e6"]
    assert main([*words, "--json"]) == 0
    printed = capsys.readouterr()
    said = json.loads(printed.out)
    assert said["checks"][9]["sentence"] == "The model has no gradients."
    assert "queries of the model" in printed.err
    assert "at 1e+06 a second" in printed.err
    record = Diagnosis.load(said["record"])
    assert record.num_classes == 10
    assert {"--black-box", "--queries-per-second"} <= set(record.metadata["command"])


def test_sources_of_a_foreign_model_are_trained_on_its_data_and_reused(quick, capsys, monkeypatch):
    monkeypatch.setattr(sources, "_EPOCHS", (1, 1))
    monkeypatch.setattr(sources, "_IMAGES", 64)
    (quick / "mine_of_arrays.py").write_text(
        "def predict(images):\n    return images.reshape(len(images), -1)[:, :10]\n"
    )
    words = ["diagnose", "mine_of_arrays:predict", "--black-box", "--dataset=digits", "--train-sources", "--json"]
    assert main([*words, "--eps=0.1"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert set(Diagnosis.load(said["record"]).metadata["sources"]) == {"undefended", "pgd_at"}
    assert said["checks"][1]["missing"] == ["transfer from twin (an independent training of the same defense)"]
    kept = {path: (path / "metrics.jsonl").read_text() for path in (quick / "runs" / "sources").iterdir()}
    assert len(kept) == 2
    assert main([*words, "--eps=0.1"]) == 0
    assert {path: (path / "metrics.jsonl").read_text() for path in kept} == kept
    undefended = next(path for path in kept if "undefended" in path.name)
    assert read_run(str(undefended))[1]["limit"] == 64
    # Another size is another training, and another place is one.
    given = ["--source", f"undefended={undefended}", "--sources-dir", "elsewhere"]
    assert main([*words, "--eps=0.2", *given]) == 0
    assert [path.name.split("-")[1] for path in (quick / "elsewhere").iterdir()] == ["pgd_at"]
    assert not {path.name for path in (quick / "elsewhere").iterdir()} & {path.name for path in kept}


def test_the_noise_of_a_factory_is_switched_off_by_another(quick, capsys):
    (quick / "mine_with_noise.py").write_text(
        "import torch\n"
        "from learn2perturb import build_model\n"
        "def quiet():\n    torch.manual_seed(0)\n"
        "    return build_model('digits_cnn', input_shape=(1, 8, 8)).eval()\n"
        "def noisy():\n    network = quiet()\n"
        "    return lambda x: network(x + 0.1 * torch.randn_like(x))\n"
    )
    words = ["diagnose", "mine_with_noise:noisy", "--dataset=digits", "--eps=0.1", "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["checks"][5]["missing"] == ["the noise-off twin"]
    assert main([*words, "--noise-off", "mine_with_noise:quiet", "--source", "pgd_at=mine_with_noise:quiet"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["checks"][5]["missing"] == []
    assert set(said["checks"][5]["evidence"]) == {"noise off", "transfer", "white-box", "pgd_at"}
    assert said["checks"][8]["notes"] == []


def test_a_run_is_certified_by_its_own_noise(trained, quick, capsys):
    assert main(["certify", str(trained), "--n=20", "--n0=10", "--limit=2", "--out", "c.json"]) == 0
    said = capsys.readouterr().out
    assert "first_noise at 'bn1'" in said
    assert "VACUOUS" in said
    assert main(["certify", str(trained), "--n=20", "--n0=10", "--limit=2", "--out", "c.json"]) == 0  # our own record


def test_two_records_are_compared(trained, quick, capsys):
    for seed in ("0", "1"):
        words = ["evaluate", str(trained), "--limit=20", "--draws=2", "--attacks=fgsm", "--out", f"{seed}.json"]
        assert main([*words, "--seed", seed]) == 0
    capsys.readouterr()
    assert main(["compare", "0.json", "1.json", "--out", "d.json", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [one["first"] for one in said["differences"]][:2] == ["clean", "fgsm 0.1"]
    assert len(Comparison.load("d.json").differences) == 4
    assert main(["compare", "0.json", "1.json", "--pair", "fgsm=clean"]) == 0
    assert "fgsm 0.1 against clean" in capsys.readouterr().out


def test_a_run_folder_stands_for_its_only_evaluation(trained, quick, tmp_path, capsys):
    words = ["evaluate", str(trained), "--limit=20", "--draws=2", "--attacks=none"]
    folder = tmp_path / "run" / "evaluation"
    assert main([*words, "--out", str(folder / "a.json")]) == 0
    (folder / "other.json").write_text("{}")  # no evaluation
    assert main(["compare", str(tmp_path / "run"), str(folder / "a.json")]) == 0
    assert main([*words, "--out", str(folder / "b.json")]) == 0
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "run"), str(folder / "a.json")]) == 2
    assert "holds 2 evaluations; give one" in capsys.readouterr().err
    assert main(["compare", str(tmp_path), str(folder / "a.json")]) == 2
    assert "run: learn2perturb evaluate" in capsys.readouterr().err


BAD = {
    "no such run": (["diagnose", "nowhere"], "give a run folder"),
    "factory without data": (["diagnose", "json:loads"], "give --dataset NAME"),
    "no such module": (["diagnose", "nomodule:f", "--dataset=digits"], "without .py"),
    "no such function": (["diagnose", "json:nothing", "--dataset=digits"], "write module:function"),
    "factory that fails": (["certify", "json:loads", "--dataset=digits"], "called without arguments"),
    "factory of no model": (["certify", "os:getcwd", "--dataset=digits"], "must return the model"),
    "source not NAME=RUN": (["diagnose", "RUN", "--source", "x"], "write --source"),
    "source twice": (["diagnose", "RUN", "--source", "a=b", "--source", "a=c"], "given twice"),
    "quick and full": (["diagnose", "RUN", "--quick", "--full"], "not allowed with"),
    "figures over a file": (["diagnose", "RUN", "--figures", "file.txt"], "give a folder"),
    "record over a file": (["diagnose", "RUN", "--out", "file.txt"], "so that it is not lost"),
    "place of no sources": (["diagnose", "json:loads", "--dataset=digits", "--sources-dir=x"], "go to RUN/sources"),
    "place of a run's sources": (["diagnose", "RUN", "--train-sources", "--sources-dir=x"], "go to RUN/sources"),
    "black box of a run": (["diagnose", "RUN", "--black-box"], "give module:function"),
    "rate of no black box": (["diagnose", "RUN", "--queries-per-second", "5"], "give --black-box too"),
    "rate that is none": (
        ["diagnose", "json:loads", "--dataset=digits", "--black-box", "--queries-per-second=fast"],
        "is not a number",
    ),
    "rate of nothing": (
        ["diagnose", "json:loads", "--dataset=digits", "--black-box", "--queries-per-second=0"],
        "above 0",
    ),
    "black box of no arrays": (["diagnose", "os:getcwd", "--dataset=digits", "--black-box"], "must return the model"),
    "black box that fails": (["diagnose", "json:loads", "--dataset=digits", "--black-box"], "retries are its own"),
    "eps": (["diagnose", "RUN", "--eps", "8"], "write 8/255"),
    "claim of nothing": (["diagnose", "RUN", "--claim", "robust"], "write ACCURACY"),
    "claim of no attack": (["diagnose", "RUN", "--claim", "51 % under pdg20"], "did you mean 'pgd20'"),
    "claim of another eps": (["diagnose", "RUN", "--claim", "51 % with 4/255", "--eps=8/255"], "give one of them"),
    "claim of other images": (["diagnose", "RUN", "--claim", "51 % of 9 images", "--limit=8"], "give one of them"),
    "noise-off of nothing": (["diagnose", "RUN", "--noise-off", "nowhere"], "give a run folder"),
    "sigma": (["certify", "RUN", "--method", "smoothing"], "sigma is None"),
    "method": (["certify", "RUN", "--method", "cohen"], "allowed: auto"),
    "no record": (["compare", "file.txt", "file.txt"], "not valid JSON"),
    "no pair": (["compare", "a", "b", "--pair", "x"], "write --pair"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_is_one_line_that_names_the_fix(case, trained, quick, capsys):
    (quick / "file.txt").write_text("mine")
    words, fix = BAD[case]
    assert main([str(trained) if word == "RUN" else word for word in words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert fix in error
    assert (quick / "file.txt").read_text() == "mine"
