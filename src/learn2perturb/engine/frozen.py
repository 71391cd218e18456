"""What the user has frozen by ``eval()`` before a training: it stays so, whatever the rest of the network does."""

from __future__ import annotations

from torch import nn


def left_in_eval(network: nn.Module) -> list[nn.Module]:
    """Return the submodules of ``network``, parents first, that must stay in eval mode while it trains.

    In a network in train mode these are all that are in eval mode. One that is in eval mode as a whole, as after
    ``load``, says nothing by that: there it is those whose parameters are frozen too.
    """
    whole = not _core(network).training
    return [module for module in network.modules() if not module.training and (not whole or _has_no_gradient(module))]


def train_but(network: nn.Module, frozen: list[nn.Module]) -> None:
    """Put ``network`` in train mode, but for the submodules of :func:`left_in_eval`."""
    network.train()
    if not frozen:
        return
    kept = {id(module) for module in frozen}
    # As train() left them: a network may hold parts back in a train() of its own.
    wanted = [(module, module.training and id(module) not in kept) for module in network.modules()]
    for module, flag in wanted:
        if module.training != flag:
            module.train(flag)
            module.training = flag


def _core(network: nn.Module) -> nn.Module:
    """Return what holds the parameters: below wrappers, and below what only puts a normalisation before a network."""
    holders = [child for child in network.children() if next(child.parameters(), None) is not None]
    if not any(True for _ in network.parameters(recurse=False)) and len(holders) == 1:
        return _core(holders[0])
    return network


def _has_no_gradient(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)
