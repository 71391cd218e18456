"""Progress inside a row: an attack of minutes shows how far it is, with an estimate, at no cost."""

from __future__ import annotations

import dataclasses
import time
import types

import pytest
import torch

from learn2perturb import load_data
from learn2perturb.attacks import (
    APGD,
    BPDA,
    CW,
    FAB,
    FGSM,
    PGD,
    SPSA,
    AutoAttack,
    FewPixel,
    RayS,
    Square,
    Surrogate,
    Transfer,
)
from learn2perturb.attacks.listening import passes_told_to
from learn2perturb.evaluation import evaluate, pace
from learn2perturb.progress import Reporter
from tests.problems import Linear

DATA = load_data("digits", "test", limit=20)


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()


ATTACKS = {
    "fgsm": FGSM(0.1),
    "pgd": PGD(0.1, 0.05, 4, restarts=2),
    "apgd": APGD(0.1, 5),
    "fab": FAB(0.1, steps=3),
    "square": Square(0.1, queries=10),
    "cw": CW(steps=3, search_steps=2),
    "few_pixel": FewPixel(1, population=4, generations=2),
    "autoattack": AutoAttack(0.1, steps=3, targets=2, queries=4),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_tells_how_far_it_is_and_ends_at_all(name, monkeypatch):
    monkeypatch.setattr(pace, "_INTERVAL", 0.0)
    reports: list[tuple[float, float, str]] = []
    evaluate(network(), DATA, {name: ATTACKS[name]}, batch_size=10, progress=lambda *told: reports.append(told))
    done = [report[0] for report in reports]
    assert done == sorted(done)
    assert done[-1] == 40
    assert {total for _, total, _ in reports} == {40}
    for start in (20, 30):  # in the row of the attack, its two batches
        assert any(start < at < start + 10 for at in done)


PGD_8 = PGD(1e-4, 5e-5, 4, restarts=2)
GUESSED = {
    "pgd": PGD_8,
    "apgd": APGD(1e-4, 40),
    "fab": FAB(1e-4, steps=10),
    "square": Square(1e-4, queries=100),
    "spsa": SPSA(1e-4, steps=5, directions=8),
    "surrogate": Surrogate(1e-4, queries=100),
    "cw": CW(steps=20, search_steps=2, abort_early=False),
    "few_pixel": FewPixel(1, population=8, generations=5),
    "bpda": BPDA(attack=PGD_8, modules="0"),
    "bpda of averages": BPDA(attack=PGD(1e-4, 5e-5, 4, eot=2), modules="0"),
    "transfer": Transfer(attack=PGD_8, source=network()),
}


@pytest.mark.parametrize("name", GUESSED)
def test_the_guess_is_about_what_the_attack_takes(name):
    """Of images that nothing fools, so that none leaves: what an attack takes at most."""
    model = torch.nn.Sequential(torch.nn.Identity(), network()).eval()
    x = DATA.images.float() / 255
    with torch.no_grad():
        result = GUESSED[name].run(model, x, model(x).argmax(dim=1))
    assert 0.4 < pace.guessed_passes(GUESSED[name], len(x)) / result.forward_passes < 1.6


def test_the_second_batch_is_expected_to_take_what_the_first_took(monkeypatch):
    monkeypatch.setattr(pace, "_INTERVAL", 0.0)
    monkeypatch.setattr(pace, "guessed_passes", lambda attack, images, stochastic: 1000.0)
    reports: list[float] = []
    attack = Square(0.001, queries=20)  # too small to break anything, so that no image leaves
    evaluate(network(), DATA, {"square": attack}, batch_size=10, progress=lambda done, *_: reports.append(done))
    inside = [done for done in reports if done % 10]
    assert max(done for done in inside if done < 30) < 22
    assert max(inside) > 39


def test_reports_are_rare(monkeypatch):
    reports: list[float] = []
    evaluate(
        network(), DATA, {"pgd": PGD(0.1, 0.001, 100)}, batch_size=20, progress=lambda done, *_: reports.append(done)
    )
    assert len(reports) < 10


def test_numbers_are_what_they_are_without_a_listener():
    quiet, loud = (evaluate(network(), DATA, ATTACKS, progress=told) for told in (None, lambda *_: None))
    assert [row.predictions for row in quiet.rows] == [row.predictions for row in loud.rows]


def test_plain_lines_are_rare_and_have_an_estimate(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Reporter() as reporter:
        for second in range(95):
            now[0] = 100.0 + second
            reporter(20 + second / 10, 200, "pgd")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "pgd: 23/200, 0.1 a second, about 29 min left",
        "pgd: 26/200, 0.1 a second, about 29 min left",
        "pgd: 29/200, 0.1 a second, about 28 min left",
    ]


def test_hours_are_said_as_hours_and_what_is_counted_too(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Reporter() as reporter:
        reporter.unit = " passes"
        for second in range(35):
            now[0] = 100.0 + second
            reporter(second, 20_000, "check 8")
    assert capsys.readouterr().err == "check 8: 31/20000 passes, 1 a second, about 5.5 h left\n"


@pytest.mark.parametrize(("steps", "said"), [(2, False), (500_000, True)])
def test_how_long_it_takes_is_said_before_it_starts(steps, said, capsys, monkeypatch):
    """C&W and few pixels at a paper's budget take hours: a user hears of it before the first row."""
    from learn2perturb.evaluation import rows

    monkeypatch.setattr(rows.RowRun, "add", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    data = torch.rand(12, 1, 2, 2), torch.arange(12) % 2
    with pytest.raises(KeyboardInterrupt):
        evaluate(Linear((1, 2, 2)), data, {"cw": CW(steps=steps, search_steps=9)}, progress=True)
    printed = capsys.readouterr().err
    assert ("a guess from one pass of the network" in printed and "cw" in printed) == said


@pytest.mark.parametrize(("seconds", "said"), [
    ({"pgd": 59.0}, None),
    ({"pgd": 120.0}, "about 2.0 min for 1 rows: a guess from one pass of the network"),
    ({"fgsm": 30.0, "cw": 150.0, "pgd": 60.0},
     "about 4.0 min for 3 rows, cw alone 2.5 min: a guess from one pass of the network"),
])  # fmt: skip
def test_the_longest_row_is_named_where_there_are_several(seconds, said):
    told: list[str] = []

    class Listening(Reporter):
        def line(self, text):
            told.append(text)

    pace.tell_seconds(Listening(), seconds)
    assert told == ([] if said is None else [said])
    pace.tell_seconds(lambda *_: None, seconds)


def test_where_images_leave_the_longest_row_it_is_up_to_so_long():
    seconds = {"pgd": 60.0, "aa": 180.0}
    text = " for 2 rows, aa alone 3.0 min: a guess from one pass of the network"
    assert pace.said_of(seconds, "rows", early=["pgd"]) == f"about 4.0 min{text}"
    early = "; images that are broken leave early, so it may be far less"
    assert pace.said_of(seconds, "rows", early=["aa"]) == f"up to 4.0 min{text}{early}"


def test_each_part_of_an_attack_counts_by_what_it_asks_for():
    attack = AutoAttack(0.1, steps=3, targets=2, queries=4)
    assert pace.guessed_seconds(attack, 7, forward=1.0, both=10.0) == 10 * (3 + 6 + 6) + 4
    assert pace.guessed_seconds(BPDA(attack=attack, modules="0"), 7, forward=1.0, both=10.0) == 154
    assert pace.guessed_seconds(Surrogate(0.1, queries=600), 20, forward=1.0, both=10.0) == 30


def test_what_is_left_is_said_as_it_is_known(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Reporter() as reporter:
        for second in range(40):
            now[0] = 100.0 + second
            reporter.left = 7200.0
            reporter(second, 200, "pgd")
    assert capsys.readouterr().err == "pgd: 31/200, 1 a second, about 2.0 h left\n"


@pytest.mark.parametrize(("left", "said"), [(90.0, "about 2 min left"), (12.0, "about 12 s left"), (None, "-:--:--")])
def test_the_bar_says_it_too(left, said, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Reporter() as reporter:
        if reporter._bar is None:
            pytest.skip("no bar here")
        reporter.left = left
        reporter(1, 100, "pgd")
        column = reporter._bar.columns[-1]
        assert str(column.render(reporter._bar.tasks[0])) == said


@pytest.mark.parametrize("stochastic", [True, False])
def test_an_evaluation_tells_what_is_left_and_which_rows_images_may_leave(stochastic, monkeypatch):
    monkeypatch.setattr(pace, "_INTERVAL", 0.0)
    left, early = [], []
    reporter = Reporter(interval=0.0)
    monkeypatch.setattr(Reporter, "__call__", lambda self, *_: left.append(self.left))
    monkeypatch.setattr(
        "learn2perturb.evaluation.evaluating.tell_seconds", lambda *_, **more: early.append(more["early"])
    )
    model = network()
    if stochastic:
        model.append(Jitter())
    attacks = {"apgd": APGD(1e-4, 40), "pgd": PGD(1e-4, 5e-5, 40)}
    evaluate(model, DATA, attacks, batch_size=10, draws=2, progress=reporter)
    assert early == [[] if stochastic else ["apgd eps 0.0001, single"]]
    assert left[-1] == 0 and all(value is not None and value >= 0 for value in left)


class Jitter(torch.nn.Module):
    def forward(self, x):
        return x + 0.01 * torch.randn_like(x)


def test_the_queries_of_a_substitute_are_those_of_a_batch():
    attack = Surrogate(0.1, queries=600, eot=3)
    assert pace.guessed_passes(attack, 20) == 90 and pace.guessed_passes(attack) == 1800


@pytest.mark.parametrize(("attack", "passes"), [
    (PGD(0.1, 0.05, 4, eot=3, restarts=2), 24), (FGSM(0.1), 1), (SPSA(0.1, steps=5, directions=8), 2 * 5 * 8),
    (Square(0.1, queries=10), 10), (CW(steps=3, search_steps=2), 6), (FAB(0.1, steps=3, targets=2), 6),
    (FAB(0.1, steps=3, targets=0), 3), (FewPixel(1, population=4, generations=2), 8),
    (BPDA(attack=PGD(0.1, 0.05, 4), modules="0"), 4), (Transfer(attack=PGD(0.1, 0.05, 4), source=network()), 4),
    (AutoAttack(0.1, steps=3, targets=2, queries=4), 3 + 2 * 3 + 2 * 3 + 4),
])  # fmt: skip
def test_the_guess_is_the_product_of_what_multiplies_passes(attack, passes):
    assert pace.guessed_passes(attack, 7) == passes


@pytest.mark.parametrize(("keep", "steps"), [("mean", 40), ("mean", 7), ("mean", 50), ("single", 40)])
def test_what_judges_candidates_on_a_stochastic_model_is_counted(keep, steps):
    """C&W that keeps what stands over fresh draws makes five times the passes: 28 minutes were said for 45."""
    attack = CW(steps=steps, search_steps=3, keep=keep, draws=9, lr=0.1, initial_c=1.0, abort_early=False, seed=1)
    model, x = network().append(Jitter()), DATA.images.float() / 255
    made = attack.run(model, x, model(x).argmax(dim=1)).forward_passes
    assert 0.85 < pace.guessed_passes(attack, len(x), stochastic=True) / made <= 1.05
    assert pace.guessed_passes(attack, len(x)) == 3 * steps
    assert pace.guessed_seconds(attack, 1, forward=0.0, both=1.0, stochastic=True) == 3 * steps


@pytest.mark.parametrize("average", ["loss", "probability", "logits"])
@pytest.mark.parametrize("eot", [1, 4])
@pytest.mark.parametrize("attack", [PGD(1e-4, 5e-5, 20), APGD(1e-4, 20)], ids=["pgd", "apgd"])
def test_a_mean_over_draws_is_asked_for_before_its_gradient(attack, eot, average):
    """The attack on an ensemble stood at 99 % for half of its time: it makes twice the passes that were expected."""
    attack = dataclasses.replace(attack, eot=eot, eot_average=average, seed=1)
    model, x = network(), DATA.images.float() / 255
    made = attack.run(model, x, model(x).argmax(dim=1)).forward_passes
    guess = pace.guessed_passes(attack, len(x))
    assert 0.65 < guess / made <= 1
    assert pace.guessed_seconds(attack, len(x), forward=1.0, both=3.0) == guess + 2 * 20 * eot


def test_the_share_done_is_of_the_passes_expected_and_never_all(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(pace, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    shares: list[float] = []
    pacing = pace.Pace(PGD(0.1, 0.05, 4))
    told = pacing.listener(10, shares.append)
    for seconds in (0.25, 0.25, 0.4, 0.1, 9.0):
        now[0] += seconds
        told(10, 10)
    assert shares == [0.5, 0.99, 0.99]  # at half a second, at one, at the end
    pacing.took(0.25)
    assert pacing.expected == 1.0
    pacing.took(8.0)
    told = pacing.listener(5, shares.append)
    now[0] += 1
    told(10, 5)
    assert shares[-1] == 10 / (8 * 5)


def test_of_the_first_batch_the_images_that_have_left_are_expected_to_make_no_pass(monkeypatch):
    """A hundred passes of ten images, of which one is left after two: 20 passes are made, and 98 are to come."""
    now = [100.0]
    monkeypatch.setattr(pace, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    shares: list[float] = []
    pacing = pace.Pace(Square(0.1, queries=100))
    told = pacing.listener(10, shares.append)
    for rows, left in ((10, 10), (10, 1), (1, 1), (2, 0)):
        now[0] += 1
        told(rows, left)
    # The second pass counts for ten: it was told of when nine had left. So does a pass that the end confirms.
    assert shares == pytest.approx([10 / 1000, 20 / (20 + 100 - 11), 21 / (21 + 100 - 12), pace._ALMOST])
    pacing.took(4.0)
    told = pacing.listener(10, shares.append)
    now[0] += 1
    told(1, 1)
    assert shares[-1] == 1 / 40  # of the passes that the batch before has made


def test_the_share_done_never_falls(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(pace, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    shares: list[float] = []
    told = pace.Pace(PGD(0.1, 0.05, 10)).listener(10, shares.append)
    for left in (1, 10):
        now[0] += 1
        told(10, left)
    assert shares[0] == shares[1]


STEPS = PGD(0.1, 0.05, 40)
LEAVING = {
    "apgd": APGD(0.1, 40), "apgd all": APGD(0.1, 40, early_stop=False), "apgd eot": APGD(0.1, 20, eot=2),
    "fab": FAB(0.1, steps=5, early_stop=True), "fab all": FAB(0.1, steps=5),
    "fab eot": FAB(0.1, steps=5, early_stop=True, eot=2), "square": Square(0.1, queries=40),
    "square eot": Square(0.1, queries=40, eot=2), "rays": RayS(0.1, queries=40),
    "rays eot": RayS(0.1, queries=40, eot=2),
    "spsa": SPSA(0.1, steps=5, directions=8), "pgd": STEPS, "few_pixel": FewPixel(1, population=8, generations=8),
    "cw": CW(steps=20, search_steps=2), "autoattack": AutoAttack(0.1, steps=9, targets=2, queries=9),
    "autoattack eot": AutoAttack(0.1, steps=9, targets=2, queries=9, eot=2),
    "bpda": BPDA(attack=APGD(0.1, 40), modules="0"), "bpda all": BPDA(attack=STEPS, modules="0"),
    "transfer": Transfer(attack=APGD(0.1, 40), source=network()),
    "transfer all": Transfer(attack=STEPS, source=network()),
}  # fmt: skip


@pytest.mark.parametrize("name", LEAVING)
def test_an_attack_drops_images_that_are_broken_if_it_says_so(name):
    """Images that are wrong as they are cost a few passes (is the model random, is the image wrong), or all."""
    attack, model, x = LEAVING[name], network(), DATA.images.float() / 255
    with torch.no_grad():
        wrong = (model(x).argmax(dim=1) + 1) % 10
    passes = attack.run(torch.nn.Sequential(torch.nn.Identity(), model), x, wrong).forward_passes
    assert attack.drops == (passes < 12)
    assert attack.drops or passes >= 40


DROPPING = [name for name, attack in LEAVING.items() if attack.drops and name not in ("cw", "transfer")]


@pytest.mark.parametrize("name", DROPPING)
@pytest.mark.parametrize("pixel", [0.6, 0.5])
def test_who_listens_hears_how_many_images_are_still_attacked(name, pixel):
    """Half of the images are wrong as they are, or nearly so, and half so right that nothing fools them."""
    x = torch.full((20, 1, 8, 8), 0.1)
    x[::2] = pixel
    model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()
    with torch.no_grad():
        model[2].weight.zero_()
        model[2].bias.zero_()[0] = 64 * 0.5005
        model[2].weight[1] = 1.0  # the sum of the pixels, which for these labels is to be larger than that
    heard: list[int] = []
    with passes_told_to(lambda rows, left: heard.append(left)):
        found = LEAVING[name].run(model, x, torch.zeros(20, dtype=torch.int64))
    assert found.success.sum() == 10
    assert heard == sorted(heard, reverse=True)
    assert (heard[0], heard[-1]) == (20, 10)


def test_the_rest_follows_what_each_row_has_taken(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(pace, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    rest = pace.Rest(10, {"clean": 1.0, "aa": 50.0, "pgd": 2.0})
    rest.begin()
    assert rest.seconds("clean", 0) == 530.0  # nothing is known but the guess
    now[0] += 20
    assert rest.seconds("clean", 5) == 5 * 4.0 + 500 + 20  # four seconds each
    rest.end("clean")
    now[0] += 1000  # between two batches
    rest.begin()
    now[0] += 10
    assert rest.seconds("clean", 10) == 500 + 20
    rest.end("clean")
    rest.begin()
    now[0] += 3
    assert rest.seconds("aa", 6) == pytest.approx(4 * 0.5 + 20)
    rest.leave_out(["pgd"])
    assert rest.seconds("aa", 6) == pytest.approx(4 * 0.5)


@pytest.mark.parametrize("seconds", [59.9, 60.0])
def test_a_minute_is_long(seconds):
    told: list[str] = []

    class Listening(Reporter):
        def line(self, text):
            told.append(text)

    pace.tell_seconds(Listening(), {"pgd": seconds})
    assert len(told) == (seconds >= 60)


def test_a_report_inside_a_batch_counts_its_images_in_part(monkeypatch):
    monkeypatch.setattr(pace, "_INTERVAL", 0.0)
    told: list[float] = []
    attack = PGD(0.001, 0.0005, 4)
    evaluate(network(), DATA, {"pgd": attack}, batch_size=10, progress=lambda done, *_: told.append(done))
    assert sorted(set(told)) == pytest.approx([10, 20, 22.5, 25, 27.5, 29.9, 30, 32.5, 35, 37.5, 39.9, 40])


@pytest.mark.parametrize(("single", "said"), [(60.0, True), (61.0, False), (float("inf"), False)])
def test_a_predictor_of_many_passes_is_named_where_it_is_what_takes_long(single, said):
    told: list[str] = []

    class Listening(Reporter):
        def line(self, text):
            told.append(text)

    pace.tell_seconds(Listening(), {"eot": 120.0}, single=single)
    assert [("'single' (--predictor single) is about 60 s" in line) for line in told[1:]] == ([True] if said else [])


@pytest.mark.parametrize("predictor", ["mean_probability", "single"])
def test_what_single_draws_would_take_is_of_the_same_attacks(predictor, monkeypatch):
    """PGD of four steps and two draws: of twenty members its gradients take twenty."""
    heard: list[tuple[dict[str, float], float]] = []
    monkeypatch.setattr(
        "learn2perturb.evaluation.evaluating.tell_seconds",
        lambda _, seconds, single, **more: heard.append((seconds, single)),
    )
    model, attack = network().append(Jitter()), PGD(0.1, 0.05, 4, eot=2)
    evaluate(model, DATA, {"pgd": attack}, limit=4, draws=3, members=20, predictor=predictor, clean=False)
    ((seconds, single),) = heard
    members = 20 if predictor != "single" else 1
    each = 3 if predictor == "single" else 4  # forward passes that a draw of a gradient takes: of a mean one more
    passes = 3 * members + each * 4 * max(2, members)
    assert sum(seconds.values()) / single == pytest.approx(passes / (3 + 3 * 4 * 2))
