"""Floor 3: reinforcement learning."""

from llm_modules.policy.module import PolicyModule

__all__ = ["PolicyModule"]
