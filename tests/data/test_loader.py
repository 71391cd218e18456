from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from learn2perturb.data import BatchSource, ImageData, load_data, make_source
from learn2perturb.data.loader import augment
from learn2perturb.errors import ConfigError, InputError, Learn2PerturbError


def toy(n: int = 70, **changes: object) -> ImageData:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (n, 3, 8, 6), dtype=torch.uint8, generator=generator)
    fields = {"flip": True, "crop_padding": 2, "mean": (0.5,) * 3, "std": (0.2,) * 3, **changes}
    return ImageData("toy", images, torch.arange(n) % 7, tuple("abcdefg"), **fields)  # type: ignore[arg-type]


def slow_augment(images: torch.Tensor, generator: torch.Generator, padding: int, flip: bool) -> torch.Tensor:
    n, _, height, width = images.shape
    draws = torch.randint(0, 2 * padding + 1, (2, n, 1), generator=generator)
    mirror = torch.randint(0, 2, (n, 1), generator=generator) if flip else torch.zeros(n, 1)
    out = torch.zeros_like(images)
    for i in range(n):
        for row in range(height):
            for column in range(width):
                from_row, from_column = row + int(draws[0, i]) - padding, column + int(draws[1, i]) - padding
                if 0 <= from_row < height and 0 <= from_column < width:
                    to = width - 1 - column if mirror[i] else column
                    out[i, :, row, to] = images[i, :, from_row, from_column]
    return out


@pytest.mark.parametrize(("padding", "flip"), [(0, True), (2, False), (4, True)])
def test_crop_and_flip_equal_a_slow_reference(padding: int, flip: bool) -> None:
    images = toy(20).images
    fast = augment(images, torch.Generator().manual_seed(3), padding=padding, flip=flip)
    assert torch.equal(fast, slow_augment(images, torch.Generator().manual_seed(3), padding, flip))


def test_flip_has_probability_one_half_and_crops_are_uniform() -> None:
    n = 4000
    image = torch.zeros(n, 1, 5, 5)
    image[:, :, 2, 0] = 1
    flipped = augment(image, torch.Generator().manual_seed(0), padding=0, flip=True)[:, 0, 2, 4].mean()
    assert abs(float(flipped) - 0.5) < 4 * 0.5 / n**0.5
    image = torch.zeros(n, 1, 5, 5)
    image[:, :, 2, 2] = 1
    places = augment(image, torch.Generator().manual_seed(0), padding=2, flip=False).mean(0)
    torch.testing.assert_close(places, torch.full((1, 5, 5), 1 / 25), atol=4 * (0.04 * 0.96 / n) ** 0.5, rtol=0)


def batches(source: BatchSource, epoch: int = 0, start: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(x.clone(), y.clone()) for x, y in source.epoch(epoch, start)]


def same(left: list, right: list) -> bool:
    pairs = zip(left, right, strict=True)
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)


class Jittered(Dataset):
    """Random transforms from all three generators, as users' data sets have them."""

    def __len__(self) -> int:
        return 23

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        import random

        noise = (torch.rand(1, 4, 4) + float(np.random.rand()) + random.random()) / 3
        return noise, index


def sources() -> dict[str, BatchSource]:
    return {
        "image_data": make_source(toy(), batch_size=16, shuffle=True, augment=True, seed=4),
        "tensors": make_source((toy().images / 255, torch.arange(70)), batch_size=16, shuffle=True, seed=4),
        "dataset": make_source(Jittered(), batch_size=5, shuffle=True, seed=4),
        "loader": make_source(DataLoader(Jittered(), batch_size=5, shuffle=True), seed=4),
        "own_generator": make_source(
            DataLoader(Jittered(), batch_size=5, shuffle=True, generator=torch.Generator()), seed=4
        ),
    }


@pytest.mark.parametrize("kind", ["image_data", "tensors", "dataset", "loader", "own_generator"])
def test_epochs_are_functions_of_seed_and_epoch_and_start_is_exact(kind: str) -> None:
    source = sources()[kind]
    first = batches(source, 1)
    torch.manual_seed(99)
    again = sources()[kind]
    batches(again, 0)
    assert isinstance(source, BatchSource) and same(first, batches(again, 1))
    assert not torch.equal(first[0][1], batches(source, 2)[0][1])
    for start in (1, 3, len(first) - 1):
        torch.manual_seed(start)
        assert same(first[start:], batches(sources()[kind], 1, start))
    assert len(first) == source.num_batches and sum(len(y) for _, y in first) == source.num_examples
    assert len(first[-1][1]) == (3 if source.num_examples == 23 else 6)  # the last, smaller batch is there
    assert all(x.dtype == torch.float32 and x.is_contiguous() and x.min() >= 0 and x.max() <= 1 for x, _ in first)
    assert all(y.dtype == torch.int64 for _, y in first)


def test_what_is_drawn_between_two_batches_does_not_matter() -> None:
    quiet, noisy = batches(sources()["loader"], 1), []
    for x, y in sources()["loader"].epoch(1):
        noisy.append((x.clone(), y.clone()))
        torch.rand(3), np.random.rand()
    assert same(quiet, noisy)


def test_in_order_without_augmentation_gives_the_set_itself() -> None:
    data = toy()
    x, y = (torch.cat(part) for part in zip(*batches(make_source(data, batch_size=16)), strict=True))
    assert torch.equal(x, data.images.float() / 255) and torch.equal(y, data.labels)
    shuffled = torch.cat([y for _, y in batches(make_source(data, batch_size=16, shuffle=True))])
    assert not torch.equal(shuffled, y) and torch.equal(shuffled.sort().values, y.sort().values)


def test_what_the_caller_writes_does_not_reach_the_set() -> None:
    x, y = torch.rand(6, 1, 2, 2), torch.arange(6)
    source = make_source((x, y), batch_size=4)
    for a, b in source.epoch(0):
        a.zero_(), b.zero_()
    assert torch.equal(torch.cat([a for a, _ in batches(source)]), x) and y.sum() == 15 and x.sum() > 0


def test_digits_are_neither_flipped_nor_cropped() -> None:
    data = load_data("digits")
    source = make_source(data, batch_size=2000, augment=True)
    assert torch.equal(batches(source)[0][0], data.images.float() / 255)


def test_limit_shapes_and_classes() -> None:
    source = make_source(toy(), batch_size=16, limit=20)
    assert (source.num_examples, source.num_batches, source.input_shape, source.num_classes) == (20, 2, (3, 8, 6), 7)
    loader = DataLoader(TensorDataset(torch.rand(30, 1, 4, 4), torch.arange(30)), batch_size=8)
    source = make_source(loader, limit=20)
    assert (source.num_examples, source.num_batches, source.input_shape, source.num_classes) == (20, 3, (1, 4, 4), None)
    assert [len(y) for _, y in source.epoch(0)] == [8, 8, 4] and [len(y) for _, y in source.epoch(0, 2)] == [4]
    assert make_source(source) is source
    dropped = make_source(DataLoader(loader.dataset, batch_size=8, drop_last=True))
    assert (dropped.num_examples, dropped.num_batches) == (24, 3)


def test_peeking_at_the_shape_leaves_the_random_state() -> None:
    source = make_source(Jittered(), batch_size=5)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    assert source.input_shape == (1, 4, 4) and torch.equal(torch.rand(1), expected)


def test_uint8_and_arrays_are_taken() -> None:
    images = np.full((3, 1, 2, 2), 255, dtype=np.uint8)
    ((x, y),) = batches(make_source((images, np.array([0, 1, 2], dtype=np.int32)), batch_size=4))
    assert float(x.min()) == 1 and y.dtype == torch.int64
    ((x, _),) = batches(make_source(TensorDataset(torch.from_numpy(images), torch.arange(3)), batch_size=4))
    assert x.dtype == torch.float32 and float(x.min()) == 1


class Endless(IterableDataset):
    def __iter__(self):  # type: ignore[no-untyped-def]
        yield torch.rand(1, 2, 2), 0


GOOD, LABELS = torch.rand(4, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.arange(4)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (3, "int"),
        ({}, "dict"),
        (GOOD, "Tensor"),
        ("cifar10", "str"),
        ((GOOD,), "pair"),
        ((GOOD, LABELS, LABELS), "tuple of 3"),
        ((GOOD, "y"), "two tensors"),
        ((GOOD[0], LABELS), "(N, C, H, W)"),
        ((GOOD[:0], LABELS[:0]), "sizes 0"),
        ((GOOD * 255, LABELS), "[0, 1]"),
        ((GOOD - 0.9, LABELS), "[0, 1]"),
        ((GOOD * float("nan"), LABELS), "nan"),
        ((GOOD.long(), LABELS), "int64"),
        ((GOOD, LABELS.float()), "labels are torch.float32"),
        ((GOOD, LABELS[:3]), "(4,)"),
        ((GOOD, LABELS - 1), "-1"),
        (TensorDataset(GOOD * 3, LABELS), "[0, 1]"),
        (TensorDataset(GOOD), "pair"),
        (TensorDataset(GOOD[:0], LABELS[:0]), "empty"),
        (DataLoader(TensorDataset(GOOD, LABELS), batch_size=8, drop_last=True), "drop_last"),
        (Endless(), "length"),
    ],
)
def test_bad_data_gives_one_clear_line(data: object, words: str) -> None:
    with pytest.raises(InputError) as caught:
        list(make_source(data).epoch(0))
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"batch_size": 2.5}, {"limit": 0}, {"limit": "3"}])
def test_bad_settings_give_one_clear_line(arguments: dict) -> None:
    with pytest.raises(ConfigError, match="is not allowed"):
        make_source(toy(), **arguments)
    assert issubclass(ConfigError, Learn2PerturbError)
