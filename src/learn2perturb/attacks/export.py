"""This package's attacks in the form that other libraries expect; models need no adapter, they are plain modules."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, nn

from learn2perturb.attacks.base import Attack
from learn2perturb.attacks.foreign import foreign_library
from learn2perturb.engine.labels import class_numbers
from learn2perturb.errors import ConfigError, InputError

# The classes are made inside the functions: their bases exist only where the other library is installed.


def to_torchattacks(attack: Attack, model: nn.Module) -> Any:
    """Return ``attack`` as a ``torchattacks.Attack`` on ``model``: ``atk(x, y)``, ``atk.save(...)``, ``MultiAttack``.

    Raises:
        ConfigError: ``attack`` is not one of this package.
        MissingDependencyError: torchattacks is not installed.
    """
    _check(attack)
    base = foreign_library("torchattacks.attack").Attack

    @final
    class Exported(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__(type(attack).__name__, model)
            self.supported_mode = ["default", "targeted"]

        def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
            if self.targeted:
                labels = self.get_target_label(inputs, labels)
            # With a normalisation of torchattacks' own, the model is what it makes of it.
            target = self.model if self._normalization_applied is None else self.get_logits
            return replace(attack, targeted=self.targeted)(target, inputs, _labels(labels, inputs))

    exported = Exported()
    if attack.targeted:
        exported.set_mode_targeted_by_label(quiet=True)
    return exported


def to_foolbox(attack: Attack) -> Any:
    """Return ``attack`` as a foolbox attack: ``attack(fmodel, x, criterion, epsilons=[...])``, whose eps replaces ours.

    The ``fmodel`` is ``foolbox.PyTorchModel(model.eval(), bounds=(0, 1))``. A minimum-norm attack runs once for all
    ``epsilons``, None among them, as foolbox's own do.

    Raises:
        ConfigError: ``attack`` is not one of this package, or its norm is not one that foolbox clips.
        MissingDependencyError: foolbox is not installed.
    """
    _check(attack)
    orders = {"linf": float("inf"), "l2": 2}
    if attack.norm not in orders:
        raise ConfigError(f"the attack has norm {attack.norm!r}; foolbox clips to {' and '.join(orders)} balls")
    base = foreign_library("foolbox.attacks.base")
    criteria, distances = foreign_library("foolbox.criteria"), foreign_library("foolbox.distances")

    @final
    class Exported(base.MinimizationAttack if attack.minimum_norm else base.FixedEpsilonAttack):  # type: ignore[misc]
        distance = distances.LpDistance(orders[attack.norm])

        def run(self, model: Any, inputs: Any, criterion: Any, *, epsilon: float = math.inf, **_: Any) -> Any:
            if tuple(model.bounds) != (0, 1):
                raise InputError(f"the foolbox model has bounds {tuple(model.bounds)}; give it bounds=(0, 1)")
            criterion = base.get_criterion(criterion)
            targeted = isinstance(criterion, criteria.TargetedMisclassification)
            if not targeted and not isinstance(criterion, criteria.Misclassification):
                raise InputError(f"criterion is {criterion!r}; give labels, or TargetedMisclassification(classes)")
            y = criterion.target_classes if targeted else criterion.labels
            run = replace(attack, eps=epsilon, targeted=targeted)
            return type(inputs)(run(model, inputs.raw, _labels(y.raw, inputs.raw)))

    return Exported()


def to_adv_lib(attack: Attack) -> Callable[..., Tensor]:
    """Return ``attack`` as a function of adversarial-library's form: ``attack(model=, inputs=, labels=, targeted=)``.

    Raises:
        ConfigError: ``attack`` is not one of this package.
    """
    _check(attack)

    def exported(model: nn.Module, inputs: Tensor, labels: Tensor, targeted: bool = False) -> Tensor:
        return replace(attack, targeted=targeted)(model, inputs, _labels(labels, inputs))

    return exported


def to_art(attack: Attack, classifier: Any) -> Any:
    """Return ``attack`` as an evasion attack of ART on its ``PyTorchClassifier``: ``attack.generate(x=..., y=...)``.

    As in ART, ``y`` are class numbers or one-hot rows, and None takes the classifier's own predictions.

    Raises:
        ConfigError: ``attack`` is not one of this package, or the classifier's pixels are not in [0, 1] as they are.
        MissingDependencyError: ART is not installed.
    """
    _check(attack)
    base = foreign_library("art.attacks.attack").EvasionAttack
    kind = foreign_library("art.estimators.classification").PyTorchClassifier
    if not isinstance(classifier, kind):
        raise ConfigError(f"classifier is a {type(classifier).__name__}; give an ART PyTorchClassifier")
    clip = classifier.clip_values
    if clip is None or float(clip[0].min()) != 0 or float(clip[1].max()) != 1:
        raise ConfigError(f"the classifier has clip_values {clip}; give clip_values=(0, 1)")

    @final
    class Exported(base):  # type: ignore[misc, valid-type]
        attack_params = base.attack_params
        _estimator_requirements = (kind,)

        def __init__(self) -> None:
            super().__init__(estimator=classifier)
            self._targeted = attack.targeted

        def generate(self, x: Any, y: Any = None, **_: Any) -> Any:
            if y is None:
                if self.targeted:
                    raise InputError("y is None; a targeted attack needs the classes to reach")
                y = classifier.predict(x).argmax(axis=1)
            images = torch.as_tensor(x).to(classifier.device)
            run = replace(attack, targeted=self.targeted)
            return run(_Preprocessed(classifier), images, _labels(y, images)).cpu().numpy()

    return Exported()


@final
class _Preprocessed(nn.Module):
    """The network of an ART classifier with what the classifier does to images before it."""

    def __init__(self, classifier: Any) -> None:
        super().__init__()
        self.network = classifier.model
        self._classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, K)."""
        x, _ = self._classifier._apply_preprocessing(x, y=None, fit=False, no_grad=False)
        return self.network(x)


def _labels(labels: Any, images: Tensor) -> Tensor:
    """Return labels of another library, of whatever form, as ours beside ``images``: (N,) int64."""
    return class_numbers(labels, len(images), one_hot=True).to(images.device)


def _check(attack: Any) -> None:
    if not isinstance(attack, Attack):
        kind = f"the class {attack.__name__}" if isinstance(attack, type) else f"a {type(attack).__name__}"
        raise ConfigError(f"attack is {kind}; give an Attack of this package, such as PGD(eps=8/255)")
