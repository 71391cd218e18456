"""The target of a verb: where the model is, which images were seen, and what records of all verbs say alike."""

from __future__ import annotations

import contextlib
import types

import pytest
import torch
from torch import nn

from learn2perturb.certification import certify
from learn2perturb.diagnosis import diagnose
from learn2perturb.engine import execution
from learn2perturb.engine.identity import ImagesFingerprint, fingerprint_of_weights
from learn2perturb.engine.ranks import Ranks
from learn2perturb.errors import ConfigError, DataError
from learn2perturb.evaluation import EvaluateConfig, evaluate
from learn2perturb.evaluation.arrays import black_box
from learn2perturb.evaluation.target import Target
from tests.problems import Linear
from tests.test_configs import TINY

X, Y = torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1] * 4)


def hash_of_all() -> str:
    seen = ImagesFingerprint()
    seen.add(X, Y)
    return seen.hexdigest()


def test_the_body_runs_in_eval_mode_and_everything_is_put_back():
    model, other = nn.Sequential(nn.Flatten(), nn.Dropout()), nn.Dropout()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with torch.no_grad(), Target(model).judged(None, [other]):
        assert not (model.training or model[1].training or other.training)
        assert torch.is_grad_enabled()
        torch.rand(3)
    assert model.training and model[1].training and other.training
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("limit", [None, 5, 8, 20])
def test_batches_end_at_the_limit(limit):
    target = Target(Linear((1, 4, 4)))
    source = target.source((X, Y), batch_size=3, seed=0, limit=None)
    sizes = [len(x) for x, _ in target.batches(source, limit)]
    assert sum(sizes) == min(limit or 8, 8)
    assert max(sizes) == 3 and min(sizes) > 0


def test_all_images_are_those_that_were_seen():
    target = Target(Linear((1, 4, 4)))
    x, y = target.images(target.source((X, Y), batch_size=3, seed=0, limit=None))
    assert torch.equal(x, X) and torch.equal(y, Y)
    assert target.seen.hexdigest() == hash_of_all()
    assert target.classes(x) == 2

    class Nothing:
        def epoch(self, number: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
            return []

    with pytest.raises(DataError, match="no images"):
        target.images(Nothing())  # type: ignore[arg-type]


def test_what_cannot_be_called_or_is_elsewhere_is_refused():
    with pytest.raises(ConfigError, match="model is a int, must be callable: a network or a function"):
        Target(3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="the model is on cpu"):
        Target(Linear((1, 4, 4)), "meta")


@pytest.mark.parametrize("images", [True, False])
def test_processes_agree_on_the_settings_the_rows_the_weights_and_the_images(images, monkeypatch):
    asked: dict[str, str] = {}
    several = types.SimpleNamespace(alone=False, agree=asked.__setitem__)
    monkeypatch.setattr("learn2perturb.evaluation.target.current", lambda: several)
    target, config = Target(Linear((1, 4, 4))), EvaluateConfig(draws=7)
    target.seen.add(X, Y)
    target.check_alike(config, {"pgd": [3, "x"]}, images=images)
    expected = {name: repr(value) for name, value in config.to_dict().items()} | {"pgd": "[3, 'x']"}
    expected |= {"weights": fingerprint_of_weights(target.model)} | ({"images": hash_of_all()} if images else {})
    assert asked == expected and asked["draws"] == "7"


@pytest.mark.filterwarnings("ignore")  # a linear model of two images, of which much is said that is not asked here
def test_records_of_all_verbs_say_of_their_target_alike():
    model = Linear((1, 4, 4))
    settings = {"seed": 2, "name": "mine", "progress": None}
    records = [
        evaluate(model, (X, Y), **settings),
        certify(model, (X, Y), sigma=0.25, n=20, n0=5, **settings),
        diagnose(model, (X, Y), budget=TINY, eps=0.1, **settings),
    ]
    expected = Target(model, name="mine").metadata((X, Y), EvaluateConfig(), execution.PLAIN)
    alike = set(expected) - {"date", "config", "images"}
    for record in records:
        assert {key: record.metadata[key] for key in alike} == {key: expected[key] for key in alike}
        assert record.metadata["images"] == hash_of_all()
        assert record.metadata["weights"] == fingerprint_of_weights(model)
        assert record.metadata["config"]["seed"] == 2
        assert record.metadata["batch_size"] == record.metadata["config"]["batch_size"]


@pytest.mark.parametrize(("model", "ranks", "decide", "reason"), [
    (lambda x: x.flatten(1), Ranks(), True, "the model is a function"),
    (Linear((1, 4, 4)), Ranks(0, 2), True, "several processes share the work"),
    (Linear((1, 4, 4)), Ranks(), False, "draws of the model follow from what it has drawn before"),
    (Linear((1, 4, 4)), Ranks(), True, ""),
])  # fmt: skip
def test_what_is_not_kept_says_why(model, ranks, decide, reason, monkeypatch):
    asked = []
    monkeypatch.setattr("learn2perturb.evaluation.target.current", lambda: ranks)
    monkeypatch.setattr("learn2perturb.evaluation.target.seeds_decide", lambda *given: (asked.append(given), decide)[1])
    found = Target(model).unkept(torch.rand(20, 1, 4, 4), 3)
    assert found.startswith(reason) and bool(found) == bool(reason)
    assert [(len(x), seed) for _, x, seed in asked] == ([(8, 3)] if not reason or not decide else [])


def among(world: int, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = contextlib.nullcontext(Ranks(rank, world))
    monkeypatch.setattr("learn2perturb.evaluation.target.joined", lambda timeout: ranks)


@pytest.mark.parametrize(("world", "rank", "heard"), [(1, 0, True), (2, 0, True), (2, 1, False)])
def test_of_several_processes_the_first_tells_how_far_it_is(world, rank, heard, monkeypatch):
    among(world, rank, monkeypatch)
    told = []
    with Target(Linear((1, 4, 4))).judged(lambda *one: told.append(one)) as tell:
        tell(1, 2, "pgd")
    assert told == ([(1, 2, "pgd")] if heard else [])


@pytest.mark.parametrize("world", [1, 2])
def test_a_black_box_is_asked_by_one_process_alone(world, monkeypatch):
    among(world, 0, monkeypatch)
    target = Target(black_box(lambda images: images.reshape(len(images), -1)))
    with (
        pytest.raises(ConfigError, match="black box, and 2 processes would each count")
        if world > 1
        else contextlib.nullcontext(),
        target.judged(None),
    ):
        pass
