"""What the file of a trained network says that others go by: its data set, the size it was trained for, its predictor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from learn2perturb.errors import CheckpointError, ConfigError, DataError
from learn2perturb.sizes import usual_eps

if TYPE_CHECKING:
    from learn2perturb.data import ImageData

# settings of a training that others use -> their types
_USED: dict[str, Any] = {
    "eps": (int, float), "dataset": str, "data_dir": str, "validation": (int, float), "seed": int,
    "dataset_options": dict, "norm": str,
}  # fmt: skip


def settings_of(header: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the settings that a network was trained with and the data set it was trained on; empty where not said.

    Raises:
        CheckpointError: a setting that others use is of another type than it is written with.
    """
    config = header.get("config")
    settings: dict[str, Any] = {**config} if isinstance(config, dict) else {}
    settings["dataset"] = header.get("dataset", settings.get("dataset"))
    for key, kind in _USED.items():
        if not (settings.get(key) is None or isinstance(settings[key], kind)):
            raise CheckpointError(f"{name} is damaged: its setting {key} is {settings[key]!r}; use another checkpoint")
    return settings


def own_norm(settings: Mapping[str, Any]) -> str:
    """Return the norm of the adversary that a network was trained against, l_inf where its settings do not say."""
    return str(settings.get("norm") or "linf")


def own_eps(settings: Mapping[str, Any], norm: str = "linf") -> float:
    """Return the size in ``norm`` that a network was trained for; where that was in no such norm, the usual one.

    Raises:
        ConfigError: the norm has no usual size.
    """
    eps = settings.get("eps") if own_norm(settings) == norm else None
    return float(eps or usual_eps(norm))


def own_predictor(header: Mapping[str, Any]) -> tuple[str, int | None]:
    """Return how the defense of a network predicts, and of how many passes; ``single`` where its file does not say."""
    return header.get("predictor") or "single", header.get("members")


def options_of(settings: Mapping[str, Any], dataset: str | None) -> dict[str, Any]:
    """Return the options that a data set was trained on with; none where the training was on another."""
    return dict(settings.get("dataset_options") or {}) if dataset == settings.get("dataset") else {}


def images_of(
    settings: Mapping[str, Any],
    name: str,
    *,
    dataset: str | None = None,
    root: str | None = None,
    split: str = "test",
    download: bool = False,
    options: Mapping[str, Any] | None = None,
) -> ImageData:
    """Return the images of a split, by default of the data set that a network was trained on, with its options.

    Raises:
        ConfigError: no data set is known, or the training held out no validation images.
    """
    from learn2perturb.data import load_data

    dataset = dataset or settings.get("dataset")
    options = {**options_of(settings, dataset), **(options or {})}
    if not dataset:
        raise ConfigError(f"{name} was trained on data that have no name here; give a registered data set: --dataset NAME")
    root = root or settings.get("data_dir")
    if split != "validation":
        return load_data(dataset, split, root=root, download=download, **options)
    share = settings.get("validation")
    if not share:
        raise ConfigError(
            f"{name} held out no validation images; use --split test, or train with a share of them (--validation 0.1)"
        )
    held_out = load_data(dataset, "train", root=root, download=download, **options)
    return held_out.split(float(share), int(settings.get("seed") or 0))[1]


def check_images(data: ImageData, header: Mapping[str, Any], name: str) -> None:
    """Refuse images that a network was not trained for.

    Raises:
        DataError: they have another shape or other classes than the network was trained on.
    """
    from learn2perturb.data import class_difference

    shape, trained = header.get("input_shape"), header.get("classes")
    if shape and tuple(shape) != tuple(data.input_shape):
        raise DataError(
            f"{name} was trained on images {tuple(shape)} and {data.name} has {tuple(data.input_shape)}; give the data "
            f"set {header.get('dataset') or 'of its training'}"
        )
    differ = class_difference(trained, data.classes) if isinstance(trained, list) else None
    if differ is not None:
        raise DataError(f"{name} was trained on other classes than {data.name}: {differ}; give its own images")
