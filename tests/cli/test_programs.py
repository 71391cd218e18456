"""``export --format torch-export,onnx``: programs that answer as the network does, for any batch, with fresh noise."""

from __future__ import annotations

import json
import pathlib
import warnings

import pytest
import torch
from torch import nn

import learn2perturb as l2p
from learn2perturb.cli.main import main
from learn2perturb.errors import ConfigError, MissingDependencyError
from learn2perturb.evaluation import Predictor, deploying
from learn2perturb.evaluation.deploying import SUFFIXES, deploy
from learn2perturb.noise import add_noise
from learn2perturb.runs.checkpoint import model_bytes

SHAPE = (1, 8, 8)
KINDS = tuple(SUFFIXES)
X = torch.rand(5, *SHAPE, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A tiny network; tracing takes seconds a layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 2, 3, stride=2), nn.Linear(18, 10)

    def forward(self, x):
        return self.fc(self.conv(x).relu().flatten(1))


def network(seed=0) -> nn.Module:
    torch.manual_seed(seed)
    return Net()


def program(path: pathlib.Path):
    """Return a program as another one would run it: images to logits."""
    if path.suffix == ".pt2":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.load(path).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes())
    assert session.get_inputs()[0].shape[0] == "batch"
    return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_without_noise_gives_its_logits_whatever_the_batch(kind, tmp_path):
    net = network().eval()
    done = deploy(net, tmp_path / f"net{SUFFIXES[kind]}", kind, input_shape=SHAPE, facts={"b": 2, "a": 1})
    run = program(done.path)
    for rows in (1, 2, 5):
        assert torch.allclose(run(X[:rows]), net(X[:rows]), atol=1e-5)
    assert not done.stochastic and done.difference < 1e-4
    assert b'{"a": 1, "b": 2}' in done.path.read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_drawn_anew_at_each_call_and_for_each_image_as_in_the_network(kind, tmp_path):
    net = l2p.perturb(network(), input_shape=SHAPE, sites=["conv"], init=0.5).eval()
    done = deploy(net, tmp_path / f"net{SUFFIXES[kind]}", kind, input_shape=SHAPE)
    run = program(done.path)
    same = X[:1].repeat(400, 1, 1, 1)
    with torch.no_grad():
        here, there = net(same), run(same)
    assert not torch.equal(run(X), run(X))
    assert torch.allclose(here.mean(0), there.mean(0), atol=6 * float(here.std(0).max()) / 20 * 2**0.5)
    assert torch.allclose(here.std(0), there.std(0), rtol=0.25)
    assert done.stochastic


@pytest.mark.parametrize("rule", ["mean_probability", "vote"])
def test_a_predictor_of_several_draws_is_one_program(rule, tmp_path):
    net = l2p.perturb(network(), input_shape=SHAPE, sites=["conv"], init=0.2).eval()
    done = deploy(Predictor(net, rule, 3), tmp_path / "net.onnx", "onnx", input_shape=SHAPE)
    found = program(done.path)(X)
    assert torch.allclose(found.exp().sum(1), torch.ones(5), atol=1e-5)
    assert done.stochastic
    if rule == "vote":
        assert bool(((found.exp() * 3 - (found.exp() * 3).round()).abs() < 1e-4).all())


def test_noise_on_weights_is_drawn_anew_too(tmp_path):
    net = add_noise(network(), "weight", place="weight", init=0.3).eval()
    done = deploy(net, tmp_path / "net.pt2", "torch-export", input_shape=SHAPE)
    run = program(done.path)
    assert not torch.equal(run(X), run(X))


class Branching(Net):
    def forward(self, x):
        return super().forward(x) if float(x.sum()) > 0 else super().forward(-x)


def test_what_cannot_be_traced_or_differs_is_refused_and_nothing_is_written(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="cannot be traced with batches of any size.*export safetensors"):
        deploy(Branching(), tmp_path / "net.pt2", "torch-export", input_shape=SHAPE)
    net = network()
    monkeypatch.setattr(deploying, "_torch_export", lambda *_: (b"", lambda x: 1.1 * net(x)))
    with pytest.raises(ConfigError, match="differs from the network by"):
        deploy(net, tmp_path / "net.pt2", "torch-export", input_shape=SHAPE)
    noisy = l2p.perturb(network(), input_shape=SHAPE, sites=["conv"])
    frozen = noisy(X).detach()
    monkeypatch.setattr(deploying, "_torch_export", lambda *_: (b"", lambda x: frozen[:1].repeat(len(x), 1)))
    with pytest.raises(ConfigError, match="does not draw its noise anew"):
        deploy(noisy, tmp_path / "net.pt2", "torch-export", input_shape=SHAPE)
    monkeypatch.setattr(deploying, "_torch_export", lambda *_: (b"", lambda x: noisy(x) + torch.linspace(0, 1, 10)))
    with pytest.raises(ConfigError, match="standard errors from the network's"):
        deploy(noisy, tmp_path / "net.pt2", "torch-export", input_shape=SHAPE)
    assert list(tmp_path.iterdir()) == []


def test_without_its_packages_onnx_names_the_extra(tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(deploying.importlib, "import_module", missing)
    with pytest.raises(MissingDependencyError, match=r"pip install 'learn2perturb\[onnx\]'"):
        deploy(network(), tmp_path / "net.onnx", "onnx", input_shape=SHAPE)


def test_the_verb_writes_a_run_and_a_network_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    net = l2p.build_model("digits_cnn", 10, input_shape=SHAPE)
    torch.save(net.state_dict(), "w.pt")
    words = ["export", "--model", "digits_cnn", "--weights", "w.pt"]
    assert main([*words, "--format", "torch-export"]) == 2
    assert "give --input-shape C,H,W and --num-classes N" in capsys.readouterr().err
    words += ["--input-shape", "1,8,8", "--num-classes", "10"]
    assert main([*words, "--format", "torch-export,safetensors"]) == 0
    assert torch.allclose(program(tmp_path / "export" / "digits_cnn.pt2")(X), net.eval()(X), atol=1e-5)
    l2p.perturb(net, input_shape=SHAPE)
    pathlib.Path("run.safetensors").write_bytes(model_bytes(net, {"input_shape": list(SHAPE), "defense": "pni"}))
    capsys.readouterr()
    assert main(["export", "run.safetensors", "--format", "torch-export", "--without-noise", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["files"]["torch-export"].endswith("export/run.pt2")
    assert said["notes"][0].startswith("torch-export: logits within")
    assert b'"defense": "pni"' in (tmp_path / "export" / "run.pt2").read_bytes()
