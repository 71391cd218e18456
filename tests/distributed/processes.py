"""Real processes that work together over gloo: forked, since importing torch takes longer than what they do."""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import socket
import time
import traceback

import sklearn.datasets  # noqa: F401 - imported once here rather than in every child, as what follows
import torch
import torch._dynamo  # what a first optimiser imports


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def started(count, work, folder, **environment):
    """Fork ``count`` processes that call ``work(rank)`` and keep what it returns; return their ids.

    The parent has one thread of its own computations (see conftest), so no child inherits a lock that another holds.
    """
    port, children = free_port(), []
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(count):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                torch.set_num_threads(1)
                faulthandler.register(signal.SIGUSR1, (folder / f"{rank}.stacks").open("w"))
                os.environ.update(
                    RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=str(port), **environment,
                )  # fmt: skip
                (folder / f"{rank}.pt").write_bytes(pickle.dumps(("returned", work(rank))))
                code = 0
            except BaseException as error:
                traceback.print_exc()
                (folder / f"{rank}.pt").write_bytes(pickle.dumps((type(error).__name__, str(error))))
            finally:
                os._exit(code)
        children.append(child)
    return children


def ended(children, folder, seconds=150):
    """Wait for processes; return what each returned or raised, (kind, value), None for one that was killed."""
    until, left = time.monotonic() + seconds, set(children)
    while left:
        for child in list(left):
            if os.waitpid(child, os.WNOHANG)[0]:
                left.discard(child)
        if left and time.monotonic() > until:
            stuck = _stacks(left, folder)
            for child in left:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            raise AssertionError(f"{len(left)} of {len(children)} had to be killed after {seconds} s; {stuck}")
        time.sleep(0.005)
    return [outcome(folder, rank) for rank in range(len(children))]


def _stacks(children, folder):
    """Return where processes are that do not end: what each of their threads was doing."""
    for child in children:
        os.kill(child, signal.SIGUSR1)
    time.sleep(2)
    return "\n".join(f"{file.name}:\n{file.read_text()}" for file in sorted(folder.glob("*.stacks")))


def outcome(folder, rank):
    """Return what a process returned or raised, (kind, value); None where it left nothing."""
    file = folder / f"{rank}.pt"
    return pickle.loads(file.read_bytes()) if file.exists() else None


def together(count, work, folder, **environment):
    """Return what ``work(rank)`` returned in each of ``count`` processes."""
    found = ended(started(count, work, folder, **environment), folder)
    assert all(one is not None and one[0] == "returned" for one in found), found
    return [value for _, value in found]
