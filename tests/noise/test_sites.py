"""Which sites are chosen, and which are refused: globs, predicates, selectors, the guess, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from learn2perturb.errors import InputError, SiteError
from learn2perturb.noise import noise_sites, perturb
from learn2perturb.noise.sites import matches

SHAPE = (3, 8, 8)


class PostActivation(nn.Module):
    """``relu(bn2(conv2(relu(bn1(conv1(x))))) + x)`` after a stem: as ResNet-V1."""

    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.stem_norm = nn.BatchNorm2d(4)
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5)
        self.in_place = in_place

    def forward(self, x):
        x = F.relu(self.stem_norm(self.stem(x)))
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.in_place:
            out += x
        else:
            out = x + out
        return self.fc(F.relu(out).mean((2, 3)))


class PreActivation(nn.Module):
    """``x + conv2(relu(bn2(conv1(relu(bn1(x))))))``: a branch ends in a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.final = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return self.fc(F.relu(self.final(x)).mean((2, 3)))


class Transformer(nn.Module):
    """A pre-norm transformer block over patches, q, k and v by ``unbind`` or ``chunk``, a class token by ``cat``."""

    def __init__(self, split: str) -> None:
        super().__init__()
        self.split = split
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.norm1, self.norm2, self.norm = nn.LayerNorm(8), nn.LayerNorm(8), nn.LayerNorm(8)
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 5)

    def attention(self, x):
        if self.split == "unbind":
            q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 8).permute(2, 0, 1, 3).unbind(0)
        else:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(F.scaled_dot_product_attention(q, k, v))

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
        x = x + self.attention(self.norm1(x))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(self.norm(x)[:, 0])


class Odd(nn.Module):
    """Submodules that cannot be perturbed: called twice, never, with tuples, with whole numbers."""

    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    class Rank(nn.Module):
        def forward(self, x):
            return x.argmax(1, keepdim=True)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.never = nn.Conv2d(3, 3, 1)
        self.pair, self.rank = self.Pair(), self.Rank()
        self.fc = nn.Linear(3, 5)

    def forward(self, x):
        x, _ = self.pair(self.conv(self.conv(x)))
        return self.fc((x + self.rank(x)).mean((2, 3)))


def sequential():
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 6),
        nn.Linear(6, 5),
    )


# --- globs


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("layer1.0.bn2", "layer*.*.bn2", True),
        ("layer1.0.bn2", "layer*.bn2", False),  # * stays within one part
        ("layer1.0.bn2", "**.bn2", True),
        ("bn2", "**.bn2", True),
        ("layer1.0.bn2", "layer1.**", True),
        ("layer1", "layer1.**", True),
        ("layer1.0.bn2", "**", True),
        ("layer1.0.bn2", "layer1.0.bn[12]", True),
        ("layer1.0.bn2", "Layer1.0.bn2", False),
        ("layer1.0.bn2", "*", False),
        ("a.b.c.d", "a.**.d", True),
        ("a.d", "a.**.d", True),
        ("a.b.c", "a.**.d", False),  # what comes after ** counts
        ("layer1.0.bn1", "**.bn2", False),
        ("a.b", "a.**.b.c", False),
    ],
)
def test_globs_keep_to_parts(name, pattern, expected):
    assert matches(name, pattern) is expected


@pytest.mark.parametrize(
    ("sites", "expected"),
    [
        ("bn?", ["bn1", "bn2"]),
        (["bn2", "bn1"], ["bn1", "bn2"]),
        (["bn2", "bn*"], ["bn1", "bn2"]),  # each once
        (lambda name, module: isinstance(module, nn.Conv2d) and "1" in name, ["conv1"]),
        ("@convolutions", ["stem", "conv1", "conv2"]),
        ("@norms", ["stem_norm", "bn1", "bn2"]),
        ("@linears", ["fc"]),
        (("@linears", "stem"), ["stem", "fc"]),
    ],
)
def test_sites_by_glob_names_predicate_and_selector(sites, expected):
    network = perturb(PostActivation(), input_shape=SHAPE, sites=sites)
    assert sorted(noise_sites(network)) == sorted(expected)


# --- the guess


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (PostActivation, ["stem_norm", "bn2"]),
        (lambda: PostActivation(in_place=True), ["stem_norm", "bn2"]),
        (PreActivation, ["stem", "conv2"]),
        (lambda: Transformer("unbind"), ["patches", "proj", "down"]),
        (lambda: Transformer("chunk"), ["patches", "proj", "down"]),
        (sequential, ["0.1"]),  # no branches: every norm
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5)), ["0"]),  # no norm: convolutions
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.Linear(6, 5)), ["1"]),  # linear layers but the last
    ],
    ids=["post", "post-in-place", "pre", "unbind", "chunk", "norms", "convolutions", "linears"],
)
def test_the_guess_takes_the_stem_and_the_end_of_every_branch_and_says_so(build, expected, capsys):
    network = perturb(build(), input_shape=SHAPE)
    assert sorted(noise_sites(network)) == sorted(expected)
    shown = capsys.readouterr().err
    assert f"chose {len(expected)}" in shown
    assert all(name in shown for name in expected)


def test_a_network_with_nothing_to_perturb_is_an_error():
    with pytest.raises(SiteError, match="no norm, convolution or linear layer"):
        perturb(nn.Sequential(nn.Flatten(), nn.ReLU()), input_shape=SHAPE)


# --- granularity


@pytest.mark.parametrize(
    ("build", "site", "element", "channel"),
    [
        (PostActivation, "bn1", (4, 8, 8), (4, 1, 1)),
        (PostActivation, "fc", (5,), (5,)),
        (lambda: Transformer("chunk"), "proj", (5, 8), (1, 8)),  # tokens: channels are last
        (lambda: Transformer("chunk"), "norm1", (5, 8), (1, 8)),
        (lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 6, 3)), "1", (6, 62), (6, 1)),  # (C, L): channels are first
        (lambda: nn.Sequential(nn.LayerNorm([3, 8, 8]), nn.Flatten(), nn.Linear(192, 5)), "0", (3, 8, 8), (3, 1, 1)),
    ],
    ids=["image", "vector", "tokens", "layer-norm", "sequence", "layer-norm-of-images"],
)
def test_theta_has_the_shape_of_its_granularity(build, site, element, channel):
    for granularity, shape in (("element", element), ("channel", channel), ("layer", (1,) * len(element))):
        network = perturb(build(), input_shape=SHAPE, sites=[site], granularity=granularity)
        assert tuple(network.get_submodule(site).perturbation.theta.shape) == shape


def test_a_layer_norm_made_for_images_has_its_channels_first():
    class LayerNorm2d(nn.LayerNorm):  # as in torchvision and timm
        def forward(self, x):
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), LayerNorm2d(4), nn.Flatten(), nn.Linear(256, 5))
    perturb(network, input_shape=SHAPE, sites="1", granularity="channel")
    assert tuple(network[1].perturbation.theta.shape) == (4, 1, 1)


# --- refusals, which leave the network as it was


class Silent(nn.Module):
    """Fails with an error that has no text."""

    def forward(self, x):
        raise KeyError


@pytest.mark.parametrize(
    ("build", "arguments", "error", "named"),
    [
        (Odd, {"sites": "conv"}, SiteError, "'conv' is called 2 times"),
        (Odd, {"sites": "never"}, SiteError, "'never' was not called"),
        (Odd, {"sites": "pair"}, SiteError, r"'pair' \(Pair\) is a tuple"),
        (Odd, {"sites": "rank"}, SiteError, "'rank' has shape .*int64"),
        (Odd, {"sites": ["fc", "nevr"]}, SiteError, "'nevr' matches no submodule; near: never"),
        (Odd, {"sites": "layer*.bn"}, SiteError, "matches no submodule.*candidates:.*fc"),
        (Odd, {"sites": ["fc", "conv"]}, SiteError, "'conv'"),
        (Odd, {"sites": lambda name, module: False}, SiteError, "predicate chose none of 5"),
        (Odd, {"sites": []}, SiteError, "give a glob"),
        (Odd, {"sites": ""}, SiteError, "give a glob"),
        (Odd, {"sites": [1]}, SiteError, "give a glob"),
        (Odd, {"sites": "perturbation"}, SiteError, "matches no submodule"),
        (Odd, {"sites": "fc", "input_shape": (1, 8, 8)}, InputError, r"input_shape \(1, 8, 8\)"),
        (Odd, {"sites": "fc", "input_shape": (0, 8, 8)}, InputError, "give the shape of one image"),
        (Odd, {"sites": "fc", "input_shape": ()}, InputError, "give the shape of one image"),
        (sequential, {"sites": "0", "input_shape": (3, 9, 9)}, InputError, r"\(3, 9, 9\)"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), Silent()), {"sites": "0"}, InputError, "KeyError"),
        (Odd, {"sites": "fc", "granularity": "pixel"}, ValueError, "granularity is 'pixel'"),
        (Odd, {"sites": "fc", "sharing": "none"}, ValueError, "sharing is 'none'"),
        (Odd, {"sites": "fc", "place": "inside"}, ValueError, "place is 'inside'"),
        (Odd, {"sites": "fc", "distribution": "gausian"}, ValueError, "did you mean 'gaussian'"),
        (Odd, {"sites": "fc", "init": 0.001}, ValueError, "minimum is 0.01"),
        (Odd, {"sites": "fc", "init": float("nan")}, ValueError, "init is nan"),
        (Odd, {"sites": "fc", "minimum": -1.0}, ValueError, "minimum is -1.0"),
    ],
)
def test_a_refusal_names_the_submodule_and_leaves_the_network_untouched(build, arguments, error, named):
    network = build()
    keys, hooks = list(network.state_dict()), [len(m._forward_hooks) for m in network.modules()]
    with pytest.raises(error, match=named):
        perturb(network, **{"input_shape": SHAPE, **arguments})
    assert list(network.state_dict()) == keys
    assert [len(m._forward_hooks) for m in network.modules()] == hooks
    assert not network._load_state_dict_pre_hooks


def test_perturbing_a_site_twice_is_refused_and_another_site_can_follow():
    network = perturb(PostActivation(), input_shape=SHAPE, sites="bn1")
    with pytest.raises(SiteError, match="'bn1' is perturbed already"):
        perturb(network, input_shape=SHAPE, sites="bn*")
    assert noise_sites(network) == ["bn1"]
    perturb(network, input_shape=SHAPE, sites="bn2")
    assert noise_sites(network) == ["bn1", "bn2"]


def test_what_is_no_module_is_refused():
    with pytest.raises(SiteError, match="network is a function"):
        perturb(lambda x: x)


@pytest.mark.parametrize("granularity", ["element", "channel", "layer"])
def test_another_image_size_names_the_site_unless_theta_fits_it(granularity):
    network = perturb(PostActivation(), input_shape=SHAPE, sites="bn1", granularity=granularity)
    if granularity == "element":
        with pytest.raises(SiteError, match=r"'bn1' has features of shape \(4, 12, 12\)"):
            network(torch.rand(2, 3, 12, 12))
    else:
        assert network(torch.rand(2, 3, 12, 12)).shape == (2, 5)


# --- what the probe leaves behind


def test_perturb_leaves_modes_statistics_rng_and_values_alone():
    network = PostActivation()
    network.train()
    network.bn1.eval()  # a frozen norm
    modes = [module.training for module in network.modules()]
    before = {key: value.clone() for key, value in network.state_dict().items()}
    state = torch.get_rng_state()
    perturb(network, input_shape=SHAPE, sites=["bn2", "stem"])
    assert torch.equal(torch.get_rng_state(), state)
    noises = {f"{site}.perturbation" for site in noise_sites(network)}
    assert [m.training for name, m in network.named_modules() if name not in noises] == modes
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in before.items())
    assert all(parameter.grad is None for parameter in network.parameters())
