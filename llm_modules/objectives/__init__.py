"""Floor 1: objectives, pure tensor mathematics plugged in by ``class_path``."""

from llm_modules.objectives.language import LanguageObjective, NextToken

__all__ = ["LanguageObjective", "NextToken"]
