"""From the columns of a row to a conversation: the four formats that chat data comes in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from llm_modules.data.sources import Row

Message = dict[str, Any]
ChatFormat = Literal["auto", "messages", "sharegpt", "instruction", "prompt"]

ROLES = ("system", "user", "assistant", "tool")
SYNONYMS = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "developer": "system",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "ipython": "tool",
    # The assistant's own call, written as text: it is predicted.
    "tool_call": "assistant",
    "function_call": "assistant",
}
ANSWERS = ("response", "output", "answer", "completion")
CONTEXTS = ("input", "context")
SYSTEMS = ("system", "system_prompt")


class Conversation:
    """Messages in the form that chat templates take, and what belongs to them.

    Attributes:
        messages: dicts with role (system, user, assistant, tool), content (str), and whatever else the row had.
        tools: descriptions of functions, for templates that show them.
    """

    def __init__(self, messages: list[Message], tools: list[Any] | None = None) -> None:
        self.messages = messages
        self.tools = tools

    def prompt(self) -> list[Message]:
        """The messages before the last assistant turn."""
        return self.messages[: self._last()]

    def reference(self) -> str:
        """What the last assistant turn says."""
        return str(self.messages[self._last()]["content"])

    def opening(self) -> str:
        """What the user says first. Rows that share it are one conversation continued, or one question answered twice:
        held out with one of them and trained on another, a model would be measured on what it has seen."""
        return next((str(m["content"]) for m in self.messages if m["role"] == "user"), str(self.messages[0]["content"]))

    def _last(self) -> int:
        return max(i for i, message in enumerate(self.messages) if message["role"] == "assistant")


def with_preprompt(messages: list[Message], preprompt: str) -> list[Message]:
    """The messages under a system message: the preprompt, and below it what they had for one."""
    own = messages[0]["content"] if messages[0]["role"] == "system" else ""
    system = {"role": "system", "content": f"{preprompt}\n\n{own}" if own else preprompt}
    return [system, *messages[messages[0]["role"] == "system" :]]


def preprompt_text(preprompt: str, key: str) -> str:
    """A preprompt as the config has it: the text, or the name of a .txt file that holds it.

    Args:
        key: where it is set, for the message.

    Raises:
        ValueError: there is no such file, or nothing in it.
    """
    file = Path(preprompt).expanduser() if preprompt.endswith(".txt") and "\n" not in preprompt else None
    if file is not None and not file.is_file():
        raise ValueError(f"{key}: no file {preprompt!r} (what ends in .txt is the name of a file)")
    text = preprompt.strip() if file is None else file.read_text(encoding="utf-8").strip()
    if not text:
        raise ValueError(f"{key}: {'empty' if file is None else f'{preprompt!r} is empty'}; a text is asked for")
    return text


def conversation(row: Row, chat_format: ChatFormat = "auto") -> Conversation:
    """The conversation in a row.

    Raises:
        ValueError: one line that names the file, the row and what is wrong with the conversation.
    """
    if chat_format == "auto":
        chat_format = detect_format(row)
    if chat_format == "messages":
        messages = _turns(row, "messages", "role", "content")
    elif chat_format == "sharegpt":
        messages = _turns(row, "conversations", "from", "value")
    else:
        messages = _single(row, "instruction" if chat_format == "instruction" else "prompt")
    messages = with_system(row, messages)
    _check(row, messages)
    return Conversation(messages, tools_of(row))


def with_system(row: Row, messages: list[Message]) -> list[Message]:
    """The messages under the system message that the row has in a column of its own, unless they have one."""
    system = next((row.columns[name] for name in _mapped_first(row, SYSTEMS) if row.columns.get(name)), None)
    if not system or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": _string(row, system, "system")}, *messages]


def detect_format(row: Row) -> ChatFormat:
    """The format that a row's columns are in.

    Raises:
        ValueError: none of them; names the columns there are.
    """
    columns = row.columns
    for name in _mapped_first(row, ("messages", "conversations", "instruction", "prompt")):
        if name in ("messages", "conversations") and isinstance(columns.get(name), list):
            turns = columns[name]
            has_roles = turns and isinstance(turns[0], dict) and "role" in turns[0]
            return "messages" if name == "messages" or has_roles else "sharegpt"
        if name in ("instruction", "prompt") and name in columns and any(answer in columns for answer in ANSWERS):
            return "instruction" if name == "instruction" else "prompt"
    raise ValueError(
        f"{row.origin}: no conversation in the columns {', '.join(map(str, columns)) or 'none'}; needed are messages, "
        "conversations, instruction and response, or prompt and completion (name them with `columns`)"
    )


def _mapped_first(row: Row, names: tuple[str, ...]) -> list[str]:
    """The names in their order, those that the source's ``columns`` gave before all others."""
    return sorted(names, key=lambda name: name not in row.mapped)


def _turns(row: Row, column: str, role_key: str, content_key: str) -> list[Message]:
    turns = row.columns.get(column, row.columns.get("conversations"))
    if not isinstance(turns, list):
        raise ValueError(f"{row.origin}: no column {column!r} with a list; there are: {', '.join(row.columns)}")
    messages = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or role_key not in turn:
            raise ValueError(f"{row.origin}: message {number} is no object with {role_key!r} and {content_key!r}")
        extra = {
            name: value for name, value in turn.items() if name not in (role_key, content_key) and value is not None
        }
        content = turn.get(content_key)
        if content is None and not extra.get("tool_calls"):
            raise ValueError(f"{row.origin}: message {number} ({turn[role_key]}) has no {content_key!r}")
        messages.append(
            {"role": turn[role_key], "content": "" if content is None else _text(row, content, number)} | extra
        )
    return messages


def _text(row: Row, content: Any, number: int) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "".join(str(part.get("text", "")) for part in content)
    raise ValueError(f"{row.origin}: message {number}: content must be text, not {type(content).__name__}")


def _string(row: Row, value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{row.origin}: column {name!r} must be a string, not {type(value).__name__}")
    return value


def _single(row: Row, question: str) -> list[Message]:
    columns = row.columns
    answer = next((name for name in _mapped_first(row, ANSWERS) if name in columns), None)
    if question not in columns or answer is None:
        raise ValueError(
            f"{row.origin}: no column {question if question not in columns else ' or '.join(ANSWERS)!r}; there are: "
            f"{', '.join(map(str, columns))}"
        )
    if isinstance(columns[question], list):  # messages; the completion as messages or text
        said = columns[answer]
        said = [{"role": "assistant", "content": said}] if isinstance(said, str) else _as_list(row, said, answer)
        whole = Row({"messages": [*columns[question], *said]}, row.file, row.number)
        return _turns(whole, "messages", "role", "content")
    asked = _string(row, columns[question], question)
    context = ""
    if question == "instruction":
        context = next((columns[name] for name in _mapped_first(row, CONTEXTS) if columns.get(name)), "")
    if context:
        asked = f"{asked}\n\n{_string(row, context, 'input')}"
    return [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": _string(row, columns[answer], answer)},
    ]


def _as_list(row: Row, value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{row.origin}: column {name!r} must be a list of messages, as the prompt is")
    return value


def tools_of(row: Row) -> list[Any] | None:
    """The descriptions of functions in the row's column ``tools``: a list, or JSON.

    Raises:
        ValueError: they are neither.
    """
    tools = row.columns.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except json.JSONDecodeError as error:
            raise ValueError(f"{row.origin}: column 'tools' is no JSON: {error.msg}") from error
    if not tools:
        return None
    if not isinstance(tools, list):
        raise ValueError(f"{row.origin}: column 'tools' must be a list, not {type(tools).__name__}")
    return tools


def _check(row: Row, messages: list[Message]) -> None:
    for number, message in enumerate(messages, 1):
        role = message["role"]
        message["role"] = role = SYNONYMS.get(role, role) if isinstance(role, str) else role
        if role not in ROLES:
            raise ValueError(
                f"{row.origin}: message {number} has the unknown role {role!r}; allowed: {', '.join(ROLES)}"
            )
        if role == "assistant" and not message["content"].strip() and not message.get("tool_calls"):
            raise ValueError(f"{row.origin}: message {number} is an empty answer of the assistant")
        if role == "system" and number > 1:
            raise ValueError(f"{row.origin}: message {number} is a system message; it may only be the first")
    spoken = [message["role"] for message in messages if message["role"] != "system"]
    if not spoken:
        raise ValueError(f"{row.origin}: the conversation has no messages")
    if spoken[0] == "assistant":
        raise ValueError(f"{row.origin}: the conversation starts with the assistant; it must start with the user")
    if "assistant" not in spoken:
        raise ValueError(f"{row.origin}: the conversation has no answer of the assistant, so nothing to learn from")
