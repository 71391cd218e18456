"""Sources of transfer attacks that are trained: beside a run with its settings, or for a foreign model on its data."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learn2perturb.errors import ConfigError
from learn2perturb.training.config import TrainConfig

if TYPE_CHECKING:
    from learn2perturb.data import ImageData

FOLDER = "runs/sources"
# source -> how its training differs from that of the run
_BESIDE_A_RUN: dict[str, dict[str, Any]] = {
    "undefended": {"defense": "none", "options": {}},
    "pgd_at": {"defense": "pgd_at", "options": {}},
    "twin": {},
}
# A twin is a training of the same defense, which is not known of a foreign model.
DEFENSES = {"undefended": "none", "pgd_at": "pgd_at"}
_SMALL = 16  # pixels a side, up to which the network is the small one
# Images in all epochs: minutes for a ResNet-20 on two cores, and still a source that errs as such networks do.
_VISITS, _IMAGES, _EPOCHS = 40_000, 10_000, (4, 30)
_IDENTITY = ("defense", "model", "dataset", "recipe", "epochs", "limit", "eps", "seed")


def sources_of_run(
    run: Path, settings: Mapping[str, Any], given: Collection[str], *, device: str | None
) -> dict[str, Any]:
    """Train with the ``settings`` of ``run``, or load if that was done before, the sources that are not ``given``.

    Raises:
        ConfigError: ``run`` is no folder of a training.
    """
    from learn2perturb.training.loop import train

    if not run.is_dir() or not settings:
        raise ConfigError(f"--train-sources needs a run folder, which {run} is not; give --source NAME=RUN")
    config = TrainConfig.from_dict({**settings, "monitor": 0, "tensorboard": False})
    found = {}
    for name, changes in _BESIDE_A_RUN.items():
        same = changes.get("defense") == config.defense  # the twin is that already
        if name in given or same:
            continue
        # Another seed for all: a source that starts from the weights of the run would be more than a stranger.
        twin = replace(config, seed=config.seed + 1, **changes)
        found[name] = train(twin, out=run / "sources" / name).model.to(device)
    return found


def sources_on_data(
    dataset: str,
    root: str | None,
    eps: float,
    given: Collection[str],
    *,
    folder: str | None,
    device: str | None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train on the train split of ``dataset``, or load if that was done before, the sources that are not ``given``.

    Raises:
        DataError: there is no train split.
    """
    from learn2perturb.data import load_data
    from learn2perturb.training.loop import train

    data = load_data(dataset, "train", root=root, **(options or {}))
    found = {}
    for name, defense in DEFENSES.items():
        if name in given:
            continue
        config = replace(_config(data, dataset, root, defense, eps), dataset_options=dict(options or {}))
        place = Path(folder or FOLDER) / f"{dataset}-{name}-{_identity(data, config)}"
        found[name] = train(config, out=place).model.to(device)
    return found


def _config(data: ImageData, dataset: str, root: str | None, defense: str, eps: float) -> TrainConfig:
    images = min(len(data), _IMAGES)
    fewest, most = _EPOCHS
    small = max(data.input_shape[1:]) <= _SMALL
    return TrainConfig(
        defense=defense, model="digits_cnn" if small else "resnet20", dataset=dataset, data_dir=root, recipe="fast",
        epochs=min(max(_VISITS // images, fewest), most), limit=images, eps=eps, monitor=0, tensorboard=False,
    )  # fmt: skip


def _identity(data: ImageData, config: TrainConfig) -> str:
    """Return 16 digits that follow from the images and from what the training follows from."""
    from learn2perturb.engine.identity import fingerprint_of_images
    from learn2perturb.engine.random import derive_seed

    settings = {name: getattr(config, name) for name in _IDENTITY}
    images = fingerprint_of_images(data.images, data.labels)
    return f"{derive_seed(images, json.dumps(settings, sort_keys=True)):016x}"
