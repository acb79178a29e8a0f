"""What an objective's losses must be: one for each pair or answer, which the module adds up, and with a gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def summed(objective: object, losses: Any, count: int, kind: str) -> Tensor:
    """() the sum of (count,) losses. Any other shape has a sum too, which would be divided by ``count`` once more.

    Args:
        objective: whose losses they are.
        losses: what it gave.
        count: how many there are to be.
        kind: of what (``pairs``).

    Raises:
        ValueError: it gave something else; names the objective's class.
    """
    found = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else f"a {type(losses).__name__}"
    if not isinstance(losses, Tensor) or losses.shape != (count,):
        raise ValueError(
            f"objective {_name(objective)}: losses gave {found}, not one loss for each of the {count} {kind}, which is "
            f"shape ({count},); it must not be a mean or a sum"
        )
    return losses.sum()


def differentiable(loss: Any, objective: object) -> Tensor:
    """The loss of a micro-batch.

    Raises:
        ValueError: it has no gradient; names the objective's class.
    """
    if isinstance(loss, Tensor) and loss.requires_grad:
        return loss
    raise ValueError(f"objective {_name(objective)}: the loss has no gradient; something in it is detached")


def _name(objective: object) -> str:
    return f"{type(objective).__module__}.{type(objective).__qualname__}"
