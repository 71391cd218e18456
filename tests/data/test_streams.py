"""Data that people have: evaluate, certify, diagnose and train agree in what they accept, and lose no image."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, TensorDataset, get_worker_info

import learn2perturb as l2p
from learn2perturb.attacks import PGD
from learn2perturb.data import make_source
from learn2perturb.diagnosis.budget import QUICK, budget_of
from learn2perturb.engine.labels import class_numbers
from learn2perturb.errors import InputError

N = 32
X = torch.rand(N, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N) % 10


class Arrays(Dataset):
    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple:
        return X[index].numpy(), np.int64(Y[index])


class Dicts(Arrays):
    def __getitem__(self, index: int) -> dict:  # type: ignore[override]
        return {"x": X[index], "y": int(Y[index])}


class Ready(Dataset):
    """Batches made by the data set: 13, 13, 6 images."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple:
        return X[13 * index : 13 * index + 13], Y[13 * index : 13 * index + 13]


class Columns(Arrays):
    def __getitem__(self, index: int) -> tuple:
        return X[index], torch.tensor([int(Y[index])], dtype=torch.int32)


class Stream(IterableDataset):
    """Gives ``real`` images and promises ``said``; with ``shared``, each worker process gives its part."""

    def __init__(self, said: int = N, real: int = N, shared: bool = True) -> None:
        self.said, self.real, self.shared = said, real, shared

    def __len__(self) -> int:
        return self.said

    def __iter__(self) -> Iterator:
        worker = get_worker_info() if self.shared else None
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        return ((X[i % N], int(Y[i % N])) for i in range(first, self.real, step))


class OwnSource:
    """A BatchSource of the user's own, with labels of another type."""

    num_examples, num_batches, input_shape, num_classes = N, 2, (1, 8, 8), 10

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in range(start, 2):
            yield X[16 * batch : 16 * batch + 16].double(), Y[16 * batch : 16 * batch + 16].to(torch.uint8)


def as_pair(items: list) -> tuple:
    return torch.stack([item["x"] for item in items]), torch.tensor([item["y"] for item in items])


GOOD = {
    "arrays": lambda: Arrays(),
    "list": lambda: [(X[i], int(Y[i])) for i in range(N)],
    "dicts": lambda: DataLoader(Dicts(), 16, collate_fn=as_pair),
    "ready": lambda: DataLoader(Ready(), batch_size=None),
    "batch sampler": lambda: DataLoader(Arrays(), batch_sampler=BatchSampler(range(N), 5, drop_last=False)),
    "columns": lambda: DataLoader(Columns(), 16),
    "stream": lambda: DataLoader(Stream(), 16),
    "stream set": lambda: Stream(),
    "workers": lambda: DataLoader(Stream(), 5, num_workers=2),
    "own source": lambda: OwnSource(),
    "uint8": lambda: ((X * 255).to(torch.uint8), Y.to(torch.int16)),
    "half": lambda: (X.half(), Y.numpy().astype(np.uint64)),
}

SHORT = {"unbounded_steps": 1, "samples": 1, "square_queries": 2, "restarts": 1, "scorings": 1, "some": 4}
SHORT |= {"step_curve": (1, 2), "draw_curve": (1, 4), "eps_grid": (2 / 255, 1.0), "slope_repeats": 3}  # type: ignore[dict-item]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()


def evaluated(data: object) -> int:
    return l2p.evaluate(network(), data).rows[0].n


def certified(data: object) -> int:
    return len(l2p.certify(network(), data, n0=1, n=2, sigma=0.25).radii)


def diagnosed(data: object) -> int:
    budget = budget_of(QUICK, **SHORT)
    return len(l2p.diagnose(network(), data, budget=budget, attack=PGD(0.1, 0.05, 1)).labels.unpack())


def trained(data: object) -> int:
    config = l2p.TrainConfig(
        defense="none", recipe="fast", epochs=1, batch_size=16, monitor=N, device="cpu", engine="plain"
    )
    run = l2p.train(config, model=network(), data=(data, data), progress=False)
    return int(run.metrics[-1]["test_n"])


VERBS = [evaluated, certified, diagnosed, trained]


@pytest.mark.parametrize("kind", GOOD)
def test_every_verb_reads_every_image(kind: str) -> None:
    assert [verb(GOOD[kind]()) for verb in VERBS] == [N] * 4


def loader_ending_in(x: Tensor) -> DataLoader:
    return DataLoader(TensorDataset(torch.cat([X, x]), torch.zeros(N + 1, dtype=torch.int64)), 8)


BAD = {
    "longer": (lambda: DataLoader(Stream(real=40), 8), "more than the 32 images"),
    "endless": (lambda: DataLoader(Stream(real=10**12), 8), "more than the 32 images"),
    "shorter": (lambda: DataLoader(Stream(real=20), 8), "20 images"),
    "whole set in each worker": (lambda: DataLoader(Stream(shared=False), 8, num_workers=2), "do all worker processes"),
    "dicts": (lambda: DataLoader(Dicts(), 16), "collate_fn"),
    "triples": (lambda: DataLoader(TensorDataset(X, Y, Y), 16), "of 3"),
    "other sizes": (lambda: [(X[0], 0), (X[0, :, :4], 1)], "one size"),
    "last batch out of range": (lambda: loader_ending_in(2 * X[:1]), "[0, 1]"),
    "last batch NaN": (lambda: loader_ending_in(torch.nan * X[:1]), "nan"),
    "last label negative": (lambda: DataLoader(TensorDataset(X, torch.tensor([*[0] * 31, -1])), 8), "-1"),
    "last label too large": (lambda: DataLoader(TensorDataset(X, torch.tensor([*[0] * 31, 10])), 8), "label 10"),
    "soft labels": (lambda: DataLoader(TensorDataset(X, torch.full((N, 10), 0.1)), 8), "whole numbers"),
    "batches of two sizes": (lambda: DataLoader([(X[:4], Y[:4]), (X[:4, :, :4], Y[:4])], batch_size=None), "one size"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:the model was given in train mode")
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("kind", BAD)
def test_every_verb_refuses_with_one_line(kind: str, verb) -> None:  # type: ignore[no-untyped-def]
    data, words = BAD[kind]
    with pytest.raises(InputError) as caught:
        verb(data())
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_batches_of_a_stream_with_workers_are_counted_and_resume_exactly() -> None:
    source = make_source(GOOD["workers"]())
    batches = [(x.clone(), y.clone()) for x, y in source.epoch(0)]
    assert source.num_batches == len(batches) == 8 and source.num_examples == N  # 16 images a worker: 5, 5, 5, 1
    rest = list(source.epoch(0, start=6))
    assert len(rest) == 2 and all(torch.equal(x, a) for (x, _), (a, _) in zip(rest, batches[6:], strict=True))


def test_ready_batches_count_as_images_and_take_a_limit() -> None:
    source = make_source(GOOD["ready"](), limit=20)
    assert (source.num_examples, source.num_batches) == (20, 2) and [len(y) for _, y in source.epoch(0)] == [13, 7]
    assert make_source(GOOD["ready"]()).num_examples == 39  # an estimate, from the first batch: no promise


@pytest.mark.parametrize(
    "given", [[3, 1], np.array([[3], [1]], dtype=np.uint8), torch.tensor([3, 1], dtype=torch.int8)]
)
def test_class_numbers_of_every_form(given: object) -> None:
    y = class_numbers(given, 2)
    assert y.tolist() == [3, 1] and y.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float64])
def test_one_hot_rows_are_read_where_a_library_has_them(dtype: torch.dtype) -> None:
    rows = nn.functional.one_hot(torch.tensor([3, 1]), 4).to(dtype)
    assert class_numbers(rows, 2, one_hot=True).tolist() == [3, 1]
    with pytest.raises(InputError, match="whole numbers"):
        class_numbers(rows, 2)
    with pytest.raises(InputError, match="not one-hot"):
        class_numbers(torch.ones(2, 4, dtype=dtype), 2, one_hot=True)


@pytest.mark.parametrize("given", [[0.0, 1.0], [[0, 1]], [0], [-1, 0], ["a", "b"], [True, False], torch.zeros(2, 1)])
def test_other_labels_are_refused(given: object) -> None:
    with pytest.raises(InputError, match="labels"):
        class_numbers(given, 2, one_hot=True)
