"""Norms and gated MLPs that keep less for the backward pass, for eager training on a CPU (a compiler fuses by itself).

transformers' RMSNorm keeps its input and the normalized input in fp32, and under autocast each linear layer behind it
keeps a cast copy of its own; a gated MLP keeps the activated gate beside the gate. Here a norm keeps its input and
hands on one tensor in autocast's dtype, and the gate is activated again in the backward pass. What is trained is the
same: a module is replaced only if its own forward gives the same numbers on a random input.

Shape legend: N rows (any leading dimensions), H hidden size, F size of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Forward = Callable[[nn.Module, Tensor], Tensor]


def make_lean(model: nn.Module) -> int:
    """Replace the forward of every norm and gated MLP of ``model`` that is understood; returns how many."""
    count = 0
    for module in model.modules():
        forward = next((f for f in _candidates(module) if _same_numbers(module, f)), None)
        if forward is not None:
            module.forward = MethodType(forward, module)
            count += 1
    return count


def _candidates(module: nn.Module) -> Iterator[Forward]:
    name = type(module).__name__
    if name.endswith("RMSNorm") and isinstance(getattr(module, "weight", None), nn.Parameter) and _epsilon(module):
        yield _norm_forward(type(module).forward, offset=0.0)
        yield _norm_forward(type(module).forward, offset=1.0)
    parts = [getattr(module, part, None) for part in ("gate_proj", "up_proj", "down_proj")]
    if all(type(part) is nn.Linear for part in parts) and callable(getattr(module, "act_fn", None)):
        yield _gated_forward(type(module).forward)


def _epsilon(module: nn.Module) -> float | None:
    return getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)


@torch.no_grad()
def _same_numbers(module: nn.Module, forward: Forward) -> bool:
    weights = list(module.parameters())
    if any(type(w) is not nn.Parameter or w.is_meta or not w.is_cpu or w.dtype != torch.float32 for w in weights):
        # Sizes are asked for, not numbers (fake tensors); or weights that ours is not made for.
        return all(isinstance(w, torch._subclasses.FakeTensor) for w in weights)
    size = weights[0].shape[-1]
    sample = torch.linspace(-2, 3, 3 * size, dtype=torch.float32, device="cpu").view(1, 3, size).sin()
    modes = [(part, part.training) for part in module.modules()]
    with torch.random.fork_rng([]):  # dropout draws
        module.train()  # a model that was read from a folder is not, and its dropout would be lost unseen
        expected = type(module).forward(module, sample)
        for part, mode in modes:
            part.training = mode
    return isinstance(expected, Tensor) and torch.allclose(forward(module, sample), expected, rtol=1e-4, atol=1e-5)


def _norm_forward(original: Forward, offset: float) -> Forward:
    def forward(self: Any, hidden: Tensor) -> Tensor:
        if not hidden.is_cpu or hidden.dtype != torch.float32 or _distributed(hidden, self.weight):
            return original(self, hidden)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
        return _RMSNorm.apply(hidden, self.weight, _epsilon(self), offset, dtype)

    return forward


def _distributed(*tensors: Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return any(isinstance(tensor, DTensor) for tensor in tensors)


def _gated_forward(original: Forward) -> Forward:
    def forward(self: Any, hidden: Tensor) -> Tensor:
        if not hidden.is_cpu:
            return original(self, hidden)
        return self.down_proj(_Gated.apply(self.act_fn, self.gate_proj(hidden), self.up_proj(hidden)))

    return forward


class _RMSNorm(torch.autograd.Function):
    """Root-mean-square norm (arXiv 1910.07467, equation 4) in fp32, times ``offset + weight``; returns ``dtype``."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, epsilon: float, offset: float, dtype: torch.dtype) -> Tensor:
        hidden_NH = hidden.reshape(-1, hidden.shape[-1])
        inverse_N1 = torch.linalg.vector_norm(hidden_NH, dim=-1, keepdim=True)
        inverse_N1 = inverse_N1.square_().div_(hidden.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(hidden_NH, inverse_N1, weight)
        ctx.offset = offset
        scale_H = weight + offset if offset else weight
        return (hidden_NH * inverse_N1).mul_(scale_H).to(dtype).view(hidden.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        hidden_NH, inverse_N1, weight = ctx.saved_tensors
        scale_H = weight + ctx.offset if ctx.offset else weight
        grad_NH = grad.reshape(hidden_NH.shape).float()
        normalized_NH = hidden_NH * inverse_N1
        product_NH = grad_NH * normalized_NH
        grad_weight = product_NH.sum(0) if ctx.needs_input_grad[1] else None
        along_N1 = (product_NH @ scale_H)[:, None].div_(-hidden_NH.shape[-1])
        grad_hidden = (grad_NH * scale_H).addcmul_(normalized_NH, along_N1).mul_(inverse_N1)
        return grad_hidden.view(grad.shape), grad_weight, None, None, None


class _Gated(torch.autograd.Function):
    """``activation(gate) * up``; keeps its inputs only."""

    @staticmethod
    def forward(ctx: Any, activation: Callable[[Tensor], Tensor], gate_NF: Tensor, up_NF: Tensor) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(gate_NF, up_NF)
        return activation(gate_NF) * up_NF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[None, Tensor, Tensor]:
        gate_NF, up_NF = ctx.saved_tensors
        with torch.enable_grad():
            gate_NF = gate_NF.detach().requires_grad_()
            activated_NF = ctx.activation(gate_NF)
        (grad_gate,) = torch.autograd.grad(activated_NF, gate_NF, grad_NF * up_NF)
        return None, grad_gate, activated_NF.detach() * grad_NF
