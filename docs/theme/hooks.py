"""What the site adds to the pages of docs/: files of the repository that pages link to, as pages of their own.

On disk and in a code forge a link such as ``../examples/own_attack.py`` leads to the file. The site has no such file,
so every file that is linked to becomes a page under ``code/``, and links are turned there.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
# Pages of the root that have a place in the navigation.
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "README.md": "index.md"}
EXAMPLES, NOTEBOOK = "examples.md", "first-steps.md"
_LINK = re.compile(r"\]\(([^)\s#]+)(#[^)\s]*)?\)")
# A block without a language that begins with a command.
_COMMANDS = re.compile(r"^```\n(?=(?:learn2perturb|l2p|make|pip|python|torchrun|git) )", re.MULTILINE)
# What is read as one word: an option in code; a number with its interval in a table.
_OPTION = re.compile(r"(<code>)([^<]*)(</code>)")
_BLOCK = re.compile(r'(<div class="language-(?:console|bash) [^>]*>)(.*?)(</pre>)', re.DOTALL)
_INTERVAL = re.compile(r"[+-]?\d[\d.]* (?:%|points)? ?\[[+-]?[\d.]+, [+-]?[\d.]+\]")
_CELL = re.compile(r"(<td[^>]*>)(.*?)(</td>)", re.DOTALL)
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".sh": "bash"}


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages that are made from files outside of docs/."""
    sources = {file.src_uri: Path(file.abs_src_path) for file in files if file.src_uri.endswith(".md")}
    texts = {uri: path.read_text(encoding="utf-8") for uri, path in sources.items()}
    added = {name: (ROOT / source).read_text(encoding="utf-8") for source, name in PAGES.items() if name not in texts}
    added[EXAMPLES], added[NOTEBOOK] = _examples(), _notebook(ROOT / "examples" / "first_steps.ipynb")
    for uri, text in {**texts, **added}.items():
        base = "" if uri in added and uri != EXAMPLES else "docs"
        for link, _ in _LINK.findall(text):
            path = _within(base, link)
            if path is not None and path not in PAGES and (ROOT / path).is_file() and not path.startswith("docs/"):
                added[_page_of(path)] = _code(path)
    for name, text in added.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Turn links to files outside of docs/ to the pages made of them."""
    uri = page.file.src_uri
    base = "" if uri in PAGES.values() and uri != "index.md" else "docs"
    here = posixpath.dirname(uri)

    def turned(found: re.Match[str]) -> str:
        path = _within(base, found[1])
        if path is None:
            return found[0]
        if path.startswith("docs/"):
            target = path.removeprefix("docs/")
        elif path in PAGES:
            target = PAGES[path]
        elif (ROOT / path).is_file():
            target = _page_of(path)
        else:
            return found[0]
        return f"]({posixpath.relpath(target, here or '.')}{found[2] or ''})"

    return markdown if uri.startswith("code/") else _LINK.sub(turned, _COMMANDS.sub("```console\n", markdown))


def on_page_content(html: str, *, page: Any, config: Any, files: Files) -> str:
    """Keep on one line what is read as one: ``--option`` in code, a number and its interval in a table."""

    def whole(found: re.Match[str]) -> str:
        return f'<span class="one">{found[0]}</span>'

    def code(found: re.Match[str]) -> str:
        return found[1] + re.sub(r"(?<!\S)--?[a-zA-Z][\w-]*", whole, found[2]) + found[3]

    def cell(found: re.Match[str]) -> str:
        return found[1] + _INTERVAL.sub(whole, found[2]) + found[3]

    return _CELL.sub(cell, _BLOCK.sub(code, _OPTION.sub(code, html)))


def _within(base: str, link: str) -> str | None:
    """Return a link as a path from the root; None for one that leads out of the repository."""
    if "://" in link or link.startswith(("mailto:", "/")):
        return None
    path = posixpath.normpath(posixpath.join(base, link))
    return None if path.startswith("..") else path


def _page_of(path: str) -> str:
    return f"code/{path}.md"


def _code(path: str) -> str:
    text = (ROOT / path).read_text(encoding="utf-8").rstrip()
    language = _LANGUAGES.get(Path(path).suffix, "text")
    return f"---\nsearch:\n  exclude: true\n---\n# {path}\n\n````{language}\n{text}\n````\n"


def _examples() -> str:
    """Return the page that shows every file of examples/, each with the first sentence of what it says of itself."""
    lines = ["# Examples", "", "Each is one file, and is run by the tests.", ""]
    for path in sorted((ROOT / "examples").iterdir()):
        if path.suffix == ".ipynb":
            lines += [f"- [{path.name}]({NOTEBOOK}): a notebook of first steps."]
        elif path.suffix in _LANGUAGES:
            text = path.read_text(encoding="utf-8")
            first = text.lstrip('"# ').splitlines()[0]
            lines += [f"- [{path.name}](../examples/{path.name}): {first}"]
    return "\n".join(lines) + "\n"


def _notebook(path: Path) -> str:
    """Return a notebook as a page: its text, and its code as blocks."""
    parts = [f"*As a notebook: `{path.relative_to(ROOT)}`. It is run by the tests.*"]
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"]).strip()
        parts.append(f"```python\n{text}\n```" if cell["cell_type"] == "code" else text)
    parts[0], parts[1] = parts[1], parts[0]
    return "\n\n".join(parts) + "\n"
