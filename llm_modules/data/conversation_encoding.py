"""Conversations to tokens, with the mask of what is to be predicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from llm_modules.data.chat import ChatFormat, Conversation, conversation
from llm_modules.data.masks import (
    TemplateError,
    assistant_spans,
    last_turn,
    marked_spans,
    marks_generation,
    renderer,
    shows_tools,
)
from llm_modules.data.sources import Row
from llm_modules.data.store import Encoded
from llm_modules.data.tokenization import content_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["assistant", "last", "all"]
Span = tuple[int, int]


class ConversationEncoder:
    """A conversation as its template writes it; predicted are the assistant's turns, their ends included.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        chat_format: the columns' format.
        train_on: `assistant`: all of its turns; `last`: only the last one; `all`: every token.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, chat_format: ChatFormat = "auto", train_on: TrainOn = "assistant"
    ) -> None:
        if not tokenizer.is_fast:
            raise ValueError(
                "tokenizer: conversations need a fast tokenizer, which says which characters a token stands for; this "
                "one is slow (convert it: `AutoTokenizer.from_pretrained(...)` with `tokenizers` installed)"
            )
        self.tokenizer = tokenizer
        self.chat_format: ChatFormat = chat_format
        self.train_on: TrainOn = train_on
        self.shows_tools = shows_tools(tokenizer)
        self.specials = sorted(
            (str(token) for token in tokenizer.get_added_vocab() if str(token).strip()), key=len, reverse=True
        )

    def description(self) -> dict[str, Any]:
        return {"kind": "conversation", "format": self.chat_format, "train_on": self.train_on}

    def __call__(self, rows: Sequence[Row]) -> Encoded:
        written = [self._written(row) for row in rows]
        encoded = self.tokenizer(
            [text for _, text, _, _ in written], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        tokens, masks, sizes, groups = [], [], [], []
        counts = {"turns": 0, "turns without end": 0}
        for (talk, text, spans, endless), ids, places in zip(
            written, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            tokens.append(np.array(ids, dtype=np.uint32))
            masks.append(token_mask(np.array(places, dtype=np.int64).reshape(-1, 2), spans))
            groups.append(content_hash(talk.opening().encode()))
            sizes.append(sum(len(text[start:stop].encode()) for start, stop in spans))
            counts["turns"] += len(spans)
            counts["turns without end"] += endless
        return Encoded(
            tokens=np.concatenate(tokens),
            trained=np.concatenate(masks),
            lengths=np.array([len(ids) for ids in tokens], dtype=np.int64),
            sizes=np.array(sizes, dtype=np.int64),
            hashes=np.array([content_hash(text.encode()) for _, text, _, _ in written], dtype=np.uint64),
            groups=np.array(groups, dtype=np.uint64),
            places=np.array([(0, row.number) for row in rows], dtype=np.int64),
            counts=counts,
        )

    def _written(self, row: Row) -> tuple[Conversation, str, list[Span], int]:
        """The conversation of a row, its text, its spans to be predicted, and how many of them lack the turn's end."""
        talk = conversation(row, self.chat_format)
        if talk.tools and not self.shows_tools:
            raise ValueError(
                f"{row.origin}: has tools, and the chat template leaves them out: calls of functions that the prompt "
                "never names would be trained; use one that shows them, such as chatml"
            )
        try:
            render = renderer(self.tokenizer, talk.tools)
            if marks_generation(self.tokenizer):
                text, spans = marked_spans(self.tokenizer, talk)
            else:
                text, spans = assistant_spans(render, talk, self.specials)
            endless = self._without_end(text, spans, talk)
            if self.train_on == "last":
                spans = last_turn(render, talk, text, spans)
        except TemplateError as error:
            raise ValueError(f"{row.origin}: {error}") from error
        if self.train_on == "all":
            spans = [(0, len(text))]
        return talk, text, spans, endless

    def _without_end(self, text: str, spans: list[Span], talk: Conversation) -> int:
        answers = [message["content"].strip() for message in talk.messages if message["role"] == "assistant"]
        if len(spans) != len(answers):  # a template that writes several spans for a turn: look at the last
            spans, answers = spans[-1:], answers[-1:]
        return sum(
            not self._ends(text[start:stop].rstrip(), answer)
            for (start, stop), answer in zip(spans, answers, strict=True)
        )

    def _ends(self, turn: str, answer: str) -> bool:
        """Whether something that says "over" follows the answer: a special token, or any text of the template."""
        return any(turn.endswith(special) for special in self.specials) or not turn.endswith(answer)


def token_mask(places: NDArray[np.int64], spans: Sequence[Span]) -> NDArray[np.bool_]:
    """Which tokens stand for a character of a span.

    Args:
        places: (N, 2) the characters [start, stop) of each token.
        spans: ascending, not overlapping.
    """
    mask = np.zeros(len(places), dtype=np.bool_)
    for start, stop in spans:
        mask |= (places[:, 0] < stop) & (places[:, 1] > start)
    return mask
