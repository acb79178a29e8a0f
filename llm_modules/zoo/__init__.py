"""The zoo: from a name to a model (floor 2). Names are imported when they are first used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_modules.zoo.adapted import save_adapted
    from llm_modules.zoo.backbone import Backbone
    from llm_modules.zoo.causal_lm import CausalLM
    from llm_modules.zoo.description import describe_difference
    from llm_modules.zoo.estimate import ModelSummary, TokenFlops
    from llm_modules.zoo.memory import PeakMemory
    from llm_modules.zoo.opening import open_adapter, open_adapters
    from llm_modules.zoo.routing import unbalanced

_WHERE = {
    "Backbone": "backbone",
    "CausalLM": "causal_lm",
    "ModelSummary": "estimate",
    "PeakMemory": "memory",
    "TokenFlops": "estimate",
    "describe_difference": "description",
    "open_adapter": "opening",
    "open_adapters": "opening",
    "save_adapted": "adapted",
    "unbalanced": "routing",
}

__all__ = [
    "Backbone",
    "CausalLM",
    "ModelSummary",
    "PeakMemory",
    "TokenFlops",
    "describe_difference",
    "open_adapter",
    "open_adapters",
    "save_adapted",
    "unbalanced",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
