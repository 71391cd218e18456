"""Bad input at every public entry: one line that names the value and the fix, and nothing on disk is lost."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import learn2perturb as l2p
from learn2perturb import records, registry
from learn2perturb.attacks import FGSM, PGD
from learn2perturb.data import ImageData, make_source
from learn2perturb.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    InputError,
    Learn2PerturbError,
    NoiseError,
    NonFiniteError,
    SiteError,
    UnknownNameError,
)
from learn2perturb.evaluation import Evaluation
from learn2perturb.training.config import read_config

LONGEST = 400  # characters of a message: what a terminal shows in a few lines


class Case(NamedTuple):
    """One bad call: ``call`` gets an empty folder; ``words`` must be in the message (the value, the fix)."""

    label: str
    error: type[Learn2PerturbError]
    words: tuple[str, ...]
    call: Callable[[pathlib.Path], object]


def case(label: str, error: type[Learn2PerturbError], words: str, call: Callable[[pathlib.Path], object]) -> Case:
    return Case(label, error, tuple(words.split("|")), call)


# --- what the cases are made of


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return l2p.build_model("digits_cnn", input_shape=(1, 8, 8))


def noisy() -> nn.Module:
    return l2p.perturb(cnn(), input_shape=(1, 8, 8))


def images(n: int = 4) -> Tensor:
    return torch.rand(n, 1, 8, 8)


def labels(n: int = 4) -> Tensor:
    return torch.arange(n) % 10


def config(**changes: Any) -> l2p.TrainConfig:
    settings: dict[str, Any] = {
        "defense": "none", "model": "digits_cnn", "dataset": "digits", "recipe": "fast", "epochs": 1, "limit": 8,
        "batch_size": 4, "monitor": 0, "device": "cpu", "engine": "plain", "tensorboard": False,
    }  # fmt: skip
    return l2p.TrainConfig(**(settings | changes))


def train(out: pathlib.Path | None = None, *, model: Any = None, data: Any = None, **changes: Any) -> Any:
    return l2p.train(config(**changes), model=model, data=data, out=out, progress=False)


def evaluate(model: Any = None, data: Any = None, **settings: Any) -> Any:
    return l2p.evaluate(cnn() if model is None else model, (images(), labels()) if data is None else data, **settings)


def written(path: pathlib.Path, content: str | bytes) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def trained(folder: pathlib.Path, **changes: Any) -> pathlib.Path:
    train(folder / "run", **changes)
    return folder / "run"


def saved(path: pathlib.Path) -> pathlib.Path:
    return evaluate().save(path)


def tampered(path: pathlib.Path, change: Callable[[dict[str, Any]], object]) -> pathlib.Path:
    """Return an evaluation on disk whose JSON was changed by hand, its checksum taken out."""
    payload = json.loads(saved(path).read_text())
    del payload["checksum"]
    change(payload)
    path.write_text(json.dumps(payload))
    return path


class Twice(nn.Module):
    """Calls one submodule twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.fc = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.relu(self.relu(self.conv(x)).mean((2, 3))))


class Recurrent(nn.Module):
    """A submodule gives a tuple, another is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.fc, self.idle = nn.LSTM(8, 4, batch_first=True), nn.Linear(4, 10), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.lstm(x[:, 0])[0][:, -1])


class Silent(nn.Module):
    """Fails without a word."""

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError


class Exploding(nn.Module):
    """Gives logits that are not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1)) * float("inf")


class Pairs(nn.Module):
    """Returns a tuple, as some networks with auxiliary heads do."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Any:
        return self.fc(x.flatten(1)), x


def linear(classes: int = 10) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))


class Listed(torch.utils.data.Dataset):
    """A data set of whatever is given."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


class Endless(torch.utils.data.IterableDataset):
    """Has no length."""

    def __iter__(self) -> Any:
        yield images(1)[0], 0


def bad_attack(x: Any = None, y: Any = None, model: Any = None) -> object:
    return FGSM(0.1)(linear() if model is None else model, images() if x is None else x, labels() if y is None else y)


BUILD = [
    case("unknown network", UnknownNameError, "resnet21|did you mean|resnet20", lambda _: l2p.build_model("resnet21")),
    case("network by number", UnknownNameError, "20|known", lambda _: l2p.build_model(20)),
    case("network by list", UnknownNameError, "resnet20|known", lambda _: l2p.build_model(["resnet20"])),
    case("one class", ConfigError, "num_classes 1|>= 2", lambda _: l2p.build_model("resnet20", 1)),
    case("classes as text", ConfigError, "'10'|whole number", lambda _: l2p.build_model("resnet20", "10")),
    case("flat shape", ConfigError, "(3, 32)|height", lambda _: l2p.build_model("resnet20", input_shape=(3, 32))),
    case("shape None", ConfigError, "None|(3, 32, 32)", lambda _: l2p.build_model("resnet20", input_shape=None)),
    case("unknown option", ConfigError, "widht|width", lambda _: l2p.build_model("resnet20", widht=2)),
    case("impossible depth", ConfigError, "21|depth", lambda _: l2p.build_model("resnet20", depth=21)),
    case("depth as text", ConfigError, "'20'|depth", lambda _: l2p.build_model("resnet20", depth="20")),
    case("width 0", ConfigError, "width|0", lambda _: l2p.build_model("resnet20", width=0)),
    case("width as text", ConfigError, "width|'2'", lambda _: l2p.build_model("resnet20", width="2")),
    case(
        "unknown normalisation",
        UnknownNameError,
        "imagenet|cifar10",
        lambda _: l2p.build_model("resnet20", normalization="imagenet"),
    ),
    case(
        "normalisation of one channel",
        ConfigError,
        "1 channels|3",
        lambda _: l2p.build_model("resnet20", normalization=([0.5], [0.5])),
    ),
    case(
        "normalisation by number",
        ConfigError,
        "0.5|(mean, std)",
        lambda _: l2p.build_model("resnet20", normalization=0.5),
    ),
    case(
        "std 0",
        ConfigError,
        "0.0|positive",
        lambda _: l2p.build_model("digits_cnn", input_shape=(1, 8, 8), normalization=([0.5], [0.0])),
    ),
    case("images of other channels", InputError, "3 channels|1", lambda _: cnn()(torch.rand(2, 3, 8, 8))),
    case("pattern is no text", ConfigError, "5|glob", lambda _: l2p.list_models(5)),
]

NOISE = [
    case("not a module", SiteError, "function|torch.nn.Module", lambda _: l2p.perturb(lambda x: x)),
    case(
        "no such site",
        SiteError,
        "layer9|candidates",
        lambda _: l2p.perturb(cnn(), input_shape=(1, 8, 8), sites="layer9.*"),
    ),
    case(
        "misspelt site",
        SiteError,
        "bn_1|near: |bn1",
        lambda _: l2p.perturb(cnn(), input_shape=(1, 8, 8), sites=["bn_1"]),
    ),
    case("no sites", SiteError, "[]|glob", lambda _: l2p.perturb(cnn(), input_shape=(1, 8, 8), sites=[])),
    case("sites by number", SiteError, "5|glob", lambda _: l2p.perturb(cnn(), input_shape=(1, 8, 8), sites=5)),
    case(
        "predicate chooses none",
        SiteError,
        "predicate|candidates",
        lambda _: l2p.perturb(cnn(), input_shape=(1, 8, 8), sites=lambda name, module: False),
    ),
    case("other image shape", InputError, "(3, 32, 32)|shape of one image", lambda _: l2p.perturb(cnn())),
    case("shape by number", InputError, "32|(3, 32, 32)", lambda _: l2p.perturb(cnn(), input_shape=32)),
    case("network fails silently", InputError, "AssertionError|shape", lambda _: l2p.perturb(Silent())),
    case(
        "unknown granularity",
        ConfigError,
        "pixel|element",
        lambda _: l2p.perturb(cnn(), input_shape=(1, 8, 8), granularity="pixel"),
    ),
    case(
        "unknown distribution",
        UnknownNameError,
        "gauss|gaussian",
        lambda _: l2p.perturb(cnn(), input_shape=(1, 8, 8), distribution="gauss"),
    ),
    case(
        "unknown sharing",
        ConfigError,
        "global|per_example",
        lambda _: l2p.perturb(cnn(), input_shape=(1, 8, 8), sharing="global"),
    ),
    case(
        "unknown place",
        ConfigError,
        "middle|output",
        lambda _: l2p.perturb(cnn(), input_shape=(1, 8, 8), place="middle"),
    ),
    case(
        "init below minimum",
        ConfigError,
        "0.001|minimum",
        lambda _: l2p.perturb(cnn(), input_shape=(1, 8, 8), init=0.001),
    ),
    case(
        "init as text", ConfigError, "'0.25'|number", lambda _: l2p.perturb(cnn(), input_shape=(1, 8, 8), init="0.25")
    ),
    case("init NaN", ConfigError, "nan", lambda _: l2p.perturb(cnn(), input_shape=(1, 8, 8), init=float("nan"))),
    case("perturbed twice", SiteError, "bn1|remove_noise", lambda _: l2p.perturb(noisy(), input_shape=(1, 8, 8))),
    case(
        "called twice", SiteError, "relu|2 times", lambda _: l2p.perturb(Twice(), input_shape=(1, 8, 8), sites="relu")
    ),
    case(
        "gives a tuple",
        SiteError,
        "lstm|tuple",
        lambda _: l2p.perturb(Recurrent(), input_shape=(1, 8, 8), sites="lstm"),
    ),
    case(
        "never called",
        SiteError,
        "idle|not called",
        lambda _: l2p.perturb(Recurrent(), input_shape=(1, 8, 8), sites="idle"),
    ),
    case("nothing to perturb", SiteError, "name the sites", lambda _: l2p.perturb(nn.Flatten(), input_shape=(1, 8, 8))),
    case(
        "compiled",
        NoiseError,
        "compiled|then compile",
        lambda _: l2p.perturb(torch.compile(cnn(), backend="eager"), input_shape=(1, 8, 8)),
    ),
    case(
        "remove from compiled",
        NoiseError,
        "compiled|noise_disabled",
        lambda _: l2p.remove_noise(torch.compile(noisy(), backend="eager")),
    ),
    case("features of another size", SiteError, "bn1|input_shape", lambda _: noisy()(torch.rand(2, 1, 16, 16))),
    case(
        "switch a function",
        NoiseError,
        "function|torch.nn.Module",
        lambda _: l2p.noise_disabled(lambda x: x).__enter__(),
    ),
    case("sites of a function", NoiseError, "function|torch.nn.Module", lambda _: l2p.noise_sites(lambda x: x)),
    case("parameters of None", NoiseError, "NoneType|torch.nn.Module", lambda _: l2p.noise_parameters(None)),
    case("replay by text", NoiseError, "'0'|whole number", lambda _: l2p.fixed_noise(noisy(), seed="0").__enter__()),
]

ATTACKS = [
    case("eps 8", ConfigError, "8|8/255", lambda _: FGSM(eps=8)),
    case("eps as text", ConfigError, "'8/255'|without quotes", lambda _: PGD(eps="8/255")),
    case("eps negative", ConfigError, "-0.1|at least 0", lambda _: PGD(eps=-0.1)),
    case("eps NaN", ConfigError, "nan|finite", lambda _: PGD(eps=float("nan"))),
    case("unknown norm", ConfigError, "l1|linf", lambda _: PGD(norm="l1")),
    case("unknown loss", ConfigError, "hinge|ce", lambda _: PGD(loss="hinge")),
    case("eot 0", ConfigError, "eot|0", lambda _: PGD(eot=0)),
    case("unknown average", ConfigError, "mean|probability", lambda _: PGD(eot_average="mean")),
    case("targeted by number", ConfigError, "targeted|3", lambda _: PGD(targeted=3)),
    case("seed as text", ConfigError, "seed|'0'", lambda _: PGD(seed="0")),
    case("step 0", ConfigError, "step_size|more than 0", lambda _: PGD(step_size=0)),
    case("steps 7.5", ConfigError, "steps|7.5", lambda _: PGD(steps=7.5)),
    case("no restart", ConfigError, "restarts|0", lambda _: PGD(restarts=0)),
    case("random start by number", ConfigError, "random_start|1", lambda _: PGD(random_start=1)),
    case("model is no callable", InputError, "str|callable", lambda _: bad_attack(model="resnet20")),
    case("bytes", InputError, "uint8|/ 255", lambda _: bad_attack(torch.zeros(4, 1, 8, 8, dtype=torch.uint8))),
    case("an array", InputError, "ndarray|as_tensor", lambda _: bad_attack(np.zeros((4, 1, 8, 8), np.float32))),
    case("one image", InputError, "(1, 8, 8)|unsqueeze", lambda _: bad_attack(images()[0])),
    case("no image", InputError, "empty|at least one", lambda _: bad_attack(images()[:0], labels()[:0])),
    case("a NaN pixel", InputError, "NaN|finite", lambda _: bad_attack(images() * float("nan"))),
    case("normalised images", InputError, "[0, 1]|normalisation", lambda _: bad_attack(images() * 4 - 2)),
    case("labels as a list", InputError, "list|as_tensor", lambda _: bad_attack(y=[0, 1, 2, 3])),
    case("float labels", InputError, "float32|long()", lambda _: bad_attack(y=labels().float())),
    case("too few labels", InputError, "(4,)|(3,)", lambda _: bad_attack(y=labels(3))),
    case("label beyond the classes", InputError, "0..9|12", lambda _: bad_attack(y=labels() + 9)),
    case("negative label", InputError, "0..9|-1", lambda _: bad_attack(y=labels() - 1)),
    case("model gives a tuple", InputError, "tuple|[0]", lambda _: bad_attack(model=Pairs())),
    case(
        "model gives classes", InputError, "int64|argmax", lambda _: bad_attack(model=lambda x: x.flatten(1).argmax(1))
    ),
    case("model gives one number", InputError, "(4, 1)|cat", lambda _: bad_attack(model=lambda x: x.flatten(1)[:, :1])),
    case("model gives NaN", InputError, "NaN|weights", lambda _: bad_attack(model=Exploding())),
    case(
        "model without gradient",
        InputError,
        "gradient|detach",
        lambda _: bad_attack(model=lambda x: x.detach().flatten(1)),
    ),
]


def hostile(folder: pathlib.Path) -> object:
    """A pickle that would run a command, in the place of CIFAR-10."""
    written(folder / "cifar-10-batches-py" / "data_batch_1", b"cos\nsystem\n(S'touch executed'\ntR.")
    return l2p.load_data("cifar10", root=folder)


def picture_folder(folder: pathlib.Path, sizes: tuple[int, ...] = (8, 9)) -> pathlib.Path:
    from PIL import Image

    (folder / "train" / "cat").mkdir(parents=True)
    for index, size in enumerate(sizes):
        Image.new("RGB", (size, size)).save(folder / "train" / "cat" / f"{index}.png")
    return folder


def no_picture(folder: pathlib.Path) -> object:
    written(folder / "train" / "cat" / "0.png", b"no image")
    return l2p.load_data("folder", root=folder)


DATA = [
    case("unknown set", UnknownNameError, "cifar|cifar10", lambda _: l2p.load_data("cifar")),
    case("set None", UnknownNameError, "None|known", lambda _: l2p.load_data(None)),
    case("unknown split", ConfigError, "val|test", lambda _: l2p.load_data("digits", "val")),
    case("limit 0", ConfigError, "0|>= 1", lambda _: l2p.load_data("digits", limit=0)),
    case("limit as text", ConfigError, "'10'|whole number", lambda _: l2p.load_data("digits", limit="10")),
    case("option of another set", ConfigError, "size|options", lambda _: l2p.load_data("digits", size=8)),
    case("root by number", ConfigError, "5|folder", lambda _: l2p.load_data("cifar10", root=5)),
    case("CIFAR is not there", DataError, "download|cifar10", lambda f: l2p.load_data("cifar10", root=f)),
    case("a hostile pickle", DataError, "data_batch_1", hostile),
    case("no image folder", DataError, "train/CLASS", lambda f: l2p.load_data("folder", root=f / "none")),
    case(
        "no class folder",
        DataError,
        "no class folders",
        lambda f: l2p.load_data("folder", root=written(f / "train" / "x", "").parents[1]),
    ),
    case("a damaged picture", DataError, "0.png|replace", no_picture),
    case("pictures of two sizes", DataError, "9 x 9|size=", lambda f: l2p.load_data("folder", root=picture_folder(f))),
    case(
        "size as text", ConfigError, "'8'|pixels", lambda f: l2p.load_data("folder", root=picture_folder(f), size="8")
    ),
    case(
        "float images in a set",
        DataError,
        "float32|uint8",
        lambda _: ImageData("mine", images(), labels(), tuple("0123456789"), False, 0, (0.5,), (0.5,)),
    ),
    case(
        "label beyond the set's classes",
        DataError,
        "0 to 3|2 classes",
        lambda _: ImageData("mine", images().mul(255).byte(), labels(), ("a", "b"), False, 0, (0.5,), (0.5,)),
    ),
    case("take 0", ConfigError, "0|>= 1", lambda _: l2p.load_data("digits").take(0)),
    case("split by 1", ConfigError, "1.0|between 0 and 1", lambda _: l2p.load_data("digits").split(1.0)),
    case("split by text", ConfigError, "'0.1'|number", lambda _: l2p.load_data("digits").split("0.1")),
    case("batch size 0", ConfigError, "batch_size 0|>= 1", lambda _: make_source((images(), labels()), batch_size=0)),
    case("data by name", InputError, "str|load_data", lambda _: make_source("digits")),
    case("data None", InputError, "NoneType|load_data", lambda _: make_source(None)),
    case("pair of lists", InputError, "list|two tensors", lambda _: make_source(([1], [2]))),
    case("triple", InputError, "tuple of 3|pair", lambda _: make_source((images(), labels(), labels()))),
    case("images beyond 1", InputError, "[0, 1]|normalising", lambda _: make_source((images() + 1, labels()))),
    case("integer images", InputError, "int64|uint8", lambda _: make_source((images().long(), labels()))),
    case("no images", InputError, "(0, 1, 8, 8)|sizes 0", lambda _: make_source((images(0), labels(0)))),
    case(
        "one-hot labels",
        InputError,
        "(4, 10)|whole numbers",
        lambda _: make_source((images(), torch.eye(10)[:4].long())),
    ),
    case("labels below 0", InputError, "-1|from 0", lambda _: make_source((images(), labels() - 1))),
    case("empty Dataset", InputError, "empty|at least one", lambda _: make_source(Listed([]))),
    case(
        "Dataset of pictures",
        InputError,
        "tensors|ToTensor",
        lambda _: next(make_source(Listed([(object(), 0)])).epoch(0)),
    ),
    case("Dataset of triples", InputError, "3|pair", lambda _: next(make_source(Listed([(1.0, 2.0, 3.0)])).epoch(0))),
    case(
        "loader without length",
        InputError,
        "length|__len__",
        lambda _: make_source(torch.utils.data.DataLoader(Endless(), batch_size=2)),
    ),
    case(
        "loader without a batch",
        InputError,
        "empty|drop_last",
        lambda _: make_source(torch.utils.data.DataLoader(Listed([(images(1)[0], 0)]), batch_size=2, drop_last=True)),
    ),
    case(
        "device unknown to torch", ConfigError, "gpu9|cpu", lambda _: make_source((images(), labels()), device="gpu9")
    ),
]

CONFIG = [
    case("unknown defense", UnknownNameError, "learn2pertub|learn2perturb", lambda _: config(defense="learn2pertub")),
    case("defense None", UnknownNameError, "None|known", lambda _: config(defense=None)),
    case("model as an object", UnknownNameError, "known|resnet20", lambda _: config(model=["resnet20"])),
    case("unknown recipe", UnknownNameError, "papers|paper", lambda _: config(recipe="papers")),
    case("unknown engine", ConfigError, "quick|fast", lambda _: config(engine="quick")),
    case("seed -1", ConfigError, "seed|-1", lambda _: config(seed=-1)),
    case("seed true", ConfigError, "True|whole number", lambda _: config(seed=True)),
    case("validation 1", ConfigError, "1.0|[0, 1)", lambda _: config(validation=1.0)),
    case("validation as text", ConfigError, "'0.1'|[0, 1)", lambda _: config(validation="0.1")),
    case("minutes as text", ConfigError, "'5'|> 0", lambda _: config(checkpoint_minutes="5")),
    case("log every 0", ConfigError, "log_every|at least 1", lambda _: config(log_every=0)),
    case("options as a list", ConfigError, "options|mapping", lambda _: config(options=["gamma"])),
    case("epochs 1.5", ConfigError, "epochs|1.5", lambda _: config(epochs=1.5)),
    case("batch size 0 in training", ConfigError, "batch_size|0", lambda _: config(batch_size=0)),
    case("lr as text", ConfigError, "lr|'0.1'", lambda _: config(lr="0.1")),
    case("momentum 2", ConfigError, "momentum|2", lambda _: config(momentum=2)),
    case("eps 8 in training", ConfigError, "eps|8/255", lambda _: config(eps=8)),
    case("milestones by number", ConfigError, "milestones|[150, 250]", lambda _: config(milestones=150)),
    case("milestones of text", ConfigError, "milestones|'a'", lambda _: config(milestones=["a"])),
    case("nesterov as text", ConfigError, "nesterov|'false'", lambda _: config(nesterov="false")),
    case("augment as text", ConfigError, "augment|'no'", lambda _: config(augment="no")),
    case("unknown schedule", ConfigError, "linear|one_cycle", lambda _: config(schedule="linear")),
    case("no loss", ConfigError, "alpha|beta", lambda _: config(alpha=0, beta=0)),
    case("nesterov without momentum", ConfigError, "nesterov|momentum", lambda _: config(momentum=0.0).resolve()),
    case("unknown setting", UnknownNameError, "epoch|epochs", lambda _: l2p.TrainConfig.from_dict({"epoch": 3})),
    case("settings as a list", ConfigError, "list|mapping", lambda _: l2p.TrainConfig.from_dict(["epochs"])),
    case("no config file", ConfigError, "none.yaml|YAML", lambda f: read_config(f / "none.yaml")),
    case(
        "config is no YAML",
        ConfigError,
        "bad.yaml|fix",
        lambda f: read_config(written(f / "bad.yaml", "a: [1\nb: }")),
    ),
    case("config holds a list", ConfigError, "list|settings", lambda f: read_config(written(f / "bad.yaml", "- 1"))),
]


def frozen() -> nn.Module:
    network = linear()
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return network


def second_run(folder: pathlib.Path) -> object:
    return train(trained(folder), lr=0.05)


TRAIN = [
    case("config as a dict", ConfigError, "dict|TrainConfig", lambda _: l2p.train({"epochs": 1})),
    case("model is a class", ConfigError, "type|torch.nn.Module", lambda _: train(model=Twice)),
    case(
        "unknown option of the defense",
        UnknownNameError,
        "gama|gamma",
        lambda _: train(defense="learn2perturb", options={"gama": 1.0}),
    ),
    case("defense without options", UnknownNameError, "gamma|none", lambda _: train(options={"gamma": 1.0})),
    case("gamma negative", ConfigError, "gamma|-1", lambda _: train(defense="learn2perturb", options={"gamma": -1})),
    case(
        "gamma as text",
        ConfigError,
        "gamma|'1e-4'",
        lambda _: train(defense="learn2perturb", options={"gamma": "1e-4"}),
    ),
    case(
        "delay as text",
        ConfigError,
        "noise_delay|'2'",
        lambda _: train(defense="learn2perturb", options={"noise_delay": "2"}),
    ),
    case(
        "steps as text",
        ConfigError,
        "noise_steps|'2'",
        lambda _: train(defense="learn2perturb", options={"theta_step": "sequential", "noise_steps": "2"}),
    ),
    case(
        "steps without sequential",
        ConfigError,
        "noise_steps|sequential",
        lambda _: train(defense="learn2perturb", options={"noise_steps": 2}),
    ),
    case(
        "unknown order of steps",
        ConfigError,
        "together|combined",
        lambda _: train(defense="learn2perturb", options={"theta_step": "together"}),
    ),
    case("unknown option of the network", ConfigError, "width|options", lambda _: train(model_options={"width": 2})),
    case(
        "classes as an option",
        ConfigError,
        "num_classes|model_options",
        lambda _: train(model_options={"num_classes": 5}),
    ),
    case("unknown device", ConfigError, "gpu9|cpu", lambda _: train(device="gpu9")),
    case("device None", ConfigError, "None|cpu", lambda _: train(device=None)),
    case("training data by name", InputError, "str|load_data", lambda _: train(data="digits")),
    case("classes unknown", DataError, "classes|model", lambda _: train(data=(images(), labels()))),
    case(
        "custom validation data",
        DataError,
        "validation|data=",
        lambda _: train(model=linear(), data=(images(), labels()), validation=0.5),
    ),
    case(
        "nothing to train",
        ConfigError,
        "gradient|nothing to train",
        lambda _: train(model=frozen(), data=(images(), labels())),
    ),
    case(
        "labels beyond the network", InputError, "0..2|3", lambda _: train(model=linear(3), data=(images(), labels()))
    ),
    case(
        "network gives a tuple", InputError, "tuple|logits", lambda _: train(model=Pairs(), data=(images(), labels()))
    ),
    case(
        "network of another image size",
        InputError,
        "(1, 8, 8)|images",
        lambda _: train(model=nn.Sequential(nn.Flatten(), nn.Linear(9, 10)), data=(images(), labels())),
    ),
    case(
        "a loss that is not finite",
        NonFiniteError,
        "step 0|checkpoint|lr",
        lambda _: train(model=Exploding(), data=(images(), labels())),
    ),
    case("out is a file", ConfigError, "file|--out", lambda f: train(written(f / "file", "mine"))),
    case(
        "out holds other things",
        ConfigError,
        "no run folder|--out",
        lambda f: train(written(f / "mine" / "thesis.tex", "x").parent),
    ),
    case("out holds another run", ConfigError, "lr (0.1 there, 0.05 now)|--out", second_run),
    case("out by number", ConfigError, "5|folder", lambda _: train(5)),
]


def plain_weights(folder: pathlib.Path) -> pathlib.Path:
    save_file(linear().state_dict(), folder / "plain.safetensors")
    return folder / "plain.safetensors"


def newer_weights(folder: pathlib.Path) -> pathlib.Path:
    save_file(
        linear().state_dict(), folder / "new.safetensors", metadata={"learn2perturb": json.dumps({"version": 99})}
    )
    return folder / "new.safetensors"


def own_run(folder: pathlib.Path) -> pathlib.Path:
    return trained(folder, model=linear(), data=(images(), labels()))


def damaged_run(folder: pathlib.Path, name: str) -> pathlib.Path:
    run = trained(folder)
    for path in run.glob(f"checkpoints/*/{name}"):
        path.write_bytes(path.read_bytes()[:100])
    return run


def unfinished(folder: pathlib.Path) -> object:
    """Resume a run whose resume state is damaged."""
    return train(damaged_run(folder, "resume.pt"))


LOAD = [
    case("nothing there", CheckpointError, "none|run folder", lambda f: l2p.load(f / "none")),
    case("an empty folder", CheckpointError, "no checkpoint|run folder", lambda f: l2p.load(f)),
    case("path by number", CheckpointError, "5|run folder", lambda _: l2p.load(5)),
    case(
        "no safetensors",
        CheckpointError,
        "x.pt|another checkpoint",
        lambda f: l2p.load(written(f / "x.pt", b"\x80\x02}q\x00.")),
    ),
    case(
        "a file cut short",
        CheckpointError,
        "model.safetensors|another checkpoint",
        lambda f: l2p.load(damaged_run(f, "model.safetensors")),
    ),
    case("resume state cut short", CheckpointError, "resume.pt|delete", unfinished),
    case(
        "weights without a name", CheckpointError, "which network|model=network", lambda f: l2p.load(plain_weights(f))
    ),
    case("a newer version", CheckpointError, "99|update", lambda f: l2p.load(newer_weights(f))),
    case("custom network, not given", CheckpointError, "your own|model=network", lambda f: l2p.load(own_run(f))),
    case(
        "another network",
        CheckpointError,
        "does not fit|trained with",
        lambda f: l2p.load(plain_weights(f), model=cnn()),
    ),
    case(
        "network as a name",
        CheckpointError,
        "str|torch.nn.Module",
        lambda f: l2p.load(plain_weights(f), model="resnet20"),
    ),
    case("a hub name that is none", CheckpointError, "hf-hub:a/b/c|name", lambda _: l2p.load("hf-hub:a/b/c")),
]

EVALUATE = [
    case("draws 0", ConfigError, "draws|at least 1", lambda _: evaluate(draws=0)),
    case("members 1.5", ConfigError, "members|1.5", lambda _: evaluate(members=1.5)),
    case("limit -1", ConfigError, "limit|-1", lambda _: evaluate(limit=-1)),
    case("seed of an evaluation", ConfigError, "seed|-1", lambda _: evaluate(seed=-1)),
    case("model by name", ConfigError, "str|callable", lambda _: evaluate("resnet20")),
    case("attacks as a list", ConfigError, "list|attacks={'pgd': PGD()}", lambda _: evaluate(attacks=[PGD()])),
    case("attack as a class", ConfigError, "class PGD|PGD(eps=8/255)", lambda _: evaluate(attacks={"pgd": PGD})),
    case("attack named clean", ConfigError, "clean|rename", lambda _: evaluate(attacks={"clean": PGD()})),
    case("attack by a number", ConfigError, "1|rename", lambda _: evaluate(attacks={1: PGD()})),
    case("targeted attack", ConfigError, "targeted|False", lambda _: evaluate(attacks={"pgd": PGD(targeted=True)})),
    case("unknown predictor", UnknownNameError, "majority|vote", lambda _: evaluate(predictor="majority")),
    case("no predictor", ConfigError, "empty|vote", lambda _: evaluate(predictor=[])),
    case("predictor by number", ConfigError, "5|vote", lambda _: evaluate(predictor=5)),
    case("no eps", ConfigError, "eps|numbers", lambda _: evaluate(attacks={"pgd": PGD()}, eps=[])),
    case("eps in grey levels", ConfigError, "eps|8/255", lambda _: evaluate(attacks={"pgd": PGD()}, eps=[8])),
    case("eps as an object", ConfigError, "eps|number", lambda _: evaluate(attacks={"pgd": PGD()}, eps=object())),
    case("evaluation data by name", InputError, "str|load_data", lambda _: evaluate(data="digits")),
    case("label beyond the model", InputError, "12|0..9", lambda _: evaluate(data=(images(), labels() + 9))),
    case("evaluated tuple", InputError, "tuple|first element", lambda _: evaluate(Pairs())),
    case("evaluated NaN", InputError, "NaN|weights", lambda _: evaluate(Exploding())),
    case("evaluated classes", InputError, "(4,)|classes >= 2", lambda _: evaluate(lambda x: x.flatten(1).argmax(1))),
    case("evaluated channels", InputError, "3 channels|1", lambda _: evaluate(data=(torch.rand(4, 3, 8, 8), labels()))),
    case("evaluation on no device", ConfigError, "gpu9|cpu", lambda _: evaluate(lambda x: x.flatten(1), device="gpu9")),
    case("model elsewhere", ConfigError, "meta|model.to", lambda _: evaluate(device="meta")),
]

RECORDS = [
    case("no record", CheckpointError, "none.json|check the path", lambda f: Evaluation.load(f / "none.json")),
    case("record is a folder", CheckpointError, "cannot read", lambda f: Evaluation.load(f)),
    case("record by number", CheckpointError, "2.5|path", lambda _: Evaluation.load(2.5)),
    case("no JSON", CheckpointError, "not valid JSON|restore", lambda f: Evaluation.load(written(f / "r.json", "{"))),
    case("a list in JSON", CheckpointError, "list|format", lambda f: Evaluation.load(written(f / "r.json", "[]"))),
    case(
        "another format",
        CheckpointError,
        "learn2perturb.evaluation",
        lambda f: Evaluation.load(written(f / "r.json", '{"format": "x", "version": 1}')),
    ),
    case(
        "a newer record",
        CheckpointError,
        "99|upgrade",
        lambda f: Evaluation.load(tampered(f / "r.json", lambda p: p.update(version=99))),
    ),
    case(
        "an unknown field",
        CheckpointError,
        "colour|restore",
        lambda f: Evaluation.load(tampered(f / "r.json", lambda p: p.update(colour="red"))),
    ),
    case(
        "a missing field",
        CheckpointError,
        "labels|restore",
        lambda f: Evaluation.load(tampered(f / "r.json", lambda p: p.pop("labels"))),
    ),
    case(
        "a field of another type",
        CheckpointError,
        "'ten'|restore",
        lambda f: Evaluation.load(tampered(f / "r.json", lambda p: p.update(num_classes="ten"))),
    ),
    case(
        "bits that do not fit",
        CheckpointError,
        "damaged|evaluate again",
        lambda f: Evaluation.load(tampered(f / "r.json", lambda p: p["rows"][0]["correct"].update(data="AA=="))),
    ),
    case("no such row", UnknownNameError, "pgd|clean", lambda f: evaluate().row("pgd")),
    case("several rows", ConfigError, "clean|choose one", lambda f: evaluate().row("clean", noise=False)),
    case(
        "saved into a file's folder",
        CheckpointError,
        "cannot write",
        lambda f: evaluate().save(written(f / "file", "x") / "r.json"),
    ),
    case("saved over a folder", CheckpointError, "cannot write", lambda f: evaluate().save(f)),
]

REGISTRY = [
    case("unknown attack", UnknownNameError, "fgsmm|fgsm", lambda _: registry.ATTACKS.entry("fgsmm")),
    case("unknown data set", UnknownNameError, "digit|digits", lambda _: registry.DATASETS.entry("digit")),
    case("unknown defense name", UnknownNameError, "vanila|vanilla", lambda _: registry.DEFENSES.entry("vanila")),
    case(
        "a name that is taken",
        ConfigError,
        "vanilla|another name",
        lambda _: registry.DEFENSES.register("vanilla", "a:b", "c"),
    ),
]

CASES = [*BUILD, *NOISE, *ATTACKS, *DATA, *CONFIG, *TRAIN, *LOAD, *EVALUATE, *RECORDS, *REGISTRY]


def test_the_table_is_as_long_as_it_should_be():
    assert len(CASES) == 222
    assert len({one.label for one in CASES}) == len(CASES)


@pytest.mark.filterwarnings("ignore")  # what torch says on the way is not what is tested
@pytest.mark.parametrize("bad", CASES, ids=[one.label.replace(" ", "-") for one in CASES])
def test_bad_input_is_one_line_that_names_the_value_and_the_fix(bad: Case, tmp_path, monkeypatch):
    monkeypatch.delenv("LEARN2PERTURB_DATA_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "given"
    folder.mkdir()
    with pytest.raises(Learn2PerturbError) as caught:
        bad.call(folder)
    message = str(caught.value)
    assert isinstance(caught.value, bad.error), f"{type(caught.value).__name__}: {message}"
    assert message.strip()
    assert len(message.splitlines()) == 1, message
    assert len(message.replace(str(folder), "")) < LONGEST, message
    assert [word for word in bad.words if word not in message] == [], message
    assert not (tmp_path / "executed").exists()


# --- nothing on disk is lost


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


LOSSLESS: list[tuple[str, Callable[[pathlib.Path], object], Callable[[pathlib.Path], object]]] = [
    ("train another run into a run folder", trained, lambda f: train(f / "run", lr=0.05)),
    (
        "train into a folder of other things",
        lambda f: written(f / "run" / "thesis.tex", "x"),
        lambda f: train(f / "run"),
    ),
    ("train over a file", lambda f: written(f / "run", "x"), lambda f: train(f / "run")),
    ("resume with other data", trained, lambda f: train(f / "run", data=(images(4), labels(4)), model=cnn())),
    ("train bad data into a run folder", trained, lambda f: train(f / "run", data=(images() + 1, labels()))),
    ("resume a damaged checkpoint", lambda f: damaged_run(f, "resume.pt"), lambda f: train(f / "run")),
    ("load a damaged checkpoint", lambda f: damaged_run(f, "model.safetensors"), lambda f: l2p.load(f / "run")),
    ("load a run into the wrong network", trained, lambda f: l2p.load(f / "run", model=Twice())),
    (
        "save a record that cannot be read back",
        lambda f: saved(f / "r.json"),
        lambda f: records.save(f / "r.json", Evaluation((), None, 10, 0)),
    ),
    (
        "save a record that JSON cannot hold",
        lambda f: saved(f / "r.json"),
        lambda f: records.save(
            f / "r.json", Evaluation((), records.PackedIntegers((0,), "uint8", ""), 10, 0, metadata={"x": object()})
        ),
    ),
    (
        "read a damaged record",
        lambda f: tampered(f / "r.json", lambda p: p.pop("rows")),
        lambda f: Evaluation.load(f / "r.json"),
    ),
    (
        "read a folder with a damaged picture",
        lambda f: written(f / "train" / "cat" / "0.png", b"x"),
        lambda f: l2p.load_data("folder", root=f),
    ),
]


@pytest.mark.parametrize(
    ("before", "call"), [one[1:] for one in LOSSLESS], ids=[one[0].replace(" ", "-") for one in LOSSLESS]
)
def test_what_is_on_disk_stays_as_it_was(before, call, tmp_path):
    before(tmp_path)
    kept = contents(tmp_path)
    assert kept
    with pytest.raises(Learn2PerturbError):
        call(tmp_path)
    assert contents(tmp_path) == kept


def test_a_failed_call_leaves_the_network_as_it_was():
    network = noisy().train()
    state = {key: value.clone() for key, value in network.state_dict().items()}
    for call in (
        lambda: l2p.perturb(network, input_shape=(1, 8, 8)),
        lambda: l2p.perturb(network, input_shape=(3, 99)),
        lambda: FGSM(0.1)(network, images(), labels() + 9),
        lambda: l2p.evaluate(network, (images(), labels() + 9)),
    ):
        with pytest.raises(Learn2PerturbError):
            call()
        assert all(module.training for module in network.modules())
        assert all(parameter.requires_grad for parameter in network.parameters())
        assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_a_failed_perturb_inserts_nothing():
    network = cnn()
    keys, hooks = list(network.state_dict()), [len(module._forward_hooks) for module in network.modules()]
    for sites in (["bn1", "no_such"], ["bn1", "normalize.mean"], 5):
        with pytest.raises(SiteError):
            l2p.perturb(network, input_shape=(1, 8, 8), sites=sites)
        assert list(network.state_dict()) == keys
        assert [len(module._forward_hooks) for module in network.modules()] == hooks
