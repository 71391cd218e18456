"""Parts of the user's own, by ``--import`` and by entry points: found, used, told in records, refused in one line."""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import sys
import textwrap

import pytest
import yaml

import learn2perturb as l2p
from learn2perturb import plugins
from learn2perturb.cli.main import main
from learn2perturb.diagnosis.checks import CHECKS, register_declared
from learn2perturb.errors import CheckpointError, ConfigError
from learn2perturb.evaluation import Evaluation
from learn2perturb.experiments.tasks import perform
from learn2perturb.naming import made_by
from learn2perturb.registry import ATTACKS, DATASETS, DEFENSES, MODELS, NOISES, REGISTRIES

EXAMPLES = pathlib.Path(__file__).resolve().parents[1] / "examples"
TRAIN = [
    "train", "--recipe=fast", "--epochs=0", "--limit=64", "--batch-size=32", "--monitor=0", "--tensorboard=false",
    "--device=cpu", "--engine=plain", "--model=digits_cnn",
]  # fmt: skip
CHECK = '''
from learn2perturb.diagnosis.checks import CheckSpec, register_check

def whole(bench):
    """11: the images are in [0, 1]."""

SPEC = CheckSpec(number=11, name="images are whole", question="are they?", run=whole)
'''
# kind -> (registry, group, a module, what in it, what it is called, the verb's word)
PARTS = {
    "defense": (DEFENSES, "defenses", '''
        from dataclasses import dataclass
        from typing import ClassVar
        from learn2perturb.defenses import Defense
        @dataclass(frozen=True, kw_only=True)
        class Mine(Defense):
            """Plain training by another name."""
            stochastic: ClassVar[bool] = False
            strength: float = 1.0
        '''),
    "attack": (ATTACKS, "attacks", '''
        from dataclasses import dataclass
        from learn2perturb.attacks import Attack
        @dataclass(frozen=True)
        class Mine(Attack):
            """All pixels up."""
            def perturb(self, query, x, y):
                return x + self.eps
        '''),
    "noise": (NOISES, "noise", '''
        from learn2perturb.noise.base import NoiseModule
        class Mine(NoiseModule):
            """A fixed size."""
            settings = ()
            def noisy(self, value, eps):
                return value + 0.1 * eps
            def scale(self):
                return "size", self.scale_shape
        '''),
    "data set": (DATASETS, "datasets", '''
        from learn2perturb.data.digits import load_digits
        def Mine(split="train", *, root=None, download=False):
            """Digits by another name."""
            return load_digits(split)
        '''),
    "network": (MODELS, "models", '''
        from learn2perturb.models.digits_cnn import digits_cnn
        def Mine(num_classes=10, input_shape=(1, 8, 8), normalization=None):
            """The small network by another name."""
            return digits_cnn(num_classes=num_classes, input_shape=input_shape, normalization=normalization)
        Mine.sites = ("bn1",)
        '''),
}  # fmt: skip
LIST = {"defense": "defenses", "attack": "attacks", "noise": "noises", "data set": "datasets", "network": "models"}


@pytest.fixture(autouse=True)
def own(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(plugins.VARIABLE, raising=False)
    return tmp_path


def installed(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, group: str, name: str, target: str) -> None:
    """Make a package look installed that declares one entry point."""
    about = folder / "mine_of_others-1.5.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mine-of-others\nVersion: 1.5\n")
    (about / "entry_points.txt").write_text(f"[learn2perturb.{group}]\n{name} = {target}\n")
    (about / "top_level.txt").write_text(f"{target.partition(':')[0]}\n")
    monkeypatch.syspath_prepend(folder)
    plugins._package_of.cache_clear()
    for registry in REGISTRIES:
        registry._looked = False


def test_every_registry_has_a_group_and_is_tried():
    assert {registry.kind for registry in REGISTRIES} == set(PARTS)
    assert {registry.group for registry in REGISTRIES} == {group for _, group, _ in PARTS.values()}


@pytest.mark.parametrize("kind", PARTS)
def test_a_declared_part_is_listed_and_imported_only_when_used(kind, own, monkeypatch, capsys):
    registry, group, text = PARTS[kind]
    (own / f"declared_{group}.py").write_text(textwrap.dedent(text))
    installed(own, monkeypatch, group, "mine", f"declared_{group}:Mine")
    assert "mine" in registry.names()
    assert f"declared_{group}" not in sys.modules
    assert main(["train", "--help"]) == 0
    assert f"{kind} mine (mine-of-others 1.5)" in capsys.readouterr().out
    assert main(["list", LIST[kind], "mine"]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[0].startswith(f"mine: {registry.entry('mine').load().__doc__.splitlines()[0].rstrip('.')}")
    assert "[from mine-of-others 1.5]" in said
    assert main(["list", LIST[kind], "mine", "--json"]) == 0
    source = json.loads(capsys.readouterr().out)[0]["source"]
    assert source["file"] == f"declared_{group}.py"
    assert len(source["sha256"]) == 64


def test_declared_parts_train_and_attack_and_are_in_the_records(own, monkeypatch, capsys):
    for kind in ("defense", "network", "data set"):
        registry, group, text = PARTS[kind]
        (own / f"declared_{group}.py").write_text(textwrap.dedent(text))
        registry.register("mine", f"declared_{group}:Mine", "by hand")
    monkeypatch.syspath_prepend(own)
    train = [word for word in TRAIN if not word.startswith("--model")]
    assert main([*train, "--defense=mine", "--model=mine", "--dataset=mine", "--options.strength=2", "--out=run"]) == 0
    header = json.loads(_header(own / "run"))
    assert {(part["kind"], part["name"], part["file"]) for part in header["parts"]} == {
        ("defense", "mine", "declared_defenses.py"), ("network", "mine", "declared_models.py"),
        ("data set", "mine", "declared_datasets.py"),
    }  # fmt: skip
    assert yaml.safe_load((own / "run" / "config.yaml").read_text())["options"] == {"strength": 2.0}


def _header(run: pathlib.Path) -> str:
    from safetensors import safe_open

    from learn2perturb.runs.files import locate

    with safe_open(str(locate(run)), framework="pt") as file:
        return file.metadata()["learn2perturb"]


def test_import_brings_parts_to_every_verb_and_into_records(own, capsys):
    attack, defense = (f"--import={EXAMPLES / name}.py" for name in ("own_attack", "own_defense"))
    assert main(["list", "attacks", "momentum", attack]) == 0
    assert "momentum: PGD along a decaying sum of gradients  [from own_attack]" in capsys.readouterr().out
    assert main(["evaluate", "--help", attack]) == 0
    assert "parts of your own:\n  attack momentum (own_attack)" in capsys.readouterr().out
    assert main([defense, *TRAIN, "--dataset=digits", "--defense=soft_at", "--attack-steps=1", "--out=run"]) == 0
    assert json.loads(_header(own / "run"))["parts"][0]["module"] == "own_defense"
    evaluate = ["evaluate", "run", "--attack=momentum:eps=0.1,steps=2,mu=0.5", "--limit=10", "--out=record.json"]
    assert main([*evaluate, attack]) == 0
    found = Evaluation.load("record.json").metadata["parts"]
    assert [(part["kind"], part["name"], part["module"]) for part in found] == [("attack", "Momentum", "own_attack")]
    assert plugins.VARIABLE not in os.environ
    assert str(own) not in sys.path


def test_records_of_our_own_parts_say_nothing():
    model = l2p.build_model("digits_cnn", input_shape=(1, 8, 8))
    data = l2p.load_data("digits", "test", limit=10)
    assert "parts" not in l2p.evaluate(model, data, {"fgsm": l2p.attacks.FGSM(0.1)}).metadata


def test_a_run_with_noise_of_ones_own_says_what_to_import(own, capsys):
    module = f"--import={EXAMPLES / 'own_noise.py'}"
    assert main(["list", "noises", "own/affine", module]) == 0
    model = l2p.build_model("digits_cnn", input_shape=(1, 8, 8))
    from learn2perturb.evaluation.own_parts import own_parts
    from learn2perturb.noise import add_noise
    from learn2perturb.runs.checkpoint import model_bytes

    add_noise(model, "own/affine", input_shape=(1, 8, 8), granularity="layer")
    (own / "mine.safetensors").write_bytes(model_bytes(model, own_parts(model)))
    assert l2p.load("mine.safetensors") is not None
    NOISES._entries.pop("own/affine")
    with pytest.raises(CheckpointError, match=r"'own/affine', .* own_noise\.py; import it first: --import own_noise"):
        l2p.load("mine.safetensors")


def test_a_study_and_its_workers_know_the_parts(own, monkeypatch, capsys):
    text = (EXAMPLES / "own_study.yaml").read_text()
    study = yaml.safe_load(text)
    study["train"] |= {"epochs": 0, "limit": 32, "attack_steps": 1, "monitor": 0, "tensorboard": False}
    study |= {"seeds": [1], "runs": {"trained": {"defense": ["soft_at"]}}, "evaluate": {"limit": 10}}
    study["cells"] = {"momentum": {"attack": "momentum:steps=2,mu=0.75"}}
    study["views"] = {"table": {"rows": ["defense"], "columns": ["cell"]}}
    (own / "study.yaml").write_text(yaml.safe_dump(study))
    imports = [f"--import={EXAMPLES / name}.py" for name in ("own_defense", "own_attack")]
    assert main(["study", "study.yaml", "--store=store", *imports]) == 0
    assert "soft_at" in capsys.readouterr().out


def test_a_worker_imports_what_the_study_was_started_with(own, monkeypatch):
    (own / "for_workers.py").write_text("from learn2perturb.registry import ATTACKS\nHERE = True\n")
    monkeypatch.setenv(plugins.VARIABLE, "for_workers")
    with pytest.raises(AttributeError):  # no task: it stops after the imports
        perform(own / "store", None)
    assert sys.modules["for_workers"].HERE


def test_a_declared_check_is_told_and_a_broken_one_left_out(own, monkeypatch, capsys):
    (own / "declared_check.py").write_text(CHECK)
    installed(own, monkeypatch, "checks", "whole", "declared_check:SPEC")
    register_declared()
    assert main(["list", "checks"]) == 0
    assert "images are whole: are they?" in capsys.readouterr().out
    CHECKS.pop(11)
    (own / "declared_check.py").unlink()
    sys.modules.pop("declared_check")
    importlib.invalidate_caches()
    with pytest.warns(UserWarning, match="check 'whole' of mine-of-others 1.5 is left out"):
        register_declared()


def test_a_declared_name_that_is_taken_is_left_out(own, monkeypatch):
    (own / "taken.py").write_text("")
    installed(own, monkeypatch, "attacks", "pgd", "taken:PGD")
    with pytest.warns(UserWarning, match="attack 'pgd' of mine-of-others 1.5 is left out: the name is taken"):
        assert ATTACKS.names("pgd") == ["pgd"]
    assert ATTACKS.entry("pgd").module == "learn2perturb.attacks.pgd"


def test_a_declared_part_that_cannot_be_imported_is_refused_in_one_line(own, monkeypatch):
    installed(own, monkeypatch, "attacks", "broken", "no_such_module:Attack")
    with pytest.raises(ConfigError, match=r"'broken' cannot be imported .* correct mine-of-others 1\.5"):
        ATTACKS.entry("broken").load()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["list", "attacks", "--import"], "--import needs a module"),
        (["list", "attacks", "--import=no_such_module"], "run from the folder of the file"),
        (["list", "attacks", "--import=none.py"], "there is no file"),
        (["list", "attacks", "--import=fails.py"], "failed: ZeroDivisionError: division by zero"),
        (["list", "attacks", "--import=takes.py"], "attack 'pgd' is registered already"),
        (["list", "attacks", "--import=json.py"], "a module 'json' is imported already"),
        (["list", "attacks", "--import=a-b.py"], "no name of a module"),
        (["train", "--defense=momentun"], "one of your own: --import its module"),
    ],
)
def test_what_cannot_be_imported_is_one_line(words, said, own, capsys):
    (own / "fails.py").write_text("1 / 0\n")
    (own / "json.py").write_text("")
    (own / "takes.py").write_text(
        "from learn2perturb.registry import ATTACKS\nATTACKS.register('pgd', 'takes:PGD', 'another')\n"
    )
    assert main(words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1


def test_a_part_may_be_registered_again_from_the_same_place_only():
    ATTACKS.register("twice", "my.place:One", "first")
    assert ATTACKS.register("twice", "my.place:One", "second").summary == "second"
    with pytest.raises(ConfigError, match="'twice' is registered already"):
        ATTACKS.register("twice", "other.place:One", "third")


@pytest.mark.parametrize(
    "how", [lambda: made_by("puts_right:build"), lambda: plugins.import_all(["puts_right"])], ids=["network", "part"]
)
def test_a_module_of_the_working_folder_may_put_the_path_right_by_itself(how, tmp_path, monkeypatch):
    (tmp_path / "puts_right.py").write_text("import os, sys\nsys.path.remove(os.getcwd())\nbuild = lambda: abs\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = list(sys.path)
    monkeypatch.delitem(sys.modules, "puts_right", raising=False)
    how()
    assert sys.path == before
