"""Floor 0: optimizers that torch lacks, and how parameters are put into groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from llm_modules.schedules import RunSchedule

Settings = list[dict[str, Any]]
"""What a config says of each parameter group: learning rate, weight decay, ..."""


def parameter_kinds(model: nn.Module) -> dict[str, str]:
    """The kind of each parameter, by name: ``matrix``, ``embedding`` or ``vector`` (see ``parameter_groups``).

    To be asked before a strategy wraps the model: in flat shards every parameter has one dimension.
    """
    lookup = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    kinds = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            kinds[name] = "vector"
        elif id(parameter) in lookup or "lm_head" in name.split(".") or "embed_out" in name.split("."):
            kinds[name] = "embedding"
        else:
            kinds[name] = "matrix"
    return kinds


def parameter_groups(model: nn.Module, kinds: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """The trainable parameters in up to three groups, each with a ``kind``.

    ``matrix``: hidden weights (two or more dimensions); ``embedding``: the weights of embeddings and of the head;
    ``vector``: norms and biases, without weight decay (as in GPT-3 and Llama: decay only pulls on what is multiplied).

    Args:
        kinds: as ``parameter_kinds`` said before a strategy wrapped the model; None: as it is now.
    """
    kinds = kinds or parameter_kinds(model)
    groups: dict[str, list[nn.Parameter]] = {"matrix": [], "embedding": [], "vector": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[kinds[name.replace("_fsdp_wrapped_module.", "")]].append(parameter)
    return [
        {"params": parameters, "kind": kind} | ({"weight_decay": 0.0} if kind == "vector" else {})
        for kind, parameters in groups.items()
        if parameters
    ]


def class_name(optimizer: Optimizer) -> str:
    """Module and name; torch's without their module, which is another one in some of its releases."""
    kind = type(optimizer)
    return kind.__name__ if kind.__module__.startswith("torch.optim.") else f"{kind.__module__}.{kind.__qualname__}"


def group_settings(optimizer: Optimizer) -> Settings:
    """The settings of an optimizer's groups that are plain values, as they are before the first step; not how torch
    carries a step out, which is of the strategy."""
    plain = (bool, int, float, str, tuple, list, type(None))
    return [
        {name: value for name, value in group.items() if name not in ("params", *_HOW) and isinstance(value, plain)}
        for group in optimizer.param_groups
    ]


_HOW = ("fused", "foreach", "capturable", "differentiable")


def ways_to_step(optimizer: Optimizer) -> Settings:
    """How torch carries a step out, of each group: a checkpoint of another strategy brings other ways."""
    return [{name: group[name] for name in _HOW if name in group} for group in optimizer.param_groups]


def apply_changes(optimizer: Optimizer, before: Settings, now: Settings, schedule: LRScheduler | None) -> list[str]:
    """Give a resumed optimizer, which has the checkpoint's settings, those that were changed since.

    What was not changed stays as the checkpoint has it: some optimizers write into their groups as they go.

    Args:
        before: settings of the run that wrote the checkpoint.
        now: settings of the present config.
        schedule: what the learning rates come from; None: the config alone.

    Returns:
        what was changed, a line each.
    """
    lines = []
    for group, old, new in zip(optimizer.param_groups, before, now, strict=True):
        for name in [name for name in new if name in old and new[name] != old[name]]:
            taken = name != "lr" or schedule is None or isinstance(schedule, RunSchedule)
            if taken:
                group[name] = new[name]
                lines.append(f"{name} is {new[name]} from here on, and was {old[name]} up to the checkpoint")
            else:
                kind = type(schedule).__name__
                lines.append(f"{name} goes on from the checkpoint's {old[name]}: {kind} keeps its own; not {new[name]}")
    if isinstance(schedule, RunSchedule):
        schedule.set_rates()  # whose length may have changed, too
    return list(dict.fromkeys(lines))


FLAT = (
    "optimizer: MuonAdamW needs whole matrices, and this strategy hands it flat pieces of them; use strategies/fsdp2, "
    "tp or ddp, or torch.optim.AdamW"
)


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for matrix products in bfloat16.

    Without them torch computes these products element by element: 2 to 8 GFLOP/s were measured on a core of a processor
    that does 70 in fp32.
    """
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


class MuonAdamW(Optimizer):
    """Muon for hidden matrices, AdamW for embeddings, the head, norms and biases, as one optimizer.

    Muon orthogonalizes the momentum by Newton-Schulz iterations (Jordan et al. 2024; at scale arXiv 2502.16982, whose
    section 2.2 gives ``match_rms_adamw``: the update is scaled by ``0.2 * sqrt(max(rows, columns))``, so that AdamW's
    learning rate and weight decay carry over).

    Args:
        params: parameters, or groups with a ``kind``; those of kind ``matrix`` with two dimensions are Muon's. Without
            kinds, every 2-D parameter is.
        lr: learning rate of both parts.
        weight_decay: decoupled weight decay of both parts.
        momentum: Muon's momentum.
        ns_steps: Newton-Schulz iterations.
        betas: AdamW's.
        eps: AdamW's.

    Raises:
        ValueError: a negative rate, decay or momentum.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        ns_steps: int = 5,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        for name, value in {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}.items():
            if value < 0:
                raise ValueError(f"optimizer.{name}: {value} is negative; allowed: 0 or more")
        defaults = {
            "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "ns_steps": ns_steps,
            "betas": tuple(betas), "eps": eps, "kind": None,
        }  # fmt: skip
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            with_gradient = [p for p in group["params"] if p.grad is not None]
            if group["kind"] == "matrix" and any(p.ndim < 2 for p in with_gradient):
                raise ValueError(FLAT)
            muon = [p for p in with_gradient if group["kind"] in (None, "matrix") and p.ndim == 2]
            taken = {id(p) for p in muon}
            self._muon(group, muon)
            self._adamw(group, [p for p in with_gradient if id(p) not in taken])
        return loss

    def _muon(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, EPS, muon

        if not parameters:
            return
        for parameter in parameters:
            self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
        coefficients = (DEFAULT_A, DEFAULT_B, DEFAULT_C)
        if parameters[0].device.type == "cpu" and not multiplies_bfloat16():
            self._muon_in_own_precision(group, parameters, coefficients, EPS)
            return
        muon(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [self.state[p]["momentum_buffer"] for p in parameters],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            nesterov=True,
            ns_coefficients=coefficients,
            ns_steps=group["ns_steps"],
            eps=EPS,
            adjust_lr_fn="match_rms_adamw",
            has_complex=False,
        )

    def _muon_in_own_precision(
        self, group: dict[str, Any], parameters: list[Tensor], coefficients: tuple[float, ...], eps: float
    ) -> None:
        """torch's Muon multiplies in bf16 whatever the weights are: 10.5 s a step of the demo instead of 1.2 on a
        processor without such instructions."""
        lr, (a, b, c) = group["lr"], coefficients
        for parameter in parameters:
            gradient, buffer = parameter.grad, self.state[parameter]["momentum_buffer"]
            assert gradient is not None
            buffer.lerp_(gradient, 1 - group["momentum"])
            update = gradient.lerp(buffer, group["momentum"])
            tall = update.shape[0] > update.shape[1]
            update = update.T if tall else update
            update = update / update.norm().clamp(min=eps)
            for _ in range(group["ns_steps"]):
                gram = update @ update.T
                update = torch.addmm(update, torch.addmm(gram, gram, gram, beta=b, alpha=c), update, beta=a)
            parameter.mul_(1 - lr * group["weight_decay"])
            # match_rms_adamw
            parameter.add_(update.T if tall else update, alpha=-lr * 0.2 * max(parameter.shape) ** 0.5)

    def _adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        from torch.optim.adamw import adamw

        if not parameters:
            return
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [self.state[p]["exp_avg"] for p in parameters],
            [self.state[p]["exp_avg_sq"] for p in parameters],
            [],
            [self.state[p]["step"] for p in parameters],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
