"""A conversation's ids in which an answer cannot end its own turn, or begin another, by spelling special tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PRIVATE = range(0xE000, 0xF8FF)
"""Characters of Unicode that have no meaning: stand for special tokens while the template is filled in."""


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], tools: list[Any] | None = None
) -> list[int]:
    """The ids of messages of which a model wrote the last, under the chat template.

    Where that one has no special token's name in it these are ``apply_chat_template``'s. A name that it has is encoded
    as the text that it is (``split_special_tokens``), everything else as before.

    Args:
        tokenizer: a fast one, with a template.
        messages: role and content; the last is the answer.
        tools: descriptions of the functions that the prompt offers.

    Raises:
        ValueError: the template leaves the tools out.
    """
    if tools and "tools" not in tokenizer.get_chat_template(tools=tools):
        raise ValueError("it has tools, and the chat template leaves them out: the model would not see them")
    *before, last = messages
    pieces = _pieces(tokenizer, str(last["content"]))
    if len(pieces) == 1:
        encoded: Any = tokenizer.apply_chat_template([*messages], tools=tools)
        return encoded["input_ids"]
    names = pieces[1::2]
    taken = "".join(str(message.get("content") or "") for message in messages)
    mark = next(chr(code) for code in PRIVATE if chr(code) not in taken)
    # The template sees no special token in the answer: some refuse them, or take the text apart at them.
    shown = str(
        tokenizer.apply_chat_template(
            [*before, {**last, "content": mark.join(pieces[::2])}], tools=tools, tokenize=False
        )
    )
    text, spans = "", []
    for number, part in enumerate(shown.split(mark)):
        if number:  # a template that shows only the end of an answer has dropped the first ones; one may show it twice
            name = names[(number - 1 - shown.count(mark)) % len(names)]
            spans.append((len(text), len(text) + len(name)))
            text += name
        text += part
    return _encoded(tokenizer, text, spans)


def _pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """The text, cut into what is ordinary (even places) and what would become a special token (odd ones)."""
    special = special_ids(tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    pieces, done = [], 0
    for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        if token in special:
            pieces += [text[done:start], text[start:end]]
            done = end
    return [*pieces, text[done:]]


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[tuple[int, int]]) -> list[int]:
    """The ids of a text in which what is special within ``spans`` is spelled out."""
    special = special_ids(tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = []
    for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        if token in special and any(start < last and first < end for first, last in spans):
            plain = tokenizer(text[start:end], add_special_tokens=False, split_special_tokens=True)
            ids += plain["input_ids"]
        else:
            ids.append(token)
    return ids


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Of tokens that text is not made of; that of unknown characters, which it may have, is none of them."""
    found = {place for place, token in tokenizer.added_tokens_decoder.items() if token.special}
    return found - {tokenizer.unk_token_id}
