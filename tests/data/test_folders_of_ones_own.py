"""Folders of images with a table of labels, decoded once on disk, and augmented by transforms of anybody's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from learn2perturb.cli.main import main
from learn2perturb.data import decoded, load_data, make_source
from learn2perturb.data.transforms import Transforms
from learn2perturb.errors import ConfigError, DataError, InputError
from learn2perturb.evaluation import evaluate
from learn2perturb.runs import load
from learn2perturb.training import TrainConfig, train

COUNT = 12


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """Twelve grey images of two classes in each split, in folders of classes; and the working folder."""
    for split in ("train", "test"):
        for number in range(COUNT):
            place = tmp_path / "images" / split / ("dark", "bright")[number % 2]
            place.mkdir(parents=True, exist_ok=True)
            image = Image.new("L", (8, 8), 180 * (number % 2) + number)
            image.putpixel((number % 8, 3), 255)
            image.save(place / f"{number:02}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "images"


def files(root: Path, split: str) -> list[Path]:
    return sorted((root / split).rglob("*.png"))


def table(root: Path, *, splits=("train", "test"), head="file,label,split") -> str:
    """Write a table of all files that says the classes which their folders say; return its text."""
    lines = [head]
    for split in splits:
        lines += [f"{path.relative_to(root)},{path.parent.name},{split}" for path in files(root, split)]
    return "\n".join(lines) + "\n"


# --- a table of labels


def test_a_table_says_what_folders_of_classes_say(root):
    (root / "labels.csv").write_text("\ufeff" + table(root), encoding="utf-8")
    for split in ("train", "test"):
        folders, listed = (load_data("folder", split, root=root, **how) for how in ({}, {"labels": "labels.csv"}))
        assert listed.classes == folders.classes == ("bright", "dark")
        assert torch.equal(listed.images, folders.images)
        assert torch.equal(listed.labels, folders.labels)
        assert (listed.mean, listed.std, listed.whole) == (folders.mean, folders.std, split)


def test_a_table_in_the_folder_of_each_split_and_numbers_for_classes(root):
    for split in ("train", "test"):
        names = [path.relative_to(root / split) for path in files(root, split)]
        lines = [f"{name},{(2, 10)[name.parent.name == 'dark']}" for name in names]
        (root / split / "metadata.csv").write_text("file_name,label\n" + "\n".join(lines[::-1]))
    data = load_data("folder", "test", root=root, labels="metadata.csv")
    assert data.classes == ("2", "10")  # in the order of numbers
    assert data.labels.tolist() == [1] * 6 + [0] * 6  # in the order of the table
    assert len(data) == COUNT


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "labels.csv cannot be read: No such file or directory; give a CSV file with columns file,label"),
        ("", r"has the columns \(none\); its first line must name file,label,split"),
        ("picture,label,split\n", "has the columns picture,label,split; its first line must name file,label,split"),
        ("file,label\n", "has the columns file,label; its first line must name file,label,split"),
        ("file;label;split\n", "has the columns file;label;split; its first line"),
        ("file,label,split\ntrain/dark/00.png,dark\n", "line 2: it has 2 columns and the first line 3"),
        ("file,label,split\ntrain/dark/00.png,,train\n", "line 2: it has no label; fill it in"),
        ("file,label,split\n,dark,train\n", "line 2: it has no file; fill it in"),
        ("file,label,split\ntrain/dark/00.png,dark,valid\n", "split is 'valid'; write train or test"),
        ("file,label,split\ntrain/dark/99.png,dark,train\n", "line 2: there is no file .*99.png"),
        ("file,label,split\n" + "train/dark/00.png,dark,train\n" * 2, "line 3: train/dark/00.png is listed twice"),
        ("file,label,split\ntrain/dark/00.png,dark,test\n", "lists no image of split train"),
        ("file,label,split\ntrain/dark/00.png,dark,train\ntest/dark/00.png,pale,test\n", "class 'pale' is not among"),
        ("file,label,split\n\0\xff", "labels.csv"),
    ],
)
def test_a_table_that_is_wrong_is_refused_in_one_line(root, text, message):
    if text is not None:
        (root / "labels.csv").write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=message) as caught:
        load_data("folder", "test", root=root, labels="labels.csv")
    assert "\n" not in str(caught.value)


def test_labels_and_cache_that_are_no_paths_are_refused(root):
    (root / "a_file").touch()
    for how, message in (
        ({"labels": 3}, "labels is 3; give the path of a CSV table"),
        ({"cache": 3}, "cache is 3; give a folder"),
        ({"cache": str(root / "a_file")}, "is no folder; give a folder for decoded images"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_data("folder", root=root, **how)


# --- decoded once, on disk


@pytest.mark.parametrize("colour", [False, True])
def test_what_is_decoded_on_disk_is_what_is_decoded_in_memory(root, colour):
    if colour:
        Image.new("RGB", (8, 8), (9, 99, 199)).save(files(root, "train")[3])
    for split in ("train", "test"):
        here, there = (load_data("folder", split, root=root, **how) for how in ({}, {"cache": "decoded", "size": 8}))
        assert torch.equal(there.images, here.images)
        assert (there.mean, there.std, there.labels.tolist()) == (here.mean, here.std, here.labels.tolist())
        assert there.cache == Path("decoded")
    parts = [(*data.split(0.25, 3), data.take(5)) for data in (here, there)]
    for mine, whole in zip(*parts, strict=True):
        assert torch.equal(mine.images, whole.images)
    assert len(list(Path("decoded").glob("*.images"))) == 2
    assert not list(Path("decoded").glob("*.tmp"))


def test_images_are_decoded_once_and_again_where_a_file_changes(root, monkeypatch):
    reads = []
    read = decoded.read_image
    monkeypatch.setattr(decoded, "read_image", lambda path, size: reads.append(path) or read(path, size))
    first = load_data("folder", root=root, cache="decoded")
    first.images[0] = 0  # stays with who wrote it
    assert len(reads) == COUNT
    again = load_data("folder", root=root, cache="decoded")
    assert len(reads) == COUNT
    assert again.images[0].max() == 255
    Image.new("L", (8, 8), 77).save(files(root, "train")[0])
    assert load_data("folder", root=root, cache="decoded").images[0].unique().tolist() == [77]
    for path in Path("decoded").glob("*.images"):  # cut off, as by a full disk
        path.write_bytes(path.read_bytes()[:-1])
    before = len(reads)
    assert load_data("folder", root=root, cache="decoded").images[0].unique().tolist() == [77]
    assert len(reads) == before + COUNT


def test_a_set_larger_than_the_memory_is_refused_with_the_way_out(root, monkeypatch):
    meminfo = root / "meminfo"
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable: 1 kB\n")
    monkeypatch.setattr(decoded, "_MEMORY", meminfo)
    with pytest.raises(
        DataError, match=r"12 decoded images need .* keep them decoded on disk, --dataset-options.cache"
    ):
        load_data("folder", root=root)
    assert len(load_data("folder", root=root, cache="decoded")) == COUNT
    monkeypatch.setattr(decoded, "_MEMORY", root / "nowhere")
    assert len(load_data("folder", root=root)) == COUNT


def test_a_cache_that_cannot_be_written_is_one_line(root, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(decoded.os, "replace", full)
    with pytest.raises(DataError, match=r"cannot be written \(No space left on device\); give another place"):
        load_data("folder", root=root, cache="decoded")
    assert not list(Path("decoded").iterdir())


# --- transforms


def test_a_batch_is_a_function_of_seed_epoch_and_batch(root, monkeypatch):
    Path("mine_of_transforms.py").write_text(
        "import random, torch\nimport numpy as np\n"
        "def noisy(image):\n"
        "    assert image.dtype == torch.uint8\n"
        "    image[0, 0, 0] = random.randint(0, 255)\n"  # in place: does not reach the set
        "    draw = torch.rand(image.shape) * np.random.rand()\n"
        "    return ((image / 255 + draw) / 2)\n"
    )
    monkeypatch.delitem(sys.modules, "mine_of_transforms", raising=False)
    data = load_data("folder", root=root)
    before = data.images.clone()
    of = lambda seed: make_source(data, batch_size=5, seed=seed, transforms=Transforms("mine_of_transforms:noisy"))  # noqa: E731
    state = torch.get_rng_state()
    batches = list(of(1).epoch(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(data.images, before)
    assert torch.equal(next(iter(of(1).epoch(2, start=1)))[0], batches[1][0])  # whether or not those before were read
    for other in (next(iter(of(2).epoch(2)))[0], next(iter(of(1).epoch(3)))[0]):
        assert not torch.equal(other, batches[0][0])
    assert len({tuple(image.flatten().tolist()) for image in batches[0][0]}) == 5  # each image draws for itself


def bad(kind):
    return {
        "shape": lambda image: image[:, :4],
        "type": lambda image: image.long(),
        "range": lambda image: image * 2.0,
        "nothing": lambda image: None,
        "error": lambda image: 1 / 0,
    }[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("shape", r"makes an image \(1, 8, 8\) one of \(1, 4, 8\); it must keep the shape"),
        ("type", "gives torch.int64 outside"),
        ("range", "gives torch.float32 outside"),
        ("nothing", "gives a NoneType; it must give a tensor"),
        ("error", r"failed on an image \(1, 8, 8\): division by zero"),
    ],
)
def test_what_a_transform_gives_is_checked(root, kind, message):
    transforms = Transforms("os:getcwd")
    object.__setattr__(transforms, "steps", (("mine", bad(kind)),))
    with pytest.raises(InputError, match=message):
        transforms(load_data("folder", root=root).images[:1], 0)


def test_names_and_settings_of_transforms_are_checked_before_any_work(root):
    for text, kind, message in (
        ("", ConfigError, "transforms is ''"),
        (3, ConfigError, "transforms is 3"),
        ("nowhere_at_all:function", ConfigError, "No module named"),
        ("os:nothing", ConfigError, "transform os:nothing: AttributeError"),
        ("os:sep", ConfigError, "is a str; name a function of an image"),
    ):
        with pytest.raises(kind, match=message):
            Transforms(text)
    config = TrainConfig(dataset="digits", model="digits_cnn", recipe="fast", epochs=1, transforms="os:getcwd")
    with pytest.raises(ConfigError, match="transforms 'os:getcwd' are for data sets by name; data of yours"):
        train(config, data=(torch.rand(4, 1, 8, 8), torch.arange(4)), progress=False)


# --- all of it, in a run


def test_a_run_of_them_resumes_bit_for_bit_and_is_judged_on_them(root, monkeypatch, capsys):
    Path("my_shift.py").write_text("import torch\ndef shift(image): return image.roll(int(torch.randint(3, ())), 2)\n")
    monkeypatch.delitem(sys.modules, "my_shift", raising=False)
    (root / "labels.csv").write_text(table(root))

    def run(out, epochs, **changes):
        config = TrainConfig(
            **{
                "model": "digits_cnn", "defense": "none", "recipe": "fast", "epochs": epochs, "batch_size": 4,
                "dataset": "folder", "data_dir": str(root), "monitor": 0, "schedule": "constant", "tensorboard": False,
                "dataset_options": {"labels": "labels.csv", "cache": "decoded"}, "transforms": "my_shift:shift",
                "engine": "plain", "device": "cpu", "validation": 0.25, **changes,
            }
        )  # fmt: skip
        return train(config, out=out, progress=False)

    whole = run("whole", 2)
    run("parts", 1)
    parts = run("parts", 2, dataset_options={"labels": "labels.csv", "cache": "elsewhere"})  # only where, not which
    for key, value in whole.model.state_dict().items():
        assert torch.equal(parts.model.state_dict()[key], value), key
    plain = run("plain", 2, transforms=None)
    assert any(not torch.equal(plain.model.state_dict()[k], v) for k, v in whole.model.state_dict().items())
    test = load_data("folder", "test", root=root)
    assert evaluate(load("whole"), test, {}).rows[0].n == COUNT
    assert main(["evaluate", "whole", "--attacks", "none", "--draws", "2", "--limit", "4", "--device", "cpu"]) == 0
    assert main(["train", "--dataset", "folder", "--data-dir", str(root), "--transforms", "my_shift:gone"]) == 2
    assert "transform my_shift:gone: AttributeError" in capsys.readouterr().err
