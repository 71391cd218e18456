"""What ``learn2perturb bench`` measures, in numbers. Knows no torch, so that the command line starts fast."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, final

from learn2perturb.checks import check_choice, check_count
from learn2perturb.errors import ConfigError, UnknownNameError
from learn2perturb.registry import DATASETS, DEFENSES, MODELS

WHATS = ("step", "attack", "data", "scale")
# The baseline step is written for these; another defense has another loss.
BENCHED = tuple(entry.name for entry in DEFENSES if entry.fact("baseline"))
SHARINGS = ("per_example", "per_batch")
_DEFAULTS: dict[str, dict[str, Any]] = {
    "step": {"rounds": 5, "attack_steps": 7},
    "attack": {"rounds": 2, "images": 100, "attack_steps": 20},
    "data": {"rounds": 3, "images": 5000},
    "scale": {"rounds": 3, "attack_steps": 7},
}
_NOT_FOR = {
    "step": ("eot", "images", "workers"),
    "attack": ("workers",),
    "data": ("defense", "model", "sharing", "attack_steps", "eot"),
    "scale": ("eot", "images", "workers"),
}


@final
@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What is measured, and how often.

    Args:
        defense: ``learn2perturb`` or ``pgd_at``; for attack also: a network with noise or without.
        model: registered name of the network; its weights are random.
        sharing: noise ``per_example`` or ``per_batch`` in our steps; the baseline always has one map a pass.
        batch_size: images in a batch.
        attack_steps: steps of PGD; 7 in step and scale, 20 in attack.
        eot: draws in each gradient of EOT-PGD.
        images: images in a round; 100 in attack, 5000 in data.
        rounds: counted runs of each execution mode, taken in turn; 5 in step, 2 in attack, 3 in data and scale.
        threads: CPU threads; as torch has them if not given, in scale one for each process.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        dataset: real images of this data set; random ones, 3 x 32 x 32, if not given.
        data_dir: folder of the data sets; given alone, it means ``--dataset cifar10``.
        workers: worker processes of the DataLoader in data.
        seed: of weights, random images, noise and starts.
    """

    defense: str = "learn2perturb"
    model: str = "resnet20"
    sharing: str = "per_example"
    batch_size: int = 128
    attack_steps: int | None = None
    eot: int = 10
    images: int | None = None
    rounds: int | None = None
    threads: int | None = None
    device: str = "auto"
    dataset: str | None = None
    data_dir: str | None = None
    workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("defense of a benchmark", self.defense, BENCHED, optional=True)
        check_choice("sharing", self.sharing, SHARINGS, optional=True)
        MODELS.entry(self.model)
        if self.dataset is not None:
            DATASETS.entry(self.dataset)
        for name in ("batch_size", "attack_steps", "eot", "images", "rounds", "threads"):
            check_count(name, getattr(self, name), 1, optional=True)
        check_count("workers", self.workers, 0, optional=True)
        check_count("seed", self.seed, 0, optional=True)

    @classmethod
    def of(cls, what: str, given: dict[str, Any]) -> BenchSettings:
        """Return the settings of ``what``, ``step``, ``attack``, ``data`` or ``scale``: those given, the rest as suits.

        Raises:
            UnknownNameError: ``what`` is none of them.
            ConfigError: a setting is not allowed, or ``what`` has no use for it.
        """
        if what not in WHATS:
            raise UnknownNameError.of("benchmark", what, WHATS)
        for name in _NOT_FOR[what]:
            if name in given:
                raise ConfigError(f"--{name.replace('_', '-')} means nothing in 'bench {what}'; leave it out")
        settings = cls(**given)
        open_ = {key: value for key, value in _DEFAULTS[what].items() if getattr(settings, key) is None}
        settings = replace(settings, **open_)
        if settings.data_dir is not None and settings.dataset is None:
            settings = replace(settings, dataset="cifar10")
        return settings

    def shown(self, what: str) -> dict[str, Any]:
        """Return the settings that ``what`` depends on, for the record."""
        hidden = (*_NOT_FOR[what], "data_dir", "device", "threads")
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in hidden}
        return {"benchmark": what, **values}
