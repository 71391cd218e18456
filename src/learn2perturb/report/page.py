"""``report``: one self-contained HTML file, which asks nothing of any network."""

from __future__ import annotations

import json
import os
from functools import lru_cache
from importlib import resources
from pathlib import Path

from learn2perturb.errors import ConfigError, MissingDependencyError
from learn2perturb.records import atomic_write
from learn2perturb.report.content import as_data, contents
from learn2perturb.report.sources import gather

MOST_BYTES = 4 << 20


def report(
    *sources: str | os.PathLike[str], out: str | os.PathLike[str] = "report.html", claim: str | None = None
) -> Path:
    """Write a page of records and run folders to ``out``, and return its path.

    Args:
        sources: records of evaluate, diagnose and certify (JSON), and run folders.
        out: the HTML file.
        claim: what is claimed, such as ``"51 % under pgd20"``; a diagnosis that was made of one brings its own.

    Raises:
        ConfigError: there is nothing to show, or the claim does not go with the records.
        CheckpointError: a record is damaged, or the page cannot be written.
    """
    text = page(*sources, claim=claim)
    if len(text.encode()) > MOST_BYTES:
        raise ConfigError(
            f"the page has {len(text.encode()) >> 20} MiB, more than {MOST_BYTES >> 20}; give fewer records"
        )
    return atomic_write(Path(out), text)


def page(*sources: str | os.PathLike[str], claim: str | None = None) -> str:
    """Return the HTML text of the page that :func:`report` writes."""
    import jinja2

    found = contents(gather(sources), claim)
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(_part("page.html"))
    # "<" cannot end the element that holds the data.
    data = json.dumps(as_data(found), allow_nan=False).replace("<", "\\u003c")
    return template.render(
        page=found, data=data, style=_part("page.css"), script=_part("page.js"), library=_library(),
        columns=COLUMNS,
    )  # fmt: skip


# Field of a row, its heading, whether it is a number.
COLUMNS = (
    ("model", "model", False), ("attack", "attack", False), ("eps", "eps", False), ("noise", "noise", False),
    ("predictor", "predictor", False), ("accuracy", "accuracy, %", True), ("interval", "95 % interval", True),
    ("worst", "worst of 10", True), ("n", "n", True), ("draws", "draws", True),
)  # fmt: skip


def _part(name: str) -> str:
    return (resources.files("learn2perturb.report") / "parts" / name).read_text(encoding="utf-8")


@lru_cache
def _library() -> str:
    """Return Vega-Lite with all that it needs, as one script.

    Raises:
        MissingDependencyError: vl-convert is not installed.
    """
    try:
        import vl_convert
    except ImportError:
        raise MissingDependencyError(
            "the charts of a page need vl-convert-python; install it: pip install 'learn2perturb[report]'"
        ) from None
    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")).replace("</script", "<\\/script")
