"""The substitute network: a small network trained on a model's own answers, to be attacked in its place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from learn2perturb.attacks.balls import BALLS, Ball
from learn2perturb.attacks.base import Attack
from learn2perturb.attacks.gradients import mean_logits
from learn2perturb.attacks.inputs import check_pixels
from learn2perturb.attacks.pgd import PGD
from learn2perturb.attacks.probing import apart
from learn2perturb.attacks.query import Model, Query
from learn2perturb.checks import check_choice, check_count, check_size
from learn2perturb.engine.answers import logits_of
from learn2perturb.engine.identity import fingerprint
from learn2perturb.engine.modes import in_mode, own_modes
from learn2perturb.engine.random import isolated_rng, seed_everything
from learn2perturb.errors import ConfigError
from learn2perturb.progress import Progress

Answers = Callable[[Tensor], Tensor]  # from images (n, C, H, W) to the model's averaged logits (n, K)

_BATCH = 128
# Of every round of training: passes over what is known, and updates at least, since the first rounds know little.
_EPOCHS, _UPDATES = 8, 50
_LR = 2e-3
# The gap of the median image between its two largest logits, in the answers that are learned: saturated logits, tiny
# ones and probabilities all become soft targets of one kind, while the order and the ratios of the gaps stay.
_GAP = 4.0
_STEPS = 3  # of the walk away from the answers, in a new query
_LOOKED_AT = 512  # images in one pass of the substitute without training
_PROBED = 16  # images whose answers tell whether a kept substitute is of this model
_WALK = 40  # steps of PGD on the substitute, which cost no query


def distil(
    model: Model,
    images: Tensor,
    *,
    queries: int,
    seed: int,
    draws: int = 1,
    network: nn.Module | None = None,
    progress: Progress | None = None,
    eps: float = 8 / 255,
    norm: str = "linf",
) -> nn.Module:
    """Return a network trained to answer as ``model`` does at ``images`` and near them, in eval mode.

    Papernot et al., Practical black-box attacks against machine learning, 2017, https://arxiv.org/abs/1602.02697. The
    queries are the images themselves and then, in rounds that double what is known, points of their balls: half of them
    random, half reached by walking away from the model's answer along the substitute's gradient. Only values of the
    model are read, so it may have no gradient. The result does, with respect to its images.

    Args:
        model: any callable from images in [0, 1] (N, C, H, W) to logits (N, K); probabilities and votes will do.
        images: (N, C, H, W) in [0, 1], those to be attacked, or others of their kind; a sample of them if there are
            more than ``queries``.
        queries: images that the model is asked about, in all; each costs ``draws`` passes.
        seed: the same seed gives the same substitute; the caller's random generators are left alone.
        draws: passes whose mean probability is one answer, for a stochastic model.
        network: the substitute before its training, of which a copy is trained; by default a small convolutional one.
        progress: called with (queries made, queries in all, what is going on).
        eps: radius of the ball in which the model is asked, [0, 1] pixel scale.
        norm: of that ball, ``"linf"`` or ``"l2"``.

    Raises:
        ConfigError: a setting is not allowed, or ``network`` gives other classes than the model.
        InputError: images or answers are not as said above.
    """
    check_pixels(model, images)
    check_count("queries", queries)
    check_count("draws", draws)
    check_choice("norm", norm, tuple(BALLS))
    check_size("eps", eps, norm=norm, zero=True)
    if network is not None and not isinstance(network, nn.Module):
        raise ConfigError(f"network is a {type(network).__name__}, must be a module to train, from images to logits")

    def answers(x: Tensor) -> Tensor:
        with torch.no_grad():
            return mean_logits(lambda part: logits_of(model, part), x, draws, "probability")

    with own_modes(), in_mode(model, False), isolated_rng():
        seed_everything(seed, "substitute")
        return train(answers, images.detach(), queries, BALLS[norm], eps, network, progress)


@final
class Asked:
    """Images that substitutes are trained on, with the last one, so that batches of one evaluation share it."""

    def __init__(self, images: Tensor) -> None:
        self.images = images
        self.digest = fingerprint([("images", images)])
        self._kept: tuple[object, Tensor, nn.Module] | None = None

    def __repr__(self) -> str:
        return f"{len(self.images)} images {self.digest[:12]}"

    def substitute(self, settings: object, answers: Answers, build: Callable[[Tensor], nn.Module], x: Tensor) -> Any:
        """Return the substitute of these ``settings`` for the model of these ``answers``; ``x`` says type and place."""
        images = self.images.to(x)
        # By its answers, not by identity: noise that is switched off and weights that have moved make another model.
        with apart("substitute", "probe"):
            probe = answers(images[:_PROBED].clone())
        if self._kept is None or self._kept[0] != settings or not torch.equal(self._kept[1], probe):
            with isolated_rng():
                seed_everything("substitute")  # not the batch's seed: whichever batch comes first trains the same
                self._kept = settings, probe, build(images)
        return self._kept[2]


@final
@dataclass(frozen=True)
class Surrogate(Attack):
    """Train a substitute network on the model's own answers (:func:`distil`), attack that, and transfer.

    Papernot et al., Practical black-box attacks against machine learning, 2017, https://arxiv.org/abs/1602.02697.
    An answer averages ``eot`` passes of a stochastic model. Without ``data`` the images attacked are those asked about,
    so every batch has a substitute of its own; with ``data`` all batches share one, trained when the first of them
    comes.

    Attributes:
        queries: images that the model is asked about for a substitute, in all; ``eot`` passes each.
        attack: on the substitute, with its norm, loss and aim; None is PGD with 40 steps.
        data: images (M, C, H, W) in [0, 1] to ask about, instead of those attacked.
        network: the substitute before its training; None is a small convolutional network.
    """

    queries: int = field(default=5000, kw_only=True)
    attack: Attack | None = field(default=None, kw_only=True)
    data: Any = field(default=None, kw_only=True)
    network: Any = field(default=None, kw_only=True)

    needs_gradient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.attack is not None:
            if not isinstance(self.attack, Attack) or not self.attack.needs_gradient:
                raise ConfigError(f"attack must be one by gradients such as PGD(eps=8/255), got {self.attack!r}")
            for name in ("norm", "loss", "targeted"):
                object.__setattr__(self, name, getattr(self.attack, name))  # the spec is frozen once it is made
        super().__post_init__()
        check_count("queries", self.queries)
        if self.network is not None and not isinstance(self.network, nn.Module):
            raise ConfigError(f"network is a {type(self.network).__name__}, must be a module to train, or None")
        if self.data is not None and not isinstance(self.data, Asked):
            check_pixels(len, self.data)
            object.__setattr__(self, "data", Asked(self.data.detach()))

    def perturb(self, query: Query, x: Tensor, y: Tensor) -> Tensor:
        """Return what the attack finds on the substitute; costs ``queries * eot`` forward passes in all."""
        average = "logits" if self.eot_average == "logits" else "probability"

        def answers(images: Tensor) -> Tensor:
            with torch.no_grad():
                return mean_logits(query.logits, images, self.eot, average)  # type: ignore[arg-type]

        def build(images: Tensor) -> nn.Module:
            return train(answers, images, self.queries, self.ball, self.eps, self.network)

        if self.data is None:
            substitute = build(x)
        else:
            settings = self.queries, self.norm, self.eps, self.eot, average, id(self.network), x.dtype, x.device
            substitute = self.data.substitute(settings, answers, build, x)
        aim: dict[str, Any] = {"norm": self.norm, "loss": self.loss, "targeted": self.targeted}
        inner = PGD(self.eps, steps=_WALK, **aim) if self.attack is None else self.attack.resized(self.eps)
        return replace(inner, eot=1).craft(substitute, x, y)


def train(
    answers: Answers,
    images: Tensor,
    queries: int,
    ball: Ball,
    eps: float,
    network: nn.Module | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    """Return the substitute, drawing from torch's generators as they are; nothing here waits for the device."""
    draw = _Draws()
    x = images[draw.permutation(len(images))[:queries].to(images.device)]
    z = answers(x)
    gaps = z.topk(2, dim=1).values
    scale = ((gaps[:, 0] - gaps[:, 1]).median() / _GAP).clamp_min(torch.finfo(z.dtype).tiny)
    known, target = x, (z / scale).softmax(dim=1)
    substitute = _fresh(network, x, z.shape[1])
    while True:
        if progress is not None:
            progress(len(known), queries, "training a substitute")
        _fit(substitute, known, target, draw)
        room = min(queries - len(known), len(known))
        if room < 1:
            return substitute.eval().requires_grad_(False)
        rows = draw.rows(len(x), room).to(x.device)
        new = _near(substitute, x[rows], target[: len(x)][rows], ball, eps, draw)
        known, target = torch.cat([known, new]), torch.cat([target, (answers(new) / scale).softmax(dim=1)])


@final
class Substitute(nn.Module):
    """Three or four convolutions and a linear layer: a pass of a 32 x 32 image is 20 million multiplications."""

    def __init__(self, channels: int, side: int, num_classes: int) -> None:
        super().__init__()
        widths = (32, 64, 64, 128) if side >= 16 else (16, 32, 32)
        strides = (1, 2, 1, 2)
        layers: list[nn.Module] = []
        for width, stride in zip(widths, strides, strict=False):
            # Group norm: the substitute is the same function of an image in training and after it.
            layers += [nn.Conv2d(channels, width, 3, stride, padding=1, bias=False), nn.GroupNorm(8, width), nn.ReLU()]
            channels = width
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.head = nn.Linear(16 * channels, num_classes)

    @classmethod
    def of(cls, x: Tensor, num_classes: int) -> Substitute:
        """Return an untrained one for images like ``x`` (N, C, H, W), in their type and place."""
        return cls(x.shape[1], min(x.shape[2:]), num_classes).to(x)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) in [0, 1] to logits (N, K)."""
        logits: Tensor = self.head(self.pool(self.features(4 * x - 2)).flatten(1))
        return logits


@final
class _Draws:
    """A generator of our own: a model may seed torch's at every pass."""

    def __init__(self) -> None:
        self.generator = torch.Generator()
        self.generator.set_state(torch.get_rng_state())

    def permutation(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self.generator)

    def rows(self, n: int, count: int) -> Tensor:
        """Return ``count`` numbers below ``n``, each as often as any other, as far as that goes."""
        return torch.cat([self.permutation(n) for _ in range(-(-count // n))])[:count]

    def normal(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator, dtype=like.dtype).to(like.device)

    def share(self, like: Tensor) -> Tensor:
        """Return one number in [0, 1) an image, (N, 1, 1, 1)."""
        return torch.rand(len(like), 1, 1, 1, generator=self.generator, dtype=like.dtype).to(like.device)


def _fresh(network: nn.Module | None, x: Tensor, num_classes: int) -> nn.Module:
    """Return a substitute to be trained, in the type and the place of the images.

    Raises:
        ConfigError: the network that was given has other classes.
    """
    if network is None:
        return Substitute.of(x, num_classes)
    substitute = copy.deepcopy(network).to(x).requires_grad_(True)
    with torch.no_grad():
        classes = substitute.eval()(x[:2]).shape[1]
    if classes != num_classes:
        raise ConfigError(f"network gives {classes} classes and the model {num_classes}; build it with num_classes")
    return substitute


def _fit(substitute: nn.Module, x: Tensor, target: Tensor, draw: _Draws) -> None:
    """Train on what is known, by Adam with a rate that falls to 0."""
    batches = -(-len(x) // _BATCH)
    updates = max(_EPOCHS * batches, _UPDATES)
    optimizer: Any = torch.optim.Adam(substitute.parameters(), _LR, fused=True)
    substitute.train()
    done = 0
    while done < updates:
        for rows in draw.permutation(len(x)).to(x.device).chunk(batches)[: updates - done]:
            optimizer.param_groups[0]["lr"] = _LR * (1 - done / updates)
            loss = functional.cross_entropy(substitute(x[rows]), target[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1


def _near(substitute: nn.Module, x: Tensor, target: Tensor, ball: Ball, eps: float, draw: _Draws) -> Tensor:
    """Return a point of each image's ball: half of them random, half by steps away from the answer ``target``."""
    reach = eps * draw.share(x)
    points = x + ball.step(draw.normal(x), 1.0) * reach
    half = len(x) // 2
    substitute.eval()
    walked = []
    for near, centre, answer in zip(
        points[:half].split(_LOOKED_AT), x[:half].split(_LOOKED_AT), target[:half].split(_LOOKED_AT), strict=True
    ):
        for _ in range(_STEPS):
            leaf = near.clamp(0, 1).detach().requires_grad_()
            loss = functional.cross_entropy(substitute(leaf), answer.argmax(dim=1), reduction="sum")
            (gradient,) = torch.autograd.grad(loss, leaf)
            near = ball.project(leaf.detach() + ball.step(gradient, eps / 2), centre, eps)
        walked.append(near)
    return torch.cat([*walked, points[half:]]).clamp(0, 1)
