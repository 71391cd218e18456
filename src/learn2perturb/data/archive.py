"""Fetch and unpack an official archive: checked by SHA-256, extracted with the data filter, renamed into place."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any, final

from learn2perturb.data.files import reason_of
from learn2perturb.errors import DataError

# CIFAR unpacks to 8 files and some 180 MB.
_MOST_MEMBERS, _MOST_BYTES = 1000, 2**30


def fetch(url: str, sha256: str, folder: Path, *, progress: bool | None = None) -> Path:
    """Download ``url`` into ``folder`` unless a file of that hash is there, and return its path.

    ``progress`` shows a bar; by default only on a terminal.

    Raises:
        DataError: the download failed, or its SHA-256 is another; nothing is left behind then.
    """
    import pooch

    name = url.rsplit("/", 1)[-1]
    progress = sys.stderr.isatty() if progress is None else progress
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # pooch writes to a temporary file and renames it only after its hash was found right.
        return Path(
            pooch.retrieve(
                url, known_hash=f"sha256:{sha256}", fname=name, path=folder, downloader=_downloader(url, progress)
            )
        )
    except Exception as error:  # requests, urllib and pooch raise families of their own
        reason = " ".join(str(error).split())
        raise DataError(
            f"cannot fetch {url} into {folder}: {reason}; check the connection, or put {name} there by hand"
        ) from error


def unpack(archive: Path, folder: str, parent: Path) -> Path:
    """Extract the top folder ``folder`` of the tar file ``archive`` to ``parent / folder``, all of it or nothing.

    Raises:
        DataError: the archive is damaged, holds a member that points outside, has no such folder, or cannot be written.
    """
    target = parent / folder
    try:
        parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder}.", dir=parent))
    except OSError as error:
        raise DataError(
            f"cannot unpack {archive} in {parent}: {error}; unpack it into a folder you can write"
        ) from error
    try:
        with tarfile.open(archive, "r:*") as tar:
            tar.extractall(temporary, filter=_Bounded())
            _read_to_end(tar)
        if not (temporary / folder).is_dir():
            raise DataError(f"cannot unpack {archive}: it has no folder {folder!r}; fetch the official archive again")
        try:
            (temporary / folder).rename(target)
        except OSError:
            # Another process may have been faster; its copy is as good as ours.
            if not target.is_dir() or not any(target.iterdir()):
                raise
        return target
    except DataError:
        raise
    except Exception as error:  # tarfile, gzip, bz2, lzma and the file system raise families of their own
        raise DataError(f"cannot unpack {archive}: {reason_of(error)}; fetch it again (download=True)") from error
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(temporary)


def _read_to_end(tar: tarfile.TarFile) -> None:
    """Read what follows the last member: a compressed file has its checksum at its very end, where no member is."""
    stream = tar.fileobj
    left = _MOST_BYTES
    while stream is not None and (read := len(stream.read(1 << 20))):
        left -= read
        if left < 0:
            raise ValueError(f"more than {_MOST_BYTES} bytes follow its last file")


@final
class _Bounded:
    """tar's data filter, which also refuses a bomb: more files or bytes than any of these archives has."""

    def __init__(self) -> None:
        self.members = self.bytes = 0

    def __call__(self, member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
        """Return what may be extracted."""
        self.members, self.bytes = self.members + 1, self.bytes + member.size
        if self.members > _MOST_MEMBERS or self.bytes > _MOST_BYTES:
            raise ValueError(f"it unpacks to more than {_MOST_MEMBERS} files or {_MOST_BYTES} bytes")
        return tarfile.data_filter(member, path)


def _downloader(url: str, progress: bool) -> Any:
    if url.startswith("file://"):
        return _copy_file
    import pooch

    return pooch.HTTPDownloader(progressbar=_RichBar(url.rsplit("/", 1)[-1]) if progress else False, timeout=60)


def _copy_file(url: str, output_file: str | os.PathLike[str], _: Any) -> None:
    from urllib.parse import urlsplit
    from urllib.request import url2pathname

    shutil.copyfile(url2pathname(urlsplit(url).path), output_file)


@final
class _RichBar:
    """The bar that pooch drives: ``total``, ``update``, ``reset``, ``close``, as tqdm has them."""

    def __init__(self, name: str) -> None:
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        self.total: float | None = None
        self._progress = Progress(TextColumn(name), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        self._task = self._progress.add_task(name)
        self._progress.start()

    def update(self, count: int) -> None:
        """Add ``count`` bytes."""
        self._progress.update(self._task, advance=count, total=self.total)

    def reset(self) -> None:
        """Start from zero."""
        self._progress.reset(self._task)

    def close(self) -> None:
        """Stop drawing."""
        self._progress.stop()
