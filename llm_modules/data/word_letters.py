"""A task whose answers a program can check: which letter a word begins with. Made of words of Python's documentation.

For reinforcement learning that begins with a model that knows how answers look, and nothing more: each row also has a
conversation whose answer is a letter drawn at random.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Any

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SHORTEST, LONGEST = 3, 9
HELD_OUT = 10
"""One word in so many is held out."""


def words(split: str) -> list[str]:
    """The words of a split, in the order of the alphabet."""
    from pydoc_data.topics import topics

    found = set(re.findall(rf"\b[a-z]{{{SHORTEST},{LONGEST}}}\b", "\n".join(topics.values())))
    held_out = split == "validation"
    return [word for word in sorted(found) if (_hash(word, "split") % HELD_OUT == 0) == held_out]


def rows(split: str) -> Iterator[dict[str, Any]]:
    """``prompt``, ``reference`` (the letter), and ``messages`` that end with any letter, as likely a wrong one."""
    for word in words(split):
        question = f"Which letter does `{word}` begin with?"
        answer = LETTERS[_hash(word, "answer") % len(LETTERS)]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield {"prompt": question, "reference": word[0], "messages": messages}


def _hash(word: str, purpose: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{purpose}: {word}".encode()).digest()[:4], "big")
