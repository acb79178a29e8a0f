"""Mixtures of experts: how a model's routers deal the tokens among the experts.

Shape legend: N positions, L layers with experts, E experts.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_KEYS = ("router_aux_loss_coef", "aux_loss_coef")
"""What families call the coefficient of the load-balancing loss in their config."""


class Routing(NamedTuple):
    """What the load-balancing loss needs to know of a model.

    Attributes:
        coefficient: of the loss in the total; 0: the load is only logged.
        top_k: experts that a token visits in each layer.
    """

    coefficient: float
    top_k: int


def routing_of(hf: PreTrainedModel) -> Routing | None:
    """How a model routes; None where it has no experts, or routers that are not trained.

    A family that has the coefficient in its config and no load-balancing loss in transformers is trained without it,
    which a warning says.
    """
    key, coefficient = _coefficient(hf.config)
    if coefficient is None or not _trains_router(hf):
        return None
    if not hasattr(sys.modules[type(hf).__module__], "load_balancing_loss_func"):
        if coefficient:
            warnings.warn(
                f"backbone: {hf.config.model_type!r} has {key} {coefficient}, but transformers has no "
                "load-balancing loss for it; its experts are trained without one",
                stacklevel=2,
            )
        return None
    top_k = getattr(hf, "num_experts_per_tok", None) or hf.config.get_text_config().num_experts_per_tok
    return Routing(float(coefficient), int(top_k))


def unbalanced(module: Any) -> str | None:
    """What is said of a module that trains a mixture of experts without its load-balancing loss; None: nothing is lost.

    Args:
        module: has its ``CausalLM`` in ``model`` and, if it adds the loss, a ``LoadBalance`` in ``_balance``.
    """
    model, name = module.model, type(module).__name__
    if hasattr(module, "_balance") or model.routing is None or not model.routing.coefficient:
        return None
    key, coefficient = _coefficient(model.hf.config)
    return (
        f"model.backbone.config.{key}: {coefficient:g} is not part of what {name} trains: nothing balances the load "
        "of the experts (LanguageModelModule has the term); set it to 0.0 to leave this line out"
    )


def check_routing(config: PretrainedConfig) -> list[str]:
    """What is wrong with the coefficient; one line each."""
    key, coefficient = _coefficient(config)
    if coefficient is not None and coefficient < 0:
        return [f"backbone.config.{key}: {coefficient} is negative; allowed: 0 (off) or more"]
    return []


def _coefficient(config: PretrainedConfig) -> tuple[str, float | None]:
    values = vars(config.get_text_config())
    return next(((key, values[key]) for key in _KEYS if values.get(key) is not None), (_KEYS[0], None))


def router_statistics(
    router_logits: Sequence[Tensor], top_k: int, lengths: Tensor | None, width: int
) -> tuple[Tensor, Tensor]:
    """Sums over the positions that are not padding.

    Args:
        router_logits: of each layer (N, E).
        top_k: experts that a token visits.
        lengths: (rows,) positions of each row before its padding; None: all are real.
        width: positions of a row, padding included.

    Returns:
        (L, E) fp32 tokens that visit each expert, without a gradient; (E,) fp32 probabilities, summed over positions
        and layers.

    Raises:
        ValueError: no router was seen, so that the loss would silently be missing.
    """
    if not router_logits:
        raise ValueError(
            "backbone: transformers recorded no router of this mixture of experts, which would train without its "
            "load-balancing loss; leave backbone.compile off"
        )
    count, device = router_logits[0].shape[0], router_logits[0].device
    if lengths is None:
        real_N = torch.ones(count, device=device)
    else:
        real_N = (torch.arange(width, device=device) < lengths[:, None]).flatten().float()
    loads, probability_E = [], torch.zeros(router_logits[0].shape[1], device=device)
    for logits_NE in router_logits:
        probability_NE = logits_NE.float().softmax(-1)
        visited = probability_NE.detach().topk(top_k, dim=-1).indices
        load_E = torch.zeros_like(probability_E)
        loads.append(load_E.scatter_add_(0, visited.flatten(), real_N.repeat_interleave(top_k)))
        probability_E = probability_E + real_N @ probability_NE
    return torch.stack(loads), probability_E


def _trains_router(hf: PreTrainedModel) -> bool:
    """Whether anything of a router has a gradient (an adapter on it is below it or around it)."""
    recorded: Any = (getattr(hf.base_model, "_can_record_outputs", None) or {}).get("router_logits")
    recorded = recorded if isinstance(recorded, list) else [recorded]
    kinds = tuple(kind for entry in recorded if isinstance(kind := getattr(entry, "target_class", entry), type))
    routers = {
        name.removesuffix(".base_layer").removesuffix(".base_layer") + "."
        for name, module in hf.named_modules()
        if isinstance(module, kinds)
    }
    trained = [name for name, parameter in hf.named_parameters() if parameter.requires_grad]
    return any(name.startswith(router) for router in routers for name in trained)
