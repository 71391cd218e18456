"""A disk as a list of operations: rebuilt as it would be after any of them, by a kill or by a power cut."""

from __future__ import annotations

import pathlib
import random
from dataclasses import dataclass

ROOT = 0  # the number of the recorded folder itself


@dataclass(frozen=True)
class Operation:
    """One operation. ``node`` is a number that a file (or a folder: negative) keeps; names are entries of folders."""

    kind: str  # make, enter (rename into), leave (delete), write, cut (truncate), sync
    node: int
    folder: int = ROOT
    name: str = ""
    from_folder: int = ROOT
    from_name: str = ""
    is_folder: bool = False
    offset: int = 0
    data: bytes = b""
    size: int = 0


# What a power cut leaves of operations that no fsync has followed. ``kill`` is no power cut: all is there.
#   lost    neither names nor data of them
#   empty   the names, none of the data: how a file of length 0 comes into being
#   zeros   the names and the lengths, zeros for the data
#   torn    the names up to a random operation, a random first part of the data
CUTS = ("kill", "lost", "empty", "zeros", "torn")


class _State:
    """Files and folders by number."""

    def __init__(self) -> None:
        self.files: dict[int, bytearray] = {}
        self.folders: dict[int, dict[str, int]] = {ROOT: {}}

    def apply(self, done: Operation) -> None:
        if done.kind == "make":
            if done.is_folder:
                self.folders.setdefault(done.node, {})
            else:
                self.files.setdefault(done.node, bytearray())
            self.folders[done.folder][done.name] = done.node
        elif done.kind == "enter":
            self.folders[done.from_folder].pop(done.from_name, None)
            self.folders[done.folder][done.name] = done.node
        elif done.kind == "leave":
            self.folders[done.folder].pop(done.name, None)
        elif done.kind == "write":
            content = self.files[done.node]
            content.extend(bytes(max(0, done.offset - len(content))))
            content[done.offset : done.offset + len(done.data)] = done.data
        elif done.kind == "cut":
            content = self.files[done.node]
            content.extend(bytes(max(0, done.size - len(content))))
            del content[done.size :]


@dataclass(frozen=True)
class Disk:
    """Contents: path below the root -> bytes, None for a folder."""

    contents: dict[str, bytes | None]

    def write(self, root: pathlib.Path) -> None:
        """Put it into an empty folder."""
        root.mkdir(parents=True, exist_ok=True)
        for path, content in sorted(self.contents.items()):
            if content is None:
                (root / path).mkdir(parents=True, exist_ok=True)
            else:
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                (root / path).write_bytes(content)

    @classmethod
    def read(cls, root: pathlib.Path) -> Disk:
        """Return what lies in a folder."""
        found = sorted(root.rglob("*"))
        return cls({str(path.relative_to(root)): None if path.is_dir() else path.read_bytes() for path in found})


def _halved(done: Operation) -> Operation:
    return Operation("write", done.node, offset=done.offset, data=done.data[: len(done.data) // 2])


def after(journal: list[Operation], count: int, *, half: bool = False, cut: str = "kill", seed: int = 0) -> Disk:
    """Return the disk after ``count`` operations and, with ``half``, half of the write that follows them."""
    made = journal[:count]
    if half and count < len(journal) and journal[count].kind == "write":
        made.append(_halved(journal[count]))
    now = _State()
    for done in made:
        now.apply(done)
    if cut == "kill":
        return _listing(now, now.folders)
    durable, folders = _durable(made)
    if cut == "lost":
        return _listing(durable, folders)
    draw = random.Random(f"{seed} {count} {half}")
    kept = _State()
    kept.folders = now.folders
    if cut == "torn":
        last = max((at for at, done in enumerate(made) if done.kind == "sync"), default=0)
        named = _State()
        for done in made[: draw.randint(last, len(made))]:
            named.apply(done)
        kept.folders = named.folders
    for node, content in now.files.items():
        safe = bytes(durable.files.get(node, b""))
        if cut == "zeros":
            kept.files[node] = bytearray(safe[: len(content)].ljust(len(content), b"\0"))
        elif cut == "torn" and len(content) > len(safe):
            kept.files[node] = content[: draw.randint(len(safe), len(content))]
        else:
            kept.files[node] = bytearray(safe)
    return _listing(kept, kept.folders)


def _durable(made: list[Operation]) -> tuple[_State, dict[int, dict[str, int]]]:
    """Return data as of the last fsync of each file, entries as of the last fsync of each folder."""
    now, durable = _State(), _State()
    for done in made:
        now.apply(done)
        if done.kind == "sync":
            if done.node in now.folders:
                durable.folders[done.node] = dict(now.folders[done.node])
            else:
                durable.files[done.node] = bytearray(now.files[done.node])
    return durable, durable.folders


def _listing(state: _State, folders: dict[int, dict[str, int]]) -> Disk:
    """Return what ``folders`` lead to. A folder or file that nothing was kept of is there, and empty."""
    contents: dict[str, bytes | None] = {}
    waiting = [(ROOT, "")]
    while waiting:
        folder, prefix = waiting.pop()
        for name, node in folders.get(folder, {}).items():
            if node < 0:
                contents[prefix + name] = None
                waiting.append((node, f"{prefix}{name}/"))
            else:
                contents[prefix + name] = bytes(state.files.get(node, b""))
    return Disk(contents)
