"""Pairs of answers, one preferred to the other: the formats they come in, and their tokens."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llm_modules.data.chat import Message, tools_of, with_system
from llm_modules.data.conversation_encoding import ConversationEncoder
from llm_modules.data.sources import Row
from llm_modules.data.store import Encoded
from llm_modules.data.tokenization import content_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TooLongPair = Literal["truncate", "drop", "error"]
BadPair = Literal["error", "drop"]

_TURN = re.compile(r"\n\n(Human|Assistant):[ ]?")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}


VALUES = ("margin", "chosen_safe", "rejected_safe")
"""Columns that a pair may have beside its texts: by how much the chosen answer is better, and whether each is safe."""

TRUTH = {"true": True, "false": False, "1": True, "0": False}
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")

STAND_IN = [{"role": "user", "content": "-"}, {"role": "assistant", "content": "-"}]
"""A prompt and an answer in the place of those of a row that is dropped."""


class NoPair(ValueError):
    """A row that holds no two different answers to one prompt."""


@dataclass(frozen=True)
class Pair:
    """A prompt and two answers to it.

    Attributes:
        prompt: messages, the last of them not the assistant's.
        chosen, rejected: what the assistant says: messages, with whatever else the row has in them, such as tool_calls.
        values: of ``VALUES``; NaN where the row does not say.
        tools: descriptions of functions, for templates that show them.
    """

    prompt: list[Message]
    chosen: Message
    rejected: Message
    values: tuple[float, ...] = (math.nan,) * len(VALUES)
    tools: list[Any] | None = None


def preference_pair(row: Row) -> Pair:
    """The pair in a row: ``chosen`` and ``rejected`` as text beside a ``prompt`` (text) or ``messages``, as messages
    that end with the answer (with or without what came before), or as dialogues in the style of hh-rlhf; with the
    row's ``system`` message and ``tools``.

    Raises:
        NoPair: one line that names the file, the row and what is wrong with the pair.
        ValueError: the same of a column beside it that cannot be read.
    """
    columns = row.columns
    if missing := [name for name in ("chosen", "rejected") if not columns.get(name)]:
        there = ", ".join(map(str, columns)) or "none"
        what = "an empty answer in" if missing[0] in columns else "no column"
        raise NoPair(f"{row.origin}: {what} {missing[0]!r}; a pair needs chosen and rejected; columns: {there}")
    before = messages_before(row)
    sides = {name: side_messages(row, name) for name in ("chosen", "rejected")}
    if before in sides.values():  # one of them again, as UltraFeedback's `messages`
        before = before[:-1]
    prompts = {name: joined(row, name, before, messages[:-1]) for name, messages in sides.items()}
    if prompts["chosen"] != prompts["rejected"]:
        raise NoPair(f"{row.origin}: the prompts of chosen and rejected differ; a pair is two answers to one prompt")
    prompt, chosen, rejected = prompts["chosen"], sides["chosen"][-1], sides["rejected"][-1]
    if not prompt:
        raise NoPair(
            f"{row.origin}: no prompt: chosen and rejected are texts, no dialogues (\\n\\nHuman: ...); a column prompt "
            "or messages is needed (name it with `columns`)"
        )
    if prompt[-1]["role"] == "assistant":
        raise NoPair(f"{row.origin}: the prompt ends with the assistant; it must end with what is answered")
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if is_empty(answer):
            raise NoPair(f"{row.origin}: the {name} answer is empty")
    if _stripped(chosen) == _stripped(rejected):
        raise NoPair(f"{row.origin}: chosen and rejected are the same; nothing can be learned from that")
    values = tuple(_value(row, name) for name in VALUES)
    return Pair(with_system(row, prompt), chosen, rejected, values, tools_of(row))


def is_empty(answer: Message) -> bool:
    return not answer["content"].strip() and not answer.get("tool_calls")


def _stripped(message: Message) -> Message:
    return message | {"content": message["content"].strip()}


def joined(row: Row, name: str, before: list[Message], own: list[Message]) -> list[Message]:
    """What comes before an answer: what the row says of it beside the answer, and the answer's own messages, each
    message once.

    Args:
        name: the answer's column.
        before: as of ``messages_before``.
        own: of ``side_messages``, without the answer.

    Raises:
        NoPair: the two have nothing in common, and one does not go on where the other ends.
    """
    if not before or not own:
        return own or before
    told, said = ([_stripped(message) for message in part] for part in (before, own))
    if any(said[start : start + len(told)] == told for start in range(len(said))):
        return own
    both = next((size for size in range(min(len(told), len(said)), 0, -1) if told[-size:] == said[:size]), 0)
    goes_on = own[0]["role"] not in ("system", before[-1]["role"]) and said[0] not in told
    if both or goes_on:
        return [*before, *own[both:]]
    raise NoPair(
        f"{row.origin}: prompt (or messages) and the messages of {name} are two different prompts; leave one of them "
        "out"
    )


def truth_value(value: Any) -> Any:
    """True or False where text stands for it, as all of a CSV file is text; anything else as it is."""
    return TRUTH.get(value.strip().lower(), value) if isinstance(value, str) else value


def _value(row: Row, name: str) -> float:
    value = row.columns.get(name)
    if value is None or (isinstance(value, str) and not value.strip()):
        return math.nan
    if name != "margin":
        value = truth_value(value)
    elif isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, bool) == (name != "margin") and isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    kind = "a finite number" if name == "margin" else "true or false"
    raise ValueError(f"{row.origin}: {name} is {value!r}; it must be {kind}")


def messages_before(row: Row) -> list[Message]:
    """What the row says comes before both answers."""
    for name in ("messages", "prompt"):
        value = row.columns.get(name)
        if isinstance(value, str) and value.strip():
            return _asked(value)
        if isinstance(value, list) and value:
            return _messages(row, name, value)
        if value and not isinstance(value, str):
            raise NoPair(f"{row.origin}: {name} is of type {type(value).__name__}; a text or messages are needed")
    return []


def _asked(text: str) -> list[Message]:
    """A prompt that is text: what the user says, or a dialogue up to where the assistant is to speak."""
    turns = dialogue(text)
    if turns and turns[-1] == {"role": "assistant", "content": ""}:
        turns.pop()
    return turns or [{"role": "user", "content": text}]


def _ends_a_dialogue(row: Row) -> bool:
    """Whether an answer that is text follows a prompt that is a dialogue: a space between the two is nobody's."""
    return any(isinstance(text := row.columns.get(name), str) and dialogue(text) for name in ("messages", "prompt"))


def side_messages(row: Row, name: str) -> list[Message]:
    """Messages of which the last is the answer."""
    value = row.columns[name]
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        messages = _messages(row, name, value)
    elif isinstance(value, str):
        said = value.strip() if _ends_a_dialogue(row) else value
        messages = dialogue(value) or [{"role": "assistant", "content": said}]
    else:
        raise NoPair(f"{row.origin}: {name} is of type {type(value).__name__}; a text or a list of messages is needed")
    if messages[-1]["role"] != "assistant":
        raise NoPair(f"{row.origin}: {name} ends with the {messages[-1]['role']}; it must end with the assistant")
    return messages


def dialogue(text: str) -> list[Message]:
    """The turns of a text in the style of hh-rlhf (``\\n\\nHuman: ...\\n\\nAssistant: ...``); none if it is not one."""
    first = _TURN.match(text)
    if first is None:
        return []
    parts = _TURN.split(text)[1:]
    return [
        {"role": _SPEAKERS[speaker], "content": said.strip()}
        for speaker, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def _messages(row: Row, name: str, value: list[Any]) -> list[Message]:
    """The messages with what is not null in them; of a call of tools alone the content is empty."""
    messages = []
    for number, message in enumerate(value, 1):
        given = {key: said for key, said in message.items() if said is not None} if isinstance(message, dict) else {}
        content = given.get("content", "" if given.get("tool_calls") else None)
        if not isinstance(content, str) or "role" not in given:
            raise NoPair(f"{row.origin}: {name}: message {number} is no object with 'role' and 'content'")
        messages.append({"role": given["role"], "content": content} | given)
    return messages


class PreferenceEncoder:
    """A pair as two conversations of one stored document, the chosen one first; predicted are the last turns.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        sequence_length: tokens of a conversation at most.
        too_long: what becomes of a pair with a longer one: ``truncate``: its end is cut off, unless nothing of the
            answer would be left; ``drop``; ``error``.
        bad_pairs: what becomes of a row that is no pair (answers that are empty or the same, prompts that differ, ...):
            ``error``; ``drop``: it is counted.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
        too_long: TooLongPair = "truncate",
        bad_pairs: BadPair = "error",
    ) -> None:
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length
        self.too_long: TooLongPair = too_long
        self.bad_pairs: BadPair = bad_pairs
        self._conversations = ConversationEncoder(tokenizer, "messages", "last")

    def description(self) -> dict[str, Any]:
        names = ("sequence_length", "too_long", "bad_pairs")
        return {"kind": "preference"} | {name: getattr(self, name) for name in names}

    def __call__(self, rows: Sequence[Row]) -> Encoded:
        pairs, stand_ins = zip(*map(self._pair, rows), strict=True)
        bad = list(stand_ins)
        both = [
            row._replace(columns={"messages": [*pair.prompt, answer], "tools": pair.tools}, mapped=frozenset())
            for row, pair in zip(rows, pairs, strict=True)
            for answer in (pair.chosen, pair.rejected)
        ]
        encoded = self._conversations(both)
        assert encoded.trained is not None
        tokens, trained, lengths, splits = [], [], [], []
        counts = {**encoded.counts, "pairs longer than the sequence length": 0, "pairs dropped as too long": 0}
        stops = np.cumsum(encoded.lengths)
        starts = stops - encoded.lengths
        for number, row in enumerate(rows):
            parts = [slice(int(starts[i]), int(stops[i])) for i in (2 * number, 2 * number + 1)]
            if not bad[number] and np.array_equal(encoded.tokens[parts[0]], encoded.tokens[parts[1]]):
                self._refuse(NoPair(f"{row.origin}: chosen and rejected are the same as the chat template writes them"))
                bad[number] = True
            parts, drop = self._fitted(row, parts, encoded, counts)
            for part in parts:
                tokens.append(encoded.tokens[part])
                # Without a token to predict, the pair is left out when the parts are dealt.
                none = np.zeros(part.stop - part.start, dtype=np.bool_)
                trained.append(none if drop or bad[number] else encoded.trained[part])
            splits.append(parts[0].stop - parts[0].start)
            lengths.append(sum(part.stop - part.start for part in parts))
        counts["rows dropped that are no pair"] = sum(bad)
        return Encoded(
            tokens=np.concatenate(tokens),
            trained=np.concatenate(trained),
            lengths=np.array(lengths, dtype=np.int64),
            sizes=encoded.sizes[::2] + encoded.sizes[1::2],
            hashes=np.array([_pair_hash(pair) for pair in pairs], dtype=np.uint64),
            groups=encoded.groups[::2].copy(),
            places=np.array([(0, row.number) for row in rows], dtype=np.int64),
            counts=counts,
            splits=np.array(splits, dtype=np.int64),
            values=np.array([pair.values for pair in pairs], dtype=np.float32),
        )

    def _pair(self, row: Row) -> tuple[Pair, bool]:
        """The pair of a row, and whether it is a stand-in that is not to be dealt."""
        try:
            return preference_pair(row), False
        except NoPair as error:
            self._refuse(error)
            return Pair(STAND_IN[:1], STAND_IN[1], STAND_IN[1]), True

    def _refuse(self, error: NoPair) -> None:
        if self.bad_pairs == "error":
            raise NoPair(f"{error} (data.bad_pairs is 'error'; allowed too: drop)") from error

    def _fitted(
        self, row: Row, parts: list[slice], encoded: Encoded, counts: dict[str, int]
    ) -> tuple[list[slice], bool]:
        """The parts cut to the sequence length, and whether the pair is dropped."""
        tokens, trained = encoded.tokens, encoded.trained
        assert trained is not None
        longest = max(part.stop - part.start for part in parts)
        if longest <= self.sequence_length:
            return parts, False
        counts["pairs longer than the sequence length"] += 1
        if self.too_long == "error":
            raise ValueError(
                f"{row.origin}: {longest} tokens, more than sequence_length {self.sequence_length} (data.too_long is "
                "'error'; allowed too: truncate, drop)"
            )
        cut = [slice(part.start, min(part.stop, part.start + self.sequence_length)) for part in parts]
        drop = self.too_long == "drop" or not all(trained[part][1:].any() for part in cut)
        drop = drop or np.array_equal(tokens[cut[0]], tokens[cut[1]])  # what told them apart was cut off
        counts["pairs dropped as too long"] += drop
        return cut, drop


def _pair_hash(pair: Pair) -> int:
    return said_hash(pair.prompt, pair.tools, pair.chosen, pair.rejected)


def said_hash(prompt: list[Message], tools: list[Any] | None, *said: Any) -> int:
    """A digest of a row's content. Of an answer that is text alone it is that of the text, and without tools nothing
    stands for them: so it was before there were others, and runs on such rows go on."""
    texts = [part["content"] if isinstance(part, dict) and set(part) == {"role", "content"} else part for part in said]
    return content_hash(repr((prompt, *texts, *([tools] if tools else []))).encode())
