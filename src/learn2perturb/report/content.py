"""What stands on a page, as plain values: the verdict, the table, the checks, the charts, how to run it again."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from learn2perturb.diagnosis import Diagnosis
from learn2perturb.diagnosis.advice import settled_alone
from learn2perturb.diagnosis.claim import Claim
from learn2perturb.diagnosis.layout import advice, key_figure
from learn2perturb.errors import ConfigError
from learn2perturb.evaluation import Evaluation, Row
from learn2perturb.evaluation.result import CLEAN
from learn2perturb.report import charts, class_charts, galleries, noise_charts, studies
from learn2perturb.report.naming import label, short_names
from learn2perturb.report.section import Chart, Section
from learn2perturb.report.sources import Material, Training
from learn2perturb.report.sweeps import sweeps

# What two rows of the table have in common if they are one.
_SAME = ("model", "name", "eps", "noise", "predictor", "accuracy", "n", "draws")
MOST_RUNS = 40  # of which classes and trainings are shown one by one
MOST_MAPS = 48  # of noise at sites, on one page
MARKS = {"passed": "✓", "failed": "✗", "not shown": "?", "does not apply": "–"}


_NO_MARGINS = "Margins are missing: the record is older than they are; evaluate again."


@final
@dataclass(frozen=True)
class Content:
    """A page: its first screen, the views of studies, the table of accuracies, and the sections under it."""

    title: str
    claim: str
    verdict: str
    evidence: tuple[str, ...]
    commands: tuple[str, ...]
    views: tuple[Section, ...]
    rows: tuple[dict[str, Any], ...]
    sections: tuple[Section, ...]

    @property
    def every(self) -> tuple[Section, ...]:
        """All sections."""
        return *self.views, *self.sections


def contents(material: Material, claim: str | None) -> Content:
    """Return what a page of these records says.

    Raises:
        ConfigError: the claim cannot be read, or a diagnosis was made of another one.
    """
    stated = None if claim is None else Claim.of(claim)
    for path, found in material.diagnoses:
        if stated is not None and found.claim is not None and found.claim.accuracy != stated.accuracy:
            raise ConfigError(
                f"--claim says {100 * stated.accuracy:g} %, and {path} was diagnosed of "
                f"{100 * found.claim.accuracy:g} %; leave --claim out, or diagnose again"
            )
    names = short_names(row for _, evaluation in material.evaluations for row in evaluation.rows)
    every = (row for _, evaluation in material.evaluations for row in _rows(evaluation, names))
    rows = {tuple(row[key] for key in _SAME): row for row in every}.values()  # the clean row of many records once
    claimed, verdict, evidence = _verdict(material, stated, names)
    models = sorted({str(record.metadata.get("model", "model")) for record in _records(material)})
    models = models or [training.name for training in material.trainings]
    of_studies = [one.title if one.level is None else f"{one.title} ({one.level})" for one in material.studies]
    return Content(
        title=", ".join(of_studies or models or dict.fromkeys(view.title for view in material.views)),
        claim=claimed,
        verdict=verdict,
        evidence=tuple(line for line in (*evidence, *material.strangers) if line.strip()),
        commands=tuple(_commands(material)),
        views=tuple(studies.sections(material.views)),
        rows=tuple(rows),
        sections=tuple(_sections(material, names, stated)),
    )


def _records(material: Material) -> list[Any]:
    return [record for _, record in material.records]


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


def _rows(evaluation: Evaluation, names: Mapping[str, str]) -> Iterable[dict[str, Any]]:
    """Yield the rows of the table, numbers beside the text they are shown as."""
    for row in evaluation.rows:
        settings = ", ".join(f"{name}={_short(value)}" for name, value in row.parameters.items() if value is not None)
        counts = row.correct.unpack().sum(axis=1)
        yield {
            "model": str(evaluation.metadata.get("model", "model")),
            "attack": names[row.attack],
            "name": row.attack,
            "eps": row.eps_text,
            "noise": ("on" if row.stochastic else "none") if row.noise else "off",
            "predictor": row.predictor if row.predictor == "single" else f"{row.predictor} of {row.members}",
            "accuracy": 100 * row.accuracy,
            "std": None if row.std is None else 100 * row.std,
            "low": 100 * row.interval.low,
            "high": 100 * row.interval.high,
            "worst": 100 * row.worst_of[10] if 10 in row.worst_of else None,
            "n": row.n,
            "draws": row.draws,
            "told": f"{row.attack_type or 'no attack'}({settings}); right: {counts.min()} to {counts.max()} of {row.n} "
            f"in {row.draws} scorings; {row.interval.method} interval; {row.seconds:.1f} s",
        }


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)


def _verdict(material: Material, stated: Claim | None, names: Mapping[str, str]) -> tuple[str, str, list[str]]:
    """Return what was claimed, the verdict in one sentence, and the evidence."""
    if material.diagnoses:
        _, found = material.diagnoses[-1]
        head, *rest = found.summary.splitlines()
        claimed = str(found.claim) if found.claim is not None else "nothing was claimed"
        if stated is not None and found.claim is None:
            head += f" The claim of {100 * stated.accuracy:g} % was not put to the diagnosis: diagnose with --claim."
        return claimed, head, [*rest, *advice(found)]
    if stated is None and material.views:
        return "nothing was claimed", *studies.verdict(material.studies, material.views)
    claimed = "nothing was claimed" if stated is None else str(stated)
    lowest = sorted(((_least(one), one) for one in _strongest(material)), key=lambda pair: pair[0].accuracy)
    if not lowest:
        return claimed, "No accuracy was measured here.", []
    (row, evaluation), *others = lowest
    text = _left(row, evaluation, names)
    evidence = [*(f"Of the others: {_left(*pair, names)}." for pair in others), _no_diagnosis()]
    if stated is None:
        return claimed, f"Lowest accuracy found: {text}.", evidence
    if row.interval.high < stated.accuracy:
        return claimed, f"Less than is claimed: {text}.", evidence
    return claimed, f"Not shown: {text}, and nothing says whether these attacks were strong enough.", evidence


def _left(row: Row, evaluation: Evaluation, names: Mapping[str, str]) -> str:
    interval = f"[{_percent(row.interval.low)}, {_percent(row.interval.high)}]"
    model = evaluation.metadata.get("model", "model")
    return f"{_percent(row.accuracy)} % {interval} is left of {model} by {label(row, names)}"


def _no_diagnosis() -> str:
    return (
        "No diagnosis is among the records: whether the gradients can be trusted is not shown (learn2perturb diagnose "
        "RUN)."
    )


def _commands(material: Material) -> Iterable[str]:
    import shlex

    for record in _records(material):
        command = record.metadata.get("command")
        if isinstance(command, list):
            yield shlex.join(map(str, command))
        elif isinstance(command, str):
            yield command


def _sections(material: Material, names: Mapping[str, str], stated: Claim | None) -> Iterable[Section]:
    for index, (_, diagnosis) in enumerate(material.diagnoses):
        yield _diagnosed(diagnosis, index)
    yield from _swept(material, stated)
    if max(len(list(_strongest(material))), len(material.trainings)) > MOST_RUNS:
        sentence = f"Classes and trainings are shown of {MOST_RUNS} networks at most; give some of their folders alone."
        yield Section("Single networks", (sentence,))
    for index, evaluation in enumerate(itertools.islice(_strongest(material), MOST_RUNS)):
        yield _classes(evaluation, index, names)
    yield from _images(material, names)
    for index, (_, certification) in enumerate(material.certifications):
        spec = charts.certified(certification)
        yield Section(
            f"Certificates: {certification.metadata.get('model', 'model')}", (str(certification).splitlines()[0],),
            charts=(Chart(f"certified-{index}", spec),),
        )  # fmt: skip
    room = MOST_MAPS
    for index, training in enumerate(material.trainings[:MOST_RUNS]):
        maps = _maps(training, index)[:room]
        room -= len(maps)
        yield _trained(training, index, maps)
    lost = [f"{len(material.lost)} records and runs are no longer where a study says: {name}" for name in material.lost]
    yield Section(
        "Where and by what", tuple(lost[:1]), tuple(_circumstances(_records(material)))
    )  # fmt: skip


def _trained(training: Training, index: int, maps: Sequence[Chart]) -> Section:
    """Return curves, maps of the noise and settings of a run folder, and what of these it does not have."""
    drawn = {"noise": charts.noise_over_epochs(training), "training": charts.training_curves(training)}
    found = tuple(Chart(f"{name}-{index}", spec) for name, spec in drawn.items() if spec is not None)
    settings = tuple((str(key), _short(value)) for key, value in training.config.items() if value not in (None, {}, []))
    sentences = []
    sites = 0 if training.noise is None else len(training.noise.sites)
    if len(maps) < sites:
        sentences.append(f"The noise is shown at {len(maps)} of {sites} sites: the page has no more room.")
    if training.noise_misfit is not None:
        sentences.append(
            f"noise.json, the maps of the noise, is left out: {training.noise_misfit}. A training writes it at its end."
        )
    elif training.noise is None and drawn["noise"] is not None:
        sentences.append(
            "Maps of the noise are missing: this run has no noise.json; the command that trained it, run again, "
            "writes it beside the checkpoints."
        )
    return Section(f"Training: {training.name}", tuple(sentences), facts=settings, charts=(*found, *maps))


def _maps(training: Training, index: int) -> list[Chart]:
    sites = () if training.noise is None else training.noise.sites
    return [Chart(f"noise-{index}-{number}", noise_charts.noise_map(one)) for number, one in enumerate(sites)]


def _swept(material: Material, stated: Claim | None) -> Iterable[Section]:
    """Yield for each network the curves that its rows make."""
    found = sweeps(evaluation for _, evaluation in material.evaluations)
    by_model = itertools.groupby(sorted(found, key=lambda one: one.model), key=lambda one: one.model)
    numbers = itertools.count()
    for model, of_model in itertools.islice(by_model, MOST_RUNS):
        drawn = tuple(Chart(f"sweep-{next(numbers)}", charts.swept(one, stated)) for one in of_model)
        yield Section(f"Size and budget of attacks: {model}", charts=drawn)


def _diagnosed(diagnosis: Diagnosis, index: int) -> Section:
    checks = tuple(
        {
            "number": check.number, "name": check.name, "status": check.status, "mark": MARKS[check.status],
            "figure": key_figure(check), "sentence": check.sentence, "missing": list(check.missing),
            "notes": list(check.notes), "settled": settled_alone(check, diagnosis),
        }
        for check in diagnosis.checks
    )  # fmt: skip
    curves = tuple(
        Chart(f"{curve.axis}-{index}", charts.accuracy_curve(diagnosis, curve))
        for curve in diagnosis.curves
        if curve.points
    )
    title = f"Diagnosis: {diagnosis.metadata.get('model', 'model')}"
    return Section(title, tuple(diagnosis.findings), charts=curves, checks=checks)


def _least(evaluation: Evaluation) -> Row:
    """Return the row that leaves least, with the noise as it is used."""
    return min(evaluation.rows, key=lambda row: (not row.noise, row.accuracy))


def _strongest(material: Material) -> Iterable[Evaluation]:
    """Yield, for each model, the evaluation whose attack leaves least."""
    found: dict[str, Evaluation] = {}
    for _, evaluation in material.evaluations:
        if not evaluation.rows:
            continue
        model = str(evaluation.metadata.get("model", "model"))
        if model not in found or _least(evaluation).accuracy < _least(found[model]).accuracy:
            found[model] = evaluation
    yield from found.values()


def _classes(evaluation: Evaluation, index: int, names: Mapping[str, str]) -> Section:
    row = _least(evaluation)
    said, classes = label(row, names), class_names(evaluation)
    return Section(
        f"Classes: {evaluation.metadata.get('model', 'model')}",
        (
            f"Under what leaves least with the noise as it is used: {said}.",
            *((_NO_MARGINS,) if row.margins is None else ()),
        ),
        charts=(
            Chart(f"classes-{index}", class_charts.per_class(evaluation, row, classes, said)),
            Chart(f"confusion-{index}", class_charts.confusion(evaluation, row, classes, said)),
            *_margins(evaluation, row, index, names),
        ),
    )


def _margins(evaluation: Evaluation, least: Row, index: int, names: Mapping[str, str]) -> Iterable[Chart]:
    """Yield the margins of clean images and of what leaves least, where the record has them."""
    clean = next((row for row in evaluation.rows if row.attack == CLEAN and row.noise == least.noise), least)
    for which, row in {"clean": clean, "least": least}.items():
        if row.margins is not None and (which == "least" or row is not least):
            yield Chart(f"margins-{which}-{index}", noise_charts.margins(row, row.margins, label(row, names)))


def _images(material: Material, names: Mapping[str, str]) -> Iterable[Section]:
    """Yield, for each model, the images under the attack that leaves least of those whose images are kept."""
    kept = Material(evaluations=[(path, one) for path, one in material.evaluations if path in material.images])
    places = {id(one): path for path, one in kept.evaluations}
    room = galleries.ROOM
    for evaluation in itertools.islice(_strongest(kept), MOST_RUNS):
        images = material.images[places[id(evaluation)]]
        gallery, room = galleries.of(images, evaluation, class_names(evaluation), names, room)
        if gallery is not None and gallery.shots:
            title = f"Images: {evaluation.metadata.get('model', 'model')}"
            yield Section(title, (gallery.told,), galleries=(gallery,))
    if material.misfits:
        yield Section("Images that are left out", tuple(material.misfits))


def class_names(evaluation: Evaluation) -> Sequence[str]:
    """Return the names of the classes, numbers where the record has none."""
    names = evaluation.metadata.get("classes")
    if isinstance(names, list) and len(names) == evaluation.num_classes:
        texts = [str(name) for name in names]
        # Charts know a class by its name: two of one name are told apart by their numbers.
        counts = Counter(texts)
        return [f"{text} ({number})" if counts[text] > 1 else text for number, text in enumerate(texts)]
    return [str(number) for number in range(evaluation.num_classes)]


def _circumstances(records: Iterable[Any]) -> Iterable[tuple[str, str]]:
    """Yield hardware, versions, dates and hashes of every record, each value once."""
    seen: dict[str, dict[str, None]] = {}
    for record in records:
        for key, value in record.metadata.items():
            if isinstance(value, Mapping):
                for inner, text in value.items():
                    seen.setdefault(f"{key}: {inner}", {})[_short(text)] = None
            elif value is not None and key not in ("command", "classes"):  # which stand above
                seen.setdefault(str(key), {})[_short(value)] = None
    for key, values in seen.items():
        yield key, "; ".join(values)


def as_data(content: Content) -> dict[str, Any]:
    """Return the numbers of a page, which its script reads and a test compares with the records."""
    return {
        "rows": list(content.rows),
        "charts": {chart.name: chart.spec for section in content.every for chart in section.charts},
        "tables": [[list(row) for row in (one.head, *one.rows)] for view in content.views for one in view.tables],
        "verdict": content.verdict,
        "claim": content.claim,
        "checks": [check for section in content.sections for check in section.checks],
        "galleries": galleries.as_data(gallery for section in content.sections for gallery in section.galleries),
    }
