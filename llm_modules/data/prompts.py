"""Prompts to be answered, with what is known of the right answer: the formats they come in, and their tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llm_modules.data.chat import tools_of, with_system
from llm_modules.data.masks import renderer, shows_tools
from llm_modules.data.sources import Row
from llm_modules.data.store import Encoded
from llm_modules.data.tokenization import content_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]


def prompt_record(row: Row, instruction: str | None = None) -> dict[str, Any]:
    """The prompt of a row: ``prompt`` (text), or ``messages`` that end with what is answered, under the row's
    ``system`` message; the known answer, if any, in ``reference`` (text or number); all of its columns.

    Args:
        instruction: a system message that is put in front; None: none.

    Returns:
        ``prompt`` (messages), ``reference`` (text, empty if there is none), ``fields`` (the columns; ``tools`` as a
        list).

    Raises:
        ValueError: one line that names the file, the row and what is wrong.
    """
    columns = row.columns
    prompt = columns.get("prompt") if columns.get("prompt") is not None else columns.get("messages")
    if isinstance(prompt, str) and prompt.strip():
        messages: list[Message] = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, list) and prompt and all(isinstance(message, dict) for message in prompt):
        messages = [dict(message) for message in prompt]
    elif prompt is None:
        there = ", ".join(map(str, columns)) or "none"
        raise ValueError(
            f"{row.origin}: no column 'prompt' or 'messages'; there are: {there} (name one with `columns`)"
        )
    else:
        raise ValueError(f"{row.origin}: the prompt is {prompt!r:.60}; a text, or messages with a role and content")
    if lacking := [message for message in messages if not {"role", "content"} <= set(message)]:
        raise ValueError(f"{row.origin}: a message of the prompt has no role or no content: {lacking[0]!r:.80}")
    if messages[-1]["role"] == "assistant":
        raise ValueError(f"{row.origin}: the prompt ends with the assistant; it must end with what is answered")
    messages = with_system(row, messages)
    if instruction:
        if messages[0]["role"] == "system":
            raise ValueError(f"{row.origin}: the prompt has a system message, and data.instruction would be another")
        messages = [{"role": "system", "content": instruction}, *messages]
    reference = columns.get("reference")
    if not isinstance(reference, str | int | float | None):
        raise ValueError(f"{row.origin}: reference is of type {type(reference).__name__}; a text or a number is needed")
    if tools := tools_of(row):
        columns = {**columns, "tools": tools}
    record = {"prompt": messages, "reference": "" if reference is None else str(reference), "fields": columns}
    try:
        json.dumps(record)
    except TypeError as error:
        raise ValueError(f"{row.origin}: a column cannot be kept: {error}; leave it out of the file") from error
    return record


class PromptEncoder:
    """A prompt's tokens up to where the assistant begins to speak, and the row that it came from.

    Args:
        tokenizer: with a chat template.
        instruction: as of ``prompt_record``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, instruction: str | None) -> None:
        self.tokenizer, self.instruction = tokenizer, instruction

    def description(self) -> dict[str, Any]:
        return {"kind": "prompt", "instruction": self.instruction}

    def __call__(self, rows: Sequence[Row]) -> Encoded:
        records = [prompt_record(row, self.instruction) for row in rows]
        texts, shown = [], shows_tools(self.tokenizer)
        for row, record in zip(rows, records, strict=True):
            if (tools := tools_of(row)) and not shown:
                raise ValueError(
                    f"{row.origin}: has tools, and the chat template leaves them out: the model would not see them; "
                    "use one that shows them, such as chatml"
                )
            try:
                texts.append(renderer(self.tokenizer, tools)(record["prompt"], prompt=True))
            except ValueError as error:
                raise ValueError(f"{row.origin}: {error}") from error
        documents = [
            np.array(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.uint32)
            for text in texts
        ]
        hashes = np.array([content_hash(text.encode()) for text in texts], dtype=np.uint64)
        return Encoded(
            tokens=np.concatenate(documents),
            trained=None,
            lengths=np.array([len(document) for document in documents], dtype=np.int64),
            sizes=np.array([len(text.encode()) for text in texts], dtype=np.int64),
            hashes=hashes,
            groups=hashes,
            places=np.array([(0, row.number) for row in rows], dtype=np.int64),
            records=records,
        )
