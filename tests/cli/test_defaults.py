"""One default for one thing: the command line's is that of the Python function, and both give the same numbers."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys

import pytest

import learn2perturb as l2p
from learn2perturb.certification import certify
from learn2perturb.cli.main import VERBS, main
from learn2perturb.cli.options import Parser
from learn2perturb.diagnosis import diagnose
from learn2perturb.evaluation import Evaluation, evaluate
from learn2perturb.experiments.spec import Scoring

# verb -> the function that it calls
FUNCTIONS = {"evaluate": evaluate, "certify": certify, "diagnose": diagnose}
# Options that are not the parameter of their name, or whose default says "ask the run, then the function".
OTHERS = {
    ("evaluate", "attacks"): "names of presets",
    ("evaluate", "predictor"): "the defense of the run has its own",
    ("evaluate", "members"): "the defense of the run has its own; MEMBERS else",
    ("certify", "eps"): "the run's",
    ("evaluate", "device"): "auto: the model is put there",
    ("certify", "device"): "auto: the model is put there",
    ("diagnose", "device"): "auto: the model is put there",
    ("evaluate", "model"): "a name of a network; the function takes the network",
    ("certify", "model"): "a name of a network; the function takes the network",
    ("diagnose", "model"): "a name of a network; the function takes the network",
}
SHARED = {
    "evaluate": {"draws", "eps", "noise_off", "clean", "seed", "batch_size", "limit", "engine"},
    "certify": {"n0", "n", "alpha", "method", "sigma", "limit", "batch_size", "seed"},
    "diagnose": {
        "budget",
        "claim",
        "bpda",
        "norm",
        "eps",
        "stochastic",
        "noise_off",
        "seed",
        "limit",
        "batch_size",
        "engine",
    },
}


def parser_of(verb: str) -> Parser:
    parser = Parser()
    importlib.import_module(f"learn2perturb.cli.{verb}").add_arguments(parser)
    return parser


@pytest.mark.parametrize(("verb", "name"), [(verb, name) for verb, names in SHARED.items() for name in sorted(names)])
def test_the_default_of_an_option_is_that_of_the_function(verb, name):
    default = inspect.signature(FUNCTIONS[verb]).parameters[name].default
    assert parser_of(verb).get_default(name) == default
    assert type(parser_of(verb).get_default(name)) is type(default)


@pytest.mark.parametrize("verb", FUNCTIONS)
def test_no_option_is_forgotten_here(verb):
    options = {action.dest for action in parser_of(verb)._actions}
    shared = options & set(inspect.signature(FUNCTIONS[verb]).parameters)
    others = {name for own, name in OTHERS if own == verb}
    assert shared == (SHARED[verb] | others) & shared


def test_verbs_that_call_one_function_are_all_known_here():
    assert set(FUNCTIONS) < set(VERBS)


@pytest.mark.parametrize("name", ["draws", "batch_size", "engine", "seed", "limit"])
def test_what_verbs_share_has_one_default(name):
    assert inspect.signature(evaluate).parameters[name].default == getattr(Scoring(), name)


@pytest.mark.parametrize("function", FUNCTIONS.values())
def test_every_function_shows_progress_and_crafts_in_one_engine(function):
    parameters = inspect.signature(function).parameters
    assert parameters["progress"].default is inspect.signature(l2p.train).parameters["progress"].default is True
    if "engine" in parameters:
        # In float32 either way: a diagnosis is long enough for the faster of its two modes.
        assert parameters["engine"].default == (None if function is l2p.diagnose else "plain")


@pytest.mark.parametrize("verb", FUNCTIONS)
def test_help_says_the_defaults_of_the_function_and_waits_for_neither_torch_nor_numpy(verb):
    code = (
        "import sys\nfrom learn2perturb.cli.main import main\n"
        f"code = main([{verb!r}, '--help'])\n"
        "print(code, 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == "0 False False"
    said = " ".join(done.stdout.split())
    for name in SHARED[verb] & {"draws", "batch_size", "n", "n0", "alpha", "engine", "seed"}:
        default = inspect.signature(FUNCTIONS[verb]).parameters[name].default
        assert (f"(default {default}" if default is not None else "by default in float32") in said


def test_python_and_the_command_line_give_the_same_bits(tmp_path):
    run = tmp_path / "run"
    made = "--dataset=digits --model=digits_cnn --recipe=fast --engine=plain --device=cpu --epochs=1 --limit=512"
    assert main(["train", *made.split(), "--monitor=0", "--attack-steps=1", "--out", str(run)]) == 0
    out = tmp_path / "record.json"
    assert main(["evaluate", str(run), "--device=cpu", "--attacks=fgsm,pgd7", "--seed=3", "--out", str(out)]) == 0
    attacks = {"fgsm": l2p.attacks.FGSM(), "pgd7": l2p.attacks.PGD(steps=7, step_size=0.01)}
    here = evaluate(l2p.load(run), l2p.load_data("digits", "test"), attacks, seed=3)
    there = Evaluation.load(out)
    assert len(here.labels.unpack()) > 256  # more than one batch, or the batch size would not show
    assert here.rows[0].stochastic
    assert [row.correct for row in here.rows] == [row.correct for row in there.rows]
    assert [row.predictions for row in here.rows] == [row.predictions for row in there.rows]
