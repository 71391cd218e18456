"""Networks that are not ours, unchanged: perturbed, trained through ``train``, saved, loaded, attacked, cleaned."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import learn2perturb as l2p

pytestmark = pytest.mark.compat

SHAPE = (3, 32, 32)


def plain_sequential(request: pytest.FixtureRequest) -> nn.Module:
    """A network as a beginner writes it."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


def torchvision_resnet18(request: pytest.FixtureRequest) -> nn.Module:
    return request.getfixturevalue("torchvision").models.resnet18(num_classes=10)


def timm_transformer(request: pytest.FixtureRequest) -> nn.Module:
    create = request.getfixturevalue("timm").create_model
    return create("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=48, num_classes=10)


def timm_pre_activation(request: pytest.FixtureRequest) -> nn.Module:
    create = request.getfixturevalue("timm").create_model
    return create("resnetv2_18", channels=(16, 32, 64, 128), stem_chs=16, num_classes=10)


@dataclass(frozen=True)
class Foreign:
    """A network, the sites that a good guess finds, and a glob with the sites that it names."""

    build: Callable[[pytest.FixtureRequest], nn.Module]
    guessed: tuple[str, ...]
    glob: str
    named: tuple[str, ...]


NETWORKS = {
    # no residual branch: every norm
    "sequential": Foreign(plain_sequential, ("1", "4"), "[03]", ("0", "3")),
    # the stem and the end of every residual branch: a norm here (Learn2Perturb, appendix A.1) ...
    "torchvision_resnet18": Foreign(
        torchvision_resnet18,
        ("bn1", *(f"layer{stage}.{block}.bn2" for stage in (1, 2, 3, 4) for block in (0, 1))),
        "layer[12].*.bn2",
        tuple(f"layer{stage}.{block}.bn2" for stage in (1, 2) for block in (0, 1)),
    ),
    # ... a convolution in a pre-activation network ...
    "timm_pre_activation": Foreign(
        timm_pre_activation,
        ("stem.conv", *(f"stages.{stage}.blocks.{block}.conv2" for stage in range(4) for block in (0, 1))),
        "stages.*.blocks.1.conv2",
        tuple(f"stages.{stage}.blocks.1.conv2" for stage in range(4)),
    ),
    # ... and a linear layer in a transformer
    "timm_transformer": Foreign(
        timm_transformer,
        ("patch_embed.proj", *(f"blocks.{block}.{end}" for block in (0, 1) for end in ("attn.proj", "mlp.fc2"))),
        "blocks.*.mlp.fc2",
        ("blocks.0.mlp.fc2", "blocks.1.mlp.fc2"),
    ),
}


@pytest.fixture(params=NETWORKS)
def foreign(request) -> Foreign:
    return NETWORKS[request.param]


@pytest.fixture
def network(foreign, request) -> nn.Module:
    """The network with running statistics that are not those of birth, in eval mode."""
    network = foreign.build(request)
    with torch.no_grad():
        network.train()(images(8))
    return network.eval()


def images(count: int) -> torch.Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(count))


def labelled(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return images(count), torch.arange(count) % 10


def own_state(network: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state without the noise's."""
    return {key: value for key, value in network.state_dict().items() if "perturbation" not in key.split(".")}


def assert_same_state(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [key for key in left if not torch.equal(left[key], right[key])] == []


def test_there_are_networks_of_every_kind():
    assert len(NETWORKS) == 4


@pytest.mark.parametrize("explicit", [False, True], ids=["guess", "glob"])
def test_noise_goes_where_it_should(foreign, network, explicit, capsys):
    kept = list(network.state_dict())
    given = l2p.perturb(network, input_shape=SHAPE, sites=foreign.glob if explicit else None)
    assert given is network
    expected = foreign.named if explicit else foreign.guessed
    assert set(l2p.noise_sites(network)) == set(expected)
    assert len(l2p.noise_parameters(network)) == len(expected)
    assert [key for key in kept if key not in network.state_dict()] == []
    assert list(own_state(network)) == kept
    printed = capsys.readouterr()
    assert all((site in printed.out + printed.err) != explicit for site in expected if len(site) > 1)


@pytest.mark.parametrize("granularity", ["element", "channel"])
def test_rows_get_noise_of_their_own_and_off_is_the_plain_network_bit_for_bit(network, granularity):
    x = images(1).repeat(4, 1, 1, 1)
    plain = copy.deepcopy(network)
    l2p.perturb(network, input_shape=SHAPE, granularity=granularity)
    with torch.no_grad():
        noisy, again, expected = network(x), network(x), plain(x)
        with l2p.noise_disabled(network):
            assert torch.equal(network(x), expected)
        with l2p.fixed_noise(network, seed=3):
            assert torch.equal(network(x), network(x))
    assert not torch.equal(noisy, again)
    assert len({row.numpy().tobytes() for row in noisy}) == 4


def test_a_plain_checkpoint_loads_strictly(foreign, network, request):
    checkpoint = foreign.build(request).state_dict()
    l2p.perturb(network, input_shape=SHAPE)
    thetas = [theta.detach().clone() for theta in l2p.noise_parameters(network)]
    network.load_state_dict(checkpoint, strict=True)
    assert_same_state(own_state(network), checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(thetas, l2p.noise_parameters(network), strict=True))


def test_noise_survives_a_copy_and_a_pickle_and_can_be_removed(network):
    x = images(4)
    plain = copy.deepcopy(network)
    l2p.perturb(network, input_shape=SHAPE)
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network)), network):
        assert l2p.noise_sites(twin) == l2p.noise_sites(network)
        with torch.no_grad():
            assert not torch.equal(twin(x), twin(x))
            assert l2p.remove_noise(copy.deepcopy(twin))(x).equal(plain(x))
    assert l2p.noise_sites(l2p.remove_noise(network)) == []
    assert_same_state(network.state_dict(), plain.state_dict())


def test_pgd_attacks_it_and_leaves_it_as_it_was(network):
    l2p.perturb(network, input_shape=SHAPE)
    network.train()
    modes = [module.training for module in network.modules()]
    state = copy.deepcopy(network.state_dict())
    x, y = labelled(4)
    adversarial = l2p.attacks.PGD(eps=8 / 255, step_size=0.01, steps=2, eot=2)(network, x, y)
    assert adversarial.shape == x.shape
    assert 0 < float((adversarial - x).abs().max()) <= 8 / 255 + 1e-6
    assert float(adversarial.min()) >= 0
    assert float(adversarial.max()) <= 1
    assert [module.training for module in network.modules()] == modes
    assert_same_state(network.state_dict(), state)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_it_is_trained_saved_loaded_and_attacked(foreign, network, request, tmp_path):
    before = copy.deepcopy(network.state_dict())
    config = l2p.TrainConfig(
        defense="learn2perturb", recipe="fast", epochs=1, batch_size=8, attack_steps=2, monitor=0, tensorboard=False
    )
    l2p.train(config, model=network, data=(labelled(20), labelled(10)), out=tmp_path / "run")  # 8 + 8 + 4 images
    fresh = foreign.build(request)
    loaded = l2p.load(tmp_path / "run", model=fresh)
    assert set(l2p.noise_sites(loaded)) == set(foreign.guessed)
    assert own_state(loaded).keys() == before.keys()
    weights = [name for name, _ in foreign.build(request).named_parameters()]
    moved = [name for name in weights if not torch.equal(loaded.state_dict()[name], before[name])]
    assert len(moved) > len(weights) / 2
    for theta in (parameter.detach() for parameter in l2p.noise_parameters(loaded)):
        assert not torch.equal(theta, torch.full_like(theta, 0.25))
        assert float(theta.min()) >= 0.01
    x, y = labelled(4)
    adversarial = l2p.attacks.PGD(eps=8 / 255, step_size=0.01, steps=2)(loaded, x, y)
    assert 0 < float((adversarial - x).abs().max()) <= 8 / 255 + 1e-6
    plain = l2p.remove_noise(copy.deepcopy(loaded)).eval()
    with l2p.noise_disabled(loaded), torch.no_grad():
        assert torch.equal(loaded.eval()(x), plain(x))
