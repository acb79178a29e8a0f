"""AdaLoRA (arXiv 2303.10512) beside peft's layers: its penalty and its pruning, also of weights that FSDP2 has spread.

The ranks that stay are chosen by weights and gradients of the whole model, so every rank gathers both (a few MB) and
chooses the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate


def whole(tensor: Tensor) -> Tensor:
    """What the ranks hold of a spread tensor together; another one as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.to(tensor.device_mesh.device_type).full_tensor()  # type: ignore[attr-defined]  # may be in host memory


def part_of(value: Tensor, layout: Tensor) -> Tensor:
    """This rank's part of a tensor that every rank has, spread as ``layout`` is."""
    if not isinstance(layout, DTensor):
        return value
    mesh = layout.device_mesh
    replicated = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(placements=layout.placements).to(layout.device)


def penalized(hf: nn.Module) -> dict[str, nn.Parameter]:
    """The factors that are to be orthogonal, by name."""
    return {
        name: p for name, p in hf.named_parameters() if p.requires_grad and (".lora_A." in name or ".lora_B." in name)
    }


def orthogonality(factors: Mapping[str, Tensor]) -> Tensor:
    """Equation 4: the mean over the factors of the Frobenius norm of ``P^T P - I`` (and of ``Q Q^T - I``)."""
    norms = []
    for name, p in factors.items():
        gram = p @ p.T if ".lora_A." in name else p.T @ p
        norms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=p.device, dtype=p.dtype)))
    return torch.stack(norms).mean()


def add_penalty(hf: nn.Module, weight: float) -> None:
    """Add the gradient of ``weight`` times the penalty to those that the backward passes of a step have left.

    Beside them and not in the loss: under FSDP2 autograd would write into a gradient that is being reduced.
    """
    own = penalized(hf)
    factors = {name: whole(p.detach()).requires_grad_() for name, p in own.items()}
    gradients = torch.autograd.grad(weight * orthogonality(factors), list(factors.values()))
    for p, gradient in zip(own.values(), gradients, strict=True):
        part = part_of(gradient, p)
        p.grad = part if p.grad is None else p.grad.add_(part)


@torch.no_grad()
def prune(peft_model: Any, step: int) -> None:
    """peft's ``update_and_allocate``, after the optimizer's step ``step``; the same on every rank."""
    tuner = peft_model.base_model
    spread = {n: p for n, p in tuner.model.named_parameters() if p.requires_grad and isinstance(p, DTensor)}
    if not spread:
        tuner.update_and_allocate(step)
        return
    gathered = _Gathered()
    for name, p in spread.items():
        gathered.parameters[name] = nn.Parameter(whole(p.detach()))
        assert p.grad is not None
        gathered.parameters[name].grad = whole(p.grad)
    names = ("peft_config", "trainable_adapter_name", "rankallocator")
    stand_in = SimpleNamespace(model=gathered, **{name: getattr(tuner, name) for name in names})
    type(tuner).update_and_allocate(stand_in, step)
    for name, p in spread.items():
        if ".lora_E." in name:
            p.copy_(part_of(gathered.parameters[name].detach(), p))


class _Gathered:
    """All that peft's allocator asks of a model."""

    def __init__(self) -> None:
        self.parameters: dict[str, nn.Parameter] = {}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(self.parameters.items())
