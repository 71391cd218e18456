"""What is damaged: a run that stopped half-way, one that is done, its records, and data sets of a few images."""

from __future__ import annotations

import io
import os
import pathlib
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from learn2perturb.certification import Certification
from learn2perturb.data import load_data
from learn2perturb.diagnosis import Diagnosis, diagnose
from learn2perturb.diagnosis.budget import QUICK
from learn2perturb.evaluation import Evaluation, compare
from learn2perturb.runs import load
from tests.laboratories import crash, runs
from tests.laboratories.disk import Disk, after

TINY = replace(
    QUICK, name="tiny", images=6, some=6, scorings=2, eot=1, steps=2, sweep_eot=1, unbounded_steps=2, samples=2,
    judge_draws=2, eps_grid=(0.1, 0.2), draw_curve=(1, 4), step_curve=(1, 2), restarts=1, square_queries=4,
    square_draws=1, slope_images=2, slope_repeats=4,
)  # fmt: skip


def half_trained(recording: crash.Recording) -> Disk:
    """Return a run folder that was killed with two checkpoints, lines of an epoch, and two steps to go."""
    for count in range(len(recording.journal), 0, -1):
        if crash.promised_step(recording.journal[:count], "kill") == 6:
            return after(recording.journal, count)
    raise AssertionError("no checkpoint of step 6 was recorded")


def records(run: pathlib.Path) -> dict[str, bytes]:
    """Return one record of each kind, as bytes by name of the kind."""
    here = run.parent
    code, text = runs.command("evaluate", run, *runs.EVALUATE, "--out", here / "evaluation.json")
    assert code == 0, text
    code, text = runs.command(
        "certify", run, "--n=60", "--n0=10", "--limit=6", "--device=cpu", "--out", here / "certification.json"
    )
    assert code == 0, text
    network = load(run)
    digits = load_data("digits", "test", limit=6)
    diagnose(network, digits, budget=TINY, eps=0.1, engine="plain").save(here / "diagnosis.json")
    one = Evaluation.load(here / "evaluation.json")
    compare(one, one).save(here / "comparison.json")
    return {path.stem: path.read_bytes() for path in sorted(here.glob("*.json"))}


RECORDS: dict[str, type] = {"evaluation": Evaluation, "certification": Certification, "diagnosis": Diagnosis}


# --- data sets


def _numbers(seed: int, n: int) -> tuple[np.ndarray, list[int]]:
    draw = np.random.default_rng(seed)
    return draw.integers(0, 256, (n, 3072), dtype=np.uint8), [int(label) for label in draw.integers(0, 10, n)]


def cifar_python(folder: pathlib.Path, n: int = 4) -> None:
    """Write a CIFAR-10 of ``n`` images a file, in the python layout."""
    folder = folder / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for seed, name in enumerate([*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]):
        images, labels = _numbers(seed, n)
        content = {b"batch_label": b"a batch", b"labels": labels, b"data": images, b"filenames": [b"x.png"] * n}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    (folder / "batches.meta").write_bytes(
        pickle.dumps({b"label_names": [f"class{label}".encode() for label in range(10)]}, protocol=2)
    )


def cifar_binary(folder: pathlib.Path, n: int = 4) -> None:
    """Write a CIFAR-10 of ``n`` images a file, in the binary layout."""
    folder = folder / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for seed, name in enumerate([*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]):
        images, labels = _numbers(seed, n)
        rows = np.concatenate([np.array(labels, dtype=np.uint8)[:, None], images], axis=1)
        (folder / name).write_bytes(rows.tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(f"class{label}" for label in range(10)) + "\n")


def cifar_archive(folder: pathlib.Path) -> None:
    """Write the archive of the python layout."""
    folder.mkdir(parents=True)
    cifar_python(folder / "unpacked", n=2)
    with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as tar:
        tar.add(folder / "unpacked" / "cifar-10-batches-py", "cifar-10-batches-py")
    for path in sorted((folder / "unpacked").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (folder / "unpacked").rmdir()


def image_folder(folder: pathlib.Path, kind: str = "png") -> None:
    """Write ROOT/train/CLASS/* and ROOT/test/CLASS/*, two classes of two images each."""
    draw = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for number in range(2):
                pixels = draw.integers(0, 256, (12, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.{kind}")


def real_cifar() -> pathlib.Path | None:
    """Return the folder of the real CIFAR-10, if this machine has it."""
    root = pathlib.Path(os.environ.get("LEARN2PERTURB_DATA_DIR", "nowhere"))
    return root if (root / "cifar-10-batches-py" / "test_batch").is_file() else None


def disk_of(write: Callable[[pathlib.Path], None], folder: pathlib.Path) -> Disk:
    """Return what ``write`` puts into ``folder``."""
    write(folder)
    return Disk.read(folder)


def pickled(value: object) -> bytes:
    """Return a pickle, as ``torch.save`` would hide one."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
