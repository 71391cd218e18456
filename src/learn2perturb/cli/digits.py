"""Defenses trained and attacked alike on the digits, and the table of them: what ``learn2perturb demo`` runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from learn2perturb import records
from learn2perturb.errors import CheckpointError
from learn2perturb.terminal import markdown_row
from learn2perturb.training.config import TrainConfig

if TYPE_CHECKING:
    from learn2perturb.evaluation import Evaluation, Row

# Fixed before anything was trained for the table: the undefended network falls below 10 % under PGD-20.
EPS = 0.15
ATTACK_STEPS = 20
EOT = 10
DRAWS = 10
EPOCHS = 20
SETTINGS: dict[str, Any] = {
    "model": "digits_cnn", "dataset": "digits", "engine": "plain", "device": "cpu", "batch_size": 64, "eps": EPS,
    "attack_step_size": EPS / 4, "monitor": 0, "tensorboard": False,
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One line of the table: a defense, how it predicts, whether its noise is on, and cells by attack name.

    A cell holds accuracy and the bounds of its 95 % interval.
    """

    defense: str
    predictor: str
    noise: bool
    cells: dict[str, tuple[float, float, float]]

    @property
    def name(self) -> str:
        """What the table calls it."""
        predictor = "" if self.predictor == "single" else f", {self.predictor.replace('_', ' ')} of {EOT}"
        return self.defense + predictor + ("" if self.noise else ", noise off")


@dataclass(frozen=True)
class SideBySide:
    """The record of a table."""

    FORMAT: ClassVar[str] = "learn2perturb.side_by_side"
    VERSION: ClassVar[int] = 1

    recipe: str
    epochs: int
    eps: float
    images: int
    seed: int
    lines: tuple[Line, ...]

    @property
    def title(self) -> str:
        """What the numbers are, in a line."""
        return (
            f"Accuracy on {self.images} digits and its 95 % interval; l_inf attacks of eps {self.eps}, "
            f"pixels in [0, 1]; recipe {self.recipe}, {self.epochs} epochs"
        )

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Return head and rows as text. Without noise EOT averages equal gradients, and for a mean PGD is EOT."""
        attacks = attack_names()
        rows = []
        for line in self.lines:
            texts = [_cell(line.cells[name]) if name in line.cells else "" for name in attacks]
            rows.append((line.name, *(text or ("as EOT-PGD" if texts[-1] else "as PGD") for text in texts)))
        return ("defense", *attacks), rows

    def markdown(self) -> str:
        """Return the table as Markdown."""
        head, rows = self.table()
        body = [head, ("---",) * len(head), *rows]
        return f"{self.title}\n\n" + "\n".join(map(markdown_row, body)) + "\n"


def attack_names() -> tuple[str, ...]:
    """Return the columns of the table: clean, and what attacks."""
    return ("clean", "FGSM", f"PGD-{ATTACK_STEPS}", f"EOT-PGD-{ATTACK_STEPS}")


def config_of(defense: str, recipe: str, epochs: int, seed: int) -> TrainConfig:
    """Return the training of ``defense``: ``recipe`` in so few epochs, its milestones moved accordingly."""
    config = TrainConfig(defense=defense, recipe=recipe, seed=seed, **SETTINGS)
    whole = config.resolve()
    milestones = [round(milestone * epochs / (whole.epochs or 1)) for milestone in whole.milestones or ()]
    return replace(config, epochs=epochs, milestones=milestones)


def run_one(config: TrainConfig, folder: Path) -> list[Evaluation]:
    """Train and attack one defense, as far as that is not done; return the single draw's and the paper's predictor's.

    The latter is there for a defense whose paper predicts by more than one draw.
    """
    from learn2perturb.attacks import FGSM, PGD
    from learn2perturb.noise import is_stochastic
    from learn2perturb.registry import DEFENSES
    from learn2perturb.training.loop import train

    model = train(config, out=folder).model
    step = 2.5 * EPS / ATTACK_STEPS
    _, fgsm, pgd, eot_pgd = attack_names()
    attacks = {fgsm: FGSM(EPS), pgd: PGD(EPS, step, ATTACK_STEPS)}
    if is_stochastic(model):
        attacks[eot_pgd] = PGD(EPS, step, ATTACK_STEPS, eot=EOT)
    results = [_evaluated(config, folder, model, attacks, "single")]
    predictor = DEFENSES.entry(config.defense).load().predictor
    if predictor != "single" and is_stochastic(model):
        attacks.pop(pgd)  # against a mean over draws every attack averages over as many
        results.append(_evaluated(config, folder, model, attacks, predictor))
    return results


def _evaluated(config: TrainConfig, folder: Path, model: Any, attacks: Mapping[str, Any], predictor: str) -> Evaluation:
    from learn2perturb.data import load_data
    from learn2perturb.evaluation import Evaluation, evaluate
    from learn2perturb.progress import Reporter

    path = folder / "evaluation" / ("demo.json" if predictor == "single" else f"demo-{predictor}.json")
    single = predictor == "single"
    protocol = {"attacks": {name: records.plain(attack) for name, attack in attacks.items()}, "draws": DRAWS}
    try:
        done = Evaluation.load(path)
        if done.seed == config.seed and done.metadata.get("protocol") == protocol:
            return done
    except CheckpointError:
        pass  # none yet, or none that is whole
    with Reporter() as reporter:
        result = evaluate(
            model, load_data("digits", "test"), attacks, draws=DRAWS if single else 1, predictor=predictor, members=EOT,
            noise_off=single, seed=config.seed, batch_size=500, name=config.defense, progress=reporter,
        )  # fmt: skip
    result = replace(result, metadata={**result.metadata, "protocol": protocol})
    result.save(path)
    return result


def side_by_side(results: Mapping[str, Sequence[Evaluation]], recipe: str, epochs: int, seed: int) -> SideBySide:
    """Return the record of the table of ``results``, by defense."""
    lines = []
    for name, evaluations in results.items():
        for evaluation in evaluations:
            for noise in (True, False):
                rows = [row for row in evaluation.rows if row.noise == noise]
                if not rows:
                    continue
                stochastic = any(row.stochastic for row in rows)
                # EOT without noise is PGD; the evaluation ran it as such.
                cells = {row.attack: _numbers(row) for row in rows if stochastic or not row.attack.startswith("EOT")}
                lines.append(Line(name, rows[0].predictor, noise, cells))
    images = next(iter(results.values()))[0].rows[0].n
    return SideBySide(recipe, epochs, EPS, images, seed, tuple(lines))


def _numbers(row: Row) -> tuple[float, float, float]:
    return row.accuracy, row.interval.low, row.interval.high


def _cell(numbers: tuple[float, float, float]) -> str:
    accuracy, low, high = numbers
    return f"{accuracy:6.1%} [{100 * low:.1f}, {100 * high:.1f}]"
