"""Memory that runs out: halved and said, with equal results where nothing is drawn; a training step is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from learn2perturb.attacks import PGD
from learn2perturb.certification import certify
from learn2perturb.engine.halving import Halving, out_of_memory
from learn2perturb.errors import MemoryLimitError
from learn2perturb.evaluation import evaluate
from learn2perturb.training import TrainConfig, train

CPU = "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
WINDOWS = "DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."


class Narrow(nn.Module):
    """A linear network that has memory for a few images only."""

    def __init__(self, most: int, error: Exception) -> None:
        super().__init__()
        self.layer, self.most, self.error = nn.Linear(16, 3), most, error
        nn.init.normal_(self.layer.weight, generator=torch.Generator().manual_seed(0))
        nn.init.zeros_(self.layer.bias)

    def forward(self, x):
        if len(x) > self.most:
            raise self.error
        return self.layer(x.flatten(1))


def images(count=20):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 1, 4, 4, generator=generator), torch.arange(count) % 3


ERRORS = [RuntimeError(CPU), RuntimeError(WINDOWS), MemoryError(), torch.cuda.OutOfMemoryError("CUDA out of memory.")]


@pytest.mark.filterwarnings("ignore:out of memory")  # pytest.warns hands on those that it does not look for
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_evaluation_goes_on_with_half_and_gives_the_same(error):
    attacks = {"pgd": PGD(eps=0.1, steps=3, step_size=0.04, random_start=False)}
    whole = evaluate(Narrow(99, error), images(), attacks, batch_size=20)
    with pytest.warns(UserWarning, match="out of memory with 20 images in a pass: going on with 10"):
        halved = evaluate(Narrow(6, error), images(), attacks, batch_size=20)
    for one, two in zip(whole.rows, halved.rows, strict=True):
        assert (one.accuracy, one.n, one.linf) == (two.accuracy, two.n, pytest.approx(two.linf))
        assert (one.forward_passes, one.backward_passes) == pytest.approx((two.forward_passes, two.backward_passes))
        assert one.correct == two.correct


@pytest.mark.filterwarnings("ignore:out of memory")
def test_certify_goes_on_too():
    found = certify(Narrow(6, RuntimeError(CPU)), images(4), sigma=0.1, n0=10, n=50, batch_size=40)
    assert len(found.radii) == 4


@pytest.mark.filterwarnings("ignore:out of memory")
def test_one_image_that_does_not_fit_is_a_typed_line():
    with pytest.raises(MemoryLimitError, match="out of memory with a single image"):
        evaluate(Narrow(0, RuntimeError(CPU)), images(), batch_size=4)


def test_other_errors_are_not_mistaken():
    assert not out_of_memory(RuntimeError("shape mismatch"))
    assert not out_of_memory(ValueError("out of memory"))
    with pytest.raises(RuntimeError, match="mine"):
        Halving().run(lambda rows: (_ for _ in ()).throw(RuntimeError("mine")), 4)


@pytest.mark.filterwarnings("ignore:out of memory")
def test_parts_cover_all_rows_once_and_the_size_is_kept():
    fits, seen = Halving(), []

    def work(rows: slice) -> int:
        if rows.stop - rows.start > 3:
            raise MemoryError
        seen.append(rows)
        return rows.stop - rows.start

    with pytest.warns(UserWarning, match="going on with 3"):
        assert fits.run(work, 11) == [3, 3, 3, 2]
    assert fits.run(work, 5) == [3, 2]
    assert [rows.start for rows in seen] == [0, 3, 6, 9, 0, 3]


@pytest.mark.filterwarnings("ignore:out of memory")
def test_a_training_step_names_the_batch_size_and_the_monitor_goes_on():
    settings = {
        "defense": "none", "model": "digits_cnn", "recipe": "fast", "epochs": 1, "tensorboard": False, "device": "cpu",
        "engine": "plain", "monitor": 20, "augment": False,
    }  # fmt: skip
    with pytest.raises(MemoryLimitError, match="training step of 8 images; give a smaller --batch-size"):
        train(TrainConfig(**settings, batch_size=8), model=Narrow(6, RuntimeError(CPU)), data=images(), progress=False)
    data = (images(), images())
    run = train(TrainConfig(**settings, batch_size=4), model=Narrow(6, RuntimeError(CPU)), data=data, progress=False)
    assert run.metrics[0]["test_n"] == 20
