"""Floor 1: objectives, pure tensor mathematics plugged in by ``class_path``."""

from llm_modules.objectives.actor_critic import PPO, SafePPO
from llm_modules.objectives.distillation import DistillationObjective, ForwardKL, GeneralizedJSD, ReverseKL
from llm_modules.objectives.labelled import BCO, KTO, LabelledObjective
from llm_modules.objectives.language import LanguageObjective, NextToken
from llm_modules.objectives.policy import GRPO, RLOO, OnlineDPO, PolicyObjective, ReinforcePlusPlus
from llm_modules.objectives.preference import APO, CPO, DPO, IPO, ORPO, SPPO, Hinge, PreferenceObjective, SimPO
from llm_modules.objectives.reward import BradleyTerry, CostModel, RewardObjective

__all__ = [
    "APO",
    "BCO",
    "CPO",
    "DPO",
    "GRPO",
    "IPO",
    "KTO",
    "ORPO",
    "PPO",
    "RLOO",
    "SPPO",
    "BradleyTerry",
    "CostModel",
    "DistillationObjective",
    "ForwardKL",
    "GeneralizedJSD",
    "Hinge",
    "LabelledObjective",
    "LanguageObjective",
    "NextToken",
    "OnlineDPO",
    "PolicyObjective",
    "PreferenceObjective",
    "ReinforcePlusPlus",
    "ReverseKL",
    "RewardObjective",
    "SafePPO",
    "SimPO",
]
