"""The wheel: built, installed where nothing of the repository can be seen, and used from there."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import sysconfig
import zipfile

import pytest

from learn2perturb import zoo

ROOT = pathlib.Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("wheel")
    words = ["wheel", "--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(out)]
    subprocess.run([sys.executable, "-m", "pip", *words, str(ROOT)], check=True, cwd=out)
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def clean(wheel, tmp_path_factory):
    """Return what runs a command of a new environment: the wheel, its dependencies, and nothing of the source."""
    folder = tmp_path_factory.mktemp("clean")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], check=True)
    site = next((folder / "env").glob("lib/python*/site-packages"))
    install = ["install", "--no-deps", "--quiet", "--prefix", str(folder / "env"), "--ignore-installed", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    # The dependencies; .pth files in there, such as that of an editable installation, are not followed from here.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*words: str) -> str:
        command = [str(folder / "env" / "bin" / words[0]), *words[1:]]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_the_wheel_holds_the_package_with_its_data_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"learn2perturb"}
    wanted = {"py.typed", "training/recipes/paper.yaml", "experiments/studies/table1.yaml"}
    assert {f"learn2perturb/{name}" for name in wanted} <= set(names)
    for name in zoo.names():
        parts = {f"learn2perturb/zoo/{name}/{part}" for part in (zoo.WEIGHTS, "card.md", "config.yaml")}
        assert parts <= set(names)
        assert any(part.startswith(f"learn2perturb/zoo/{name}/evaluation/") for part in names)
    sources = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src" / "learn2perturb").rglob("*.py")}
    assert sources <= set(names)


def test_the_installed_package_works_without_the_repository(clean):
    place = clean("python", "-c", "import learn2perturb; print(learn2perturb.__file__)").strip()
    assert "/env/lib/" in place
    assert clean("learn2perturb", "--version") == clean("l2p", "--version")
    assert "paper" in clean("learn2perturb", "list", "recipes")
    settings = json.loads(clean("learn2perturb", "train", "--recipe=paper", "--print-config", "--json"))
    assert settings["epochs"] == 350
    assert "table1" in clean("learn2perturb", "study", "--list")
    network = "l2p.load('zoo:learn2perturb-resnet20-cifar10-e40')"
    code = f"import learn2perturb as l2p; print(len(l2p.noise_sites({network})))"
    assert int(clean("python", "-c", code)) == 10


def test_a_run_is_trained_judged_and_shown(clean):
    clean(
        "learn2perturb", "train", "--dataset=digits", "--model=digits_cnn", "--recipe=fast", "--epochs=1", "--limit=64",
        "--monitor=0", "--device=cpu", "--engine=plain", "--out=run",
    )  # fmt: skip
    clean("learn2perturb", "evaluate", "run", "--attacks=fgsm", "--limit=20")
    assert "page.html" in clean("learn2perturb", "report", "run", "--out=page.html")
