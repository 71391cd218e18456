"""``learn2perturb bench``: how fast steps, attacks and data are here, beside a baseline and the roofline."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

from learn2perturb.cli.bench.settings import BenchSettings
from learn2perturb.cli.bench.show import show, title
from learn2perturb.cli.options import add_fields, add_json, print_json
from learn2perturb.values import kinds_of

DESCRIPTION = (
    "Time the training step, attacks or data loading. In turn, in one process: the baseline (eager float32, whole\n"
    "backward passes in the attack, one noise map a forward pass) and every execution mode of this package. Beside\n"
    "them the roofline, estimated from FLOPs, bytes and the measured rates of this machine."
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
    """Measure; print the table, or JSON with one object for each execution mode."""
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
