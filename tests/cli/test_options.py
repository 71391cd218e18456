"""Options from dataclasses, values from text, attacks from their short form."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Annotated, Literal, NewType, Optional, get_args

import pytest

from learn2perturb import presets
from learn2perturb.attacks.spec import build_attacks
from learn2perturb.cli.main import main
from learn2perturb.cli.options import Parser, field_help
from learn2perturb.cli.train import add_arguments, build_config
from learn2perturb.defenses.settings import Settings
from learn2perturb.errors import ConfigError
from learn2perturb.presets import parse_attack
from learn2perturb.registry import ATTACKS
from learn2perturb.training.config import TrainConfig
from learn2perturb.values import convert, converted, guess, kinds_of


def parse(*words: str) -> argparse.Namespace:
    parser = Parser(prog="learn2perturb train")
    add_arguments(parser)
    return parser.parse(words)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3), ("-3", -3), ("1e-3", 1e-3), ("8/255", 8 / 255), ("true", True), ("null", None), ("conv1", "conv1"),
        ("[conv1, bn1]", ["conv1", "bn1"]), ("layer*.*.bn2", "layer*.*.bn2"), ("{", "{"), ("", ""),
    ],
)  # fmt: skip
def test_a_value_without_a_type_is_what_it_looks_like(text, value):
    assert guess(text) == value
    assert type(guess(text)) is type(value)


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("int", "6", 6), ("int | None", "none", None), ("float | None", "8/255", 8 / 255), ("bool", "false", False),
        ("list[int] | None", "75,90", [75, 90]), ("list[int] | None", "[]", []), ("str", "none", "none"),
        ("float | list[float] | None", "2/255, 4/255", [2 / 255, 4 / 255]), ("float | list[float]", 0.1, 0.1),
        ("str | list[str]", "a,b", ["a", "b"]), ("str | list[str]", "a", "a"), ("str | float | None", ".5", ".5"),
        ("Claim | str | float", 0.5, 0.5), ("float", 1, 1), ("dict[str, Any]", {"a": "1e-3"}, {"a": 1e-3}),
    ],
)  # fmt: skip
def test_a_value_is_read_as_its_field_says(kind, text, value):
    assert convert(kind, text) == value


Loss = Literal["ce", "dlr"]
Size = float | None
Count = NewType("Count", int)


@dataclasses.dataclass(frozen=True)
class Mine:
    """Annotations as people write them; this module postpones them."""

    loss: Loss = "ce"
    size: Size = None
    count: Count = Count(1)
    shape: tuple[int, ...] = (1,)
    rates: Sequence[float] = (0.1,)
    names: Optional[list[str]] = None  # noqa: UP045
    level: Literal[1, 2] = 1
    place: pathlib.Path = pathlib.Path()
    share: Annotated[float, "in [0, 1]"] = 0.5
    unknown: NowhereDefined = None  # noqa: F821
    either: int | str = 0


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("loss", "dlr", "dlr"), ("size", "8/255", 8 / 255), ("size", "none", None), ("count", "3", 3),
        ("shape", "2,3", (2, 3)), ("shape", [2, 3], (2, 3)), ("rates", "0.1, 8/255", [0.1, 8 / 255]),
        ("names", "a,b", ["a", "b"]), ("level", "2", 2), ("place", "a/b", pathlib.Path("a/b")), ("share", "1/4", 0.25),
        ("unknown", "as it is", "as it is"), ("either", "7", 7), ("either", "seven", "seven"),
    ],
)  # fmt: skip
def test_options_of_a_class_of_ones_own_are_read_as_annotated(field, text, value):
    found = converted({field: text}, kinds_of(Mine))[field]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("field", "text", "said"),
    [("loss", "kl", "none of ce, dlr"), ("size", "big", "not a number"), ("count", "1.5", "not a whole number"),
     ("shape", "a", "not a whole number"), ("level", "3", "none of 1, 2")],
)  # fmt: skip
def test_options_of_a_class_of_ones_own_are_refused_as_ours_are(field, text, said):
    with pytest.raises(ConfigError, match=f"{field}: .*{said}"):
        converted({field: text}, kinds_of(Mine))


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("int", "6.5"), ("int", 6.0), ("int", True), ("float", "x"), ("float", None), ("bool", "maybe"), ("bool", 1),
        ("list[int]", "a"), ("str", ["a"]), ("dict[str, Any]", [1]), ("float", [1.0]),
        ("float | list[float]", ","), ("float | list[float]", []), ("float | list[float]", "8/0,1"),
    ],
)  # fmt: skip
def test_a_value_that_does_not_fit_is_refused(kind, value):
    with pytest.raises(ConfigError):
        convert(kind, value)


def test_every_field_of_the_config_is_an_option_with_help():
    explained = {**field_help(Settings), **field_help(TrainConfig)}
    parser = Parser()
    add_arguments(parser)
    offered = {action.dest: action for action in parser._actions}
    for item in dataclasses.fields(TrainConfig):
        assert explained.get(item.name), item.name
        assert offered[item.name].help, item.name


@pytest.mark.parametrize("name", [item.name for item in dataclasses.fields(TrainConfig)])
def test_both_spellings_of_an_option_are_read(name):
    examples = {
        "defense": "pgd_at", "model": "resnet32", "dataset": "digits", "recipe": "fast", "options": "gamma=1",
        "data_dir": "x", "device": "cpu", "engine": "plain", "schedule": "step",
        "milestones": "1,2", "attack_labels": "true", "attack_mode": "eval",
    }  # fmt: skip
    kind = kinds_of(TrainConfig)[name]
    value = examples.get(name, "true" if "bool" in kind else "a=1" if "dict" in kind else "1")
    for spelling in (name, name.replace("_", "-")):
        assert vars(parse(f"--{spelling}", value))[name] == vars(parse(f"--{spelling}={value}"))[name]


def test_options_override_the_file_and_mappings_are_merged(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "defense: learn2perturb\nlr: 1e-2\neps: 4/255\noptions: {gamma: 1e-3, init: .5}\nmilestones: [1, 2]\n"
    )
    config = build_config(parse("--config", str(file), "--eps", "8/255", "--options.gamma", "1e-5"))
    assert (config.lr, config.eps, config.milestones) == (0.01, 8 / 255, [1, 2])
    assert config.options == {"gamma": 1e-5, "init": 0.5}


def test_dotted_keys_and_mappings_are_the_same():
    assert parse("--options.gamma", "1e-3").options == parse("--options", "{gamma: 1e-3}").options == {"gamma": 1e-3}
    assert parse("--options.gamma=1e-3", "--options.init", ".5").options == {"gamma": 1e-3, "init": 0.5}
    assert parse("--model_options.normalization", "cifar10").model_options == {"normalization": "cifar10"}


def test_a_flag_is_true_alone_and_false_when_told():
    assert parse("--download").download is True
    assert parse("--download", "false").download is False
    assert "download" not in parse()


@pytest.mark.parametrize("name", list(presets.PRESETS))
def test_every_preset_builds(name):
    registered, settings = presets.preset(name, eot=3)
    attack = ATTACKS.entry(registered).load()(**settings)
    assert attack.eot == (3 if name.startswith("eot-") else 1)


@pytest.mark.parametrize("name", list(presets.PRESETS))
@pytest.mark.parametrize("average", presets.AVERAGES)
def test_every_preset_with_draws_averages_what_is_asked(name, average):
    registered, settings = presets.preset(name, eot=3, average=average)
    entry = ATTACKS.entry(registered)
    attack, usual = (entry.load()(**{**entry.arguments, **own}) for own in (settings, presets.preset(name, eot=3)[1]))
    assert attack.eot_average == (average if attack.eot > 1 else usual.eot_average)


@pytest.mark.parametrize("name", list(presets.PRESETS))
def test_every_preset_of_pgd_holds_its_draws_if_asked_and_others_say_that_they_cannot(name):
    if "pgd" in name and "apgd" not in name:
        registered, settings = presets.preset(name, eot=3, draws="held")
        assert ATTACKS.entry(registered).load()(**settings).eot_draws == "held"
    elif name == "fgsm":
        assert presets.preset(name, eot=3, draws="held") == ("fgsm", {})  # a single step has nothing to hold
    else:
        with pytest.raises(ConfigError, match=f"eot_draws is 'held', which preset '{name}' cannot do"):
            presets.preset(name, eot=3, draws="held")
    assert presets.preset(name, eot=3, draws="fresh")[0] == presets.preset(name, eot=3)[0]


@pytest.mark.parametrize("wrong", [{"average": "logit"}, {"draws": "hold"}])
def test_another_average_or_way_to_draw_is_refused(wrong):
    with pytest.raises(ConfigError, match="allowed"):
        presets.preset("eot-pgd20", eot=3, **wrong)


def test_an_attack_in_full():
    name, settings = parse_attack("pgd:steps=20,step_size=2/255, eot=10")
    assert (name, settings) == ("pgd", {"steps": 20, "step_size": 2 / 255, "eot": 10})
    assert parse_attack("fgsm") == ("fgsm", {})


@pytest.mark.parametrize("digits", [400, 5000])
@pytest.mark.parametrize("words", [("--options.gamma",), ("--seed",), ("--epochs",), ("--lr",)], ids=" ".join)
def test_a_number_of_absurd_length_is_refused(words, digits, monkeypatch, capsys, tmp_path):
    """Python refuses to read more than 4,300 digits, and a loop over more than 64 bits hold never ends."""
    monkeypatch.chdir(tmp_path)
    base = ["train", "--dataset=digits", "--model=digits_cnn", "--recipe=fast", "--limit=8", "--device=cpu"]
    assert main([*base, *words, "9" * digits]) == 2
    assert "unexpected" not in capsys.readouterr().err


@pytest.mark.parametrize("text", ["pgd:eps=" + "9" * 5000, "pgd:steps=" + "9" * 400])
def test_an_attack_of_absurd_length_is_refused(text):
    name, settings = parse_attack(text)
    with pytest.raises(ConfigError):
        ATTACKS.entry(name).load()(**settings)


WORDS = [
    (entry.name, name, kind)
    for entry in ATTACKS
    if not entry.said("needs")
    for name, kind in kinds_of(entry.load()).items()
    if kind.startswith("Literal")
]


@pytest.mark.parametrize(("attack", "name", "kind"), WORDS, ids=[f"{attack}-{name}" for attack, name, _ in WORDS])
def test_a_setting_of_an_attack_that_takes_certain_words_takes_each_and_no_other(attack, name, kind):
    words = get_args(eval(kind, {"Literal": Literal}))  # an annotation of our own source
    assert len(words) > 1
    for word in words:
        assert convert(kind, word) == word
        build_attacks({"row": (attack, {name: word})})
    with pytest.raises(ConfigError, match=f"attack 'row': {name}: 'other' is none of {', '.join(words)}"):
        build_attacks({"row": (attack, {name: "other"})})
