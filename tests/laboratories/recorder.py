"""Records what a program does to one folder: every open, write, truncate, fsync, rename, mkdir and unlink, in order.

It stands between Python and the operating system: ``os`` and ``open`` are replaced while it records. What goes around
them (C code that writes by itself) would be missed, so a recording is only believed if it rebuilds the folder exactly.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from tests.laboratories.disk import ROOT, Disk, Operation, after


class Recorder:
    """The operations below ``root``, which is there; what it holds before is recorded as made and synced."""

    def __init__(self, root: pathlib.Path) -> None:
        self.root = os.path.realpath(root)
        self.journal: list[Operation] = []
        self._entries: dict[int, dict[str, int]] = {ROOT: {}}  # folders have negative numbers, ROOT apart
        self._open: dict[int, int] = {}
        self._next = 0
        self._real: dict[str, Callable[..., Any]] = {}
        self._adopt(pathlib.Path(self.root), ROOT)
        self.start = len(self.journal)

    def _adopt(self, folder: pathlib.Path, number: int) -> None:
        for path in sorted(folder.iterdir()):
            node = self._make(number, path.name, path.is_dir())
            if path.is_dir():
                self._adopt(path, node)
            else:
                self.journal += [Operation("write", node, data=path.read_bytes()), Operation("sync", node)]
        self.journal.append(Operation("sync", number))

    def _make(self, folder: int, name: str, is_folder: bool) -> int:
        self._next += 1
        node = -self._next if is_folder else self._next
        self._entries[folder][name] = node
        if is_folder:
            self._entries[node] = {}
        self.journal.append(Operation("make", node, folder, name, is_folder=is_folder))
        return node

    def _place(self, path: Any, dir_fd: int | None = None) -> tuple[int, str] | None:
        """Return (number of the folder, name) of a path below the root; None for any other path."""
        if isinstance(path, int):
            return None
        text = os.fsdecode(path)
        if dir_fd is not None:
            text = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), text)
        text = os.path.abspath(text)
        text = os.path.join(os.path.realpath(os.path.dirname(text)), os.path.basename(text))
        if not text.startswith(self.root + os.sep):
            return None
        *above, name = text[len(self.root) + 1 :].split(os.sep)
        folder = ROOT
        for part in above:
            folder = self._entries[folder][part]
        return folder, name

    def _node(self, path: Any, dir_fd: int | None = None) -> int | None:
        if isinstance(path, int):
            return self._open.get(path)
        if os.path.realpath(os.fsdecode(path)) == self.root:
            return ROOT
        place = self._place(path, dir_fd)
        return None if place is None else self._entries[place[0]].get(place[1])

    # -- what replaces the functions of os ---------------------------------------------------------------------------

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        place, before = self._place(path, dir_fd), self._node(path, dir_fd)
        descriptor: int = self._real["open"](path, flags, mode, dir_fd=dir_fd)
        if place is not None and before is None:
            before = self._make(*place, is_folder=False)
        elif before is not None and flags & os.O_TRUNC:
            self.journal.append(Operation("cut", before))
        if before is not None:
            self._open[descriptor] = before
        return descriptor

    def close(self, descriptor: int) -> None:
        self._open.pop(descriptor, None)
        self._real["close"](descriptor)

    def write(self, descriptor: int, data: Any) -> int:
        count: int = self._real["write"](descriptor, data)
        self.wrote(descriptor, bytes(data)[:count])
        return count

    def wrote(self, descriptor: int, data: bytes) -> None:
        """Record bytes that have just been written."""
        if (node := self._open.get(descriptor)) is not None:
            offset = os.lseek(descriptor, 0, os.SEEK_CUR) - len(data)
            self.journal.append(Operation("write", node, offset=offset, data=data))

    def fsync(self, descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        self._real["fsync"](number)
        if (node := self._open.get(number)) is not None:
            self.journal.append(Operation("sync", node))

    def truncate(self, target: Any, length: int) -> None:
        self._real["truncate"](target, length)
        if (node := self._node(target)) is not None:
            self.journal.append(Operation("cut", node, size=length))

    def mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        place = self._place(path, dir_fd)
        self._real["mkdir"](path, mode, dir_fd=dir_fd)
        if place is not None:
            self._make(*place, is_folder=True)

    def replace(self, source: Any, target: Any, **descriptors: int | None) -> None:
        origin = self._place(source, descriptors.get("src_dir_fd"))
        place = self._place(target, descriptors.get("dst_dir_fd"))
        self._real["replace"](source, target, **descriptors)
        if origin is None and place is None:
            return
        assert origin is not None and place is not None, f"{source} is moved over the edge of the recorded folder"
        node = self._entries[origin[0]].pop(origin[1])
        self._entries[place[0]][place[1]] = node
        self.journal.append(Operation("enter", node, *place, from_folder=origin[0], from_name=origin[1]))

    def link(self, source: Any, target: Any, **options: Any) -> None:
        """A second name of a file: it enters a folder, and leaves none."""
        place, node = self._place(target), self._node(source)
        self._real["link"](source, target, **options)
        if place is not None:
            assert node is not None, f"{source} is linked over the edge of the recorded folder"
            self._entries[place[0]][place[1]] = node
            self.journal.append(Operation("enter", node, *place))

    def unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._leave("unlink", path, dir_fd)

    def rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._leave("rmdir", path, dir_fd)

    def _leave(self, how: str, path: Any, dir_fd: int | None) -> None:
        place = self._place(path, dir_fd)
        self._real[how](path, dir_fd=dir_fd)
        if place is not None:
            node = self._entries[place[0]].pop(place[1])
            self.journal.append(Operation("leave", node, *place))

    def open_file(
        self, file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None,
        newline: Any = None, closefd: bool = True, opener: Any = None,
    ) -> Any:  # fmt: skip
        """Stand for ``open``: a file below the root that is written is one whose writes are seen."""
        inside = file in self._open if isinstance(file, int) else self._place(file) is not None
        if not inside or not set(mode) & set("wax+"):
            return self._real["open_file"](file, mode, buffering, encoding, errors, newline, closefd, opener)
        raw = _Seen(self, file, mode.replace("b", "").replace("t", ""), closefd, opener)
        size = io.DEFAULT_BUFFER_SIZE if buffering in (-1, 1) else buffering
        if size == 0:
            return raw
        buffered = io.BufferedRandom(raw, size) if "+" in mode else io.BufferedWriter(raw, size)
        if "b" in mode:
            return buffered
        return io.TextIOWrapper(buffered, encoding or "utf-8", errors, newline, line_buffering=buffering == 1)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record for the length of the body; then compare with what is really there."""
        replaced = {
            "open": self.open, "close": self.close, "write": self.write, "fsync": self.fsync, "fdatasync": self.fsync,
            "truncate": self.truncate, "ftruncate": self.truncate, "mkdir": self.mkdir, "rename": self.replace,
            "replace": self.replace, "link": self.link, "unlink": self.unlink, "remove": self.unlink,
            "rmdir": self.rmdir,
        }  # fmt: skip
        self._real = {name: getattr(os, name) for name in replaced} | {"open_file": io.open}
        with contextlib.ExitStack() as stack:
            for name, function in replaced.items():
                stack.enter_context(mock.patch.object(os, name, function))
            stack.enter_context(mock.patch.object(io, "open", self.open_file))
            stack.enter_context(mock.patch.object(builtins, "open", self.open_file))
            yield
        there, rebuilt = Disk.read(pathlib.Path(self.root)), after(self.journal, len(self.journal))
        wrong = [path for path in {**there.contents, **rebuilt.contents} if _differ(path, there, rebuilt)]
        assert not wrong, f"operations were missed on {wrong[:5]}; record the function that makes them"


def _differ(path: str, one: Disk, other: Disk) -> bool:
    missing = object()
    return one.contents.get(path, missing) != other.contents.get(path, missing)


class _Seen(io.FileIO):
    """A raw file whose writes the recorder sees."""

    def __init__(self, recorder: Recorder, file: Any, mode: str, closefd: bool, opener: Any) -> None:
        self._recorder = recorder
        super().__init__(file, mode, closefd, opener or (lambda path, flags: os.open(path, flags, 0o666)))

    def write(self, data: Any) -> int:
        count = super().write(data)
        self._recorder.wrote(self.fileno(), bytes(data)[:count])
        return count

    def truncate(self, size: int | None = None) -> int:
        length = self.tell() if size is None else size
        self._recorder.truncate(self.fileno(), length)
        return length

    def close(self) -> None:
        if not self.closed:
            self._recorder._open.pop(self.fileno(), None)
        super().close()
