"""The readme and the pages of docs/: their code runs, their commands parse, their links lead somewhere."""

from __future__ import annotations

import contextlib
import importlib
import io
import pathlib
import re
import shlex
import sys

import pytest

from learn2perturb.defenses.settings import Settings
from learn2perturb.plugins import import_all, without_imports
from learn2perturb.registry import ATTACKS, DATASETS, DEFENSES, MODELS, REGISTRIES
from learn2perturb.training.config import load_recipe

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Written from measurements, not against the code: their blocks are records of what was run.
RECORDS = ("results.md", "log.md")


def blocks(page: pathlib.Path, language: str) -> list[str]:
    """Return the fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


WITH_CODE = [page for page in PAGES if page.name not in RECORDS and blocks(page, "python")]
COMMANDS = [
    line
    for page in PAGES
    if page.name not in RECORDS
    for block in blocks(page, "console")
    for line in block.splitlines()
    if "learn2perturb " in line
]


def test_there_is_code_to_run():
    names = {page.name for page in WITH_CODE}
    assert names >= {"README.md", "concepts.md", "attacks.md", "defenses.md", "data.md", "evaluation.md", "training.md"}
    assert sum(len(blocks(page, "python")) for page in WITH_CODE) >= 15
    assert len(COMMANDS) >= 15


@pytest.mark.parametrize("page", WITH_CODE, ids=[page.name for page in WITH_CODE])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DEFENSES, "_entries", dict(DEFENSES._entries))  # a page may register one of its own
    code = "\n".join(blocks(page, "python"))
    # As a module of its own, so that what the page registers as "module:name" can be imported.
    (tmp_path / f"page_{page.stem}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        importlib.import_module(f"page_{page.stem}")
    assert "nan" not in printed.getvalue()


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_the_docs_parses(line, monkeypatch):
    from learn2perturb.cli.main import add_common
    from learn2perturb.cli.options import Parser

    monkeypatch.chdir(ROOT)
    for registry in REGISTRIES:  # a command may import parts of its own
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    modules, words = without_imports(shlex.split(line.partition("learn2perturb ")[2]))
    for module in modules:
        monkeypatch.delitem(sys.modules, pathlib.Path(module).stem, raising=False)
    import_all(modules)
    verb = importlib.import_module(f"learn2perturb.cli.{words[0]}")
    parser = Parser(prog=words[0])
    verb.add_arguments(parser)
    add_common(parser, planned=hasattr(verb, "plan"))
    arguments = parser.parse(words[1:])
    if words[0] == "train" and not arguments.config:
        verb.build_config(arguments).resolve()
    if words[0] == "evaluate":
        from learn2perturb.attacks.spec import build_attacks

        build_attacks(verb.attack_specs(arguments))


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_every_registered_name_is_in_the_docs():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES) + " resnet32 resnet44 resnet56"
    text = text.replace("CIFAR ResNet-V1 20", "resnet20_x1.5 resnet20_x2 resnet20_x4").replace("ResNet-18", "resnet18")
    names = [entry.name for kind in (MODELS, DATASETS, DEFENSES, ATTACKS) for entry in kind]
    assert [name for name in names if name.lower() not in text.lower()] == []


def cell(value: object) -> set[str]:
    """Return the ways in which a table may write a value of a recipe."""
    if isinstance(value, bool):
        return {str(value).lower()}
    if isinstance(value, list):
        return {", ".join(map(str, value)) or "none"}
    if isinstance(value, float):
        return {f"{value:g}", f"{value:.0e}".replace("e-0", "e-")}
    return {str(value)}


@pytest.mark.parametrize("recipe", ["paper", "released", "common", "fast", "laptop"])
def test_the_table_of_recipes_is_that_of_the_files(recipe):
    table = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8").splitlines()
    rows = [[part.strip().replace("`", "") for part in line.strip("|").split("|")] for line in table if line[:1] == "|"]
    column = rows[0].index(recipe)
    written = {row[0]: row[column] for row in rows if len(row) > column}
    content = load_recipe(recipe)
    settings = content["settings"]
    assert set(settings) <= set(Settings.__dataclass_fields__)
    special = content["defenses"]["learn2perturb"].get("options", {})
    checked = 0
    for name, value in {**settings, **special}.items():
        row = next((key for key in written if name in re.split(r",\s*", key)), None)
        assert row is not None, f"docs/recipes.md has no row for {name}"
        assert any(form in written[row] for form in cell(value)), f"{name}: {value!r} is not in {written[row]!r}"
        checked += 1
    assert checked == len(settings) + len(special) >= 18
