from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from learn2perturb.attacks import FGSM, PGD
from learn2perturb.errors import ConfigError, InputError, UnknownNameError
from learn2perturb.evaluation import Comparison, Evaluation, compare, evaluate

N = 400


def right_on(share: float, seed: int):
    """A model that is right on a given random share of the images: the image is its own number."""
    right = torch.rand(N, generator=torch.Generator().manual_seed(seed)) < share

    def model(x: Tensor) -> Tensor:
        number = (x.flatten(1)[:, 0] * N).round().long().clamp(max=N - 1)
        return torch.nn.functional.one_hot((~right[number]).long(), 2).float() * 3 + 0 * x.flatten(1)[:, :1]

    return model


X = (torch.arange(N) / N).view(N, 1, 1, 1)
DATA = (X, torch.zeros(N, dtype=torch.int64))


def evaluation(share: float, seed: int = 0, data=DATA):
    return evaluate(right_on(share, seed), data, draws=1, name=f"model {share}")


def test_a_real_difference_is_found_and_signed():
    found = compare(evaluation(0.9), evaluation(0.7)).differences[0]
    assert found.difference == pytest.approx(0.2, abs=0.05)
    assert found.interval.low > 0
    assert found.mcnemar < 1e-6
    assert found.sentence.startswith("the first is better: +")
    assert compare(evaluation(0.7), evaluation(0.9)).differences[0].sentence.startswith("the second is better: -")


def test_pairing_sees_what_two_intervals_do_not():
    # The same seed: where 0.70 is right, 0.73 is too, so the difference has next to no noise.
    one, other = evaluation(0.73), evaluation(0.70)
    assert one.rows[0].interval.low < other.rows[0].interval.high
    found = compare(one, other).differences[0]
    assert found.interval.low > 0
    assert found.standard_error < 0.01


def test_equal_models_are_not_told_apart():
    same = compare(evaluation(0.8), evaluation(0.8)).differences[0]
    assert (same.difference, same.mcnemar) == (0.0, 1.0)
    wrong = sum(
        compare(evaluation(0.8, 2 * k), evaluation(0.8, 2 * k + 1)).differences[0].sentence[0] == "t" for k in range(12)
    )
    assert wrong <= 2


def test_records_of_other_images_are_refused():
    first = evaluation(0.8)
    with pytest.raises(InputError, match="400 images, the second of 100"):
        compare(first, evaluation(0.8, data=(X[:100], DATA[1][:100])))
    labels = DATA[1].clone()
    labels[:3] = 1
    with pytest.raises(InputError, match="labels of 3 of 400"):
        compare(first, evaluation(0.8, data=(X, labels)))
    other = dataclasses.replace(first, metadata={**first.metadata, "data": "cifar10"})
    with pytest.raises(InputError, match="cifar10"):
        compare(first, other)


def test_rows_are_paired_by_settings_or_by_hand(tmp_path):
    linear = lambda x: torch.cat([x.flatten(1), 0.5 - x.flatten(1)], dim=1)  # noqa: E731
    first = evaluate(linear, DATA, {"fgsm": FGSM(0.1)}, draws=1)
    second = evaluate(linear, DATA, {"other": FGSM(0.1)}, draws=1)
    assert [one.second for one in compare(first, second).differences] == ["clean", "other 0.1"]
    found = compare(first, second, pairs=[("fgsm", "other"), ("clean", "clean")])
    assert [one.difference for one in found.differences] == [0.0, 0.0]
    assert "Holm's correction for 2 rows" in str(found)
    assert Comparison.load(found.save(tmp_path / "comparison.json")) == found
    with pytest.raises(UnknownNameError, match="did you mean 'fgsm'"):
        compare(first, second, pairs=[("fgms", "other")])
    with pytest.raises(ConfigError, match="no row in common"):
        compare(dataclasses.replace(first, rows=first.rows[1:]), evaluate(linear, DATA, draws=1))


def linear(x: Tensor) -> Tensor:
    return torch.cat([x.flatten(1), 0.5 - x.flatten(1)], dim=1)


@pytest.mark.parametrize(
    ("other", "differs"),
    [
        (PGD(0.1, 0.01, 1), "steps"),
        (PGD(0.1, 0.02, 3), "step_size"),
        (PGD(0.1, 0.01, 3, norm="l2"), "norm"),
        (PGD(0.1, 0.01, 3, random_start=False), "random_start"),
        (PGD(0.1, 0.01, 3, loss="margin"), "loss"),
        (PGD(0.1, 0.01, 3, restarts=2), "restarts"),
    ],
)
def test_attacks_of_one_name_and_other_settings_are_left_out_and_said(other, differs):
    first = evaluate(linear, DATA, {"pgd": PGD(0.1, 0.01, 3)}, draws=1)
    found = compare(first, evaluate(linear, DATA, {"pgd": other}, draws=1))
    assert [one.first for one in found.differences] == ["clean"]
    assert len(found.left_out) == 2
    if differs != "norm":
        assert f"differs in {differs}" in found.left_out[0]
    assert found.left_out[0] in str(found)
    by_hand = compare(first, evaluate(linear, DATA, {"pgd": other}, draws=1), pairs=[("pgd", "pgd")])
    assert any("not the same attack" in note and differs in note for note in by_hand.notes)


def test_eot_does_not_count_without_noise_only():
    one, ten = (evaluate(linear, DATA, {"pgd": PGD(0.1, 0.01, 3, eot=eot)}, draws=1) for eot in (1, 10))
    assert [row.second for row in compare(one, ten).differences] == ["clean", "pgd 0.1"]

    def noisy(x: Tensor) -> Tensor:
        return linear(x + 0.01 * torch.randn_like(x))

    one, ten = (evaluate(noisy, DATA, {"pgd": PGD(0.1, 0.01, 3, eot=eot)}, draws=2) for eot in (1, 10))
    found = compare(one, ten)
    assert [row.second for row in found.differences] == ["clean"]
    assert "eot" in found.left_out[0]


def test_a_single_draw_is_never_paired_with_a_vote():
    def noisy(x: Tensor) -> Tensor:
        return linear(x + 0.3 * torch.randn_like(x))

    single, vote, bigger = (
        evaluate(noisy, DATA, draws=2, predictor=predictor, members=members)
        for predictor, members in (("single", 10), ("vote", 10), ("vote", 20))
    )
    probability = evaluate(noisy, DATA, draws=2, predictor="mean_probability", members=10)
    for other in (single, bigger, probability):
        with pytest.raises(ConfigError, match="no row in common"):
            compare(other, vote)
    both = evaluate(noisy, DATA, draws=2, predictor=["single", "vote"])
    assert [(one.first, one.second) for one in compare(both, both).differences] == [
        ("clean", "clean"),
        ("clean, vote", "clean, vote"),
    ]


def test_other_images_of_equal_labels_are_refused_and_batches_do_not_count():
    first = evaluation(0.8)
    moved = X.clone()
    moved[7] += 1e-4
    with pytest.raises(InputError, match="images differ"):
        compare(first, evaluation(0.8, data=(moved, DATA[1])))
    same = evaluate(right_on(0.8, 0), DATA, draws=1, batch_size=7)
    assert same.metadata["images"] == first.metadata["images"]


def test_records_from_before_the_hashes_load_and_say_so(tmp_path):
    first = evaluation(0.8)
    bare = {key: value for key, value in first.metadata.items() if key not in ("images", "weights")}
    old = Evaluation.load(dataclasses.replace(first, metadata=bare).save(tmp_path / "old.json"))
    found = compare(old, first)
    assert any("the first record holds no hash" in note for note in found.notes)
    assert not any("the second record" in note for note in found.notes)


def test_better_needs_the_interval_and_the_test():
    real = compare(evaluation(0.9), evaluation(0.7)).differences[0]
    assert "is better" in real.sentence
    assert "neither" in dataclasses.replace(real, p_holm=0.06).sentence
    assert "is better" in dataclasses.replace(real, p_holm=0.04).sentence
    before = dataclasses.replace(real, p_holm=None, p_value=None)  # a record of version 1
    assert "neither" in dataclasses.replace(before, mcnemar_holm=0.06).sentence
    assert "neither" in dataclasses.replace(real, interval=dataclasses.replace(real.interval, low=-0.01)).sentence
