"""Read a study: a YAML file of runs, cells, views and levels, checked whole before any work. Knows no torch.

::

    title: Four defenses, three attacks, three seeds
    train: {dataset: cifar10, model: resnet20, recipe: laptop}    # of every run
    seeds: [1, 2, 3]
    runs:
      trained: {defense: [none, pgd_at, pni, learn2perturb]}      # a list makes a run of each value
    cells:
      pgd20: {attack: pgd20}
    views:
      table: {rows: [defense], columns: [cell], baseline: {defense: pgd_at}}
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

from learn2perturb.checks import check_choice, check_count, check_size
from learn2perturb.errors import CheckpointError, ConfigError, UnknownNameError
from learn2perturb.experiments.grid import check_view
from learn2perturb.experiments.spec import OTHERS, TWIN, CellPlan, RunPlan, Scoring, Study, ViewPlan, matches
from learn2perturb.naming import is_factory, made_by
from learn2perturb.presets import has_usual_step, written_attack
from learn2perturb.registry import DEFENSES
from learn2perturb.training.config import TrainConfig, read_config
from learn2perturb.values import convert, converted, guess, kinds_of

_FOLDER = "learn2perturb.experiments"
_TOP = (
    "title", "notes", "train", "defenses", "seeds", "runs", "cells", "evaluate", "views", "levels", "only", "sweep",
    "reasons",
)  # fmt: skip
_SUFFIXES = (".yaml", ".yml")


def shipped() -> list[str]:
    """Return the names of the studies that come with the package."""
    folder = resources.files(_FOLDER) / "studies"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def read_source(name: str | Path, above: tuple[Path, ...] = ()) -> tuple[str, dict[str, Any]]:
    """Return name and contents of a study: a YAML file, or one that comes with the package.

    Raises:
        ConfigError: there is no such file or study, or it cannot be read.
    """
    path = _path(str(name))
    if path in above:
        raise ConfigError(f"study {path} extends itself; let it extend another")
    source = read_config(path)
    base = source.pop("extends", None)
    if base is not None:
        whose = path.parent / str(base) if str(base).endswith(_SUFFIXES) else str(base)
        source = merged(read_source(whose, (*above, path))[1], source)
    return path.stem, source


def _path(name: str) -> Path:
    path = Path(name)
    if path.suffix in _SUFFIXES:
        return path
    if name not in shipped():
        raise UnknownNameError.of("study", name, [*shipped(), "FILE.yaml"])
    return Path(str(resources.files(_FOLDER) / "studies" / f"{name}.yaml"))


def read_study(name: str | Path, level: str | None = None, changes: Mapping[str, Any] | None = None) -> Study:
    """Read and check a study at one of its levels.

    Args:
        name: a YAML file, or the name of a study that comes with the package.
        level: ``smoke``, ``laptop``, ``paper``, or another that the file has; None: ``laptop`` where there is one.
        changes: replaces settings, by dotted keys: ``{"train.epochs": 3, "evaluate.limit": 100}``.

    Raises:
        ConfigError: something in it is not allowed; the message names the place and what is.
    """
    stem, source = read_source(name)
    return build_study(stem, source, level, changes)


def build_study(
    name: str, source: Mapping[str, Any], level: str | None = None, changes: Mapping[str, Any] | None = None
) -> Study:
    """Return the study that ``source``, the contents of a file, describes; see :func:`read_study`."""
    where = f"study {name}: "
    for key in source:
        if key not in _TOP:
            raise UnknownNameError.of(f"key of study {name}", key, _TOP)
    levels = _mapping(source.get("levels"), f"{where}levels")
    if level is None and levels:
        level = "laptop" if "laptop" in levels else next(iter(levels))
    if level is not None and level not in levels:
        if not levels:
            raise ConfigError(f"{where}it has no levels, so leave --level out")
        raise UnknownNameError.of(f"level of study {name}", level, levels)
    whole = merged(
        {key: value for key, value in source.items() if key != "levels"},
        (levels.get(level) if level is not None else None) or {},
    )
    for key, value in (changes or {}).items():
        whole = merged(whole, _nested(key, value))
    runs = tuple(_seeds_first(list(_runs(whole, where))))
    cells = tuple(_cells(whole, where))
    views = tuple(_views(whole, cells, where))
    notes, reasons = whole.get("notes") or [], whole.get("reasons") or []
    if not isinstance(notes, list) or not isinstance(reasons, list):
        raise ConfigError(f"{where}notes and reasons are lists; write - before each")
    study = Study(
        name, str(whole.get("title") or name), level, tuple(map(str, notes)), runs, cells, views,
        tuple(_reason(one, f"{where}reasons") for one in reasons), _mapping(whole.get("sweep"), f"{where}sweep"),
        whole,
    )  # fmt: skip
    for _ in study.all_pairs():  # every source is found
        pass
    for view in views:
        check_view(view, study)
    return study


def _reason(value: Any, where: str) -> dict[str, Any]:
    reason = _mapping(value, where)
    keys = set(reason) <= {"where", "why"}
    if not keys or not isinstance(reason.get("why"), str) or not isinstance(reason.get("where", {}), Mapping):
        raise ConfigError(f"{where}: {value!r}; write - {{where: {{defense: pni}}, why: what is known}}")
    return reason


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with ``changes``, mappings merged at every depth; null takes an entry away."""
    found = dict(base)
    for key, value in changes.items():
        own = found.get(key)
        if value is None:
            found.pop(key, None)
        elif isinstance(own, Mapping) and isinstance(value, Mapping):
            found[key] = merged(own, value)
        else:
            found[key] = value
    return found


def _nested(key: str, value: Any) -> dict[str, Any]:
    head, _, tail = key.partition(".")
    if head == "cells" and tail.count(".") > 1:  # cells.pgd.attack.steps: the last two are one key of the cell
        name, _, own = tail.partition(".")
        return {head: {name: {own: value}}}
    return {head: _nested(tail, value) if tail else value}


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} is {value!r}; it must be a mapping, key: value")
    return {str(key): item for key, item in value.items()}


def _axes(values: Mapping[str, Any], lists: Sequence[str]) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Return single values, and what takes several: lists, or lists of lists where one value is a list itself."""
    single: dict[str, Any] = {}
    several: dict[str, list[Any]] = {}
    for key, value in values.items():
        is_list = isinstance(value, list) and (key not in lists or (bool(value) and isinstance(value[0], list)))
        if is_list and not value:
            raise ConfigError(f"{key} is an empty list; give at least one value")
        if is_list and "." in key:
            value = [guess(item) if isinstance(item, str) else item for item in value]
        (several if is_list else single)[key] = value
    return single, several


def _combined(single: dict[str, Any], several: dict[str, list[Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Give all combinations, the seed slowest: a study that is cut short has one seed of everything."""
    order = sorted(several, key=lambda key: key != "seed")
    for values in itertools.product(*(several[key] for key in order)):
        chosen = dict(zip(order, values, strict=True))
        yield {**single, **chosen}, {key: chosen[key] for key in sorted(several, key=lambda key: key == "seed")}


def _seeds_first(runs: list[RunPlan]) -> list[RunPlan]:
    """Return the runs with the first seed of everything first: what is cut short has one seed of all."""
    ranks = {seed: rank for rank, seed in enumerate(dict.fromkeys(r.axes["seed"] for r in runs if "seed" in r.axes))}
    return sorted(runs, key=lambda run: ranks.get(run.axes.get("seed"), 0))


def _runs(whole: Mapping[str, Any], where: str) -> Iterator[RunPlan]:
    common = _mapping(whole.get("train"), f"{where}train")
    seeds = whole.get("seeds")
    if seeds is not None and (not isinstance(seeds, list) or not seeds):
        raise ConfigError(f"{where}seeds is {seeds!r}; it must be a list such as [1, 2, 3]")
    kinds = kinds_of(TrainConfig)
    lists = [key for key, kind in kinds.items() if kind.startswith("list")]
    listed = _mapping(whole.get("runs"), f"{where}runs")
    only = _mapping(whole.get("only"), f"{where}only")
    defenses = _defenses(whole, where)
    if not listed:
        raise ConfigError(f"{where}it has no runs; add runs: {{name: {{defense: pgd_at}}}}")
    for name, own in listed.items():
        at = f"{where}run {name}: "
        own = _mapping(own, f"{where}run {name}")
        if "weights" in own:
            yield from (replace(run, alone=len(listed) == 1) for run in _found(name, own, at))
            continue
        settings = merged({**common, **({"seed": seeds} if seeds is not None else {})}, own)
        for values, axes in _combined(*_axes(settings, lists)):
            name_of = DEFENSES.entry(str(values["defense"])).name if "defense" in values else TrainConfig.defense
            said = {key: item for key, item in defenses.get(name_of, {}).items() if key not in axes}
            config = _config(_filled(values, said, own), kinds, at)
            labels = {key: _labelled(config, key, value) for key, value in axes.items()}
            run = RunPlan(name, labels, config, alone=len(listed) == 1)
            if matches(run, only):
                yield run


def _defenses(whole: Mapping[str, Any], where: str) -> dict[Any, dict[str, Any]]:
    """Return the settings of each defense that has its own, wherever in the study it is trained."""
    listed = _mapping(whole.get("defenses"), f"{where}defenses")
    return {DEFENSES.entry(name).name: _mapping(own, f"{where}defenses {name}") for name, own in listed.items()}


def _filled(values: Mapping[str, Any], said: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run: its own, then what is said of its defense, then what is said of all runs."""
    mine = {key: item for key, item in said.items() if key not in own}
    both = {key: merged(said[key], values[key]) for key in said if key in own and isinstance(said[key], Mapping)}
    return merged({key: item for key, item in values.items() if key not in both}, {**mine, **both})


def _labelled(config: TrainConfig, key: str, value: Any) -> Any:
    """Return the value of an axis as the config has it: 8/255 is a number, ``vanilla`` is ``pgd_at``."""
    return value if "." in key else getattr(config, key)


def _config(values: Mapping[str, Any], kinds: Mapping[str, str], at: str) -> TrainConfig:
    plain = {key: value for key, value in values.items() if "." not in key}
    for key, value in values.items():
        if "." in key:
            plain = merged(plain, _nested(key, guess(value) if isinstance(value, str) else value))
    try:
        return TrainConfig.from_dict(converted(plain, kinds)).resolve()
    except ConfigError as error:
        raise ConfigError(f"{at}{error}") from None


def _found(name: str, settings: Mapping[str, Any], at: str) -> Iterator[RunPlan]:
    """Give the runs whose networks are trained already."""
    single, several = _axes(settings, ())
    for values, axes in _combined(single, several):
        weights = values.pop("weights")
        if not isinstance(weights, str):
            raise ConfigError(f"{at}weights is {weights!r}; give a run folder, a .safetensors file or zoo:NAME")
        yield RunPlan(name, axes, None, weights, {**_said_by(weights, at), **values})


def _said_by(weights: str, at: str) -> dict[str, Any]:
    """Return the labels of a trained network that its file says: of which defense, network, data and seed it is."""
    from learn2perturb.noise import noise_modules
    from learn2perturb.runs.checkpoint import read_model
    from learn2perturb.runs.files import locate

    if is_factory(weights):
        model: Any = made_by(weights)
        return {"stochastic": bool(noise_modules(model))} if hasattr(model, "modules") else {}
    try:
        header = read_model(locate(weights))[1]
    except CheckpointError as error:
        raise ConfigError(f"{at}{error}") from None
    found = header.get("config")
    config = found if isinstance(found, dict) else {}
    said = {
        "defense": header.get("defense"), "model": header.get("registered_name"), "seed": config.get("seed"),
        "dataset": header.get("dataset") or config.get("dataset"), "stochastic": bool(header.get("noise")),
    }  # fmt: skip
    return {key: value for key, value in said.items() if value is not None}


_CELL = ("attack", "eps", "eot", "source", "only", "released", "certify", "diagnose")


def _cells(whole: Mapping[str, Any], where: str) -> Iterator[CellPlan]:
    common = _mapping(whole.get("evaluate"), f"{where}evaluate")
    scoring = [item.name for item in fields(Scoring)]
    listed = _mapping(whole.get("cells"), f"{where}cells")
    if not listed:
        raise ConfigError(f"{where}it has no cells; add cells: {{pgd20: {{attack: pgd20}}}}")
    for key in common:
        if key not in (*scoring, "eps", "only"):
            raise UnknownNameError.of(f"setting of evaluate in study {where[6:-2]}", key, (*scoring, "eps", "only"))
    for name, own in listed.items():
        at = f"{where}cell {name}: "
        settings = {**common, **_mapping(own, f"{where}cell {name}")}
        for key in settings:
            if key not in _CELL and key not in scoring and not key.startswith("attack."):
                raise UnknownNameError.of(f"setting of cell {name}", key, [*_CELL, *scoring, "attack.SETTING"])
        try:
            for values, axes in _combined(*_axes(settings, ())):
                yield _cell(name, values, axes, scoring)
        except ConfigError as error:
            raise ConfigError(f"{at}{error}") from None


def _cell(name: str, values: Mapping[str, Any], axes: Mapping[str, Any], scoring: Sequence[str]) -> CellPlan:
    kinds = kinds_of(Scoring)
    how = Scoring(**converted({key: values[key] for key in scoring if key in values}, kinds))
    asked = [key for key in ("attack", "certify", "diagnose") if values.get(key) is not None]
    if len(asked) > 1:
        raise ConfigError(f"it asks for {' and '.join(asked)}; give each a cell of its own")
    kind = {"certify": "certificate", "diagnose": "diagnosis"}.get(asked[0] if asked else "", "accuracy")
    settings = _mapping(values.get("certify") or values.get("diagnose"), "settings")
    eps = None if values.get("eps") is None else convert("float", values["eps"])
    if eps is not None:
        check_size("eps", eps, norm="any", zero=True)
    attack, preset_step = None, False
    if values.get("attack") is not None:
        attack = attack_named(values["attack"])
        more = {key.partition(".")[2]: value for key, value in values.items() if key.startswith("attack.")}
        more |= {"eot": values["eot"]} if "eot" in values else {}
        attack = attack[0], {**attack[1], **{key: guess(v) if isinstance(v, str) else v for key, v in more.items()}}
        preset_step = "step_size" not in more and _step_of_preset(values["attack"])
    source = values.get("source")
    if source is not None and kind == "certificate":
        raise ConfigError("a certificate needs no source; leave it out")
    if source not in (None, TWIN, OTHERS) and not isinstance(source, Mapping):
        raise ConfigError(f"source is {source!r}; give twin, others, or labels of a run such as {{defense: pgd_at}}")
    released = values.get("released")
    check_count("released", released, optional=True)
    named = {key: (eps if key == "eps" else value) for key, value in axes.items()}
    only = _mapping(values.get("only"), "only")
    return CellPlan(name, named, kind, attack, eps, source, only, released, settings, how, preset_step)


def _step_of_preset(value: Any) -> bool:
    """Tell whether the step of an attack that is written so is that of a preset."""
    if isinstance(value, Mapping):
        return "step_size" not in value and has_usual_step(str(value.get("name", "")))
    return has_usual_step(str(value))


def attack_named(value: Any) -> tuple[str, dict[str, Any]]:
    """Return registered name and settings of an attack: in one word, or a mapping with that as its ``name``."""
    if isinstance(value, Mapping):
        rest = {str(key): guess(item) if isinstance(item, str) else item for key, item in value.items()}
        name = str(rest.pop("name", ""))
        base, settings = attack_named(name) if name else ("", {})
        if not base:
            raise ConfigError(f"attack {dict(value)!r} has no name; write {{name: pgd, steps: 20}}")
        return base, {**settings, **rest}
    return written_attack(str(value))


def _usual_view(cells: Sequence[CellPlan]) -> dict[str, Any]:
    """Return the table of a study that names no views: a column for every cell, whatever tells one from another."""
    axes = dict.fromkeys(key for cell in cells for key in cell.axes)
    sources = ["source"] if any(cell.source == OTHERS for cell in cells) else []
    return {"table": {"rows": ["run", *sources], "columns": ["cell", *axes]}}


def _views(whole: Mapping[str, Any], cells: Sequence[CellPlan], where: str) -> Iterator[ViewPlan]:
    known = {item.name for item in fields(ViewPlan)} - {"name"}
    listed = _mapping(whole.get("views"), f"{where}views") or _usual_view(cells)
    for name, own in listed.items():
        settings = _mapping(own, f"{where}view {name}")
        for key in settings:
            if key not in known:
                raise UnknownNameError.of(f"setting of view {name}", key, known)
        check_choice(f"{where}view {name}: kind", settings.get("kind", "table"), ("table", "curve", "history"))
        for key in ("rows", "columns", "series", "notes"):
            if key in settings:
                value = settings[key]
                settings[key] = tuple(map(str, value if isinstance(value, list) else [value]))
        yield ViewPlan(name, **settings)
