"""Several processes at one piece of work: who is who, what each has of a batch, sums over all of them.

Started by ``torchrun`` (or by anything that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT), a process joins the
others for the length of :func:`joined`. Alone, nothing here does anything.
"""

from __future__ import annotations

import contextlib
import contextvars
import datetime
import os
import platform
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from learn2perturb.errors import ConfigError, ElsewhereError, Interrupted, TrainingError
from learn2perturb.terminal import number_among

T = TypeVar("T")
TIMEOUT_VARIABLE = "LEARN2PERTURB_RANK_TIMEOUT"
_TIMEOUT = 600.0
# Of work whose processes meet after whole batches of an attack, not after steps. One that dies is missed at once.
LONG_TIMEOUT = 6 * 3600.0
# So long a process waits for the word of others before it says who is missing; they time out at nearly the same moment.
_GRACE = 3.0
_REMEMBERED = 10_000
# A sum over all processes is of one block of memory at most this large: enough to hide the latency of a message.
_BLOCK = 25 * 2**20
# So much and so many at most are told by each process to each other one: a sum of gloo's goes round in several pieces
# (0.55 ms of CPU time against 0.40, 4.8 ms until it is there against 3.4: two processes on a busy machine).
_SMALL, _FEW = 2**16, 8


@final
@dataclass(frozen=True, eq=False)
class Ranks:
    """The processes that work together, seen from one of them.

    Attributes:
        rank: number of this process.
        world: how many there are.
        name: of this meeting of theirs, in the store that they share.
        timeout: seconds after which one that does not answer is given up.
        spent: seconds of the last sums over all, waiting included; of those on a card what starting them takes.
    """

    rank: int = 0
    world: int = 1
    name: str = ""
    timeout: float = _TIMEOUT
    spent: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.world == 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def share(self, total: int, *, own_statistics: bool = False) -> Share:
        """Return what this process has of a batch of ``total`` rows."""
        return Share(self, total, own_statistics)

    # -- what all of them say ---------------------------------------------------------------------------------------

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all processes of a tensor of equal shape."""
        if self.alone:
            return tensor
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        if total.device.type == "cpu" and 0 < total.nbytes <= _SMALL and self.world <= _FEW:
            given = torch.stack([total] * self.world)
            found = torch.empty_like(given)
            self._together(lambda: dist.all_to_all_single(found, given))
            return found.sum(0, dtype=total.dtype)
        self._together(lambda: dist.all_reduce(total))
        return total

    def largest(self, number: int) -> int:
        """Return the largest of the numbers that the processes give."""
        if self.alone:
            return number
        value = torch.tensor(number)
        self._together(lambda: dist.all_reduce(value, op=dist.ReduceOp.MAX))
        return int(value)

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, in place, in a few large messages."""
        if self.alone:
            return
        for block in _blocks(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in block])
            self._together(lambda flat=flat: dist.all_reduce(flat))  # type: ignore[misc]
            done = 0
            for tensor in block:
                tensor.copy_(flat[done : done + tensor.numel()].view(tensor.shape))
                done += tensor.numel()

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace the gradient of each parameter by its sum over all processes; one that nobody has stays None."""
        if self.alone:
            return
        trained = list(dict.fromkeys(parameters))
        there = torch.tensor([parameter.grad is not None for parameter in trained], dtype=torch.int32)
        there = self.sum(there)
        held = [parameter for parameter, count in zip(trained, there.tolist(), strict=True) if count]
        for parameter in held:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        with torch.no_grad():
            self.add_up([parameter.grad for parameter in held if parameter.grad is not None])

    def told(self, text: Callable[[], str]) -> str:
        """Return on every process what ``text`` gives on the first."""
        if self.alone:
            return text()
        content = text().encode() if self.first else b""
        size = self.largest(len(content))
        letters = torch.zeros(max(size, 1), dtype=torch.uint8)
        letters[: len(content)] = torch.frombuffer(bytearray(content or b"\0"), dtype=torch.uint8)[: len(content)]
        self._together(lambda: dist.broadcast(letters, 0))
        return bytes(letters[:size].tolist()).decode()

    def gathered(self, content: bytes) -> list[bytes]:
        """Return what every process gives, in the order of their numbers."""
        if self.alone:
            return [content]
        sizes = torch.zeros(self.world, dtype=torch.int64)
        sizes[self.rank] = len(content)
        sizes = self.sum(sizes)
        letters = torch.zeros(max(int(sizes.max()), 1), dtype=torch.uint8)
        letters[: len(content)] = torch.frombuffer(bytearray(content or b"\0"), dtype=torch.uint8)[: len(content)]
        found = [torch.empty_like(letters) for _ in range(self.world)]
        self._together(lambda: dist.all_gather(found, letters))
        return [one[:size].numpy().tobytes() for one, size in zip(found, sizes.tolist(), strict=True)]

    def agree(self, what: str, value: str) -> None:
        """Refuse to go on where the processes do not have the same ``value``.

        Raises:
            TrainingError: another process has another one.
        """
        there = [one.decode() for one in self.gathered(value.encode())]
        for rank, other in enumerate(there):
            if other != there[0]:
                raise TrainingError(
                    f"process {rank} of {self.world} has other {what} than process 0 ({other} there, {there[0]} "
                    "here); give all of them the same command, code and data, in an order that the seed decides"
                )

    # -- what goes wrong --------------------------------------------------------------------------------------------

    def _together(self, work: Callable[[], object]) -> None:
        """Do what all processes do at once; where one does not, say which."""
        start = time.perf_counter()
        try:
            work()
        except RuntimeError as error:
            self._blame(error)
        self.spent.append(time.perf_counter() - start)

    def _blame(self, error: RuntimeError) -> NoReturn:
        """Name who has not come to a meeting that has failed."""
        try:
            self._name_missing(error)
        except RuntimeError as lost:
            if isinstance(lost, TrainingError):
                raise
            # Without a launcher that keeps it, what they share is kept by the first.
            raise ElsewhereError(
                f"process 0 of {self.world} is gone without a word: killed, perhaps since memory ran out"
            ) from None

    def _name_missing(self, error: RuntimeError) -> NoReturn:
        """Say that this process is here; those that do not say so are the missing ones."""
        store = _store()
        store.set(f"{self.name}/waiting/{self.rank}", "yes")
        others = [rank for rank in range(self.world) if rank != self.rank]
        until = time.monotonic() + _GRACE
        while True:
            failed = [rank for rank in others if store.check([f"{self.name}/failed/{rank}"])]
            missing = [rank for rank in others if not store.check([f"{self.name}/waiting/{rank}"])]
            if failed or not missing or time.monotonic() > until:
                break
            time.sleep(0.05)
        words = self._words(" ".join(str(error).split())[:200], failed, missing)
        self._see_off(store, [rank for rank in others if rank not in (*failed, *missing)])
        if failed or missing:
            raise ElsewhereError(words) from None
        raise TrainingError(words) from error

    def _words(self, reason: str, failed: list[int], missing: list[int]) -> str:
        """Say what is known of those that failed or are missing."""
        store = _store()
        if failed:
            said = store.get(f"{self.name}/failed/{failed[0]}").decode()
            return f"process {failed[0]} of {self.world} failed: {said}"
        if not missing:
            return f"the processes cannot reach each other ({reason}); look at the network"
        where = " and ".join(f"process {rank} of {self.world}{self._place(rank)}" for rank in missing)
        if "timed out" not in reason.lower():
            return f"{where} is gone without a word: killed, perhaps since memory ran out"
        return (
            f"{where} has not answered for {self.timeout:g} s: it hangs, or its work is longer than that; look at it "
            f"there, or set {TIMEOUT_VARIABLE} to more seconds"
        )

    def _place(self, rank: int) -> str:
        """Return where a process is, if it has said so: it may have gone before."""
        store, key = _store(), f"{self.name}/at/{rank}"
        return f" ({store.get(key).decode()})" if store.check([key]) else ""  # to get what is not there is to wait

    def _see_off(self, store: Any, living: Iterable[int]) -> None:
        """Let the first process, which may keep what they share, stay until the ``living`` others have read it."""
        until, waited_for = time.monotonic() + 2 * _GRACE, set(living)
        with contextlib.suppress(RuntimeError):  # it was kept by another, which has gone
            store.set(f"{self.name}/read/{self.rank}", "yes")
            while self.first and waited_for and time.monotonic() < until:
                waited_for = {rank for rank in waited_for if not self._through(store, rank)}
                time.sleep(0.05)

    def _through(self, store: Any, rank: int) -> bool:
        """Tell whether a process needs what they share no more: it has read why another failed, or failed itself."""
        return any(store.check([f"{self.name}/{word}/{rank}"]) for word in ("read", "failed"))

    def _left(self, error: BaseException) -> bool:
        """Leave word for the others of why this process ends; tell whether they have none yet."""
        if isinstance(error, ElsewhereError):
            return False
        stopped = isinstance(error, KeyboardInterrupt) and not isinstance(error, Interrupted)
        said = " ".join(f"{Interrupted() if stopped else error}".split())[:500] or type(error).__name__
        with contextlib.suppress(RuntimeError):
            _store().set(f"{self.name}/failed/{self.rank}", said)
        return True


ALONE = Ranks()


@final
@dataclass(frozen=True, eq=False)
class Share:
    """The rows of a batch that one process has: as even as may be, or all of them where some would have only one.

    A draw that has rows is known by its length (see ``rows``), and one of length 1 is what all rows have in common.

    Attributes:
        ranks: the processes.
        total: rows of the batch.
        own_statistics: whether BatchNorm normalises by these rows alone, and not by the whole batch.
    """

    ranks: Ranks
    total: int
    own_statistics: bool = False

    @property
    def whole(self) -> bool:
        """Whether every process has all rows."""
        return self.ranks.alone or self.total < 2 * self.ranks.world

    @property
    def start(self) -> int:
        """First row of this process."""
        return 0 if self.whole else self._edge(self.ranks.rank)

    @property
    def stop(self) -> int:
        """The row behind its last one."""
        return self.total if self.whole else self._edge(self.ranks.rank + 1)

    @property
    def rows(self) -> int:
        """How many it has."""
        return self.stop - self.start

    @property
    def weight(self) -> float:
        """What a mean over these rows is multiplied by, so that the sum over the processes is that of the batch."""
        return 1 / self.ranks.world if self.whole else self.rows / self.total

    @property
    def counted(self) -> bool:
        """Whether a sum over these rows counts: of rows that all have, only that of the first."""
        return self.ranks.first or not self.whole

    def of(self, tensor: Tensor) -> Tensor:
        """Return its rows of a tensor (total, ...)."""
        return tensor if self.whole else tensor[self.start : self.stop]

    def _edge(self, rank: int) -> int:
        return self.total * rank // self.ranks.world


_share: contextvars.ContextVar[Share | None] = contextvars.ContextVar("share", default=None)


def current_share() -> Share | None:
    """Return the share that the rows of the passes are now, or None where they are whole batches."""
    return _share.get()


@contextlib.contextmanager
def sharing(share: Share | None) -> Iterator[None]:
    """Let the passes of the body be of this share of a batch; None: of what is no part of one."""
    token = _share.set(None if share is None or share.whole else share)
    try:
        yield
    finally:
        _share.reset(token)


def plain_calls() -> contextlib.AbstractContextManager[None]:
    """Return the context in which what watches calls on a share (see ``rows``) sees none: for what knows its rows."""
    return contextlib.nullcontext() if _share.get() is None else torch._C.DisableTorchFunction()


@final
class _Sum(torch.autograd.Function):
    """The sum over all processes of a tensor, through which gradients flow: those of all processes, summed too."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.sum(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(gradients[0], ctx.ranks), None


def differentiable_sum(tensor: Tensor, ranks: Ranks) -> Tensor:
    """Return the sum over all processes of a tensor; the gradient of a sum of losses over all flows back."""
    return tensor if ranks.alone else _Sum.apply(tensor, ranks)


@final
class _Valued(torch.autograd.Function):
    """A number of another value: that of the whole batch, whose gradient here is that of this share."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def valued(own: Tensor, value: Tensor) -> Tensor:
    """Return ``value`` with the gradient of ``own``."""
    return _Valued.apply(own, value)


# -- meeting ----------------------------------------------------------------------------------------------------------

_current: contextvars.ContextVar[Ranks] = contextvars.ContextVar("ranks", default=ALONE)
_meetings = 0
_stores: dict[tuple[object, ...], Any] = {}  # of this process, and those of one that it was forked from


def current() -> Ranks:
    """Return the processes that this one has joined, or :data:`ALONE`."""
    return _current.get()


def own_card(device: torch.device) -> torch.device:
    """Return the card of this process, if it is one of several, where ``device`` is any card."""
    if device.type != "cuda" or device.index is not None or number_among()[1] == 1:
        return device
    return torch.device("cuda", _local() % torch.cuda.device_count())


def _local() -> int:
    return int(os.environ.get("LOCAL_RANK") or number_among()[0])


@contextlib.contextmanager
def joined(timeout: float = _TIMEOUT) -> Iterator[Ranks]:
    """Join the other processes for the body, if this one was started as one of several.

    A process group that is there already is used, and left as it is. Inside another :func:`joined` this is the same.

    Args:
        timeout: seconds after which one that does not answer is given up, where the environment says nothing of it.

    Raises:
        ConfigError: the timeout that the environment says is no number of seconds.
        TrainingError: the others do not come.
    """
    here = _current.get()
    ready = dist.is_available() and dist.is_initialized()
    if not here.alone or not (ready or number_among()[1] > 1):
        yield here
        return
    timeout, name = _seconds(timeout), _next_meeting()
    if not ready:
        _open(timeout, name)
    store, news = _store(), False
    try:
        ranks = _introduced(timeout, name)
        token = _current.set(ranks)
        try:
            yield ranks
        except BaseException as error:
            news = ranks._left(error)
            raise
        finally:
            _current.reset(token)
    finally:
        if not ready:
            dist.destroy_process_group()  # so the others see that one is gone, and look into the store
            if news:
                ranks._see_off(store, range(ranks.world))


def _next_meeting() -> str:
    """Return a name that no meeting before had: the store outlives restarts, and a process may meet the others again.

    Without it a process that is started anew finds the address of one that is dead, and waits for it.
    """
    global _meetings
    _meetings += 1
    return f"learn2perturb/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{_meetings}"


def _introduced(timeout: float, name: str) -> Ranks:
    rank, world = dist.get_rank(), dist.get_world_size()
    if world == 1:
        return ALONE
    ranks = Ranks(rank, world, name, timeout)
    _store().set(f"{name}/at/{rank}", f"pid {os.getpid()} on {platform.node()}")
    ranks.largest(0)  # all are here, and have said who they are
    return ranks


def _open(timeout: float, name: str) -> None:
    rank, world = number_among()
    longest = datetime.timedelta(seconds=timeout)
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or world)
    if torch.cuda.is_available():
        torch.cuda.set_device(own_card(torch.device("cuda")))
    # NCCL takes one card a process; fewer cards than processes, as in a trial run, talk through the CPU.
    cards = "nccl" if torch.cuda.is_available() and torch.cuda.device_count() >= local else "gloo"
    try:
        store = _shared(rank, world, longest)
        dist.init_process_group(
            f"cpu:gloo,cuda:{cards}" if torch.cuda.is_available() else "gloo",
            store=dist.distributed_c10d.PrefixStore(name, store), rank=rank, world_size=world, timeout=longest,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        _stores.clear()
        reason = " ".join(str(error).split())[:300]
        raise TrainingError(
            f"process {rank} cannot join the {world} of them ({reason}); start them all, by torchrun"
        ) from None


def _shared(rank: int, world: int, longest: datetime.timedelta) -> Any:
    """Return the store that the processes share: the same one at every meeting.

    Where none is torchrun's the first process keeps it. Opened anew for each meeting, it would take the place of the
    one before, which a process that is early still finds, and loses.
    """
    where = os.getpid(), rank, world, os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if where not in _stores:
        _stores[where], *_ = next(iter(rendezvous("env://", rank, world, timeout=longest)))
    _stores[where].set_timeout(longest)
    return _stores[where]


def _seconds(otherwise: float) -> float:
    given = os.environ.get(TIMEOUT_VARIABLE, "")
    try:
        seconds = float(given or otherwise)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"{TIMEOUT_VARIABLE} is {given!r}; it must be a number of seconds above 0, such as 600")
    return seconds


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _blocks(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield tensors of one type in blocks of a bounded size, in an order that is the same on every process."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        block: list[Tensor] = []
        size = 0
        for tensor in tensors:
            if tensor.dtype != dtype:
                continue
            if block and size + tensor.nbytes > _BLOCK:
                yield block
                block, size = [], 0
            block.append(tensor)
            size += tensor.nbytes
        if block:
            yield block
