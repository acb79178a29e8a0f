"""The norm of a gradient that is spread over ranks, and clipping by it: the same under every layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


def settle_gradients(optimizer: Optimizer) -> None:
    """Bring each gradient into its parameter's layout: a norm's under tensor parallelism is still to be summed."""
    for parameter in _parameters(optimizer):
        gradient = parameter.grad
        if isinstance(gradient, DTensor) and gradient.placements != parameter.placements:  # type: ignore[attr-defined]
            parameter.grad = gradient.redistribute(placements=parameter.placements)  # type: ignore[attr-defined]


def gradient_norm(optimizer: Optimizer, shard_group: Any = None, parameters: Sequence[Tensor] | None = None) -> Tensor:
    """The L2 norm of the whole gradient, or of a part of it, the same number on every rank.

    Each rank adds the squares of what it holds; the sums are added over the ranks that hold different parts, and over
    these only: what is replicated counts once.

    Args:
        optimizer: whose parameters' gradients.
        shard_group: the ranks that plain tensors are spread over (FSDP1's flat shards); None: each rank has all of
            them. Of a DTensor its own layout says it.
        parameters: the optimizer's that the part is of, the same on every rank; None: all.
    """
    settle_gradients(optimizer)
    parameters = _parameters(optimizer) if parameters is None else parameters
    # Where flat shards are small, a rank may hold none of what is trained; the others wait for its zero.
    parts: dict[Any, list[Tensor]] = {} if shard_group is None else {None: []}
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        if isinstance(gradient, DTensor):
            spread = tuple(i for i, placement in enumerate(gradient.placements) if not placement.is_replicate())
            parts.setdefault((gradient.device_mesh, spread), []).append(gradient.to_local())
        else:
            parts.setdefault(None, []).append(gradient)
    squares = []
    for layout, gradients in sorted(parts.items(), key=lambda item: str(item[0])):
        square = torch.nn.utils.get_total_norm(gradients).square().to(parameters[0].device)
        if layout is not None:
            mesh, spread = layout
            for dimension in spread:
                dist.all_reduce(square, group=mesh.get_group(dimension))
        elif shard_group is not None:
            dist.all_reduce(square, group=shard_group)
        squares.append(square)
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros(())


def clip_gradients(
    optimizer: Optimizer, limit: float, norm: Tensor, parameters: Sequence[Tensor] | None = None
) -> None:
    """Scale the gradient (of some of the optimizer's ``parameters``; None: of all) down to the norm ``limit`` where
    ``norm`` is above it, as ``clip_grad_norm_`` does."""
    parameters = _parameters(optimizer) if parameters is None else parameters
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    if local:
        factor = (limit / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(local, factor.to(local[0].device))


def unscale_gradients(optimizer: Optimizer, scaler: Any | None) -> None:
    """Take fp16's loss scale out of the gradients where that is still to be done: before a norm is taken of them.

    Lightning leaves it to optimizers that can do so inside their step (fused ones), and refuses to clip these.

    Args:
        scaler: of the precision; None: there is no loss scale.
    """
    if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        scaler.unscale_(optimizer)  # the step sees that it was done


def allow_mixed_layouts(optimizer: Optimizer) -> None:
    """Step parameter by parameter where they are of several layouts: torch's fused steps want all of one kind."""
    layouts = {
        (parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else None
        for parameter in _parameters(optimizer)
    }
    meshes = {layout and layout[0] for layout in layouts}
    if len(meshes) > 1:
        for group in (*optimizer.param_groups, optimizer.defaults):
            for name in ("fused", "foreach"):
                if name in group:
                    group[name] = False


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
