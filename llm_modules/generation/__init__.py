"""Floor 2: from a prompt to text."""

from llm_modules.generation.completion import Completion, Prompt, PromptTooLong
from llm_modules.generation.generator import Generator
from llm_modules.generation.prompts import end_token_ids, set_end_tokens, turn_end_token
from llm_modules.generation.vllm_engine import VLLM

__all__ = [
    "VLLM",
    "Completion",
    "Generator",
    "Prompt",
    "PromptTooLong",
    "end_token_ids",
    "set_end_tokens",
    "turn_end_token",
]
