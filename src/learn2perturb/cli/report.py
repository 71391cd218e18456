"""``learn2perturb report``: one HTML page of records and run folders, to open, to believe and to pass on."""

from __future__ import annotations

import argparse
from pathlib import Path

from learn2perturb.cli.options import add_json, print_json, typed
from learn2perturb.cli.saving import SUCCESS
from learn2perturb.errors import CheckpointError, ConfigError, Learn2PerturbError
from learn2perturb.terminal import one_line

DESCRIPTION = (
    "Write one self-contained HTML page: what was claimed, what was found, the verdict, the evidence, how to run it\n"
    "again. It is made of records alone, and asks nothing of any network when it is opened."
)
EXAMPLE = 'learn2perturb report runs/digits --claim "51 % under pgd20" --out page.html'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this verb."""
    add = parser.add_argument
    add(
        "sources", metavar="STUDY|RUN|RECORD", nargs="+",
        help="folders that study has written, or names of studies; run folders or zoo:NAME; records of evaluate, "
        "diagnose, certify",
    )  # fmt: skip
    add("--claim", metavar="TEXT", help="what is claimed, such as '51 %% under pgd20' (default: that of the diagnosis)")
    add("--out", metavar="FILE", default="report.html", help="the page (default report.html)")
    add("--figures", metavar="DIR", help="also write the charts there: SVG, PDF, PNG, one and two columns wide")
    add("--watch", action="store_true", help="serve the page of one STUDY on 127.0.0.1 and refresh it as it runs")
    add("--level", metavar="NAME", help="of the study that is watched (default laptop)")
    add("--store", metavar="DIR", default="runs/store", help="of the study that is watched (default runs/store)")
    add("--port", type=typed("int"), metavar="N", help="where the page is served (default 8765; 0: any that is free)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Write the page; print where it is."""
    if arguments.watch:
        return watch(arguments)
    from learn2perturb.report import report

    sources = [*map(place_of, arguments.sources)]
    path = report(*sources, out=arguments.out, claim=arguments.claim, figures=arguments.figures)
    if arguments.json:
        print_json({"page": str(path), "bytes": path.stat().st_size, "figures": arguments.figures})
        return SUCCESS
    print(f"page: {path}")
    if arguments.figures is not None:
        print(f"figures: {arguments.figures}")
    return SUCCESS


def watch(arguments: argparse.Namespace) -> int:
    """Serve the page of a study until Ctrl-C.

    Raises:
        ConfigError: it is not one study, or the port cannot be had.
    """
    from learn2perturb.experiments.ledger import Ledger
    from learn2perturb.experiments.store import Store
    from learn2perturb.experiments.study_file import read_study
    from learn2perturb.report.watching import PORT, address, server

    if len(arguments.sources) != 1 or arguments.claim or arguments.figures:
        raise ConfigError("--watch takes one study, a YAML file or a name of study --list, and no --claim or --figures")
    port = PORT if arguments.port is None else arguments.port
    if not 0 <= port < 1 << 16:
        raise ConfigError(f"--port {port} is no port; give one of 1024 to 65535, or 0 for any that is free")
    study = read_study(arguments.sources[0], arguments.level)
    with server(Ledger(study, Store(arguments.store)), port) as found:
        print(f"page: {address(found)} (Ctrl-C ends it)", flush=True)
        found.serve_forever()
    return SUCCESS


def page_beside(folder: Path) -> tuple[Path | None, str]:
    """Write the page of a study into its folder; return where it is, or None, and the line that says so."""
    from learn2perturb.report import report

    try:
        path = report(folder, out=folder / "page.html")
    except Learn2PerturbError as error:
        return None, f"no page: {one_line(error)}"
    return path, f"the same as a page: {path}"


def place_of(source: str) -> Path:
    """Return the file or folder that is asked for; the name of a study stands for the folder of its tables.

    Raises:
        ConfigError: there are tables of several levels, or of none.
    """
    path = Path(source)
    if path.exists():
        return path
    from learn2perturb.cli.study import OUT
    from learn2perturb.experiments.study_file import shipped

    found = sorted(folder for folder in Path(OUT).glob("*/") if _study_of(folder) == source)
    if len(found) > 1:
        raise ConfigError(f"study {source} has several tables; give one: {', '.join(map(str, found))}")
    if not found and source in shipped():
        raise ConfigError(f"study {source} has no tables in {OUT} yet; run: learn2perturb study {source}")
    return found[0] if found else path


def _study_of(folder: Path) -> str | None:
    from learn2perturb.experiments.folder import CONTENTS, StudyFolder

    try:
        return StudyFolder.load(folder / CONTENTS).name
    except CheckpointError:
        return None
