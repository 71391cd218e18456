"""``learn2perturb diagnose``: is the robustness of a model real? Checks, curves, a verdict."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learn2perturb.cli.figures import check_folder, diagnosis_figures
from learn2perturb.cli.networks import words_of
from learn2perturb.cli.options import add_config, add_json, config_of, print_json
from learn2perturb.cli.planning import Plan
from learn2perturb.cli.saving import FAILURE, SUCCESS, place_of, saved
from learn2perturb.cli.sources import FOLDER, sources_of_run, sources_on_data
from learn2perturb.cli.subject import (
    ASKED_NOTHING,
    add_subject,
    check_subject,
    load_subject,
    new_record,
    save_record,
)
from learn2perturb.diagnosis.config import DiagnoseConfig
from learn2perturb.errors import ConfigError
from learn2perturb.naming import is_factory, made_by
from learn2perturb.sizes import LINF_EPS
from learn2perturb.terminal import number_among

if TYPE_CHECKING:
    from learn2perturb.cli.subject import Subject
    from learn2perturb.diagnosis import Claim, Diagnosis

DESCRIPTION = (
    "Check whether the robustness of a network is real: checks for masked gradients and faked randomness,\n"
    "each with a verdict and its evidence. RUN is a run, or any model of yours as module:function.\n"
    "--claim states an accuracy, which is then refuted, not refuted, or not shown.\n"
    "Exits 0 when the diagnosis was made, whatever it says; with --strict 1 unless the claim is not refuted, or,\n"
    "without a claim, unless every check that applies passed."
)
EXAMPLE = "learn2perturb diagnose runs/digits --claim '51 % under pgd20' --source pgd_at=runs/digits-pgd_at"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this verb."""
    add_subject(parser)
    add = parser.add_argument
    budget = parser.add_mutually_exclusive_group()
    for name, help in (
        ("quick", "minutes on a CPU: up to 200 images (default)"),
        ("full", "for a report: 1,000 images, 80 draws, 5,000 queries"),
    ):
        budget.add_argument(
            f"--{name}", dest="budget", action="store_const", const=name, default=DiagnoseConfig.budget, help=help
        )
    add_config(
        parser, DiagnoseConfig, title="how it is diagnosed", skip=("budget",),
        otherwise={"eps": "the run's in this norm; in l_inf else 8/255", "norm": "the run's"},
    )  # fmt: skip
    add(
        "--source", action="append", default=[], metavar="NAME=RUN",
        help="network to transfer from: undefended, pgd_at (also the baseline of check 6), twin; may be repeated",
    )  # fmt: skip
    add(
        "--train-sources", action="store_true",
        help="train the sources that are not given: with the settings of the run, into RUN/sources; for "
        "module:function a small network on its data, for a short time",
    )  # fmt: skip
    add("--sources-dir", metavar="DIR", help=f"where those for module:function are kept (default {FOLDER})")
    add(
        "--noise-off", metavar="MODEL",
        help="your network without its noise, module:function, for check 6 (noise of this package needs none)",
    )  # fmt: skip
    add("--figures", metavar="DIR", help="write the curves there, as PNG files")
    add("--strict", action="store_true", help="exit 1 unless the claim is not refuted, or all checks passed")
    add("--out", metavar="FILE", help="the record (default RUN/evaluation/NAME-diagnosis-SPLIT-seedN.json)")
    add_json(parser)


def plan(arguments: argparse.Namespace) -> Plan:
    """Return what would be done: the settings, and what is diagnosed by which sources."""
    check_subject(arguments)
    named, config = _named_sources(arguments.source), config_of(DiagnoseConfig, arguments)
    sources = ", ".join(named) or ("trained" if arguments.train_sources else "none")
    steps = [f"diagnose {arguments.run}, split {arguments.split}, budget {config.budget}", f"sources: {sources}"]
    return Plan(
        config.to_dict() | {"sources": named},
        (*steps, *(_expected(arguments, config, len(named)) if arguments.dry_run else [])),
    )


def _expected(arguments: argparse.Namespace, config: DiagnoseConfig, sources: int) -> list[str]:
    """Say about how long it takes, and which parts of it: from one pass of the network."""
    if arguments.black_box:
        return [ASKED_NOTHING]
    from learn2perturb.diagnosis.diagnosing import expected_seconds
    from learn2perturb.evaluation.pace import said_of
    from learn2perturb.progress import duration

    subject = load_subject(arguments)
    seconds = expected_seconds(subject.model, subject.data, _settled(arguments, config, subject), sources=sources)
    if not seconds:
        return ["the network has no gradients, so attacks ask for values: how long that takes is not known"]
    parts = ", ".join(f"{part} {duration(value)}" for part, value in seconds.items())
    return [said_of(seconds, "parts"), f"parts: {parts}"]


def _settled(arguments: argparse.Namespace, config: DiagnoseConfig, subject: Subject) -> DiagnoseConfig:
    """Return the settings with claim, norm and size: what is not given is the run's."""
    from learn2perturb.diagnosis.threat import threat_of_training

    claim = None if arguments.claim is None else stated(arguments.claim)
    norm, eps = threat_of_training(subject.config, norm=config.norm, eps=config.eps, claim=claim)
    return replace(config, claim=claim, norm=norm, eps=eps)


def run(arguments: argparse.Namespace) -> int:
    """Diagnose; print the verdict, save the record."""
    check_subject(arguments)
    named = _named_sources(arguments.source)
    figures = check_folder(arguments.figures)
    config = config_of(DiagnoseConfig, arguments)
    if arguments.claim is not None:
        stated(arguments.claim)  # refuse what is none before anything is loaded
    if arguments.sources_dir is not None and not (arguments.train_sources and arguments.named):
        raise ConfigError("--sources-dir is for --train-sources of module:function; those of a run go to RUN/sources")
    if arguments.out:
        new_record(arguments, Path(), "diagnosis")  # refuse a wrong place before hours of work

    from learn2perturb.diagnosis import diagnose
    from learn2perturb.evaluation import Unfinished
    from learn2perturb.records import check_writable

    subject = load_subject(arguments)
    asked, config = config.eps, _settled(arguments, config, subject)
    out = new_record(arguments, subject.folder, "diagnosis")
    check_writable(out)
    device = next((str(p.device) for p in getattr(subject.model, "parameters", list)()), None)
    sources = {name: _model(place, device) for name, place in named.items()}
    noise_off = None if arguments.noise_off is None else _model(arguments.noise_off, device)
    if arguments.train_sources:
        if arguments.named:
            size = LINF_EPS if asked is None or config.norm == "l2" else asked  # training is in l_inf
            sources |= sources_on_data(
                arguments.dataset,
                arguments.data_dir,
                size,
                sources,
                folder=arguments.sources_dir,
                device=device,
                options=arguments.dataset_options,
            )
        else:
            sources |= sources_of_run(Path(arguments.run), subject.config, sources, device=device)
    keep = Unfinished(out.parent)
    found = diagnose(
        subject.model, subject.data, config, sources=sources, noise_off=noise_off, name=subject.name, keep=keep
    )
    found = replace(found, metadata=found.metadata | _origin(arguments))
    record = saved(lambda: save_record(found, arguments, subject.folder, "diagnosis"))
    if record is not None:
        keep.clear()
    drawn = [] if figures is None or number_among()[0] else diagnosis_figures(found, figures)
    if arguments.json:
        print_json(summary(found) | {"record": place_of(record), "figures": [str(path) for path in drawn]})
    else:
        print(found)
        for path in drawn:
            print(f"figure: {path}")
        if record is not None:
            print(f"\nrecord: {record}")
    return (
        FAILURE if record is None or (arguments.strict and found.verdict not in ("not refuted", "trusted")) else SUCCESS
    )


def stated(text: str) -> Claim:
    """Read a claim; a bare share is one, too."""
    from learn2perturb.diagnosis.claim import Claim

    return Claim.of(text)


def _origin(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the record says of the command: so that it can be repeated, or extended."""
    given = {
        "--dataset": arguments.dataset, "--data-dir": arguments.data_dir, "--claim": arguments.claim,
        "--eps": arguments.eps, "--norm": arguments.norm, "--noise-off": arguments.noise_off, "--bpda": arguments.bpda,
        "--limit": arguments.limit, "--seed": arguments.seed, "--batch-size": arguments.batch_size,
        "--queries-per-second": arguments.queries_per_second, "--sources-dir": arguments.sources_dir,
        "--engine": arguments.engine,
    }  # fmt: skip
    left_out = {"--batch-size": DiagnoseConfig.batch_size}
    words = ["learn2perturb", "diagnose", *words_of(arguments), "--full" if arguments.budget == "full" else "--quick"]
    words += ["--split", arguments.split] if arguments.split != "test" else []
    for name, value in given.items():
        words += [] if value is None or left_out.get(name) == value else [name, str(value)]
    for key, value in (arguments.dataset_options or {}).items():
        words += [f"--dataset-options.{key}", str(value)]
    for source in arguments.source:
        words += ["--source", source]
    switches = ("--black-box", "--train-sources", "--stochastic")
    words += [name for name in switches if getattr(arguments, name[2:].replace("-", "_"))]
    return {"command": words, "run": not arguments.named}


def summary(found: Diagnosis) -> dict[str, Any]:
    """Return what a program reads: verdicts, evidence and curves, without the raw bits, which are in the record."""
    from learn2perturb.diagnosis.layout import advice

    lowest = found.measurement(found.lowest)
    return {
        "model": found.metadata["model"],
        "verdict": found.verdict,
        "summary": found.summary,
        "findings": list(found.findings),
        "eps": found.eps,
        "norm": found.norm,
        "budget": found.budget["name"],
        "stochastic": found.stochastic,
        "claim": _claimed(found),
        "lowest": {
            "attack": found.lowest, "accuracy": lowest.accuracy, "n": lowest.n,
            "interval": [lowest.interval.low, lowest.interval.high],
        },
        "advice": advice(found),
        "checks": [
            {
                "number": check.number, "name": check.name, "status": check.status, "sentence": check.sentence,
                "evidence": check.evidence, "missing": list(check.missing), "notes": list(check.notes),
            }
            for check in found.checks
        ],
        "curves": {
            curve.axis: [[point.at, point.accuracy, point.interval.low, point.interval.high] for point in curve.points]
            for curve in found.curves
        },
        "seconds": found.metadata["seconds"],
    }  # fmt: skip


def _claimed(found: Diagnosis) -> dict[str, Any] | None:
    """Return the claim and what came of it."""
    from learn2perturb.diagnosis.advice import described

    claim, trial = found.claim, found.trial
    if claim is None or trial is None:
        return None
    by = found.measurement(trial.found)
    return asdict(claim) | {
        "text": str(claim),
        "found": {
            "attack": by.name, "accuracy": by.accuracy, "n": by.n, "interval": [by.interval.low, by.interval.high],
            "how": described(by),
        },
        "p_value": trial.adjusted,
        "tried": list(trial.tried),
        "drop_seen": trial.drop,
    }  # fmt: skip


def _named_sources(given: list[str]) -> dict[str, str]:
    """Read ``NAME=RUN`` words.

    Raises:
        ConfigError: one is written otherwise, or a name is given twice.
    """
    found: dict[str, str] = {}
    for text in given:
        name, equals, place = text.partition("=")
        if not equals or not name or not place:
            raise ConfigError(f"--source {text!r} is no NAME=RUN; write --source pgd_at=runs/digits-pgd_at")
        if name in found:
            raise ConfigError(f"--source {name} is given twice; give each source a name of its own")
        found[name] = place
    return found


def _model(place: str, device: str | None) -> Any:
    from learn2perturb.runs.loading import load

    model = made_by(place) if is_factory(place) else load(place)
    return model.to(device) if device is not None and hasattr(model, "to") else model
