"""One image file as 8-bit pixels: the right grey levels or a refusal, whatever its depth, palette or orientation."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from learn2perturb.errors import DataError

# Named, because Pillow would otherwise ask all of its readers, of which that of EPS starts Ghostscript.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000")
# Below Pillow's own bound, which first warns and can be switched off: some 200 MB of RGB.
MOST_PIXELS = 2**26
_BITS_PER_SAMPLE, _PHOTOMETRIC, _ORIENTATION, _WHITE_IS_ZERO = 258, 262, 274, 0


def read_image(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """Return the pixels of ``path``, uint8 (height, width, 1 or 3), upright, resized to ``size`` (height, width).

    16-bit grey levels are divided by 257, floats, which must lie in [0, 1], multiplied by 255. An image turned by its
    EXIF tag is turned. An alpha channel is dropped where it is opaque. A palette that is all grey gives one channel.

    Raises:
        DataError: it is no image of a known format, damaged, too large, or has pixels whose meaning is not known.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow warns of is refused, or does not touch the pixels
            with Image.open(path, formats=FORMATS) as opened:
                if opened.width * opened.height > MOST_PIXELS:
                    raise ValueError(f"it has {opened.width} x {opened.height} pixels, more than {MOST_PIXELS}")
                if getattr(opened, "tag_v2", {}).get(_ORIENTATION, 1) > 4:
                    # Pillow 13 reads the rows of an uncompressed one at the width of the turned image.
                    raise ValueError("it is a TIFF that is turned by its orientation tag; save it upright")
                image = ImageOps.exif_transpose(_in_eight_bits(opened))
            if size is not None:
                image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
            array = np.array(image, dtype=np.uint8)
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, its own bomb error
        reason = " ".join(str(error).split()).replace(str(path), "it")[:200] or type(error).__name__
        raise DataError(f"cannot read the image {path}: {reason}; replace or remove it") from error
    return array[:, :, None] if array.ndim == 2 else array


def _in_eight_bits(image: Any) -> Any:
    """Return a Pillow image as mode L or RGB.

    Raises:
        ValueError: its pixels have a meaning that is not known.
    """
    mode = image.mode
    if mode in ("P", "PA", "LA", "La", "RGBA", "RGBa") or (mode in ("L", "RGB") and "transparency" in image.info):
        return _opaque(image)
    if mode in ("1", "L"):
        return image.convert("L")
    if mode in ("RGB", "CMYK", "YCbCr"):
        return image.convert("RGB")
    if mode == "F" or mode.startswith("I"):
        return _deep(image)
    raise ValueError(f"its pixels are of mode {mode}; save it as grey or RGB")


def _opaque(image: Any) -> Any:
    """Return an image without its alpha channel; of a palette that is all grey, the grey levels."""
    grey, palette = image.mode in ("L", "LA", "La"), image.mode in ("P", "PA")
    whole = image.convert("RGBA")
    if whole.getextrema()[3][0] < 255:
        raise ValueError("it is transparent in places, and what lies behind is not known; save it on a background")
    whole = whole.convert("RGB")
    red, green, blue = whole.split()
    return red if grey or (palette and red.tobytes() == green.tobytes() == blue.tobytes()) else whole


def _deep(image: Any) -> Any:
    """Return an image of deep grey levels in eight bits, with what it says of its orientation."""
    from PIL import Image

    tags = getattr(image, "tag_v2", {})
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO or "transparency" in image.info:
        raise ValueError("its deep grey levels are inverted or transparent; save it as plain grey")
    array = np.asarray(image)
    if image.mode == "F":
        if not (array.min() >= 0 and array.max() <= 1):  # also true of NaN
            raise ValueError(f"its floats run from {array.min():.4g} to {array.max():.4g}; they must lie in [0, 1]")
        levels = array.astype(np.float64) * 255
    else:
        # 32-bit integers, where 16 bits are not all: what is white is not known. PNG and PGM say that they have 16.
        bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
        deep = image.mode.startswith("I;16") or image.format in ("PNG", "PPM")
        if not deep or bits > 16 or array.min() < 0 or array.max() >= 2**bits:
            raise ValueError(
                f"its integers are of mode {image.mode}, whose white is not known; save it with 8 or 16 bits"
            )
        levels = array.astype(np.float64) * (255 / (2**bits - 1))
    result = Image.fromarray(np.rint(levels).astype(np.uint8))
    result.info.update({key: image.info[key] for key in ("exif",) if key in image.info})
    result._exif = image.getexif()  # TIFF has its orientation among its tags
    return result
