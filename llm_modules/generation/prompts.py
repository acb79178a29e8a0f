"""From prompts to token ids, and the token ids that end an answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from llm_modules.generation.completion import Prompt


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, tools: Sequence[Any] | None = None) -> list[int]:
    """Ids of raw text, or of chat messages up to where the assistant begins to speak.

    Args:
        tools: descriptions of the functions that the prompt offers.

    Raises:
        ValueError: messages without a chat template, messages it refuses, tools of raw text or that the template leaves
            out, or no token at all.
    """
    raw = isinstance(prompt, str)
    if tools and (raw or "tools" not in tokenizer.get_chat_template(tools=list(tools))):
        what = "it is raw text" if raw else "the chat template leaves them out"
        raise ValueError(f"prompt: it has tools, and {what}: the model would not see them")
    options: dict[str, Any] = {"tools": list(tools)} if tools else {}
    text = (
        prompt if isinstance(prompt, str) else _apply_template(tokenizer, prompt, add_generation_prompt=True, **options)
    )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("prompt: it holds half a surrogate pair, which is no character") from error
    # A template writes its own special tokens, and so did whoever wrote one at the beginning of the text.
    rendered = not raw or any(text.startswith(token) for token in tokenizer.all_special_tokens)
    ids = list(tokenizer(text, add_special_tokens=not rendered)["input_ids"])
    if not rendered and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()  # some tokenizers end every text
    if ids:
        return ids
    if tokenizer.bos_token_id is None:
        raise ValueError("prompt: it is empty and the tokenizer has no bos_token to begin with; give some text")
    return [tokenizer.bos_token_id]


def turn_end_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Id of the special token that ends an assistant's turn in the chat template; None without template or token."""
    if not tokenizer.chat_template:
        return None
    mark = "ANSWER"
    messages = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": mark}]
    rendered = _apply_template(tokenizer, messages)
    _, found, after = rendered.rpartition(mark)
    after = after.lstrip()
    special = {
        str(token.content): index for index, token in tokenizer.added_tokens_decoder.items() if token.content and found
    }
    matches = [content for content in special if after.startswith(content)]
    return special[max(matches, key=len)] if matches else None


def end_token_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All that ends an answer: the tokenizer's end of text, the template's turn end, the model's generation config.

    Of the last only what the tokenizer knows as a special token: a model made from a config has the end token of the
    family's first member there (2 for any Llama), which is an ordinary token of another tokenizer.
    """
    configured = getattr(model.generation_config, "eos_token_id", None)
    configured = configured if isinstance(configured, (list, tuple)) else [configured]
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = {tokenizer.eos_token_id, turn_end_token(tokenizer), *special.intersection(configured)}
    return sorted(index for index in ids if index is not None)


def set_end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes into the model's generation config what ends an answer, so that other programs stop there too.

    A model that does not generate has none.
    """
    if (generation := getattr(model, "generation_config", None)) is None:
        return
    ends = end_token_ids(model, tokenizer)
    generation.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    generation.bos_token_id = tokenizer.bos_token_id
    generation.pad_token_id = tokenizer.pad_token_id


def stop_tokens(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> tuple[list[int], list[str]]:
    """Split stop strings into special tokens, which never appear in the decoded text, and text."""
    special = {str(token.content): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = [special[string] for string in stop if string in special]
    strings = [string for string in stop if string not in special]
    for string in strings:
        if inside := next((token for token in special if token in string), None):
            raise ValueError(
                f"stop: {string!r} mixes text and the special token {inside!r}, which is no part of the generated "
                f"text; name the two as separate stop strings"
            )
    return ids, strings


def positions_of(config: Any) -> int | None:
    """Most positions that the model was made for; None where the architecture knows no limit."""
    text = config.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        if isinstance(value := getattr(text, name, None), int):
            return value
    return None


def _apply_template(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **options: Any) -> str:
    if not tokenizer.chat_template:
        raise ValueError("prompt: messages need a chat template and the tokenizer has none; give raw text instead")
    from jinja2.exceptions import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except (TemplateError, KeyError, TypeError) as error:
        raise ValueError(f"prompt: the chat template refuses these messages: {error}") from error
