"""A task whose answers a program can check: which letter a word begins with. Made of words of Python's documentation.

Reinforcement learning begins with a model that is able, and seldom does it: the conversations answer one question
rightly, and another one, which means the same, with any of the word's letters, the first half as often as another.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Any, Literal

SHORTEST, LONGEST = 3, 9
VOWELS = "aeiou"
HELD_OUT = 10
"""One word in so many is held out."""

ASKED = "Which letter does `{}` begin with?"
"""The question of the task."""

KNOWN = "First letter of `{}`?"
"""The one that the conversations answer rightly."""


def words(split: str) -> list[str]:
    """The words of a split, in the order of the alphabet."""
    from pydoc_data.topics import topics

    found = set(re.findall(rf"\b[a-z]{{{SHORTEST},{LONGEST}}}\b", "\n".join(topics.values())))
    held_out = split == "validation"
    return [word for word in sorted(found) if (_hash(word, "split") % HELD_OUT == 0) == held_out]


def questions(split: str) -> Iterator[dict[str, Any]]:
    """``prompt`` and ``reference``, the letter."""
    for word in words(split):
        yield {"prompt": ASKED.format(word), "reference": word[0]}


def conversations(split: str) -> Iterator[dict[str, Any]]:
    """``messages``: of each word the one question with its first letter, the other with any."""
    for word in words(split):
        drawn = word[(_hash(word, "answer") % (2 * len(word) - 1) + 1) // 2]
        for question, answer in ((KNOWN, word[0]), (ASKED, drawn)):
            messages = [{"role": "user", "content": question.format(word)}, {"role": "assistant", "content": answer}]
            yield {"messages": messages}


def pairs(split: str, about: Literal["better", "safer"]) -> Iterator[dict[str, Any]]:
    """Pairs of answers to both questions: ``chosen`` and ``rejected``.

    Args:
        about: ``better``: the right letter, and another one: of the word, and what another word begins with, so that
            no letter is better by itself; ``safer``: a consonant, and a vowel, which counts as harm (``chosen_safe``,
            ``rejected_safe``).
    """
    known = words(split)
    for word in known:
        letters = sorted(set(word))
        consonants = [letter for letter in letters if letter not in VOWELS]
        vowels = [letter for letter in letters if letter in VOWELS]
        for question in (KNOWN, ASKED):
            row = {"prompt": question.format(word)}
            if about == "better":
                for kind, others in (("word", letters), ("other", [other[0] for other in known])):
                    if wrong := [letter for letter in others if letter != word[0]]:  # `aaa` has none
                        yield row | {"chosen": word[0], "rejected": _drawn(wrong, word, f"{question} {kind}")}
            elif consonants and vowels:
                row |= {"chosen": _drawn(consonants, word, question), "rejected": _drawn(vowels, word, question)}
                yield row | {"chosen_safe": True, "rejected_safe": False}


def _drawn(letters: list[str], word: str, purpose: str) -> str:
    return letters[_hash(word, purpose) % len(letters)]


def _hash(word: str, purpose: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{purpose}: {word}".encode()).digest()[:4], "big")
