"""How a suite asks a model: as a chat where the tokenizer has a template, as raw text where it has none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from llm_modules.evaluation.measurement import Subject
from llm_modules.evaluation.rewards import Answer
from llm_modules.evaluation.verdicts import Judge

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINK = "<think>"

RefusalDetector = Judge | Callable[[str, str], bool]
"""What tells refusals: of many answers at once, or (request, answer) -> whether it refuses."""


def refused(detector: RefusalDetector, requests: Sequence[str], said: Sequence[str]) -> list[bool]:
    """Whether each answer refuses its request."""
    if isinstance(detector, Judge):
        return detector.judge([Answer(n, *pair) for n, pair in enumerate(zip(requests, said, strict=True))])
    return [bool(detector(request, answer)) for request, answer in zip(requests, said, strict=True)]


def prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> str | list[dict[str, Any]]:
    """The text as a user's message; as it is where there is no chat template."""
    return [{"role": "user", "content": text}] if tokenizer.chat_template else text


def answers(subject: Subject, texts: Sequence[str]) -> list[str]:
    """One answer a text, by the subject's generator."""
    prompts = [prompt(subject.tokenizer, text) for text in texts]
    completions = subject.generator.generate(subject.model, subject.tokenizer, prompts)
    return whole_texts(subject.tokenizer, completions)


def whole_texts(tokenizer: Any, completions: Sequence[Any]) -> list[str]:
    """The texts of answers to chat prompts. Where the template has begun the thoughts, and the answer was cut before
    their end, ``<think>`` is put before it: what it says is told from what it thinks by its text alone."""
    begun = bool(getattr(tokenizer, "chat_template", None)) and rendered(tokenizer, "?")[0].rstrip().endswith(THINK)
    cut = [begun and c.finish_reason == "length" and "</think>" not in c.text for c in completions]
    return [THINK + c.text if thinks else c.text for thinks, c in zip(cut, completions, strict=True)]


def rendered(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[str, bool]:
    """What is tokenized where ``text`` is asked, and whether the tokenizer adds its special tokens."""
    if not tokenizer.chat_template:
        return text, not any(text.startswith(token) for token in tokenizer.all_special_tokens)
    messages = [{"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)), False


def encode_prompts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The ids after which the model answers each text: those that the generator makes of ``prompt``."""
    if not texts:
        return []
    shown = [rendered(tokenizer, text) for text in texts]
    added = shown[0][1]
    rows = tokenizer([text for text, _ in shown], add_special_tokens=added)["input_ids"]
    ended = added and tokenizer.eos_token_id is not None
    return [row[:-1] if ended and len(row) > 1 and row[-1] == tokenizer.eos_token_id else row for row in rows]
