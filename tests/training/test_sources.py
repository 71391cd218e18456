"""What a training needs of its data: batch sizes that BatchNorm can take, and one list of classes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import learn2perturb as l2p
from learn2perturb.data import ImageData
from learn2perturb.engine.modes import blind_to_one_image
from learn2perturb.errors import ConfigError, DataError, InputError

X = torch.rand(17, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(17) % 10


def one_pixel_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 8), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6, 10))


def config(**changes: object) -> l2p.TrainConfig:
    settings = {"defense": "none", "recipe": "fast", "epochs": 2, "batch_size": 8, "monitor": 0, "device": "cpu"}
    return l2p.TrainConfig(**(settings | {"engine": "plain", "tensorboard": False} | changes))  # type: ignore[arg-type]


class Ready(Dataset):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple:
        return X[8 * index : 8 * index + 8], Y[8 * index : 8 * index + 8]


DATA = {
    "pair": lambda: (X, Y),
    "dataset": lambda: TensorDataset(X, Y),
    "loader": lambda: DataLoader(TensorDataset(X, Y), 8),
    "ready": lambda: DataLoader(Ready(), batch_size=None),
}


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("defense", ["none", "pgd_at", "trades", "learn2perturb"])
def test_a_last_batch_of_one_image_joins_the_one_before(kind: str, defense: str) -> None:
    options = {"sites": ["2"]} if defense == "learn2perturb" else {}
    settings = config(defense=defense, attack_steps=1, options=options, epochs=1, log_every=1)
    run = l2p.train(settings, model=one_pixel_network(), data=DATA[kind](), progress=False)
    assert run.metrics[-1]["step"] == 2  # batches of 8 and 9, and no third


def test_the_epoch_has_every_image() -> None:
    seen: list[int] = []

    class Counting(nn.Sequential):
        def forward(self, x):  # type: ignore[no-untyped-def]
            if self.training and torch.is_grad_enabled():
                seen.append(len(x))
            return super().forward(x)

    l2p.train(config(), model=Counting(*one_pixel_network()), data=(X, Y), progress=False)
    assert seen == [8, 9, 8, 9]


def test_a_network_that_can_keeps_its_batches() -> None:
    torch.manual_seed(0)
    able = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 10))
    before = {name: value.clone() for name, value in able.state_dict().items()}
    assert not blind_to_one_image(able, X[:1]) and blind_to_one_image(one_pixel_network(), X[:1])
    assert all(torch.equal(value, before[name]) for name, value in able.state_dict().items())
    run = l2p.train(config(epochs=1), model=able, data=(X, Y), progress=False)
    assert run.metrics[-1]["step"] == 3


@pytest.mark.parametrize("data", [(X, Y), (X[:1], Y[:1])])
def test_batches_of_one_image_are_refused_before_the_first_step(data: tuple) -> None:
    with pytest.raises(ConfigError, match="batch_size >= 2"):
        l2p.train(config(batch_size=1), model=one_pixel_network(), data=data, progress=False)


def test_one_image_in_the_middle_is_refused() -> None:
    batches = [(X[:8], Y[:8]), (X[8:9], Y[8:9]), (X[9:], Y[9:])]
    with pytest.raises(InputError, match="a batch of 1 cannot go"):
        l2p.train(config(), model=one_pixel_network(), data=DataLoader(batches, batch_size=None), progress=False)


def test_the_attack_says_it_too() -> None:
    attack = l2p.attacks.PGD(0.1, 0.05, 1)
    with pytest.raises(InputError, match="a batch of 1 cannot go"):
        attack.craft(one_pixel_network(), X[:1], Y[:1], mode="train")


def named(*classes: str) -> ImageData:
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    return ImageData("own", images, torch.arange(4) % 2, classes, False, 0, (0.5,), (0.5,))


@pytest.mark.parametrize("other", [("cat", "bee"), ("bee", "dog"), ("ant", "bee", "cat")])
def test_class_lists_that_differ_are_refused(other: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match="number their classes differently"):
        l2p.train(config(), model=one_pixel_network(), data=(named("bee", "cat"), named(*other)), progress=False)


def test_the_checkpoint_knows_the_names_of_the_classes(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from learn2perturb.cli.subject import read_run

    l2p.train(config(epochs=0), model=one_pixel_network(), data=named("bee", "cat"), out=tmp_path / "r", progress=False)
    assert read_run(str(tmp_path / "r"))[0]["classes"] == ["bee", "cat"]


def test_a_run_is_not_scored_on_other_classes(tmp_path) -> None:  # type: ignore[no-untyped-def]
    import argparse

    from PIL import Image

    from learn2perturb.cli.subject import fitting_images

    for name in ("bee", "dog"):
        (tmp_path / "test" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "test" / name / "0.png")
    asked = argparse.Namespace(run="runs/x", dataset="folder", data_dir=str(tmp_path), split="test", dataset_options={})
    header = {"input_shape": [1, 8, 8], "classes": ["bee", "cat"]}
    with pytest.raises(DataError, match="class 1 is 'cat' and 'dog'"):
        fitting_images(asked, header, {})
    assert fitting_images(asked, header | {"classes": ["bee", "dog"]}, {}).num_classes == 2
    assert fitting_images(asked, {"input_shape": [1, 8, 8]}, {}).num_classes == 2  # of a run before names were kept
