"""Floor 1: objectives, pure tensor mathematics plugged in by ``class_path``."""

from llm_modules.objectives.labelled import BCO, KTO, LabelledObjective
from llm_modules.objectives.language import LanguageObjective, NextToken
from llm_modules.objectives.preference import APO, CPO, DPO, IPO, ORPO, SPPO, Hinge, PreferenceObjective, SimPO
from llm_modules.objectives.reward import BradleyTerry, CostModel, RewardObjective

__all__ = [
    "APO",
    "BCO",
    "CPO",
    "DPO",
    "IPO",
    "KTO",
    "ORPO",
    "SPPO",
    "BradleyTerry",
    "CostModel",
    "Hinge",
    "LabelledObjective",
    "LanguageObjective",
    "NextToken",
    "PreferenceObjective",
    "RewardObjective",
    "SimPO",
]
