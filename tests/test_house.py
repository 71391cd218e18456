"""The house rules: public names, docstrings, lazy imports, registries, the tree in the readme."""

from __future__ import annotations

import ast
import importlib
import inspect
import pathlib
import subprocess
import sys
import tomllib

import pytest

import learn2perturb
from learn2perturb import registry

ROOT = pathlib.Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "learn2perturb"
MODULES = sorted(SOURCE.rglob("*.py"))
PUBLIC = [name for name in learn2perturb.__all__ if name != "__version__"]
REGISTRIES = (registry.MODELS, registry.DATASETS, registry.ATTACKS, registry.DEFENSES, registry.NOISES)
ENTRIES = [(kind, entry) for kind in REGISTRIES for entry in kind]
# DESIGN of the public face: a name is added here on purpose, with its documentation.
EXPECTED_NAMES = {
    *("build_model", "list_models", "load_data"),
    *("perturb", "noise_sites", "noise_parameters", "remove_noise", "noise_disabled", "fixed_noise"),
    *("attacks", "list_attacks", "list_defenses"),
    *("train", "TrainConfig", "load", "evaluate", "diagnose", "certify", "black_box", "report", "study"),
    *("EvaluateConfig", "DiagnoseConfig", "CertifyConfig"),
    *("errors", "__version__"),
}


def module_name(path: pathlib.Path) -> str:
    """Return the dotted name of a source file."""
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def python(code: str) -> str:
    """Run ``code`` in a fresh interpreter and return what it prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- public names


@pytest.mark.parametrize("package", [path.parent.name for path in SOURCE.glob("*/__init__.py")])
def test_every_name_that_a_package_promises_is_there(package):
    home = importlib.import_module(f"learn2perturb.{package}")
    for name in getattr(home, "__all__", ()):
        assert getattr(home, name, None) is not None, name


def test_the_public_names_are_the_ones_decided():
    assert set(learn2perturb.__all__) == EXPECTED_NAMES
    assert len(learn2perturb.__all__) == len(EXPECTED_NAMES)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_importable_and_documented(name):
    value = getattr(learn2perturb, name)
    assert inspect.getdoc(value), f"learn2perturb.{name} has no docstring"
    assert name in dir(learn2perturb)
    assert not inspect.ismodule(value) or value.__name__ == f"learn2perturb.{name}"


def test_a_misspelt_public_name_is_an_attribute_error_that_helps():
    with pytest.raises(AttributeError, match="did you mean 'perturb'"):
        _ = learn2perturb.pertub


def test_star_import_gives_the_public_names():
    code = "from learn2perturb import *; import learn2perturb as l; print([n for n in l.__all__ if n not in globals()])"
    assert python(code) == "[]"


def test_the_version_is_the_one_of_the_installed_package():
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert metadata["project"]["dynamic"] == ["version"]  # one place says it: __init__.py
    assert f"## [{learn2perturb.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


# --- what import costs


def test_importing_the_package_leaves_torch_unimported():
    assert python("import sys, learn2perturb; dir(learn2perturb); print('torch' in sys.modules)") == "False"


@pytest.mark.parametrize("name", ["errors", "registry", "records"])
def test_the_lowest_layer_knows_no_torch(name):
    assert python(f"import sys, learn2perturb.{name}; print('torch' in sys.modules)") == "False"


def test_the_help_of_the_command_line_does_not_wait_for_torch():
    code = (
        "import sys\n"
        "from learn2perturb.cli.main import main\n"
        "sys.argv = ['learn2perturb', '--help']\n"
        "try:\n    code = main()\nexcept SystemExit as stop:\n    code = stop.code\n"
        "print('\\n' + repr((code or 0, 'torch' in sys.modules)))"
    )
    assert python(code).splitlines()[-1] == "(0, False)"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_every_module_imports_alone(path):
    importlib.import_module(module_name(path))


# --- documentation


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_every_module_has_a_docstring_and_postponed_annotations(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{module_name(path)} has no docstring"
    if any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in tree.body):
        assert "from __future__ import annotations" in path.read_text(encoding="utf-8")


def test_every_source_folder_is_a_package():
    folders = {path.parent for path in MODULES}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []
    assert (SOURCE / "py.typed").is_file()


def test_the_tree_of_contributing_names_every_source_folder():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    folders = sorted({path.parent.name for path in MODULES if path.parent != SOURCE})
    assert [name for name in folders if f"{name}/" not in text] == []


# --- registries


def test_every_registry_has_entries_and_no_empty_summary():
    assert len(ENTRIES) == sum(len(list(kind)) for kind in REGISTRIES) >= 17
    assert all(entry.summary for _, entry in ENTRIES)


@pytest.mark.parametrize(("kind", "entry"), ENTRIES, ids=[f"{kind.kind}-{entry.name}" for kind, entry in ENTRIES])
def test_every_registered_name_resolves_to_something_documented(kind, entry):
    loaded = entry.load()
    assert callable(loaded)
    assert inspect.getdoc(loaded)
    assert kind.entry(entry.name) is entry


# --- the repository


def test_no_file_names_a_place_that_only_one_machine_has():
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listing.stdout.split("\0") if name]
    assert ROOT / "pyproject.toml" in files
    # In two pieces, or this file would be found too.
    forbidden = [(a + b).encode() for a, b in (("/", "work/"), ("/", "root/"), ("/.", "library"), (".", "library/"))]
    found = [
        f"{path.relative_to(ROOT)}: {word.decode()}"
        for path in files
        if path.is_file()
        for word in forbidden
        if word in path.read_bytes()
    ]
    assert found == []


def test_dependencies_cover_what_the_source_imports():
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = list(metadata["dependencies"])
    for extra in ("hub", "cluster", "report", "sweep"):
        named += metadata["optional-dependencies"][extra]
    declared = {item.split(">")[0].split("[")[0].lower().replace("-", "_") for item in named}
    modules_of = {"scikit_learn": "sklearn", "vl_convert_python": "vl_convert", "pyyaml": "yaml", "pillow": "PIL"}
    allowed = {modules_of.get(name, name) for name in declared} | {"learn2perturb"} | set(sys.stdlib_module_names)
    imported = {}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            imported.update({name.split(".")[0]: module_name(path) for name in names})
    assert {name: where for name, where in imported.items() if name not in allowed} == {}
