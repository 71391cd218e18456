from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from learn2perturb import __version__
from learn2perturb.attacks import PGD, Attack
from learn2perturb.data import load_data, make_source
from learn2perturb.engine import execution
from learn2perturb.errors import CheckpointError, ConfigError, InputError, Learn2PerturbError, UnknownNameError
from learn2perturb.evaluation import PREDICTORS, Evaluation, evaluate, rows, wilson
from learn2perturb.evaluation.result import POOLED_NOTE, format_eps
from learn2perturb.noise import is_stochastic, perturb


def coin(x: Tensor) -> Tensor:
    """Stochastic model with closed forms: class 0 with probability = the pixel, else class 1."""
    right = torch.rand(len(x)) < x.view(len(x))
    return torch.stack([right, ~right], dim=1).float() * 4


def lever(x: Tensor) -> Tensor:
    """Deterministic model: class 0 where the pixel is above 1/2."""
    return torch.stack([x.view(len(x)), torch.full((len(x),), 0.5)], dim=1)


def pixels(values: Any) -> tuple[Tensor, Tensor]:
    x = torch.as_tensor(values, dtype=torch.float32).view(-1, 1, 1, 1)
    return x, torch.zeros(len(x), dtype=torch.int64)


@dataclasses.dataclass(frozen=True)
class Darken(Attack):
    """The optimal attack on both models: one query, then eps less of the pixel."""

    def perturb(self, query: Any, x: Tensor, y: Tensor) -> Tensor:
        query.logits(x)
        return x - self.eps


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.norm(self.hidden(x.flatten(1)))))


def toy_data(n: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(n, 1, 2, 2, generator=generator), torch.randint(0, 3, (n,), generator=generator)


N, P = 3000, 0.7


def test_draws_have_the_closed_form_mean_std_vote_and_worst_of_n() -> None:
    row = evaluate(coin, pixels([P] * N), draws=100, batch_size=N).row("clean")
    one = math.sqrt(P * (1 - P) / N)
    assert row.accuracy == pytest.approx(P, abs=4 * one / 10)
    assert row.std == pytest.approx(one, rel=0.3)
    assert row.worst_of[1] == pytest.approx(row.accuracy)
    assert row.worst_of[10] == pytest.approx(P**10, abs=0.005)
    assert set(row.worst_of) == {1, 10, 100}
    vote = {score.predictor: score for score in row.pooled}
    assert vote["vote"].accuracy == pytest.approx(stats.binom.sf(49, 100, P), abs=0.001)
    assert vote["vote"].note == vote["mean_probability"].note == POOLED_NOTE
    assert row.interval.low <= P <= row.interval.high
    assert row.interval.method == "two-way"
    assert row.interval.high - row.interval.low == pytest.approx(2 * 1.96 * one / 10, rel=0.2)


@pytest.mark.parametrize(
    ("predictor", "members", "expected"),
    [
        ("vote", 5, stats.binom.sf(2, 5, P)),
        ("vote", 4, stats.binom.sf(1, 4, P)),  # a tie of 2 : 2 goes to class 0, the smaller index
        ("mean_probability", 5, stats.binom.sf(2, 5, P)),
        ("mean_logits", 5, stats.binom.sf(2, 5, P)),
    ],
)
def test_each_scoring_of_an_ensemble_is_made_of_members(predictor, members, expected) -> None:
    row = evaluate(coin, pixels([P] * N), draws=4, members=members, predictor=predictor).row(
        "clean", predictor=predictor
    )
    assert row.accuracy == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / N / 4))
    assert (row.members, row.draws, row.pooled) == (members, 4, ())


def test_predictors_are_separate_rows() -> None:
    result = evaluate(coin, pixels([P] * 50), {"dark": Darken(0.1)}, draws=3, members=3, predictor=list(PREDICTORS))
    assert [(row.predictor, row.attack) for row in result.rows] == [
        (p, a) for p in PREDICTORS for a in ("clean", "dark")
    ]
    for predictor, average in zip(PREDICTORS, ("loss", "probability", "probability", "logits"), strict=True):
        parameters = result.row("dark", predictor=predictor).parameters
        assert (parameters["eot"], parameters["eot_average"]) == (1 if predictor == "single" else 3, average)
        assert "seed" not in parameters
    with pytest.raises(ConfigError, match="rows match"):
        result.row("dark", noise=False)


def test_an_attack_that_averages_more_keeps_its_eot() -> None:
    result = evaluate(coin, pixels([P] * 5), {"dark": Darken(0.1, eot=20)}, draws=2, members=3, predictor="vote")
    assert result.row("dark", predictor="vote").parameters["eot"] == 20


def test_eps_list_follows_the_closed_form() -> None:
    sizes = [0.0, 4 / 255, 0.1, 0.5]
    result = evaluate(coin, pixels([P] * N), {"dark": Darken(0.3)}, eps=sizes, draws=20, batch_size=N)
    assert [row.eps for row in result.rows] == [None, *sizes]
    for size in sizes:
        row = result.row("dark", eps=size)
        assert row.accuracy == pytest.approx(P - size, abs=0.01)
        assert row.linf == pytest.approx(size, abs=1e-6)
        assert row.l2 == pytest.approx(size, abs=1e-6)
        assert row.forward_passes == (1 if size else 0)
    with pytest.raises(ConfigError, match="4 rows match"):
        result.row("dark")
    with pytest.raises(UnknownNameError, match="did you mean 'dark'"):
        result.row("drak")


def test_draws_that_few_images_show_are_draws() -> None:
    """A vote over many members hardly ever shows them; attacked without EOT, it would look too good."""

    def rarely(x: torch.Tensor) -> torch.Tensor:
        return lever(x) * (-1 if torch.rand(()) < 1e-6 else 1)

    result = evaluate(rarely, pixels([0.2, 0.55, 0.8, 0.9]), {"d": Darken(0.1, eot=9)}, draws=3)
    assert [(row.stochastic, row.draws) for row in result.rows] == [(True, 3), (True, 3)]
    assert result.row("d").parameters["eot"] == 9


def test_a_deterministic_model_is_scored_once() -> None:
    calls = []
    result = evaluate(
        lambda x: (calls.append(1), lever(x))[1], pixels([0.2, 0.55, 0.8, 0.9]), {"d": Darken(0.1, eot=9)}
    )
    clean, dark = result.row("clean"), result.row("d")
    assert (clean.accuracy, dark.accuracy) == (0.75, 0.5)
    assert (clean.draws, clean.std, clean.stochastic, clean.pooled) == (1, None, False, ())
    assert clean.worst_of == {1: 0.75, 10: 0.75, 100: 0.75}
    assert clean.interval == wilson(3, 4)
    assert dark.parameters["eot"] == 1
    # classes, eight probes and three batches of some images, probes, one that looks for draws, two that ask
    # whether seeds decide the draws, clean, attack, its verification, its score
    assert len(calls) == 1 + (8 + 3) + 8 + 1 + 2 + 1 + 1 + 1 + 1


def test_a_deterministic_model_has_the_same_row_for_every_predictor() -> None:
    result = evaluate(lever, pixels([0.2, 0.8]), predictor=["single", "vote"])
    assert dataclasses.replace(result.rows[1], predictor="single") == result.rows[0]


@pytest.mark.filterwarnings("ignore:.*is exactly zero at the first step")  # at every second image its ReLUs are off
def test_batch_size_changes_nothing_for_a_deterministic_model() -> None:
    model, data = Toy().eval(), toy_data(23)
    attacks = {"pgd": PGD(0.1, 0.03, 3, random_start=False)}
    whole = evaluate(model, data, attacks, batch_size=23)
    parts = evaluate(model, data, attacks, batch_size=5)
    assert [row.predictions for row in whole.rows] == [row.predictions for row in parts.rows]
    assert whole.row("pgd").linf == pytest.approx(parts.row("pgd").linf)
    assert whole.row("pgd").forward_passes == parts.row("pgd").forward_passes == 3


def test_scoring_never_uses_a_draw_of_the_attack() -> None:
    seen: list[float] = []
    of_attacks: set[int] = set()  # which of the passes

    @dataclasses.dataclass(frozen=True)
    class Watching(Attack):
        def perturb(self, query: Any, x: Tensor, y: Tensor) -> Tensor:
            start = len(seen)
            for _ in range(5):
                query.logits(x)
            of_attacks.update(range(start, len(seen)))
            return x

    def model(x: Tensor) -> Tensor:
        draw = torch.rand(len(x), dtype=torch.float64)
        seen.append(draw[0].item())
        return torch.stack([draw, 2 - draw], dim=1)

    evaluate(model, pixels([0.5] * 6), {"a": Watching(0.1), "b": Watching(0.1)}, eps=[0.1, 0.2], draws=5, batch_size=2)
    attack = [seen[number] for number in sorted(of_attacks)]
    scored = [draw for number, draw in enumerate(seen) if number not in of_attacks]
    assert len(attack) == len(set(attack)) == 2 * 2 * 3 * 5  # attacks, eps, batches, queries: none repeated
    assert not set(attack) & set(scored)
    assert len(set(scored)) >= len(scored) - 1  # the first probe is drawn twice, nothing else is
    assert len(scored) >= (1 + 4) * 3 * 5


def noisy_toy(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return perturb(Toy(), input_shape=(1, 2, 2), sites="norm", init=1.0)


def test_noise_off_row_is_the_plain_network_attacked_without_noise() -> None:
    model, data = noisy_toy(), toy_data()
    attacks = {"pgd": PGD(0.1, 0.03, 3, random_start=False, eot=4)}
    result = evaluate(model, data, attacks, draws=5)
    assert [(row.attack, row.noise) for row in result.rows] == [
        ("clean", True), ("pgd", True), ("clean", False), ("pgd", False),
    ]  # fmt: skip
    on, off = result.row("pgd"), result.row("pgd", noise=False)
    assert (on.draws, on.parameters["eot"], on.forward_passes) == (5, 4, 12)
    assert (off.draws, off.parameters["eot"], off.forward_passes, off.stochastic) == (1, 1, 3, False)
    torch.manual_seed(0)
    plain = evaluate(Toy(), data, attacks)
    assert off.predictions == plain.row("pgd").predictions
    assert result.row("clean", noise=False).predictions == plain.row("clean").predictions
    assert is_stochastic(model)
    assert len(evaluate(model, data, noise_off=False).rows) == 1


def test_noise_that_is_not_ours_is_found() -> None:
    class Dropping(Toy):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(nn.functional.dropout(x, 0.5, training=True))

    row = evaluate(Dropping(), toy_data(), draws=4).row("clean")
    assert (row.stochastic, row.draws) == (True, 4)


@pytest.mark.parametrize("fails", [False, True])
def test_eval_mode_always_and_the_callers_modes_and_stream_back(fails) -> None:
    model = noisy_toy()
    model.train()
    model.norm.eval()
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    during = []
    model.out.register_forward_hook(lambda module, args, output: during.append(model.training or model.norm.training))
    x, y = toy_data()
    before = torch.get_rng_state()
    if fails:
        with pytest.raises(InputError, match="label 7"):
            evaluate(model, (x, torch.where(torch.arange(24) == 20, 7, y)), {"pgd": PGD(0.1)}, draws=2, batch_size=10)
    else:
        evaluate(model, (x, y), {"pgd": PGD(0.1)}, draws=2, batch_size=10)
    assert during
    assert not any(during)
    assert [module.training for module in model.modules()] == modes
    assert is_stochastic(model)
    assert torch.equal(torch.get_rng_state(), before)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())


def timeless(result: Evaluation) -> tuple[Any, ...]:
    return tuple(dataclasses.replace(row, seconds=0.0) for row in result.rows)


def test_a_function_of_the_seed() -> None:
    model, data, attacks = noisy_toy(), toy_data(), {"pgd": PGD(0.2, 0.05, 2)}
    first = evaluate(model, data, attacks, seed=1, draws=6)
    torch.manual_seed(99)
    assert timeless(evaluate(model, data, attacks, seed=1, draws=6)) == timeless(first)
    assert timeless(evaluate(model, data, attacks, seed=2, draws=6)) != timeless(first)
    fewer = evaluate(model, data, attacks, seed=1, draws=3)
    np.testing.assert_array_equal(fewer.row("pgd").predictions.unpack(), first.row("pgd").predictions.unpack()[:3])


def test_record_round_trip_and_every_statistic_from_the_raw_predictions(tmp_path) -> None:
    result = evaluate(noisy_toy(), toy_data(), {"pgd": PGD(8 / 255)}, draws=12, predictor=["single", "vote"], members=3)
    path = result.save(tmp_path / "evaluation.json")
    loaded = Evaluation.load(path)
    assert loaded == result
    assert loaded.save(tmp_path / "again.json").read_bytes() == path.read_bytes()
    assert str(loaded) == str(result)
    spoiled = dataclasses.replace(
        loaded,
        rows=tuple(
            dataclasses.replace(
                row, accuracy=0.0, std=9.0, interval=wilson(0, 1), worst_of={},
                pooled=tuple(dataclasses.replace(score, accuracy=0.0) for score in row.pooled),
            )
            for row in loaded.rows
        ),
    )  # fmt: skip
    assert spoiled != result
    assert spoiled.recomputed() == result
    row, labels = loaded.row("pgd"), loaded.labels.unpack()
    assert row.accuracy == pytest.approx((row.predictions.unpack() == labels).mean())
    np.testing.assert_array_equal(row.correct.unpack(), row.predictions.unpack() == labels)
    assert {"model", "torch", "device", "hardware", "date"} <= result.metadata.keys()
    assert result.metadata["learn2perturb"] == __version__


def test_an_inconsistent_record_is_refused(tmp_path) -> None:
    path = evaluate(coin, pixels([P] * 30), draws=3).save(tmp_path / "e.json")
    payload = json.loads(path.read_text())
    other = evaluate(coin, pixels([P] * 30), draws=3, seed=1)
    payload["rows"][0]["predictions"]["data"] = other.rows[0].predictions.data
    del payload["checksum"]  # as records of before are, whose bits alone can tell
    path.write_text(json.dumps(payload))
    with pytest.raises(CheckpointError, match=r"e\.json is damaged: row 'clean'"):
        Evaluation.load(path)


def test_table() -> None:
    result = evaluate(noisy_toy(), toy_data(), {"pgd": PGD(8 / 255)}, draws=10, eps=[8 / 255, 0.031])
    lines = str(result).splitlines()
    assert lines[0].split("  ")[0] == "attack"
    columns = [lines[0].index(word) for word in ("accuracy %", "interval", "predictor")]
    assert all(line[column - 2 : column] == "  " for column in columns for line in lines[2:8])
    text = str(result)
    assert all(piece in text for piece in ("8/255", "0.031", " on ", " off ", "+-", POOLED_NOTE, "worst of 10"))
    assert "none" in str(evaluate(lever, pixels([0.2])))


@pytest.mark.parametrize(
    ("eps", "text"), [(8 / 255, "8/255"), (0.031, "0.031"), (1.0, "1"), (0.0, "0"), (0.5, "0.5"), (None, "")]
)
def test_format_eps(eps, text) -> None:
    assert format_eps(eps) == text


def test_limit_cuts_inside_a_batch_and_progress_ends_at_all() -> None:
    reports: list[tuple[int, int, str]] = []
    data = pixels(np.linspace(0, 1, 20))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), batch_size=8)
    for source in (data, loader, make_source(data, batch_size=8)):
        reports.clear()
        result = evaluate(
            lever, source, {"d": Darken(0.1)}, limit=11, batch_size=8, progress=lambda *r: reports.append(r)
        )
        assert [row.n for row in result.rows] == [11, 11]
        side_by_side = source is loader  # else the rows follow each other
        assert [report[0] for report in reports] == ([8, 16, 19, 22] if side_by_side else [8, 11, 19, 22])
        assert {report[1] for report in reports} == {22}


def test_the_digits_run_through_as_image_data() -> None:
    data = load_data("digits", "test", limit=40)
    shape = data.input_shape
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 10))
    assert evaluate(model, data).row("clean").n == 40


GOOD = pixels([0.2, 0.8])
BAD: list[tuple[str, type[Exception], str, dict[str, Any]]] = [
    ("draws 0", ConfigError, "draws must be .* got 0", {"draws": 0}),
    ("draws a float", ConfigError, "draws must be .* got 2.5", {"draws": 2.5}),
    ("draws True", ConfigError, "draws must be .* got True", {"draws": True}),
    ("members 0", ConfigError, "members must be .* got 0", {"members": 0}),
    ("batch size 0", ConfigError, "batch_size must be .* got 0", {"batch_size": 0}),
    ("limit 0", ConfigError, "limit must be .* got 0", {"limit": 0}),
    ("seed a text", ConfigError, "seed is 'x'", {"seed": "x"}),
    ("predictor", UnknownNameError, "mean_probability, single, vote", {"predictor": "votes"}),
    ("a predictor of the list", UnknownNameError, "'nope'", {"predictor": ["single", "nope"]}),
    ("no predictor", ConfigError, "empty list", {"predictor": []}),
    ("attacks a list", ConfigError, "must map names", {"attacks": [PGD()]}),
    ("attack a class", ConfigError, "the class PGD", {"attacks": {"pgd": PGD}}),
    ("attack a text", ConfigError, "a str", {"attacks": {"pgd": "pgd"}}),
    ("attack named clean", ConfigError, "rename", {"attacks": {"clean": PGD()}}),
    ("targeted", ConfigError, "targeted", {"attacks": {"pgd": PGD(targeted=True)}}),
    ("eps 8", ConfigError, "8/255, not 8", {"attacks": {"pgd": PGD()}, "eps": 8}),
    ("eps text", ConfigError, "without quotes", {"attacks": {"pgd": PGD()}, "eps": "8/255"}),
    ("eps empty", ConfigError, "empty list", {"attacks": {"pgd": PGD()}, "eps": []}),
    ("device", ConfigError, "device is 'gpu'", {"device": "gpu"}),
    ("device other", ConfigError, "move it first", {"model": Toy(), "device": "meta", "data": toy_data()}),
    ("model no callable", ConfigError, "must be callable", {"model": 3}),
    (
        "no images",
        Learn2PerturbError,
        "none of the sizes 0",
        {"data": (torch.empty(0, 1, 1, 1), torch.empty(0, dtype=torch.int64))},
    ),
    ("data a number", Learn2PerturbError, "cannot read batches from a int", {"data": 3}),
    ("label beyond", InputError, "label 2 is outside 0..1", {"data": (GOOD[0], torch.tensor([0, 2]))}),
    ("NaN", InputError, "NaN", {"model": lambda x: lever(x) * float("nan")}),
    ("infinite", InputError, "infinite", {"model": lambda x: lever(x) / 0}),
    ("tuple", InputError, r"got a tuple.*\[0\]", {"model": lambda x: (lever(x), 1)}),
    ("one output", InputError, "classes >= 2", {"model": lambda x: lever(x)[:, :1]}),
    ("wrong rows", InputError, r"here \(2, classes >= 2\), got \(1, 2\)", {"model": lambda x: lever(x)[:1]}),
    ("classes", InputError, "before argmax", {"model": lambda x: (lever(x) > 0.5).long()}),
]


@pytest.mark.parametrize(("error", "match", "change"), [pytest.param(*case[1:], id=case[0]) for case in BAD])
def test_bad_input_is_one_clear_line(error, match, change) -> None:
    with pytest.raises(error, match=match) as caught:
        evaluate(**{"model": lever, "data": GOOD, "attacks": {}} | change)
    assert "\n" not in str(caught.value)


def test_probabilities_are_warned_of_once() -> None:
    with pytest.warns(UserWarning, match="logits are expected") as caught:
        evaluate(lambda x: lever(x).softmax(dim=1), pixels([0.2] * 9), {"d": Darken(0.1)}, batch_size=2)
    assert len(caught) == 1


def test_replayed_noise_is_warned_of() -> None:
    from learn2perturb.noise import fixed_noise

    model = noisy_toy()
    with fixed_noise(model, 3), pytest.warns(UserWarning, match="fixed draw"):
        evaluate(model, toy_data())


def test_only_long_attacks_on_noise_are_crafted_compiled():
    def rows_of(attack, images: int, *, stochastic: bool = True) -> int:
        run = rows.RowRun(
            "pgd", attack, noise=True, switched=False, stochastic=stochastic, predictors=("single",), draws=2,
            members=1, seed=0, mode=execution.FAST,
        )  # fmt: skip
        run.compile_if_long(images * 32 * 32, rows=250)
        return run.mode.compiled_rows

    assert rows_of(PGD(steps=20, eot=20), 1000) == 250
    assert rows_of(PGD(steps=20), 1000) == 0
    assert rows_of(PGD(steps=20, eot=20), 1000, stochastic=False) == 0
