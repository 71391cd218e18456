"""What every attack shares: the spec's checks and the caller that validates, sets modes, clips, counts, verifies."""

from __future__ import annotations

import contextlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from learn2perturb.attacks.balls import BALLS, Ball
from learn2perturb.attacks.gradients import AVERAGES, Average, input_gradient
from learn2perturb.attacks.losses import LOSSES, margin
from learn2perturb.engine import gears
from learn2perturb.engine.modes import in_mode
from learn2perturb.engine.random import isolated_rng, seed_everything
from learn2perturb.errors import ConfigError, InputError, Learn2PerturbError

Model = Callable[[Tensor], Tensor]
Mode = Literal["eval", "train", "keep"]

TOLERANCE = 1e-6  # of pixel values and distances: float32 rounding, far below 1/255


@dataclass(frozen=True, eq=False)
class AttackResult:
    """What an attack did to a batch of N images.

    Attributes:
        attack: the spec that was run.
        x_adv: the adversarial images, (N, C, H, W) in [0, 1], detached.
        success: (N,) bool, by ONE fresh forward pass after the attack: for a stochastic model a single draw, not the
            probability of success (see ``evaluate`` for many draws). Prediction != y, or == y if targeted.
        linf, l2: (N,) norms of ``x_adv - x``, pixel scale [0, 1].
        forward_passes, backward_passes: passes of each image through the model, the verification not counted.
        seconds: wall time of the attack, without the verification.
    """

    attack: Attack
    x_adv: Tensor
    success: Tensor
    linf: Tensor
    l2: Tensor
    forward_passes: float
    backward_passes: float
    seconds: float

    @property
    def success_rate(self) -> float:
        """The share of images on which the attack succeeded in the one verifying draw."""
        return self.success.float().mean().item()

    def __str__(self) -> str:
        return (
            f"{self.attack}: success {self.success_rate:.1%} of {len(self.success)} images (one draw), "
            f"mean linf {self.linf.mean().item():.4f}, l2 {self.l2.mean().item():.3f}, "
            f"{self.forward_passes:g} forward and {self.backward_passes:g} backward passes, {self.seconds:.2f} s"
        )


@dataclass(frozen=True)
class Attack(ABC):
    """A frozen spec; a subclass adds fields and :meth:`perturb`, everything else is done here, once.

    Attributes:
        eps: radius of the ball, [0, 1] pixel scale (8/255, not 8).
        norm: ``"linf"`` or ``"l2"``.
        loss: ``"ce"``, ``"margin"`` or ``"dlr"`` (see :mod:`learn2perturb.attacks.losses`).
        targeted: ``y`` is the class to reach, instead of the one to leave.
        eot: draws of a stochastic model averaged in every gradient, before the sign.
        eot_average: what the draws' mean is taken of: ``"loss"``, ``"probability"`` or ``"logits"``.
        seed: ``None`` draws from torch's global generator; a number makes the attack a function of it and leaves the
            caller's generators alone. Every call with one seed draws the same numbers, so give each batch its own:
            ``dataclasses.replace(attack, seed=derive_seed(seed, batch))``.

    Raises:
        ConfigError: a setting is not allowed.
    """

    eps: float = 8 / 255
    norm: str = field(default="linf", kw_only=True)
    loss: str = field(default="ce", kw_only=True)
    targeted: bool = field(default=False, kw_only=True)
    eot: int = field(default=1, kw_only=True)
    eot_average: Average = field(default="loss", kw_only=True)
    seed: int | None = field(default=None, kw_only=True)

    needs_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_choice("norm", self.norm, BALLS)
        _check_choice("loss", self.loss, LOSSES)
        _check_choice("eot_average", self.eot_average, AVERAGES)
        _check_size("eps", self.eps, lowest=0.0)
        if self.norm == "linf" and self.eps > 1:
            raise ConfigError(
                f"eps={self.eps!r} is more than a pixel's whole range: eps is in [0, 1] pixel scale, write 8/255, not 8"
            )
        check_count("eot", self.eot)
        if not isinstance(self.targeted, bool):
            raise ConfigError(f"targeted must be True or False, got {self.targeted!r}; give the target classes as y")
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int)):
            raise ConfigError(f"seed must be a whole number or None, got {self.seed!r}")

    @property
    def ball(self) -> Ball:
        """The set of allowed perturbations (without its radius)."""
        return BALLS[self.norm]

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
            InputError: images, labels or logits are not as said above.
        """
        _check_images(model, x, y)
        with _prepared(model, "eval", x), self._random_stream("attack"):
            x, y = _plain(x), _plain(y)
            query = Query(model, self, y, strict=True)
            start = time.perf_counter()
            x_adv = self._clipped(query, x, y)
            linf, l2 = self._measured(x_adv, x)
            seconds = time.perf_counter() - start
            passes = query.forwards / len(x), query.backwards / len(x)
            with self._random_stream("verify"), torch.no_grad():
                # A copy, here and in Query.score: the model may work on its input in place.
                predicted = query.logits(x_adv.clone()).argmax(dim=1)
            success = predicted == y if self.targeted else predicted != y
        return AttackResult(self, x_adv, success, linf, l2, *passes, seconds)

    @final
    def craft(self, model: Model, x: Tensor, y: Tensor, *, mode: Mode = "eval") -> Tensor:
        """Return adversarial images as :meth:`run` does, for training loops: values unseen, no verification, no record.

        Nothing here waits for the device. ``mode`` is that of the modules during the attack; in ``"train"`` mode batch
        statistics are used and the running ones move, as in any forward pass of training.
        """
        with _prepared(model, mode, x), self._random_stream("attack"):
            x, y = _plain(x), _plain(y)
            return self._clipped(Query(model, self, y, strict=False), x, y)

    def _clipped(self, query: Query, x: Tensor, y: Tensor) -> Tensor:
        if self.eps == 0:
            return x.clone()
        return self.perturb(query, x, y).clamp(0.0, 1.0)

    def _measured(self, x_adv: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        distances = {name: ball.distance(x_adv, x) for name, ball in BALLS.items()}
        farthest = distances[self.norm].max().item()
        if math.isnan(farthest):
            raise InputError("the attack met a NaN gradient: the logits or their derivatives are not finite near x")
        if farthest > self.eps + TOLERANCE * max(1.0, self.eps):
            raise Learn2PerturbError(
                f"{type(self).__name__} left its {self.norm} ball: distance {farthest:.8g}, eps {self.eps:.8g}; "
                "this is a bug of the attack, whose perturb() must project"
            )
        return distances["linf"].to(x.dtype), distances["l2"].to(x.dtype)

    @contextlib.contextmanager
    def _random_stream(self, purpose: str) -> Iterator[None]:
        if self.seed is None:
            yield
            return
        with isolated_rng():
            seed_everything(self.seed, purpose)
            yield


@final
class Query:
    """What an attack may ask of the model it attacks; counts the image passes and checks the first logits."""

    def __init__(self, model: Model, attack: Attack, y: Tensor, *, strict: bool) -> None:
        self.forwards = 0
        self.backwards = 0
        self._model = model
        self._attack = attack
        self._loss = LOSSES[attack.loss]
        self._labels = y
        self._strict = strict
        self._checked = False

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits (N, K) of one forward pass, at least float32."""
        with gears.autocast(x.device.type):
            logits = self._model(x)
        if not self._checked:
            _check_logits(logits, x, self._labels, values=self._strict)
            self._checked = True
        self.forwards += len(x)
        return logits if logits.dtype == torch.float64 else logits.float()

    def gradient(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the direction (N, C, H, W) of the attack's aim: the EOT gradient of the loss, negative if targeted."""
        attack = self._attack
        gradient = input_gradient(self.logits, self._loss, x, y, eot=attack.eot, average=attack.eot_average)
        self.backwards += attack.eot * len(x)
        return -gradient if attack.targeted else gradient

    def score(self, x: Tensor, y: Tensor, draws: int) -> Tensor:
        """Return the mean margin (N,) over ``draws`` fresh forward passes, positive where the attack has its way."""
        total = torch.zeros(len(x), device=x.device)
        with torch.no_grad():
            for _ in range(draws):
                total = total + margin(self.logits(x.clone()), y)
        return (-total if self._attack.targeted else total) / draws


@contextlib.contextmanager
def _prepared(model: Model, mode: Mode, x: Tensor) -> Iterator[None]:
    """Set modes, switch weight gradients off and input gradients on; put every flag back, whatever happens.

    ``.grad`` of the weights needs no care: only gradients of the images are ever asked for.
    """
    if mode not in ("eval", "train", "keep"):
        raise ConfigError(f"mode must be 'eval', 'train' or 'keep', got {mode!r}")
    weights = [p for p in model.parameters() if p.requires_grad] if isinstance(model, nn.Module) else []
    with in_mode(model, None if mode == "keep" else mode == "train"):
        try:
            for weight in weights:
                weight.requires_grad_(False)
            with torch.inference_mode(False), torch.enable_grad(), gears.attacking(model, _plain(x), mode == "eval"):
                yield
        finally:
            for weight in weights:
                weight.requires_grad_(True)


def _plain(tensor: Tensor) -> Tensor:
    """Return the tensor without graph, and as one that autograd may save if it was made in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def check_count(name: str, value: Any) -> None:
    """Raise ConfigError unless ``value`` is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}")


def check_step(name: str, value: Any) -> None:
    """Raise ConfigError unless ``value`` is a positive finite number in pixel scale."""
    _check_size(name, value, lowest=math.ulp(0.0))


def _check_size(name: str, value: Any, *, lowest: float) -> None:
    if isinstance(value, str):
        raise ConfigError(f"{name} must be a number in [0, 1] pixel scale, got {value!r}; write 8/255, without quotes")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name} must be a number in [0, 1] pixel scale, got {value!r}; write 8/255")
    if not math.isfinite(value) or value < lowest:
        bound = "more than 0" if lowest > 0 else "at least 0"
        raise ConfigError(f"{name} must be finite and {bound}, in [0, 1] pixel scale, got {value!r}; write 8/255")


def _check_choice(name: str, value: Any, allowed: Any) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _check_images(model: Any, x: Any, y: Any) -> None:
    if not callable(model):
        raise InputError(f"model must be callable, mapping images to logits, got {type(model).__name__}")
    if not isinstance(x, Tensor):
        raise InputError(f"x must be a torch.Tensor, got {type(x).__name__}; use torch.as_tensor(x)")
    if x.dtype not in (torch.float32, torch.float64):
        mend = "x.float() / 255 makes bytes into images in [0, 1]" if x.dtype == torch.uint8 else "use x.float()"
        raise InputError(f"x must be float32 or float64, got {x.dtype}; {mend} (the model may cast it)")
    if x.ndim != 4:
        raise InputError(f"x must have shape (N, C, H, W), got {tuple(x.shape)}; one image is x.unsqueeze(0)")
    if x.numel() == 0:
        raise InputError(f"x is empty, shape {tuple(x.shape)}; give at least one image, or leave out the empty batch")
    lowest, highest = (bound.item() for bound in torch.aminmax(x.detach()))
    if not (math.isfinite(lowest) and math.isfinite(highest)):
        raise InputError("x holds NaN or infinite values; all pixels must be finite and in [0, 1]")
    if lowest < -TOLERANCE or highest > 1 + TOLERANCE:
        raise InputError(
            f"x must be in [0, 1], got values from {lowest:.4g} to {highest:.4g}; divide bytes by 255 and put the "
            "normalisation into the model"
        )
    if not isinstance(y, Tensor):
        raise InputError(f"y must be a torch.Tensor, got {type(y).__name__}; use torch.as_tensor(y)")
    if y.dtype != torch.int64:
        raise InputError(f"y must be int64 class numbers, got {y.dtype}; use y.long(), or y.argmax(dim=1) if one-hot")
    if y.shape != x.shape[:1]:
        raise InputError(f"y must have shape ({len(x)},), one label an image, got {tuple(y.shape)}")
    if y.device != x.device:
        raise InputError(f"x is on {x.device} but y on {y.device}; use y.to(x.device)")


def _check_logits(logits: Any, x: Tensor, y: Tensor, *, values: bool) -> None:
    if not isinstance(logits, Tensor):
        mend = " (for example lambda x: model(x)[0])" if isinstance(logits, tuple | list) else ""
        raise InputError(f"the model must return logits, got a {type(logits).__name__}; wrap it so that it does{mend}")
    if not logits.is_floating_point():
        raise InputError(f"the model must return float logits, got {logits.dtype}; return them before argmax")
    if logits.ndim != 2 or logits.shape[0] != len(x) or logits.shape[1] < 2:
        raise InputError(
            f"the model must return logits (N, K), here ({len(x)}, at least 2 classes), got {tuple(logits.shape)}; "
            "a model with one output is wrapped as torch.cat([-z, z], dim=1)"
        )
    if not values:
        return
    if not torch.isfinite(logits).all():
        raise InputError("the model returned NaN or infinite logits; check its weights and its input normalisation")
    lowest, highest = (bound.item() for bound in torch.aminmax(y))
    if lowest < 0 or highest >= logits.shape[1]:
        raise InputError(
            f"y must be in 0..{logits.shape[1] - 1} (the model has {logits.shape[1]} classes), "
            f"got values from {lowest} to {highest}"
        )
