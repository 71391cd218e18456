"""The one typed config of a training, and the recipes that fill what it leaves open. Knows no torch."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, replace
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from learn2perturb.checks import check_choice, check_count, fitting_step, fraction
from learn2perturb.configs import ENGINES, Config
from learn2perturb.defenses.settings import OpenSettings, later_settings
from learn2perturb.errors import ConfigError, UnknownNameError
from learn2perturb.naming import network_name
from learn2perturb.reading import MOST_SETTINGS, parse_yaml, read_bytes, reading
from learn2perturb.registry import DATASETS, DEFENSES
from learn2perturb.sizes import usual_eps, usual_step

if TYPE_CHECKING:
    from learn2perturb.defenses import Defense

OTHER_LR = 1e-3  # of an optimiser that the recipe was not made for
LOGGER_NAMES = ("tensorboard", "csv", "mlflow", "wandb")
LATER = ("init_from", "freeze", "keep_best", "early_stopping", "dataset_options", "transforms", "sync_batch_norm")
_PLACES = ("cache",)  # options of a data set that say where, and not which images
RECIPES = ("paper", "released", "common", "fast", "laptop")


@final
@dataclass(frozen=True, kw_only=True)
class TrainConfig(OpenSettings, Config):
    """Everything that decides a training. A field that is None is filled by the recipe.

    Args:
        defense: registered name, see ``learn2perturb list defenses``.
        model: registered name, ``timm:NAME`` or ``torchvision:NAME`` (``?pretrained`` for its published weights),
            ``module:function``, or ``hf-hub:owner/name``; ignored when ``train`` is given a network.
        dataset: registered name; ignored when ``train`` is given data.
        recipe: ``paper``, ``released``, ``common``, ``fast`` or ``laptop``.
        options: options of the defense, such as ``{"gamma": 1e-4}``.
        model_options: options of the network, such as ``{"normalization": "cifar10"}``.
        data_dir: folder of the data sets; default $LEARN2PERTURB_DATA_DIR, else ``.data``.
        download: fetch the data set if it is missing.
        limit: train on so many images only, balanced over the classes (the first ones of a loader of yours).
        validation: share of the training set that is held out and monitored, in [0, 1).
        augment: random crop and flip; None is as suits the data set, and none beside ``transforms``.
        transforms: augmentation of a data set by name: transforms of torchvision.transforms.v2, or any
            ``module:function`` of an image, with + between them: ``RandomRotation:degrees=10 + RandomErasing:p=0.5``.
        seed: decides everything: first weights, order, augmentation, noise, random starts.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        engine: ``plain`` (float32, the reference), ``fast`` (bfloat16, channels last, folded), ``auto`` (fast where
            bfloat16 is native).
        monitor: images scored after each epoch, clean and under the training adversary, balanced over the classes
            (the first ones of a loader of yours); 0 for none.
        log_every: steps between lines of ``metrics.jsonl``.
        checkpoint_minutes: most minutes between checkpoints; there is one after every epoch in any case.
        tensorboard: whether to write TensorBoard events.
        loggers: where the numbers go besides: ``csv``, ``mlflow``, ``wandb``, or ``module:Class`` of your own.
        init_from: run folder or file of weights (``.safetensors``, ``.pt``, ``.pth``) that the network begins with; a
            last layer of other classes starts anew, noise is taken over where it is the same.
        freeze: globs of submodules or parameters whose weights stay as they are, such as ``["layer1", "bn*"]``;
            frozen submodules stay in eval mode.
        keep_best: keep the weights of the epoch with the best accuracy under the training adversary on the images of
            ``validation``, in place of the last ones.
        early_stopping: epochs without a better such accuracy after which the training ends; 0 is never.
        dataset_options: options of the data set, such as ``{"size": 64}``.
        sync_batch_norm: of several processes, whether BatchNorm normalises by the statistics of the whole batch, as
            one process does, or each by those of its own rows, with fewer messages: that is another training.
    """

    defense: str = "learn2perturb"
    model: str = "resnet20"
    dataset: str = "cifar10"
    recipe: str = "paper"
    options: dict[str, Any] = field(default_factory=dict)
    model_options: dict[str, Any] = field(default_factory=dict)
    data_dir: str | None = None
    download: bool = False
    limit: int | None = None
    validation: float = 0.0
    augment: bool | None = None
    transforms: str | None = None
    seed: int = 0
    device: str = "auto"
    engine: str = "auto"
    monitor: int = 1000
    log_every: int = 50
    checkpoint_minutes: float = 10.0
    tensorboard: bool = True
    loggers: list[str] = field(default_factory=list)
    # What came later: at its default a training is what it was before, and so is its address.
    init_from: str | None = None
    freeze: list[str] = field(default_factory=list)
    keep_best: bool = False
    early_stopping: int = 0
    dataset_options: dict[str, Any] = field(default_factory=dict)
    sync_batch_norm: bool = True

    def __post_init__(self) -> None:
        DEFENSES.entry(self.defense)
        network_name(self.model)
        DATASETS.entry(self.dataset)
        if self.recipe not in RECIPES:
            raise UnknownNameError.of("recipe", self.recipe, RECIPES)
        check_choice("engine", self.engine, ENGINES, optional=True)
        for name, least in (("seed", 0), ("monitor", 0), ("log_every", 1)):
            _check(getattr(self, name) is not None, name, self, f"a whole number, at least {least}")
            check_count(name, getattr(self, name), least, optional=True)
        check_count("limit", self.limit, 1, optional=True)
        for name in ("validation", "checkpoint_minutes"):
            value = getattr(self, name)
            real = isinstance(value, (int, float)) and not isinstance(value, bool)
            _check(real, name, self, "in [0, 1)" if name == "validation" else "a number > 0")
        for name in ("download", "tensorboard", "keep_best", "sync_batch_norm"):
            _check(isinstance(getattr(self, name), bool), name, self, "true or false")
        _check(self.augment is None or isinstance(self.augment, bool), "augment", self, "true, false or None")
        said = self.transforms is None or (isinstance(self.transforms, str) and bool(self.transforms.strip()))
        _check(said, "transforms", self, "a text such as 'RandomRotation:degrees=10', or None")
        _check(0 <= self.validation < 1, "validation", self, "a share of the training set, in [0, 1)")
        _check(self.checkpoint_minutes > 0, "checkpoint_minutes", self, "> 0")
        _check(isinstance(self.options, dict), "options", self, "a mapping such as {'gamma': 1e-4}")
        for name in ("model_options", "dataset_options"):
            _check(isinstance(getattr(self, name), dict), name, self, "a mapping")
        _check(isinstance(self.init_from, str | None), "init_from", self, "the path of a run or a file of weights")
        globs = isinstance(self.freeze, list) and all(isinstance(glob, str) and glob for glob in self.freeze)
        _check(globs, "freeze", self, "a list of globs such as ['layer1', 'bn*']")
        check_count("early_stopping", self.early_stopping, 0)
        if (self.keep_best or self.early_stopping) and not (self.validation and self.monitor):
            raise ConfigError(
                "keep_best and early_stopping go by images that are held out, never by the test set; set validation, "
                "such as 0.1, and monitor above 0"
            )
        texts = isinstance(self.loggers, list) and all(isinstance(name, str) for name in self.loggers)
        _check(texts, "loggers", self, "a list of names such as ['csv']")
        for name in self.loggers:
            if ":" not in name and name not in LOGGER_NAMES:
                raise UnknownNameError.of("logger", name, [*LOGGER_NAMES, "module:Class"])
        self.check()

    def resolve(self) -> TrainConfig:
        """Return the config with every open field filled by its recipe; what was set by hand stays.

        Raises:
            ConfigError: an option has a value that is not allowed.
        """
        name = DEFENSES.entry(self.defense).name
        recipe = load_recipe(self.recipe)
        special = recipe.get("defenses", {}).get(name, {})
        defaults = {**later_settings(), **recipe["settings"], **special.get("settings", {})}
        defaults |= {key: fraction(defaults[key]) for key in ("eps", "attack_step_size")}
        if (norm := self.norm or defaults["norm"]) != "linf":
            # The recipe's radius and step are of l_inf.
            eps = usual_eps(norm) if self.eps is None else self.eps
            defaults["attack_step_size"] = usual_step(norm, eps)
        elif self.eps is not None:
            # The recipe's step was made for the recipe's radius.
            step = fitting_step(defaults["attack_step_size"], defaults["eps"], self.eps)
            defaults["attack_step_size"] = step
        if self.optimizer not in (None, defaults["optimizer"]):
            defaults["lr"] = OTHER_LR
        filled = {key: value for key, value in defaults.items() if getattr(self, key) is None}
        options = {**special.get("options", {}), **self.options}
        model_options = {**special.get("model_options", {}), **self.model_options}
        resolved = replace(self, defense=name, options=options, model_options=model_options, **filled)
        if resolved.missing():
            raise ConfigError(f"recipe {self.recipe!r} leaves {', '.join(resolved.missing())} open; set them")
        return resolved

    def built_defense(self) -> Defense:
        """Return the defense with its options, which has accepted all settings.

        Raises:
            UnknownNameError: it has no such option.
            ConfigError: an option or a setting makes no sense with it.
        """
        from learn2perturb.defenses import build_defense

        config = self.resolve()
        defense = build_defense(config.defense, config.options)
        defense.check(config.closed())
        return defense

    def to_dict(self) -> dict[str, Any]:
        """Return the config as plain values."""
        return asdict(self)

    def deciding(self) -> dict[str, Any]:
        """Return the settings as plain values, those that came later only where they change the training."""
        neutral = later_settings() | {item.name: _default(item) for item in fields(self) if item.name in LATER}
        values = self.to_dict() | {"dataset_options": which_images(self.dataset_options)}
        return {key: value for key, value in values.items() if key not in neutral or value != neutral[key]}

    def describe(self) -> str:
        """Return one line: what is trained on what, and by which recipe."""
        return f"{self.defense} | {self.model} | {self.dataset} | recipe {self.recipe} | seed {self.seed}"


def which_images(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a data set that say which images it has."""
    return {key: value for key, value in options.items() if key not in _PLACES}


def _default(item: Field[Any]) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


def _check(holds: bool, name: str, config: TrainConfig, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{name} is {getattr(config, name)!r}; it must be {allowed}")


@lru_cache
def _recipe_text(name: str) -> str:
    return (resources.files("learn2perturb.training") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")


@lru_cache  # a study resolves hundreds of configs
def _parsed(text: str) -> dict[str, Any]:
    import yaml  # not before a recipe is read: --help waits for none

    recipe: dict[str, Any] = yaml.safe_load(text)
    return recipe


def load_recipe(name: str) -> dict[str, Any]:
    """Return the recipe ``name``: ``settings`` for all, and ``defenses`` with what is special to one.

    A recipe that ``extends`` another says what differs from it, key by key; lists and numbers are replaced whole.

    Raises:
        UnknownNameError: there is no such recipe.
    """
    if name not in RECIPES:
        raise UnknownNameError.of("recipe", name, RECIPES)
    recipe = deepcopy(_parsed(_recipe_text(name)))
    base = recipe.pop("extends", None)
    return recipe if base is None else _extended(load_recipe(base), recipe)


def _extended(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return ``base`` with ``changes``, mappings merged at every depth."""
    merged = dict(base)
    for key, value in changes.items():
        own = merged.get(key)
        merged[key] = _extended(own, value) if isinstance(own, dict) and isinstance(value, dict) else value
    return merged


def read_config(path: Path) -> dict[str, Any]:
    """Read a YAML file of settings into plain values, safely.

    Raises:
        ConfigError: the file cannot be read, or is not a mapping.
    """
    with reading(f"config {str(path)!r} cannot be read", "give a YAML file", ConfigError):
        text = read_bytes(path, MOST_SETTINGS).decode()
    with reading(f"config {str(path)!r} is no YAML of plain values", "fix the file", ConfigError):
        values = parse_yaml(text)
    if not isinstance(values, dict):
        raise ConfigError(f"config {str(path)!r} holds a {type(values).__name__}; it must hold settings, one a line")
    return values
