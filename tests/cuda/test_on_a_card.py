"""What only a CUDA card can show: real graphs, compiled passes with their noise, parity of the modes, resuming."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import learn2perturb as l2p
from learn2perturb.data import ImageData
from learn2perturb.defenses import list_defenses
from learn2perturb.engine import execution
from learn2perturb.errors import NonFiniteError
from learn2perturb.progress import Reporter
from learn2perturb.training import TrainConfig
from learn2perturb.training.state import Training

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"),
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("default"),  # a card's machine has other versions of torch, and of what warns
]
CUDA = torch.device("cuda")
ROWS = 16


def images(count: int = 2 * ROWS + 4) -> ImageData:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)
    half = (0.5,) * 3
    return ImageData(
        "noise", pixels, torch.arange(count) % 3, ("a", "b", "c"), flip=True, crop_padding=1, mean=half, std=half
    )


def trained(defense: str, mode: execution.ExecutionMode, *, epochs: int = 4, out=None, **settings) -> Training:
    config = TrainConfig(
        defense=defense, model="resnet20", recipe="fast", epochs=epochs, batch_size=ROWS, attack_steps=2, monitor=0,
        device="cuda", **settings,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execution, "select", lambda *_, **__: mode)
        training = Training(config.resolve(), None, images(), None, Reporter(False))
    with execution.running(training.mode), torch.backends.cudnn.flags(True, deterministic=True, allow_tf32=False):
        for epoch in range(epochs):
            training.epoch = epoch
            for batch, (x, y) in enumerate(training.source.epoch(epoch)):
                training.batch = batch
                training.run_step(x, y)
    torch.cuda.synchronize()
    return training


LAUNCHED = dataclasses.replace(
    execution.CUDA, dtype=None, recording=False, compiled_training=False, tuned_convolutions=False
)
RECORDED = dataclasses.replace(LAUNCHED, recording=True)


@pytest.mark.parametrize("defense", ["none", "pgd_at", "trades", "learn2perturb", "pni", "adv_bnn"])
def test_a_replayed_graph_trains_as_launched_kernels_do(defense):
    """Without noise the same to rounding; with noise, other draws: finite, moved, and recorded at all."""
    replayed, launched = trained(defense, RECORDED), trained(defense, LAUNCHED)
    assert replayed.recorded is not None and replayed.recorded.usable
    assert sum(r.replay is not None for r in replayed.recorded._known.values()) >= 1
    ours, theirs = replayed.totals.means()["loss"], launched.totals.means()["loss"]
    # A random start of the attack is another draw in a graph, and 48 steps at lr .1 amplify it.
    assert ours == pytest.approx(theirs, rel=1e-3 if defense == "none" else 0.3)
    for name, value in replayed.model.state_dict().items():
        assert torch.isfinite(value).all(), name


def test_the_draws_of_replays_are_fresh_and_follow_the_seed():
    first, again = trained("learn2perturb", RECORDED), trained("learn2perturb", RECORDED)
    other = trained("learn2perturb", RECORDED, seed=1)
    losses = [run.totals.means()["loss"] for run in (first, again, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0] != pytest.approx(losses[2], rel=1e-4)


def noisy_network(sharing: str = "per_example", distribution: str = "gaussian") -> torch.nn.Module:
    torch.manual_seed(0)
    network = l2p.build_model("resnet20", num_classes=10, input_shape=(3, 16, 16))
    return l2p.perturb(network, input_shape=(3, 16, 16), sharing=sharing, distribution=distribution).to(CUDA).eval()


COMPILED = dataclasses.replace(execution.CUDA, dtype=None, compiled_rows=ROWS)


def compiled_logits(
    network: torch.nn.Module, x: torch.Tensor, mode: execution.ExecutionMode = COMPILED
) -> torch.Tensor:
    with execution.running(mode), execution.attacking(network, x, True):
        return network(x.clone().requires_grad_()).detach()


@pytest.mark.parametrize("distribution", ["gaussian", "laplace", "uniform"])
def test_compiled_noise_differs_over_rows_and_passes_and_has_unit_variance(distribution):
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Identity())
    network = l2p.perturb(layer, input_shape=(3, 64, 64), sites=["0"], distribution=distribution, init=1.0).to(CUDA)
    network.requires_grad_(False)
    first, second = (compiled_logits(network, torch.zeros(ROWS, 3, 64, 64, device=CUDA)) for _ in range(2))
    assert not torch.equal(first, second)
    assert (first[0] - first[1]).abs().mean().item() > 0.5
    numbers = torch.cat([first.flatten(), second.flatten()])
    assert numbers.mean().abs().item() < 5 / numbers.numel() ** 0.5
    assert numbers.std().item() == pytest.approx(1.0, abs=0.01)
    assert torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1].abs().item() < 0.02
    assert torch.corrcoef(first.flatten(1)[:2])[0, 1].abs().item() < 0.05


def test_one_compiled_map_a_batch_where_draws_are_shared():
    network = noisy_network("per_batch").requires_grad_(False)
    x = torch.rand(1, 3, 16, 16, device=CUDA).expand(ROWS, -1, -1, -1).contiguous()
    rows = compiled_logits(network, x)
    torch.testing.assert_close(rows, rows[:1].expand_as(rows), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(compiled_logits(network, x), rows)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_compiled_pass_is_the_same_function(dtype):
    network = noisy_network().requires_grad_(False)
    x = torch.rand(ROWS, 3, 16, 16, device=CUDA)
    tolerance = 1e-3 if dtype is None else 0.1
    with l2p.noise_disabled(network):
        plain = network(x)
        mode = dataclasses.replace(COMPILED, dtype=dtype)
        with execution.running(mode), execution.autocast("cuda"), execution.attacking(network, x, True):
            found = network(x.clone().requires_grad_()).detach().float()
    torch.testing.assert_close(found, plain, rtol=tolerance, atol=tolerance)


def test_a_loss_that_is_not_finite_freezes_the_weights():
    training = trained("pgd_at", RECORDED, epochs=2)
    before = {name: p.detach().clone() for name, p in training.model.named_parameters()}
    x, y = next(iter(training.source.epoch(0)))
    with execution.running(training.mode):
        training.run_step(torch.full_like(x, float("nan")), y)
        training.run_step(x, y)
    for name, parameter in training.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    with pytest.raises(NonFiniteError):
        training.check_finite()


def test_attacks_and_scores_are_those_of_the_cpu():
    torch.manual_seed(0)
    network = l2p.build_model("resnet20", num_classes=10, input_shape=(3, 16, 16)).eval()
    data = (torch.rand(64, 3, 16, 16), torch.arange(64) % 10)
    attacks = {"pgd": l2p.attacks.PGD(8 / 255, 2 / 255, 5, random_start=False)}
    here = l2p.evaluate(network, data, attacks, device="cpu")
    there = l2p.evaluate(network.to(CUDA), data, attacks)
    for ours, theirs in zip(there.rows, here.rows, strict=True):
        assert abs(ours.accuracy - theirs.accuracy) <= 2 / 64


@pytest.mark.parametrize("defense", list_defenses())
def test_every_defense_trains_in_the_fast_mode(defense):
    """Two epochs of the package's own call: whatever cannot be recorded is launched, and nothing is not finite."""
    config = l2p.TrainConfig(
        defense=defense, model="digits_cnn", dataset="digits", recipe="fast", epochs=2, batch_size=64, limit=256,
        attack_steps=2, monitor=64, device="cuda", engine="fast", tensorboard=False,
    )  # fmt: skip
    run = l2p.train(config, progress=False)
    assert all(line["loss"] == line["loss"] for line in run.metrics)


def test_a_run_is_resumed_on_the_card(tmp_path):
    config = l2p.TrainConfig(
        defense="learn2perturb", model="digits_cnn", dataset="digits", recipe="fast", epochs=2, batch_size=64,
        limit=256, attack_steps=2, monitor=0, device="cuda", engine="fast", tensorboard=False,
    )  # fmt: skip
    l2p.train(config, out=tmp_path, progress=False)
    import shutil

    newest = sorted((tmp_path / "checkpoints").iterdir())[-1]
    shutil.rmtree(newest)
    run = l2p.train(config, out=tmp_path, progress=False)
    assert [line["epoch"] for line in run.metrics] == [0, 1]
