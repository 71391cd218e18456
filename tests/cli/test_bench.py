"""``learn2perturb bench``: what the baseline code does, what the roofline counts, who runs when, what is printed."""

from __future__ import annotations

import json
import pathlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from learn2perturb.cli.bench import baseline, roofline, settings, step, timing
from learn2perturb.cli.bench.scene import MODES, Scene
from learn2perturb.cli.main import main
from learn2perturb.data import load_data
from learn2perturb.engine import execution
from learn2perturb.noise import is_stochastic, noise_parameters
from learn2perturb.progress import Reporter

CPU = torch.device("cpu")
# Noise per batch is not compiled; compiling takes seconds.
DIGITS = ("--dataset=digits", "--device=cpu", "--batch-size=16", "--rounds=2")
NETWORK = ("--model=digits_cnn", "--attack-steps=2", "--sharing=per_batch")


def measured(capsys, *words):
    assert main(["bench", *words, "--json"]) == 0
    printed = capsys.readouterr()
    assert "timing" in printed.err
    return json.loads(printed.out)


def scene_of(what="step", **given):
    digits = {"dataset": "digits", "device": "cpu", "batch_size": 8}
    network = {} if what == "data" else {"model": "digits_cnn", "attack_steps": 3}
    return Scene.of(settings.BenchSettings.of(what, digits | network | given))


# --- the baseline


def test_the_attack_of_the_baseline_makes_and_accumulates_the_gradients_of_all_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    times = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda tensor: times.append(tensor.grad.clone()))
    x, y = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])
    adversarial = baseline.attack(model, x, y, eps=0.1, step_size=0.04, steps=3, eot=2)
    assert len(times) == 3 * 2 * 2  # steps, draws, weight and bias
    assert not torch.equal(times[-1], times[0])  # accumulated, never cleared
    assert (adversarial - x).abs().max() <= 0.1 + 1e-6
    assert F.cross_entropy(model(adversarial), y) > F.cross_entropy(model(x), y)


def test_the_noise_of_the_baseline_is_one_map_a_pass_for_the_whole_batch():
    data = load_data("digits", limit=8)
    model = baseline.network("digits_cnn", data, noise=True, device=CPU).eval()
    x = (data.images[:1].float() / 255).expand(5, -1, -1, -1)
    first, then = model(x), model(x)
    assert torch.allclose(first, first[:1].expand(5, -1), atol=1e-6)
    assert not torch.allclose(first, then, atol=1e-3)


def test_the_step_of_the_baseline_trains_weights_and_theta():
    config = step.config_of(scene_of().settings, "plain", "cpu")
    data = load_data("digits", limit=8)
    model = baseline.network("digits_cnn", data, noise=True, device=CPU)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    baseline.training_step(model, config)(data.images.float() / 255, data.labels)
    assert not any(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert min(theta.min() for theta in noise_parameters(model)) >= 0.01


def test_images_one_by_one_are_crops_and_mirrors_of_the_padded_image():
    scene = Scene.of(settings.BenchSettings.of("data", {"images": 1}))
    image = F.pad(scene.data.images[0].float() / 255, (4,) * 4)
    crops = [image[:, top : top + 32, left : left + 32] for top in range(9) for left in range(9)]
    allowed = torch.stack(crops + [crop.flip(-1) for crop in crops])
    loaded = [baseline.OneByOne(scene.data)[0] for _ in range(20)]
    found = {int((allowed == crop).flatten(1).all(1).nonzero()[0]) for crop, _ in loaded}
    assert len(found) > 10
    assert max(found) >= len(crops) > min(found)  # mirrored ones, and others
    assert {label for _, label in loaded} == {int(scene.data.labels[0])}


# --- the roofline

OUTPUTS = (4 * 8 * 8, 5 * 4 * 4, 7)
FLOPS = (2 * 4 * 8 * 8 * 3 * 9, 2 * 5 * 4 * 4 * 4 * 9, 2 * 7 * 80)


@pytest.mark.parametrize("weights", [False, True])
def test_the_flops_and_values_of_a_pass_have_their_closed_form(weights):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3, stride=2, padding=1), nn.Flatten(),
        nn.Linear(80, 7),
    )  # fmt: skip
    work = roofline.one_pass(model, torch.rand(2, 3, 8, 8), weights=weights)
    # Forward, then a gradient of as many FLOPs for each input; with weights a third, but no gradient of the images.
    expected = 3 * sum(FLOPS) - FLOPS[0] if weights else 2 * sum(FLOPS)
    assert work == roofline.Work(flops=expected, values=4 * sum(OUTPUTS))


def test_the_roofline_is_arithmetic_and_draws_or_traffic_whichever_is_longer():
    rates = roofline.Rates(torch.bfloat16, flops=1e3, bytes=1e2, draws=1e1)
    result = rates.roofline(roofline.Work(flops=2000, values=100, draws=5))
    assert (result["arithmetic_seconds"], result["noise_seconds"], result["traffic_seconds"]) == (2.0, 0.5, 2.0)
    assert result["seconds"] == 2.5
    assert rates.roofline(roofline.Work(flops=2000, values=500, draws=5))["seconds"] == 10.0


def test_rates_are_of_this_machine_and_plausible():
    rates = roofline.measure_rates(CPU, torch.float32)
    assert 1e9 < rates.flops < 1e14
    assert 1e8 < rates.bytes < 1e13
    assert 1e7 < rates.draws < 1e12


@pytest.mark.parametrize(("sharing", "rows"), [("per_example", 128), ("per_batch", 1)])
def test_what_a_step_of_resnet20_needs(sharing, rows):
    scene = Scene.of(settings.BenchSettings.of("step", {"sharing": sharing, "device": "cpu"}))
    work = step.needed(scene)
    assert work.draws == 102_400 * rows * 9  # the features of ten sites, seven passes that attack and two that train
    # FLOPs of one image, layer by layer; shortcuts have no weights.
    stem = 2 * 32**2 * 16 * 27
    stages = 6 * 2 * 32**2 * 16 * 144
    stages += 2 * 16**2 * 32 * 144 + 5 * 2 * 16**2 * 32 * 288
    stages += 2 * 8**2 * 64 * 288 + 5 * 2 * 8**2 * 64 * 576
    forward = stem + stages + 2 * 64 * 10
    assert work.flops == 128 * (7 * 2 * forward + 2 * (3 * forward - stem))


# --- who runs when, and how much memory it takes


def test_workers_run_in_turn_after_one_warm_up_each():
    log = []
    workers = {name: timing.Worker(lambda name=name: log.append(name)) for name in "ab"}
    workers["c"] = timing.Worker(lambda: log.append("c"), warm=lambda: log.append("warm c"))
    result = timing.in_turn(workers, 2, CPU, Reporter(False), "")
    assert log == ["a", "b", "warm c", "a", "b", "c", "a", "b", "c"]
    assert {name: len(found.seconds) for name, found in result.items()} == {"a": 2, "b": 2, "c": 2}


def test_the_ratio_is_the_median_of_pairs_and_the_warm_up_is_not_counted():
    ours, theirs = timing.Timing(99.0, (1.0, 2.0, 4.0), 1), timing.Timing(99.0, (2.0, 6.0, 8.0), 1)
    assert ours.ratio_to(theirs) == 2.0
    assert ours.summary(10)["images_per_second"] == 5.0
    assert ours.summary(10)["warmup_seconds"] == 99.0


@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="the peak of a part needs Linux")
def test_the_peak_of_memory_is_each_workers_own():
    workers = {"large": timing.Worker(lambda: torch.ones(1 << 26)), "small": timing.Worker(lambda: torch.ones(1))}
    result = timing.in_turn(workers, 1, CPU, Reporter(False), "")
    assert result["large"].peak - result["small"].peak > 0.9 * (1 << 28)


def test_threads_are_given_back_also_on_failure():
    before = torch.get_num_threads()

    def fail():
        with timing.threads(before + 1):
            assert torch.get_num_threads() == before + 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.get_num_threads() == before


# --- the parts of a step


def passes(monkeypatch, call):
    """Return how many forward passes of the digits network a call makes, after its first."""
    from learn2perturb.models.digits_cnn import DigitsCNN

    call()
    count = []
    forward = DigitsCNN.forward
    monkeypatch.setattr(DigitsCNN, "forward", lambda self, x: (count.append(is_stochastic(self)), forward(self, x))[1])
    call()
    monkeypatch.undo()
    return len(count), set(count)


@pytest.mark.parametrize("name", ["baseline", "plain"])
def test_a_step_without_one_of_its_parts_lacks_that_part_alone(name, monkeypatch):
    scene = scene_of()

    def made(**left):
        return step.baseline_call(scene, **left) if name == "baseline" else step.package_call(scene, name, **left)

    assert passes(monkeypatch, made()) == (3 + 2, {True})
    assert passes(monkeypatch, made(attack=False)) == (2, {True})
    assert passes(monkeypatch, made(noise=False)) == (3 + 2, {False})


# --- the verb


@pytest.fixture(scope="module")
def fast_here():
    return execution.has_native_bfloat16(CPU)


def check_modes(result, fast_here):
    """One object for each execution mode, and one for the roofline, whatever is measured."""
    assert set(result) == {"baseline", *MODES, "roofline"}
    for name, row in result.items():
        if name == "fast" and not fast_here:
            assert set(row) == {"unavailable"}
            continue
        assert row["seconds"] > 0
        assert row["images_per_second"] > 0
        assert row["settings"]["dataset"] == "digits"
        assert row["settings"]["threads"] == torch.get_num_threads()
    assert result["roofline"]["environment"]["torch"] == torch.__version__


def check_numbers(row, images):
    assert row["images_per_second"] == pytest.approx(images / row["seconds"])
    assert row["fastest"] <= row["seconds"] <= row["slowest"]
    assert row["baseline_ratio"] > 0
    assert 0 < row["roofline_share"] < 1
    assert row["warmup_seconds"] > 0
    assert row["peak_memory_bytes"] > 2**24
    assert row["rounds"] == 2


def test_bench_step(capsys, fast_here):
    result = measured(capsys, "step", *DIGITS, *NETWORK)
    check_modes(result, fast_here)
    for name in ("baseline", "plain", *(["fast"] if fast_here else []), "fast32"):
        check_numbers(result[name], images=16)
        assert 0 < result[name]["attack_share"] < 1
        assert 0 <= result[name]["noise_share"] < 1
    assert result["baseline"]["baseline_ratio"] == 1
    assert result["roofline"]["dtype"] == ("bfloat16" if fast_here else "float32")
    assert result["plain"]["settings"]["sharing"] == "per_batch"


def test_bench_attack(capsys, fast_here):
    result = measured(capsys, "attack", *DIGITS, *NETWORK, "--images=20", "--eot=2")
    check_modes(result, fast_here)
    for name in ("baseline", "plain", *(["fast"] if fast_here else []), "fast32"):
        for attack in ("pgd2", "eot-pgd2"):
            check_numbers(result[name][attack], images=20)
        parts = [result[name][attack]["seconds"] for attack in ("pgd2", "eot-pgd2")]
        assert result[name]["seconds"] == pytest.approx(sum(parts))
    assert result["roofline"]["eot-pgd2"]["flops"] == 2 * result["roofline"]["pgd2"]["flops"]


def test_bench_attack_without_noise_leaves_eot_out(capsys):
    result = measured(capsys, "attack", *DIGITS, *NETWORK, "--images=4", "--defense=pgd_at")
    assert "pgd2" in result["plain"]
    assert "eot-pgd2" not in result["plain"]
    assert result["roofline"]["pgd2"]["draws"] == 0


def test_bench_data(capsys, fast_here):
    result = measured(capsys, "data", *DIGITS, "--images=40")
    check_modes(result, fast_here)
    for name in ("baseline", "plain"):
        check_numbers(result[name], images=40)
    assert result["roofline"]["bytes"] == 40 * 8 * 8 * 5


@pytest.mark.parametrize("what", ["step", "attack", "data"])
def test_the_table_says_what_was_measured_and_what_is_not_to_be_had(what, capsys, monkeypatch):
    monkeypatch.setattr(execution, "has_native_bfloat16", lambda device: False)
    network = () if what == "data" else NETWORK
    images = () if what == "step" else ("--images=8",)
    assert main(["bench", what, *DIGITS, *network, *images, "--rounds=1"]) == 0
    text = capsys.readouterr().out
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line}
    assert {"baseline", "plain", "roofline"} <= set(lines)
    assert "x baseline" in text
    assert "1 round, medians" in text
    assert "GB/s" in text
    assert "fast: engine 'fast' needs bfloat16 in hardware" in text


def test_threads_of_the_command_are_used_and_given_back(capsys):
    before = torch.get_num_threads()
    result = measured(capsys, "data", *DIGITS, "--images=16", "--threads=2")
    assert result["roofline"]["environment"]["torch_threads"] == 2
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        ([], "WHAT"),
        (["stpe"], "did you mean 'step'"),
        (["step", "--defense", "none"], "allowed: pgd_at, learn2perturb"),
        (["step", "--sharing", "both"], "allowed: per_example, per_batch"),
        (["step", "--model", "resnet2"], "did you mean"),
        (["step", "--rounds", "0"], "at least 1"),
        (["step", "--threads", "0"], "at least 1"),
        (["step", "--seed", "-1"], "at least 0"),
        (["step", "--eot", "3"], "--eot means nothing in 'bench step'; leave it out"),
        (["attack", "--workers", "3"], "leave it out"),
        (["data", "--model", "resnet20"], "leave it out"),
        (["data", "--dataset", "cifra10"], "did you mean 'cifar10'"),
        (["data", "--data-dir", "nowhere"], "cifar10"),
        (["step", "--device", "cuda:99"], "use cpu or cuda"),
    ],
)
def test_bad_input_is_one_line_that_names_the_fix(words, fix, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *words]) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("learn2perturb: error: ")
    assert fix in error[-1]
