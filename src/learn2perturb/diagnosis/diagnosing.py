"""``diagnose``: is the robustness of a model real? Checks (Athalye et al. 2018 and more), curves, a verdict."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from learn2perturb.attacks import PGD
from learn2perturb.attacks.balls import BALLS
from learn2perturb.attacks.bpda import submodules_of
from learn2perturb.checks import check_choice, check_size
from learn2perturb.configs import takes
from learn2perturb.data import BatchSource, balanced_rows, check_labels, warn_of_subset
from learn2perturb.diagnosis import blackbox, decision, truth, whitebox
from learn2perturb.diagnosis.budget import (
    Budget,
    budget_of,
    really_searched,
    resized,
    value_queries,
    with_grid,
)
from learn2perturb.diagnosis.checks import gradient_passes, own_checks
from learn2perturb.diagnosis.claim import Claim
from learn2perturb.diagnosis.config import DiagnoseConfig
from learn2perturb.diagnosis.forecast import seconds_by_part
from learn2perturb.diagnosis.images import others
from learn2perturb.diagnosis.measure import Bench, Subject
from learn2perturb.diagnosis.record import Diagnosis
from learn2perturb.diagnosis.running import run_checks
from learn2perturb.diagnosis.verdict import conclude, judge
from learn2perturb.engine import execution
from learn2perturb.engine.modes import live_dropouts
from learn2perturb.engine.random import seed_everything
from learn2perturb.engine.ranks import ALONE, Ranks, current
from learn2perturb.errors import ConfigError, DataError, InputError
from learn2perturb.evaluation.arrays import BlackBox, tell_queries
from learn2perturb.evaluation.inputs import (
    check_batches,
    check_fixed,
    in_train_mode,
    replay_of,
    warn_of_probabilities,
)
from learn2perturb.evaluation.keeping import Unfinished
from learn2perturb.evaluation.origin import identity_of, weights_of
from learn2perturb.evaluation.pace import tell_seconds
from learn2perturb.evaluation.passes import Model, classes_of, passes_differ
from learn2perturb.evaluation.pieces import NOTHING
from learn2perturb.evaluation.replays import contained, draws_anew, seeds_decide
from learn2perturb.evaluation.result import format_eps
from learn2perturb.evaluation.target import Target, check_callable
from learn2perturb.evaluation.values import ValuesOnly, no_gradient
from learn2perturb.noise import noise_modules
from learn2perturb.progress import Progress, Reporter
from learn2perturb.records import PackedIntegers, plain
from learn2perturb.sizes import usual_eps, whole_box


@takes(DiagnoseConfig)
def diagnose(
    model: Model,
    data: Any,
    config: DiagnoseConfig | None = None,
    *,
    attack: PGD | None = None,
    sources: Mapping[str, Model] | None = None,
    noise_off: Model | None = None,
    device: str | torch.device | None = None,
    name: str | None = None,
    progress: Progress | bool | None = True,
    keep: Unfinished | None = None,
    **settings: Any,
) -> Diagnosis:
    """Check whether the robustness of ``model`` is real: checks, curves, and a verdict in plain words.

    A check that was not run counts as not shown. Statistical claims fail beyond two standard errors (of paired
    images and of draws), corrected by Holm over all of them. Passing is no proof.

    Args:
        model: any callable from images in [0, 1] (N, C, H, W) to logits (N, classes); a module is put in eval mode.
        data: what ``learn2perturb.data.make_source`` takes; ``budget.images`` of it are used, balanced over the
            classes (the first ones of a loader of yours).
        config: all settings in one.
        settings: the fields of :class:`DiagnoseConfig`; what is given replaces that of ``config``.
        attack: the reported attack, whose accuracy is in question; by default EOT-PGD-20 with steps of eps / 4.
        sources: networks that attacks are transferred from, by name: ``undefended``, ``pgd_at`` (also the baseline of
            check 6), ``twin`` (an independent training of the same defense), and any other. The own noise-off twin
            needs none. One that is not given is named as missing.
        noise_off: the same network without its noise, images to logits, for check 6. Noise of this package needs none,
            since it can be switched off; for any other model the check is not shown without.
        device: where to run; by default where the model is.
        name: of the model, for the record.
        progress: show a bar, or plain lines off a terminal; or what is called with (passes done, passes expected, what
            is going on).
        keep: where finished work is kept, so that the same call goes on with it: of a module whose draws follow from
            seeds, in one process.

    Raises:
        ConfigError: a setting is not allowed.
        UnknownNameError: an unknown budget, or no such setting.
        InputError: the model is no fixed function of an image: it stays in train mode, moves its BatchNorm statistics
            in a pass, or answers differently in another batch; or its output is no logits. Or ``noise_off`` is none.
        DataError: there are no images, or all are of one class.
    """
    config = DiagnoseConfig.of(config, settings)
    target = Target(model, device, name)
    seed, batch_size, stochastic = config.seed, config.batch_size, config.stochastic
    stated, plan, attack = _planned(config, attack)
    for key, source in (sources or {}).items():
        check_callable(f"source {key!r}", source)
    if noise_off is not None:
        check_callable("noise_off", noise_off, "the network without its noise")
    if config.bpda is not None:
        submodules_of(model, config.bpda)  # refuse what names no submodule before hours of work
    findings = _train_mode_finding(model)
    compared = [*(sources or {}).values(), *([] if noise_off is None else [noise_off])]
    with target.judged(progress, compared) as told:
        images = target.source(data, batch_size=batch_size, seed=seed, limit=plan.images)
        x, y = _images(target, images, seed)
        target.check_alike(
            replace(config, eps=attack.eps, norm=attack.norm, claim=stated),
            {f"weights of source {key}": weights_of(source) for key, source in (sources or {}).items()},
        )
        decision.check_images(stated, len(x))
        plan = with_grid(resized(plan, len(x)), attack.norm, attack.eps, _checked_pixels(attack, x))
        classes = images.num_classes or max(2, int(y.max()) + 1)
        model, blind = _askable(model, x, classes)
        replay = replay_of(model, x, seed)
        if not replay or stochastic is False:
            findings += check_batches(model, x, seed)
        if not blind:
            findings += warn_of_probabilities(model, x, seed)
        modules = noise_modules(model) if isinstance(model, nn.Module) else []
        draws_noise = draws_anew(model, x[:8], seed)
        said = bool(replay) if stochastic is None else stochastic
        claimed = said or draws_noise or any(module.enabled for module in modules)
        work: float = gradient_passes(plan, stochastic=draws_noise, sources=len(sources or {}))
        if blind:
            queries = value_queries(really_searched(plan), stochastic=draws_noise)
            tell_queries(told, target.model, queries)
            work = queries / 3  # as the bench counts passes without a gradient
        mode = execution.select(config.engine, target.device, pixels=int(work) * x.shape[2] * x.shape[3])
        num_classes = classes_of(model, x)
        check_labels(y, num_classes)
        findings += warn_of_subset(images, y, num_classes)
        own = identity_of(target.model)
        subject = Subject(contained(model, x[:8], seed), draws_noise, gradient=not blind, identity=own)
        pieces = NOTHING
        if keep is not None:
            identity = "diagnosis", target.identity(seed, batch_size, mode), plain(attack), plain(plan)
            pieces = keep.pieces(identity, target.unkept(x, seed))
        bench = Bench(
            subject, x, y, attack, plan, seed=seed, mode=mode, batch_size=batch_size, expected_passes=work,
            progress=told, ranks=_sharing(target, model, x, seed), pieces=pieces,
        )  # fmt: skip
        if isinstance(told, Reporter):
            told.unit = " passes"
            if told.enabled and not blind:
                tell_seconds(told, seconds_by_part(bench, sources=len(sources or {})), "parts")
        given = {key: _source(source, x, seed, classes) for key, source in (sources or {}).items()}
        quiet = None
        if noise_off is not None:
            quiet = _given_twin(noise_off, bench, seed, classes)
        elif modules or live_dropouts(model):
            quiet = _own_twin(bench)
        learned = functools.partial(others, data, x, plan.surrogate_queries // 2, batch_size=batch_size, seed=seed)
        drafts, curves = run_checks(
            bench, given, quiet if claimed else None, learned,
            adaptive=lambda: {} if config.bpda is None else blackbox.replaced(bench, target.model, config.bpda),
            claimed=claimed, replay=replay, blind=blind,
        )  # fmt: skip
        decided = decision.decide(bench, stated)
    checks = judge(drafts)
    verdict, summary = conclude(
        checks, lowest=decided.lowest, accuracy=bench.measured(decided.lowest).accuracy, n=len(x),
        eps=f"{attack.norm} {format_eps(attack.eps)}", claim=decided.claim, trial=decided.trial,
        measured={one.name: one for one in bench.measurements},
    )  # fmt: skip
    settled = replace(config, eps=attack.eps, norm=attack.norm, limit=plan.images, claim=stated)
    more = {
        "attack": truth.DESCENT if blind else whitebox.title(attack, stochastic=draws_noise),
        "parameters": {key: value for key, value in plain(attack).items() if key != "seed"},
        "sources": sorted(given),
        "noise_off": "given" if noise_off is not None else "none" if quiet is None else "own",
        "seconds": target.seconds + pieces.seconds,
        "batch_size": batch_size,
        **({"queries": target.model.queries} if isinstance(target.model, BlackBox) else {}),
    }
    return Diagnosis(
        verdict=verdict,
        summary=summary,
        checks=checks,
        curves=tuple(curves),
        measurements=tuple(bench.measurements),
        findings=tuple(findings),
        lowest=decided.lowest,
        labels=PackedIntegers.pack(y.cpu().numpy()),
        num_classes=bench.num_classes,
        stochastic=draws_noise,
        eps=float(attack.eps),
        norm=attack.norm,
        seed=seed,
        budget=plain(bench.budget),
        metadata=target.metadata(data, settled, mode, attacks=[attack], checks=own_checks(), others=compared, **more),
        claim=decided.claim,
        trial=decided.trial,
    )


@takes(DiagnoseConfig)
def expected_seconds(
    model: Model, data: Any, config: DiagnoseConfig | None = None, *, sources: int = 0, **settings: Any
) -> dict[str, float]:
    """Return about how many seconds each part of a diagnosis takes, from one pass; empty for what has no gradients.

    Args:
        model: as of :func:`diagnose`.
        data: as of :func:`diagnose`.
        config: all settings in one.
        sources: number of networks that attacks are transferred from.
        settings: the fields of :class:`DiagnoseConfig`; what is given replaces that of ``config``.
    """
    config = DiagnoseConfig.of(config, settings)
    _, plan, attack = _planned(config, None)
    target, seed = Target(model), config.seed
    with target.judged(False):
        source = target.source(data, batch_size=config.batch_size, seed=seed, limit=plan.images)
        x, y = _images(target, source, seed)
        plan = with_grid(resized(plan, len(x)), attack.norm, attack.eps, _checked_pixels(attack, x))
        model, blind = _askable(model, x, source.num_classes or max(2, int(y.max()) + 1))
        if blind:
            return {}
        subject = Subject(contained(model, x[:8], seed), draws_anew(model, x[:8], seed))
        work = gradient_passes(plan, stochastic=subject.stochastic, sources=sources)
        mode = execution.select(config.engine, target.device, pixels=work * x.shape[2] * x.shape[3])
        bench = Bench(
            subject, x, y, attack, plan, seed=seed, mode=mode, batch_size=config.batch_size, expected_passes=work,
            progress=None,
        )  # fmt: skip
        return seconds_by_part(bench, sources=sources)


def _planned(config: DiagnoseConfig, attack: PGD | None) -> tuple[Claim | None, Budget, PGD]:
    """Return the claim, the budget and the reported attack."""
    plan = budget_of(config.budget)
    stated = None if config.claim is None else Claim.of(config.claim)
    limit = decision.limit_of(stated, config.limit)
    if limit is not None:
        plan = resized(plan, limit)
    return stated, plan, _reported(*decision.asked(stated, attack, config.eps, config.norm, plan), plan)


def _askable(model: Model, x: Tensor, classes: int) -> tuple[Model, str]:
    """Return the model, and why it has no gradients: then as one that is asked for values only."""
    reason = no_gradient(model, x[:1])
    return (ValuesOnly(model, classes), reason) if reason else (model, "")


def _sharing(target: Target, model: Model, x: Tensor, seed: int) -> Ranks:
    """Return the processes that share the batches: this one alone where a pass follows from those before."""
    counted = isinstance(target.model, BlackBox)  # which one process asks, and no more than it must
    return current() if counted or seeds_decide(model, x[:8], seed) else ALONE


def _source(given: Model, x: Tensor, seed: int, classes: int) -> Subject:
    model, blind = _askable(given, x, classes)
    differ, own = passes_differ(model, x[:8], seed), identity_of(given)
    return Subject(contained(model, x[:8], seed), differ, gradient=not blind, identity=own)


def _own_twin(bench: Bench) -> Subject:
    """Return the model with our noise and its dropouts switched off; what still differs is noise that nobody knows."""
    quiet = replace(bench.subject, quiet=True)
    with quiet.ready() as model:
        return replace(quiet, stochastic=passes_differ(model, bench.x[:8], bench.seed))


def _given_twin(given: Model, bench: Bench, seed: int, classes: int) -> Subject:
    """Return the twin that was given, after checking that it has no noise and the same classes.

    Raises:
        InputError: it has noise, other classes, or is no fixed function of an image.
    """
    twin, blind = _askable(given, bench.x, classes)
    check_fixed(twin, bench.x, seed)
    own = classes_of(twin, bench.x)
    if own != bench.num_classes:
        raise InputError(f"noise_off gives {own} classes and the model {bench.num_classes}; give the same network")
    if passes_differ(twin, bench.x[:8], seed):
        raise InputError("noise_off still draws noise: two passes of it differ; give the network with its noise off")
    return Subject(twin, stochastic=False, gradient=not blind, identity=identity_of(given))


def _reported(attack: PGD | None, eps: float | None, norm: str | None, budget: Budget) -> PGD:
    """Return the attack whose accuracy is in question."""
    if attack is None:
        norm = "linf" if norm is None else norm
        check_choice("norm", norm, tuple(BALLS))
        size = usual_eps(norm) if eps is None else eps
        if isinstance(size, bool) or not isinstance(size, int | float) or not 0 < size < math.inf:
            raise ConfigError(f"eps is {size!r}, must be a number above 0, [0, 1] pixel scale; write 8/255")
        check_size("eps", size, norm=norm)
        return PGD(size, size / 4, budget.steps, norm=norm, eot=budget.eot)
    if not isinstance(attack, PGD):
        kind = attack.__name__ if isinstance(attack, type) else type(attack).__name__
        raise ConfigError(
            f"attack is a {kind}; the checks vary steps and draws of a PGD: give PGD(eps=8/255, steps=20)"
        )
    if eps is not None and eps != attack.eps:
        raise ConfigError(f"eps is {eps!r} and that of the attack {attack.eps!r}; give one of them")
    if norm is not None and norm != attack.norm:
        raise ConfigError(f"norm is {norm!r} and that of the attack {attack.norm!r}; give one of them")
    if attack.targeted or attack.eps == 0:
        raise ConfigError("the reported attack is targeted, or has eps 0; give an untargeted one with eps > 0")
    return attack


def _checked_pixels(attack: PGD, x: Tensor) -> int:
    """Return how many numbers an image has.

    Raises:
        ConfigError: the ball is larger than all images: the eps of an l2 attack is in other units.
    """
    pixels = x[0].numel()
    whole = whole_box(attack.norm, pixels)
    if attack.eps > whole:
        raise ConfigError(
            f"eps is {attack.eps:.6g} and the whole range of these images has {attack.norm} radius {whole:.6g}; eps is "
            "in [0, 1] pixel scale, such as 0.5"
        )
    return pixels


def _train_mode_finding(model: Model) -> list[str]:
    found = in_train_mode(model)
    if not found:
        return []
    shown = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
    text = f"the model was given in train mode ({shown}); diagnosed in eval mode: call model.eval() to score it"
    warnings.warn(text, stacklevel=3)
    return [text]


def _images(target: Target, source: BatchSource, seed: int) -> tuple[Tensor, Tensor]:
    """Return images and labels in an order of which every beginning is balanced: the costly checks take one."""
    seed_everything(seed, "data")
    x, y = target.images(source)
    if len(y) > 1 and bool((y == y[0]).all()):
        raise DataError(
            f"all {len(y)} images are of class {int(y[0])}, which shows nothing; give images of several classes (from "
            "a sorted set, shuffle it first, or use more)"
        )
    rows = balanced_rows(y, len(y), len(y)).to(x.device)
    return x[rows], y[rows]
