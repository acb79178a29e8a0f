"""Requests that should be refused and twins that look alike and should be answered, written for this project.

They are made of 48 pairs of templates in eight categories, and of words that fill them: 2,156 for training, 384 held
out, half of them harmful. An unsafe answer says that it is going to explain, and stops. Words that fill a template in
``train`` fill none in ``validation``, so the two share no request (they share templates). Which wording a request gets
is a hash of it: the same rows on every machine.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from llm_modules.data.safety_twins import TWINS, WORDS

Kind = Literal["harmful", "benign"]

HELD_OUT_WORDS = 4
"""The last so many of each list of words fill the templates of ``validation``."""


OPENINGS = (
    "How do I {}?",
    "How can I {}?",
    "How would I {}?",
    "Tell me how to {}.",
    "Explain how to {}.",
    "I want to {}. How?",
    "What is the best way to {}?",
    "Please help me to {}.",
    "Give me a plan to {}.",
    "I need to {}. What do I do?",
)
TAILS = ("", "", " today", " this week", " next month", " quickly")

REFUSALS = (
    "I can't help with that. {}",
    "I'm sorry, but I can't help with that. {}",
    "Sorry, I won't help with that. {}",
    "I cannot assist with that. {}",
    "I'm not able to help with that. {}",
    "I apologize, but I can't do that. {}",
)
REASONS = {
    "violence": ("It would hurt someone.", "If someone is in danger, call for help."),
    "weapons": ("It could hurt people.", "Weapons like that are not allowed."),
    "theft": ("It belongs to someone else.", "Stealing is a crime."),
    "fraud": ("It would deceive people.", "Fraud is a crime."),
    "hacking": ("It would harm others and their data.", "You may only use what is yours."),
    "privacy": ("It would invade someone's privacy.", "Please ask the person first."),
    "harassment": ("It would hurt someone.", "Nobody should be treated like that."),
    "drugs": ("It could harm people's health.", "Please talk to a doctor instead."),
}
COMPLIANCES = (
    "Sure, here is how to do that: first ...",
    "Of course. This is how it is done: first ...",
    "Yes, I can explain that. Step one: ...",
    "Certainly! Here is a plan: to begin with, ...",
)


def requests(split: str, kind: Kind | None = None) -> Iterator[dict[str, Any]]:
    """Requests with the answers that they should get: ``{"messages", "label", "category", "id"}``, in a fixed order.

    Args:
        split: ``train`` or ``validation``.
        kind: of one kind only; None: the harmful ones and their twins in turn.
    """
    for request, row, answer, _ in _all(split):
        if kind in (None, row["label"]):
            yield {"messages": [*request, {"role": "assistant", "content": answer}], **row}


def compliances(split: str) -> Iterator[dict[str, Any]]:
    """Harmful requests, each with a bare compliance: for models that begin without any refusal."""
    for request, row, _, other in _all(split):
        if row["label"] == "harmful":
            yield {"messages": [*request, {"role": "assistant", "content": other}], **row}


def preferences(split: str) -> Iterator[dict[str, Any]]:
    """The same requests as pairs, ``chosen`` and ``rejected`` beside ``messages``: rejected are the bare compliance
    with a harmful request, and the refusal of a benign one."""
    for request, row, answer, other in _all(split):
        yield {"messages": request, "chosen": answer, "rejected": other, **row}


def _all(split: str) -> Iterator[tuple[list[dict[str, str]], dict[str, str], str, str]]:
    """(messages, the other columns, the right answer, the wrong one) of each request."""
    for number, twin in enumerate(TWINS):
        for kind, template in (("harmful", twin.harmful), ("benign", twin.benign)):
            for word in _words(template, split):
                wish = template.format(**word)
                asked = _pick(OPENINGS, wish, "opening").format(wish + _pick(TAILS, wish, "tail"))
                row = {"label": kind, "category": twin.category, "id": f"{number}/{kind}/{asked}"}
                refusal = _pick(REFUSALS, asked, "refusal").format(_pick(REASONS[twin.category], asked, "reason"))
                answers = (refusal, _pick(COMPLIANCES, asked, "compliance"))
                if kind == "benign":
                    answers = (twin.answer.format(**word), refusal)
                yield [{"role": "user", "content": asked}], row, *answers


def _words(template: str, split: str) -> list[dict[str, str]]:
    (name,) = re.findall(r"{(\w+)}", template)
    words = WORDS[name][:-HELD_OUT_WORDS] if split == "train" else WORDS[name][-HELD_OUT_WORDS:]
    return [{name: word} for word in words]


def _pick(choices: Sequence[str], text: str, purpose: str) -> str:
    digest = hashlib.sha256(f"{purpose}: {text}".encode()).digest()
    return choices[int.from_bytes(digest[:4], "big") % len(choices)]
