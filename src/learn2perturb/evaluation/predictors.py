"""How a network with noise is made to answer: one draw, or a mean or a vote over several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from learn2perturb.attacks.gradients import mean_logits
from learn2perturb.checks import check_count
from learn2perturb.engine import execution
from learn2perturb.engine.shapes import Images, Labels, Logits
from learn2perturb.errors import ConfigError, InputError
from learn2perturb.evaluation.config import EvaluateConfig, check_predictor
from learn2perturb.evaluation.passes import checked_logits

# What the gradients of an attack on an ensemble are averaged over.  A vote has no gradient: it is attacked through the
# mean probability and judged by the vote (SCIENCE, section 9).
AVERAGE: dict[str, Literal["probability", "logits"]] = {
    "vote": "probability", "mean_probability": "probability", "mean_logits": "logits",
}  # fmt: skip


def scores(rule: str, logits_of: Callable[[Tensor], Tensor], x: Images, members: int) -> Logits:
    """Return scores (N, classes) of which the largest is the answer to ``x``, from ``members`` passes of a model.

    ``single``: the logits of one pass. ``mean_logits``: their mean. ``mean_probability``: the logarithm of the mean
    softmax. ``vote``: the logarithm of the share of passes in which a class had the largest logit.
    """
    if rule == "single":
        return logits_of(x)
    if rule != "vote":
        return mean_logits(logits_of, x, members, AVERAGE[rule])
    votes: Tensor | None = None
    for _ in range(members):
        logits = logits_of(x)
        votes = torch.zeros_like(logits) if votes is None else votes
        votes.scatter_add_(1, logits.argmax(dim=1, keepdim=True), torch.ones_like(votes[:, :1]))
    assert votes is not None  # members >= 1 is checked by the callers
    return (votes / members).log()


def winners(score: Logits) -> NDArray[np.int64]:
    """Return the class of the largest score of each row, the smallest index of equal ones: (N, classes) to (N,)."""
    return score.cpu().numpy().argmax(axis=1)


def probability_margins(score: Logits, y: Labels) -> NDArray[np.float64]:
    """Return the probability of class ``y`` less the largest of the others, (N,), in [-1, 1]."""
    probability = score.double().softmax(dim=1) if score.device.type != "mps" else score.softmax(dim=1)
    own = probability.gather(1, y.unsqueeze(1))
    others = probability.scatter(1, y.unsqueeze(1), -1.0).amax(dim=1, keepdim=True)
    found: NDArray[np.float64] = (own - others).squeeze(1).cpu().numpy().astype(np.float64)
    return found


@final
class Predictor(nn.Module):
    """A network with noise as it is deployed: images (N, C, H, W) to scores (N, classes), the largest is the answer.

    Each call makes ``members`` passes with fresh draws (``single``: one). Scores are logits for ``single`` and
    ``mean_logits``, log-probabilities for ``mean_probability``, log-shares for ``vote``. Memory does not grow with
    ``members``, with gradients neither: a pass is repeated, with its own draws, when its gradient is needed. A vote has
    no gradient; attack :meth:`attackable` instead, and judge the result by the vote.

    Args:
        model: the network, or any callable from images to logits.
        rule: ``single``, ``vote``, ``mean_probability`` or ``mean_logits``.
        members: passes that make one answer.

    Raises:
        UnknownNameError: an unknown rule.
        ConfigError: members is no whole number of at least 1, or ``model`` is not callable.
    """

    def __init__(
        self, model: Callable[[Tensor], Tensor], rule: str = "mean_probability", members: int = EvaluateConfig.members
    ) -> None:
        super().__init__()
        if not callable(model):
            raise ConfigError(f"model is a {type(model).__name__}, must be callable: a network or a function")
        check_count("members", members)
        self.model = model
        self.rule, self.members = check_predictor(rule), members

    def forward(self, x: Images) -> Logits:
        """Return the scores of ``x``.

        Raises:
            InputError: a gradient of a vote is asked for, or the model's output is no (N, classes) tensor of logits.
        """
        wanted = torch.is_grad_enabled() and x.requires_grad
        if wanted and self.rule == "vote":
            raise InputError(
                "a vote has no gradient with respect to the images; attack predictor.attackable(), which gives the "
                "mean probability of the same passes, and judge the result by the vote"
            )
        if not wanted or self.rule == "single":
            return scores(self.rule, self._logits, x, self.members)

        mode = execution.current()  # an accelerator's backward pass has a thread, and so a context, of its own

        def one_pass(images: Tensor) -> Tensor:
            with execution.running(mode):
                return self._logits(images)

        def repeatable(images: Tensor) -> Tensor:
            # Its activations are not kept: the pass is run again, from the same generator state, for its gradient.
            logits: Tensor = checkpoint(one_pass, images, use_reentrant=False)
            return logits

        return scores(self.rule, repeatable, x, self.members)

    def predict(self, x: Images) -> NDArray[np.int64]:
        """Return the predicted classes (N,), ties to the smallest index."""
        with torch.no_grad():
            return winners(self(x))

    def attackable(self) -> Predictor:
        """Return what an attacker who uses gradients attacks: itself, or for a vote the mean probability."""
        return Predictor(self.model, "mean_probability", self.members) if self.rule == "vote" else self

    def extra_repr(self) -> str:
        """Show the rule when the network is printed."""
        return f"rule={self.rule}, members={self.members}"

    def _logits(self, x: Tensor) -> Tensor:
        # What looks at values cannot be part of a program that is made of this.
        return self.model(x) if torch.compiler.is_exporting() else checked_logits(self.model, x)
