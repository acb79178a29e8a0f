"""Answers that were judged one by one, as desirable or not: the formats they come in, and their tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from llm_modules.data.chat import Message, tools_of, with_system
from llm_modules.data.conversation_encoding import ConversationEncoder
from llm_modules.data.preferences import (
    STAND_IN,
    BadPair,
    NoPair,
    is_empty,
    joined,
    messages_before,
    preference_pair,
    said_hash,
    side_messages,
    truth_value,
)
from llm_modules.data.sources import Row, Source
from llm_modules.data.store import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SIDE = "side of the pair"
"""A column that is added to the two copies of a row that is a pair: which of its answers is meant."""


@dataclass(frozen=True)
class LabelledAnswer:
    """A prompt, an answer to it, and whether that is desirable.

    Attributes:
        prompt: messages, the last of them not the assistant's.
        answer: what the assistant says: a message, with whatever else the row has in it, such as tool_calls.
        desirable: the label.
        tools: descriptions of functions, for templates that show them.
    """

    prompt: list[Message]
    answer: Message
    desirable: bool
    tools: list[Any] | None = None


class LabelledSource(Source):
    """A source of which each pair (``chosen``, ``rejected``) is two rows, one for each of its answers."""

    def rows(self) -> Iterator[Row]:
        for row in super().rows():
            if _is_pair(row):
                for side in ("chosen", "rejected"):
                    yield row._replace(columns={**row.columns, SIDE: side})
            else:
                yield row


def _is_pair(row: Row) -> bool:
    """Whatever stands in ``label``: of a row of two answers it is of something else, such as the request.

    Raises:
        ValueError: a row has a pair and an answer of its own, and ``columns`` names neither of them, or both.
    """
    columns, sides, answers = row.columns, ("chosen", "rejected"), ("completion", "answer")
    pair, alone = ([name for name in names if columns.get(name) not in (None, "")] for names in (sides, answers))
    asked = not row.mapped.isdisjoint(sides), not row.mapped.isdisjoint((*answers, "label"))
    if pair and alone and asked[0] == asked[1]:
        raise ValueError(
            f"{row.origin}: it has {' and '.join(pair)}, which are a pair, and {' and '.join(alone)}, which is an "
            "answer; name those that are meant with `columns`, such as {chosen: chosen, rejected: rejected}"
        )
    if pair:
        return asked[0] or not asked[1]
    return "label" not in columns and not columns.keys().isdisjoint(sides)


def labelled_answer(row: Row) -> LabelledAnswer:
    """The answer in a row: ``completion`` (or ``answer``) beside a ``prompt`` or ``messages``, or ``messages`` that end
    with it, and ``label``, true (1) or false (0); or the ``SIDE`` of a pair, whose chosen answer is the desirable one.

    Raises:
        NoPair: one line that names the file, the row and why it holds no answer.
        ValueError: the same of the label.
    """
    columns = row.columns
    if (side := columns.get(SIDE)) is not None:
        pair = preference_pair(row)
        answer = pair.chosen if side == "chosen" else pair.rejected
        return LabelledAnswer(pair.prompt, answer, side == "chosen", pair.tools)
    label = truth_value(columns.get("label"))
    if label is None or label == "":
        there = ", ".join(map(str, columns)) or "none"
        raise ValueError(f"{row.origin}: no label; an answer needs label, true or false; columns: {there}")
    if not isinstance(label, int) or label not in (0, 1):
        raise ValueError(f"{row.origin}: label is {label!r}; it must be true or false, or 1 or 0")
    name = next((name for name in ("completion", "answer", "messages") if columns.get(name)), None)
    if name is None:
        raise NoPair(f"{row.origin}: no answer: completion (or answer) is empty or not there")
    said = side_messages(row, name)
    before = [] if name == "messages" else messages_before(row)
    prompt = joined(row, name, before[:-1] if before == said else before, said[:-1])
    if not prompt:
        raise NoPair(f"{row.origin}: no prompt; a column prompt or messages is needed (name it with `columns`)")
    if prompt[-1]["role"] == "assistant":
        raise NoPair(f"{row.origin}: the prompt ends with the assistant; it must end with what is answered")
    if is_empty(said[-1]):
        raise NoPair(f"{row.origin}: the answer is empty")
    return LabelledAnswer(with_system(row, prompt), said[-1], bool(label), tools_of(row))


class LabelledEncoder:
    """A prompt with its answer as one stored document, whose last turn is predicted; its value is the label.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        bad_rows: what becomes of a row that holds no answer: ``error``; ``drop``: it is counted. A label that is none
            is an error always.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, bad_rows: BadPair = "error") -> None:
        self.tokenizer = tokenizer
        self.bad_rows: BadPair = bad_rows
        self._conversations = ConversationEncoder(tokenizer, "messages", "last")

    def description(self) -> dict[str, Any]:
        return {"kind": "labelled", "bad_rows": self.bad_rows}

    def __call__(self, rows: Sequence[Row]) -> Encoded:
        answers, bad = zip(*map(self._answer, rows), strict=True)
        encoded = self._conversations(
            [
                row._replace(
                    columns={"messages": [*found.prompt, found.answer], "tools": found.tools}, mapped=frozenset()
                )
                for row, found in zip(rows, answers, strict=True)
            ]
        )
        assert encoded.trained is not None
        # Without a token to predict, a row is left out when the parts are dealt.
        encoded.trained &= np.repeat(~np.array(bad), encoded.lengths)
        encoded.counts["rows dropped that hold no answer"] = sum(bad)
        hashes = [said_hash(found.prompt, found.tools, found.answer, found.desirable) for found in answers]
        encoded.hashes = np.array(hashes, dtype=np.uint64)
        encoded.values = np.array([[found.desirable] for found in answers], dtype=np.float32)
        return encoded

    def _answer(self, row: Row) -> tuple[LabelledAnswer, bool]:
        """The answer of a row, and whether it is a stand-in that is not to be dealt."""
        try:
            return labelled_answer(row), False
        except NoPair as error:
            if self.bad_rows == "error":
                raise NoPair(f"{error} (data.bad_rows is 'error'; allowed too: drop)") from error
            return LabelledAnswer(STAND_IN[:1], STAND_IN[1], True), True
