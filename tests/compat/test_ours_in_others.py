"""Our attacks and networks where other libraries expect their own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from learn2perturb import attacks
from learn2perturb.attacks import CW, FGSM, PGD, FewPixel
from learn2perturb.errors import ConfigError, InputError
from learn2perturb.noise import is_stochastic

pytestmark = pytest.mark.compat

EPS = 0.1
ATTACK = PGD(EPS, 0.03, 5, seed=1)


@pytest.fixture
def batch(digits):
    return digits[0][:30], digits[1][:30]


@pytest.fixture
def classifier(art, plain):
    return art_classifier(plain)


def art_classifier(model, **settings):
    from art.estimators.classification import PyTorchClassifier

    common = {"clip_values": (0, 1), "device_type": "cpu"} | settings
    return PyTorchClassifier(model=model, loss=nn.CrossEntropyLoss(), input_shape=(1, 8, 8), nb_classes=10, **common)


# --- networks: they are plain modules, and stay stochastic


def test_a_stochastic_network_draws_anew_at_every_pass_of_every_library(noisy, batch, torchattacks, foolbox, art):
    x, _ = batch
    passes = {
        "torchattacks": torchattacks.PGD(noisy).get_logits,
        "foolbox": foolbox.PyTorchModel(noisy, bounds=(0, 1), device="cpu"),
        "art": lambda images: torch.from_numpy(art_classifier(noisy).predict(images.numpy())),
    }
    for name, run in passes.items():
        assert not torch.equal(run(x), run(x)), name
        assert not noisy.training, name


def test_their_attacks_leave_a_network_stochastic_and_in_eval_mode(noisy, batch, torchattacks, foolbox, adv_lib, art):
    x, y = batch
    runs = [
        torchattacks.PGD(noisy, eps=EPS, alpha=0.03, steps=2)(x, y),
        foolbox.attacks.LinfPGD(steps=2)(foolbox.PyTorchModel(noisy, (0, 1), device="cpu"), x, y, epsilons=EPS)[1],
        adv_lib.pgd_linf(model=noisy, inputs=x, labels=y, ε=EPS, steps=2),
        torch.from_numpy(art.FastGradientMethod(art_classifier(noisy), eps=EPS).generate(x.numpy(), y.numpy())),
    ]
    assert all(0 < float((run - x).abs().max()) <= EPS + 1e-6 for run in runs)
    assert not any(module.training for module in noisy.modules())
    assert is_stochastic(noisy)


# --- attacks: the same images as when they are called directly


def test_torchattacks_runs_ours(plain, batch, torchattacks, capsys):
    x, y = batch
    exported = attacks.to_torchattacks(ATTACK, plain)
    assert isinstance(exported, torchattacks.attack.Attack)
    assert torch.equal(exported(x, y), ATTACK(plain, x, y))
    multi = torchattacks.MultiAttack([attacks.to_torchattacks(FGSM(EPS), plain), exported])
    assert float((multi(x, y) - x).abs().max()) <= EPS + 1e-6
    exported.set_mode_targeted_by_label(quiet=True)
    target = (y + 1) % 10
    assert torch.equal(exported(x, target), PGD(EPS, 0.03, 5, seed=1, targeted=True)(plain, x, target))
    assert torch.equal(attacks.to_torchattacks(exported_targeted(), plain)(x, target), exported(x, target))
    assert capsys.readouterr().out == ""


def exported_targeted():
    return PGD(EPS, 0.03, 5, seed=1, targeted=True)


def test_torchattacks_normalisation_is_part_of_the_model(plain, batch):
    x, y = batch
    exported = attacks.to_torchattacks(ATTACK, plain)
    exported.set_normalization_used(mean=[0.5], std=[0.5])
    seen = exported((x - 0.5) / 0.5, y)
    assert torch.allclose(seen * 0.5 + 0.5, ATTACK(lambda z: plain((z - 0.5) / 0.5), x, y), atol=1e-6)


def test_foolbox_runs_ours(plain, batch, foolbox):
    x, y = batch
    model = foolbox.PyTorchModel(plain, bounds=(0, 1), device="cpu")
    raw, clipped, success = attacks.to_foolbox(ATTACK)(model, x, y, epsilons=[0.05, EPS])
    assert torch.equal(raw[1], ATTACK(plain, x, y))
    assert [float((one - x).abs().max()) for one in clipped] == pytest.approx([0.05, EPS], abs=1e-6)
    with torch.no_grad():
        assert torch.equal(success[1], plain(clipped[1]).argmax(1) != y)
    target = (y + 1) % 10
    aimed = attacks.to_foolbox(ATTACK)(model, x, foolbox.TargetedMisclassification(target), epsilons=EPS)[0]
    assert torch.equal(aimed, exported_targeted()(plain, x, target))
    with pytest.raises(InputError, match="bounds"):
        attacks.to_foolbox(ATTACK)(foolbox.PyTorchModel(plain, bounds=(0, 255), device="cpu"), x, y, epsilons=EPS)


def test_adversarial_library_runs_ours(plain, batch):
    x, y = batch
    exported = attacks.to_adv_lib(ATTACK)
    assert torch.equal(exported(model=plain, inputs=x, labels=y), ATTACK(plain, x, y))
    assert torch.equal(exported(model=plain, inputs=x, labels=y, targeted=True), exported_targeted()(plain, x, y))


def test_art_runs_ours(plain, batch, classifier):
    x, y = batch
    exported = attacks.to_art(ATTACK, classifier)
    expected = ATTACK(plain, x, y).numpy()
    one_hot = nn.functional.one_hot(y, 10).numpy()
    assert (exported.generate(x=x.numpy(), y=y.numpy()) == expected).all()
    assert (exported.generate(x=x.numpy(), y=one_hot) == expected).all()
    predicted = torch.from_numpy(classifier.predict(x.numpy())).argmax(1)
    assert (exported.generate(x=x.numpy()) == ATTACK(plain, x, predicted).numpy()).all()


FORMS = {
    "int32": lambda y: y.to(torch.int32),
    "column": lambda y: y[:, None],
    "one-hot": lambda y: nn.functional.one_hot(y, 10),
}


@pytest.mark.parametrize("form", FORMS)
def test_labels_of_every_form_mean_the_same(form, plain, batch, classifier, torchattacks):
    x, y = batch
    given, expected = FORMS[form](y), ATTACK(plain, x, y)
    assert torch.equal(attacks.to_torchattacks(ATTACK, plain)(x, given), expected)
    assert torch.equal(attacks.to_adv_lib(ATTACK)(model=plain, inputs=x, labels=given), expected)
    generated = attacks.to_art(ATTACK, classifier).generate(x=x.numpy(), y=given.numpy())
    assert (generated == expected.numpy()).all()


def test_labels_that_say_no_class_are_refused(plain, batch, classifier):
    x, _ = batch
    soft = torch.full((len(x), 10), 0.1)
    with pytest.raises(InputError, match="not one-hot"):
        attacks.to_adv_lib(ATTACK)(model=plain, inputs=x, labels=soft)
    with pytest.raises(InputError, match="not one-hot"):
        attacks.to_art(ATTACK, classifier).generate(x=x.numpy(), y=soft.numpy())


def test_the_preprocessing_of_an_art_classifier_is_attacked_too(plain, batch, art):
    x, y = batch
    exported = attacks.to_art(ATTACK, art_classifier(plain, preprocessing=(0.5, 0.5)))
    expected = ATTACK(lambda z: plain((z - 0.5) / 0.5), x, y)
    assert torch.allclose(torch.from_numpy(exported.generate(x=x.numpy(), y=y.numpy())), expected, atol=1e-6)


def test_a_classifier_of_other_pixels_is_refused(plain, art):
    with pytest.raises(ConfigError, match="clip_values"):
        attacks.to_art(ATTACK, art_classifier(plain, clip_values=(0, 255)))
    with pytest.raises(ConfigError, match="PyTorchClassifier"):
        attacks.to_art(ATTACK, plain)


def test_foolbox_runs_our_minimum_norm_attack_once_for_all_sizes(plain, batch, foolbox):
    x, y = batch
    attack = CW(steps=20, search_steps=2, lr=0.05, initial_c=1.0, seed=1)
    model = foolbox.PyTorchModel(plain, bounds=(0, 1), device="cpu")
    raw, clipped, success = attacks.to_foolbox(attack)(model, x, y, epsilons=[None, 0.3, 1.5])
    assert torch.equal(raw[0], attack(plain, x, y))
    assert float((clipped[1] - x).flatten(1).norm(dim=1).max()) <= 0.3 + 1e-5
    assert success[0].sum() >= success[2].sum() >= success[1].sum()
    with pytest.raises(ConfigError, match="'l0'"):
        attacks.to_foolbox(FewPixel(1))
