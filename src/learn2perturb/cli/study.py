"""``learn2perturb study``: any experiment by one file: trained, attacked, tabulated, on one core or a cluster."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learn2perturb.cli.options import add_json, print_json, print_table, typed
from learn2perturb.cli.report import page_beside
from learn2perturb.cli.saving import FAILURE, SUCCESS
from learn2perturb.errors import ConfigError
from learn2perturb.values import guess

if TYPE_CHECKING:
    from learn2perturb.experiments.spec import Study
    from learn2perturb.experiments.studying import Placing, StudyRun
    from learn2perturb.experiments.sweeping import Trials

STORE, OUT = "runs/store", "runs/studies"
DESCRIPTION = (
    "Run a study: a YAML file (or one that comes with the package, see --list) of runs, what is asked of each, and\n"
    "how it is shown. What the store has is never computed again; the same command goes on where it stopped.\n\n"
    "  study merge STORE FROM    add what the store FROM holds\n"
    "  study clean STUDY...      say what no given study needs; with --yes remove it from the store"
)
EXAMPLE = "learn2perturb study demo --level smoke --jobs 2 --minutes 50"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this verb."""
    add = parser.add_argument
    add("words", metavar="STUDY", nargs="*", help="a YAML file, the name of a study of the package; or merge, clean")
    add("--list", action="store_true", help="show the studies that come with the package")
    add("--plan", action="store_true", help="show what will run, what is there, about how long it takes; do nothing")
    add("--show", action="store_true", help="write the tables and figures of what is there; compute nothing")
    add("--yes", action="store_true", help="clean: remove it")
    add_running(parser)


def add_running(parser: argparse.ArgumentParser) -> None:
    """Add the options that say at which level, where and how long a study runs."""
    add = parser.add_argument
    add("--level", metavar="NAME", help="smoke, laptop, paper, or another that the study has (default laptop)")
    add(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="another setting than the file's, may be repeated: train.epochs=3, evaluate.limit=100, seeds=[1]",
    )  # fmt: skip
    add("--store", default=STORE, metavar="DIR", help=f"trained networks and records (default {STORE})")
    add("--out", metavar="DIR", help=f"tables and figures (default {OUT}/NAME)")
    add("--jobs", type=typed("int"), metavar="N", help="tasks at a time; locally processes that divide the cores")
    add("--minutes", type=typed("float"), metavar="M", help="stop at a checkpoint after so many")
    add("--engine", default="local", metavar="NAME", help="local, ray, or slurm (through submitit) (default local)")
    add("--address", metavar="HOST:PORT", help="of a Ray cluster, or auto (default: Ray on this machine)")
    add("--cpus", type=typed("float"), default=1.0, metavar="X", help="cores of a Ray task (default 1)")
    add("--gpus", type=typed("float"), default=0.0, metavar="X", help="cards of a Ray task: 0.25 lets four share one")
    add(
        "--slurm", action="append", default=[], metavar="KEY=VALUE",
        help="a setting of submitit, may be repeated: slurm_partition=gpu, timeout_min=240, slurm_gpus_per_node=1",
    )  # fmt: skip
    add("--device", default="auto", metavar="NAME", help="of every task: auto, cpu, cuda, cuda:1, mps")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Do what is asked for."""
    words = arguments.words
    if arguments.list:
        return _list(arguments.json)
    if words[:1] == ["merge"]:
        return _merge(words[1:])
    if words[:1] == ["clean"]:
        return _clean(words[1:], arguments)
    if len(words) != 1:
        raise ConfigError(f"{len(words)} studies are given; give one, a YAML file or a name of study --list")
    from learn2perturb.experiments.study_file import read_study

    study = read_study(words[0], arguments.level, settings(arguments.set, "--set"))
    if arguments.plan:
        return _plan(study, arguments, placing(arguments))
    return run_study(study, arguments, show=arguments.show)


def run_study(study: Study, arguments: argparse.Namespace, *, show: bool = False) -> int:
    """Run a study, or only show what is there; write and print its tables and figures."""
    from learn2perturb.experiments.ledger import Ledger
    from learn2perturb.experiments.store import Store
    from learn2perturb.experiments.studying import StudyRun
    from learn2perturb.experiments.studying import study as run_it

    where, out = placing(arguments), folder(study, arguments.out)
    if show:
        found = StudyRun(Ledger(study, Store(arguments.store)).results(), {}, 0)
    else:
        found = run_it(
            study, store=arguments.store, placing=where, minutes=arguments.minutes, progress=not arguments.json
        )  # fmt: skip
    return _shown(found, out, arguments)


def settings(items: list[str], option: str) -> dict[str, Any]:
    """Return the settings of a repeated KEY=VALUE.

    Raises:
        ConfigError: one is not written so.
    """
    found: dict[str, Any] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key or not all(part for part in key.split(".")):
            raise ConfigError(f"{option} {item!r} is no KEY=VALUE; write {option} train.epochs=3")
        found[key] = guess(value)
    return found


def placing(arguments: argparse.Namespace) -> Placing:
    """Return where the tasks are done."""
    from learn2perturb.experiments.studying import Placing

    return Placing(
        arguments.engine, arguments.jobs, arguments.device, arguments.address, arguments.cpus, arguments.gpus,
        settings(arguments.slurm, "--slurm"),
    )  # fmt: skip


def folder(study: Study, out: str | None) -> Path:
    """Return where tables and figures go.

    Raises:
        ConfigError: it is a file.
    """
    path = Path(out) if out else Path(OUT) / (study.name if study.level is None else f"{study.name}-{study.level}")
    if path.exists() and not path.is_dir():
        raise ConfigError(f"--out {path} is a file; give a folder")
    return path


def _shown(found: StudyRun, out: Path, arguments: argparse.Namespace) -> int:
    """Write tables and figures; print the tables, and what is missing."""
    from learn2perturb.experiments.rendering import for_terminal
    from learn2perturb.experiments.views import build_views
    from learn2perturb.experiments.writing import write

    views = build_views(found.results)
    paths = write(found.results, views, out)
    if found.trials is not None:
        paths.append(found.trials.save(out / "sweep.json"))
    page, told = page_beside(out)
    missing = found.results.missing
    if arguments.json:
        from learn2perturb.records import plain

        print_json(
            {
                "study": found.results.study.name, "level": found.results.study.level, "folder": str(out),
                "missing": missing, "failures": dict(found.failures), "views": [plain(view) for view in views],
                "page": None if page is None else str(page),
            }
        )  # fmt: skip
    else:
        if found.trials is not None:
            _print_trials(found.trials)
        for view in views:
            print(for_terminal(view))
        for title, why in found.failures.items():
            print(f"failed: {title}: {why}")
        if missing:
            print(f"{missing} of {len(found.results.answers)} cells are missing; the same command goes on")
        print(f"tables and figures: {out} ({len(paths)} files), records: {arguments.store}")
        print(told)
    return FAILURE if found.failures else SUCCESS


def _print_trials(trials: Trials) -> None:
    rows = [
        (
            *(str(value) for value in one.settings.values()),
            "failed" if one.objective is None else f"{one.objective:.2%}",
        )
        for one in trials.tried
    ]
    print_table((*trials.tried[0].settings, "held out"), rows, title="What was tried, scored on held-out images")
    chosen = ", ".join(f"{key} {value}" for key, value in trials.chosen.items())
    print(f"chosen: {chosen}; what follows is of fresh seeds\n")


def _plan(study: Study, arguments: argparse.Namespace, where: Placing) -> int:
    from learn2perturb.experiments.estimates import Estimates
    from learn2perturb.experiments.ledger import Ledger
    from learn2perturb.experiments.store import Store
    from learn2perturb.progress import duration
    from learn2perturb.terminal import say

    ledger = Ledger(study, Store(arguments.store))
    cells = sum(1 for _ in study.all_pairs())
    say(f"{len(study.runs)} networks, {cells} records; a few passes of each kind of network are timed first")
    estimates = Estimates(ledger, arguments.device)
    rows, total = [], 0.0
    seen: set[str] = set()
    for run in study.runs:
        network = ledger.network(run)
        seconds, state = 0.0, "there"
        if network is None:
            epochs, config = ledger.epochs(run), run.config
            assert config is not None
            state = f"epoch {epochs} of {config.epochs}" if epochs else "to be trained"
            if ledger.address(run) in seen:
                state = "as above"
            else:
                seconds = estimates.training(run)
                seen.add(ledger.address(run))
        pairs = list(study.pairs(run))
        absent = [pair for pair in pairs if not ledger.is_there(pair)]
        judging = sum(estimates.cell(pair) for pair in absent) if state != "as above" else 0.0
        total += seconds + judging
        rows.append(
            (
                run.title, state, duration(seconds) if seconds else "", f"{len(pairs) - len(absent)} of {len(pairs)}",
                duration(judging) if judging else "",
            )
        )  # fmt: skip
    room = where.jobs or 1
    if arguments.json:
        heads = ("run", "network", "training", "records", "evaluation")
        print_json({"study": study.name, "level": study.level, "seconds": total / room,
                    "runs": [dict(zip(heads, row, strict=True)) for row in rows]})  # fmt: skip
        return SUCCESS
    at = "" if study.level is None else f", level {study.level}"
    print_table(
        ("run", "network", "training", "records", "evaluation"), rows, title=f"{study.title}{at}: what is there"
    )
    for note in study.notes:
        print(f"note: {note}")
    each = "" if room == 1 else f" with {room} at a time"
    print(f"about {duration(total / room)} to go{each}, by steps and passes measured here, as if no other work ran")
    return SUCCESS


def _list(as_json: bool) -> int:
    from learn2perturb.experiments.study_file import read_source, shipped

    rows = []
    for name in shipped():
        source = read_source(name)[1]
        rows.append((name, str(source.get("title", "")), ", ".join(source.get("levels", {}))))
    if as_json:
        print_json([{"name": name, "title": title, "levels": levels.split(", ")} for name, title, levels in rows])
    else:
        print_table(("study", "what it shows", "levels"), rows)
    return SUCCESS


def _merge(words: list[str]) -> int:
    if len(words) != 2:
        raise ConfigError("merge takes two stores: study merge STORE FROM")
    from learn2perturb.experiments.store import Store

    into, other = map(Path, words)
    if not other.is_dir():
        raise ConfigError(f"{other} is no folder; give the store that is to be added")
    added, left = Store(into).merge(Store(other))
    for line in left:
        print(f"note: {line}")
    print(f"{added} files of {other} are now in {into}")
    return SUCCESS


def _clean(words: list[str], arguments: argparse.Namespace) -> int:
    if not words:
        raise ConfigError("clean takes the studies whose networks and records are to stay: study clean STUDY...")
    from learn2perturb.experiments.ledger import Ledger
    from learn2perturb.experiments.store import Store
    from learn2perturb.experiments.study_file import read_source, read_study

    store = Store(arguments.store)
    keep: set[Path] = set()
    for word in words:
        levels = [arguments.level] if arguments.level else [*read_source(word)[1].get("levels", {})] or [None]
        for level in levels:
            keep |= set(Ledger(read_study(word, level), store).wanted())
    gone = store.collect(keep, dry=not arguments.yes)
    for path in gone:
        print(path)
    did = "removed" if arguments.yes else "not needed by these studies; --yes removes them"
    print(f"{len(gone)} {did}")
    return SUCCESS
