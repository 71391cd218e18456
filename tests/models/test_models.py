from __future__ import annotations

import copy
import fnmatch
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from learn2perturb.defenses import build_defense
from learn2perturb.errors import ConfigError, UnknownNameError
from learn2perturb.models import Normalize, build_model, list_models
from learn2perturb.noise import noise_sites, perturb, remove_noise
from learn2perturb.registry import MODELS

# (parameters for 10 classes, for 100 classes, theta): SCIENCE section 7; the 100-class ones differ by 90 rows of fc.
COUNTS = {
    "resnet20": (269_722, 275_572, 102_400),
    "resnet32": (464_154, 470_004, 159_744),
    "resnet44": (658_586, 664_436, 217_088),
    "resnet56": (853_018, 858_868, 274_432),
    "resnet20_x1.5": (605_026, 613_756, 153_600),
    "resnet20_x2": (1_073_962, 1_085_572, 204_800),
    "resnet20_x4": (4_286_026, 4_309_156, 409_600),
    "resnet18": (11_173_962, 11_220_132, 311_296),
    "resnext29_2x64d": (9_128_778, 9_221_028, 64 * 1024 + 3 * 1024 * (256 + 512 // 4 + 1024 // 16)),
    "wrn_28_10": (36_479_194, 36_536_884, 16 * 1024 + 4 * 1024 * (160 + 320 // 4 + 640 // 16)),
    "digits_cnn": (19_130, 22_100, 16 * 32 * 32 * 2 + 32 * 16 * 16),
}


def shape_of(name: str) -> tuple[int, int, int]:
    return (1, 8, 8) if name == "digits_cnn" else (3, 32, 32)


def test_every_registered_network_is_in_the_table() -> None:
    mine = [name for name in list_models() if MODELS.entry(name).target.split(":")[1] in BUILDERS]
    assert sorted(mine) == sorted(COUNTS) and len(COUNTS) == 11
    assert list_models("resnet20_*") == ["resnet20_x1.5", "resnet20_x2", "resnet20_x4"]


BUILDERS = {"resnet_cifar", "resnet18", "resnext29_2x64d", "wrn_28_10", "digits_cnn"}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_the_papers(name: str) -> None:
    for classes, expected in zip((10, 100), COUNTS[name][:2], strict=True):
        network = build_model(name, classes, input_shape=shape_of(name))
        assert sum(parameter.numel() for parameter in network.parameters()) == expected
        assert next(iter(network.named_children()))[0] == "normalize"
        assert not any(key.startswith("normalize") for key in network.state_dict())


@pytest.mark.parametrize("name", COUNTS)
def test_default_sites_hold_the_papers_number_of_thetas(name: str) -> None:
    network = build_model(name, input_shape=(3, 32, 32)).eval()
    sizes: list[int] = []
    for path, module in network.named_modules():
        if any(fnmatch.fnmatch(path, pattern) for pattern in MODELS.entry(name).facts["sites"]):
            module.register_forward_hook(lambda _m, _i, out: sizes.append(out[0].numel()))
    with torch.no_grad():
        network(torch.rand(1, 3, 32, 32))
    assert sum(sizes) == COUNTS[name][2]


SMALL_SHAPES = [(1, 8, 8), (4, 7, 5), (2, 1, 1)]
ANY_SIZE = [
    *((name, shape) for name in ("resnet20", "resnet18", "digits_cnn") for shape in [(3, 32, 32), *SMALL_SHAPES]),
    *(("resnext29_2x64d", shape) for shape in SMALL_SHAPES),
    pytest.param("resnext29_2x64d", (3, 32, 32), marks=pytest.mark.slow),
    *(pytest.param("wrn_28_10", shape, marks=pytest.mark.slow) for shape in [(3, 32, 32), *SMALL_SHAPES]),
]


@pytest.mark.parametrize(("name", "shape"), ANY_SIZE)
def test_any_size_deepcopy_gradients_and_layouts(name: str, shape: tuple[int, int, int]) -> None:
    network = build_model(name, 3, input_shape=shape).eval()
    x = torch.rand(2, *shape, requires_grad=True)
    logits = network(x)
    assert logits.shape == (2, 3)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters()) and x.grad is not None
    assert torch.equal(copy.deepcopy(network)(x), logits)
    torch.testing.assert_close(network(x.detach().to(memory_format=torch.channels_last)), logits.detach())


def test_a_hook_may_keep_what_a_site_gives() -> None:
    network, kept = build_model("resnet20").eval(), []
    network.get_submodule("layer2.0.bn2").register_forward_hook(lambda _m, _i, out: kept.append((out, out.clone())))
    with torch.no_grad():
        network(torch.rand(2, 3, 32, 32))
    assert torch.equal(*kept[0]) and float(kept[0][0].min()) < 0


def test_option_a_shortcut_subsamples_and_pads_with_zeros() -> None:
    x = torch.rand(2, 16, 5, 6)
    out = build_model("resnet20").get_submodule("layer2.0.shortcut")(x)
    assert torch.equal(out[:, :16], x[:, :, ::2, ::2]) and not out[:, 16:].any() and out.shape == (2, 32, 3, 3)


@pytest.mark.parametrize(("shortcut", "count"), [("conv", 36_479_194), ("pad", 36_220_634)])
def test_the_shortcuts_of_the_wide_network(shortcut: str, count: int) -> None:
    network = build_model("wrn_28_10", shortcut=shortcut, leak=0.1).eval()
    assert sum(parameter.numel() for parameter in network.parameters()) == count
    block = network.get_submodule("layer2.0")
    x = torch.randn(1, 160, 5, 6)
    with torch.no_grad():
        active = F.leaky_relu(block.bn1(x), 0.1)
        branch = block.conv2(F.leaky_relu(block.bn2(block.conv1(active)), 0.1))
        if shortcut == "conv":
            short = F.conv2d(active, block.shortcut.weight, stride=2)
        else:  # of the block's input, means of 2 x 2 pixels (of those that exist, at the edge), zeros on both sides
            means = torch.stack(
                [x[..., i : i + 2, j : j + 2].mean((2, 3)) for i in (0, 2, 4) for j in (0, 2, 4)], dim=2
            )
            short = torch.cat([torch.zeros(1, 80, 9), means, torch.zeros(1, 80, 9)], dim=1).view(1, 320, 3, 3)
        torch.testing.assert_close(block(x), branch + short)
    assert network.get_submodule("layer1.0").shared
    assert not network.get_submodule("layer1.1").shared


@pytest.mark.parametrize(
    ("name", "options"),
    [("resnext29_2x64d", {}), ("wrn_28_10", {"shortcut": "conv"}), ("wrn_28_10", {"shortcut": "pad"})],
)
def test_noise_finds_the_ends_of_the_branches_without_the_registry(name: str, options: dict, capsys) -> None:
    network = build_model(name, input_shape=(3, 8, 8), **options)
    known = noise_sites(perturb(network, input_shape=(3, 8, 8)))
    remove_noise(network).registered_name = None
    guessed = noise_sites(perturb(network, input_shape=(3, 8, 8)))
    # Where every branch starts with a norm, the first may serve the shortcut too: then it ends the stem.
    assert guessed in (known, ["layer1.0.bn1", *known[1:]])
    assert len(known) == (13 if name == "wrn_28_10" else 10)
    capsys.readouterr()


def test_rse_has_31_noise_layers_on_its_own_network() -> None:
    network = build_model("resnext29_2x64d", input_shape=(3, 8, 8), normalization=None)
    build_defense("rse").prepare(network, (3, 8, 8))
    assert len(noise_sites(network)) == 31


def test_convolution_init_and_the_global_seed() -> None:
    torch.manual_seed(0)
    first = build_model("resnet18")
    torch.manual_seed(0)
    second = build_model("resnet18")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    for module in first.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 30_000:
            k, expected = module.kernel_size[0], math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels))
            assert k in (1, 3) and float(module.weight.detach().std()) == pytest.approx(expected, rel=0.03)


def test_build_arguments_survive_json_and_rebuild() -> None:
    network = build_model("resnet20", 7, input_shape=(2, 9, 9), normalization=((0.1, 0.2), (0.3, 0.4)), width=0.5)
    arguments = json.loads(json.dumps(network.build_arguments))
    again = build_model(network.registered_name, **arguments)
    again.load_state_dict(network.state_dict())
    x = torch.rand(2, 2, 9, 9)
    assert torch.equal(network.eval()(x), again.eval()(x))


def test_normalisation_choices() -> None:
    x = torch.rand(2, 3, 4, 4)
    paper = build_model("resnet20").normalize
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2023, 0.1994, 0.2010])
    torch.testing.assert_close(paper(x), (x - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    assert build_model("resnet20", normalization="cifar10").normalize.std[0, 0, 0, 0] == pytest.approx(0.2470)
    assert build_model("resnet20", normalization="cifar100").normalize.std[0, 0, 0, 0] == pytest.approx(0.2673)
    torch.testing.assert_close(build_model("resnet20", normalization="centered").normalize(x), x - 0.5)
    assert torch.equal(build_model("resnet20", normalization=None).normalize(x), x)
    assert build_model("digits_cnn", input_shape=(1, 8, 8)).normalize.mean.flatten().tolist() == [0.5]
    grey = x[:, :1]
    assert torch.equal(Normalize((0.5,), (0.25,))(grey), (grey - 0.5) / 0.25)


@pytest.mark.parametrize(
    ("name", "arguments", "error", "words"),
    [
        ("resnet21", {}, UnknownNameError, "resnet20"),
        (None, {}, UnknownNameError, "None"),
        ("resnet20", {"num_classes": 1}, ConfigError, ">= 2"),
        ("resnet20", {"num_classes": 2.0}, ConfigError, "num_classes 2.0"),
        ("resnet20", {"num_classes": True}, ConfigError, "num_classes True"),
        ("resnet18", {"input_shape": (32, 32)}, ConfigError, "input_shape"),
        ("resnet18", {"input_shape": (3, 0, 32)}, ConfigError, "input_shape"),
        ("digits_cnn", {"input_shape": 8}, ConfigError, "input_shape"),
        ("digits_cnn", {"input_shape": "abc"}, ConfigError, "input_shape"),
        ("resnet20", {"normalization": "papr"}, UnknownNameError, "did you mean 'paper'"),
        ("resnet20", {"normalization": "dataset"}, ConfigError, "data.mean"),
        ("resnet20", {"normalization": ((0, 0, 0), (1, 0, 1))}, ConfigError, "<= 0"),
        ("resnet20", {"normalization": ((0, 0, 0), (1, -1, 1))}, ConfigError, "<= 0"),
        ("resnet20", {"normalization": ((0, 0), (1, 1))}, ConfigError, "2 channels"),
        ("resnet20", {"normalization": ((0, 0, 0), (1, 1))}, ConfigError, "3 means and 2 stds"),
        ("resnet20", {"normalization": ((0, 0, 0), (1, float("nan"), 1))}, ConfigError, "finite"),
        ("resnet20", {"normalization": 3}, ConfigError, "normalization 3"),
        ("resnet20", {"normalization": (0.5, 0.5)}, ConfigError, "per channel"),
        ("resnet20", {"input_shape": (1, 8, 8), "normalization": "cifar10"}, ConfigError, "1;"),
        ("resnet20", {"depth": 21}, ConfigError, "6n"),
        ("resnet20", {"width": 0}, ConfigError, "width 0"),
        ("resnet18", {"depth": 20}, ConfigError, "no option 'depth'"),
        ("wrn_28_10", {"shortcut": "identity"}, ConfigError, "allowed: conv, pad"),
        ("wrn_28_10", {"leak": 1.5}, ConfigError, "leak is 1.5"),
    ],
)
def test_bad_arguments_give_one_clear_line(name: str, arguments: dict, error: type, words: str) -> None:
    with pytest.raises(error) as caught:
        build_model(name, **arguments)
    assert words in str(caught.value) and "\n" not in str(caught.value)
