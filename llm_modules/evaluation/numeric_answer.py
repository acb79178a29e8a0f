"""A reward of the number that an answer ends with, and how numbers are read from text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from llm_modules.evaluation.rewards import Answer, Reward, RowError, each

WHOLE = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
NUMBER = re.compile(
    rf"""(?:(?<![\w.)\]}}])(?P<sign>[-+\u2212\u2013]))?(?<![\w^])(?<!\^\{{)(?<!\d\.)(?:\\?[$€£¥]\s?(?P<inner>[-\u2212\u2013]?))?
    (?:(?P<whole>\d+)\s+(?P<part>\d+)/(?P<of>\d+)               # 1 3/4
      |(?P<top>{WHOLE})\s?/\s?(?P<bottom>{WHOLE})(?![\d/])       # 3/4
      |(?P<decimal>{WHOLE}(?:\.\d+)?|(?<![\w.])\.\d+)(?:[eE](?P<power>[-+]?\d+))?)
    (?P<percent>\s?\\?%)?""",
    re.VERBOSE | re.ASCII,
)
GROUPS = re.compile(r"\{,\}|,\s*\\!\s*")
NOTHING = re.compile(r"\\[,!;: ]|\\(?:left|right|displaystyle)(?![a-zA-Z])|\s?\^\s?(?:\\circ|\{\s?\\circ\s?\})|°")
WORDS = re.compile(r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf)|mbox|underline)\s?\{([^{}]*)\}")
PART = rf"(?:\{{\s?(-?{WHOLE}(?:\.\d+)?)\s?\}}|(\d))"
FRACTION = re.compile(rf"(\d\s?)?\\[cdt]?frac\s*{PART}\s*{PART}")
SCIENTIFIC = re.compile(
    r"(?<![\w.,])(\d{1,40}(?:\.\d{1,40})?)\s?(?:\\times|\\cdot|[×*x])\s?10\s?\^\s?\{?(-?\d{1,4})\}?"
)
POWER = re.compile(r"(?<![\w.,])(\d{1,20}(?:\.\d{1,20})?)\s?\^\s?(?:\{\s?(-?\d{1,2})\s?\}|(-?\d{1,2}))(?!\d)")
BOXED = re.compile(r"\\f?boxed\s*\{")
BOX_FIRST = re.compile(r"[\s*`$]*(?:\\[(\[]\s*)?(\\f?boxed\s*\{)")

BEFORE = re.compile(r"(?:[a-zA-Z\]}]\{|\\sqrt\s?|\\frac\s?)$")
AFTER = re.compile(r"\s?(?:\\[a-zA-Z]|[\^_\u00bc-\u00be\u2150-\u215e])|[,:]\d")
"""What makes of a number a part of something else: a root, a fraction of letters, a multiple of pi, a list."""
AROUND = re.compile(r"\\?[$€£¥]|\\[()\[\]]")
NAMED = re.compile(r"^[a-zA-Z]\w{0,20}\s?=\s?")
SIGN = re.compile(r"^([-+\u2212\u2013])\s?(?=[\d.])")
UNIT = re.compile(
    r"""\s?(?:(?:\s[mgshlLAVWNJKCF]|[a-zA-Z]{2,})(?![a-zA-Z])(?:\s?\^\s?\{?-?\d\}?|[\u00b2\u00b3])?
        (?:[\s/.-]{1,2}[a-zA-Z]+(?:\s?\^\s?\{?-?\d\}?|[\u00b2\u00b3])?)*)?\s?\.?""",
    re.VERBOSE,
)
NO_UNIT = re.compile(r"\b(?:pi|sqrt|and|or|to|plus|minus|times|over|half|dozen|hundred|thousand|[mbtr]+illion)\b")
LONGEST = 400
"""Characters of a number that is read; a longer one is none."""


class Number(NamedTuple):
    """A number as a text has it: 25 with a percent sign is 25."""

    value: Fraction
    percent: bool


class NumericAnswer(Reward):
    """Whether the answer's number is the reference's: compared exactly, as fractions, or within ``tolerance``.

    The number of a text is the one after the last ``marker``, in a box or not; without a marker that in the last
    ``\\boxed{}``; an answer without either has its last number. Several numbers in the line after a marker
    (``#### 72 or 73``, ``#### 60 + 12 = 72``) are none: GSM8K's form is a single one. Read are signs, decimals,
    exponents, powers, thousands in commas, fractions (3/4, 1 3/4, ``\\frac{3}{4}``), currency signs and units (left
    out) and percent: where only one of the two has the sign, 25% is 25 or 0.25. What is in a box, and a reference, has
    to be a number as a whole: ``2\\sqrt{3}``, ``25\\pi``, ``(3, 4)`` and ``2x`` are none. An answer with such a box is
    wrong; such a reference is an error.

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

    def check(self, asked: Answer) -> None:
        self._known(asked)

    def _score(self, answer: Answer) -> float:
        known = self._known(answer)
        found = find_number(answer.text, self.marker, last=self.last)
        return self.right if found is not None and self._same(found, known) else self.wrong

    def _known(self, answer: Answer) -> Number:
        text = answer.reference
        marked = _marked(text, self.marker)
        if (known := plain_number(_unboxed(marked) if marked else _boxed(text) or text)) is None:
            raise RowError(
                answer.row, f"no number in the reference {text[-60:]!r}; give it alone, or leave the row out"
            )
        return known

    def _same(self, found: Number, known: Number) -> bool:
        values = {found.value}
        if found.percent != known.percent:
            values.add(found.value / 100 if found.percent else found.value * 100)
        return any(abs(value - known.value) <= self.tolerance * abs(known.value) for value in values)


def find_number(text: str, marker: str = "####", *, last: bool = True) -> Number | None:
    """The number that a text gives as its answer; None: there is none.

    Args:
        text: of an answer or a reference.
        marker: the number after its last place is the answer, if the line has no other; empty: there is no marker.
        last: without marker and ``\\boxed{}``, take the last number of all.
    """
    if (marked := _marked(text, marker)) is not None:
        said = _unboxed(marked)
        return plain_number(said) or (None if said != marked else _only_number(marked))
    if (boxed := _boxed(text)) is not None:
        return plain_number(boxed)
    return _last_number(text) if last else None


def plain_number(text: str) -> Number | None:
    """The number that a text's first line is, but for signs of currency, units and Markdown; None: it is none."""
    if len(text := text.strip().partition("\n")[0]) > LONGEST:
        return None
    text = " ".join(AROUND.sub("", _simple(text)).split()).strip(" *`")
    if text.startswith("(") and text.endswith(")"):
        text = text[1:-1].strip()
    text = SIGN.sub(r"\1", NAMED.sub("", text))
    if (number := NUMBER.match(text)) is None or (value := _value(number)) is None:
        return None
    unit = text[number.end() :]
    return Number(value, number["percent"] is not None) if UNIT.fullmatch(unit) and not NO_UNIT.search(unit) else None


def _only_number(text: str) -> Number | None:
    """The number of the first line that has any; None: it has several, or there is none."""
    for line in _simple(text).splitlines():
        if found := _numbers(line):
            return _whole(line, *found[0]) if len({value for _, value in found}) == 1 else None
    return None


def _last_number(text: str) -> Number | None:
    """The last number in a text; None: there is none, or it is a part of something else."""
    text = _simple(text)
    found = _numbers(text)
    return _whole(text, *found[-1]) if found else None


def _numbers(text: str) -> list[tuple[re.Match[str], Fraction]]:
    return [(match, value) for match in NUMBER.finditer(text) if (value := _value(match)) is not None]


def _whole(text: str, match: re.Match[str], value: Fraction) -> Number | None:
    """The number of a match; None: it is a part of something else."""
    if BEFORE.search(text, max(0, match.start() - 8), match.start()) or AFTER.match(text, match.end()):
        return None
    return Number(value, match["percent"] is not None)


def _simple(text: str) -> str:
    """Without what LaTeX only sets; fractions and powers as NUMBER has them."""
    text = WORDS.sub(r" \1", NOTHING.sub("", GROUPS.sub(",", text)))
    text = SCIENTIFIC.sub(r"\1e\2", FRACTION.sub(_fraction, text))
    return POWER.sub(lambda match: str(Fraction(match[1]) ** int(match[2] or match[3])), text)


def _fraction(match: re.Match[str]) -> str:
    """``3\\frac{1}{2}`` is 3 1/2, not 31/2; what is too long, or divides by 0, is left as it is."""
    whole, *parts = match.groups()
    if len(match[0]) > LONGEST:
        return match[0]
    top, bottom = (Fraction((part or digit).replace(",", "")) for part, digit in (parts[:2], parts[2:]))
    if not bottom:
        return match[0]
    value = top / bottom
    return (
        f"{whole.strip()} {value.numerator}/{value.denominator}" if whole else f"{value.numerator}/{value.denominator}"
    )


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
    return -value if match["inner"] or match["sign"] in ("-", "\u2212", "\u2013") else value


def _marked(text: str, marker: str) -> str | None:
    return text.rpartition(marker)[2] if marker and marker in text else None


def _unboxed(text: str) -> str:
    """What is in the box that a text begins with, if its line has no other number; the text, where there is no box."""
    if (box := BOX_FIRST.match(text)) is None:
        return text
    line = text[box.start(1) :].partition("\n")[0]
    several = len({value for _, value in _numbers(_simple(line))}) > 1
    return "" if several else _boxed(line) or ""


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
