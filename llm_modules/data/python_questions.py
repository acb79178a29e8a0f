"""Conversations about the standard library, made from its docstrings: short questions with short, true answers.

Half of the questions can be answered from the question itself (arguments, defaults, the module of a name), so that
also a small model can be right about modules it has never seen; the others ask what a name does, or for the name.
Which wording a name gets is a hash of the name: the same on every machine.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from llm_modules.data.python_docs import Definition, Module

SYSTEM = "You answer questions about Python's standard library."

LONGEST_ANSWER = 180
"""Characters: an answer is a sentence, not a page."""

OWN_SENTENCE = 40
"""Characters from which on a sentence is one module's own ("Close the file." is anybody's)."""

MOST_PARAMETERS = 6

COUNTS = (
    "no arguments",
    "one argument",
    "two arguments",
    "three arguments",
    "four arguments",
    "five arguments",
    "six arguments",
)

WHAT = (
    "What does `{signature}` do?",
    "What is `{signature}` for?",
    "Explain `{signature}` in one sentence.",
    "Write a docstring for `{signature}`.",
    "I found a call of `{name}` in some code. What does it do?",
)
WHAT_CLASS = (
    "What is the class `{name}` for?",
    "Describe the class `{name}` in one sentence.",
    "Write a docstring for the class `{name}`.",
)
WHAT_PROPERTY = (
    "What does the property `{name}` hold?",
    "Explain the property `{name}` in one sentence.",
)
ARGUMENTS = (
    "What arguments does `{signature}` take?",
    "List the arguments of `{signature}`.",
    "How do I call `{signature}`? Which arguments does it take?",
)
OPTIONAL = (
    "Which arguments of `{signature}` are optional?",
    "Which arguments of `{signature}` have a default value?",
)
WHICH = (
    'Which {kind} of `{owner}` does this: "{summary}"',
    'Name the {kind} of `{owner}` with this docstring: "{summary}"',
)
WHERE = (
    "Where is `{name}` defined?",
    "What kind of thing is `{name}`, and where does it live?",
)
MODULE = (
    "What is the module `{name}` for?",
    "What does the module `{name}` contain?",
    "Describe the module `{name}` in one sentence.",
)


def questions(modules: Iterable[Module], *, foreign: frozenset[str] = frozenset()) -> Iterator[dict[str, Any]]:
    """``{"messages": [{"role", "content"}, ...], "id"}`` for each question about the public names of ``modules``.

    Args:
        foreign: sentences of other modules that must not be said here.
    """
    for module in modules:
        summary = first_sentence(module.doc)
        if summary and summary not in foreign and module.definitions:
            yield _conversation(f"{module.name}/module", (_pick(MODULE, module.name).format(name=module.name), summary))
        for definition in module.definitions:
            summary = first_sentence(definition.doc)
            yield from _about(definition, module.name, "" if summary in foreign else summary)


def sentences(modules: Iterable[Module]) -> frozenset[str]:
    """The first sentences of the docstrings of ``modules`` that say enough to be somebody's own."""
    docs = (doc for module in modules for doc in (module.doc, *(d.doc for d in module.definitions)))
    return frozenset(sentence for doc in docs if len(sentence := first_sentence(doc)) >= OWN_SENTENCE)


def _about(definition: Definition, module: str, summary: str) -> Iterator[dict[str, Any]]:
    name, kind = definition.name, definition.kind
    words = {"name": name, "signature": definition.signature, "kind": kind, "owner": name.rpartition(".")[0]}
    arguments = _arguments(definition)
    wordings = {"class": WHAT_CLASS, "property": WHAT_PROPERTY, "function": WHAT, "method": WHAT}
    what = (_pick(wordings[kind], name).format(**words), summary)
    if summary and arguments and _hash(name, "turns") % 3 == 0:
        yield _conversation(f"{name}/both", what, ("What arguments does it take?", arguments))
    elif summary:
        yield _conversation(f"{name}/what", what)
    if arguments and _hash(name, "arguments") % 2 == 0:
        yield _conversation(f"{name}/arguments", (_pick(ARGUMENTS, name).format(**words), arguments))
    if (optional := _optional(definition)) and _hash(name, "optional") % 3 == 0:
        yield _conversation(f"{name}/optional", (_pick(OPTIONAL, name).format(**words), optional))
    if summary and words["owner"] and _hash(name, "which") % 4 == 0:
        yield _conversation(f"{name}/which", (_pick(WHICH, name).format(summary=summary, **words), f"`{name}`"))
    if words["owner"] and _hash(name, "where") % 6 == 0:
        yield _conversation(f"{name}/where", (_pick(WHERE, name).format(**words), _where(definition, module)))


def _conversation(identity: str, *turns: tuple[str, str]) -> dict[str, Any]:
    messages = [{"role": "system", "content": SYSTEM}] if _hash(identity, "system") % 4 == 0 else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "id": identity}


def with_wrong_answers(conversations: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Of each question its answer, and a worse one: that of an earlier question of the same kind (as fluent, and wrong)
    or, every other time, its own broken off in the middle of a sentence (which a model of any size can tell)."""
    earlier: dict[str, str] = {}
    for row in conversations:
        messages, kind = row["messages"], row["id"].rpartition("/")[2]
        if sum(message["role"] == "assistant" for message in messages) > 1:
            continue
        answer, words = messages[-1]["content"], messages[-1]["content"].split()
        wrong = earlier.get(kind, answer)
        if len(words) > 3 and _hash(row["id"], "worse") % 2 == 0:
            wrong = " ".join(words[: len(words) // 2]).rstrip(".,:;")
        if wrong != answer:
            yield {"messages": messages[:-1], "chosen": answer, "rejected": wrong, "id": row["id"]}
        earlier[kind] = answer


def first_sentence(doc: str) -> str:
    """The first sentence of a docstring as plain text; "" where that is no sentence of a fit length."""
    paragraphs = [" ".join(part.split()) for part in doc.split("\n\n")]
    # Older docstrings begin with the call: "S.split(sep) -> list of strings" or "fill(text, width) ...".
    text = next((p for p in paragraphs if p and not re.match(r"^[\w.]+\([^)]*\)\s*(->.*)?$", p)), "")
    text = re.sub(r"^[\w.]+\([^)]*\)\s*(->\s*[\w ,()\[\]]+\s*(--?|:)|--?|:)\s*", "", text)
    text = re.sub(r":\w+:`[~!]?([^`]+)`", r"`\1`", text).replace("``", "`")
    match = re.match(r"(.+?[.!?])(?=\s+[A-Z`(\"']|$)", text)
    sentence = match.group(1) if match else (text + "." if text and text[-1].isalnum() else "")
    sentence = re.sub(r"\s+([.,])(?=\s|$)", r"\1", sentence)
    clean = not re.search(r">>>|::|\||->|-{3}|={3}|@|\bXXX\b|TODO", sentence) and sentence.count("`") % 2 == 0
    long_enough = len(sentence.split()) >= 3 and sentence.count("(") == sentence.count(")")
    return sentence if clean and long_enough and sentence[0].isupper() and len(sentence) <= LONGEST_ANSWER else ""


def _arguments(definition: Definition) -> str:
    named = _named(definition)
    if named is None or len(named) > MOST_PARAMETERS:
        return ""
    if not named:
        return "It takes no arguments."
    shown = [f"`{name}`" if default is None else f"`{name}` (default `{default}`)" for name, default in named]
    return f"It takes {COUNTS[len(named)]}: {_listed(shown)}."


def _optional(definition: Definition) -> str:
    named = _named(definition)
    if not named or len(named) > MOST_PARAMETERS or any(name.startswith("*") for name, _ in named):
        return ""
    optional = [f"`{name}`" for name, default in named if default is not None]
    return f"{_listed(optional)}." if optional else "None: it has no default values."


def _named(definition: Definition) -> list[tuple[str, str | None]] | None:
    """(name, default) of each parameter, without the marks ``*`` and ``/``; None where a default is no short text."""
    if definition.parameters is None:
        return None
    named = [(p.name, p.default) for p in definition.parameters if p.name not in ("*", "/")]
    readable = all(default is None or (len(default) <= 40 and "<" not in default) for _, default in named)
    return named if readable else None


def _where(definition: Definition, module: str) -> str:
    name, last = definition.name, definition.name.rpartition(".")[2]
    if definition.kind in ("method", "property"):
        owner = name.split(".")[-2]
        return f"`{last}` is a {definition.kind} of the class `{owner}` in the module `{module}`."
    return f"`{last}` is a {definition.kind} in the module `{module}`."


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _pick(wordings: Sequence[str], name: str) -> str:
    return wordings[_hash(name, "wording") % len(wordings)]


def _hash(name: str, purpose: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{purpose}: {name}".encode()).digest()[:4], "big")
