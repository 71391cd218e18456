"""The rows of an evaluation, field by field, and the settings of ``evaluate`` at their edges."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import types
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from learn2perturb.attacks import FAB, FGSM, PGD, Attack, FewPixel, Square
from learn2perturb.data import ImageData
from learn2perturb.engine import execution
from learn2perturb.engine.ranks import Ranks
from learn2perturb.errors import ConfigError, UnknownNameError
from learn2perturb.evaluation import EvaluateConfig, evaluate, evaluating, rows
from learn2perturb.evaluation.evaluating import _pixels
from learn2perturb.evaluation.image_keeper import Kept
from learn2perturb.evaluation.margins import Margins
from learn2perturb.evaluation.rows import RowRun, _Batch
from learn2perturb.noise import perturb

X = torch.rand(40, 1, 2, 2, generator=torch.Generator().manual_seed(0))
Y = torch.arange(40) % 2


def plain(x: Tensor) -> Tensor:
    score = x.flatten(1).mean(dim=1, keepdim=True)
    return torch.cat([3 * score, 1.5 + 0 * score], dim=1)


@dataclasses.dataclass(frozen=True)
class Shift(Attack):
    """Moves every pixel by eps and says so."""

    def perturb(self, query: Any, x: Tensor, y: Tensor) -> Tensor:
        query.logits(x)
        return x + self.eps


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))


def noisy() -> nn.Module:
    torch.manual_seed(0)
    return perturb(Net().eval(), input_shape=(1, 2, 2), sites="fc", init=0.5)


def test_the_fields_of_clean_and_attacked_rows():
    clean, attacked = evaluate(plain, (X * 0.5, Y), {"shift": Shift(0.1)}, batch_size=15).rows
    assert (clean.attack, clean.attack_type, clean.parameters, clean.eps) == ("clean", None, {}, None)
    assert (clean.linf, clean.l2, clean.forward_passes, clean.backward_passes, clean.seconds) == (0, 0, 0, 0, 0)
    assert clean.zero_gradients is None
    assert (attacked.attack, attacked.attack_type, attacked.eps) == ("shift", "Shift", 0.1)
    assert attacked.linf == pytest.approx(0.1, abs=1e-6)
    assert attacked.l2 == pytest.approx(0.2, abs=1e-6)  # of four pixels
    assert (attacked.forward_passes, attacked.backward_passes) == (1, 0)
    assert 0 < attacked.seconds < 60
    for row in (clean, attacked):
        assert (row.noise, row.stochastic, row.predictor, row.members, row.draws, row.n) == (
            True, False, "single", 1, 1, 40,
        )  # fmt: skip


def test_one_draw_has_one_member_whatever_is_asked_for_ensembles():
    found = evaluate(noisy(), (X, Y), draws=3, members=5, predictor=["single", "vote"])
    assert [(row.predictor, row.noise, row.members, row.draws) for row in found.rows] == [
        ("single", True, 1, 3), ("vote", True, 5, 3), ("single", False, 1, 1),
    ]  # fmt: skip


def test_noise_is_on_but_for_the_rows_that_say_so():
    found = evaluate(noisy(), (X, Y), draws=20)
    on, off = found.rows
    assert (on.noise, on.stochastic, off.noise, off.stochastic) == (True, True, False, False)
    assert on.std > 0
    assert off.std is None
    assert [score.predictor for score in on.pooled] == ["vote", "mean_probability"]
    once = evaluate(noisy(), (X, Y), draws=1).rows[0]
    assert (once.std, once.pooled) == (None, ())
    assert [score.members for score in evaluate(noisy(), (X, Y), draws=2).rows[0].pooled] == [2, 2]


@pytest.mark.parametrize(("zero", "warned"), [(1, False), (2, True), (40, True)])
def test_zero_gradients_are_told_from_a_twentieth_of_the_images_on(zero, warned):
    def flat(x: Tensor) -> Tensor:
        """No gradient where the first pixel is 0."""
        return plain(x * x[:, :, :1, :1].detach().sign())

    x = X.clamp_min(0.01)
    x[:zero, 0, 0, 0] = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        row = evaluate(flat, (x, Y), {"fgsm": FGSM(0.001)}, batch_size=15).row("fgsm")
    assert row.zero_gradients == zero
    assert any("is exactly zero at the first step" in str(one.message) for one in caught) is warned


def test_a_list_of_sizes_is_for_attacks_that_have_one():
    attacks = {"pgd": PGD(0.3, 0.1, 1)}
    found = evaluate(plain, (X, Y), attacks, eps=[0.1, 0.2, 0.1])
    assert [row.eps for row in found.rows] == [None, 0.1, 0.2]  # each once
    assert [row.eps for row in evaluate(plain, (X, Y), attacks, eps=0.2).rows] == [None, 0.2]
    assert [row.eps for row in evaluate(plain, (X, Y), attacks).rows] == [None, 0.3]


@pytest.mark.parametrize(
    ("settings", "error", "reason"),
    [
        ({"attacks": [PGD()]}, ConfigError, "attacks is a list, must map names to attacks"),
        ({"attacks": {"pgd": PGD}}, ConfigError, "attack 'pgd' is the class PGD, must be an Attack"),
        ({"attacks": {"pgd": 3}}, ConfigError, "attack 'pgd' is a int, must be an Attack"),
        ({"attacks": {"": PGD()}}, ConfigError, "an attack is named ''"),
        ({"attacks": {"clean": PGD()}}, ConfigError, "an attack is named 'clean'"),
        ({"attacks": {3: PGD()}}, ConfigError, "an attack is named 3"),
        ({"attacks": {"pgd": PGD(targeted=True)}}, ConfigError, "attack 'pgd' is targeted"),
        ({"attacks": {"pgd": PGD()}, "eps": []}, ConfigError, "eps is an empty list"),
        ({"attacks": {"pgd": PGD()}, "eps": object()}, ConfigError, "eps is a object, must be a number or a list"),
        (
            {"attacks": {"a": PGD(), "b": PGD(0.5, norm="l2")}, "eps": 0.1},
            ConfigError,
            "eps would be the radius of attacks of norms l2 and linf",
        ),
        ({"predictor": 3}, ConfigError, "predictor is 3, must be one or more of single, vote"),
        ({"predictor": []}, ConfigError, "predictor is an empty list"),
        ({"predictor": "voted"}, UnknownNameError, "did you mean 'vote'"),
        ({"seed": -1}, ConfigError, "seed is -1, must be a whole number >= 0"),
        ({"seed": True}, ConfigError, "seed is True"),
        ({"seed": 1.0}, ConfigError, "seed is 1.0"),
        ({"limit": 0}, ConfigError, "limit"),
        ({"draws": 0}, ConfigError, "draws"),
        ({"members": 0}, ConfigError, "members"),
        ({"batch_size": 0}, ConfigError, "batch_size"),
    ],
)
def test_settings_that_are_refused(settings, error, reason):
    with pytest.raises(error, match=reason):
        evaluate(plain, (X, Y), **settings)


def test_settings_at_their_least():
    found = evaluate(plain, (X, Y), seed=0, limit=1, draws=1, members=1, batch_size=1)
    assert (found.seed, found.rows[0].n, found.metadata["limit"], found.metadata["batch_size"]) == (0, 1, 1, 1)
    assert (found.confidence, found.resamples, found.num_classes) == (0.95, 0, 2)
    twice = evaluate(plain, (X, Y), predictor=["vote", "single", "vote"])
    assert [row.predictor for row in twice.rows] == ["vote", "single"]


def run_of(attack, predictor="single", *, stochastic=True):
    return RowRun(
        "row", attack, noise=True, switched=False, stochastic=stochastic, predictors=(predictor,), draws=3, members=5,
        seed=0, mode=execution.PLAIN,
    )  # fmt: skip


@pytest.mark.parametrize(("attack", "predictor", "stochastic", "queries", "passes"), [
    (None, "single", False, 1, 1), (None, "single", True, 3, 3), (None, "vote", True, 15, 15),
    (PGD(0.1, 0.05, 4, eot=2), "single", True, 3 + 8, 3 + 3 * 8),  # forward and back: about three forward passes
    (PGD(0.1, 0.05, 4), "single", False, 1 + 4, 1 + 3 * 4),
    (Square(0.1, queries=20), "single", False, 1 + 20, 1 + 20),  # forward only
    (Square(0.1, queries=20, eot=5), "vote", True, 15 + 100, 15 + 100),
])  # fmt: skip
def test_what_a_row_takes(attack, predictor, stochastic, queries, passes):
    run = run_of(attack, predictor, stochastic=stochastic)
    assert run.queries(10) == queries
    assert run.seconds_each(10, 0.5) == pytest.approx(0.5 * passes)


@pytest.mark.parametrize("attack", [PGD(0.1, 0.05, 4), FAB(0.1, steps=4)])  # the second one in full precision
@pytest.mark.parametrize("mode", [execution.PLAIN, execution.FAST, execution.FAST32, execution.CUDA])
def test_an_attack_is_expected_to_take_the_time_of_its_mode(mode, attack):
    """Scoring is plain whatever the attack is made in. Of one in fast mode thirteen minutes were said for three."""
    run = run_of(attack, "single", stochastic=True)
    plain = run.seconds_each(10, 0.5)
    run.mode = mode
    scored = 3 * 0.5
    pace = execution.guessed_pace(execution.FAST32 if attack.full_precision and mode.dtype is not None else mode)
    assert run.seconds_each(10, 0.5) - scored == pytest.approx(pace * (plain - scored))
    assert (execution.guessed_pace(mode) == 1) == (mode is execution.PLAIN)


@pytest.mark.parametrize(("stochastic", "attack", "passes"), [
    (True, PGD(0.1, 0.05, 4, eot=2, restarts=3), 24), (True, FGSM(0.1, eot=5), 5), (False, PGD(0.1, 0.05, 4), None),
])  # fmt: skip
def test_long_attacks_on_a_random_model_are_compiled(stochastic, attack, passes, monkeypatch):
    asked = []
    monkeypatch.setattr(execution, "with_compiled_attack", lambda *words: (asked.append(words), words[0])[1])
    run_of(attack, stochastic=stochastic).compile_if_long(100, rows=7)
    assert asked == ([] if passes is None else [(execution.PLAIN, 100 * passes, 7)])


@dataclasses.dataclass(frozen=True)
class Greedy(Attack):
    """Asks about a batch once for each of its images, half of the time for a gradient."""

    def perturb(self, query: Any, x: Tensor, y: Tensor) -> Tensor:
        for _ in x:
            query.logits(x)
            query.gradient(x, y)
        return x


def test_passes_of_a_row_are_means_over_all_images_of_batches_of_unlike_sizes():
    row = evaluate(plain, (X, Y), {"greedy": Greedy(0.1)}, batch_size=15).row("greedy")
    each = (15 * 15 + 15 * 15 + 10 * 10) / 40
    assert row.backward_passes == pytest.approx(each)
    assert row.forward_passes == pytest.approx(2 * each)


def test_the_pooled_mean_probability_is_of_all_draws():
    """Of three draws that answer 1, 1 and 0, or 1, 0 and 0: whichever draw comes last decides nothing."""

    class Turns(nn.Module):
        turn = 0

        def forward(self, x: Tensor) -> Tensor:
            first = x.flatten(1)[:, :1] * 0 + 1
            right = (1.0, 1.0, -1.5, 1.0, -1.0, -1.5)[Turns.turn % 6]
            Turns.turn += 1
            return torch.cat([first * right, 0 * first], dim=1)

    run = run_of(None)
    x, y = X[:4], torch.tensor([0, 1, 0, 1])
    for expected in (0, 1):
        run.add(Turns().eval(), x, y, expected, lambda share: None)
        assert run.batches[expected].pooled.tolist() == [expected] * 4
    assert [row.pooled[1].accuracy for row in run.rows(np.concatenate([y.numpy()] * 2), 2, (4, 4))] == [0.5]


@pytest.mark.parametrize("full", [True, False])
def test_what_another_process_has_of_a_batch_arrives_as_it_was(full):
    batch = _Batch(np.array([[0, 1], [1, 1]]), np.array([1, 1]), {"linf": 0.5, "seconds": 2.0})
    if full:
        batch.kept = Kept(np.array([1]), np.float32([[[[0.1]]]]))
        batch.margins = Margins.of(np.array([0.5, -0.25]), np.array([True, False]))
    found = _Batch.of(**json.loads(json.dumps(batch.plain())))
    assert found.predictions.tolist() == batch.predictions.tolist() and found.pooled.tolist() == [1, 1]
    assert (found.sums, found.margins) == (batch.sums, batch.margins)
    assert found.predictions.dtype == found.pooled.dtype == np.int64
    assert (found.kept is None) == (not full)
    if full:
        assert (found.kept.index == batch.kept.index).all() and (found.kept.images == batch.kept.images).all()
        assert found.kept.images.dtype == np.float32


@pytest.mark.parametrize("several", [True, False])
def test_batches_of_other_processes_are_taken_in_where_there_are_others(several, monkeypatch):
    run, theirs = run_of(None), _Batch(np.array([[2, 3]]), np.array([4]), {"linf": 0.25})
    run.batches[0] = _Batch(np.array([[0, 1]]), np.array([1]))
    asked = []

    def gathered(self, own: bytes) -> list[bytes]:
        asked.append(json.loads(own))
        return [own, json.dumps({"1": theirs.plain()}).encode()]

    monkeypatch.setattr(Ranks, "gathered", gathered)
    run.meet(Ranks(0, 2) if several else Ranks())
    assert [list(one) for one in asked] == ([["0"]] if several else [])
    assert {number: one.predictions.tolist() for number, one in run.batches.items()} == (
        {0: [[0, 1]], 1: [[2, 3]]} if several else {0: [[0, 1]]}
    )


def test_the_margins_of_a_row_are_of_every_scoring_of_every_image():
    row = evaluate(plain, (X, Y), batch_size=15).rows[0]
    assert row.margins is not None
    assert (sum(row.margins.right), sum(row.margins.wrong)) == (round(40 * row.accuracy), 40 - round(40 * row.accuracy))


def test_images_of_another_process_are_numbers_never_objects():
    held = np.array([{}], dtype=object)
    with pytest.raises(ValueError, match="pickle"):
        Kept(held, held).plain()
    content = io.BytesIO()
    np.save(content, held, allow_pickle=True)
    text = base64.b64encode(content.getvalue()).decode()
    with pytest.raises(ValueError, match="pickle"):
        Kept.of(text, text)


def test_two_configs_are_one_too_many():
    with pytest.raises(ConfigError, match="two configs are given"):
        evaluate(plain, (X, Y), EvaluateConfig(), config=EvaluateConfig())
    assert evaluate(plain, (X, Y), EvaluateConfig(limit=3)).rows[0].n == 3


@pytest.mark.parametrize(("shape", "attack", "pixels"), [
    ((3, 4, 5), PGD(0.1, 0.05, 4), 40 * 4 * 20), ((3, 4, 5), None, 0), (None, PGD(0.1, 0.05, 4), math.inf),
    (None, None, 0.0),
])  # fmt: skip
def test_the_pixels_that_attacks_see(shape, attack, pixels):
    """A loader of unknown images counts as long where there is an attack."""
    source = types.SimpleNamespace(input_shape=shape, num_examples=40)
    table = [("clean", None), *([] if attack is None else [("pgd", attack)])]
    assert _pixels(source, table, EvaluateConfig()) == pixels


def test_a_list_of_sizes_gives_an_attack_that_has_none_one_row():
    few = FewPixel(2, population=8, generations=1)
    found = evaluate(plain, (X[:2], Y[:2]), {"few": few, "fgsm": FGSM(0.3)}, eps=[0.1, 0.2])
    assert [(row.attack, row.eps) for row in found.rows] == [
        ("clean", None), ("few", few.eps), ("fgsm", 0.1), ("fgsm", 0.2),
    ]  # fmt: skip


@pytest.mark.parametrize(("limit", "images"), [(None, 40), (10, 10), (100, 40)])
def test_progress_counts_the_images_that_are_asked_for(limit, images):
    loader = DataLoader(TensorDataset(X, Y), batch_size=5)
    told: list[tuple[float, float, str]] = []
    evaluate(plain, loader, {"fgsm": FGSM(0.1)}, limit=limit, progress=lambda *one: told.append(one))
    assert {total for _, total, _ in told} == {2 * images}
    assert told[-1][0] == 2 * images and [done for done, *_ in told] == sorted(done for done, *_ in told)


@pytest.mark.parametrize("times", [(100.0, 130.0, 200.0, 224.0), (100.0, 112.0, 200.0, 290.0)])
def test_the_guess_of_the_seconds_is_from_one_pass_of_the_first_batch(times, monkeypatch):
    """Twelve seconds for a batch of ten: 1.2 for each of 40 images, and three times as long forward and back.

    The first pass of all is slow; it is the two after it that take twelve each, unless they are slower.
    """
    clock = iter(times)
    monkeypatch.setattr(evaluating, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    told: list[dict[str, float]] = []
    monkeypatch.setattr(evaluating, "tell_seconds", lambda _, seconds, **more: told.append(seconds))
    evaluate(plain, (X, Y), {"fgsm": FGSM(0.1)}, batch_size=10)
    assert told == [{"clean, single": pytest.approx(48.0), "fgsm eps 0.1, single": pytest.approx(48.0 + 3 * 48.0)}]


@pytest.mark.parametrize("switched", [True, False])
def test_the_noise_is_switched_off_in_rows_without_and_stays_on_in_others(switched):
    model, seen = noisy(), []
    model.register_forward_hook(lambda *_: seen.append(model.fc.perturbation.enabled))
    run = RowRun(
        "row", FGSM(0.1), noise=not switched, switched=switched, stochastic=not switched, predictors=("single",),
        draws=1, members=1, seed=0, mode=execution.PLAIN,
    )  # fmt: skip
    run.add(model, X[:2], Y[:2], 0, lambda share: None)
    assert seen and set(seen) == {not switched}
    assert model.fc.perturbation.enabled


@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_that_share_the_batches_find_what_one_finds(rank, monkeypatch):
    model, attacks, settings = Net().eval(), {"fgsm": FGSM(0.1)}, {"batch_size": 6, "progress": None}
    every: list[dict[str, Any]] = []  # what one process finds of each batch, row by row

    def alone(self: RowRun, ranks: Ranks) -> None:
        every.append({str(number): one.plain() for number, one in self.batches.items()})

    with monkeypatch.context() as patched:
        patched.setattr(RowRun, "meet", alone)
        whole = evaluate(model, (X, Y), attacks, **settings)
    attacked = []

    def gathered(self: Ranks, own: bytes) -> list[bytes]:
        theirs = {number: one for number, one in every[len(attacked)].items() if int(number) % 2 != rank}
        attacked.append(list(json.loads(own)))
        return [own, json.dumps(theirs).encode()]

    monkeypatch.setattr(evaluating, "current", lambda: Ranks(rank, 2))
    monkeypatch.setattr(Ranks, "gathered", gathered)
    found = evaluate(model, (X, Y), attacks, **settings)
    assert attacked == [[str(number) for number in range(rank, 7, 2)]] * 2
    assert [row.predictions for row in found.rows] == [row.predictions for row in whole.rows]
    assert [row.linf for row in found.rows] == [row.linf for row in whole.rows]


def test_what_is_worth_a_compiler_is_counted_in_pixels_of_all_images(monkeypatch):
    asked = []
    monkeypatch.setattr(RowRun, "compile_if_long", lambda self, pixels, rows: asked.append((pixels, rows)))
    x = torch.rand(20, 3, 2, 5)
    evaluate(lambda images: images.flatten(1)[:, :2], (x, Y[:20]), batch_size=8, clean=True)
    assert asked == [(20 * 2 * 5, 8)]


def test_the_numbers_of_a_row_are_its_attacks_settings_but_no_text_and_no_object():
    found = run_of(PGD(0.1, 0.05, 4, random_start=False), stochastic=False).numbers
    assert (found["eps"], found["step_size"], found["steps"], found["random_start"]) == (0.1, 0.05, 4, False)
    assert not {"norm", "loss", "seed"} & set(found)
    assert run_of(None).numbers == {}


@pytest.mark.parametrize(("attack", "size"), [(None, ""), (FGSM(0.1), "0.1"), (FGSM(0.25), "0.25")])
def test_every_scoring_of_every_batch_and_size_has_a_stream_of_its_own(attack, size, monkeypatch):
    asked = []
    monkeypatch.setattr(rows, "seed_everything", lambda *purpose: asked.append(purpose))
    run_of(attack).add(plain, X[:2], Y[:2], 7, lambda share: None)
    assert asked == [(0, "score", "row", size, 7, draw) for draw in range(3)]


@pytest.mark.parametrize(("names", "told"), [(("a", "b"), ["a", "b"]), (("a", "b", "c"), None)])
def test_classes_are_named_where_there_are_as_many_names(names, told):
    pixels = (255 * X).to(torch.uint8)
    data = ImageData("mine", pixels, Y, names, False, 0, (0.5,), (0.25,))
    assert evaluate(plain, data).metadata["classes"] == told
    assert evaluate(plain, (X, Y)).metadata["classes"] is None


def test_rows_of_a_model_without_noise_are_attack_by_attack_and_computed_once(monkeypatch):
    added, real = [], RowRun.add
    monkeypatch.setattr(RowRun, "add", lambda self, *given: (added.append(self.name), real(self, *given))[1])
    found = evaluate(plain, (X, Y), {"fgsm": FGSM(0.1)}, predictor=["single", "vote"])
    assert [(row.attack, row.predictor) for row in found.rows] == [
        ("clean", "single"), ("clean", "vote"), ("fgsm", "single"), ("fgsm", "vote"),
    ]  # fmt: skip
    assert added == ["clean", "fgsm"]
