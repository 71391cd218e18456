"""Kept images as pictures: PNG files of one image, of a difference made visible, of a whole row. Knows no torch."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from learn2perturb.evaluation.attacked import EACH, AttackedImages, AttackedRow, Pixels, eight_bits
from learn2perturb.records import atomic_write

_GREY, _COLOURS = 1, 3
_GAP, _SIDE = 2, 64  # of a sheet, in pixels: between its images, and the least side of one


def png(image: NDArray[np.uint8]) -> bytes:
    """Return a PNG file of an image (C, H, W); of other channels than 1 or 3 their mean, in grey."""
    from PIL import Image

    if len(image) not in (_GREY, _COLOURS):
        image = image.mean(axis=0, keepdims=True).round().astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(image[0] if len(image) == _GREY else np.moveaxis(image, 0, 2)).save(content, "PNG", optimize=True)
    return content.getvalue()


def amplification(clean: Pixels, adversarial: Pixels) -> int:
    """Return by what the differences are multiplied: the largest of all becomes the brightest or the darkest."""
    largest = float(np.abs(adversarial - clean).max(initial=0.0))
    return max(1, int(0.5 / largest)) if largest > 0 else 1


def difference(clean: Pixels, adversarial: Pixels, times: int) -> NDArray[np.uint8]:
    """Return what an attack has added, ``times`` as much, on grey: grey is no difference."""
    return eight_bits(0.5 + times * (adversarial - clean))


def sheet(images: AttackedImages, row: AttackedRow, each: int = EACH) -> bytes:
    """Return a PNG file of the first broken and held images of ``row``: clean, attacked, difference, side by side."""
    chosen = row.chosen(images.labels[images.places(row)], each)
    if not len(chosen.index):
        return png(np.full((1, _SIDE, _SIDE), 127, dtype=np.uint8))
    clean = images.clean[images.places(chosen)]
    times = amplification(clean, chosen.adversarial)
    kinds = eight_bits(clean), eight_bits(chosen.adversarial), difference(clean, chosen.adversarial, times)
    scale = -(-_SIDE // clean.shape[-1])
    lines = [np.concatenate([_framed(one, scale) for one in line], axis=2) for line in zip(*kinds, strict=True)]
    return png(np.concatenate(lines, axis=1))


def _framed(image: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    large = image.repeat(scale, axis=1).repeat(scale, axis=2)
    return np.pad(large, ((0, 0), (_GAP, _GAP), (_GAP, _GAP)), constant_values=255)


def save_sheets(images: AttackedImages, path: Path) -> list[Path]:
    """Write a sheet of each row beside the file ``path`` of all images; return where they are."""
    found: list[Path] = []
    for number, row in enumerate(images.rows):
        name = re.sub(r"[^\w.=+-]+", "-", row.label).strip("-.")[:80] or "row"
        found.append(atomic_write(path.with_name(f"{path.stem}-{number}-{name}.png"), sheet(images, row)))
    return found
