"""Networks of timm and torchvision by name: built, trained, saved, loaded; what is not available is one typed line."""

from __future__ import annotations

import json

import pytest
import torch

import learn2perturb as l2p
from learn2perturb.cli.main import main
from learn2perturb.errors import CheckpointError, ConfigError, UnknownNameError
from learn2perturb.runs.checkpoint import model_bytes

pytestmark = [pytest.mark.compat, pytest.mark.usefixtures("timm", "torchvision")]

# Small ones; the options make them smaller.
TIMM, TINY = "timm:resnetv2_18", {"channels": [8, 8, 8, 16], "stem_chs": 8}


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network and an empty cache, whatever the machine has."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("urllib.request.urlopen", _unreachable)
    monkeypatch.setattr("torch.hub.urlopen", _unreachable)


def _unreachable(*_, **__):
    raise OSError("the network is unreachable")


@pytest.mark.parametrize("name", [TIMM, "torchvision:mobilenet_v3_small"])
def test_a_network_of_a_library_normalises_as_it_was_trained(name):
    torch.manual_seed(0)
    net = l2p.build_model(name, 7, **(TINY if name == TIMM else {})).eval()
    x = torch.rand(2, 3, 32, 32)
    assert net(x).shape == (2, 7)
    assert torch.equal(net(x), net.network((x - net.normalize.mean) / net.normalize.std))
    assert float(net.normalize.mean.flatten()[0]) == pytest.approx(0.485) or name == TIMM


def test_a_network_of_timm_takes_grey_images_and_any_size():
    net = l2p.build_model(TIMM, 3, input_shape=(1, 24, 40), **TINY).eval()
    assert net(torch.rand(2, 1, 24, 40)).shape == (2, 3)
    vit = l2p.build_model("timm:vit_tiny_patch16_224", 3, input_shape=(1, 16, 16), depth=1, patch_size=4, embed_dim=12)
    assert vit.eval()(torch.rand(2, 1, 16, 16)).shape == (2, 3)


def test_a_run_of_a_network_of_timm_is_loaded_by_its_name(tmp_path, capsys):
    settings = ["--dataset", "digits", "--recipe", "fast", "--epochs", "1", "--limit", "16", "--batch-size", "8",
                "--attack-steps", "1", "--monitor", "0", "--no-tensorboard"][:-1]  # fmt: skip
    options = [word for key, value in TINY.items() for word in (f"--model-options.{key}", str(value))]
    assert main(["train", "--model", TIMM, *options, *settings, "--tensorboard", "false", "--out", str(tmp_path)]) == 0
    net = l2p.load(tmp_path)
    assert net.registered_name == TIMM
    assert main(["evaluate", str(tmp_path), "--attacks", "none", "--limit", "8", "--draws", "2", "--json"]) == 0
    row = json.loads(capsys.readouterr().out.partition('{\n "record"')[2].join(['{\n "record"', ""]))["rows"][0]
    x = l2p.load_data("digits", "test").take(8)
    with l2p.noise_disabled(net):
        right = (net(x.images.float() / 255).argmax(1) == x.labels).float().mean()
    assert row["n"] == 8 and 0 <= row["accuracy"] <= 1 and right.isfinite()


def test_a_file_may_not_name_what_loading_would_fetch_or_call(tmp_path):
    net = l2p.build_model(TIMM, 3, input_shape=(1, 8, 8), **TINY)
    for name in (f"{TIMM}?pretrained", "os:getcwd", "hf-hub:any/one"):
        net.registered_name = name
        (tmp_path / "net.safetensors").write_bytes(model_bytes(net, {}))
        with pytest.raises(CheckpointError, match="which a file may not; give an instance"):
            l2p.load(tmp_path / "net.safetensors")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["timm:resnet18d?pretrained", "torchvision:mobilenet_v3_small?pretrained"])
def test_published_weights_that_cannot_be_fetched_are_one_typed_line(name):
    with pytest.raises(CheckpointError, match="published weights of .* cannot be fetched .*; fetch them once"):
        l2p.build_model(name, 10)


@pytest.mark.usefixtures("offline")
def test_a_repository_that_cannot_be_fetched_is_one_typed_line():
    with pytest.raises(CheckpointError, match="hf-hub:a/b cannot be fetched"):
        l2p.load("hf-hub:a/b")


def test_a_repository_of_timm_is_built_as_its_config_says(monkeypatch, tmp_path):
    from safetensors.torch import save_file

    theirs = l2p.build_model("timm:resnet18", 5, input_shape=(3, 32, 32)).network
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    facts = {"mean": [0.5] * 3, "std": [0.25] * 3, "input_size": [3, 32, 32]}
    config = {"architecture": "resnet18", "num_classes": 5, "pretrained_cfg": facts}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo_id, filename: str(tmp_path / filename))
    net = l2p.load("hf-hub:timm/some.resnet")
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(net(x), theirs.eval()((x - 0.5) / 0.25))
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"], "model_type": "bert"}')
    with pytest.raises(CheckpointError, match="says not of which network it is.*--model module:function"):
        l2p.load("hf-hub:any/bert")


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("timm:resnet18e", {}, "unknown network of timm 'resnet18e': did you mean 'resnet18'"),
        ("torchvision:resnt18", {}, "unknown network of torchvision 'resnt18': did you mean 'resnet18'"),
        ("tim:resnet-18", {}, "write a registered name, timm:NAME"),
        ("timm:resnet18", {"checkpoint_path": "w.pt"}, "takes no option 'checkpoint_path'"),
        ("timm:resnet18", {"no_such": 1}, "timm:resnet18 cannot be built so: .*no_such"),
        ("torchvision:resnet18", {"input_shape": (1, 8, 8)}, "takes images of 3 channels, and these have 1"),
        ("hf-hub:a/b", {}, "is a trained network, not one to build; load it"),
    ],
)
def test_what_cannot_be_built_is_refused(name, options, words):
    with pytest.raises((ConfigError, UnknownNameError), match=words):
        l2p.build_model(name, **options)


def test_published_weights_are_read_from_the_cache_and_never_judged_with_a_random_head(monkeypatch, tmp_path, capsys):
    theirs = l2p.build_model("torchvision:mobilenet_v3_small", 1000).network
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", lambda url, **_: theirs.state_dict())
    net = l2p.build_model("torchvision:mobilenet_v3_small?pretrained", 10)
    assert torch.equal(net.network.features[0][0].weight, theirs.features[0][0].weight)
    assert net.registered_name == "torchvision:mobilenet_v3_small"
    words = [
        "evaluate",
        "torchvision:mobilenet_v3_small?pretrained",
        "--dataset",
        "folder",
        "--data-dir",
        str(tmp_path),
    ]
    folder = tmp_path / "test" / "a"
    folder.mkdir(parents=True)
    from PIL import Image

    Image.new("RGB", (32, 32)).save(folder / "0.png")
    assert main(words) == 2
    assert "was trained on 1000 classes and the data have 1, so its last layer is random" in capsys.readouterr().err
