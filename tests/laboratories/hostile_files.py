"""Every hostile file, and places that are no files: FIFOs, devices, loops, names that are terminal escapes."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Iterator

from tests.laboratories import fixtures, hostile_data, hostile_state
from tests.laboratories.hostile_data import folder_words
from tests.laboratories.hostile_parts import SMALL, Build, train_words


def every() -> Iterator[tuple[str, Build]]:
    """Yield (name, builder)."""
    yield from hostile_data.every()
    yield from hostile_state.every()
    yield from _odd_places()


def _odd_places() -> Iterator[tuple[str, Build]]:
    def fifo(folder: pathlib.Path, name: str) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    def made(place: str, make: Callable[[pathlib.Path, str], None], words: list[str]) -> Build:
        def build(folder: pathlib.Path) -> list[str]:
            if place.startswith("images"):
                fixtures.image_folder(folder / "images")
            make(folder, place)
            return words

        return build

    def loop(folder: pathlib.Path, name: str) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(folder / name)

    def endless(folder: pathlib.Path, name: str) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("/dev/zero")

    def directory(folder: pathlib.Path, name: str) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    resumed = [*train_words("run"), "--epochs=1"]
    for label, make in (("FIFO", fifo), ("link to itself", loop), ("/dev/zero", endless), ("folder", directory)):
        for place, words in (
            ("x.safetensors", ["evaluate", "x.safetensors", *SMALL]), ("x.yaml", ["train", "--config=x.yaml"]),
            ("x.json", ["compare", "x.json", "x.json"]), ("run/metrics.jsonl", resumed), ("run/config.yaml", resumed),
            ("run/environment.json", resumed), ("images/train/cat/0.png", folder_words()),
            ("out.json", ["evaluate", "run", *SMALL, "--out=out.json"]), ("new", train_words("new")),
        ):  # fmt: skip
            yield f"{label} as {place}", made(place, make, words)
    for name in ("\x1b[31mred", "a\nb", "|x|", "*", "-rf", "é", "x" * 200, "<script>"):

        def named(folder: pathlib.Path, name: str = name) -> list[str]:
            fixtures.image_folder(folder / "images")
            (folder / "images" / "train" / "cat").rename(folder / "images" / "train" / name)
            return folder_words()

        def broken(folder: pathlib.Path, name: str = name) -> list[str]:
            fixtures.image_folder(folder / "images")
            (folder / "images" / "train" / "cat" / f"{name}.png").write_bytes(b"x")
            return folder_words()

        yield f"a class called {name!r:.20}", named
        yield f"a broken image called {name!r:.20}", broken
