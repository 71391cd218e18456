"""What a plan says of time: measured in seconds, whatever the study; data are read once."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import nn

from learn2perturb import load_data
from learn2perturb.engine import execution
from learn2perturb.experiments import estimates, studying
from learn2perturb.experiments.estimates import Estimates
from learn2perturb.experiments.ledger import Ledger
from learn2perturb.experiments.spec import Study
from learn2perturb.experiments.store import Store
from learn2perturb.experiments.study_file import read_study


@pytest.fixture
def study(tiny, tmp_path) -> Study:
    whole = {**tiny, "train": {**tiny["train"], "monitor": 10, "limit": None}, "evaluate": {"draws": 2}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(whole))
    return read_study(str(tmp_path / "mine.yaml"))


def planned(study: Study, tmp_path, monkeypatch) -> tuple[dict[str, float], list[int], list[str]]:
    """Return the seconds of each training and cell, the epochs of what was trained for them, and the sets read."""
    ledger = Ledger(study, Store(tmp_path / "store"))
    epochs, read = [], []

    def train(config, **more):
        epochs.append(config.epochs)
        return learned(config, **more)

    def load(name, split, **more):
        read.append(split)
        return loaded(name, split, **more)

    learned, loaded = estimates.train, estimates.load_data
    monkeypatch.setattr(estimates, "train", train)
    monkeypatch.setattr(estimates, "load_data", load)
    found = Estimates(ledger, "cpu")
    seconds = {run.title: found.training(run) for run in study.runs}
    seconds |= {pair.title: found.cell(pair) for pair in study.all_pairs()}
    return seconds, epochs, read


def test_each_kind_is_measured_once_and_each_split_read_once(study, tmp_path, monkeypatch):
    monkeypatch.setattr(estimates, "_MOST_SECONDS", 1e6)  # whatever else this machine does
    seconds, epochs, read = planned(study, tmp_path, monkeypatch)
    assert len(seconds) == 4 + 8 and min(seconds.values()) > 0
    assert epochs == [0, 2, 0, 2], "two defenses: each built, then two steps of each"
    assert sorted(read) == ["test", "train"]


def test_where_steps_would_take_long_none_is_trained(study, tmp_path, monkeypatch):
    monkeypatch.setattr(estimates, "_MOST_SECONDS", 0.0)
    seconds, epochs, _ = planned(study, tmp_path, monkeypatch)
    assert epochs == [0, 0]
    assert min(seconds.values()) > 0


def test_a_step_is_so_many_passes_as_that_of_the_same_training(study, tmp_path, monkeypatch):
    config = study.runs[0].config
    found = Estimates(Ledger(study, Store(tmp_path / "store")), "cpu")
    (_, *network), *rest = estimates._kind(config)
    other = (("resnet20", *network), *rest)
    found._paces[other] = estimates.Pace(step=700.0, forward=1.0, both=100.0)
    found._left = 0.0
    pace = found.pace(config)
    assert pace.step == pytest.approx(7 * pace.both)
    assert estimates._passes_of_a_step(config.closed()) == 2 + 2


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        ({}, 2 + 2),
        ({"attack_steps": 7, "attack_eot": 3}, 21 + 2),
        ({"alpha": 0.0}, 2 + 1),
        ({"beta": 0.0}, 1),
        ({"awp": 0.01}, 2 + 4),
        ({"objective": "trades"}, 2 + 2),
        ({"objective": "trades", "awp": 0.005}, 2 + 4),
        ({"loss": "averaged", "loss_draws": 4}, 4 * (2 + 2)),
        ({"consistency": 1.0}, 2 + 3),
    ],
)
def test_extras_of_a_training_take_passes_and_make_a_kind_of_their_own(settings, passes, study):
    """TRADES with perturbed weights was expected to take as long as TRADES; it took twice as long."""
    config = study.runs[0].config
    other = replace(config, **settings)
    assert estimates._passes_of_a_step(other.closed()) == passes
    assert (estimates._kind(other) == estimates._kind(config)) == (not settings)
    assert estimates._network(other) == estimates._network(config)


def test_what_is_to_begin_is_guessed_before_it_begins(study, tmp_path, monkeypatch):
    """Guessed once it was done, a training had nothing left, and the rest seemed to take hundreds of times longer."""
    begun = []

    def training(self, run) -> float:
        begun.append(self.ledger.epochs(run))
        return 1000.0

    monkeypatch.setattr(Estimates, "training", training)
    monkeypatch.setattr(Estimates, "cell", lambda self, pair: 1.0)
    studying.study(study, store=tmp_path / "store")
    assert begun == [0] * len(study.runs)


@pytest.mark.parametrize(("mode", "ratio"), [
    (execution.PLAIN, 1.0), (execution.FAST, 0.25), (replace(execution.FAST, compiled_rows=32), 0.25 * 5 / 6),
])  # fmt: skip
def test_a_training_takes_the_time_of_the_mode_that_it_selects(mode, ratio, study, tmp_path, monkeypatch):
    run, asked = study.runs[0], []
    found = Estimates(Ledger(study, Store(tmp_path / "store")), "cpu")
    found._paces[estimates._kind(run.config)] = estimates.Pace(2.0, 1.0, 3.0, {"fast": 0.25})
    monkeypatch.setattr(estimates, "mode_of", lambda *_, **facts: (asked.append(facts), mode)[1])
    images = found._set(run.config, "train")[0]
    epochs, steps = run.config.closed().epochs, run.config.closed().attack_steps
    expected = epochs * (images * 2.0 + 10 * (steps + 2) * 3.0) * ratio
    assert found.training(run) == pytest.approx(estimates._BEGINNING + expected)
    assert asked == [{"images": epochs * images, "shape": (1, 8, 8)}]


@pytest.mark.parametrize(("engine", "ratio"), [("plain", 1.0), ("fast32", 0.25), ("auto", 1.0)])
@pytest.mark.parametrize("kind", ["evaluation", "diagnosis"])
def test_a_record_takes_the_time_of_the_engine_it_is_made_in(kind, engine, ratio, study, tmp_path, monkeypatch):
    monkeypatch.setattr(estimates, "_DIAGNOSIS_PASSES", 10)  # few enough for ``auto`` to take plain
    pair = next(one for one in study.all_pairs() if one.cell.attack)
    pair = replace(pair, cell=replace(pair.cell, kind=kind))
    pair = replace(pair, cell=replace(pair.cell, scoring=replace(pair.cell.scoring, engine=engine)))
    found = Estimates(Ledger(study, Store(tmp_path / "store")), "cpu")
    found._paces[estimates._kind(pair.run.config)] = estimates.Pace(2.0, 0.0, 3.0, {"fast32": 0.25})
    plain = replace(pair, cell=replace(pair.cell, scoring=replace(pair.cell.scoring, engine="plain")))
    began = estimates._BEGINNING
    assert found.cell(pair) - began == pytest.approx(ratio * (found.cell(plain) - began))
    assert found.cell(plain) > began


@pytest.mark.parametrize("defense", ["adv_bnn", "learn2perturb"])
def test_a_record_is_expected_to_take_as_long_before_the_training_as_after_it(defense, tiny, tmp_path):
    """An ensemble that was not yet trained was taken for a single draw: 2 minutes were said for 37."""
    whole = {**tiny, "runs": {"one": {"defense": defense}}, "seeds": [1]}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(whole))
    study, store = read_study(str(tmp_path / "mine.yaml")), Store(tmp_path / "store")

    def seconds() -> float:
        found = Estimates(Ledger(study, store), "cpu")
        found._paces[estimates._kind(study.runs[0].config)] = estimates.Pace(2.0, 1.0, 3.0)
        return sum(found.cell(pair) for pair in study.all_pairs())

    before = seconds()
    studying.study(study, store=tmp_path / "store", progress=False)
    assert Ledger(study, store).network(study.runs[0]) is not None
    assert seconds() == pytest.approx(before)


@pytest.mark.parametrize(("own", "device", "seconds"), [(2.0, "cpu", 2.0), (19.0, "cpu", 10.0), (2.0, "cuda", 10.0)])
def test_other_work_on_the_processor_does_not_count(own, device, seconds, monkeypatch):
    """Ten seconds of the wall, of which this process had the processor for two; on a card it only waits."""
    walls, owns = iter((100.0, 110.0)), iter((5.0, 5.0 + own))
    monkeypatch.setattr(estimates.torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(
        estimates, "time",
        SimpleNamespace(perf_counter=lambda: next(walls), process_time=lambda: next(owns)),
    )  # fmt: skip
    assert estimates._Clock(torch.device(device)).read() == (10.0, seconds)


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_the_time_of_the_processor_is_that_of_one_thread(study, tmp_path, monkeypatch, four_threads):
    """Threads that wait for each other take the processor's time: beside other work a pass seemed ten times as long."""
    seen: dict[str, set[int]] = {"passes": set(), "steps": set()}

    def ask(model, x):
        seen["passes"].add(torch.get_num_threads())
        return asked(model, x)

    def train(config, **more):
        if config.epochs:
            seen["steps"].add(torch.get_num_threads())
        return learned(config, **more)

    asked, learned = estimates.ask, estimates.train
    monkeypatch.setattr(estimates, "ask", ask)
    monkeypatch.setattr(estimates, "train", train)
    monkeypatch.setattr(estimates, "_MOST_SECONDS", 1e6)
    monkeypatch.setattr(estimates._Timing, "_gain", lambda self, one_thread: 0.25)
    whole = Estimates(Ledger(study, Store(tmp_path / "store")), "cpu").pace(study.runs[0].config)
    assert seen == {"passes": {1, 4}, "steps": {1}}  # the first pass, which counts for nothing, by all
    assert torch.get_num_threads() == 4
    assert whole.both > 0


@pytest.mark.parametrize(("walls", "gain"), [
    ((4.0, 3.0, 5.0), 0.3), ((1.0, 2.0, 3.0), 0.25), ((90.0, 40.0, 50.0), 1.0),
])  # fmt: skip
def test_what_more_threads_gain_is_seen_and_no_more_than_there_are(walls, gain, monkeypatch, four_threads):
    data = load_data("digits", "test", limit=4)
    timing = estimates._Timing(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), data, torch.device("cpu"))
    left = iter(walls)
    monkeypatch.setattr(estimates._Clock, "read", lambda self: (next(left), 0.0))
    assert timing._gain(10.0) == gain
    torch.set_num_threads(1)
    assert timing._gain(10.0) == 1.0


def test_a_step_counts_by_the_time_of_the_processor(study, tmp_path, monkeypatch):
    monkeypatch.setattr(estimates, "_MOST_SECONDS", 1e6)
    monkeypatch.setattr(estimates._Clock, "read", lambda self: (4.0, 1.0))
    monkeypatch.setattr(estimates, "_passes_of_a_step", lambda settings: 0.0)  # no least time of a step
    rates = []

    def train(config, **more):
        run = learned(config, **more)
        rates.extend(line["images_per_second"] for line in run.metrics)
        return run

    learned = estimates.train
    monkeypatch.setattr(estimates, "train", train)
    config = study.runs[0].config
    assert Estimates(Ledger(study, Store(tmp_path / "store")), "cpu").pace(config).step == pytest.approx(
        1 / rates[-1] / 4
    )


def test_the_ratio_of_a_mode_is_of_its_passes_and_nothing_is_compiled(monkeypatch):
    class Looking(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(1, 4, 3)
            self.seen: list[object] = []

        def forward(self, x):
            z = self.layer(x)
            self.seen.append((execution.current(), z.dtype))
            return z.flatten(1)

    model, data = Looking(), load_data("digits", "test", limit=4)
    timing = estimates._Timing(model, data, torch.device("cpu"))
    times = iter((0.5, 2.0))
    monkeypatch.setattr(timing, "_seconds", lambda work, rows: (work(rows), next(times))[1])
    model.seen.clear()
    mode = replace(execution.FAST32, compiled_rows=4, dtype=torch.bfloat16)
    assert timing.ratio(mode) == 0.25
    (first, kind), (plain, kind_of_plain) = model.seen[-2], model.seen[-1]
    assert (kind, kind_of_plain) == (torch.bfloat16, torch.float32)
    assert (first.channels_last, first.folding) == (True, True)
    assert (first.fused_noise, first.compiled_rows, plain) == (False, 0, execution.PLAIN)
    assert model.layer.weight.is_contiguous()


def test_a_step_that_was_timed_in_a_stall_counts_half_its_passes_at_least(study, tmp_path, monkeypatch):
    def train(config, **more):
        run = learned(config, **more)
        if run.metrics:
            run.metrics[-1]["images_per_second"] = 1e12
        return run

    learned = estimates.train
    monkeypatch.setattr(estimates, "train", train)
    monkeypatch.setattr(estimates, "_MOST_SECONDS", 1e6)
    pace = Estimates(Ledger(study, Store(tmp_path / "store")), "cpu").pace(study.runs[0].config)
    assert pace.step == pytest.approx(pace.both * estimates._passes_of_a_step(study.runs[0].config.closed()) / 2)
