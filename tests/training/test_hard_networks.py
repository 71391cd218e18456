"""Training of networks that people have: frozen in part, lazy, in another type, in place, with several answers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from learn2perturb.engine.frozen import left_in_eval, train_but
from learn2perturb.errors import ConfigError, InputError, SiteError
from learn2perturb.training import TrainConfig, train

X, Y = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 10


def config(**settings):
    values = {
        "defense": "pgd_at", "recipe": "fast", "epochs": 1, "batch_size": 8, "eps": 0.1, "attack_steps": 1,
        "monitor": 8, "device": "cpu", "engine": "plain", "tensorboard": False,
    }  # fmt: skip
    return TrainConfig(**{**values, **settings})


def run(network, out=None, **settings):
    return train(config(**settings), model=network, data=((X, Y), (X, Y)), out=out, progress=False).model


def with_stem() -> nn.Module:
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 16), nn.BatchNorm1d(16),
        nn.Linear(16, 10),
    )  # fmt: skip
    network[:2].requires_grad_(False).eval()
    return network


# --- frozen parts


@pytest.mark.parametrize(
    "settings",
    [
        {"defense": "none"},
        {"attack_mode": "train", "awp": 0.01, "weight_average": 0.9},
        {"defense": "trades", "attack_mode": "train"},
        {"defense": "learn2perturb"},
        {"defense": "pni"},
        {"defense": "adv_bnn", "options": {"mean_init": "released"}},
        {"defense": "rse"},
    ],
    ids=str,
)
def test_what_is_frozen_stays_so_and_the_rest_trains(settings, tmp_path):
    network = with_stem()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    again = copy.deepcopy(network)
    run(network, tmp_path, **settings)
    model = run(again, tmp_path, **settings)  # and as it is loaded again
    after = model.state_dict()
    for name, value in before.items():
        plain = name.replace("weight", "parametrizations.weight.original").replace(
            "bias", "parametrizations.bias.original"
        )
        now = after[name] if name in after else after[plain]
        assert torch.equal(now, value) == name.startswith(("0.", "1.")), name
    kept = [p for part in (model[0], model[1]) for p in part.parameters() if any(p is q for q in network.parameters())]
    assert not any(parameter.requires_grad for parameter in kept)


def test_pixeldp_which_must_set_the_first_kernel_refuses_a_frozen_one():
    with pytest.raises(SiteError, match="'0', is frozen, and PixelDP must"):
        run(with_stem(), defense="pixeldp")


@pytest.mark.parametrize("defense", ["none", "adv_bnn", "learn2perturb"])
def test_a_network_that_is_frozen_as_a_whole_has_nothing_to_train(defense):
    with pytest.raises(ConfigError, match="nothing to train"):
        run(with_stem().requires_grad_(False), defense=defense)


class HoldsBack(nn.Module):
    """A network that keeps its norm in eval mode in a train() of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.BatchNorm2d(1), nn.Linear(64, 10)

    def train(self, mode: bool = True) -> HoldsBack:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x):
        return self.fc(self.norm(x).flatten(1))


def test_modes_that_a_user_has_set_are_told_from_those_that_a_load_has_set():
    def names(network: nn.Module) -> set[str]:
        known = {id(module): name for name, module in network.named_modules()}
        return {known[id(module)] for module in left_in_eval(network)}

    assert names(with_stem()) == {"0", "1"}
    assert names(with_stem().eval()) == {"0", "1"}  # of the whole network those whose parameters are frozen too
    loaded = nn.Sequential(nn.Linear(4, 4), nn.Dropout()).eval()
    assert names(loaded) == set()
    two = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    for wrapped in (nn.Sequential(nn.Identity(), two), nn.DataParallel(two)):  # made in train mode, as any module is
        assert wrapped.training
        assert names(wrapped) == set()


def test_modes_are_set_from_the_root_down_and_a_train_of_ones_own_is_heard():
    network = nn.Sequential(nn.Sequential(nn.BatchNorm2d(1), nn.Dropout()), nn.BatchNorm2d(1))
    network[0].eval()
    network[0][1].train()
    frozen = left_in_eval(network)
    train_but(network.eval(), frozen)
    assert [module.training for module in network.modules()] == [True, False, False, True, True]
    own = HoldsBack()
    own.fc.eval()
    train_but(own, left_in_eval(own))
    assert (own.training, own.norm.training, own.fc.training) == (True, False, False)
    model = run(HoldsBack())
    assert model.norm.num_batches_tracked == 0


# --- what is refused, and what is not


class Answers(nn.Module):
    """A network whose forward is a function of it and the images."""

    def __init__(self, answer) -> None:
        super().__init__()
        self.fc, self.answer = nn.Linear(64, 10), answer

    def logits(self, x):
        return self.fc(x.flatten(1))

    def forward(self, x):
        return self.answer(self, x)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda net, x: (net.logits(x), x), "gives a tuple for 2 images"),
        (lambda net, x: (net.logits(x), x) if net.training else net.logits(x), "gives a tuple for 8 images"),
        (lambda net, x: net.logits(x)[None] if net.training else net.logits(x), r"gives shape \(1, 8, 10\)"),
        (lambda net, x: net.logits(x.sub_(0.5)), "works in place on its images"),
        (lambda net, x: net.logits(x.sub_(0.5)) if net.training else net.logits(x), "works in place on its images"),
    ],
)
@pytest.mark.parametrize("defense", ["none", "pgd_at"])
def test_a_forward_that_training_cannot_use_is_refused(answer, message, defense):
    with pytest.raises(InputError, match=message):
        run(Answers(answer), defense=defense)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision_are_refused_with_the_fix(kind):
    with pytest.raises(InputError, match=r"small updates of a weight are lost.*network\.float\(\)"):
        run(with_stem().to(kind))


@pytest.mark.parametrize(
    "settings", [{"awp": 0.01, "weight_average": 0.9}, {"defense": "trades"}, {"defense": "learn2perturb"}], ids=str
)
def test_a_network_in_double_precision_trains_in_it_and_keeps_what_is_frozen(settings):
    model = run(with_stem().double(), **settings)
    assert {tensor.dtype for tensor in model.state_dict().values() if tensor.ndim} <= {torch.float64, torch.float32}
    assert model[6].weight.dtype == torch.float64
    assert model[1].num_batches_tracked == 0


def test_weights_made_in_inference_mode_are_refused():
    with torch.inference_mode():
        network = with_stem()
    with pytest.raises(InputError, match="made inside"):
        run(network)


@pytest.mark.parametrize(
    "settings", [{"awp": 0.01, "weight_average": 0.9}, {"defense": "pni"}, {"defense": "adv_bnn"}], ids=str
)
def test_lazy_layers_get_their_weights_first(settings):
    network = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))
    assert run(network, **settings)(X).shape == (16, 10)
    with pytest.raises(InputError, match=r"failed on images of shape \(1, 8, 8\)"):
        run(nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(10)))


def test_a_trained_network_whose_weights_hooks_compute_can_be_copied():
    network = nn.Sequential(nn.Flatten(), nn.utils.spectral_norm(nn.Linear(64, 10)))
    model = run(network)
    assert torch.equal(copy.deepcopy(model)(X), model(X))
