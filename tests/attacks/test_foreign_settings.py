"""What an adapter makes of the arguments of another library's attack: radius, norm, verbosity, and its refusals."""

from __future__ import annotations

import math

import pytest
import torch

from learn2perturb.attacks import (
    PGD,
    from_adv_lib,
    from_art,
    from_foolbox,
    from_function,
    from_torchattacks,
    to_adv_lib,
)
from learn2perturb.attacks.foreign import (
    AdvLibAttack,
    ArtAttack,
    FoolboxAttack,
    FunctionAttack,
    TorchattacksAttack,
)
from learn2perturb.errors import ConfigError, InputError
from tests.problems import Linear

MAKERS = {
    from_torchattacks: TorchattacksAttack,
    from_adv_lib: AdvLibAttack,
    from_art: ArtAttack,
    from_function: FunctionAttack,
}
makers = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)


def none(model, x, y):
    return x


def short(model, x, y, eps=0.2, epsilon=0.7):
    return x


def greek(model, x, y, ε=1):
    return x


def long(model, x, y, epsilon=None):
    return x


def loud(model, x, y, verbose=True):
    return x


@makers
@pytest.mark.parametrize(
    ("build", "eps", "radius", "name"),
    [
        (none, None, math.inf, None), (none, 0.1, 0.1, None),
        (short, None, 0.2, "eps"), (short, 0.1, 0.1, "eps"),
        (greek, None, 1.0, "ε"), (greek, 0.1, 0.1, "ε"),
        (long, None, math.inf, None), (long, 0.1, 0.1, "epsilon"),
        (max, None, math.inf, None), (max, 0.1, 0.1, None),  # compiled code does not say what it takes
    ],
)  # fmt: skip
def test_the_radius_is_the_one_given_or_the_attacks_own(make, build, eps, radius, name):
    found = make(build, eps=eps, scale=3)
    assert type(found) is MAKERS[make]
    assert (found.eps, found.norm, found.settings) == (radius, "linf", {"scale": 3})
    assert found.radius_name == (name if eps is not None or name in ("eps", "ε") else None)
    assert isinstance(found.eps, float)
    assert make(build, eps=0.1, norm="l2").norm == "l2"


@makers
def test_what_is_ours_is_not_passed_on(make):
    found = make(none, targeted=True, eot=3, eot_average="logits", seed=4, steps=5)
    assert (found.targeted, found.eot, found.eot_average, found.seed) == (True, 3, "logits", 4)
    assert found.settings == {"steps": 5}
    assert make(none).eot_average == "probability"
    assert make(none).seed is None


@makers
def test_progress_bars_are_off_unless_asked_for(make):
    assert make(loud).settings == {"verbose": False}
    assert make(loud, verbose=True).settings == {"verbose": True}
    assert make(none).settings == {}


@makers
def test_what_cannot_be_called_is_named_by_its_type(make):
    for value, kind in (("PGD", "str"), (3, "int"), (None, "NoneType")):
        with pytest.raises(ConfigError, match=f"the attack is a {kind}; give the library's class, or a function"):
            make(value)


@makers
def test_the_loss_of_another_library_cannot_be_averaged(make):
    assert make(none, eot=1, eot_average="loss").eot == 1
    with pytest.raises(ConfigError, match="eot_average is 'loss', but the loss is the other library's affair"):
        make(none, eot=2, eot_average="loss")


class Like:
    """An object that says its norm as foolbox's attacks do."""

    def __init__(self, order: float | None) -> None:
        if order is not None:
            self.distance = type("Distance", (), {"p": order})()

    def __call__(self) -> None:
        """Never called."""


@pytest.mark.parametrize(
    ("order", "eps", "norm", "found"),
    [
        (math.inf, None, None, "linf"), (math.inf, 0.1, None, "linf"), (2, 0.1, None, "l2"), (2.0, None, None, "l2"),
        (1, None, None, "linf"), (None, None, None, "linf"), (1, 0.1, "l2", "l2"), (2, 0.1, "linf", "linf"),
    ],
)  # fmt: skip
def test_an_attack_of_foolbox_has_its_own_norm(order, eps, norm, found):
    attack = from_foolbox(Like(order), eps=eps, norm=norm, seed=3)
    assert type(attack) is FoolboxAttack
    assert (attack.norm, attack.eps, attack.seed) == (found, math.inf if eps is None else eps, 3)
    assert attack.eot_average == "probability"


@pytest.mark.parametrize(("order", "told"), [(1, "1"), (0, "0"), (None, "None")])
def test_a_norm_without_a_ball_takes_no_radius(order, told):
    with pytest.raises(ConfigError, match=f"has norm {told}; only l_inf and l2 have a ball here: leave eps out"):
        from_foolbox(Like(order), eps=0.1)


@pytest.mark.parametrize(("value", "told"), [(Like, "the class Like"), (3, "a int"), (PGD, "the class PGD")])
def test_what_is_no_object_of_foolbox_or_no_attack_of_ours_is_named(value, told):
    with pytest.raises(ConfigError, match=f"attack is {told}; give an object, such as foolbox"):
        from_foolbox(value)
    with pytest.raises(ConfigError, match=f"attack is {told}; give an Attack of this package"):
        to_adv_lib(value)


@pytest.mark.parametrize("targeted", [False, True])
def test_ours_as_a_function_of_adversarial_librarys_form(targeted):
    x, model = torch.rand(4, 1, 3, 3), Linear((1, 3, 3))
    y = torch.full((4,), int(targeted))
    found = to_adv_lib(PGD(0.1, 0.05, 3, seed=0))(model=model, inputs=x, labels=y, targeted=targeted)
    assert torch.equal(found, PGD(0.1, 0.05, 3, seed=0, targeted=targeted)(model, x, y))
    plain = to_adv_lib(PGD(0.1, 0.05, 3, seed=0))(model, x, y)
    assert torch.equal(plain, PGD(0.1, 0.05, 3, seed=0)(model, x, y))


@pytest.mark.parametrize("answer", [None, [1], torch.zeros(4, 1, 3), torch.zeros(3, 1, 3, 3)])
def test_an_answer_that_is_no_batch_of_images_is_told(answer):
    x = torch.rand(4, 1, 3, 3)
    told = (
        f"shape \\({', '.join(map(str, answer.shape))}\\)"
        if isinstance(answer, torch.Tensor)
        else f"a {type(answer).__name__}"
    )
    with pytest.raises(InputError, match=rf"FunctionAttack returned {told}, not images of shape \(4, 1, 3, 3\)"):
        from_function(lambda model, x, y: answer)(Linear((1, 3, 3)), x, torch.zeros(4, dtype=torch.int64))


def test_two_calls_without_a_seed_have_streams_of_their_own_and_a_pass_has_its_own_too():
    x, seen = torch.rand(2, 1, 3, 3), []

    def asking(model, x, y):
        for _ in range(2):
            model(x)
        return x

    def noisy(images):
        seen.append(torch.rand(()).item())
        return Linear((1, 3, 3))(images)

    attack = from_function(asking)
    for _ in range(2):
        attack(noisy, x, torch.zeros(2, dtype=torch.int64))
    own = seen[:2] + seen[3:5]
    assert len(set(own)) == 4
