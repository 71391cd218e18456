"""Every kind of file that the package reads, damaged at random: a clean line, the same result, or a right fallback."""

from __future__ import annotations

import json
import lzma
import pathlib
import random
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from learn2perturb import records, zoo
from learn2perturb.data import load_data
from learn2perturb.errors import Learn2PerturbError
from learn2perturb.evaluation import compare
from learn2perturb.evaluation.comparing import Comparison
from learn2perturb.runs import load
from learn2perturb.training.config import read_config
from tests.laboratories import crash, fixtures, mutations, runs
from tests.laboratories.cases import Case, Outcome, of_error
from tests.laboratories.disk import Disk

Damage = Callable[[bytes, random.Random], tuple[bytes, str]]


@dataclass
class Kind:
    """A kind of file: where it lies, how it is damaged, and what is read from it in the end.

    ``read`` returns what must not change in silence. ``older`` is what a fallback may give instead, if it is said.
    ``other`` is what another result counts as: for formats without any checksum it is in the record of a run that other
    images, or settings, were used, and no reader can know more.
    """

    name: str
    disk: Disk
    files: tuple[str, ...]
    read: Callable[[pathlib.Path], Any] = field(repr=False)
    damages: tuple[Damage, ...] = (mutations.damaged_bytes,)
    older: Callable[[], Any] | None = None
    other: str = "silent other result"
    right: Any = None

    def case(self, number: int, seed: int) -> Case:
        """Return the case of a number: the same damage each time."""
        name = f"damage {self.name} {number} of seed {seed}"
        return Case(name, f"damage: {self.name}", lambda folder: self.judge(folder, random.Random(name)))

    def judge(self, folder: pathlib.Path, draw: random.Random) -> Outcome:
        """Damage one file in ``folder``, read, and compare."""
        path = draw.choice(self.files)
        content, how = draw.choice(self.damages)(self.disk.contents[path] or b"", draw)
        Disk({**self.disk.contents, path: content}).write(folder)
        how = f"{path.rsplit('/', 1)[-1]}: {how}"
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                found = self.read(folder)
            except Learn2PerturbError as error:
                return _line(str(error), how)
            except BaseException as error:
                return Outcome("traceback", f"{how}: {of_error(error).detail}")
        value, said = found if isinstance(found, tuple) else (found, " ".join(str(one.message) for one in told))
        if value == self.right:
            return Outcome("correct fallback" if "damaged" in said else "same result", how)
        if self.older is not None and "damaged" in said and value == self.older():
            return Outcome("correct fallback", how)
        return Outcome("said aloud" if "damaged file" in said else self.other, how)


def _line(text: str, how: str) -> Outcome:
    """Return what a refusal is worth: one line without control characters."""
    strange = [character for character in text if ord(character) < 32 and character not in "\t"]
    kind = "escape sequence" if strange else "clean line"
    return Outcome(kind, f"{how}: {text[:250]!r}")


# --- what is read


def resume(folder: pathlib.Path) -> Any:
    """Go on with the training in ``folder``; return its state and what was said."""
    code, text = runs.train(folder / "run")
    if code != 0:
        if "error: unexpected" in text:
            raise RuntimeError(text)
        raise Learn2PerturbError(text.strip().splitlines()[-1])
    return runs.trained_state(folder / "run"), text


def weights(path: str) -> Callable[[pathlib.Path], Any]:
    """Return a reader of a trained network, from a run folder or a file."""
    return lambda folder: runs.digest(load(folder / path).state_dict())


def record_of(cls: Any) -> Callable[[pathlib.Path], Any]:
    """Return a reader of a record: all that it says, and that it can be shown and compared."""

    def read(folder: pathlib.Path) -> Any:
        found = cls.load(folder / "record.json")
        str(found)
        if cls is fixtures.RECORDS["evaluation"]:
            str(compare(found, found))
        return json.loads(records.to_json(found))

    return read


def data_set(name: str, split: str = "test") -> Callable[[pathlib.Path], Any]:
    """Return a reader of a data set."""

    def read(folder: pathlib.Path) -> Any:
        data = load_data(name, split, root=folder)
        return runs.digest([data.images, data.labels, list(data.classes), list(data.mean), list(data.std)])

    return read


def from_zoo(folder: pathlib.Path) -> Any:
    """Load a network of the zoo, and its card."""
    with mock.patch.object(zoo, "FOLDER", folder):
        zoo.card("net")
        return runs.digest(load("zoo:net").state_dict())


# --- the kinds


def kinds(folder: pathlib.Path) -> list[Kind]:
    """Make everything that is damaged, in an empty folder; return the kinds with their right results."""
    (folder / "training").mkdir(parents=True)
    recording = crash.record(crash.TRAINING, folder / "training")
    found = _of_training(recording) + _of_records(folder / "training" / "run") + _of_data(folder / "data")
    for number, kind in enumerate(found):
        place = folder / f"right{number}"
        kind.disk.write(place)
        right = kind.read(place)
        kind.right = right[0] if isinstance(right, tuple) else right
    return found


def _of_training(recording: crash.Recording) -> list[Kind]:
    half = fixtures.half_trained(recording)
    newest = max(name for name in half.contents if name.endswith("model.safetensors")).rsplit("/", 1)[0]
    model, rest = half.contents[f"{newest}/model.safetensors"], f"{newest}/resume.pt"
    before = max(name for name in half.contents if name.endswith("model.safetensors") and newest not in name)
    lines = (mutations.damaged_bytes, mutations.damaged_lines)
    settings, packed = half.contents["run/config.yaml"], f"net/{zoo.WEIGHTS}"

    def older() -> Any:
        with tempfile.TemporaryDirectory() as folder:
            Disk({"older.safetensors": half.contents[before]}).write(pathlib.Path(folder))
            return weights("older.safetensors")(pathlib.Path(folder))

    return [
        Kind("weights, resumed", half, (f"{newest}/model.safetensors",), resume),
        Kind("weights, loaded", half, (f"{newest}/model.safetensors",), weights("run"), older=older),
        Kind("weights, a file", Disk({"net.safetensors": model}), ("net.safetensors",), weights("net.safetensors")),
        Kind("resume state", half, (rest,), resume),
        Kind("metrics.jsonl", half, ("run/metrics.jsonl",), resume, lines),
        Kind("config.yaml", half, ("run/config.yaml",), resume, (mutations.damaged_bytes, mutations.damaged_yaml)),
        Kind("environment.json", half, ("run/environment.json",), resume,
             (mutations.damaged_bytes, mutations.damaged_json)),
        Kind("settings of --config", Disk({"config.yaml": settings}), ("config.yaml",),
             lambda folder: read_config(folder / "config.yaml"),
             (mutations.damaged_bytes, mutations.damaged_yaml), other="seen in the record"),
        Kind("network of the zoo",
             Disk({packed: lzma.compress(model), "net/card.md": b"# net\n\nA card of 0.5 \xc2\xb1 0.1\n"}),
             (packed, "net/card.md"), from_zoo),
    ]  # fmt: skip


def _of_records(run: pathlib.Path) -> list[Kind]:
    classes = {**fixtures.RECORDS, "comparison": Comparison}
    return [
        Kind(f"record of {name}", Disk({"record.json": content}), ("record.json",), record_of(classes[name]),
             (mutations.damaged_bytes, mutations.damaged_json))
        for name, content in fixtures.records(run).items()
    ]  # fmt: skip


def _of_data(folder: pathlib.Path) -> list[Kind]:
    python = fixtures.disk_of(fixtures.cifar_python, folder / "python")
    binary = fixtures.disk_of(fixtures.cifar_binary, folder / "binary")
    archive = fixtures.disk_of(fixtures.cifar_archive, folder / "archive")
    png = fixtures.disk_of(fixtures.image_folder, folder / "png")
    jpeg = fixtures.disk_of(lambda place: fixtures.image_folder(place, "jpg"), folder / "jpeg")
    seen = "seen in the record"
    found = [
        Kind("CIFAR, not the official files, python", python,
             ("cifar-10-batches-py/test_batch", "cifar-10-batches-py/batches.meta"), data_set("cifar10"), other=seen),
        Kind("CIFAR, not the official files, binary", binary,
             ("cifar-10-batches-bin/test_batch.bin", "cifar-10-batches-bin/batches.meta.txt"), data_set("cifar10"),
             other=seen),
        Kind("CIFAR, an archive", archive, ("cifar-10-python.tar.gz",), data_set("cifar10")),
        Kind("image folder, PNG", png, tuple(name for name in png.contents if name.endswith("png")),
             data_set("folder", "train")),
        Kind("image folder, JPEG", jpeg, tuple(name for name in jpeg.contents if name.endswith("jpg")),
             data_set("folder", "train"), other=seen),
    ]  # fmt: skip
    if (root := fixtures.real_cifar()) is not None:
        names = ("cifar-10-batches-py/test_batch", "cifar-10-batches-py/batches.meta")
        real = Disk({name: (root / name).read_bytes() for name in names})
        found.append(Kind("CIFAR, the official files", real, names[:1], data_set("cifar10")))
    return found


def cases(folder: pathlib.Path, *, each: int, seed: int) -> list[Case]:
    """Return ``each`` cases of every kind."""
    return [kind.case(number, seed) for kind in kinds(folder) for number in range(each)]
