"""From files to batches: sources, chat formats, tokenization, packing, loading, audit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_modules.data.audit import AuditReport
    from llm_modules.data.datamodules import ConversationDataModule, TextDataModule
    from llm_modules.data.labelled_datamodule import LabelledDataModule
    from llm_modules.data.loading import EvaluationLoader, WindowLoader
    from llm_modules.data.preference_datamodule import PreferenceDataModule
    from llm_modules.data.preprompts import PrepromptDataModule
    from llm_modules.data.prompt_datamodule import PromptDataModule
    from llm_modules.data.sources import Source
    from llm_modules.data.token_datamodule import TokenDataModule

_HOME = {
    "AuditReport": "audit",
    "ConversationDataModule": "datamodules",
    "TextDataModule": "datamodules",
    "LabelledDataModule": "labelled_datamodule",
    "PreferenceDataModule": "preference_datamodule",
    "PromptDataModule": "prompt_datamodule",
    "PrepromptDataModule": "preprompts",
    "TokenDataModule": "token_datamodule",
    "EvaluationLoader": "loading",
    "WindowLoader": "loading",
    "Source": "sources",
}

__all__ = [
    "AuditReport",
    "ConversationDataModule",
    "EvaluationLoader",
    "LabelledDataModule",
    "PreferenceDataModule",
    "PrepromptDataModule",
    "PromptDataModule",
    "Source",
    "TextDataModule",
    "TokenDataModule",
    "WindowLoader",
]


def __getattr__(name: str) -> Any:
    # Lightning is imported with the DataModules only: processes that tokenize start without it.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
