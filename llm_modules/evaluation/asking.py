"""How a suite asks a model: as a chat where the tokenizer has a template, as raw text where it has none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from llm_modules.evaluation.measurement import Subject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Reply:
    """A request and what was answered, for a ``RefusalJudge``.

    Attributes:
        row: the request's number.
        prompt: the request itself, without what was put around it.
        text: the answer.
        reference, fields, tokens, finished: of judges that read more; not known here.
    """

    row: int
    prompt: str
    text: str
    reference: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    tokens: int = 0
    finished: bool = True

    @property
    def request(self) -> str:
        return self.prompt


@runtime_checkable
class RefusalJudge(Protocol):
    """Says of answers whether they refuse."""

    # Any: jsonargparse would want the same type of replies of each class that a config names.
    def judge(self, replies: Any) -> list[bool]: ...


RefusalDetector = RefusalJudge | Callable[[str, str], bool]
"""What tells refusals: of many answers at once, or (request, answer) -> whether it refuses."""


def refused(detector: RefusalDetector, requests: Sequence[str], said: Sequence[str]) -> list[bool]:
    """Whether each answer refuses its request."""
    if isinstance(detector, RefusalJudge):
        return detector.judge([Reply(n, *pair) for n, pair in enumerate(zip(requests, said, strict=True))])
    return [bool(detector(request, answer)) for request, answer in zip(requests, said, strict=True)]


def prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> str | list[dict[str, Any]]:
    """The text as a user's message; as it is where there is no chat template."""
    return [{"role": "user", "content": text}] if tokenizer.chat_template else text


def answers(subject: Subject, texts: Sequence[str]) -> list[str]:
    """One answer a text, by the subject's generator."""
    prompts = [prompt(subject.tokenizer, text) for text in texts]
    return [completion.text for completion in subject.generator.generate(subject.model, subject.tokenizer, prompts)]


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
