"""Floor 2: from outputs to numbers: rewards of answers, measurements with their intervals.

The rewards are found here by name; their imports wait until they are asked for.
"""

from importlib import import_module
from typing import Any

_REWARDS = {
    "Answer": "rewards",
    "CodeTests": "code_tests",
    "ExactAnswer": "exact",
    "Format": "format",
    "FunctionReward": "rewards",
    "JudgeReward": "judge",
    "ModelReward": "model_reward",
    "NumericAnswer": "numeric_answer",
    "Reward": "rewards",
}

__all__ = [
    "Answer",
    "CodeTests",
    "ExactAnswer",
    "Format",
    "FunctionReward",
    "JudgeReward",
    "ModelReward",
    "NumericAnswer",
    "Reward",
]


def __getattr__(name: str) -> Any:
    if name in _REWARDS:
        return getattr(import_module(f"llm_modules.evaluation.{_REWARDS[name]}"), name)
    raise AttributeError(f"module 'llm_modules.evaluation' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
