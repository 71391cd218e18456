"""What every attack shares: the spec's checks and the caller that validates, sets modes, clips, counts, verifies."""

from __future__ import annotations

import contextlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self, TypeVar, final

import torch
from torch import Tensor, nn

from learn2perturb.attacks.balls import BALLS, NORMS, Ball
from learn2perturb.attacks.gradients import AVERAGES, Average, Values, fresh_values, input_gradient, value_and_gradient
from learn2perturb.attacks.listening import listener
from learn2perturb.attacks.losses import LOSSES, Loss, margin
from learn2perturb.attacks.probing import apart, passes_differ
from learn2perturb.attacks.watch import Watch
from learn2perturb.brief import brief
from learn2perturb.checks import check_count, check_size
from learn2perturb.engine import execution
from learn2perturb.engine.answers import ask, check_answer, check_finite, check_weights, fitting, plain_logits
from learn2perturb.engine.by_row import draws_at_once
from learn2perturb.engine.finite import Members, check_members, members_of
from learn2perturb.engine.halving import out_of_memory
from learn2perturb.engine.modes import in_mode, one_image_explained, own_modes
from learn2perturb.engine.random import isolated_rng, seed_everything
from learn2perturb.engine.shapes import Flags, Images, Labels, Logits, PerImage
from learn2perturb.errors import ConfigError, InputError, Learn2PerturbError
from learn2perturb.sizes import LINF_EPS, usual_eps

Model = Callable[[Tensor], Tensor]
Mode = Literal["eval", "train", "keep"]
T = TypeVar("T")

_COMPARED = 4  # images on which a finite ensemble is compared with its members
TOLERANCE = 1e-6  # of pixel values and distances: float32 rounding, far below 1/255


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
        _check_choice("norm", self.norm, self.norms)
        if self.eps is LINF_EPS:  # nobody gave one
            usual_eps(self.norm)
        _check_choice("loss", self.loss, self.losses)
        _check_choice("eot_average", self.eot_average, AVERAGES)
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


@final
class Query:
    """What an attack may ask of the model it attacks; counts the image passes and checks the first logits.

    Losses and margins come back in the direction of the attack's aim: larger is nearer to it, targeted or not, and a
    margin is positive where the attack has its way.

    Attributes:
        left: how many images are still attacked, kept by the attacks that let some leave: for whoever listens.
    """

    def __init__(self, model: Model, attack: Attack, y: Tensor, *, strict: bool) -> None:
        self.forwards = 0
        self.backwards = 0
        self.left = len(y)
        self.watch = Watch()
        self._listener = listener()
        self.model = model
        self._attack = attack
        self._loss = LOSSES[attack.loss]
        self._labels = y
        self._strict = strict
        self._checked = False
        self._deterministic: bool | None = None if strict else False
        self._held: int | None = None
        self._together = True  # draws in one pass, where that is possible
        self._num_classes: int | None = None

    def logits(self, x: Images) -> Logits:
        """Return the logits (N, K) of one forward pass, at least float32."""
        logits = ask(self.model, x)
        if not self._checked:
            check_answer(logits, len(x))
            if self._strict:
                check_finite(logits)
                _check_classes(self._labels, logits.shape[1])
            self._checked = True
            self._num_classes = logits.shape[1]
        self.forwards += len(x)
        if self._listener is not None:
            self._listener(len(x), self.left)
        self.watch.logits(logits)
        return plain_logits(logits)

    def gradient(self, x: Images, y: Labels, *, loss: Loss | None = None) -> Images:
        """Return the direction (N, C, H, W) of the attack's aim: the EOT gradient of the loss, negative if targeted.

        ``loss`` replaces the attack's own, as in :meth:`value_and_gradient`.
        """
        attack = self._attack
        gradient = self._averaged(input_gradient, loss, x, y)
        self.watch.gradient(gradient)
        self.backwards += attack.eot * len(x)
        return -gradient if attack.targeted and loss is None else gradient

    def value_and_gradient(self, x: Images, y: Labels, *, loss: Loss | None = None) -> tuple[Values, Images]:
        """Return what the same ``eot`` draws say: mean loss, margin and logits of each image, and the gradient.

        ``loss``, of logits (N, K) and labels (N,), replaces the attack's own; it is one to be maximised, targeted or
        not, and its sign is not touched.
        """
        attack = self._attack
        values, gradient = self._averaged(value_and_gradient, loss, x, y)
        aimed = self._aimed(values, own=loss is None)
        self.watch.gradient(gradient, reached=aimed.margin > 0)
        self.backwards += attack.eot * len(x)
        return aimed, -gradient if attack.targeted and loss is None else gradient

    def value(self, x: Images, y: Labels, *, loss: Loss | None = None) -> Values:
        """Return the same values from ``eot`` fresh forward passes, without a gradient."""
        with torch.no_grad():
            return self._aimed(self._averaged(fresh_values, loss, x, y), own=loss is None)

    def score(self, x: Images, y: Labels, draws: int) -> PerImage:
        """Return the mean margin (N,) over ``draws`` fresh forward passes, positive where the attack has its way."""
        return self.success(x, y, draws)[1]

    def success(self, x: Images, y: Labels, draws: int) -> tuple[PerImage, PerImage]:
        """Return the share (N,) of ``draws`` fresh passes in which the attack has its way, and the mean margin (N,)."""
        margins = []
        with torch.no_grad():
            for _ in range(draws):
                margins.append(margin(self.logits(x.clone()), y))
        stacked = torch.stack(margins) * (-1 if self._attack.targeted else 1)
        return (stacked > 0).to(stacked.dtype).mean(dim=0), stacked.mean(dim=0)

    def deterministic(self, x: Tensor) -> bool:
        """Tell whether passes over the same images agree, so that an image once broken stays so and may drop out.

        Asked once; in :meth:`Attack.craft`, where nothing may wait for the device, the answer is no.
        """
        if self._deterministic is None:
            self._deterministic = not passes_differ(self.logits, x)
        return self._deterministic

    def broken(self, x: Images, y: Labels, margins: PerImage) -> Flags:
        """Return which images (N, bool) of a deterministic model are broken for good, from their ``margins``.

        At low precision a pass in full precision confirms it: rounding alone must not end an attack.
        """
        broken = margins > 0
        if execution.current().dtype is None or not bool(broken.any()):
            return broken
        with execution.full_precision():
            confirmed = self.score(x[broken], y[broken], 1) > 0
        return broken.masked_scatter(broken, confirmed)

    def num_classes(self, x: Tensor) -> int:
        """Return the number of classes: by a forward pass, if there was none yet."""
        if self._num_classes is None:
            with apart("probe"):
                return self.logits(x.clone()).shape[1]
        return self._num_classes

    def members(self, x: Tensor) -> Members:
        """Return the members of the model, which is a finite ensemble; a model without noise is one of one member.

        Raises:
            InputError: it is none.
        """
        found = members_of(self.model)
        with apart("members"):
            if found is not None:
                check_members(self.model, found, x[:_COMPARED])
            elif self._strict and not self.deterministic(x):
                raise InputError(
                    "the model draws noise and is no finite ensemble, which has members and their probabilities (see "
                    "learn2perturb.models.RandomEnsemble); use pgd with eot"
                )
        return Members((self.model,), (1.0,)) if found is None else found

    @contextlib.contextmanager
    def part(self, attack: Attack, model: Model | None = None) -> Iterator[Query]:
        """Give the query of ``attack``, a part of this one, to call its :meth:`Attack.perturb` with; add its passes.

        ``model`` is asked in place of this one, such as a member of it.
        """
        part = Query(self.model if model is None else model, attack, self._labels, strict=self._strict)
        part._checked, part._deterministic, part.watch = self._checked, self._deterministic, self.watch
        part.left = self.left
        try:
            yield part
        finally:
            self.forwards += part.forwards
            self.backwards += part.backwards
            self.left = part.left

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Give every EOT average in the body the same draws; what judges points still draws afresh."""
        before, self._held = self._held, int(torch.randint(2**62, ()))
        try:
            yield
        finally:
            self._held = before

    def _averaged(self, work: Callable[..., T], loss: Loss | None, x: Images, y: Labels) -> T:
        """Return what ``work`` makes of the draws of an EOT average, several of them in a pass where that is possible.

        Not in :meth:`Attack.craft`, since a training has the same draws on any number of processes; nor where they have
        not fitted into memory.
        """
        attack, before = self._attack, self.forwards
        at_once = draws_at_once(self.model, x) if self._strict and self._together and attack.eot > 1 else 1
        average = {"eot": attack.eot, "average": attack.eot_average, "at_once": at_once}
        try:
            with self._draws():
                return work(self.logits, loss or self._loss, x, y, **average)
        except Exception as error:
            if at_once == 1 or not out_of_memory(error):
                raise
        self._together, self.forwards = False, before
        return self._averaged(work, loss, x, y)

    @contextlib.contextmanager
    def _draws(self) -> Iterator[None]:
        if self._held is None:
            yield
            return
        with isolated_rng():
            seed_everything(self._held, "held draws")
            yield

    def _aimed(self, values: Values, *, own: bool) -> Values:
        if not self._attack.targeted:
            return values
        return Values(-values.loss if own else values.loss, -values.margin, values.logits)


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


def _check_choice(name: str, value: Any, allowed: Any) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_images(model: Any, x: Any, y: Any) -> None:
    """Raise InputError unless ``model`` is callable and ``x`` and ``y`` are what attacks want."""
    check_pixels(model, x)
    _check_labels(x, y)


def check_pixels(model: Any, x: Any) -> None:
    """Raise InputError unless ``model`` is callable and ``x`` are images."""
    if not callable(model):
        raise InputError(f"model must be callable, mapping images to logits, got {type(model).__name__}")
    if not isinstance(x, Tensor):
        raise InputError(f"x must be a torch.Tensor, got {type(x).__name__}; use torch.as_tensor(x)")
    if x.dtype not in (torch.float32, torch.float64):
        fix = "x.float() / 255 makes bytes into images in [0, 1]" if x.dtype == torch.uint8 else "use x.float()"
        raise InputError(f"x must be float32 or float64, got {x.dtype}; {fix} (the model may cast it)")
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


def _check_labels(x: Tensor, y: Any) -> None:
    if not isinstance(y, Tensor):
        raise InputError(f"y must be a torch.Tensor, got {type(y).__name__}; use torch.as_tensor(y)")
    if y.dtype != torch.int64:
        raise InputError(f"y must be int64 class numbers, got {y.dtype}; use y.long(), or y.argmax(dim=1) if one-hot")
    if y.shape != x.shape[:1]:
        raise InputError(f"y must have shape ({len(x)},), one label an image, got {tuple(y.shape)}")
    if y.device != x.device:
        raise InputError(f"x is on {x.device} but y on {y.device}; use y.to(x.device)")


def _check_classes(y: Tensor, classes: int) -> None:
    lowest, highest = (bound.item() for bound in torch.aminmax(y))
    if lowest < 0 or highest >= classes:
        raise InputError(
            f"y must be in 0..{classes - 1} (the model has {classes} classes), got values from {lowest} to {highest}"
        )
