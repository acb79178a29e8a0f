"""Which part of a rendered conversation the assistant wrote, for any chat template.

A template marks it itself (``{% generation %}``), or it is found by rendering: the conversation up to a turn, with the
generation prompt, is what the model will be given, so the turn begins where that ends; the turn ends where the
rendering of the conversation up to and including it ends. Templates that write earlier turns differently once later
ones are there (Qwen3 drops their thoughts, Mistral moves the system message) are resolved by putting a marker in the
turn's place. Where neither gives one clear answer the row is refused: a wrong mask would train on the user's words.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llm_modules.data.chat import Conversation, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKER = "\u2063litrecipes\u2063"
"""Stands for a turn's content; begins and ends with a character that is no white space, so that nothing strips it."""

Render = Callable[..., str]


class TemplateError(ValueError):
    """A template that cannot render a conversation, or not in a way that shows who said what."""


def renderer(tokenizer: PreTrainedTokenizerBase, tools: list[Any] | None = None) -> Render:
    """``render(messages, prompt=False)``: the text of the conversation, with the generation prompt if asked for."""
    import jinja2

    def render(messages: list[Message], prompt: bool = False) -> str:
        try:
            text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise TemplateError(_refused(error)) from error
        return str(text)

    return render


def shows_tools(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template (or one of its templates) writes what functions there are."""
    templates = tokenizer.chat_template
    written = templates if isinstance(templates, str) else " ".join((templates or {}).values())
    return "tools" in written


def marks_generation(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's template marks the assistant's part itself."""
    template = tokenizer.get_chat_template()
    return re.search(r"\{%-?\s*generation\b", template) is not None


def marked_spans(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation, and the parts of it that the template marks as generated."""
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{k: v for k, v in message.items() if v is not None} for message in conversation.messages]
    try:
        special_tokens: dict[str, Any] = dict(tokenizer.special_tokens_map)
        rendered: Any = render_jinja_template(
            conversations=[messages],
            tools=conversation.tools,
            chat_template=tokenizer.get_chat_template(tools=conversation.tools),
            return_assistant_tokens_mask=True,
            **special_tokens,
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise TemplateError(_refused(error)) from error
    (text,), (spans,) = rendered
    spans = [(start, stop) for start, stop in spans if start < stop]
    _refuse_lost_calls(conversation, text, spans)
    return text, spans


def last_turn(
    render: Render, conversation: Conversation, text: str, spans: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """The spans of the assistant's last turn, which a template may mark in pieces.

    Args:
        render: see `renderer`.
        text, spans: of the whole conversation, as `marked_spans` or `assistant_spans` gives them.

    Raises:
        TemplateError: there are more spans than turns, and the template does not show where the last turn begins.
    """
    if len(spans) < 2:
        return spans
    before: str | None
    try:
        before = render(conversation.prompt(), prompt=True)
    except TemplateError:
        before = None
    if before is not None and text.startswith(before):
        return [span for span in spans if span[1] > len(before)]
    if len(spans) > sum(message["role"] == "assistant" for message in conversation.messages):
        raise TemplateError(
            "the chat template marks an answer in several pieces, and what comes before the last answer is written "
            "differently once that is there: which pieces are of the last answer cannot be told"
        )
    return spans[-1:]


def _refuse_lost_calls(conversation: Conversation, text: str, spans: list[tuple[int, int]]) -> None:
    """A template that does not know tool calls leaves them out, and would train the turn to end without one.

    Raises:
        TemplateError: a called function is named in no turn of the assistant.
    """
    for number, message in enumerate(conversation.messages, 1):
        for call in message.get("tool_calls") or []:
            function = call.get("function") or call if isinstance(call, dict) else {}
            name = function.get("name") if isinstance(function, dict) else None
            if isinstance(name, str) and not any(name in text[start:stop] for start, stop in spans):
                raise TemplateError(
                    f"the chat template leaves out message {number}'s call of {name!r} (tool_calls); use one that "
                    "writes tool calls, such as chatml"
                )


def _refused(error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"the chat template refuses the conversation: {reason}"


def assistant_spans(
    render: Render, conversation: Conversation, specials: list[str]
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation, and the part [start, stop) of it that each assistant turn takes, turn end included.

    Args:
        render: see `renderer`.
        conversation: what is rendered.
        specials: the tokenizer's special tokens: one of them ends a turn; white space after it is nobody's.

    Raises:
        TemplateError: the template does not show where a turn is.
    """
    messages = conversation.messages
    whole = render(messages)
    spans: list[tuple[int, int]] = []
    for k, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        marked = _marked(render, messages, k)
        start = _start(render, messages, k, whole, marked)
        stop = _stop(render, messages, k, whole, marked, start, specials)
        content = message["content"].strip()
        inside = whole[start:stop]
        if not inside or (spans and start < spans[-1][1]) or (content and content[-64:] not in inside):
            raise TemplateError(f"the chat template does not show what message {k + 1} (assistant) is")
        spans.append((start, stop))
    _refuse_lost_calls(conversation, whole, spans)
    return whole, spans


def _marked(render: Render, messages: list[Message], k: int) -> tuple[str, str] | None:
    """What is rendered before and after the content of turn k; None where that cannot be told."""
    if not messages[k]["content"].strip():
        return None
    try:
        text = render([*messages[:k], messages[k] | {"content": MARKER}, *messages[k + 1 :]])
    except TemplateError:
        return None
    before, found, after = text.partition(MARKER)
    return (before, after) if found and MARKER not in after else None


def _start(render: Render, messages: list[Message], k: int, whole: str, marked: tuple[str, str] | None) -> int:
    content = len(marked[0]) if marked is not None and whole.startswith(marked[0]) else None
    given: str | None
    prompted: str | None
    try:
        given, prompted = render(messages[:k]), render(messages[:k], prompt=True)
    except TemplateError:
        given = prompted = None
    if prompted is not None and whole.startswith(prompted):
        # Without a generation prompt the turn's header may stand between: nothing that a model is to write.
        if prompted != given or content is None or not whole[len(prompted) : content].strip():
            return len(prompted)
        return content
    if content is None:
        raise TemplateError(
            f"the chat template renders what comes before message {k + 1} (assistant) differently once it is there"
        )
    return content


def _stop(
    render: Render,
    messages: list[Message],
    k: int,
    whole: str,
    marked: tuple[str, str] | None,
    start: int,
    specials: list[str],
) -> int:
    turn: str | None
    try:
        turn = render(messages[: k + 1])
    except TemplateError:
        turn = None
    if k == len(messages) - 1 or (turn is not None and whole.startswith(turn) and len(turn) > start):
        stop = len(whole) if turn is None or k == len(messages) - 1 else len(turn)
        return _after_last_special(whole, start, stop, specials)
    if marked is not None and whole.endswith(marked[1]):
        content_end = len(whole) - len(marked[1])
        rest = whole[content_end:]
        space = len(rest) - len(rest.lstrip())
        for special in specials:
            if rest.startswith(special, space):
                return content_end + space + len(special)
    raise TemplateError(f"the chat template does not show where message {k + 1} (assistant) ends")


def _after_last_special(whole: str, start: int, stop: int, specials: list[str]) -> int:
    """Cut white space that follows a special token: the model stops at the token and never writes it."""
    stripped = whole[start:stop].rstrip()
    return start + len(stripped) if any(stripped.endswith(special) for special in specials) else stop
