from __future__ import annotations

import io
import stat
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from learn2perturb.data import load_data
from learn2perturb.data.images import MOST_PIXELS, read_image
from learn2perturb.errors import DataError

RAMP = np.linspace(0, 1, 64).reshape(8, 8)
BYTES = np.rint(RAMP * 255).astype(np.uint8)


def saved(image: Image.Image, path: Path, **settings: object) -> Path:
    image.save(path, **settings)  # type: ignore[arg-type]
    return path


def palette(colours: list[int]) -> Image.Image:
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).convert("P")
    image.putpalette(colours)
    return image


DEEP = {
    "uint16.png": lambda: Image.fromarray((RAMP * 65535).astype(np.uint16)),
    "uint16.tif": lambda: Image.fromarray((RAMP * 65535).astype(np.uint16)),
    "uint16.pgm": lambda: Image.fromarray((RAMP * 65535).astype(np.uint16)),
    "float.tif": lambda: Image.fromarray(RAMP.astype(np.float32)),
    "palette.png": lambda: palette([int(v) for v in BYTES.flatten() for _ in range(3)]),
    "opaque.png": lambda: Image.merge("LA", [Image.fromarray(BYTES), Image.new("L", (8, 8), 255)]),
    "plain.png": lambda: Image.fromarray(BYTES),
}


@pytest.mark.parametrize("name", DEEP)
def test_every_depth_keeps_its_grey_levels(name: str, tmp_path: Path) -> None:
    array = read_image(saved(DEEP[name](), tmp_path / name))
    assert array.shape == (8, 8, 1) and len(np.unique(array)) == 64
    assert abs(array[:, :, 0] / 255 - RAMP).max() < 1 / 255


REFUSED = {
    "int32.tif": (lambda: Image.fromarray((RAMP * 2**30).astype(np.int32)), "white is not known"),
    "bright.tif": (lambda: Image.fromarray((RAMP * 255).astype(np.float32)), "[0, 1]"),
    "nan.tif": (lambda: Image.fromarray((RAMP * np.nan).astype(np.float32)), "nan"),
    "alpha.png": (lambda: Image.fromarray(np.full((8, 8, 4), 100, np.uint8)), "background"),
    "lab.tif": (lambda: Image.new("LAB", (8, 8)), "mode LAB"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_pixels_of_unknown_meaning_are_refused(name: str, tmp_path: Path) -> None:
    make, words = REFUSED[name]
    with pytest.raises(DataError) as caught:
        read_image(saved(make(), tmp_path / name))
    assert words in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)


def test_a_transparent_palette_and_inverted_deep_grey_are_refused(tmp_path: Path) -> None:
    transparent = palette(list(range(192)) + [0] * 576)
    with pytest.raises(DataError, match="background"):
        read_image(saved(transparent, tmp_path / "p.png", transparency=3))
    path = saved(Image.fromarray((RAMP * 65535).astype(np.uint16)), tmp_path / "w.tif")
    content = path.read_bytes()
    black_is_zero, white_is_zero = (struct.pack("<HHII", 262, 3, 1, value) for value in (1, 0))
    assert content.count(black_is_zero) == 1
    path.write_bytes(content.replace(black_is_zero, white_is_zero))
    with pytest.raises(DataError, match="inverted"):
        read_image(path)


def test_a_colour_palette_stays_in_colour(tmp_path: Path) -> None:
    colours = [v for i in range(256) for v in (i, 255 - i, 7)]
    array = read_image(saved(palette(colours), tmp_path / "c.png"))
    assert array.shape == (8, 8, 3) and tuple(array[0, 5]) == (5, 250, 7)


@pytest.mark.parametrize("name", ["8.jpg", "8.png", "8.tif", "16.png", "16.tif"])
@pytest.mark.parametrize("turn", [3, 6, 8])
def test_what_exif_turns_is_upright(name: str, turn: int, tmp_path: Path) -> None:
    upright = np.zeros((8, 16), dtype=np.uint8)
    upright[:, 8:] = 255
    turned = np.rot90(upright, {3: 2, 6: 1, 8: -1}[turn]).copy()
    deep = turned.astype(np.uint16) * 257
    exif = Image.Exif()
    exif[274] = turn
    path = saved(Image.fromarray(deep if name.startswith("16") else turned), tmp_path / name, exif=exif)
    if name.endswith("tif") and turn > 4:  # which Pillow garbles
        with pytest.raises(DataError, match="save it upright"):
            read_image(path)
        return
    array = read_image(path)
    assert array.shape == (8, 16, 1) and abs(array[:, :, 0].astype(int) - upright).max() < 20


def png_of(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_bombs_and_damage_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(whole, "PNG")
    for name, content in {
        "bomb.png": png_of(2**14, MOST_PIXELS // 2**14 + 1),
        "cut.png": whole.getvalue()[:1000],
        "text.png": b"not an image",
        "empty.png": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name) as caught:
            read_image(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_no_helper_program_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker, helper = tmp_path / "ran", tmp_path / "gs"
    helper.write_text(f"#!/bin/sh\ntouch {marker}\n")
    helper.chmod(helper.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    folder = tmp_path / "data" / "train" / "a"
    folder.mkdir(parents=True)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    (folder / "0.png").write_bytes(eps)  # the name does not decide
    with pytest.raises(DataError, match=r"0\.png"):
        load_data("folder", "train", root=tmp_path / "data")
    assert not marker.exists()


def folder_of(root: Path, **sets: list[tuple[int, ...]]) -> Path:
    for split, shapes in sets.items():
        (root / split / "a").mkdir(parents=True)
        for number, shape in enumerate(shapes):
            Image.fromarray(np.full(shape, 9, np.uint8)).save(root / split / "a" / f"{number}.png")
    return root


def test_a_colour_test_image_of_a_grey_training_set_is_named(tmp_path: Path) -> None:
    root = folder_of(tmp_path, train=[(8, 8)], test=[(8, 8), (8, 8, 3)])
    with pytest.raises(DataError, match=r"1\.png is a colour image .* make it grey"):
        load_data("folder", "test", root=root, size=8)


def test_grey_test_images_of_a_colour_training_set_are_rgb(tmp_path: Path) -> None:
    root = folder_of(tmp_path, train=[(8, 8), (8, 8, 3)], test=[(8, 8)])
    data = load_data("folder", "test", root=root)
    assert data.input_shape == (3, 8, 8) and torch.equal(data.images, torch.full((1, 3, 8, 8), 9, dtype=torch.uint8))


def test_sizes_that_differ_between_the_splits_are_fixed_by_size(tmp_path: Path) -> None:
    root = folder_of(tmp_path, train=[(8, 8)], test=[(9, 8)])
    with pytest.raises(DataError, match="give size="):
        load_data("folder", "test", root=root)
    assert load_data("folder", "test", root=root, size=8).input_shape == (1, 8, 8)


def test_a_folder_in_a_class_is_not_left_out_quietly(tmp_path: Path) -> None:
    root = folder_of(tmp_path, train=[(8, 8)])
    (root / "train" / "a" / "more").mkdir()
    with pytest.raises(DataError, match="more is no file"):
        load_data("folder", "train", root=root)
