"""Mutants that once survived, each by name: a test of behaviour must kill it. And those that change no behaviour."""

from __future__ import annotations

import pathlib
from dataclasses import dataclass

from tests.laboratories.mutants import Mutant


@dataclass(frozen=True)
class Listed:
    """``old`` stands once in the file; ``new`` takes its place; ``tests`` are what must fail then."""

    name: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...]

    def mutant(self, source: pathlib.Path) -> Mutant:
        """Return it for the source as it is now.

        Raises:
            ValueError: the text is not there, or there twice: write the change anew.
        """
        text = (source / self.path).read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.old!r} stands {text.count(self.old)} times in {self.path}, not once")
        line = text[: text.index(self.old)].count("\n") + 1
        return Mutant(self.path, line, self.old, self.new, text.replace(self.old, self.new))


_CHECKS, _ATTACKS, _TRAINING = "diagnosis", "attacks", "training"
_VERDICTS = ("tests/diagnosis/test_verdicts.py", "tests/diagnosis/test_diagnosing.py")

LISTED = (
    Listed("CONVERGED tenfold", f"{_CHECKS}/whitebox.py", "CONVERGED = 0.005", "CONVERGED = 0.05", _VERDICTS),
    Listed("BEST_AHEAD tenfold", f"{_CHECKS}/whitebox.py", "BEST_AHEAD = 0.02", "BEST_AHEAD = 0.2", _VERDICTS),
    Listed("UNBOUNDED_LEFT tenfold", f"{_CHECKS}/whitebox.py", "UNBOUNDED_LEFT = 0.01", "UNBOUNDED_LEFT = 0.1",
           _VERDICTS),
    Listed("NEW_BREAKS tenfold", f"{_CHECKS}/blackbox.py", "NEW_BREAKS = 0.01", "NEW_BREAKS = 0.1", _VERDICTS),
    Listed("NOISE_OFF_BELOW tenfold", f"{_CHECKS}/blackbox.py", "NOISE_OFF_BELOW = 0.05", "NOISE_OFF_BELOW = 0.5",
           _VERDICTS),
    Listed("departure as a deviation", f"{_TRAINING}/metrics.py", "(scale - schedule).square().mean().sqrt().item()",
           "(scale - schedule).std().item()", ("tests/training",)),
    Listed("the least departure", f"{_TRAINING}/metrics.py", 'max(site["departure"]', 'min(site["departure"]',
           ("tests/training",)),
    Listed("means weighted by 1", f"{_TRAINING}/metrics.py", "((parts, examples), (slopes, 1))",
           "((parts, 1), (slopes, 1))", ("tests/training",)),
    Listed("the monitored set of the training split", f"{_TRAINING}/sources.py",
           'else load_data(config.dataset, "test"', 'else load_data(config.dataset, "train"',
           ("tests/training",)),
    Listed("the class chosen on the certifying votes", "certification/certifying.py", "    counts = votes[",
           "    chosen = votes.argmax(axis=1)\n    counts = votes[", ("tests/certification/test_radii.py",)),
    Listed("alpha doubled", "certification/certifying.py", "lower_bound(counts, n, alpha)",
           "lower_bound(counts, n, 2 * alpha)", ("tests/certification/test_radii.py",)),
    Listed("a row's key without the predictor", "evaluation/comparing.py",
           "(one.attack_type, one.noise, one.predictor)", "(one.attack_type, one.noise, other.predictor)",
           ("tests/evaluation/test_comparing.py",)),
    Listed("the first scoring on the attack's stream", "evaluation/rows.py",
           'seed_everything(self.seed, "score", self.name, eps, batch, draw)',
           'seed_everything(*((self.seed, "score", self.name, eps, batch, draw) if draw else '
           '(derive_seed(self.seed, "attack", self.name, eps, batch), "attack")))',
           ("tests/evaluation/test_evaluating.py",)),
    Listed("the twin of the same seed", "cli/sources.py", "seed=config.seed + 1", "seed=config.seed",
           ("tests/cli/test_diagnose.py",)),
    Listed("APGD's smallest window of 1", f"{_ATTACKS}/apgd.py", "int(0.06 * self.steps), 1)", "1, 1)",
           ("tests/attacks/test_apgd.py",)),
    Listed("APGD's first step of eps", f"{_ATTACKS}/apgd.py", "2 * self.eps)", "self.eps)",
           ("tests/attacks/test_apgd.py",)),
    Listed("APGD halves twice", f"{_ATTACKS}/apgd.py", "(~self.was_halved & (self.best_loss <= self.checked_loss))",
           "(self.best_loss <= self.checked_loss)", ("tests/attacks/test_apgd.py",)),
    Listed("FAB's overshoot of 1.5", f"{_ATTACKS}/fab.py", "_OVERSHOOT = 1.05", "_OVERSHOOT = 1.5",
           ("tests/attacks/test_fab.py",)),
    Listed("FAB's alpha of 0.9", f"{_ATTACKS}/fab.py", "_ALPHA = 0.1", "_ALPHA = 0.9", ("tests/attacks/test_fab.py",)),
    Listed("FAB's backward step of 0.5", f"{_ATTACKS}/fab.py", "_BACK = 0.9", "_BACK = 0.5",
           ("tests/attacks/test_fab.py",)),
    Listed("C&W's c times 2", f"{_ATTACKS}/cw.py", "middle, c * 10)", "middle, c * 2)", ("tests/attacks/test_cw.py",)),
    Listed("C&W without the standard error", f"{_ATTACKS}/cw.py",
           "margins.mean(dim=0) - margins.std(dim=0, correction=0) / math.sqrt(draws)", "margins.mean(dim=0)",
           ("tests/attacks/test_cw.py",)),
    Listed("Square accepts ties", f"{_ATTACKS}/square.py", "values.loss > best_loss", "values.loss >= best_loss",
           ("tests/attacks/test_square.py",)),
    Listed("Square ahead accepts ties", f"{_ATTACKS}/ahead.py", "loss > self.best_loss", "loss >= self.best_loss",
           ("tests/attacks/test_ahead.py",)),
    Listed("the batch-size check tolerates more", "evaluation/inputs.py", "_TOLERANCE = 1e-3", "_TOLERANCE = 5e-1",
           ("tests/evaluation",)),
    Listed("replay only while training", "noise/base.py", "        if self.replay is not None:\n",
           "        if self.replay is not None and self.training:\n", ("tests/noise",)),
)  # fmt: skip

# (path, name): how much is done at once, which changes memory and time only; not mutated.
SPEED = {
    ("engine/execution.py", "_POINTS"),
    ("engine/execution.py", "_POINTS_ELSEWHERE"),
    ("engine/windows.py", "_POINTS"),
    ("engine/windows.py", "_POINTS_ELSEWHERE"),
    ("engine/windows.py", "_IN_WINDOWS"),
    ("attacks/ahead.py", "_POINTS_OF_A_PASS"),
    ("attacks/ahead.py", "_POINTS_OF_A_PASS_ELSEWHERE"),
    ("attacks/ahead.py", "_BASE"),
    ("attacks/ahead.py", "_LARGEST_WINDOW"),
    ("attacks/ahead.py", "_LONGEST"),
    ("attacks/spsa.py", "_ROWS"),
    ("attacks/surrogate.py", "_LOOKED_AT"),
    ("certification/first_noise.py", "_CHUNK"),
    ("evaluation/intervals.py", "_BLOCK"),
    ("evaluation/pace.py", "_INTERVAL"),
}

_BLACK_AND_WHITE = (
    "images = torch.cat([x, torch.rand_like(x), torch.zeros_like(x[:1]), torch.ones_like(x[:1])]).requires_grad_()"
)

_PICTURE = (
    'Image.fromarray(image[0] if len(image) == _GREY else np.moveaxis(image, 0, 2)).save(content, "PNG", optimize=True)'
)

# (path, line of the source without its indent, before, after) -> why nobody can see the difference
EQUIVALENT: dict[tuple[str, str, str, str], str] = {
    ("attacks/proposals.py", "return (x + eps * _signs(x, x.shape[1], 1, x.shape[3])).clamp_(0.0, 1.0)",
     "eps * _signs(x, x.shape[1], 1, x.shape[3])", "(eps) / (_signs(x, x.shape[1], 1, x.shape[3]))"): "1 / +-1 is +-1",
    ("attacks/proposals.py", "return torch.where(inside, (x + eps * self.signs).clamp_(0.0, 1.0), best)",
     "eps * self.signs", "(eps) / (self.signs)"): "1 / +-1 is +-1",
    ("attacks/proposals.py", "colours = (under + eps * self.signs).clamp_(0.0, 1.0)",
     "eps * self.signs", "(eps) / (self.signs)"): "1 / +-1 is +-1",
    ("attacks/proposals.py", "bump = _bump(side, x) * _signs(x, x.shape[1], 1, 1)",
     "_bump(side, x) * _signs(x, x.shape[1], 1, 1)", "(_bump(side, x)) / (_signs(x, x.shape[1], 1, 1))"):
        "1 / +-1 is +-1",
    ("attacks/proposals.py", "fresh[batch, :, rows, columns] = (self.bump * self.signs).permute(0, 2, 3, 1)",
     "self.bump * self.signs", "(self.bump) / (self.signs)"): "1 / +-1 is +-1",
    ("attacks/proposals.py", "weights = torch.tensor([1.0 / (k + 1) ** 2 for k in range(last + 1)])", "1.0", "2.0"):
        "the pyramid is divided by its norm",
    ("attacks/proposals.py", "return torch.where(torch.rand(times, 1, 1, device=like.device) > 0.5, bump.T, bump)",
     "torch.rand(times, 1, 1, device=like.device) > 0.5", "(torch.rand(times, 1, 1, device=like.device)) >= (0.5)"):
        "one number in 2^24 is 0.5",
    ("attacks/square.py", "side = max(side, 3) | 1  # odd, so that a bump has a centre", "3", "2"): "2 | 1 is 3, too",
    ("certification/bounds.py",
     "_DELTAS = np.arange(0.001, 0.3, 0.0005)",
     "0.3",
     "0.6"):
        "beyond 0.3 no delta is the best of all",
    ("certification/first_noise.py",
     "_PROBES = 8",
     "8",
     "9"):
        "one probe more or less",
    ("certification/first_noise.py",
     "_PROBES = 8",
     "8",
     "7"):
        "one probe more or less",
    ("certification/first_noise.py",
     'elif getattr(module, "relative", False):',
     "False",
     "True"):
        "every such module has the attribute",
    ("certification/first_noise.py",
     _BLACK_AND_WHITE,
     "1",
     "2"):
        "one image of zeros, or two",
    ("certification/first_noise.py",
     "other = torch.cat([other, 1 - x])",
     "1 - x",
     "(1) + (x)"):
        "other images than the first, whichever",
    ("certification/first_noise.py",
     "other = torch.cat([other, 1 - x])",
     "1",
     "2"):
        "other images than the first, whichever",
    ("certification/first_noise.py",
     "tried = torch.rand(_PROBES, *shape).to(zero) * 2 - 1",
     "torch.rand(_PROBES, *shape).to(zero) * 2 - 1",
     "(torch.rand(_PROBES, *shape).to(zero) * 2) + (1)"):
        "other random images",
    ("certification/first_noise.py",
     "tried = torch.rand(_PROBES, *shape).to(zero) * 2 - 1",
     "torch.rand(_PROBES, *shape).to(zero) * 2",
     "(torch.rand(_PROBES, *shape).to(zero)) / (2)"):
        "other random images",
    ("certification/first_noise.py",
     "tried = torch.rand(_PROBES, *shape).to(zero) * 2 - 1",
     "2",
     "3"):
        "other random images",
    ("certification/first_noise.py",
     "tried = torch.rand(_PROBES, *shape).to(zero) * 2 - 1",
     "2",
     "1"):
        "other random images",
    ("certification/first_noise.py",
     "tried = torch.rand(_PROBES, *shape).to(zero) * 2 - 1",
     "1",
     "2"):
        "other random images",
    ("certification/first_noise.py",
     "if not bool((reached <= allowed * (1 + _ROUNDING) + _ROUNDING).all()):",
     "allowed * (1 + _ROUNDING)",
     "(allowed) / (1 + _ROUNDING)"):
        "an allowance for rounding has no exact size",
    ("certification/first_noise.py",
     "if not bool((reached <= allowed * (1 + _ROUNDING) + _ROUNDING).all()):",
     "1 + _ROUNDING",
     "(1) - (_ROUNDING)"):
        "an allowance for rounding has no exact size",
    ("certification/first_noise.py",
     "if error > 1e-7 * (1 + float(between.abs().max())):",
     "error > 1e-7 * (1 + float(between.abs().max()))",
     "(error) >= (1e-07 * (1 + float(between.abs().max())))"):
        "an allowance for rounding has no exact edge",
    ("attacks/query.py", "_COMPARED = 4  # images on which a finite ensemble is compared with its members", "4", "5"):
        "one image more",
    ("attacks/query.py", "_COMPARED = 4  # images on which a finite ensemble is compared with its members", "4", "3"):
        "one image less",
    ("evaluation/evaluating.py", '_FIRST_PASS: tuple[str, int] = ("probe", 0)  # its stream of draws', "0", "1"):
        "any name of a stream will do",
    ("evaluation/exact.py", "_COMPARED = 4  # images on which the model is compared with its members", "4", "5"):
        "one image more",
    ("evaluation/exact.py", "_COMPARED = 4  # images on which the model is compared with its members", "4", "3"):
        "one image less",
    ("diagnosis/blackbox.py", "return (x + BALLS[attack.norm].random(x, attack.eps)).clamp_(0, 1)",
     "x + BALLS[attack.norm].random(x, attack.eps)", "(x) - (BALLS[attack.norm].random(x, attack.eps))"):
        "a random point of a ball is as likely as the one opposite",
    ("attacks/arc.py", "point = (x + self.ball.random(x, self.eps)).clamp_(0.0, 1.0) if self.random_start else x",
     "x + self.ball.random(x, self.eps)", "(x) - (self.ball.random(x, self.eps))"):
        "a random point of a ball is as likely as the one opposite",
    ("attacks/gradients.py", 'if average == "loss" and len(draws) > 1:', "len(draws) > 1", "(len(draws)) >= (1)"):
        "the mean over one draw is that draw",
    ("attacks/query.py", "stacked = torch.stack(margins) * (-1 if self._attack.targeted else 1)",
     "torch.stack(margins) * (-1 if self._attack.targeted else 1)",
     "(torch.stack(margins)) / (-1 if self._attack.targeted else 1)"): "1 / +-1 is +-1",
    ("diagnosis/truth.py",
     "move = mean * (reach / length.masked_fill(none, 1.0)).to(mean.dtype).view(-1, *[1] * (x.ndim - 1))",
     "1.0", "2.0"):
        "there the gradient that it divides is zero",
    ("evaluation/inputs.py", "half = x[: _IMAGES // 2] if len(x) > 1 else torch.cat([x, 1 - x])",
     "x[: _IMAGES // 2] if len(x) > 1 else torch.cat([x, 1 - x])", "torch.cat([x, 1 - x])"):
        "the same question about more images",
    ("evaluation/inputs.py", "half = x[: _IMAGES // 2] if len(x) > 1 else torch.cat([x, 1 - x])",
     "_IMAGES // 2", "(_IMAGES) * (2)"):
        "the same question about more images",
    ("evaluation/inputs.py",
     "others = [checked_logits(model, torch.cat([half, 1 - half / 2]))[: len(half)], checked_logits(model, half)]",
     "2", "3"): "other images than the first, whichever",
    ("evaluation/rows.py",
     "pooled: NDArray[np.int64] = dataclasses.field(default_factory=lambda: np.empty(0, dtype=np.int64))", "0", "1"):
        "read only where several draws have filled it",
    ("evaluation/rows.py",
     "predictions: NDArray[np.int64] = dataclasses.field(default_factory=lambda: np.empty((0, 0), dtype=np.int64))",
     "0", "1"):
        "read only where a pass has filled it",
    ("evaluation/result.py",
     "if 0 < round(steps) < 255 and abs(steps - round(steps)) < 1e-6:",
     "abs(steps - round(steps)) < 1e-6",
     "(abs(steps - round(steps))) <= (1e-06)"):
        "an allowance for rounding has no exact edge",
    ("evaluation/result.py",
     "if isinstance(one, Interval) and isinstance(other, Interval):",
     "isinstance(one, Interval) and isinstance(other, Interval)",
     "(isinstance(one, Interval)) or (isinstance(other, Interval))"):
        "types are checked when a record is read",
    ("evaluation/result.py",
     "if isinstance(one, Mapping) and isinstance(other, Mapping):",
     "isinstance(one, Mapping) and isinstance(other, Mapping)",
     "(isinstance(one, Mapping)) or (isinstance(other, Mapping))"):
        "types are checked when a record is read",
    ("evaluation/result.py",
     "if isinstance(one, tuple) and isinstance(other, tuple):",
     "isinstance(one, tuple) and isinstance(other, tuple)",
     "(isinstance(one, tuple)) or (isinstance(other, tuple))"):
        "types are checked when a record is read",
    ("evaluation/comparing.py",
     "tested = self.decided < 1 - self.interval.confidence",
     "self.decided < 1 - self.interval.confidence",
     "(self.decided) <= (1 - self.interval.confidence)"):
        "1 - 0.95 is no p-value that occurs",
    ("evaluation/comparing.py",
     "if weights[0] is not None and weights[0] == weights[1]:",
     "0",
     "1"):
        "what is equal is None on both sides or on neither",
    ("certification/certifying.py",
     'noise = sigma if method == "smoothing" else None',
     'sigma if method == "smoothing" else None',
     "sigma"):
        "sigma is given for smoothing only",
    ("certification/certifying.py",
     "rows = rows + sigma * torch.empty_like(rows).normal_()",
     "rows + sigma * torch.empty_like(rows).normal_()",
     "(rows) - (sigma * torch.empty_like(rows).normal_())"):
        "the noise is symmetric",
    ("attacks/few_pixel.py", "trial = base + scale * (first - second)", "base + scale * (first - second)",
     "(base) - (scale * (first - second))"): "first and second are drawn alike",
    ("attacks/few_pixel.py", "kept = margins <= 0", "margins <= 0", "(margins) < (0)"):
        "a margin of 0 is asked about once more, and kept",
    ("evaluation/rows.py", "self.pace = None if self.attack is None else Pace(self.attack, stochastic)",
     "None if self.attack is None else Pace(self.attack, stochastic)", "Pace(self.attack, stochastic)"):
        "clean images are attacked by nothing, whose pace nobody asks for",
    ("attacks/foreign.py",
     "self.place = nn.Parameter(torch.empty(0, dtype=x.dtype, device=x.device), requires_grad=False)", "0", "1"):
        "its device and type alone are asked for",
    ("evaluation/inputs.py", 'seed_everything(seed, "probe", 0)', "0", "1"): "one stream of draws or another",
    ("attacks/fab.py", "room = torch.where(sign > 0, 1 - x, x).clamp_min(0.0)", "sign > 0", "(sign) >= (0)"):
        "where the sign is 0 the result is multiplied by it",
    ("attacks/auto_attack.py", "names = attack.parts(logits_of(model, x[:1]).shape[1])", "1", "2"):
        "one image more is asked how many classes there are",
    ("defenses/barre.py", "errors = 1 - mean_of_rows(right.to(choice.chances.dtype))", "1", "2"):
        "the nearest point of the simplex is the same from all that is moved alike",
    ("defenses/learn2perturb.py",
     '(1,), site="", granularity=self.granularity, sharing=self.sharing, distribution=self.distribution,', "1", "2"):
        "the module is asked for its checks alone, which know no shape",
    ("defenses/pixeldp.py", "return 1.0 if share > 0.9 else share", "share > 0.9", "(share) >= (0.9)"):
        "no step has a share of 0.9",
    ("noise/members.py",
     "picks = torch.searchsorted(edges, torch.cat(drawn), right=True).clamp_max(self.count - 1)",
     "self.count - 1", "(self.count) + (1)"):
        "only a draw that the rounding of the last edge leaves out",
    ("noise/sites.py", "self._note(output, depth + 1)", "1", "2"):
        "depths are compared with each other only",
    ("noise/sensitivity.py",
     "scale = found[1, :, 0, 0] - found[0, :, 0, 0]",
     "0", "1"): "any pixel of a black and of a white image",
    ("noise/sensitivity.py",
     "sums = [met[..., i::down, j::across].sum((-2, -1)).max() for i in range(down) for j in range(across)]",
     "-2", "2"): "of four dimensions",
    ("noise/sites.py", "return any(_match(parts[i:], globs[1:]) for i in range(len(parts) + 1))", "1", "2"):
        "nothing that is left of a name is matched once more",
    ("noise/inject.py", "seen[place] += 1", "1", "2"): "each twin has a seed of its own, whichever",
    ("noise/distributions.py", "if not (abs(mean) <= 0.01 and abs(variance - 1) <= 0.01):", "abs(mean) <= 0.01",
     "(abs(mean)) < (0.01)"): "one per cent of allowance has no exact edge",
    ("noise/distributions.py", "if not (abs(mean) <= 0.01 and abs(variance - 1) <= 0.01):",
     "abs(variance - 1) <= 0.01", "(abs(variance - 1)) < (0.01)"): "one per cent of allowance has no exact edge",
    ("attacks/query.py", "before, self._held = self._held, int(torch.randint(2**62, ()))", "62", "61"):
        "any seed of very many will do",
    ("attacks/foreign.py", "seed = int(torch.randint(2**63 - 1, ()))", "1", "2"): "any seed of very many will do",
    ("attacks/foreign.py", "seed = int(torch.randint(2**63 - 1, ()))", "63", "62"): "any seed of very many will do",
    ("evaluation/pictures.py", "return png(np.full((1, _SIDE, _SIDE), 127, dtype=np.uint8))", "1", "2"):
        "of two channels that are alike the mean is shown",
    ("evaluation/pieces.py", "return zlib.compress(buffer.getvalue(), 1)", "1", "2"): "read again all the same",
    ("evaluation/arrays.py",
     "if array.ndim not in (1, 2) or shape[0] != images or (array.ndim == 2 and shape[1] < 2):", "2", "1"):
        "one column has become labels before",
    ("evaluation/predictors.py",
     "votes.scatter_add_(1, logits.argmax(dim=1, keepdim=True), torch.ones_like(votes[:, :1]))", "1", "2"):
        "as much is added as there are answers",
    ("evaluation/rows.py", "if self.attack is not None and self.pace is not None:",
     "self.attack is not None and self.pace is not None", "(self.attack is not None) or (self.pace is not None)"):
        "an attack has a pace, and nothing else has",
    ("evaluation/inputs.py", "if _depends_on_companions(model, x, 0):", "0", "1"): "any seed will do",
    ("evaluation/evaluating.py", "each = None if self.images is None else self.images.each",
     "None if self.images is None else self.images.each", "self.images.each"):
        "it is asked for only where images are kept",
    ("evaluation/pace.py",
     "return float(sides * math.prod(factor for factor in factors if isinstance(factor, int) and factor > 0))",
     "0", "1"): "a factor of 1 changes nothing",
    ("evaluation/attacked.py",
     "pixels = np.stack([clean[number] for number in index.tolist()]) if len(index) else np.empty((0, 1, 1, 1))",
     "1", "2"): "no image has no channels and no sides",
    ("noise/sensitivity.py",
     "size = max(8, *(k * d for k, d in zip(convolution.kernel_size, convolution.dilation, strict=True)))", "8", "9"):
        "images of any size that holds a kernel",
    ("noise/sensitivity.py",
     "size = max(8, *(k * d for k, d in zip(convolution.kernel_size, convolution.dilation, strict=True)))", "8", "7"):
        "images of any size that holds a kernel",
    ("defenses/barre.py", "target = Mixture(members, [1 / trained] * trained)", "1", "2"):
        "what is added to all logits alike moves no probability",
    ("defenses/barre.py", "target = Mixture(members, [1 / trained] * trained)", "1 / trained", "(1) * (trained)"):
        "what is added to all logits alike moves no probability",
    ("defenses/rpf.py",
     'if weight is None or len(weight) < 2 or getattr(first, "transposed", False):', "False", "True"):
        "every convolution has the attribute",
    ("evaluation/arrays.py", "array = np.empty(0, dtype=object)", "0", "1"): "objects are refused, however many",
    ("noise/norms.py", 'generator = torch.Generator().manual_seed(derive_seed(self.replay, "noise", self.site, 0))',
     "0", "1"): "a replayed choice has a stream of its own, whichever",
    ("noise/sensitivity.py", "if not check or torch.allclose(found, expected, rtol=1e-4, atol=1e-5):", "1e-4",
     "0.0002"):
        "an allowance for rounding has no exact size",
    ("noise/sensitivity.py", "if not check or torch.allclose(found, expected, rtol=1e-4, atol=1e-5):", "1e-5",
     "2e-05"):
        "an allowance for rounding has no exact size",
    ("evaluation/evaluating.py",
     "wanted = np.unique(np.concatenate([row.index for row in self.attacked] or [np.empty(0, np.int64)]))", "0", "1"):
        "an image more is read again, which no row names",
    ("defenses/objectives.py", "before = 0 if x.is_inference() else x._version", "0", "1"):
        "in inference mode it is compared with nothing",
    ("attacks/rays.py", "return (x + per_image(radius) * rays).clamp_(0.0, 1.0)", "per_image(radius) * rays",
     "(per_image(radius)) / (rays)"): "1 / +-1 is +-1",
    ("evaluation/pictures.py", _PICTURE, "True", "False"): "the same picture in a larger file",
}  # fmt: skip
