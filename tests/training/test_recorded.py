"""Recorded steps, on a recorder for the CPU that works as CUDA graphs do: it keeps kernels and memory, not Python."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from learn2perturb.data import ImageData
from learn2perturb.defenses.learn2perturb import Learn2Perturb
from learn2perturb.engine import execution
from learn2perturb.errors import NonFiniteError
from learn2perturb.progress import Reporter
from learn2perturb.registry import DEFENSES
from learn2perturb.training import TrainConfig, recorded, state
from learn2perturb.training.state import Training

aten = torch.ops.aten


class Operations(TorchDispatchMode):
    """Writes down every operation with its very tensors; refuses what waits for a device."""

    def __init__(self):
        super().__init__()
        self.tape = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (aten._local_scalar_dense.default, aten.nonzero.default):
            raise RuntimeError(f"{func} waits for the device")
        result = func(*args, **(kwargs or {}))
        self.tape.append((func, args, kwargs or {}, result))
        return result


def again(func, args, kwargs, kept) -> None:
    """Run an operation on the memory that it was recorded with."""
    returned = func._schema.returns
    if any(r.alias_info is not None and not r.alias_info.is_write for r in returned):
        return  # a view: its memory is filled by what made it
    new = func(*args, **kwargs)
    if any(r.alias_info is not None for r in returned):
        return  # in place
    for old, fresh in zip(tree_leaves(kept), tree_leaves(new), strict=True):
        if isinstance(old, torch.Tensor) and old is not fresh:
            old.copy_(fresh)


class Tape:
    """A recorder for the CPU. Recording leaves the training as it was, as recording a CUDA graph does."""

    def __init__(self, training: Training):
        self.training, self.replays, self.recordings = training, 0, 0

    def warm_up(self, step) -> None:
        step()

    def record(self, step):
        optimizers = self.training.optimizers.values()
        tensors = [*self.training.model.parameters(), *self.training.model.buffers(), self.training.guard.flag]
        tensors += [v for o in optimizers for s in o.state.values() for v in s.values() if torch.is_tensor(v)]
        before, generator = [t.detach().clone() for t in tensors], torch.get_rng_state()
        with Operations() as operations:
            step()
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
        torch.set_rng_state(generator)
        self.recordings += 1

        @torch.no_grad()
        def replay() -> None:
            self.replays += 1
            for operation in operations.tape:
                again(*operation)

        return replay


RECORDED = execution.ExecutionMode("fast", folding=True, recording=True)
STEADY = [entry.name for entry in DEFENSES if entry.facts.get("recordable")]


@pytest.fixture
def on_tape(monkeypatch):
    monkeypatch.setattr(execution, "select", lambda *_, **__: RECORDED)
    monkeypatch.setattr(state, "CudaGraphs", lambda device: None)
    monkeypatch.setattr(recorded, "WARM_UPS", 1)


def images(count: int = 20) -> ImageData:
    generator = torch.Generator().manual_seed(0)
    return ImageData(
        "noise", torch.randint(256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8),
        torch.arange(count) % 3, ("a", "b", "c"), flip=False, crop_padding=1, mean=(0.5,), std=(0.25,),
    )  # fmt: skip


def trained(defense: str, *, recording: bool, epochs: int = 4, **settings) -> tuple[Training, Tape]:
    """Run a training of batches of 8, 8 and 4 images; return it and its recorder."""
    options = settings.pop("options", {})
    config = TrainConfig(
        defense=defense, model="digits_cnn", recipe="fast", epochs=epochs, batch_size=8, attack_steps=2, monitor=0,
        options=options, **settings,
    )  # fmt: skip
    training = Training(config.resolve(), None, images(), None, Reporter(False))
    tape = Tape(training)
    training.recorded = recorded.RecordedSteps(tape)
    training.recorded.usable = recording
    usable = recording and recorded.prepare(training.optimizers, training.device)
    assert usable == recording
    with execution.running(training.mode):
        for epoch in range(epochs):
            training.epoch = epoch
            for batch, (x, y) in enumerate(training.source.epoch(epoch)):
                training.batch = batch
                training.run_step(x, y)
    return training, tape


def assert_same(a: Training, b: Training) -> None:
    ours, theirs = a.model.state_dict(), b.model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    assert a.totals.means() == b.totals.means()


def test_the_defenses_that_can_be_recorded_are():
    assert {"none", "pgd_at", "learn2perturb", "learn2perturb_r", "pni", "adv_bnn", "rse", "trades"} <= set(STEADY)
    assert "pixeldp" not in STEADY  # its noise ramp moves in every step


@pytest.mark.parametrize("defense", STEADY)
def test_replayed_steps_do_what_launched_steps_do(defense, on_tape):
    options = {"noise_delay": 1} if defense.startswith("learn2perturb") else {}
    replayed, tape = trained(defense, recording=True, options=options)
    launched, _ = trained(defense, recording=False, options=options)
    assert replayed.recorded.usable
    assert tape.replays >= 8  # of 12 steps: one of each kind and size warms up
    assert_same(replayed, launched)
    assert not replayed.guard.raised()


def test_a_delayed_adversary_is_another_kind_of_step(on_tape):
    settings = {"adversarial_delay": 2, "attack_labels": "predicted"}
    replayed, tape = trained("pgd_at", recording=True, **settings)
    launched, _ = trained("pgd_at", recording=False, **settings)
    assert tape.recordings == 4  # without and with adversary, whole and last batch
    assert_same(replayed, launched)


def test_a_schedule_that_is_not_in_the_weight_goes_wrong(on_tape, monkeypatch):
    """The parity above can fail: tau within the regulariser, not in its weight, stays what it was when recorded."""
    weight, bare = Learn2Perturb.regulariser_weight, Learn2Perturb.regulariser
    monkeypatch.setattr(Learn2Perturb, "regulariser_weight", lambda *_: 1.0)
    monkeypatch.setattr(
        Learn2Perturb, "regulariser", lambda self, model, clock: weight(self, clock) * bare(self, model, clock)
    )
    options = {"noise_delay": 0, "gamma": 1e-1}
    replayed, _ = trained("learn2perturb", recording=True, options=options)
    launched, _ = trained("learn2perturb", recording=False, options=options)
    with pytest.raises(AssertionError):
        assert_same(replayed, launched)


def test_a_loss_that_is_not_finite_freezes_the_weights_and_is_named(on_tape):
    training, _ = trained("pgd_at", recording=True, epochs=2)
    before = {name: p.detach().clone() for name, p in training.model.named_parameters()}
    x, y = next(iter(training.source.epoch(0)))
    with execution.running(training.mode):
        training.run_step(torch.full_like(x, float("nan")), y)
        training.run_step(x, y)
    for name, parameter in training.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    with pytest.raises(NonFiniteError, match="not finite at or before step 5 .*nothing has been updated since"):
        training.check_finite()


def test_a_step_that_cannot_be_recorded_is_launched_and_said_once(on_tape, monkeypatch):
    def refuse(self, step):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Tape, "record", refuse)
    with pytest.warns(UserWarning, match="cannot be recorded here .*not permitted.*kernel by kernel") as caught:
        replayed, tape = trained("pgd_at", recording=True)
    assert len(caught) == 1
    assert tape.replays == 0
    launched, _ = trained("pgd_at", recording=False)
    torch.testing.assert_close(dict(replayed.model.state_dict()), dict(launched.model.state_dict()))


def test_only_optimisers_with_a_fused_kernel_are_recorded():
    weight = torch.nn.Parameter(torch.ones(2))
    device = torch.device("cpu")
    assert recorded.prepare({"weights": torch.optim.SGD([weight], lr=0.1)}, device)
    assert not recorded.prepare({"weights": torch.optim.RMSprop([weight], lr=0.1)}, device)


def test_the_mode_of_a_cuda_device_records_and_the_others_do_not():
    assert execution.CUDA.recording
    assert execution.CUDA.compiled_training
    assert not execution.FAST.recording
    assert not execution.PLAIN.recording
    assert dataclasses.replace(execution.CUDA, compiled_rows=8).name == "fast"
