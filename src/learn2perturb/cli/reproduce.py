"""``learn2perturb reproduce``: a table of the paper on trained runs, the paper's numbers beside ours."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learn2perturb.cli.options import add_config, add_json, print_json, typed
from learn2perturb.cli.subject import add_images, check_subject, is_factory, load_subject
from learn2perturb.errors import ConfigError, Interrupted
from learn2perturb.evaluation.config import EvaluateConfig
from learn2perturb.experiments.facts import PAPER_EOT, of_trained_runs
from learn2perturb.values import guess

if TYPE_CHECKING:
    from learn2perturb.experiments.tables import Trained

DESCRIPTION = (
    "Compute a table of the Learn2Perturb paper on trained runs: table3 (C&W by confidence), table5 (1, 2, 3 pixels),\n"
    "table6 (transfer, all ordered pairs). Cells that are there already are not computed again."
)
EXAMPLE = "learn2perturb reproduce table6 runs/pgd_at runs/learn2perturb --limit 1000"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this verb."""
    add = parser.add_argument
    add("table", metavar="TABLE", help="table3, table5 or table6")
    add("runs", metavar="RUN", nargs="+", help="run folders, .safetensors files, or module:function of your model")
    add(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="another setting of the attack than the paper's, may be repeated: steps=100, generations=10",
    )  # fmt: skip
    add(
        "--eot", type=typed("int"), default=PAPER_EOT, metavar="K",
        help=f"draws that the attacks average (default {PAPER_EOT}: the paper)",
    )  # fmt: skip
    scored = ("draws", "seed", "limit", "batch_size", "engine")
    add_config(parser, EvaluateConfig, title="how it is attacked and scored", only=scored)
    add_images(parser)
    add("--out", metavar="DIR", help="folder of the table and its cells (default runs/reproduced/TABLE)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Compute the table; print it."""
    of_trained_runs(arguments.table)
    settings = _settings(arguments.set)
    for name in arguments.runs:
        check_subject(_of(arguments, name))
    out = Path(arguments.out) if arguments.out else Path("runs/reproduced") / arguments.table
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; give a folder")

    from learn2perturb.experiments.tables import reproduce
    from learn2perturb.records import plain

    runs = [_trained(arguments, name) for name in arguments.runs]
    try:
        table = reproduce(
            arguments.table, runs, out, settings=settings, limit=arguments.limit, draws=arguments.draws,
            eot=arguments.eot, seed=arguments.seed, batch_size=arguments.batch_size, engine=arguments.engine,
        )  # fmt: skip
    except KeyboardInterrupt as stop:
        raise Interrupted.of(stop, f"what is done is in {out}") from None
    if arguments.json:
        print_json({"folder": str(out), **plain(table)})
        return 0
    print(table)
    print(f"table: {out / arguments.table}.md, records: {out}")
    return 0


def _settings(items: list[str]) -> dict[str, Any]:
    """Return the settings of ``--set``.

    Raises:
        ConfigError: one is not written as KEY=VALUE.
    """
    found: dict[str, Any] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key.isidentifier() or not value:
            raise ConfigError(f"--set {item!r} is no KEY=VALUE; write --set steps=100")
        found[key] = guess(value)
    return found


def _of(arguments: argparse.Namespace, name: str) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(arguments), "run": name})


def _trained(arguments: argparse.Namespace, name: str) -> Trained:
    from learn2perturb.experiments.tables import Trained
    from learn2perturb.runs.loading import locate

    subject = load_subject(_of(arguments, name))
    identity = "" if is_factory(name) else hashlib.sha256(locate(name).read_bytes()).hexdigest()
    defense, network = (str(subject.config.get(key) or "") for key in ("defense", "model"))
    return Trained(name, defense, network, subject.model, subject.data, subject.eps, identity)
