"""Networks whose answer for an image is not one of that image alone: said aloud, and in the record."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from learn2perturb.attacks import PGD
from learn2perturb.certification import certify
from learn2perturb.diagnosis import diagnose
from learn2perturb.errors import InputError
from learn2perturb.evaluation import Evaluation, evaluate
from learn2perturb.evaluation.inputs import _shown
from learn2perturb.noise import perturb, perturb_weights

X, Y = torch.rand(24, 1, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3


class Whitens(nn.Module):
    """No norm layer of any kind, and each image is centred by the images beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(36, 3)

    def forward(self, x):
        h = x.flatten(1)
        return self.fc((h - h.mean(0)) * 3)


class Counts(nn.Module):
    """A buffer moves in every pass, also in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(36, 3)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x):
        self.seen += torch.rand(3)
        return self.fc(x.flatten(1)) + self.seen


def batch_norm(norm) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 3), norm, nn.Flatten(), nn.Linear(48, 3))


DEPENDENT = {
    "no norm": Whitens,
    "2d": lambda: batch_norm(nn.BatchNorm2d(3, track_running_stats=False)),
    "1d": lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(36, track_running_stats=False), nn.Linear(36, 3)),
    "with noise": lambda: perturb(Whitens(), input_shape=(1, 6, 6), sites="fc"),
}
FINE = {
    "batch norm": lambda: batch_norm(nn.BatchNorm2d(3)),
    "instance norm": lambda: batch_norm(nn.InstanceNorm2d(3)),
    "noise": lambda: perturb(batch_norm(nn.BatchNorm2d(3)), input_shape=(1, 6, 6), sites="0", init=2.0),
    "relative noise": lambda: perturb(
        batch_norm(nn.BatchNorm2d(3)), input_shape=(1, 6, 6), sites="0", minimum=0.0, relative=True
    ),
    "weight noise": lambda: perturb_weights(batch_norm(nn.BatchNorm2d(3)), init=2.0),
    "its own noise": lambda: nn.Sequential(nn.Flatten(), AlwaysDrops(), nn.Linear(36, 3)),
    "one batch only": lambda: lambda x: OneSize()(x),
}


class AlwaysDrops(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, 0.5)


class OneSize:
    def __call__(self, x):
        assert len(x) > 8
        return x.flatten(1)[:, :3]


@pytest.mark.parametrize("build", DEPENDENT.values(), ids=DEPENDENT)
@pytest.mark.parametrize("images", [24, 1])
def test_batch_statistics_in_eval_mode_are_warned_of_and_recorded(build, images, tmp_path):
    data = (X[:images], Y[:images])
    if images == 1 and build is DEPENDENT["1d"]:
        pytest.skip("a batch of one has no statistics here")
    with pytest.warns(UserWarning, match="depends on the other images of its batch"):
        result = evaluate(build(), data, {"pgd": PGD(0.1, 0.05, 1)} if images > 1 else None, draws=2)
    (finding,) = result.metadata["findings"]
    assert f"NOTE: {finding}." in str(result)
    result.save(tmp_path / "record.json")
    assert str(Evaluation.load(tmp_path / "record.json")) == str(result)


@pytest.mark.parametrize("build", FINE.values(), ids=FINE)
def test_other_networks_are_not_suspected(build):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = evaluate(build(), (X, Y), draws=2)
    assert result.metadata["findings"] == []
    assert "NOTE" not in str(result)


def test_buffers_that_move_in_eval_mode_are_warned_of_and_put_back_after_the_look():
    with pytest.warns(UserWarning, match=r"changes buffers of the model \(seen\)"):
        result = evaluate(Counts(), (X, Y), draws=2)
    assert "changes buffers" in str(result)


@pytest.mark.parametrize(
    ("count", "shown"), [(1, "a"), (3, "a, b, c"), (4, "a, b, c and 1 more"), (6, "a, b, c and 3 more")]
)
def test_three_names_are_shown_at_most(count, shown):
    assert _shown(list("abcdef")[:count]) == shown


@pytest.mark.parametrize("build", [DEPENDENT["no norm"], DEPENDENT["1d"]], ids=["no norm", "1d"])
def test_diagnose_and_certify_whose_claims_are_of_single_images_refuse_them(build):
    message = "changes with the other images of its batch"
    with pytest.raises(InputError, match=message):
        diagnose(build().eval(), (X, Y), limit=12)
    with pytest.raises(InputError, match=message):
        certify(build().eval(), (X, Y), sigma=0.2, n0=5, n=20, limit=2)
