"""The state of one training: what it is built from, one step of it, saving and restoring it.

Every random number of a step is a function of (seed, step), and the order and augmentation of a batch of (seed, epoch,
batch). So a training resumed at any step goes on exactly as if it had never stopped, without any generator's state.
"""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from learn2perturb.data import BatchSource, check_labels, warn_of_subset
from learn2perturb.defenses import Clock, Defense, Losses, Stage, forward, training_adversary
from learn2perturb.defenses.settings import Settings
from learn2perturb.engine import execution
from learn2perturb.engine.batch_norm import average_running_statistics
from learn2perturb.engine.devices import choose_device
from learn2perturb.engine.frozen import left_in_eval, train_but
from learn2perturb.engine.halving import Halving, out_of_memory
from learn2perturb.engine.modes import blind_to_one_image, in_mode, one_image_explained
from learn2perturb.engine.random import isolated_rng, seed_torch
from learn2perturb.engine.ranks import ALONE, Ranks, Share
from learn2perturb.engine.recording import CudaGraphs
from learn2perturb.engine.rows import sharded
from learn2perturb.engine.weights import settle
from learn2perturb.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    InputError,
    Learn2PerturbError,
    MemoryLimitError,
    NonFiniteError,
)
from learn2perturb.evaluation.own_parts import own_parts
from learn2perturb.naming import network_name
from learn2perturb.noise import noise_modules
from learn2perturb.plugins import codes_of
from learn2perturb.progress import Reporter
from learn2perturb.registry import DEFENSES
from learn2perturb.runs.checkpoint import check_noise, model_bytes, write_checkpoint
from learn2perturb.runs.extra import check_extra_state
from learn2perturb.runs.files import FOLDER as CHECKPOINTS
from learn2perturb.runs.files import checkpoints
from learn2perturb.training.alternating import Iteration, Optimizers, iterate
from learn2perturb.training.average import WeightAverage
from learn2perturb.training.beginning import begin_from, freeze, take_noise
from learn2perturb.training.best import BestEpoch
from learn2perturb.training.config import TrainConfig
from learn2perturb.training.folder import SETTINGS, write_settings
from learn2perturb.training.identity import identity_of_data, identity_of_network
from learn2perturb.training.metrics import MetricsFile, Totals
from learn2perturb.training.network import check_trainable, materialise, named_network
from learn2perturb.training.recorded import NaNGuard, RecordedSteps, prepare, set_rate
from learn2perturb.training.restoring import (
    UNPLANNED,
    Say,
    Whole,
    check_code,
    check_same,
    check_stages,
    metrics_text,
    newest_whole,
)
from learn2perturb.training.shares import mark, objective
from learn2perturb.training.sources import joined, sources


@contextlib.contextmanager
def _memory_explained(rows: int) -> Iterator[None]:
    # Not halved: BatchNorm and the order of random numbers make a step on halves another step.
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise MemoryLimitError(
            f"out of memory in a training step of {rows} images; give a smaller --batch-size (batch_size={rows // 2})"
        ) from error


def mode_of(config: TrainConfig, device: torch.device, *, images: int, shape: Sequence[int]) -> execution.ExecutionMode:
    """Return the execution mode of a training that sees so many ``images`` (C, H, W) in all its epochs."""
    settings: Settings = config.closed()
    pixels = images * math.prod(shape[1:])
    passes = settings.attack_steps * settings.attack_eot if settings.beta else 0
    return execution.select(
        config.engine, device, pixels=pixels, attacked_pixels=passes * pixels, rows=settings.batch_size
    )


@final
class Training:
    """The state of one training: built from the config, moved forward step by step, saved, restored."""

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module | None,
        data: Any,
        folder: Path | None,
        reporter: Reporter,
        ranks: Ranks = ALONE,
    ) -> None:
        self.config, self.folder, self.reporter, self.ranks = config, folder, reporter, ranks
        # All processes read the run folder, the first writes it.
        out = self.out = folder if ranks.first else None
        self.settings = config.closed()
        self.device = choose_device(config.device)
        self.defense: Defense = config.built_defense()
        self.source, self.monitor, self.monitored, self.classes = sources(config, data, self.device)
        self.plan: tuple[Stage, ...] = self.defense.stages(self.settings)
        self.epochs = sum(stage.epochs for stage in self.plan)
        settings = self.settings
        self.mode = mode_of(
            config, self.device, images=self.epochs * self.source.num_examples, shape=self.source.input_shape or (0,)
        )
        if not ranks.alone:
            if settings.accumulate > 1:
                raise ConfigError(
                    f"accumulate is {settings.accumulate}, and several processes share out a batch anyway; leave it out"
                )
            # Neither a recorded nor a compiled pass can wait for other processes, or draw the rows of theirs.
            eager = execution.eager(self.mode)
            if eager != self.mode:
                reporter.line("several processes: no step is recorded as a CUDA graph, and no pass is compiled")
            self.mode = eager
        # None: data of the user's own, which no name brings back
        self.dataset = config.dataset if data is None else None
        self.identity: dict[str, str] = {}
        self.model = self._build(model).to(self.device)
        # A network that normalises each channel over one number cannot train on one image.
        if blind_to_one_image(self.model, torch.zeros(1, *self.input_shape, device=self.device)):
            self.source = joined(self.source)
        self.batches = self.source.num_batches
        if out is not None:
            self.identity["data"] = identity_of_data(self.source)
        self.mode.place(self.model)
        # What the defense trains or asks beside the network, by name.
        self.beside = self.defense.beside(self.model)
        for own in self.beside.values():
            self.mode.place(own.to(self.device))
        # As it is now: whoever edits a file during the training changes nothing of what runs.
        self.parts = own_parts(
            self.model, dataset=self.dataset, defense=config.defense, others=self.beside.values(), data=self.source
        )
        self._measure()
        self._looked_at: set[str] = set()
        # Where steps are recorded nothing may wait for the device, so a flag there says whether a loss was NaN.
        self.recorded = RecordedSteps(CudaGraphs(self.device)) if self.mode.recording else None
        self.guard = NaNGuard(self.device) if self.mode.recording else None
        # What is monitored, saved and returned in place of the last weights.
        self.average = WeightAverage(self.model, settings.weight_average) if settings.weight_average else None
        chooses = config.keep_best or config.early_stopping
        self.best = BestEpoch(keeps=config.keep_best, patience=config.early_stopping) if chooses else None
        # Of a run that was given more epochs: at which epoch, and how many there were to be.
        self.extended: list[dict[str, int]] = []
        self.epoch, self.batch, self.stage = 0, 0, -1
        self.optimizers: Optimizers = {}
        self.totals = Totals(self.device)
        self.metrics = b""
        self.seconds = 0.0
        self.last_good: Path | None = None

    def _build(self, model: nn.Module | None) -> nn.Module:
        config, shape = self.config, self.source.input_shape
        if shape is None:
            raise DataError("the training data do not say their image shape; give at least one batch (N, C, H, W)")
        self.input_shape = shape
        seed_torch(config.seed, "weights")
        own = model is None and config.init_from is None and not network_name(config.model).foreign
        if model is None:
            model = named_network(config, self.source.num_classes, shape)
        noise: Mapping[str, Any] = {}
        if config.init_from is not None:
            fit, noise = begin_from(model, config.init_from)
            self.reporter.line(str(fit))
        if not own:
            materialise(model, shape)
            check_trainable(model)
            check_extra_state(model)
            # Registered networks need none: they start from the seed of the config.
            self.identity = identity_of_network(model)
        self.frozen = left_in_eval(model)
        if self.frozen and model.training:
            self.reporter.line(f"{len(self.frozen)} submodules were given in eval mode and stay in it")
        if config.freeze:
            self.frozen += freeze(model, config.freeze)
            still = sum(p.numel() for p in model.parameters() if not p.requires_grad)
            self.reporter.line(f"frozen: {still:,} of {sum(p.numel() for p in model.parameters()):,} weights")
        prepared = self.defense.prepare(model, shape)
        if taken := take_noise(prepared, noise):
            self.reporter.line(f"{config.init_from}: its noise is taken over, {taken} tensors")
        self.measured = bool(taken)
        return prepared

    def _measure(self) -> None:
        """Let the defense set what follows from the first batch, if it has anything of that kind."""
        if self.measured or not self.defense.measures:
            return
        with isolated_rng():
            x, _ = next(iter(self.source.epoch(0)))
            train_but(self.model, self.frozen)
            self.defense.measure(self.model, self.mode.place_images(x))

    # -- position ---------------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Number of the next step."""
        return self.epoch * self.batches + self.batch

    def clock(self) -> Clock:
        """Return where the training stands."""
        start = 0
        for index, stage in enumerate(self.plan):
            if self.epoch < start + stage.epochs or index == len(self.plan) - 1:
                return Clock(
                    self.epoch, self.batch, self.batches, index, self.epoch - start, self.source.num_examples
                )  # fmt: skip
            start += stage.epochs
        raise ConfigError("the defense has no stages; return at least one from stages()")

    @property
    def looks_at_labels(self) -> bool:
        """Whether the labels of the epoch that begins tell if a part of the set cannot stand for the whole."""
        return self.step == 0 and getattr(self.source, "part_of", None) is not None

    def enter_stage(self, clock: Clock) -> None:
        """Build the optimisers of the stage that the clock is in, if they are not the current ones."""
        if clock.stage != self.stage:
            self._build_optimizers(clock.stage)

    def _build_optimizers(self, stage: int) -> None:
        # Over every parameter, also those that a delay has frozen so far.
        self.optimizers = self.plan[stage].optimizers(self.model)
        self.stage = stage
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["base_lr"] = group["lr"]
        self._dress_optimizers()

    def _dress_optimizers(self) -> None:
        """Make the optimisers fit for recorded steps, where steps are recorded; otherwise leave them as they are."""
        if self.guard is None or self.recorded is None:
            return
        self.recorded.usable &= prepare(self.optimizers, self.device)
        self.guard.watch(self.optimizers)

    # -- saving and restoring ---------------------------------------------------------------------------------------

    def metadata(self) -> dict[str, Any]:
        """Return what the header of a checkpoint says beside the network itself."""
        return {
            "config": self.config.to_dict(),
            "input_shape": list(self.input_shape),
            "defense": self.config.defense,
            "predictor": self.defense.predictor,
            "members": self.defense.members,
            "dataset": self.dataset,
            "classes": None if self.classes is None else list(self.classes),
            "epoch": self.epoch if self.chosen is None else self.chosen.epoch + 1,
            "step": self.step if self.chosen is None else self.chosen.step,
            **({"extended": self.extended} if self.extended else {}),
            **self.parts,
        }

    def save(self, metrics: MetricsFile) -> None:
        """Write a checkpoint, unless nothing is to be written.

        Raises:
            NonFiniteError: a weight is not finite; a checkpoint of it would be no good one.
        """
        if self.out is None:
            return
        self.check_finite()
        for name, tensor in self.model.state_dict().items():
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.is_floating_point()
                and not bool(torch.isfinite(tensor).all())
            ):
                raise NonFiniteError(f"weight {name!r} is not finite after step {self.step}; {self._advice()}")
        text = metrics.sync()
        resume = {
            "epoch": self.epoch,
            "batch": self.batch,
            "stage": self.stage,
            "batches": self.batches,
            "gear": self.mode.name,
            "compiled": self.mode.compiled_rows,
            "identity": self.identity,
            **({"code": codes} if (codes := codes_of(self.parts)) else {}),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "totals": self.totals.state(),
            "seconds": self.seconds,
            "epochs": self.epochs,
            "extended": self.extended,
            "metrics_bytes": len(text),
            "metrics": torch.frombuffer(bytearray(zlib.compress(text)), dtype=torch.uint8),
        }
        if self.best is not None:
            resume["best"] = self.best.state()
        if self.average is not None or self.chosen is not None:
            # The file of the network holds what anyone wants, the average or the best; the training goes on from these.
            resume["weights"] = _on_cpu(self.model.state_dict())
        if self.average is not None:
            resume["average"] = self.average.state()
        if self.beside:
            resume["beside"] = {name: _on_cpu(own.state_dict()) for name, own in self.beside.items()}
        with self.averaged() if self.chosen is None else self.chosen.installed(self.model):
            model = model_bytes(self.model, self.metadata())
        self._hold_folder(metrics)
        self.last_good = write_checkpoint(self.out, self.step, model, resume)

    def _hold_folder(self, metrics: MetricsFile) -> None:
        """Write the run folder again if it was deleted or moved away under the training."""
        if self.out is None or not (metrics.lost() or not (self.out / SETTINGS).exists()):
            return
        self.reporter.line(f"{self.out} was deleted or moved; it is written again", always=True)
        write_settings(self.out, self.config, self.device)
        metrics.rewrite()

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Return the context in which the network has its averaged weights, if there is an average."""
        return contextlib.nullcontext() if self.average is None else self.average.installed(self.model)

    @property
    def chosen(self) -> BestEpoch | None:
        """The best epoch, where its weights are kept in place of the last ones."""
        return self.best if self.best is not None and self.best.values else None

    @property
    def ended(self) -> bool:
        """Whether nothing is left to train: all epochs are done, or no better one has come for long enough."""
        return self.epoch >= self.epochs or (self.best is not None and self.best.ended(self.epoch))

    def finish(self) -> None:
        """Leave the network as it is to be used, in eval mode: its best or averaged weights, where there are such."""
        if self.chosen is not None:
            self.chosen.install(self.model)
        elif self.average is not None:
            self.average.install(self.model)
        self.model.eval()
        settle(self.model)

    def restore(self) -> bool:
        """Go to the newest checkpoint of the run folder that is whole, if there is one.

        Raises:
            CheckpointError: none is whole, or it is of other data or another network.
        """
        say = partial(self.reporter.line, always=True)
        found = None if self.folder is None else self._newest(self.folder, say)
        if found is None:
            return False
        checkpoint, resume, state = found
        now = {"batches": self.batches, "gear": self.mode.name, "compiled": self.mode.compiled_rows}
        assert self.folder is not None
        if self.best is not None and "best" in resume:
            self.best.restore(resume["best"])
        ended = resume["epoch"] >= self.epochs or (self.best is not None and self.best.ended(resume["epoch"]))
        check_same(self.folder, resume, now, self.identity, finished=ended, say=say)
        check_code(self.folder, resume, codes_of(self.parts))
        check_noise(checkpoint, self.model, state)
        if (planned := resume["epochs"]) not in (None, self.epochs):
            before = self.defense.stages(replace(self.settings, epochs=planned))
            check_stages(before, self.plan)
        try:
            self.model.load_state_dict(resume.get("weights", state))
        except (RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"{self.folder} holds a run of another network ({reason}); give another --out"
            ) from None
        try:
            self._restore_position(resume)
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError, AttributeError, zlib.error) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise CheckpointError(
                f"{checkpoint} does not fit ({reason}); delete this folder, or give another --out"
            ) from None
        self.last_good = checkpoint
        if planned not in (None, self.epochs):
            self._extend(planned)
        # Interrupted between the last step of an epoch and its scores: what the step had switched must be so again.
        self.defense.begin_step(self.model, self.clock())
        return True

    def _newest(self, folder: Path, say: Say) -> Whole | None:
        """Return the checkpoint to go on from, if there is one, as the first process chooses it."""
        found = checkpoints(folder) if self.ranks.first else []
        whole = newest_whole(folder, found, say) if found else None
        chosen = self.ranks.told(lambda: "" if whole is None else whole[0].name)
        return whole if self.ranks.first or not chosen else newest_whole(folder, [folder / CHECKPOINTS / chosen], say)

    def _restore_position(self, resume: dict[str, Any]) -> None:
        assert self.folder is not None
        if self.average is not None:
            self.average.restore(resume["average"])
        for name, own in self.beside.items():
            own.load_state_dict(resume["beside"][name])
        self.mode.place(self.model)
        self.epoch, self.batch = resume["epoch"], resume["batch"]
        self.extended += [dict(one) for one in resume.get("extended", ())]
        if resume["stage"] >= 0:
            self._build_optimizers(resume["stage"])
            for name, optimizer in self.optimizers.items():
                optimizer.load_state_dict(resume["optimizers"][name])
            self._dress_optimizers()
        self.totals = Totals(self.device, resume["totals"])
        self.seconds = resume["seconds"]
        if self.out is not None:
            self.metrics = metrics_text(self.out, resume, partial(self.reporter.line, always=True))

    def _extend(self, planned: int) -> None:
        """Note that a run of ``planned`` epochs goes on to more."""
        self.extended.append({"epoch": self.epoch, "planned": planned})
        how = "as if all had been asked for at once"
        if self.settings.schedule not in UNPLANNED:
            how = f"at the learning rate that schedule {self.settings.schedule!r} has there over {self.epochs} epochs"
        self.reporter.line(
            f"{self.folder}: {planned} epochs were planned; going on to {self.epochs}, {how}", always=True
        )

    def _advice(self) -> str:
        kept = f"the last good checkpoint is {self.last_good}" if self.last_good else "there is no checkpoint yet"
        return f"{kept}; lower lr (it is {self.settings.lr:g}), or use engine 'plain'"

    # -- going forward ----------------------------------------------------------------------------------------------

    def run_step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Run one iteration on a batch; it does not move the position.

        Raises:
            NonFiniteError: the loss is NaN or infinite; nothing is updated.
        """
        clock = self.clock()
        self.enter_stage(clock)
        factor = self.plan[clock.stage].factor(clock)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                set_rate(group, group["base_lr"] * factor)
        seed_torch(self.config.seed, "step", clock.step)
        train_but(self.model, self.frozen)
        self.defense.begin_step(self.model, clock)

        images = len(y)
        step, x, share = partial(self._iterate, clock), self.mode.place_images(x), None
        if not self.ranks.alone:
            share = self.ranks.share(images, own_statistics=not self.config.sync_batch_norm)
            step = partial(self._iterate, clock, share=share, marked=mark(x, y))
            x, y = share.of(x), share.of(y)
        weight = self.defense.regulariser_weight(clock)
        with _memory_explained(images):
            if self.recorded is None:
                iteration = step(x, y, weight)
            else:
                iteration = self.recorded.run(self._capture_key(clock), x, y, weight, step)
        if share is not None and share.own_statistics:
            networks = (self.model, *self.beside.values())
            average_running_statistics((module for network in networks for module in network.modules()), share)
        if self.average is not None:
            self.average.update(self.model)
        self.totals.add_iteration(iteration, images)

    def _iterate(
        self,
        clock: Clock,
        x: torch.Tensor,
        y: torch.Tensor,
        weight: torch.Tensor | float,
        share: Share | None = None,
        marked: torch.Tensor | None = None,
    ) -> Iteration:
        """Run one iteration of alternating back-propagation, on all of a batch or on a share of it."""
        loss: Callable[[], Losses] = partial(self.defense.loss, self.model, x, y, clock, self.settings)
        if share is not None and marked is not None:
            loss = partial(objective, loss, share, marked)
        pieces = min(self.settings.accumulate, max(len(x) // 2, 1))
        parts = [
            (partial(self.defense.loss, self.model, own, labels, clock, self.settings), len(labels) / len(y))
            for own, labels in zip(x.tensor_split(pieces), y.tensor_split(pieces), strict=True)
        ]
        with execution.training(self.model), one_image_explained(len(x)):
            return iterate(
                self.defense, self.model, clock, self.optimizers, loss if pieces == 1 else parts,
                partial(self._check_losses, clock), weight, None if share is None else self.ranks.add_gradients,
                self.settings.clip_norm,
            )  # fmt: skip

    def _check_losses(self, clock: Clock, losses: Losses) -> None:
        """Refuse a loss that is not finite, or raise the flag where nothing may wait for the device."""
        if self.guard is not None:
            self.guard.check(losses)
        elif not math.isfinite(losses.total.item()):
            # Waits for the device in every step; on the CPU that is free, and nothing spreads the NaN.
            raise NonFiniteError(
                f"the loss is {losses.total.item()} at step {clock.step} (epoch {clock.epoch}, batch {clock.batch}); "
                f"{self._advice()}"
            )

    def _capture_key(self, clock: Clock) -> Hashable | None:
        """Return what a step depends on beside its tensors and the regulariser's weight; None is never recorded.

        The registry says of which defenses that is known: their loss looks at the clock for the adversary's delay only.
        """
        if not DEFENSES.entry(self.config.defense).fact("recordable") or self.settings.attack_draws == "held":
            return None  # held draws are replayed from a seed that the host draws in each step
        switched = tuple(module.enabled for module in noise_modules(self.model))
        trained = tuple(parameter.requires_grad for parameter in self.model.parameters())
        attacked = clock.epoch >= self.settings.adversarial_delay
        return clock.stage, attacked, switched, trained

    def look_at(self, what: str, source: BatchSource, labels: list[torch.Tensor], classes: int) -> None:
        """Warn once if the labels of a part of the training or monitored set cannot stand for the whole."""
        if what not in self._looked_at and labels:
            self._looked_at.add(what)
            warn_of_subset(source, torch.cat(labels), classes)

    def check_finite(self) -> None:
        """Read the flag of recorded steps: whether a loss was not finite since the last time.

        Raises:
            NonFiniteError: one was; nothing has been updated since.
        """
        if self.guard is not None and self.guard.raised():
            raise NonFiniteError(
                f"the loss was not finite at or before step {self.step} (epoch {self.epoch}, batch {self.batch}), and "
                f"nothing has been updated since; {self._advice()}"
            )

    @torch.no_grad()
    def monitor_scores(self) -> dict[str, float]:
        """Score the monitored images, clean and under PGD of the training's budget; one draw each, averaged weights."""
        if self.monitor is None:
            return {}
        with self.averaged():
            return self._scores(self.monitor)

    def _scores(self, monitor: BatchSource) -> dict[str, float]:
        self.model.eval()
        seed_torch(self.config.seed, "monitor", self.epoch)
        attack = training_adversary(self.settings)
        hits = torch.zeros(3, dtype=torch.int64, device=self.device)  # clean, attacked, and what is not finite
        labels, classes, fits = [], 1, Halving()
        for x, y in monitor.epoch(0):
            labels.append(y)
            share = self.ranks.share(len(y))
            x, y = share.of(self.mode.place_images(x)), share.of(y)
            with sharded(share):
                adversarial = fits.map(partial(attack.craft, self.model), x, y)
                answers = [fits.map(partial(forward, self.model), z) for z in (x, adversarial)]
            found = torch.stack(
                [*((logits.argmax(1) == y).sum() for logits in answers), (~torch.isfinite(adversarial)).sum()]
            )
            hits += found * share.counted
            classes = answers[0].shape[1]
            check_labels(labels[-1], classes)
        *right, bad = self.ranks.sum(hits).tolist()
        if bad:
            raise NonFiniteError(
                f"a gradient or logit of the monitored images was not finite after step {self.step}; {self._advice()}"
            )
        self.look_at("monitor", monitor, labels, classes)
        count = sum(map(len, labels))
        clean, pgd = (torch.tensor(right) / max(count, 1)).tolist()
        return {f"{self.monitored}_clean": clean, f"{self.monitored}_pgd": pgd, f"{self.monitored}_n": count}


def _on_cpu(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict with copies of its tensors on the CPU."""
    return {
        key: value.detach().cpu().contiguous().clone() if isinstance(value, torch.Tensor) else value
        for key, value in state.items()
    }


def check_network(training: Training, x: torch.Tensor, y: torch.Tensor) -> int:
    """Try the network on two images before the first step, in eval mode, so nothing moves; return its classes.

    Raises:
        InputError: it does not take these images, gives no logits, or has fewer classes than there are labels.
        ConfigError: it has one mode for good.
    """
    try:
        training.model.train()
    except NotImplementedError:
        raise ConfigError(
            "the network holds a program of torch.export, which has no train mode; give the network it was made from"
        ) from None
    with isolated_rng(), in_mode(training.model, False), torch.no_grad():
        try:
            logits = forward(training.model, x[:2].clone())
        except Learn2PerturbError:
            raise
        except Exception as error:  # a stranger's network may raise anything
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise InputError(
                f"the network failed on images of shape {tuple(x.shape[1:])}: {reason}; give images of the size it was "
                "made for"
            ) from error
    check_labels(getattr(training.source, "labels", y), logits.shape[1])
    return logits.shape[1]
