"""Floor 2: from a prompt to text."""

from llm_modules.generation.completion import Completion, Prompt, PromptTooLong
from llm_modules.generation.generator import Generator

__all__ = ["Completion", "Generator", "Prompt", "PromptTooLong"]
