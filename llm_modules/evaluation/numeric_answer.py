"""A reward of the number that an answer ends with, and how numbers are read from text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from llm_modules.evaluation.rewards import Answer, Reward, RowError, each

WHOLE = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
NUMBER = re.compile(
    rf"""(?:(?<![\w.)\]}}])(?P<sign>[-+\u2212]))?(?<!\w)(?<!\d\.)(?:\\?[$€£¥]\s?(?P<inner>[-\u2212]?))?
    (?:(?P<whole>\d+)\s+(?P<part>\d+)/(?P<of>\d+)               # 1 3/4
      |(?P<top>{WHOLE})\s?/\s?(?P<bottom>{WHOLE})(?![\d/])       # 3/4
      |(?P<decimal>{WHOLE}(?:\.\d+)?|(?<![\w.])\.\d+)(?:[eE](?P<power>[-+]?\d+))?)
    (?P<percent>\s?\\?%)?""",
    re.VERBOSE | re.ASCII,
)
FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}|\\[dt]?frac\s*(\d)\s*(\d)")
SPACES = re.compile(r"\{,\}|\\[,!;: ]")
BOXED = re.compile(r"\\f?boxed\s*\{")
LONGEST = 400
"""Characters of a number that is read; a longer one is none."""


class Number(NamedTuple):
    """A number as a text has it: 25 with a percent sign is 25."""

    value: Fraction
    percent: bool


class NumericAnswer(Reward):
    """Whether the answer's number is the reference's: compared exactly, as fractions, or within ``tolerance``.

    The number of a text is the first one after the last ``marker``; without a marker the one in the last ``\\boxed{}``;
    without either the last number of all. Read are signs, decimals, exponents, thousands in commas, fractions (3/4,
    1 3/4, ``\\frac{3}{4}``), currency signs (left out) and percent: where only one of the two has the sign, 25% is 25
    or 0.25. A reference without a number is an error.

    Args:
        marker: what announces the number, as GSM8K's ``####``; empty: there is none.
        last: read the last number where an answer has neither marker nor box; no: such an answer is wrong.
        tolerance: largest difference, as a share of the reference.
        right: of the right number.
        wrong: of another number, or none.
        weight: as of ``Reward``.
        name: as of ``Reward``.
    """

    def __init__(
        self,
        marker: str = "####",
        last: bool = True,
        tolerance: float = 0.0,
        right: float = 1.0,
        wrong: float = 0.0,
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        if not 0 <= tolerance < 1:
            raise ValueError(f"rewards.{self.name}.tolerance: {tolerance} is not allowed; allowed: 0 to under 1")
        if right == wrong:
            raise ValueError(f"rewards.{self.name}: right and wrong are both {right}; nothing could be learned")
        self.marker, self.last, self.tolerance = marker, last, Fraction(tolerance)
        self.right, self.wrong = right, wrong

    def score(self, answers: Sequence[Answer]) -> list[float]:
        return each(self._score, answers)

    def _score(self, answer: Answer) -> float:
        known = find_number(answer.reference, self.marker)
        if known is None:
            raise RowError(answer.row, f"no number in the reference {answer.reference[:60]!r}")
        found = find_number(answer.text, self.marker, last=self.last)
        return self.right if found is not None and self._same(found, known) else self.wrong

    def _same(self, found: Number, known: Number) -> bool:
        values = {found.value}
        if found.percent != known.percent:
            values.add(found.value / 100 if found.percent else found.value * 100)
        return any(abs(value - known.value) <= self.tolerance * abs(known.value) for value in values)


def find_number(text: str, marker: str = "####", *, last: bool = True) -> Number | None:
    """The number that a text gives as its answer; None: there is none.

    Args:
        text: of an answer or a reference.
        marker: the first number after its last place is the answer; empty: there is no marker.
        last: without marker and ``\\boxed{}``, take the last number of all.
    """
    if marker and marker in text:
        numbers = _numbers(text.rpartition(marker)[2], most=1)
        return numbers[0] if numbers else None
    if (boxed := _boxed(text)) is not None:
        numbers = _numbers(boxed, most=1)
        return numbers[0] if numbers else None
    numbers = _numbers(text) if last else []
    return numbers[-1] if numbers else None


def _numbers(text: str, most: int | None = None) -> list[Number]:
    text = SPACES.sub("", text)
    text = FRACTION.sub(lambda match: f"{match[1] or match[3]}/{match[2] or match[4]}", text)
    found = []
    for match in NUMBER.finditer(text):
        if (value := _value(match)) is not None:
            found.append(Number(value, match["percent"] is not None))
            if len(found) == most:
                break
    return found


def _value(match: re.Match[str]) -> Fraction | None:
    """None: a division by zero, or too many digits."""
    if len(match[0]) > LONGEST or len(match["power"] or "") > 4:
        return None
    top, bottom = match["top"], match["bottom"] or match["of"]
    if bottom is not None and not int(bottom.replace(",", "")):
        return None
    if match["whole"]:
        value = int(match["whole"]) + Fraction(int(match["part"]), int(match["of"]))
    elif top:
        value = Fraction(int(top.replace(",", "")), int(bottom.replace(",", "")))
    else:
        value = Fraction(match["decimal"].replace(",", "")) * Fraction(10) ** int(match["power"] or 0)
    return -value if match["inner"] or match["sign"] in ("-", "\u2212") else value


def _boxed(text: str) -> str | None:
    """What is in the last ``\\boxed{}``; to the end of the text where it is not closed."""
    start = None
    for match in BOXED.finditer(text):
        start = match.end()
    if start is None:
        return None
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return text[start:place]
    return text[start:]
