"""The run folder: what it says of the run in it, and a refusal to train into anything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml

from learn2perturb.errors import CheckpointError, ConfigError
from learn2perturb.reading import MOST_SETTINGS, parse_yaml, read_bytes, reading
from learn2perturb.records import atomic_write
from learn2perturb.runs import lock
from learn2perturb.runs.environment import environment
from learn2perturb.training.config import TrainConfig, which_images

# Where a resumed training may differ from what the run folder says: none of these change what is computed.
_FREE = ("device", "data_dir", "download", "checkpoint_minutes", "tensorboard", "loggers", "log_every")


SETTINGS, ENVIRONMENT, METRICS = "config.yaml", "environment.json", "metrics.jsonl"


def write_settings(out: Path, config: TrainConfig, device: torch.device, *, where: bool = True) -> None:
    """Write what a run is: its settings, and (``where``) the versions and the machine that make it."""
    atomic_write(out / SETTINGS, settings_text(config))
    if where:
        atomic_write(out / ENVIRONMENT, json.dumps(environment(device), indent=1))


def settings_text(config: TrainConfig) -> str:
    """Return the text of ``config.yaml``.

    Raises:
        ConfigError: a setting is no plain value.
    """
    try:
        return yaml.safe_dump(config.to_dict(), sort_keys=False)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"a setting is no plain value ({reason}); use numbers, text, lists and mappings") from None


def _read_back(config: TrainConfig) -> dict[str, Any]:
    """Return the settings as they read after a round trip through YAML: tuples are lists there."""
    settings: dict[str, Any] = yaml.safe_load(settings_text(config))
    return settings


def _compared(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings without what says where images lie."""
    options = settings.get("dataset_options")
    return settings | {"dataset_options": which_images(options)} if isinstance(options, dict) else settings


def _left_behind(path: Path) -> bool:
    """Tell whether ``path`` is what a training leaves that was killed before ``config.yaml`` was there."""
    return path.name == lock.NAME or (path.name.startswith(".config.yaml.") and path.suffix == ".tmp")


def _more(before: object, now: int | None) -> bool:
    """Tell whether a run is given more epochs than it was planned for, which it goes on to."""
    return isinstance(before, int) and now is not None and before < now


def check_folder(out: Path, config: TrainConfig) -> None:
    """Refuse to train into a folder that holds something else.

    Raises:
        ConfigError: it holds another run, or other files.
    """
    path = out / SETTINGS
    if path.exists():
        with reading(f"{path} cannot be read", "give another --out", CheckpointError):
            before = parse_yaml(read_bytes(path, MOST_SETTINGS).decode())
        if not isinstance(before, dict):
            raise CheckpointError(f"{path} holds no settings; give another --out")
        now = _compared(_read_back(config))
        # A setting that did not exist when the run was made was what its recipe leaves it at.
        usual = _read_back(TrainConfig(defense=config.defense, recipe=config.recipe).resolve())
        before = _compared({**usual, **before})
        differing = [key for key in now if key not in _FREE and now[key] != before.get(key)]
        if differing == ["epochs"] and _more(before.get("epochs"), config.epochs):
            return
        if differing:
            shown = ", ".join(f"{key} ({before.get(key)!r} there, {now[key]!r} now)" for key in differing[:4])
            raise ConfigError(f"{out} holds another run: {shown} differ; give another --out, or the same settings")
    elif out.exists() and (not out.is_dir() or any(not _left_behind(path) for path in out.iterdir())):
        raise ConfigError(f"{out} exists and is no run folder; give another --out so that nothing in it is lost")
