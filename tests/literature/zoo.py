"""The zoo: defenses from the literature on the digits, what each is, and how it is attacked best."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from learn2perturb.data import load_data
from learn2perturb.noise import fixed_noise, perturb
from tests.literature import honest, later, masked, randomised
from tests.literature.networks import Behind, Small, base, distilled, fitted, paired, squeezed

Model = Callable[[Tensor], Tensor]
Kind = Literal["masked", "random", "honest"]
SITES = {"sites": ["conv1", "conv2"]}


@dataclass(frozen=True)
class Entry:
    """A defense.

    Attributes:
        name, paper: what it is called, and where it is from.
        kind: ``masked`` must never pass every check that applies; ``random`` and ``honest`` must never fail one.
            Neither says that the defense is robust: an undefended network with true gradients hides nothing.
        build: makes the model, in eval mode.
        adaptive: makes what the best known attack differentiates in its place; None: the model itself.
        noise_off: makes the model without its noise, where the package cannot find that by itself.
        lives_on_noise: draws are all that it has over an undefended network, which check 6 may say.
    """

    name: str
    paper: str
    kind: Kind
    build: Callable[[], nn.Module]
    adaptive: Callable[[], nn.Module] | None = None
    noise_off: Callable[[], nn.Module] | None = None
    lives_on_noise: bool = False

    def model(self) -> nn.Module:
        """Return the model, in eval mode."""
        return self.build().eval()


class Replayed(nn.Module):
    """Noise of the package, replayed in every pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with fixed_noise(self.model, 0):
            return self.model(x)


def _denoiser() -> nn.Module:
    return honest.Denoiser(base("undefended"))


_TRAINED: dict[str, Callable[[], nn.Module]] = {
    "thermometer": lambda: fitted(lambda: Behind(masked.thermometer, Small(8))),
    "k-WTA": lambda: fitted(lambda: Small(activation=masked.KWTA())),
    "k-WTA, adversarial": lambda: fitted(lambda: Small(activation=masked.KWTA(0.2)), "madry"),
    "distilled": lambda: distilled(100.0),
    "saturating": lambda: fitted(lambda: Small(activation=lambda x: x.sigmoid()), epochs=20),
    "blocks": lambda: fitted(lambda: Behind(masked.blockwise, Small())),
    "resized": lambda: fitted(lambda: Behind(randomised.resize_pad, Small())),
    "Gaussian": lambda: fitted(lambda: randomised.GaussianInput(Small(), 0.25)),
    "Gaussian, adversarial": lambda: fitted(lambda: randomised.GaussianInput(Small(), 0.1), "madry"),
    "RPF": lambda: fitted(randomised.RandomFilters, "madry", epochs=20),
    "WCA": lambda: fitted(randomised.Correlated),
    "foreign RSE": lambda: fitted(randomised.ForeignRSE),
    "RSE": lambda: fitted(Small, "rse"),
    "PixelDP": lambda: fitted(Small, "pixeldp"),
    "PNI": lambda: fitted(Small, "pni"),
    "Adv-BNN": lambda: fitted(Small, "adv_bnn"),
    "Learn2Perturb": lambda: fitted(Small, "learn2perturb", options=SITES),
    "Learn2Perturb, per batch": lambda: fitted(Small, "learn2perturb", options={**SITES, "sharing": "per_batch"}),
    "TRADES": lambda: fitted(Small, "trades"),
    "AWP": lambda: fitted(Small, "madry", awp=5e-3),
    "half and half": lambda: fitted(Small, "pgd_at"),
    "straight-through": lambda: fitted(lambda: Small(activation=honest.straight_through), "madry"),
    "smooth": lambda: fitted(lambda: Small(activation=honest.smooth), "madry"),
    "output codes": lambda: fitted(lambda: later.OutputCodes(_sixteen()), epochs=10),
    "logit squeezing": lambda: squeezed(later.squeezing),
    "logit pairing": paired,
    "dithered": lambda: fitted(lambda: Small(activation=later.dithered), "madry"),
    "binary": lambda: fitted(lambda: Small(activation=later.binary), "madry", epochs=25),
    "denoiser": lambda: fitted(_denoiser, "madry", epochs=10),
}


@functools.cache
def trained(name: str) -> nn.Module:
    """Return a network of the zoo, trained once; nobody changes it."""
    return _TRAINED[name]()


def _undefended() -> nn.Module:
    return base("undefended")


def _robust() -> nn.Module:
    return base("pgd_at")


def _behind(transform: Callable[[Tensor], Tensor], network: str = "undefended") -> Callable[[], nn.Module]:
    return lambda: Behind(transform, base(network))


def _of(name: str) -> Callable[[], nn.Module]:
    return lambda: trained(name)


def _images() -> Tensor:
    return load_data("digits", "train").images.float() / 255


def _sixteen() -> nn.Module:
    network = Small()
    network.out = nn.Linear(128, 16)
    return network


def _manifold() -> masked.Manifold:
    return masked.Manifold(_images())


def _pair() -> list[nn.Module]:
    return [base("undefended"), base("undefended 2")]


def _with_weights(network: nn.Module, other: nn.Module) -> nn.Module:
    """Return ``network`` with the weights of ``other``, whose layers have the same names."""
    network.load_state_dict(other.state_dict())
    return network


def _plain(network: nn.Module) -> nn.Module:
    """Return the network with activations that only clip: rounding at random, without its draws."""
    return _with_weights(Small(activation=lambda x: x.relu().clamp(max=2.0)), network)


def _pruned() -> nn.Module:
    return _with_weights(Small(activation=randomised.SAP()), base("undefended"))


def _saturated() -> nn.Module:
    return _with_weights(Small(activation=masked.saturating), trained("saturating"))


def _quiet_rse() -> nn.Module:
    return _with_weights(randomised.ForeignRSE(quiet=True), trained("foreign RSE"))


def _denoised() -> Model:
    denoiser = trained("denoiser")
    return lambda x: x + denoiser.second(denoiser.first(x).relu())


def _stronger_quiet() -> nn.Module:
    """Noise at test time on a network trained without: it only costs, and says so."""
    return perturb(copy.deepcopy(base("pgd_at")), input_shape=(1, 8, 8), **SITES, init=0.5).eval()


MASKED = (
    Entry("bit depth, 4 bits", "Xu 2018", "masked", _behind(lambda x: masked.levels(x, 16)), _undefended),
    Entry("bit depth, 1 bit", "Xu 2018", "masked", _behind(lambda x: masked.levels(x, 2)), _undefended),
    Entry("bit depth on PGD training", "Xu 2018", "masked", _behind(lambda x: masked.levels(x, 8), "pgd_at"), _robust),
    Entry("median filter", "Xu 2018", "masked", _behind(masked.median), _behind(honest.smoothing)),
    Entry(
        "thermometer code",
        "Buckman 2018",
        "masked",
        _of("thermometer"),
        lambda: Behind(masked.soft_thermometer, trained("thermometer").network),
    ),
    Entry("JPEG", "Guo 2018", "masked", _behind(masked.jpeg), _undefended),
    Entry("total variation", "Guo 2018", "masked", _behind(masked.total_variation), _behind(honest.smoothing)),
    Entry("pixel discretisation", "Chen 2019", "masked", _of("blocks"), _undefended),
    Entry(
        "projection on a manifold",
        "Samangouei 2018",
        "masked",
        lambda: Behind(masked.Stopped(_manifold()), base("undefended")),
        lambda: Behind(_manifold(), base("undefended")),
    ),
    Entry(
        "denoiser without gradient",
        "Liao 2018",
        "masked",
        lambda: Behind(masked.Stopped(_denoised()), base("undefended")),
        _of("denoiser"),
    ),
    Entry("k-winners-take-all", "Xiao 2020", "masked", _of("k-WTA")),
    Entry("k-winners-take-all, adversarial", "Xiao 2020", "masked", _of("k-WTA, adversarial")),
    Entry("defensive distillation", "Papernot 2016", "masked", _of("distilled")),
    Entry("temperature", "Papernot 2016", "masked", lambda: masked.Scaled(base("undefended"), 1e3), _undefended),
    Entry("saturating activations", "Nayebi 2017", "masked", _saturated, _of("saturating")),
    Entry("noisy gradient", "Lee 2019", "masked", _behind(masked.noisy_gradient), _undefended),
    Entry("decoy: undefended, undefended", "Athalye 2018", "masked", lambda: masked.Decoy(*_pair()), _undefended),
    Entry(
        "decoy: PGD training, PGD training",
        "Athalye 2018",
        "masked",
        lambda: masked.Decoy(base("pgd_at"), base("twin")),
        _robust,
    ),
    Entry(
        "decoy: linear",
        "Athalye 2018",
        "masked",
        lambda: masked.Decoy(base("undefended"), masked.Flattened()),
        _undefended,
    ),
    Entry("labels only", "Brendel 2018", "masked", lambda: masked.Labels(base("undefended")), _undefended),
    Entry("votes of networks", "Sen 2020", "masked", lambda: masked.Votes([*_pair(), base("pgd_at")]), _undefended),
    Entry(
        "noise seeded by the image",
        "Guo 2018",
        "masked",
        lambda: masked.FakedNoise(base("undefended"), 0.1, seeded=True),
        _undefended,
    ),
    Entry(
        "noise with one seed",
        "Athalye 2018",
        "masked",
        lambda: masked.FakedNoise(base("undefended"), 0.1, seeded=False),
        _undefended,
    ),
    Entry("noise from a pool", "Athalye 2018", "masked", lambda: masked.PooledNoise(base("undefended"), 0.1)),
    Entry("replayed Learn2Perturb", "Jeddi 2020", "masked", lambda: Replayed(trained("Learn2Perturb"))),
    Entry(
        "vector quantisation",
        "Oord 2017",
        "masked",
        lambda: Behind(later.PatchCodes(_images()), base("undefended")),
        _undefended,
    ),
    Entry("squashed logits", "", "masked", lambda: later.Squashed(base("undefended")), _undefended),
    Entry("cut gradient", "", "masked", _behind(later.cut_gradient), _undefended),
    Entry("noise from a hash", "", "masked", _behind(later.hashed_noise), _undefended),
    Entry("output codes", "Verma 2019", "masked", _of("output codes")),
    Entry("squeezing as a gate", "Xu 2018", "masked", lambda: later.Gate(base("undefended")), _undefended),
    Entry("constant where suspicious", "Grosse 2017", "masked", lambda: later.Constant(base("pgd_at")), _robust),
    Entry("logit squeezing", "Kannan 2018", "masked", _of("logit squeezing")),
    Entry("binary activations", "Hubara 2016", "masked", _of("binary")),
)
RANDOM = (
    Entry("SAP", "Dhillon 2018", "random", _pruned, noise_off=_undefended, lives_on_noise=True),
    Entry(
        "dropout at test time, by function",
        "Gal 2016",
        "random",
        lambda: randomised.DroppedAtTest(base("undefended")),
        noise_off=_undefended,
        lives_on_noise=True,
    ),
    Entry(
        "dropout at test time, modules",
        "Gal 2016",
        "random",
        lambda: randomised.DropoutModules(base("undefended")),
        lives_on_noise=True,
    ),
    Entry(
        "resize and pad",
        "Xie 2018",
        "random",
        _of("resized"),
        noise_off=lambda: trained("resized").network,
        lives_on_noise=True,
    ),
    Entry(
        "finite ensemble, .9 and .1",
        "Pinot 2020",
        "random",
        lambda: randomised.Ensemble([base("pgd_at"), base("twin")], [0.9, 0.1]),
        noise_off=_robust,
    ),
    Entry(
        "finite ensemble, for each image",
        "Pinot 2020",
        "random",
        lambda: randomised.Ensemble([base("pgd_at"), base("undefended")], [0.9, 0.1], own=True),
        noise_off=_robust,
    ),
    Entry(
        "finite ensemble, even",
        "Pinot 2020",
        "random",
        lambda: randomised.Ensemble([base("pgd_at"), base("twin")], [0.5, 0.5]),
        noise_off=_robust,
    ),
    Entry(
        "Gaussian noise on images",
        "Cohen 2019",
        "random",
        _of("Gaussian"),
        noise_off=lambda: trained("Gaussian").network,
        lives_on_noise=True,
    ),
    Entry(
        "Gaussian noise, adversarial",
        "Salman 2019",
        "random",
        _of("Gaussian, adversarial"),
        noise_off=lambda: trained("Gaussian, adversarial").network,
    ),
    Entry(
        "randomised smoothing",
        "Cohen 2019",
        "random",
        lambda: randomised.Smoothed(trained("Gaussian").network, 0.25),
        noise_off=lambda: trained("Gaussian").network,
        lives_on_noise=True,
    ),
    Entry(
        "random votes",
        "Cohen 2019",
        "random",
        lambda: randomised.Smoothed(trained("Gaussian").network, 0.25, votes=True),
        _of("Gaussian"),
        lambda: trained("Gaussian").network,
        lives_on_noise=True,
    ),
    Entry(
        "weight noise of a user's own",
        "He 2019",
        "random",
        lambda: randomised.WeightNoise(base("pgd_at"), 0.2),
        noise_off=_robust,
    ),
    Entry("random projection filters", "Dong 2023", "random", _of("RPF")),
    Entry("WCA-Net", "Eustratiadis 2021", "random", _of("WCA"), noise_off=lambda: trained("WCA").network),
    Entry("RSE in plain torch", "Liu 2018", "random", _of("foreign RSE"), noise_off=_quiet_rse),
    Entry("RSE", "Liu 2018", "random", _of("RSE")),
    Entry("PixelDP", "Lecuyer 2019", "random", _of("PixelDP")),
    Entry("PNI", "He 2019", "random", _of("PNI")),
    Entry("Adv-BNN", "Liu 2019", "random", _of("Adv-BNN")),
    Entry("Learn2Perturb", "Jeddi 2020", "random", _of("Learn2Perturb")),
    Entry("Learn2Perturb, per batch", "Jeddi 2020", "random", _of("Learn2Perturb, per batch")),
    Entry(
        "barrage of smooth transforms",
        "Raff 2019",
        "random",
        lambda: later.Barrage(base("pgd_at"), smooth=True),
        noise_off=_robust,
    ),
    Entry(
        "mixup inference",
        "Pang 2020",
        "random",
        lambda: later.MixupInference(base("pgd_at"), _images()),
        noise_off=_robust,
    ),
    Entry(
        "stochastic rounding", "Gupta 2015", "random", _of("dithered"), noise_off=lambda: _plain(trained("dithered"))
    ),
)
HONEST = (
    Entry("undefended", "", "honest", _undefended),
    Entry("PGD training", "Madry 2018", "honest", _robust),
    Entry("half clean, half adversarial", "Goodfellow 2015", "honest", _of("half and half")),
    Entry("TRADES", "Zhang 2019", "honest", _of("TRADES")),
    Entry("AWP", "Wu 2020", "honest", _of("AWP")),
    Entry("straight-through quantisation", "Lin 2019", "honest", _of("straight-through")),
    Entry("smooth adversarial training", "Xie 2020", "honest", _of("smooth")),
    Entry("blur", "Li 2017", "honest", _behind(honest.smoothing, "pgd_at")),
    Entry("HGD-like denoiser", "Liao 2018", "honest", _of("denoiser")),
    Entry("ensemble, mean of logits", "Tramer 2018", "honest", lambda: honest.Averaged([base("pgd_at"), base("twin")])),
    Entry("stronger with its noise off", "Liu 2018", "honest", _stronger_quiet),
    Entry("largest of two networks", "", "honest", lambda: later.Largest([base("pgd_at"), base("twin")])),
    Entry("half precision", "", "honest", lambda: later.Half(base("pgd_at"))),
    Entry("adversarial logit pairing", "Kannan 2018", "honest", _of("logit pairing")),
)
ZOO = (*MASKED, *RANDOM, *HONEST)


def by_name(name: str) -> Entry:
    """Return the entry of that name."""
    return next(entry for entry in ZOO if entry.name == name)
