"""What can be named: networks, data sets, attacks, defenses. A name is imported only when it is used."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import importlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, final

from learn2perturb import plugins
from learn2perturb.errors import ConfigError, UnknownNameError


@final
@dataclass(frozen=True)
class Entry:
    """One registered thing: where it lives, who published it, and facts that are needed without importing it.

    Facts of defenses: ``stochastic`` (its network draws noise), ``adversarial`` (trains on adversarial examples),
    ``recordable`` (its loss looks at the clock for the adversary's delay only, and no recipe holds its draws),
    ``baseline`` (``bench`` has plain code of its step), ``finite_ensemble`` (it draws one of finitely many networks, so
    its accuracy is known exactly). Of attacks:
    ``needs_gradient``, ``needs`` (settings that a name cannot give), and ``finite_ensembles`` (of random models it
    takes those of finitely many members only; it keeps a step only if it fools, and decides that on the host). Of
    noises: ``everywhere`` (acts at every place of any network; else it is the law of one defense, which knows where it
    goes).

    What an installed package declares has only name, target and ``package``: its facts are attributes of the target,
    its summary is the first line of the target's docstring, and both import it.
    """

    name: str
    target: str
    summary: str
    paper: str = ""
    year: int | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    package: str = ""

    def fact(self, name: str, default: bool = False) -> bool:
        """Return whether something is said of it; ``default`` where nothing is."""
        return bool(self.said(name, default))

    def said(self, name: str, default: Any = None) -> Any:
        """Return a fact; ``default`` where nothing is said."""
        if name in self.facts or not self.package:
            return self.facts.get(name, default)
        return getattr(self.load(), name, default)

    @property
    def about(self) -> str:
        """What it is, in one line."""
        if self.summary or not self.package:
            return self.summary
        return (self.load().__doc__ or f"of {self.package}").strip().splitlines()[0].rstrip(".")

    @property
    def module(self) -> str:
        """The module that it lives in."""
        return self.target.partition(":")[0]

    @property
    def own(self) -> bool:
        """Whether it is none of this package."""
        return not plugins.is_ours(self.module)

    def is_from(self, target: str) -> bool:
        """Tell whether ``target``, which is not of this package, is this entry's: a declared one may be re-exported."""
        if not self.own:
            return False
        return self.target == target or bool(self.package and _top(target) == _top(self.target))

    def load(self) -> Any:
        """Import ``module:attribute`` and return it.

        Raises:
            ConfigError: it is none of this package's, and cannot be imported.
        """
        module, _, attribute = self.target.partition(":")
        try:
            return functools.reduce(getattr, attribute.split("."), importlib.import_module(module))
        except Exception as error:
            if not self.own:
                raise
            raise ConfigError(
                f"{self.name!r} cannot be imported from {self.target} ({type(error).__name__}: {error}); correct "
                f"{self.package or 'the module that registers it'}"
            ) from error

    def source(self) -> dict[str, Any]:
        """Return where its code is from: module, file, SHA-256, package, and its own fingerprint."""
        with contextlib.suppress(ConfigError):
            return {"name": self.name, **plugins.source_of(self.module, self.load())}
        return {"name": self.name, **plugins.source_of(self.module)}


def _top(target: str) -> str:
    return target.partition(":")[0].partition(".")[0]


@final
class Registry:
    """Names of one kind of thing, with aliases; iterates over its entries in order of registration.

    What installed packages declare in ``learn2perturb.GROUP`` is added when a name is first looked for.
    """

    def __init__(self, kind: str, group: str) -> None:
        self.kind, self.group = kind, group
        self._entries: dict[str, Entry] = {}
        self._aliases: dict[str, str] = {}
        self._looked = False

    def register(
        self,
        name: str,
        target: str,
        summary: str,
        *,
        paper: str = "",
        year: int | None = None,
        aliases: tuple[str, ...] = (),
        arguments: Mapping[str, Any] | None = None,
        **facts: Any,
    ) -> Entry:
        """Add ``name``; ``target`` is ``"module:attribute"``, ``arguments`` go to it, ``facts`` are for its readers.

        The same target may be registered again, as a cell of a notebook does that is run twice.

        Raises:
            ConfigError: the name or an alias is taken.
        """
        for word in (name, *aliases):
            there = self._entries.get(self._aliases.get(word, word))
            again = there is not None and there.name == name and there.is_from(target)
            if there is not None and not again:
                raise ConfigError(f"{self.kind} {word!r} is registered already; choose another name")
        entry = Entry(name, target, summary, paper, year, dict(arguments or {}), facts)
        self._entries[name] = entry
        self._aliases.update(dict.fromkeys(aliases, name))
        return entry

    def _known(self) -> dict[str, Entry]:
        """Return the entries, after a look at what installed packages declare."""
        if not self._looked:
            self._looked = True
            for name, target, package in plugins.declared(self.group):
                if name in self._entries or name in self._aliases:
                    if self._entries[self._aliases.get(name, name)].target != target:
                        warnings.warn(f"{self.kind} {name!r} of {package} is left out: the name is taken", stacklevel=2)
                    continue
                self._entries[name] = Entry(name, target, "", package=package)
        return self._entries

    def __iter__(self) -> Iterator[Entry]:
        return iter(list(self._known().values()))  # a part may register others when it is imported

    def __contains__(self, name: object) -> bool:
        return name in self._known() or name in self._aliases

    def own(self) -> list[Entry]:
        """Return the entries that are not of this package."""
        return [entry for entry in self if entry.own]

    def entry(self, name: str) -> Entry:
        """Return the entry of ``name`` or of the name it is an alias of.

        Raises:
            UnknownNameError: nothing has that name.
        """
        resolved = self._aliases.get(name, name) if isinstance(name, str) else name
        if not isinstance(name, str) or (resolved not in self._entries and resolved not in self._known()):
            error = UnknownNameError.of(self.kind, name, [*self._entries, *self._aliases])
            raise UnknownNameError(f"{error}; one of your own: --import its module")
        return self._entries[resolved]

    def names(self, pattern: str = "*") -> list[str]:
        """Return the names that match the glob ``pattern``, aliases left out."""
        if not isinstance(pattern, str):
            raise ConfigError(f"pattern is {pattern!r}; give a glob such as 'resnet*'")
        return [name for name in self._known() if fnmatch.fnmatch(name, pattern)]


MODELS = Registry("network", "models")
DATASETS = Registry("data set", "datasets")
ATTACKS = Registry("attack", "attacks")
DEFENSES = Registry("defense", "defenses")
NOISES = Registry("noise", "noise")
REGISTRIES = (DEFENSES, ATTACKS, NOISES, DATASETS, MODELS)

_RESNET: dict[str, Any] = {"paper": "He et al., Deep Residual Learning for Image Recognition", "year": 2016}
# The output of each block before its last ReLU, and of the stem: Learn2Perturb, appendix A.1. Adding noise to the
# last norm of the main branch equals adding it after the block's addition, since addition commutes.
_BLOCK_ENDS = ("bn1", "layer*.*.bn2")
for _name, _depth, _width in (
    ("resnet20", 20, 1.0),
    ("resnet32", 32, 1.0),
    ("resnet44", 44, 1.0),
    ("resnet56", 56, 1.0),
    ("resnet20_x1.5", 20, 1.5),
    ("resnet20_x2", 20, 2.0),
    ("resnet20_x4", 20, 4.0),
):
    MODELS.register(
        _name,
        "learn2perturb.models.resnet_cifar:resnet_cifar",
        f"CIFAR ResNet-V1({_depth})" + (f", {_width:g} times as wide" if _width != 1 else ""),
        arguments={"depth": _depth, "width": _width},
        sites=_BLOCK_ENDS,
        **_RESNET,
    )
MODELS.register(
    "resnet18",
    "learn2perturb.models.resnet18:resnet18",
    'ResNet-18 for small images, 64 to 512 channels (the Learn2Perturb paper\'s "V2(18)")',
    sites=_BLOCK_ENDS,
    **_RESNET,
)
MODELS.register(
    "resnext29_2x64d",
    "learn2perturb.models.resnext:resnext29_2x64d",
    "ResNeXt-29 with 2 groups of 64 channels and a 1 x 1 stem, the network of RSE",
    paper="Xie et al., Aggregated Residual Transformations for Deep Neural Networks",
    year=2017,
    sites=("bn1", "layer*.*.bn3"),
)
MODELS.register(
    "wrn_28_10",
    "learn2perturb.models.wide_resnet:wrn_28_10",
    "wide pre-activation ResNet, 28 layers, 10 times as wide; shortcut='pad', leak=0.1 is PixelDP's",
    paper="Zagoruyko, Komodakis, Wide Residual Networks",
    year=2016,
    # In a pre-activation network nothing follows the stem but the addition, and a branch ends in a convolution.
    sites=("conv1", "layer*.*.conv2"),
)
MODELS.register(
    "digits_cnn",
    "learn2perturb.models.digits_cnn:digits_cnn",
    "small residual network for the 8 x 8 digits: seconds an epoch on a laptop",
    sites=("bn1", "block*.bn2"),
)

DATASETS.register(
    "digits",
    "learn2perturb.data.digits:load_digits",
    "1,797 handwritten digits of 8 x 8 pixels, embedded: needs no download",
    paper="Alpaydin, Kaynak, Optical Recognition of Handwritten Digits (UCI)",
    year=1998,
)
DATASETS.register(
    "cifar10",
    "learn2perturb.data.cifar:load_cifar10",
    "50,000 + 10,000 colour images of 32 x 32 pixels, 10 classes",
    paper="Krizhevsky, Learning Multiple Layers of Features from Tiny Images",
    year=2009,
)
DATASETS.register(
    "cifar100",
    "learn2perturb.data.cifar:load_cifar100",
    "50,000 + 10,000 colour images of 32 x 32 pixels, 100 classes",
    paper="Krizhevsky, Learning Multiple Layers of Features from Tiny Images",
    year=2009,
)
DATASETS.register(
    "folder",
    "learn2perturb.data.folder:load_folder",
    "your images: ROOT/train/CLASS/*.png and ROOT/test/CLASS/*.png",
)

ATTACKS.register(
    "fgsm",
    "learn2perturb.attacks.fgsm:FGSM",
    "one step along the sign of the gradient",
    paper="Goodfellow et al., Explaining and Harnessing Adversarial Examples",
    year=2015,
)
ATTACKS.register(
    "pgd",
    "learn2perturb.attacks.pgd:PGD",
    "projected gradient descent from a random start, with EOT and restarts",
    paper="Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks",
    year=2018,
)
_AUTO: dict[str, Any] = {
    "paper": "Croce, Hein, Reliable evaluation of adversarial robustness with an ensemble of parameter-free attacks",
    "year": 2020,
}
ATTACKS.register(
    "apgd",
    "learn2perturb.attacks.apgd:APGD",
    "PGD with momentum that halves its step, image by image, where the loss no longer rises",
    **_AUTO,
)
ATTACKS.register(
    "apgd_t",
    "learn2perturb.attacks.apgd:APGD",
    "APGD on the targeted difference-of-logits ratio, for the 9 most likely wrong classes in turn",
    arguments={"loss": "dlr", "targets": 9},
    **_AUTO,
)
ATTACKS.register(
    "fab",
    "learn2perturb.attacks.fab:FAB",
    "the nearest image that fools the model, by steps onto the linearised boundary",
    paper="Croce, Hein, Minimally distorted Adversarial Examples with a Fast Adaptive Boundary Attack",
    year=2020,
)
ATTACKS.register(
    "square",
    "learn2perturb.attacks.square:Square",
    "random search with squares of falling size; reads logits only",
    paper="Andriushchenko et al., Square Attack: a query-efficient black-box adversarial attack via random search",
    year=2020,
    needs_gradient=False,
)
ATTACKS.register(
    "rays",
    "learn2perturb.attacks.rays:RayS",
    "the ray of signs on which the label changes soonest; reads labels only",
    paper="Chen, Gu, RayS: A Ray Searching Method for Hard-label Adversarial Attack",
    year=2020,
    needs_gradient=False,
)
ATTACKS.register(
    "spsa",
    "learn2perturb.attacks.spsa:SPSA",
    "PGD along a gradient estimated from values at random signs; reads logits only",
    paper="Uesato et al., Adversarial Risk and the Dangers of Evaluating Against Weak Attacks",
    year=2018,
    needs_gradient=False,
)
ATTACKS.register(
    "nes",
    "learn2perturb.attacks.spsa:SPSA",
    "the same with Gaussian directions in antithetic pairs: natural evolution strategies",
    paper="Ilyas et al., Black-box Adversarial Attacks with Limited Queries and Information",
    year=2018,
    arguments={"sampling": "gaussian"},
    needs_gradient=False,
)
ATTACKS.register(
    "autoattack",
    "learn2perturb.attacks.auto_attack:AutoAttack",
    "APGD-CE, APGD-T, FAB-T and Square; each image's worst",
    **_AUTO,
)
ATTACKS.register(
    "autoattack_rand",
    "learn2perturb.attacks.auto_attack:AutoAttack",
    "APGD-CE and APGD-DLR with 20 draws a gradient; each image's worst by repeated fresh draws",
    arguments={"version": "rand", "eot": 20},
    **_AUTO,
)
ATTACKS.register(
    "arc",
    "learn2perturb.attacks.arc:ARC",
    "steps over the boundaries of a finite random ensemble's members to its lowest exact accuracy",
    paper="Dbouk, Shanbhag, Adversarial Vulnerability of Randomized Ensembles",
    year=2022,
    finite_ensembles=True,
)
ATTACKS.register(
    "cw",
    "learn2perturb.attacks.cw:CW",
    "smallest l2 perturbation that gives a margin of the confidence, by Adam and a search for the constant",
    paper="Carlini, Wagner, Towards Evaluating the Robustness of Neural Networks",
    year=2017,
)
ATTACKS.register(
    "few_pixel",
    "learn2perturb.attacks.few_pixel:FewPixel",
    "differential evolution over places and colours of eps pixels; a black-box attack",
    paper="Su et al., One pixel attack for fooling deep neural networks",
    year=2019,
    needs_gradient=False,
)
ATTACKS.register(
    "transfer",
    "learn2perturb.attacks.transfer:Transfer",
    "images crafted on another model, the source",
    paper="Papernot et al., Transferability in machine learning",
    year=2016,
    needs=("attack", "source"),
)
ATTACKS.register(
    "surrogate",
    "learn2perturb.attacks.surrogate:Surrogate",
    "PGD on a small network trained on the model's own answers; reads logits only",
    paper="Papernot et al., Practical Black-Box Attacks against Machine Learning",
    year=2017,
    needs_gradient=False,
)
ATTACKS.register(
    "bpda",
    "learn2perturb.attacks.bpda:BPDA",
    "an attack with the gradient of chosen submodules replaced by that of the identity or a surrogate",
    paper="Athalye et al., Obfuscated Gradients Give a False Sense of Security",
    year=2018,
    needs=("attack", "modules"),
)

NOISES.register(
    "feature",
    "learn2perturb.noise.laws:Perturbation",
    "additive, of a learned or fixed size: v + theta eps",
    paper="Jeddi et al., Learn2Perturb",
    year=2020,
)
NOISES.register(
    "weight",
    "learn2perturb.noise.laws:WeightPerturbation",
    "in units of the spread of the whole value: v + alpha std(v) eps",
    paper="He et al., Parametric Noise Injection",
    year=2019,
)
NOISES.register(
    "variational",
    "learn2perturb.noise.laws:VariationalWeight",
    "a Gaussian posterior with a deviation for each element: mu + exp(s) eps",
    paper="Liu et al., Adv-BNN: Improved Adversarial Defense through Robust Bayesian Neural Network",
    year=2018,
)
NOISES.register(
    "multiplicative",
    "learn2perturb.noise.laws:Multiplicative",
    "in proportion to each element: v (1 + sigma eps)",
    paper="Kingma, Salimans, Welling, Variational Dropout and the Local Reparameterization Trick",
    year=2015,
)
for _name, _target, _summary, _paper, _year in (
    (
        "correlated",
        "correlated:CorrelatedNoise",
        "correlated noise on a vector of features: h + L eps",
        "Eustratiadis et al., Weight-Covariance Alignment for Adversarially Robust Neural Networks",
        2021,
    ),
    (
        "projection",
        "projection:RandomProjection",
        "filters of a convolution that are drawn anew in every pass, beside learned ones",
        "Dong, Xu, Adversarial Robustness via Random Projection Filters",
        2023,
    ),
    (
        "norms",
        "norms:RandomNorm",
        "a BatchNorm or one of several GroupNorms, picked in every pass",
        "Dong et al., Random Normalization Aggregation for Adversarial Defense",
        2022,
    ),
    (
        "members",
        "members:RandomMember",
        "the network or one of its copies answers each image: a random ensemble",
        "Pinot et al., Randomization matters",
        2020,
    ),
    (
        "gain",
        "gain:RandomGain",
        "features times random weights of learned mean and deviation: v (mu + sigma eps)",
        "Ma et al., Adversarial Robustness through Random Weight Sampling",
        2023,
    ),
):
    NOISES.register(_name, f"learn2perturb.noise.{_target}", _summary, paper=_paper, year=_year, everywhere=False)
DEFENSES.register(
    "none",
    "learn2perturb.defenses.none:NoDefense",
    "plain training on clean images: the undefended network",
    recordable=True,
    stochastic=False,
    adversarial=False,
)
DEFENSES.register(
    "pgd_at",
    "learn2perturb.defenses.pgd_at:PGDTraining",
    "PGD adversarial training, half clean and half adversarial loss",
    paper="Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks",
    year=2018,
    aliases=("vanilla",),
    recordable=True,
    baseline=True,
    stochastic=False,
    adversarial=True,
)
DEFENSES.register(
    "madry",
    "learn2perturb.defenses.madry:Madry",
    "PGD adversarial training as first proposed, on adversarial examples only",
    paper="Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks",
    year=2018,
    recordable=True,
    stochastic=False,
    adversarial=True,
)
DEFENSES.register(
    "trades",
    "learn2perturb.defenses.trades:Trades",
    "clean loss and stability: the KL between the predictions for x and for its worst neighbour",
    paper="Zhang et al., Theoretically Principled Trade-off between Robustness and Accuracy",
    year=2019,
    recordable=True,
    stochastic=False,
    adversarial=True,
)
DEFENSES.register(
    "mart",
    "learn2perturb.defenses.mart:MART",
    "a boosted loss on adversarial examples, and stability most where the clean image is wrong",
    paper="Wang et al., Improving Adversarial Robustness Requires Revisiting Misclassified Examples",
    year=2020,
    recordable=True,
    stochastic=False,
    adversarial=True,
)
DEFENSES.register(
    "hat",
    "learn2perturb.defenses.hat:HAT",
    "TRADES, and examples beyond the adversarial ones that a standard network labels",
    paper="Rade, Moosavi-Dezfooli, Reducing Excessive Margin to Achieve a Better Accuracy vs. Robustness Trade-off",
    year=2022,
    stochastic=False,
    adversarial=True,
)
DEFENSES.register(
    "learn2perturb",
    "learn2perturb.defenses.learn2perturb:Learn2Perturb",
    "learned feature noise by alternating back-propagation, with PGD adversarial training",
    paper="Jeddi et al., Learn2Perturb",
    year=2020,
    recordable=True,
    baseline=True,
    stochastic=True,
    adversarial=True,
)
DEFENSES.register(
    "learn2perturb_r",
    "learn2perturb.defenses.learn2perturb:Learn2Perturb",
    "Learn2Perturb whose noise follows the regulariser alone: a schedule, not learned",
    paper="Jeddi et al., Learn2Perturb, section 4.1",
    year=2020,
    arguments={"noise_from_loss": False},
    recordable=True,
    stochastic=True,
    adversarial=True,
)
DEFENSES.register(
    "pni",
    "learn2perturb.defenses.pni:PNI",
    "learned noise of the size of the weights (or of layer outputs or inputs), with PGD adversarial training",
    paper="He et al., Parametric Noise Injection",
    year=2019,
    recordable=True,
    stochastic=True,
    adversarial=True,
)
DEFENSES.register(
    "adv_bnn",
    "learn2perturb.defenses.adv_bnn:AdvBNN",
    "variational weights by Adam on adversarial examples, mean softmax over draws",
    paper="Liu et al., Adv-BNN: Improved Adversarial Defense through Robust Bayesian Neural Network",
    year=2018,
    recordable=True,
    stochastic=True,
    adversarial=True,
)
for _name, _how, _adversarial in (("rse", "clean training", False), ("rse_at", "PGD adversarial training", True)):
    DEFENSES.register(
        _name,
        "learn2perturb.defenses.rse:RSE",
        f"fixed Gaussian noise before every convolution, {_how}, mean softmax over draws",
        paper="Liu et al., Towards Robust Neural Networks via Random Self-ensemble",
        year=2018,
        arguments={"adversarial": _adversarial},
        recordable=True,
        stochastic=True,
        adversarial=_adversarial,
    )
DEFENSES.register(
    "smoothadv",
    "learn2perturb.defenses.smoothadv:SmoothAdv",
    "noise on the image; the mean softmax over draws is trained as such, on its own adversarial examples",
    paper="Salman et al., Provably Robust Deep Learning via Adversarially Trained Smoothed Classifiers",
    year=2019,
    recordable=True,
    stochastic=True,
    adversarial=True,
)
for _name, _how, _adversarial in (("wca", "clean training", False), ("wca_at", "PGD adversarial training", True)):
    DEFENSES.register(
        _name,
        "learn2perturb.defenses.wca:WCA",
        f"correlated noise on the last features, aligned with the classifier, {_how}",
        paper="Eustratiadis et al., Weight-Covariance Alignment for Adversarially Robust Neural Networks",
        year=2021,
        arguments={"adversarial": _adversarial},
        recordable=True,
        stochastic=True,
        adversarial=_adversarial,
    )
DEFENSES.register(
    "rpf",
    "learn2perturb.defenses.rpf:RPF",
    "random projection filters: most of the first convolution is drawn anew in every pass",
    paper="Dong, Xu, Adversarial Robustness via Random Projection Filters",
    year=2023,
    stochastic=True,
    adversarial=True,
)
DEFENSES.register(
    "rna",
    "learn2perturb.defenses.rna:RNA",
    "every BatchNorm is itself or a GroupNorm, picked anew in every pass",
    paper="Dong et al., Random Normalization Aggregation for Adversarial Defense",
    year=2022,
    stochastic=True,
    adversarial=True,
)
DEFENSES.register(
    "ctrw",
    "learn2perturb.defenses.ctrw:CTRW",
    "the image times random weights of learned mean and deviation, the latter held above a bound",
    paper="Ma et al., Adversarial Robustness through Random Weight Sampling",
    year=2023,
    stochastic=True,
    adversarial=True,
)
DEFENSES.register(
    "bat",
    "learn2perturb.defenses.bat:BAT",
    "a random ensemble: an adversarially trained network, rarely one trained on attacks on it",
    paper="Pinot et al., Randomization matters. How to defend against strong adversarial attacks",
    year=2020,
    stochastic=True,
    adversarial=True,
    finite_ensemble=True,
)
DEFENSES.register(
    "barre",
    "learn2perturb.defenses.barre:BARRE",
    "a random ensemble whose members are trained one after the other against attacks on all so far",
    paper="Dbouk, Shanbhag, On the Robustness of Randomized Ensembles to Adversarial Perturbations",
    year=2023,
    stochastic=True,
    adversarial=True,
    finite_ensemble=True,
)
DEFENSES.register(
    "pixeldp",
    "learn2perturb.defenses.pixeldp:PixelDP",
    "one noise layer whose size follows from a bound on what precedes it, so that answers are certified",
    paper="Lecuyer et al., Certified Robustness to Adversarial Examples with Differential Privacy",
    year=2019,
    stochastic=True,
    adversarial=False,
)
