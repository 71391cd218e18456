"""The target of a verb: the model that is attacked, judged or certified, its images, and what a record says of both."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, final

import torch

from learn2perturb.attacks import Attack
from learn2perturb.configs import Config
from learn2perturb.data import BatchSource, make_source
from learn2perturb.engine.execution import ExecutionMode
from learn2perturb.engine.identity import ImagesFingerprint
from learn2perturb.engine.modes import in_mode, own_modes
from learn2perturb.engine.random import isolated_rng
from learn2perturb.engine.ranks import LONG_TIMEOUT, current, joined
from learn2perturb.engine.shapes import Images, Labels
from learn2perturb.errors import ConfigError, DataError
from learn2perturb.evaluation.arrays import BlackBox
from learn2perturb.evaluation.origin import identity_of, origin, weights_of
from learn2perturb.evaluation.own_parts import own_parts
from learn2perturb.evaluation.passes import Model, circumstances, classes_of, device_of
from learn2perturb.evaluation.replays import seeds_decide
from learn2perturb.progress import Progress, shown


@final
class Target:
    """A model as a verb finds it: where it runs, and its weights when the work begins.

    Args:
        model: any callable from images in [0, 1] (N, C, H, W) to logits (N, classes).
        device: where it is to run; by default where it is.
        name: what its user calls it.

    Attributes:
        device: where it runs.
        weights: their hash; None for a function.
        seen: hash of the images that were read.

    Raises:
        ConfigError: the model cannot be called, or is on another device.
    """

    def __init__(self, model: Model, device: str | torch.device | None = None, name: str | None = None) -> None:
        check_callable("model", model)
        self.model, self.name = model, name
        self.device, self.weights, self.seen = device_of(model, device), weights_of(model), ImagesFingerprint()
        self.started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._clock = time.perf_counter()
        self._parts: dict[str, Any] | None = None

    @contextlib.contextmanager
    def judged(self, progress: Progress | bool | None, others: Sequence[Model] = ()) -> Iterator[Progress]:
        """Run the body with the model, and ``others``, in eval mode; give what progress is told to.

        Modes, random generators, autocast and gradients are afterwards what they were for the caller.

        Raises:
            ConfigError: several processes would ask a black box.
        """
        with contextlib.ExitStack() as stack:
            ranks = stack.enter_context(joined(LONG_TIMEOUT))
            if not ranks.alone and isinstance(self.model, BlackBox):
                raise ConfigError(
                    f"the model is a black box, and {ranks.world} processes would each count their queries and ask at "
                    "the full rate; start it without torchrun"
                )
            told = stack.enter_context(shown(progress if ranks.first else None))
            stack.enter_context(own_modes())
            stack.enter_context(isolated_rng())
            for one in (self.model, *others):
                stack.enter_context(in_mode(one, False))
            yield told

    def check_alike(self, config: Config, others: Mapping[str, Any], *, images: bool = True) -> None:
        """Refuse processes that were not started alike: their shares would make up no record of anything.

        Args:
            config: the settings.
            others: whatever else must be the same, as numbers and texts.
            images: whether the images that were read are to be compared.

        Raises:
            TrainingError: the processes differ, in what is named.
        """
        ranks = current()
        if ranks.alone:
            return
        for name, value in (config.to_dict() | dict(others)).items():
            ranks.agree(name, repr(value))
        ranks.agree("weights", str(self.weights))
        if images:
            ranks.agree("images", self.seen.hexdigest())

    def source(self, data: Any, *, batch_size: int, seed: int, limit: int | None) -> BatchSource:
        """Return ``data`` as a source of batches for the model's device."""
        return make_source(data, batch_size=batch_size, seed=seed, device=self.device, limit=limit)

    def batches(self, source: BatchSource, limit: int | None = None) -> Iterator[tuple[Images, Labels]]:
        """Yield the batches of ``source`` where the model is, ``limit`` images at most."""
        done = 0
        for x, y in source.epoch(0):
            if limit is not None:
                x, y = x[: limit - done], y[: limit - done]
            done += len(x)
            yield x.to(self.device), y.to(self.device)
            if limit is not None and done >= limit:
                return

    def images(self, source: BatchSource) -> tuple[Images, Labels]:
        """Return all images and labels of ``source``, which are then among those that were seen.

        Raises:
            DataError: there are none.
        """
        batches = list(source.epoch(0))
        if not batches:
            raise DataError("the data hold no images; give at least one")
        x, y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
        self.seen.add(x, y)
        return x.to(self.device), y.to(self.device)

    def identity(self, seed: int, batch_size: int, mode: ExecutionMode) -> tuple[Any, ...]:
        """Return all that results follow from beside what is done: model, images, seed, how passes are made, where."""
        return identity_of(self.model), self.seen.hexdigest(), seed, batch_size, circumstances(self.device, mode)

    def unkept(self, x: Images, seed: int) -> str:
        """Return why what is finished of the work on this model cannot be kept for another process; else nothing."""
        if self.weights is None:
            return "the model is a function, whose weights are not seen, so that another one would pass for it"
        if not current().alone:
            return "several processes share the work"
        if not seeds_decide(self.model, x[:8], seed):
            return "draws of the model follow from what it has drawn before, not from seeds"
        return ""

    def classes(self, x: Images) -> int:
        """Return how many classes the model tells, by its checked logits of one image."""
        return classes_of(self.model, x)

    @property
    def seconds(self) -> float:
        """How long the work has taken so far."""
        return time.perf_counter() - self._clock

    def parts(
        self,
        data: Any = None,
        *,
        attacks: Iterable[Attack | None] = (),
        checks: Iterable[Callable[..., Any]] = (),
        others: Iterable[Model] = (),
    ) -> dict[str, Any]:
        """Return which parts are the user's own, and where their code is from: as it was when this was first asked."""
        if self._parts is None:
            name = getattr(data, "name", None)
            self._parts = own_parts(self.model, dataset=name, attacks=attacks, checks=checks, others=others)
        return self._parts

    def metadata(
        self,
        data: Any,
        config: Config,
        mode: ExecutionMode,
        *,
        attacks: Iterable[Attack | None] = (),
        checks: Iterable[Callable[..., Any]] = (),
        others: Iterable[Model] = (),
        **more: Any,
    ) -> dict[str, Any]:
        """Return what a record says of model, images, settings, own parts, where and when it was made; and ``more``."""
        return {
            **origin(self.model, data, self.name, weights=self.weights, seen=self.seen),
            "date": self.started,
            "config": config.to_dict(),
            **more,
            **self.parts(data, attacks=attacks, checks=checks, others=others),
            **circumstances(self.device, mode),
        }


def check_callable(name: str, model: object, what: str = "a network or a function") -> None:
    """Raise ConfigError unless ``model`` can be called."""
    if not callable(model):
        raise ConfigError(f"{name} is a {type(model).__name__}, must be callable: {what}")
