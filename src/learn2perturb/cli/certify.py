"""``learn2perturb certify``: radii within which no attack at all changes the majority vote of a noisy network."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learn2perturb.certification.config import GAPS, CertifyConfig
from learn2perturb.cli.figures import certification_figure, check_folder
from learn2perturb.cli.options import add_config, add_json, config_of, print_json
from learn2perturb.cli.planning import Plan
from learn2perturb.cli.saving import FAILURE, SUCCESS, place_of, saved
from learn2perturb.cli.subject import (
    ASKED_NOTHING,
    add_subject,
    check_subject,
    load_subject,
    new_record,
    save_record,
)
from learn2perturb.errors import ConfigError

if TYPE_CHECKING:
    from learn2perturb.certification.record import Certification
    from learn2perturb.cli.subject import Subject
    from learn2perturb.evaluation import Unfinished

DESCRIPTION = (
    "Certify the majority vote: for each image a radius within which no attack changes it, or an abstention.\n"
    "Refuses a model for which the certificate does not hold, and says when it is vacuous. Takes N passes an image."
)
EXAMPLE = "learn2perturb certify runs/digits --n 10000 --limit 100"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this verb."""
    add_subject(parser)
    add = parser.add_argument
    add_config(parser, CertifyConfig, title="how it is certified", otherwise={"eps": "the run's, else 8/255"})
    add("--figures", metavar="DIR", help="write certified accuracy against radius there, as a PNG file")
    add("--out", metavar="FILE", help="the record (default RUN/evaluation/NAME-certification-SPLIT-seedN.json)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Certify; print the table, save the record."""
    check_subject(arguments)
    figures = check_folder(arguments.figures)
    asked = config_of(CertifyConfig, arguments)
    if asked.chosen in GAPS and figures is not None:
        raise ConfigError(f"--figures draws radii, and method {asked.chosen!r} gives none; leave it out")
    if arguments.out:
        new_record(arguments, Path(), "certification")  # refuse a wrong place before hours of work

    from learn2perturb.certification import certify
    from learn2perturb.evaluation import Unfinished
    from learn2perturb.records import check_writable

    subject = load_subject(arguments)
    out = new_record(arguments, subject.folder, "certification")
    check_writable(out)
    keep = Unfinished(out.parent)
    config = asked if arguments.eps is not None else replace(asked, eps=subject.eps)
    if config.chosen in GAPS:
        return _gap(arguments, subject, config, keep)
    found = certify(subject.model, subject.data, config, name=subject.name, keep=keep)
    record = saved(lambda: save_record(found, arguments, subject.folder, "certification"))
    if record is not None:
        keep.clear()
    drawn = [] if figures is None else certification_figure(found, figures)
    if arguments.json:
        print_json(summary(found) | {"record": place_of(record), "figures": [str(path) for path in drawn]})
        return FAILURE if record is None else SUCCESS
    print(found)
    for path in drawn:
        print(f"figure: {path}")
    if record is None:
        return FAILURE
    print(f"\nrecord: {record}")
    return SUCCESS


def plan(arguments: argparse.Namespace) -> Plan:
    """Return what would be done: the settings, and what is certified."""
    check_subject(arguments)
    config = config_of(CertifyConfig, arguments)
    step = f"certify {arguments.run}, split {arguments.split}: {config.n:,} passes an image"
    return Plan(config.to_dict(), (step, *(_expected(arguments, config) if arguments.dry_run else [])))


def _expected(arguments: argparse.Namespace, config: CertifyConfig) -> list[str]:
    """Say about how long it takes: from one pass of the network."""
    if arguments.black_box:
        return [ASKED_NOTHING]
    from learn2perturb.certification.certifying import expected_seconds
    from learn2perturb.progress import duration

    subject = load_subject(arguments)
    seconds = expected_seconds(subject.model, subject.data, config)
    return [f"about {duration(seconds)}: a guess from one pass of the network"]


def _gap(arguments: argparse.Namespace, subject: Subject, config: CertifyConfig, keep: Unfinished) -> int:
    """Bound the growth of the risk; print it, save the record."""
    from learn2perturb.certification import risk_gap

    found = risk_gap(subject.model, subject.data, config, name=subject.name, keep=keep)
    record = saved(lambda: save_record(found, arguments, subject.folder, "certification"))
    if record is not None:
        keep.clear()
    if arguments.json:
        values = {
            "model": found.metadata["model"], "method": "renyi", "constant": found.constant, "exact": found.exact,
            "site": found.site, "n": found.n, "alpha": found.alpha, "eps": found.eps, "images": len(found.accuracies),
            "accuracy": found.accuracy, "bound": found.bound, "floor": found.floor, "direct": found.direct,
            "reach": found.reach, "direct_reach": found.direct_reach, "statement": found.statement,
            "seconds": found.metadata["seconds"],
        }  # fmt: skip
        print_json(values | {"record": place_of(record), "figures": []})
    else:
        print(found)
        if record is not None:
            print(f"\nrecord: {record}")
    return FAILURE if record is None else SUCCESS


def summary(found: Certification) -> dict[str, Any]:
    """Return what a program reads, without the votes, which are in the record."""
    return {
        "model": found.metadata["model"], "method": found.method, "norm": found.norm, "constant": found.constant,
        "exact": found.exact, "site": found.site, "sigma": found.sigma, "n0": found.n0, "n": found.n,
        "alpha": found.alpha, "images": len(found.radii), "abstained": found.abstained, "largest": found.largest,
        "needed": found.needed, "statement": found.statement, "curve": [list(point) for point in found.curve()],
        "seconds": found.metadata["seconds"],
    }  # fmt: skip
