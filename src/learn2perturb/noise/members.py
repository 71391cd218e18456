"""One of several networks answers, drawn anew for each image: a random ensemble as noise on a network (BAT, BARRE)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from learn2perturb.checks import check_count
from learn2perturb.engine.random import derive_seed
from learn2perturb.engine.weights import copied
from learn2perturb.errors import ConfigError
from learn2perturb.noise.base import NoiseModule
from learn2perturb.noise.places import CHILD, drop_hook

MOST_MEMBERS = 100  # a file of a few bytes must not ask for any amount of memory


# A module-level function, as in places: a network with it can be pickled, deep-copied and compiled.
def _pick_member(network: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return network.perturbation.picked(args[0], output)  # type: ignore[operator, union-attr]


@final
class RandomMember(NoiseModule):
    """The network that it is put into and ``count - 1`` copies of it are members; each image is answered by one.

    The first member is the network itself, which is what is left with the noise off. There are finitely many outcomes,
    so the accuracy is known exactly: ``learn2perturb.evaluation.exact_accuracy``; the attack for it is
    ``learn2perturb.attacks.ARC``.

    Args:
        shape: of one image; the site is the network as a whole.
        count: members, at least 2. At first only the first one is drawn.

    Raises:
        ConfigError: count is none.
    """

    kind: ClassVar[str] = "members"
    settings = ("count",)

    def __init__(self, shape: tuple[int, ...], *, count: int = 2, **place: Any) -> None:
        super().__init__(shape, **place)
        check_count("count", count, 2)
        if count > MOST_MEMBERS:
            raise ConfigError(f"count is {count}; an ensemble has {MOST_MEMBERS} members at most")
        self.count = count
        self.others = nn.ModuleList()
        self.chances: Tensor
        self.register_buffer("chances", torch.eye(count)[0])

    def set_chances(self, chances: Sequence[float] | Tensor) -> None:
        """Set how likely each member is to answer."""
        self.chances.copy_(torch.as_tensor(chances, dtype=self.chances.dtype))

    @property
    def probabilities(self) -> tuple[float, ...]:
        """How likely each member is to answer; they add up to 1."""
        chances = self.chances.double()
        return tuple((chances / chances.sum()).tolist())

    def members_in(self, network: nn.Module) -> tuple[nn.Module, ...]:
        """Return the members, of which ``network``, that this was put into, is the first."""
        return (Alone(network, self), *self.others)

    def picked(self, x: Tensor, first: Tensor) -> Tensor:
        """Return the answers of the members that are drawn to images ``x``, where the first member gives ``first``."""
        if not self.enabled:
            return first
        pick = self._pick(x)
        if torch.compiler.is_compiling():  # no shape may depend on a draw
            return self.noisy(torch.stack([first, *(member(x) for member in self.others)]), pick)
        answer = first.clone()
        for number, member in enumerate(self.others, start=1):
            own = (pick == number).nonzero().squeeze(1)
            if len(own):
                answer = answer.index_copy(0, own, member(x[own]).to(answer.dtype))
        return answer

    @torch.no_grad()
    def _pick(self, x: Tensor) -> Tensor:
        """Return the number of the member that answers each image, (N,)."""
        rows = 1 if self.sharing == "per_batch" else len(x)
        if self.replay is None:
            return torch.multinomial(self.chances, rows, replacement=True).expand(len(x))
        edges = self.chances.cumsum(0).cpu() / self.chances.sum().cpu()
        drawn = [
            torch.rand(1, generator=torch.Generator().manual_seed(derive_seed(self.replay, "noise", self.site, row)))
            for row in range(rows)
        ]
        picks = torch.searchsorted(edges, torch.cat(drawn), right=True).clamp_max(self.count - 1)
        return picks.to(x.device).expand(len(x))

    def noisy(self, value: Tensor, eps: Tensor) -> Tensor:
        """Return those of the answers ``value`` (members, N, K) whose numbers are ``eps`` (N,)."""
        return value[eps, torch.arange(value.shape[1], device=value.device)]

    def noise_parameters(self) -> list[nn.Parameter]:
        """Return nothing: members are weights of the network."""
        return []

    def scale(self) -> tuple[str, Tensor]:
        """Return how likely each member is to answer."""
        return "probability", self.chances

    def attach(self, parent: nn.Module) -> None:
        """Make copies of ``parent`` its other members, and draw one for each image that it is given."""
        self.others.extend(copied(parent) for _ in range(self.count - 1 - len(self.others)))
        parent.add_module(CHILD, self)
        parent.register_forward_hook(_pick_member)

    def detach(self, parent: nn.Module) -> None:
        """Remove the other members."""
        delattr(parent, CHILD)
        drop_hook(parent._forward_hooks, _pick_member)


@final
class Alone(nn.Module):
    """The first member alone: ``network`` with its :class:`RandomMember` off for its own passes."""

    def __init__(self, network: nn.Module, choice: RandomMember) -> None:
        super().__init__()
        self.network = network
        self._choice = [choice]  # in a list: it is a part of the network already

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) to the logits (N, K) of the first member."""
        (choice,) = self._choice
        before, choice.enabled = choice.enabled, False
        try:
            answer: Tensor = self.network(x)
            return answer
        finally:
            choice.enabled = before


def random_members(network: nn.Module) -> RandomMember | None:
    """Return what draws among the members of ``network``, None where it is no ensemble."""
    found = network._modules.get(CHILD)
    return found if isinstance(found, RandomMember) else None
