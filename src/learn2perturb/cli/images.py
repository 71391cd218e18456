"""The images that ``evaluate`` keeps: a few beside the record, for a page; all in a file, to be attacked with again."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from learn2perturb.checks import check_count
from learn2perturb.cli.options import typed
from learn2perturb.cli.saving import saved
from learn2perturb.errors import CheckpointError, ConfigError
from learn2perturb.reading import starts_with
from learn2perturb.terminal import number_among

if TYPE_CHECKING:
    from learn2perturb.evaluation import AttackedImages, ImageKeeper

_MARK = b'"learn2perturb.images"'  # near the start of such a file


def add_kept_images(parser: argparse.ArgumentParser) -> None:
    """Add the options that keep attacked images."""
    add = parser.add_argument
    add(
        "--keep-images", type=typed("int"), metavar="N",
        help="keep the first N broken and N held images of each row, clean and attacked, beside the record",
    )  # fmt: skip
    add("--save-images", metavar="FILE", help="save all attacked images, exact, as .npz, and a PNG sheet of each row")


def check_images_asked(arguments: argparse.Namespace) -> None:
    """Refuse what cannot be done with images before anything is computed.

    Raises:
        ConfigError: a count or the name of a file is not allowed.
        CheckpointError: the file cannot be written.
    """
    check_count("keep_images", arguments.keep_images, optional=True)
    if arguments.save_images is not None:
        path = Path(arguments.save_images)
        if path.suffix != ".npz" or path.is_dir():
            raise ConfigError(f"--save-images {arguments.save_images} is no .npz file; give one such as attacked.npz")
        if path.exists() and _MARK not in starts_with(path, 1000):
            raise CheckpointError(f"{path} exists and holds no kept images; give another --save-images")
        from learn2perturb.records import check_writable  # with all that writes files, which --help does not wait for

        check_writable(path)


def keeper(arguments: argparse.Namespace) -> ImageKeeper | None:
    """Return what asks for the images that are to be kept or saved."""
    from learn2perturb.evaluation import ImageKeeper

    if arguments.save_images is not None:
        return ImageKeeper(None)
    return None if arguments.keep_images is None else ImageKeeper(arguments.keep_images)


def saved_images(found: AttackedImages, arguments: argparse.Namespace, record: Path | None) -> list[Path | None]:
    """Write the images: a few beside the record, all where the user says, with sheets; None stands for a failure."""
    from learn2perturb.evaluation.attacked import beside
    from learn2perturb.evaluation.pictures import save_sheets

    files: list[Path | None] = []
    if arguments.save_images is not None:
        path = Path(arguments.save_images)
        files.append(saved(lambda: found.save(path), "the images are not saved"))
        if files[-1] is not None and number_among()[0] == 0:
            files += save_sheets(found, path)
    if arguments.keep_images is not None and record is not None:
        few = found.chosen(arguments.keep_images)
        files.append(saved(lambda: few.save(beside(record)), "the images are not kept"))
    return files
