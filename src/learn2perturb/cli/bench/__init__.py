"""``learn2perturb bench``: how fast steps, attacks and data are here, beside textbook code and beside the floor."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

from learn2perturb.cli.bench.settings import BenchSettings
from learn2perturb.cli.bench.show import show, title
from learn2perturb.cli.options import add_fields, add_json, print_json
from learn2perturb.values import kinds_of

DESCRIPTION = (
    "Time the training step, attacks or data loading: textbook code (eager float32, whole backward passes in the\n"
    "attack, one noise map a forward pass) and every gear of this package, taken in turn in one process; and the\n"
    "floor, reckoned from FLOPs and bytes and from what this machine is measured to do."
)
EXAMPLE = "learn2perturb bench step --sharing per_batch --rounds 5 --json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this verb."""
    parser.add_argument(
        "what",
        metavar="WHAT",
        help="step (of adversarial training), attack (PGD and EOT-PGD), data (reading) or scale (1, 2, 4 processes)",
    )
    add_json(parser)
    add_fields(parser, BenchSettings, title="what is measured")


def build_settings(arguments: argparse.Namespace) -> BenchSettings:
    """Return the settings given, the rest as suits what is measured.

    Raises:
        ConfigError: a setting is not allowed, or means nothing there.
    """
    known = kinds_of(BenchSettings)
    return BenchSettings.of(arguments.what, {key: value for key, value in vars(arguments).items() if key in known})


def run(arguments: argparse.Namespace) -> int:
    """Measure; print the table, or JSON with one object a gear."""
    settings = build_settings(arguments)
    from learn2perturb.cli.bench.timing import threads
    from learn2perturb.progress import Reporter

    module = importlib.import_module(f"learn2perturb.cli.bench.{arguments.what}")
    with Reporter() as reporter, threads(settings.threads):
        reporter.line(f"timing {title(arguments.what, settings)}")
        measured: dict[str, dict[str, Any]] = module.measure(settings, reporter)
    if arguments.json:
        print_json(measured)
    else:
        show(arguments.what, settings, measured)
    return 0
