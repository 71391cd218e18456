"""What every attack shares: the spec's checks and the caller that validates, sets modes, clips, counts, verifies."""

from __future__ import annotations

import contextlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self, final

import torch
from torch import Tensor, nn

from learn2perturb.attacks.balls import BALLS, NORMS, Ball
from learn2perturb.attacks.gradients import AVERAGES, Average
from learn2perturb.attacks.inputs import TOLERANCE, check_images
from learn2perturb.attacks.losses import LOSSES
from learn2perturb.attacks.query import Model, Query
from learn2perturb.brief import brief
from learn2perturb.checks import check_choice, check_count, check_size
from learn2perturb.engine import execution
from learn2perturb.engine.answers import check_weights, fitting
from learn2perturb.engine.modes import in_mode, one_image_explained, own_modes
from learn2perturb.engine.random import isolated_rng, seed_everything
from learn2perturb.engine.shapes import Images, Labels
from learn2perturb.errors import ConfigError, InputError, Learn2PerturbError
from learn2perturb.sizes import LINF_EPS, usual_eps

Mode = Literal["eval", "train", "keep"]


@final
@dataclass(frozen=True, eq=False)
class AttackResult:
    """What an attack did to a batch of N images.

    Attributes:
        attack: the spec that was run.
        x_adv: the adversarial images, (N, C, H, W) in [0, 1], detached.
        success: (N,) bool, by ONE fresh pass in full precision after the attack: for a stochastic model a draw, not the
            probability of success (see ``evaluate`` for many draws). Prediction != y, or == y if targeted.
        linf, l2: (N,) norms of ``x_adv - x``, pixel scale [0, 1].
        l0: (N,) the number of places (row, column) that changed.
        forward_passes, backward_passes: passes of each image through the model, the verification not counted.
        seconds: wall time of the attack, without the verification.
        zero_gradients: images whose gradient at the first step was exactly zero, so that it showed no way: a saturated
            softmax or masked gradients. None where the attack took no gradient.
        c_rising: of C&W, images for which no constant was large enough: the search would go on. None elsewhere.
        loss_falling: of C&W, images whose objective fell by more than 1 % over the last tenth of the last search step;
            None on a stochastic model, where noise would look like a fall.
    """

    __repr__ = brief

    attack: Attack
    x_adv: Tensor
    success: Tensor
    linf: Tensor
    l2: Tensor
    l0: Tensor
    forward_passes: float
    backward_passes: float
    seconds: float
    zero_gradients: int | None = None
    c_rising: int | None = None
    loss_falling: int | None = None

    @property
    def success_rate(self) -> float:
        """The share of images on which the attack succeeded in the one verifying draw."""
        return self.success.float().mean().item()

    @property
    def norms(self) -> Tensor:
        """(N,) the norm, in the attack's own ball, that fooled the model; infinity where none did.

        What minimum-norm attacks are compared by: ``(norms > eps).float().mean()`` is the accuracy left at ``eps``.
        """
        return torch.where(self.success, getattr(self, self.attack.norm), torch.inf)

    def __str__(self) -> str:
        return (
            f"{self.attack}: success {self.success_rate:.1%} of {len(self.success)} images (one draw), "
            f"mean linf {self.linf.mean().item():.4f}, l2 {self.l2.mean().item():.3f}, "
            f"{self.forward_passes:g} forward and {self.backward_passes:g} backward passes, {self.seconds:.2f} s"
        )


@dataclass(frozen=True)
class Attack(ABC):
    """A frozen spec; a subclass adds fields and :meth:`perturb`, everything else is done here, once.

    A minimum-norm attack (``minimum_norm = True``) looks for the nearest image that fools the model. Its ``eps`` may be
    infinite: then it returns what it found, however far. With a finite ``eps`` the caller projects what it found onto
    the ball, so that, as for every other attack, success is success inside the ball. Such an attack ends where the
    answer changes, as others may that say so (``on_boundary = True``): all their passes are in full precision.

    Attributes:
        eps: radius of the ball, [0, 1] pixel scale (8/255, not 8). The default is one of l_inf; l2 has none.
        norm: ``"linf"`` or ``"l2"``.
        loss: ``"ce"``, ``"margin"`` or ``"dlr"`` (see :mod:`learn2perturb.attacks.losses`).
        targeted: ``y`` is the class to reach, instead of the one to leave.
        eot: draws of a stochastic model averaged in every gradient, before the sign; a pass each, or in fast modes
            several in one, of few images of a network whose rows have noise of their own (see ``engine.by_row``).
        eot_average: what the draws' mean is taken of: ``"loss"``, ``"probability"`` or ``"logits"``.
        seed: ``None`` draws from torch's global generator; a number makes the attack a function of it and leaves the
            caller's generators alone. Every call with one seed draws the same numbers, so give each batch its own:
            ``dataclasses.replace(attack, seed=derive_seed(seed, batch))``.

    Raises:
        ConfigError: a setting is not allowed.
    """

    eps: float = LINF_EPS
    norm: str = field(default="linf", kw_only=True)
    loss: str = field(default="ce", kw_only=True)
    targeted: bool = field(default=False, kw_only=True)
    eot: int = field(default=1, kw_only=True)
    eot_average: Average = field(default="loss", kw_only=True)
    seed: int | None = field(default=None, kw_only=True)

    # What an attack can do; a setting that asks for more fails when the spec is made.
    needs_gradient: ClassVar[bool] = True
    minimum_norm: ClassVar[bool] = False
    on_boundary: ClassVar[bool] = False
    can_target: ClassVar[bool] = True
    norms: ClassVar[tuple[str, ...]] = tuple(BALLS)
    losses: ClassVar[tuple[str, ...]] = tuple(LOSSES)

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, self.norms)
        if self.eps is LINF_EPS:  # nobody gave one
            usual_eps(self.norm)
        check_choice("loss", self.loss, self.losses)
        check_choice("eot_average", self.eot_average, AVERAGES)
        unbounded = self.minimum_norm and self.eps == math.inf
        if not unbounded:
            check_size("eps", self.eps, norm=self.norm, zero=True)
        check_count("eot", self.eot)
        if not isinstance(self.targeted, bool):
            raise ConfigError(f"targeted must be True or False, got {self.targeted!r}; give the target classes as y")
        if self.targeted and not self.can_target:
            raise ConfigError(f"targeted must be False, got True: {type(self).__name__} has no targeted form")
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int)):
            raise ConfigError(f"seed must be a whole number or None, got {self.seed!r}")

    @property
    def ball(self) -> Ball:
        """The set of allowed perturbations (without its radius)."""
        return BALLS[self.norm]

    @property
    def sized(self) -> bool:
        """Whether a common eps may replace this one: not a number of pixels, nor where the norm is looked for."""
        return self.norm in BALLS and self.eps < math.inf

    @property
    def drops(self) -> bool:
        """Whether images of a deterministic model may leave before the end, which saves their passes."""
        return False

    @property
    def full_precision(self) -> bool:
        """Whether passes are in full precision: what ends on the boundary would be beyond it by rounding alone."""
        return self.minimum_norm or self.on_boundary

    @property
    def judging(self) -> int:
        """How many forward passes over an image judge, on a stochastic model, what the attack has found on its way."""
        return 0

    def resized(self, eps: float) -> Self:
        """Return the same attack with another radius; a step that would exceed it shrinks in proportion."""
        return replace(self, eps=eps)

    @abstractmethod
    def perturb(self, query: Query, x: Tensor, y: Tensor) -> Tensor:
        """Return adversarial images inside the ball; called by the shared caller only, with modes and gradients set.

        ``x`` must not be changed in place, nor any tensor that the model has been given.
        """

    @final
    def __call__(self, model: Model, x: Tensor, y: Tensor) -> Tensor:
        """Return ``run(model, x, y).x_adv``."""
        return self.run(model, x, y).x_adv

    @final
    def run(self, model: Model, x: Tensor, y: Tensor) -> AttackResult:
        """Attack ``model`` at images ``x`` (N, C, H, W) in [0, 1] with labels (or targets) ``y`` (N,) int64.

        ``model`` is anything callable that maps images to logits (N, K). If it is a module it is attacked in eval mode,
        without weight gradients, and then every flag of every submodule is what it was, also after a failure.

        Raises:
            InputError: images, labels or logits are not as said above, or a gradient is NaN or infinite.
        """
        check_images(model, x, y)
        with _prepared(model, "eval", x), self._random_stream("attack"):
            x, y = _plain(x), _plain(y)
            query = Query(model, self, y, strict=True)
            start = time.perf_counter()
            x_adv = self.search(query, x, y)
            query.watch.check()
            norms = self._measured(x_adv, x)
            seconds = time.perf_counter() - start
            passes = query.forwards / len(x), query.backwards / len(x)
            with self._random_stream("verify"), torch.no_grad(), execution.full_precision():
                # A copy, here and in Query.score: the model may work on its input in place.
                predicted = query.logits(x_adv.clone()).argmax(dim=1)
            success = predicted == y if self.targeted else predicted != y
        found = norms["linf"], norms["l2"], norms["l0"]
        watch = query.watch
        counts = watch.zero_gradients, watch.unfinished_of("c_rising"), watch.unfinished_of("loss_falling")
        return AttackResult(self, x_adv, success, *found, *passes, seconds, *counts)

    @final
    def craft(self, model: Model, x: Images, y: Labels, *, mode: Mode = "eval") -> Images:
        """Return adversarial images as :meth:`run` does, for training loops: values unseen, no verification, no record.

        Nothing here waits for the device, so no image leaves before the attack is over. ``mode`` is that of the modules
        meanwhile; in ``"train"`` mode batch statistics are used and the running ones move, as in any pass of training.
        If a gradient or logit was not finite all images are NaN, and so is the loss that is taken at them: training
        stops, where images that the attack has left alone would go unnoticed.
        """
        with _prepared(model, mode, x), self._random_stream("attack"):
            x, y = _plain(x), _plain(y)
            query = Query(model, self, y, strict=False)
            return query.watch.spoiled(self.search(query, x, y))

    @final
    def search(self, query: Query, x: Images, y: Labels) -> Images:
        """Return what :meth:`perturb` finds, in the box and the ball; for the caller and attacks made of attacks."""
        if self.eps == 0:
            return x.clone()
        # On the boundary rounding would decide whether a point fools the model.
        with execution.full_precision() if self.full_precision else contextlib.nullcontext():
            x_adv = self.perturb(query, x, y).clamp(0.0, 1.0)
        # Towards x, which is in the box: so the box is not left again.
        return self.ball.project(x_adv, x, self.eps) if self.minimum_norm and self.eps < math.inf else x_adv

    def _measured(self, x_adv: Tensor, x: Tensor) -> dict[str, Tensor]:
        distances = {name: norm.distance(x_adv, x) for name, norm in NORMS.items()}
        farthest = distances[self.norm].max().item()
        if math.isnan(farthest):
            raise InputError(f"{type(self).__name__} returned images that are NaN; its perturb() divides by 0 near x")
        if farthest > self.eps + TOLERANCE * max(1.0, self.eps):
            raise Learn2PerturbError(
                f"{type(self).__name__} left its {self.norm} ball: distance {farthest:.8g}, eps {self.eps:.8g}; "
                "this is a bug of the attack, whose perturb() must project"
            )
        return {name: distance.to(x.dtype) for name, distance in distances.items()}

    @contextlib.contextmanager
    def _random_stream(self, purpose: str) -> Iterator[None]:
        if self.seed is None:
            yield
            return
        with isolated_rng():
            seed_everything(self.seed, purpose)
            yield


@contextlib.contextmanager
def _prepared(model: Model, mode: Mode, x: Tensor) -> Iterator[None]:
    """Set modes, switch weight gradients off and input gradients on; put every flag back, whatever happens.

    ``.grad`` of the weights needs no care: only gradients of the images are ever asked for.
    """
    if mode not in ("eval", "train", "keep"):
        raise ConfigError(f"mode must be 'eval', 'train' or 'keep', got {mode!r}")
    weights = [p for p in model.parameters() if p.requires_grad] if isinstance(model, nn.Module) else []
    check_weights(model)
    with own_modes(), in_mode(model, None if mode == "keep" else mode == "train"), one_image_explained(len(x)):
        try:
            for weight in weights:
                weight.requires_grad_(False)
            with execution.attacking(model, fitting(model, _plain(x)), mode == "eval"):
                yield
        finally:
            for weight in weights:
                weight.requires_grad_(True)


def _plain(tensor: Tensor) -> Tensor:
    """Return the tensor without graph, and as one that autograd may save if it was made in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()
