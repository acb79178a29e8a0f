"""LightningModules and the packages that they are put together from.

``llm_modules.LanguageModelModule`` and the others are found here by name; their imports wait until they are asked for.
"""

from importlib import import_module
from typing import Any

_MODULES = {
    "DistillationModule": "distillation",
    "LanguageModelModule": "language_model",
    "LLMModule": "base",
    "PolicyModule": "policy",
    "PreferenceModule": "preference",
    "RewardModule": "reward",
}

__all__ = [
    "DistillationModule",
    "LLMModule",
    "LanguageModelModule",
    "PolicyModule",
    "PreferenceModule",
    "RewardModule",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"llm_modules.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'llm_modules' has no attribute {name!r}")
