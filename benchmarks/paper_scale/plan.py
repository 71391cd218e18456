"""What is to be done, read from a YAML file: runs, the cells each is evaluated in, the paper's numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from learn2perturb.errors import ConfigError
from learn2perturb.registry import DEFENSES
from learn2perturb.training.config import TrainConfig

PLAN = Path(__file__).resolve().with_name("plan.yaml")


@dataclass(frozen=True)
class Cell:
    """One attack on one run.

    Attributes:
        attack: as ``learn2perturb evaluate --attack`` takes it.
        source: ``twin`` (the network with its noise off) or a defense: the images are crafted on that one.
        released: the batch size, if it is to be scored as the released code does.
        noisy: only for networks with noise.
        noise_off: also attack the network with its noise switched off.
        words: further words of ``learn2perturb evaluate``.
    """

    name: str
    attack: str
    source: str | None = None
    released: int | None = None
    noisy: bool = False
    noise_off: bool = True
    words: tuple[str, ...] = ()

    @property
    def is_verb(self) -> bool:
        """Tell whether ``learn2perturb evaluate`` can express it."""
        return self.source is None and self.released is None


@dataclass(frozen=True)
class Plan:
    """Runs in order of importance, and how each is evaluated."""

    path: Path
    runs: Mapping[str, TrainConfig]
    cells: tuple[Cell, ...]
    evaluate: tuple[str, ...]
    paper: Mapping[str, Mapping[str, Mapping[str, float]]]

    def config(self, run: str) -> TrainConfig:
        """Return the config of a run.

        Raises:
            ConfigError: there is no such run.
        """
        if run not in self.runs:
            raise ConfigError(f"{self.path} has no run {run!r}; it has {', '.join(self.runs)}")
        return self.runs[run]

    def is_noisy(self, run: str) -> bool:
        """Tell whether the network of a run has noise."""
        return DEFENSES.entry(self.config(run).defense).fact("stochastic")

    def source_of(self, run: str, cell: Cell) -> str | None:
        """Return the run that images of ``cell`` are crafted on: same network, same seed or the first; None for none.

        Raises:
            ConfigError: the plan has no such run.
        """
        if cell.source in (None, "twin"):
            return None
        own = self.config(run)
        found = [name for name, other in self.runs.items() if (other.defense, other.model) == (cell.source, own.model)]
        if not found:
            raise ConfigError(f"cell {cell.name} of {run} needs a run of {cell.source} on {own.model}; add one")
        return next((name for name in found if self.runs[name].seed == own.seed), found[0])

    def words(self, cell: Cell) -> list[str]:
        """Return the words of ``learn2perturb evaluate`` that follow the run."""
        own = [] if cell.noise_off else ["--no-noise-off"]
        return ["--attack", cell.attack, *self.evaluate, *cell.words, *own]


def read_plan(path: Path = PLAN) -> Plan:
    """Read a plan.

    Raises:
        ConfigError: the file cannot be read, or a run or cell in it is not allowed.
    """
    try:
        raw: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        common = raw["training"]
        runs = {name: TrainConfig.from_dict({**common, **own}) for name, own in raw["runs"].items()}
        cells = tuple(Cell(name, **{**own, "words": tuple(own.get("words", ()))}) for name, own in raw["cells"].items())
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"plan {path} cannot be read ({reason}); mend it after the model of {PLAN.name}") from None
    return Plan(path, runs, cells, tuple(raw.get("evaluate", ())), raw.get("paper", {}))
