"""The DataModules that a recipe's `data:` names: plain text, and conversations."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Literal

from llm_modules.data.chat import ChatFormat, conversation
from llm_modules.data.conversation_encoding import ConversationEncoder, TrainOn
from llm_modules.data.masks import renderer
from llm_modules.data.sources import Row
from llm_modules.data.templates import set_template
from llm_modules.data.token_datamodule import Prompt, TokenDataModule, at_least
from llm_modules.data.tokenization import Encoder, TextEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextDataModule(TokenDataModule):
    """Plain text for next-token prediction: every token of every document is trained, its end included.

    Documents longer than sequence_length are split into pieces.

    Args:
        add_bos: Put the beginning-of-text token before each document; not given: as the tokenizer does on its own.
        prompt_tokens: For `predict`: so many tokens of each held-out document are the prompt.
    """

    def __init__(self, *, add_bos: bool | None = None, prompt_tokens: int = 32, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        at_least("data.prompt_tokens", prompt_tokens, 1)
        self.add_bos = add_bos
        self.prompt_tokens = prompt_tokens

    def make_encoder(self, tokenizer: PreTrainedTokenizerBase) -> Encoder:
        return TextEncoder(tokenizer, self.add_bos)

    def make_prompt(self, row: Row) -> tuple[str, str]:
        ids = self.prepared_tokenizer(row.columns["text"], add_special_tokens=False, verbose=False)["input_ids"]
        prompt, rest = ids[: self.prompt_tokens], ids[self.prompt_tokens : self.sequence_length]
        return str(self.prepared_tokenizer.decode(prompt)), str(self.prepared_tokenizer.decode(rest))


class ConversationDataModule(TokenDataModule):
    """Conversations for supervised fine-tuning: only what the assistant says is trained, and that it stops.

    Args:
        chat_template: chatml, llama3, gemma, zephyr, alpaca, raw (prompt and completion as they are), a .jinja file,
            or the template itself; not given: the tokenizer's own.
        chat_format: Columns of the rows: messages, sharegpt, instruction (and response), prompt (and completion).
        train_on: `assistant`: all that it says; `last`: its last turn; `all`: every token.
        too_long: Conversations longer than sequence_length: `truncate`, `drop` or `error`.
    """

    def __init__(
        self,
        *,
        chat_template: str | None = None,
        chat_format: ChatFormat = "auto",
        train_on: TrainOn = "assistant",
        too_long: Literal["truncate", "drop", "error"] = "truncate",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if too_long not in ("truncate", "drop", "error"):
            raise ValueError(f"data.too_long: {too_long!r} is not one of truncate, drop, error")
        self.chat_template = chat_template
        self.chat_format: ChatFormat = chat_format
        self.train_on: TrainOn = train_on
        self.too_long = too_long

    def make_tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = super().make_tokenizer()
        for line in set_template(tokenizer, self.chat_template):
            print(line, file=sys.stderr)
        return tokenizer

    def make_encoder(self, tokenizer: PreTrainedTokenizerBase) -> Encoder:
        return ConversationEncoder(tokenizer, self.chat_format, self.train_on)

    def make_prompt(self, row: Row) -> tuple[Prompt, str]:
        talk = conversation(row, self.chat_format)
        if not talk.tools:  # whoever generates renders them, and knows then that no special token is to be added
            return talk.prompt(), talk.reference()
        return renderer(self.prepared_tokenizer, talk.tools)(talk.prompt(), prompt=True), talk.reference()
