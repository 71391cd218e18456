"""The configs of the verbs: one dataclass gives keyword arguments, options, help, and what the record keeps."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import learn2perturb as l2p
from learn2perturb.certification import Certification, CertifyConfig, certify
from learn2perturb.cli.options import Parser, add_config, config_of
from learn2perturb.configs import Config, field_help, takes
from learn2perturb.diagnosis import DiagnoseConfig, Diagnosis, diagnose
from learn2perturb.diagnosis.budget import budget_of
from learn2perturb.errors import ConfigError, UnknownNameError
from learn2perturb.evaluation import EvaluateConfig, Evaluation, evaluate
from learn2perturb.records import plain
from tests.problems import Linear

VERBS: dict[str, tuple[Any, type[Config]]] = {
    "evaluate": (evaluate, EvaluateConfig), "certify": (certify, CertifyConfig), "diagnose": (diagnose, DiagnoseConfig)
}  # fmt: skip
FIELDS = [(verb, item) for verb, (_, config) in VERBS.items() for item in dataclasses.fields(config)]  # type: ignore[arg-type]
IDS = [f"{verb}-{item.name}" for verb, item in FIELDS]
# Settings other than the defaults, as plain values.
OTHER: dict[str, dict[str, Any]] = {
    "evaluate": {
        "draws": 3, "predictor": ["single", "vote"], "members": 2, "eps": [0.1, 0.2], "noise_off": False,
        "clean": False, "seed": 4, "batch_size": 3, "limit": 5, "engine": "auto",
    },
    "certify": {
        "n0": 5, "n": 20, "alpha": 0.05, "method": "smoothing", "sigma": 0.25, "eps": 0.1, "limit": 4, "batch_size": 7,
        "seed": 2,
    },
    "diagnose": {
        "budget": "full", "eps": 0.5, "norm": "l2", "claim": "51 % under pgd20 with 0.5", "stochastic": False,
        "bpda": "pre", "seed": 3, "limit": 4, "batch_size": 2, "engine": "auto",
    },
}  # fmt: skip
TINY = budget_of(
    "quick", images=8, some=4, scorings=2, eot=2, steps=2, sweep_eot=1, unbounded_steps=2, samples=4, draw_curve=(1, 4),
    step_curve=(1, 2), restarts=2, square_queries=4, slope_images=2, slope_repeats=4, real_queries=4, descent_steps=2,
    descent_directions=2, surrogate_queries=16,
)  # fmt: skip


def images() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(8, 1, 4, 4)
    return x, torch.tensor([0, 1] * 4)


def parser_of(verb: str) -> Parser:
    parser = Parser()
    importlib.import_module(f"learn2perturb.cli.{verb}").add_arguments(parser)
    return parser


# --- one source


@pytest.mark.parametrize(("verb", "item"), FIELDS, ids=IDS)
def test_a_field_is_a_keyword_argument_with_its_default_and_explained(verb, item):
    function, config = VERBS[verb]
    parameter = inspect.signature(function).parameters[item.name]
    assert parameter.kind is parameter.KEYWORD_ONLY
    assert parameter.default == item.default == getattr(config, item.name)
    assert f"        {item.name}: {field_help(config)[item.name]}" in function.__doc__
    assert "settings:" not in function.__doc__


@pytest.mark.parametrize(("verb", "item"), FIELDS, ids=IDS)
def test_a_field_is_an_option_with_help(verb, item):
    found = [action for action in parser_of(verb)._actions if action.dest == item.name]
    assert found
    assert all(action.help for action in found)


@pytest.mark.parametrize("verb", VERBS)
def test_options_give_the_config_that_they_say(verb):
    config = VERBS[verb][1]
    words = [f"--{name.replace('_', '-')}={_text(value)}" for name, value in OTHER[verb].items() if _is_option(value)]
    words += [f"--no-{name.replace('_', '-')}" for name, value in OTHER[verb].items() if value is False]
    words += ["--full"] if verb == "diagnose" else []
    assert set(OTHER[verb]) == {item.name for item in dataclasses.fields(config)}  # type: ignore[arg-type]
    assert config_of(config, parser_of(verb).parse([*words, "RUN"])) == config(**OTHER[verb])
    assert config_of(config, parser_of(verb).parse(["RUN"])) == config()


def _is_option(value: object) -> bool:
    return value is not False and value != "full"


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def test_a_flag_does_not_take_the_run_that_follows_for_its_value():
    arguments = parser_of("diagnose").parse(["--stochastic", "RUN"])
    assert (arguments.run, arguments.stochastic) == ("RUN", True)
    assert parser_of("evaluate").parse(["--no_noise_off", "RUN"]).noise_off is False


@pytest.mark.parametrize("verb", VERBS)
def test_a_config_is_plain_values_and_comes_back(verb):
    config = VERBS[verb][1](**OTHER[verb])
    values = json.loads(json.dumps(config.to_dict()))
    assert values == config.to_dict() == OTHER[verb]
    assert type(config).from_dict(values) == config


# --- calls


def calls(verb: str) -> tuple[Any, tuple[Any, ...], dict[str, Any], dict[str, Any], Any]:
    """Return function, model and images, settings, other arguments, and the type of the record."""
    model = Linear((1, 4, 4))
    if verb == "evaluate":
        attacks = {"pgd": l2p.attacks.PGD(steps=2)}
        return (
            evaluate,
            (model, images()),
            {"eps": (0.1, 0.2), "batch_size": 3, "seed": 1},
            {"attacks": attacks},
            Evaluation,
        )
    if verb == "certify":
        settings = {"sigma": 0.25, "n": 50, "n0": 10, "seed": 1, "alpha": 0.05}
        return certify, (model, images()), settings, {}, Certification
    return diagnose, (model, images()), {"budget": TINY, "eps": 0.1, "seed": 1}, {}, Diagnosis


@pytest.mark.filterwarnings("ignore")  # of a linear model of two images much is said that is not asked here
@pytest.mark.parametrize("verb", VERBS)
def test_config_and_keywords_are_one_and_the_record_keeps_what_was_settled(verb, tmp_path):
    function, subject, settings, others, kind = calls(verb)
    config = VERBS[verb][1](**settings)
    by_config = function(*subject, config=config, **others, progress=None)
    by_keyword = function(*subject, **settings, **others, progress=None)
    mixed = function(*subject, config=dataclasses.replace(config, seed=9), seed=1, **others, progress=None)
    for found in (by_keyword, mixed):
        assert _numbers(found) == _numbers(by_config)
        assert found.metadata["config"] == by_config.metadata["config"]
    by_config.save(tmp_path / "record.json")
    assert kind.load(tmp_path / "record.json") == by_config
    kept = kind.load(tmp_path / "record.json").metadata["config"]
    assert {name: kept[name] for name in settings} == {name: plain(value) for name, value in settings.items()}
    again = function(*subject, config=type(config).from_dict(kept), **others, progress=None)
    assert _numbers(again) == _numbers(by_config)


def _numbers(found: Any) -> Any:
    values = dataclasses.asdict(dataclasses.replace(found, metadata={}))
    for row in (*values.get("rows", ()), *values.get("measurements", ())):
        row["seconds"] = 0
    return values


def test_the_record_keeps_what_was_left_to_be_settled():
    found = certify(Linear((1, 4, 4)), images(), sigma=0.25, n=10, n0=2, progress=None)
    assert found.metadata["config"]["method"] == "smoothing"


def test_the_config_of_an_evaluation_without_attacks_may_stand_third():
    model, data = Linear((1, 4, 4)), images()
    found = evaluate(model, data, EvaluateConfig(limit=4), progress=None)
    assert found.rows[0].n == 4
    with pytest.raises(ConfigError, match="two configs"):
        evaluate(model, data, EvaluateConfig(), EvaluateConfig())


@pytest.mark.parametrize("verb", VERBS)
def test_a_misspelt_setting_and_another_kind_of_config_are_refused(verb):
    function, subject, *_ = calls(verb)
    with pytest.raises(UnknownNameError, match="'batch_sizes': did you mean 'batch_size'"):
        function(*subject, batch_sizes=3)
    with pytest.raises(ConfigError, match="config is a TrainConfig; give a"):
        function(*subject, config=l2p.TrainConfig())
    with pytest.raises(ConfigError, match="settings are a list"):
        VERBS[verb][1].from_dict([])  # type: ignore[arg-type]


BAD = [
    ("evaluate", {"draws": 0}, "draws must be a whole number"), ("evaluate", {"seed": -1}, "seed is -1"),
    ("evaluate", {"engine": "warp"}, "engine is 'warp'; allowed: auto, plain, fast"),
    ("evaluate", {"noise_off": 1}, "noise_off must be True or False"), ("evaluate", {"predictor": "votes"}, "'vote'"),
    ("certify", {"alpha": 1}, "alpha is 1"), ("certify", {"seed": 0.5}, "seed is 0.5"),
    ("certify", {"method": "smoothing"}, "sigma is None"), ("diagnose", {"norm": "l1"}, "norm is 'l1'"),
    ("diagnose", {"budget": {"images": 3}}, "the budget lacks name"),
    ("diagnose", {"budget": {"pictures": 3}}, "unknown number of a budget 'pictures'"),
    ("diagnose", {"budget": "quik"}, "did you mean 'quick'"), ("diagnose", {"stochastic": 1}, "stochastic must be"),
]  # fmt: skip


@pytest.mark.parametrize(("verb", "settings", "reason"), BAD)
def test_a_config_that_cannot_be_is_refused_when_it_is_made(verb, settings, reason):
    with pytest.raises(ConfigError, match=reason):
        VERBS[verb][1].from_dict(settings)


# --- an option more is a field more


@dataclass(frozen=True, kw_only=True)
class More(EvaluateConfig):
    """An evaluation with a setting more.

    Args:
        strength: of 100 %.
        loud: whether it is loud.
    """

    strength: float = 0.5
    loud: bool = True


def test_an_option_more_is_one_field():
    @takes(More)
    def louder(model: object, config: More | None = None, **settings: Any) -> dict[str, Any]:
        """Evaluate.

        Args:
            model: that one.
            settings: fields of the config,
                and more.
        """
        return More.of(config, settings).to_dict()

    parser = Parser(prog="louder")
    add_config(parser, More, title="more")
    help = " ".join(parser.format_help().split())
    assert "--strength X of 100 % (default 0.5)" in help
    assert "--loud, --no-loud whether it is loud (default true)" in help
    said = config_of(More, parser.parse(["--strength=1/4", "--no-loud", "--draws=3"]))
    assert said == More(strength=0.25, loud=False, draws=3)
    assert louder(None, strength=0.25, loud=False, draws=3) == said.to_dict()
    assert inspect.signature(louder).parameters["strength"].default == 0.5
    assert "strength: of 100 %." in str(louder.__doc__)
    assert "and more" not in str(louder.__doc__)
    assert isinstance(parser.parse([]), argparse.Namespace)
