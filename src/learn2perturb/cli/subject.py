"""What a verb is about: a trained run, or any network by its name, and its images."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from learn2perturb.checks import fraction
from learn2perturb.cli.networks import add_network, build_named, settle_network, title_of
from learn2perturb.cli.options import add_mapping
from learn2perturb.errors import CheckpointError, ConfigError
from learn2perturb.naming import is_factory, made_by
from learn2perturb.reading import PACKED, starts_with
from learn2perturb.registry import DATASETS
from learn2perturb.runs.trained import check_images, images_of, own_eps, settings_of
from learn2perturb.sizes import LINF_EPS

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from learn2perturb.data import ImageData
    from learn2perturb.records import Saved

SPLITS = ("test", "train", "validation")
ASKED_NOTHING = "how long it takes depends on the black box, which a dry run asks nothing"
_LONGEST_NAME = 80  # characters of a file's name that are the network's


@final
@dataclass(frozen=True, eq=False)
class Subject:
    """A model in eval mode, its images, the size it was trained for, and where records of it go."""

    name: str
    model: Callable[[Tensor], Tensor]
    data: ImageData
    eps: float
    config: Mapping[str, Any]
    folder: Path
    header: Mapping[str, Any] = field(default_factory=dict)


def add_subject(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a model and its images."""
    add_network(parser)
    add = parser.add_argument
    add(
        "--black-box", action="store_true",
        help="module:function is of numpy arrays: images (N, C, H, W) to logits, probabilities or labels",
    )  # fmt: skip
    add(
        "--queries-per-second", metavar="X",
        help="ask the black box about so many images a second at most, on average",
    )  # fmt: skip
    add_images(parser)


def add_images(parser: argparse.ArgumentParser) -> None:
    """Add the options that name the images and the device."""
    add = parser.add_argument
    add("--dataset", metavar="NAME", help="registered data set (default: the run's)")
    add("--data-dir", metavar="DIR", help="folder of the data sets (default: the run's)")
    add_mapping(
        parser, "--dataset-options",
        help="options of the data set: --dataset-options.size 64, .labels FILE.csv, .cache DIR (default: the run's)",
    )  # fmt: skip
    add("--split", default="test", metavar="NAME", help="test, train, or validation (what the run held out)")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps")


def check_subject(arguments: argparse.Namespace) -> None:
    """Refuse what can be refused before torch is imported.

    Raises:
        ConfigError: no network, an unknown split or data set, a network by name without a data set, or a black box
            that is none.
    """
    settle_network(arguments)
    black_box, rate = getattr(arguments, "black_box", False), getattr(arguments, "queries_per_second", None)
    if black_box and not is_factory(arguments.run):
        raise ConfigError(f"--black-box is for a function of arrays, and {arguments.run} is none; give module:function")
    if rate is not None and not black_box:
        raise ConfigError("--queries-per-second is for a function of arrays; give --black-box too")
    if arguments.split not in SPLITS:
        raise ConfigError(f"split is {arguments.split!r}; allowed: {', '.join(SPLITS)}")
    if arguments.dataset is not None:
        DATASETS.entry(arguments.dataset)
    elif arguments.named:
        raise ConfigError(
            f"{arguments.run} is the name of a network, which says nothing of images; give --dataset NAME"
        )


def load_subject(arguments: argparse.Namespace) -> Subject:
    """Load the model and its images, after :func:`check_subject`.

    Raises:
        CheckpointError: there is no such run.
        ConfigError: the factory cannot be imported or called, or no data set is known.
        DataError: the images do not fit the model.
    """
    from learn2perturb.engine.devices import choose_device
    from learn2perturb.runs.loading import load

    device = choose_device(arguments.device)
    if arguments.named:
        data = _images(arguments, {})
        if getattr(arguments, "black_box", False):
            model = _black_box(arguments.run, arguments.queries_per_second, data.num_classes)
        else:
            model = build_named(arguments, data.num_classes, data.input_shape)
        if hasattr(model, "to"):
            model = model.to(device)
        return Subject(title_of(arguments), model, data, LINF_EPS, {}, Path("evaluation"))
    header, config = read_run(arguments.run)
    data = fitting_images(arguments, header, config)
    own = None if arguments.model is None else build_named(arguments, data.num_classes, data.input_shape)
    model = load(arguments.run, model=own).to(device)
    return Subject(str(arguments.run), model, data, own_eps(config), config, records_of(arguments.run), header)


def read_run(run: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the header of a trained network, and the settings in it with the data set it was trained on.

    Raises:
        CheckpointError: there is no such run, or it is damaged.
    """
    from learn2perturb.runs.checkpoint import read_model
    from learn2perturb.runs.files import locate

    header = read_model(locate(run))[1]
    return header, settings_of(header, run)


def records_of(run: str) -> Path:
    """Return the folder that records of a run go to."""
    return (Path(run) if Path(run).is_dir() else Path()) / "evaluation"


def fitting_images(arguments: argparse.Namespace, header: Mapping[str, Any], config: Mapping[str, Any]) -> ImageData:
    """Load the images that are asked for, as the network of ``header`` takes them.

    Raises:
        ConfigError: no data set is known, or no validation images were held out.
        DataError: they have another shape or other classes than the network was trained on.
    """
    data = _images(arguments, config)
    check_images(data, header, arguments.run)
    return data


def _images(arguments: argparse.Namespace, settings: Mapping[str, Any]) -> ImageData:
    return images_of(
        settings, arguments.run, dataset=arguments.dataset, root=arguments.data_dir, split=arguments.split,
        options=arguments.dataset_options,
    )  # fmt: skip


def _black_box(factory: str, rate: str | None, num_classes: int) -> Any:
    """Return the function of arrays ``module:function``, or the one that this gives, as a model."""
    from learn2perturb.evaluation import black_box

    per_second = None if rate is None else fraction(rate)
    return black_box(made_by(factory, itself=True), num_classes=num_classes, queries_per_second=per_second)


def is_record(path: Path, kind: str) -> bool:
    """Tell whether a file begins as a record of ``kind`` does: ``evaluation``, ``certification``, ``diagnosis``."""
    return f'"learn2perturb.{kind}"' in starts_with(path, 200).decode(errors="replace")


def new_record(arguments: argparse.Namespace, folder: Path, kind: str) -> Path:
    """Return where a record goes: ``--out``, else a name in ``folder`` that does not exist yet.

    Raises:
        ConfigError: ``--out`` is a folder.
        CheckpointError: ``--out`` exists and is no record of ours.
    """
    if arguments.out:
        path = Path(arguments.out)
        if path.is_dir():
            raise ConfigError(f"--out {path} is a folder; give a file such as {path / (kind + '.json')}")
        if path.exists() and not is_record(path, kind):
            raise CheckpointError(f"{path} exists and is no {kind} record; give another --out so that it is not lost")
        return path
    return next(path for path in _names(arguments, folder, kind) if not path.exists())


def save_record(record: Saved, arguments: argparse.Namespace, folder: Path, kind: str) -> Path:
    """Save a record where :func:`new_record` says, and return where; of two at once each gets a name of its own.

    Raises:
        ConfigError, CheckpointError: as :func:`new_record`, or it cannot be written.
    """
    if arguments.out:
        return record.save(new_record(arguments, folder, kind))
    for path in _names(arguments, folder, kind):
        with contextlib.suppress(FileExistsError):
            return record.save(path, new=True)
    raise AssertionError("names have no end")


def _names(arguments: argparse.Namespace, folder: Path, kind: str) -> Iterator[Path]:
    """Yield names for a record: of which network, what, of which images, and a number after the first."""
    own = folder.name == kind  # what lies in RUN/evaluation is of RUN
    parts = [] if own and Path(arguments.run).is_dir() else [name_of(arguments.run)]
    parts += [] if own else [kind]
    parts += [arguments.split, *([f"limit{arguments.limit}"] if arguments.limit else []), f"seed{arguments.seed}"]
    yield folder / f"{'-'.join(parts)}.json"
    for number in itertools.count(2):
        yield folder / f"{'-'.join(parts)}-{number}.json"


def name_of(run: str) -> str:
    """Return what a file that is of a run, a file of weights or a factory may be called after."""
    found = Path(run).resolve().name if Path(run).exists() else run.rpartition("hf-hub:")[2].rpartition("zoo:")[2]
    found = found.removesuffix(PACKED).removesuffix(".safetensors")
    return re.sub(r"[^\w.=+-]+", "-", found)[:_LONGEST_NAME].strip("-.") or "model"
