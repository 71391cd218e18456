"""``learn2perturb report``: one HTML page of records and run folders, to open, to believe and to pass on."""

from __future__ import annotations

import argparse

from learn2perturb.cli.options import add_json, print_json
from learn2perturb.cli.saving import SUCCESS

DESCRIPTION = (
    "Write one self-contained HTML page: what was claimed, what was found, the verdict, the evidence, how to run it\n"
    "again. It is made of records alone, and asks nothing of any network when it is opened."
)
EXAMPLE = 'learn2perturb report runs/digits --claim "51 % under pgd20" --out page.html'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this verb."""
    add = parser.add_argument
    add(
        "sources", metavar="RUN|RECORD", nargs="+",
        help="run folders (their settings, metrics and records), or records of evaluate, diagnose and certify",
    )  # fmt: skip
    add("--claim", metavar="TEXT", help="what is claimed, such as '51 %% under pgd20' (default: that of the diagnosis)")
    add("--out", metavar="FILE", default="report.html", help="the page (default report.html)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Write the page; print where it is."""
    from learn2perturb.report import report

    path = report(*arguments.sources, out=arguments.out, claim=arguments.claim)
    if arguments.json:
        print_json({"page": str(path), "bytes": path.stat().st_size})
    else:
        print(f"page: {path}")
    return SUCCESS
