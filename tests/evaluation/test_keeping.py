"""Finished rows are kept: a kill loses one row, the same call goes on, and rows of anything else are never taken."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from learn2perturb import load_data, perturb
from learn2perturb.attacks import FGSM, PGD
from learn2perturb.cli.main import main
from learn2perturb.evaluation import Evaluation, ImageKeeper, Unfinished, evaluate
from learn2perturb.evaluation.keeping import PartialEvaluation, taken
from learn2perturb.evaluation.pieces import key_of
from learn2perturb.evaluation.rows import RowRun

ATTACKS = {"fgsm": FGSM(0.1), "pgd": PGD(0.1, 0.05, 1, eot=2)}
SETTINGS = {"draws": 2, "batch_size": 16, "seed": 4, "predictor": ["single", "vote"], "members": 2}


class Killed(BaseException):
    """As Ctrl-C comes."""


def network(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return perturb(plain_network(), input_shape=(1, 8, 8))


def plain_network() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(72, 10))


DATA = load_data("digits", "test", limit=20)


def alike(one, other) -> bool:
    """Tell whether rows are the same but for their seconds."""
    first, second = ([dataclasses.replace(row, seconds=0.0) for row in rows] for rows in (one, other))
    return first == second


@pytest.fixture
def kill(monkeypatch):
    """Kill an evaluation in the run of a given number; count the runs that are computed."""
    computed: list[str] = []
    real = RowRun.add

    def arm(at: int | None) -> list[str]:
        computed.clear()

        def add(self, model, x, y, batch, tell, choose=None):
            if batch == 0:
                computed.append(self.label)
            if at is not None and len(computed) > at and batch == 1:
                raise Killed
            real(self, model, x, y, batch, tell, choose)

        monkeypatch.setattr(RowRun, "add", add)
        return computed

    return arm


@pytest.mark.parametrize("noisy", [True, False])
def test_rows_in_turn_are_what_all_rows_on_each_batch_are(noisy, kill):
    model = network() if noisy else plain_network()
    order = kill(None)
    in_turn = evaluate(model, DATA, ATTACKS, **SETTINGS)
    rows = len(order)
    loader = DataLoader(TensorDataset(DATA.images, DATA.labels), batch_size=16)  # a loader's rows go side by side
    side_by_side = evaluate(model, loader, ATTACKS, **SETTINGS)
    assert len(order) == 2 * rows
    assert alike(in_turn.rows, side_by_side.rows)
    assert in_turn.metadata["images"] == side_by_side.metadata["images"]


@pytest.mark.parametrize("at", [0, 1, 4, 8])
def test_a_kill_loses_one_row_and_the_same_call_goes_on(at, kill, tmp_path, capsys):
    model = network()
    computed = kill(None)
    whole = evaluate(model, DATA, ATTACKS, **SETTINGS)
    runs = list(computed)
    assert len(runs) == 9
    kill(at)
    with pytest.raises(Killed), Unfinished(tmp_path) as keep:
        evaluate(model, DATA, ATTACKS, **SETTINGS, keep=keep)
    assert len(list(tmp_path.iterdir())) == (at > 0)
    computed = kill(None)
    with Unfinished(tmp_path) as keep:
        result = evaluate(model, DATA, ATTACKS, **SETTINGS, keep=keep)
    assert computed == runs[at:]
    assert alike(result.rows, whole.rows)
    assert (f"going on: {at} of {len(runs)} rows" in capsys.readouterr().err) == (at > 0)
    assert list(tmp_path.iterdir()) == []


CHANGES = {
    "weights": (9, {"model": network(1)}),
    "images": (9, {"data": load_data("digits", "train", limit=20)}),
    "seed": (9, {"seed": 5}),
    "batch size": (9, {"batch_size": 12}),
    "draws": (9, {"draws": 3}),
    "members": (9, {"members": 3}),
    "predictor": (6, {"predictor": "single"}),
    "a setting of an attack": (9, {"attacks": ATTACKS | {"pgd": PGD(0.1, 0.05, 1, eot=3)}}),
    "a size": (9, {"eps": 0.05}),
    "the order": (9, {"attacks": dict(reversed(ATTACKS.items()))}),
    "noise off": (6, {"noise_off": False}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_rows_of_anything_else_are_never_taken(change, kill, tmp_path):
    given = {"model": network(), "data": DATA, "attacks": ATTACKS, **SETTINGS}
    kill(3)
    with pytest.raises(Killed), Unfinished(tmp_path) as keep:
        evaluate(**given, keep=keep)
    computed = kill(None)
    runs, changed = CHANGES[change]
    evaluate(**given | changed, keep=Unfinished(tmp_path))
    assert len(computed) == runs


def test_damaged_rows_are_computed_again_with_a_warning(kill, tmp_path):
    kill(3)
    with pytest.raises(Killed), Unfinished(tmp_path) as keep:
        evaluate(network(), DATA, ATTACKS, **SETTINGS, keep=keep)
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text()[:-100])
    computed = kill(None)
    with Unfinished(tmp_path) as keep, pytest.warns(UserWarning, match="computed again"):
        evaluate(network(), DATA, ATTACKS, **SETTINGS, keep=keep)
    assert len(computed) == 9


def test_rows_of_another_key_are_not_taken_even_under_its_name(kill, tmp_path):
    kill(3)
    with pytest.raises(Killed), Unfinished(tmp_path) as keep:
        evaluate(network(), DATA, ATTACKS, **SETTINGS, keep=keep)
    (path,) = tmp_path.iterdir()
    dataclasses.replace(PartialEvaluation.load(path), key="another").save(path)
    computed = kill(None)
    evaluate(network(), DATA, ATTACKS, **SETTINGS, keep=Unfinished(tmp_path))
    assert len(computed) == 9


def test_a_loader_keeps_nothing(kill, tmp_path):
    loader = DataLoader(TensorDataset(DATA.images, DATA.labels), batch_size=16)
    evaluate(network(), loader, ATTACKS, **SETTINGS, keep=Unfinished(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_goes_on_and_tidies_up(kill, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "records" / "mine.json"
    made = "--dataset=digits --model=digits_cnn --recipe=fast --engine=plain --device=cpu --epochs=1 --limit=64"
    assert main(["train", *made.split(), "--monitor=0", "--attack-steps=1", "--out", str(run)]) == 0
    words = ["evaluate", str(run), "--device=cpu", "--attacks=fgsm,pgd7", "--limit=40", "--batch-size=16", "--draws=2"]
    kill(2)
    with pytest.raises(Killed):
        main([*words, "--out", str(out)])
    assert [path.suffix for path in out.parent.iterdir()] == [".partial"]
    computed = kill(None)
    assert main([*words, "--out", str(out)]) == 0
    assert len(computed) == 4
    assert "going on: 2 of 6 rows" in capsys.readouterr().err
    assert list(out.parent.iterdir()) == [out]
    assert main([*words, "--out", str(tmp_path / "whole.json")]) == 0
    assert alike(Evaluation.load(out).rows, Evaluation.load(tmp_path / "whole.json").rows)


def test_rows_whose_images_are_kept_are_other_work_than_those_without_or_of_other_numbers(tmp_path):
    asked = []

    class Listening(Unfinished):
        def open(self, identity, expected):
            asked.append(key_of(identity))
            return super().open(identity, expected)

    model = plain_network()
    for keeper in (None, None, ImageKeeper(1), ImageKeeper(2), ImageKeeper(None)):
        evaluate(model, DATA, {"fgsm": FGSM(0.1)}, limit=4, keep=Listening(tmp_path), images=keeper)
    assert len(asked) == 5 and asked[0] == asked[1] and len(set(asked)) == 4


@pytest.mark.parametrize(("rows", "counts", "expected"), [
    (0, [1, 2], []), (1, [1, 2], [(0,)]), (2, [1, 2], [(0,)]), (3, [1, 2], [(0,), (1, 2)]), (4, [1, 2], [(0,), (1, 2)]),
    (1, [2, 1], []),
])  # fmt: skip
def test_a_run_of_which_rows_are_missing_is_none(rows, counts, expected):
    assert taken(range(rows), counts) == expected
