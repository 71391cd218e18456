from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from learn2perturb.data import ImageData, load_data
from learn2perturb.errors import ConfigError, DataError, UnknownNameError


def test_digits_have_a_fixed_balanced_split() -> None:
    train, test = load_data("digits"), load_data("digits", "test")
    assert (len(train), len(test), train.input_shape, train.num_classes) == (1297, 500, (1, 8, 8), 10)
    assert torch.bincount(test.labels).tolist() == [50] * 10
    assert train.images.max() == 255 and len(train.images.unique()) == 17
    assert not train.flip and train.mean == test.mean
    pixels = train.images.double() / 255
    assert train.mean[0] == pytest.approx(float(pixels.mean()))
    assert train.std[0] == pytest.approx(float(pixels.std(correction=0)))


def test_split_is_balanced_disjoint_and_seeded() -> None:
    data = load_data("digits")
    rest, held = data.split(0.1, seed=3)
    assert len(rest) + len(held) == len(data) and set(torch.bincount(held.labels).tolist()) == {12, 13}
    assert torch.equal(held.images, data.split(0.1, seed=3)[1].images)
    assert not torch.equal(held.images, data.split(0.1, seed=4)[1].images)
    both = torch.cat([rest.images, held.images]).flatten(1).double() @ torch.arange(64).double()
    assert torch.equal(both.sort().values, (data.images.flatten(1).double() @ torch.arange(64).double()).sort().values)


def test_take_and_limit() -> None:
    data = load_data("digits", limit=7)
    assert len(data) == 7 and torch.equal(data.images, load_data("digits").take(7).images) and data.take(99) is data


@pytest.mark.parametrize("fraction", [0, 1, -0.1, "a", True, 1e-9, float("nan")])
def test_bad_fractions(fraction: object) -> None:
    with pytest.raises(ConfigError, match="fraction"):
        load_data("digits").split(fraction)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"name": "digit"}, UnknownNameError, "did you mean 'digits'"),
        ({"name": "digits", "split": "validation"}, ConfigError, "data.split"),
        ({"name": "digits", "limit": 0}, ConfigError, "limit 0"),
        ({"name": "digits", "size": 3}, ConfigError, "no option 'size'"),
        ({"name": "folder", "root": "/nowhere"}, DataError, "/nowhere"),
        ({"name": "folder", "size": 0}, ConfigError, "size 0"),
    ],
)
def test_bad_requests_give_one_clear_line(arguments: dict, error: type, words: str) -> None:
    with pytest.raises(error) as caught:
        load_data(**arguments)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (torch.rand(2, 1, 2, 2), torch.tensor([0, 1])),
        (torch.zeros(2, 2, 2, dtype=torch.uint8), torch.tensor([0, 1])),
        (torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 2])),
        (torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.tensor([0.0, 1.0])),
        (torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.tensor([0])),
    ],
)
def test_image_data_checks_itself(images: torch.Tensor, labels: torch.Tensor) -> None:
    with pytest.raises(DataError, match="'x'"):
        ImageData("x", images, labels, ("a", "b"), False, 0, (0.5,), (0.5,))


def write_image(path: Path, value: int, size: tuple[int, int] = (6, 4), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    Image.fromarray(np.full(shape, value, dtype=np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split in ("train", "test"):
        for label, name in enumerate(("cat", "dog")):
            for i in range(2):
                write_image(tmp_path / split / name / f"{i}.png", 100 * label + i)
    return tmp_path


def test_folder_is_read_in_order(folder: Path) -> None:
    data = load_data("folder", root=folder)
    assert data.classes == ("cat", "dog") and data.input_shape == (3, 4, 6) and data.labels.tolist() == [0, 0, 1, 1]
    assert data.images[:, 0, 0, 0].tolist() == [0, 1, 100, 101]
    assert data.mean[0] == pytest.approx(50.5 / 255)
    assert load_data("folder", "test", root=folder, size=8).input_shape == (3, 8, 8)


def test_grey_images_keep_one_channel_unless_mixed(folder: Path) -> None:
    write_image(folder / "train/cat/2.png", 7, mode="L")
    assert load_data("folder", root=folder).images[2].flatten().tolist() == [7] * 72
    for path in [*folder.rglob("*.png")]:
        write_image(path, 9, mode="L")
    assert load_data("folder", root=folder).input_shape == (1, 4, 6)


def test_folder_errors_name_the_file(folder: Path) -> None:
    write_image(folder / "train/dog/9.png", 1, size=(5, 5))
    with pytest.raises(DataError, match=r"9\.png is 5 x 5 .* size="):
        load_data("folder", root=folder)
    assert len(load_data("folder", root=folder, size=(4, 6))) == 5
    (folder / "train/dog/9.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"9\.png"):
        load_data("folder", root=folder)
    write_image(folder / "test/fox/1.png", 1)
    with pytest.raises(DataError, match="fox"):
        load_data("folder", "test", root=folder)
