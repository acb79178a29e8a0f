"""Floor 1: objectives, pure tensor mathematics plugged in by ``class_path``."""

from llm_modules.objectives.language import LanguageObjective, NextToken
from llm_modules.objectives.preference import APO, CPO, DPO, IPO, ORPO, SPPO, Hinge, PreferenceObjective, SimPO

__all__ = [
    "APO",
    "CPO",
    "DPO",
    "IPO",
    "ORPO",
    "SPPO",
    "Hinge",
    "LanguageObjective",
    "NextToken",
    "PreferenceObjective",
    "SimPO",
]
