"""Hostile data sets: code and bombs in pickles, lying images, archives that point outside."""

from __future__ import annotations

import io
import os
import pathlib
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from tests.laboratories import fixtures
from tests.laboratories.hostile_parts import SMALL, TOUCH, Build, Runs, doubling


def every() -> Iterator[tuple[str, Build]]:
    """Yield (name, builder)."""
    for name, content in _pickles():
        yield f"CIFAR pickle: {name}", _cifar(content)
    for name, content in _images():
        yield f"image: {name}", _image(content)
    for name, fill in _archives():
        yield f"archive: {name}", _archive(fill)


# --- pickles


def _pickles() -> Iterator[tuple[str, bytes]]:
    yield "os.system", pickle.dumps(Runs(os.system, TOUCH), 2)
    yield "eval", pickle.dumps(Runs(eval, "__import__('os').system('touch canary')"), 2)
    yield "exec", pickle.dumps({b"data": Runs(exec, "import os; os.system('touch canary')")}, 2)
    yield "posix.system by name", b"cposix\nsystem\n(S'touch canary'\ntR."
    yield "attribute of an allowed name", b"\x80\x04\x8c\x05numpy\x8c\x0fdtype.__class__\x93."
    yield "builtins.getattr", b"cbuiltins\ngetattr\n(cnumpy\ndtype\nS'__init__'\ntR."
    yield "numpy loads", b"cnumpy\nload\n(S'x.npy'\ntR."
    yield "codecs of another name", b"c_codecs\ndecode\n(S'touch canary'\nS'rot13'\ntR."
    yield "encode with another codec", b"c_codecs\nencode\n(S'x'\nS'zip'\ntR."
    yield "extension registry", b"\x82\x01."
    yield "persistent id", b"Pevil\n."
    yield "empty", b""
    yield "only a stop", b"."
    yield "stack underflow", b"0000."
    yield "no stop", b"\x80\x02}"
    yield "protocol 99", b"\x80\x63."
    yield "memo of nothing", b"h\x05."
    yield "length beyond the file", b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"x."
    yield "length of 3 GB", b"\x80\x04B" + struct.pack("<I", 3 << 30) + b"x."
    yield "frame of 2**60", b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"."
    yield "memo index of 2**31", b"\x80\x02]r" + struct.pack("<I", (1 << 31) - 1) + b"."
    yield "integer of 10**7 digits", b"I" + b"9" * 10**7 + b"\n."
    yield "long of 1 MB", b"\x80\x02\x8b" + struct.pack("<i", 1 << 20) + b"\x7f" * (1 << 20) + b"."
    yield "a million lists deep", b"\x80\x02" + b"]" * 10**6 + b"a" * (10**6 - 1) + b"."
    yield "tuples that double", doubling(60)
    yield "tuples that double, as a key", doubling(28, key=True)
    yield "a dict of itself", b"\x80\x02}q\x00h\x00h\x00s."
    yield "a list in itself", b"\x80\x02]q\x00h\x00a."
    yield "array of objects", b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR."
    yield "shape of 10**18", _array_pickle((10**9, 3072), b"x")
    yield "negative shape", _array_pickle((-1, 3072), b"")
    yield "shape of texts", _array_pickle(("a", 3072), b"")
    yield "no images", _array_pickle((0, 3072), b"")
    yield "labels of objects", pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [None]}, 2)
    yield "labels beyond", pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10**30]}, 2)
    yield "a key of bytes that are no text", pickle.dumps({b"\xff\xfe": 1}, 2)
    yield "a text that escapes", pickle.dumps({b"\x1b[31m": "\x1b[2J"}, 2)
    yield "asks for a name that escapes", b"c\x1b[31m\nevil\n."


def _array_pickle(shape: tuple[object, ...], raw: bytes) -> bytes:
    items = b"".join(b"S'%s'\n" % item.encode() if isinstance(item, str) else b"L%dL\n" % item for item in shape)
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(" + items
        + b"tcnumpy\ndtype\n(S'u1'\nI0\nI1\ntRI00\nS'" + raw + b"'\ntb"
    )  # fmt: skip
    return b"}S'data'\n" + array + b"sS'labels'\n(lI1\nas."


def _cifar(content: bytes) -> Build:
    def build(folder: pathlib.Path) -> list[str]:
        fixtures.cifar_python(folder)
        (folder / "cifar-10-batches-py" / "test_batch").write_bytes(content)
        return ["evaluate", "run", "--dataset=cifar10", "--data-dir=.", *SMALL]

    return build


# --- images and archives


def _images() -> Iterator[tuple[str, bytes]]:
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 12 12\n%%EndComments\n(touch canary) system\nshowpage\n%%EOF\n"
    yield "EPS, which Pillow gives to Ghostscript", eps
    yield "EPS with a DOS header", struct.pack("<IIIIIIIH", 0xC6D3D0C5, 32, len(eps), 0, 0, 0, 0, 0) + b"\0\0" + eps
    yield "SVG", b"<svg xmlns='http://www.w3.org/2000/svg'><script>1</script></svg>"
    yield "PDF", b"%PDF-1.4\n1 0 obj <</OpenAction 2 0 R>>"
    yield "empty", b""
    yield "text", b"\x1b[31mred"
    for name in ("GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "ICO", "PCX"):
        yield f"{name}, cut", _encoded(name)[:-20]
    yield "PNG of 50,000 x 50,000", _png(50_000, 50_000, b"")
    yield "PNG of 2**31", _png((1 << 31) - 1, (1 << 31) - 1, b"")
    yield "PNG of 0 x 0", _png(0, 0, b"")
    yield "PNG of 8,000 x 8,000 zeros", _png(8_000, 8_000, zlib.compress(bytes(8_001 * 8_000), 9))
    yield "PNG with a bomb of a text", _png(12, 12, zlib.compress(bytes(13 * 12)), text=bytes(1 << 27))
    yield "PPM of 10**9 pixels", b"P6 100000 10000 255\n"
    header = struct.pack("<IHHIIiiHH", 54, 0, 0, 54, 40, 12, -(1 << 31), 1, 24)
    yield "BMP of negative height", b"BM" + header + bytes(30)
    yield "TIFF with a loop of directories", b"II*\0\x08\0\0\0\x00\0\x08\0\0\0"
    yield "GIF of 65,535 x 65,535", b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\xf0\0\0" + bytes(6) + b";"
    yield "WMF", b"\xd7\xcd\xc6\x9a" + bytes(60)
    yield "PSD", b"8BPS\0\1" + bytes(40)
    yield "FLI", bytes(4) + b"\x11\xaf" + bytes(122)
    yield "a tar", b"mine".ljust(512, b"\0")


def _encoded(name: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 12)).save(buffer, name)
    return buffer.getvalue()


def _png(width: int, height: int, data: bytes, text: bytes = b"") -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    parts = [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))]
    if text:
        parts.append(chunk(b"zTXt", b"k\0\0" + zlib.compress(text, 9)))
    return b"".join([*parts, chunk(b"IDAT", data), chunk(b"IEND", b"")])


def folder_words() -> list[str]:
    """Return the command that trains on the image folder ``images``."""
    words = ["--dataset=folder", "--data-dir=images", "--model=resnet20", "--epochs=1", "--batch-size=4", "--out=new"]
    return ["train", *words, "--limit=4", "--monitor=0", "--device=cpu", "--engine=plain", "--attack-steps=1"]


def _image(content: bytes) -> Build:
    def build(folder: pathlib.Path) -> list[str]:
        fixtures.image_folder(folder / "images")
        (folder / "images" / "train" / "cat" / "0.png").write_bytes(content)
        return folder_words()

    return build


def _archives() -> Iterator[tuple[str, Callable[[tarfile.TarFile], None]]]:
    def member(name: str, **changes: object) -> Callable[[tarfile.TarFile], None]:
        def add(tar: tarfile.TarFile) -> None:
            info = tarfile.TarInfo(name)
            for key, value in changes.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(b"x" * info.size))

        return add

    top = "cifar-10-batches-py"
    yield "a path upwards", member("../mine/notes.txt", size=1)
    yield "an absolute path", member("/tmp/canary-of-an-archive", size=1)
    yield "a link outside", member(f"{top}/test_batch", type=tarfile.SYMTYPE, linkname="../../mine/notes.txt")
    yield "a hard link outside", member(f"{top}/test_batch", type=tarfile.LNKTYPE, linkname="../mine/notes.txt")
    yield "a device", member(f"{top}/test_batch", type=tarfile.CHRTYPE)
    yield "a FIFO", member(f"{top}/test_batch", type=tarfile.FIFOTYPE)
    yield "escapes in a name", member("\x1b[31mred", size=1)
    yield "an empty folder", member(top, type=tarfile.DIRTYPE)
    yield "nothing", lambda tar: None


def _archive(fill: Callable[[tarfile.TarFile], None]) -> Build:
    def build(folder: pathlib.Path) -> list[str]:
        (folder / "data").mkdir()
        with tarfile.open(folder / "data" / "cifar-10-python.tar.gz", "w:gz") as tar:
            fill(tar)
        return ["evaluate", "run", "--dataset=cifar10", "--data-dir=data", *SMALL]

    return build
