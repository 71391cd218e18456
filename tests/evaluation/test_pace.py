"""Progress inside a row: an attack of minutes shows how far it is, with an estimate, at no cost."""

from __future__ import annotations

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
    Square,
    Surrogate,
    Transfer,
)
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
    monkeypatch.setattr(pace, "guessed_passes", lambda attack, images: 1000.0)
    reports: list[float] = []
    attack = Square(0.001, queries=20)  # too small to break anything, so that no image leaves
    evaluate(network(), DATA, {"square": attack}, batch_size=10, progress=lambda done, *_: reports.append(done))
    inside = [done for done in reports if done % 10]
    assert max(done for done in inside if done < 30) < 21
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


def test_the_share_done_is_of_the_passes_expected_and_never_all(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(pace, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    shares: list[float] = []
    pacing = pace.Pace(PGD(0.1, 0.05, 4))
    told = pacing.listener(10, shares.append)
    for seconds in (0.25, 0.25, 0.4, 0.1, 9.0):
        now[0] += seconds
        told(10)
    assert shares == [0.5, 0.99, 0.99]  # at half a second, at one, at the end
    pacing.took(0.25)
    assert pacing.expected == 1.0
    pacing.took(8.0)
    told = pacing.listener(5, shares.append)
    now[0] += 1
    told(10)
    assert shares[-1] == 10 / (8 * 5)


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
