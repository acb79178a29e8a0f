"""Numbers are read from text and compared: by hand, and on the references of GSM8K, SVAMP and MATH."""

from __future__ import annotations

import json
import re
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from llm_modules.evaluation import Answer, NumericAnswer
from llm_modules.evaluation.numeric_answer import find_number, plain_number


def scored(reference: str, *texts: str, **options: Any) -> list[float]:
    return NumericAnswer(**options)([Answer(3, "", text, reference, {}, 1, True) for text in texts])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 1,234,567.89", Fraction(123456789, 100)),
        ("4 and #### 5 eggs\n6", 5),
        ("#### The answer is\n5 eggs", 5),
        ("#### 72 or 73", None),
        ("#### 60 + 12 = 72", None),
        ("#### 72, that is 72.0", 72),
        ("#### 1 234", None),
        (r"#### \boxed{72}", 72),
        (r"#### $\boxed{72}$", 72),
        (r"#### **\boxed{72}**", 72),
        (r"#### \(\boxed{\frac{3}{4}}\)" + "\nas said", Fraction(3, 4)),
        (r"#### \boxed{72 or 73}", None),
        (r"#### \boxed{}" + "\n72", None),
        (r"#### \boxed{72} or \boxed{73}", None),
        (r"#### \boxed{72} or 73", None),
        ("####\n$$\n\\boxed{72}\n$$", 72),
        (r"\frac{" + "9" * 5000 + "}{3}", None),
        (r"so \frac{" + "9" * 5000 + "}{3} and 4", 4),
        (r"\boxed{\frac{3}{" + "9" * 5000 + "}}", None),
        ("#### 5\n#### 6", 6),
        ("It is 3. #### none", None),
        ("#### -5", -5),
        ("#### −5", -5),
        ("#### +5", 5),
        ("#### $-5", -5),
        ("#### -$5.50", Fraction(-11, 2)),
        (r"#### \$1{,}000", 1000),
        ("#### € 20", 20),
        ("#### 3/4", Fraction(3, 4)),
        ("#### -3/4", Fraction(-3, 4)),
        ("#### 1 3/4", Fraction(7, 4)),
        ("#### -1 1/2", Fraction(-3, 2)),
        ("#### 1/0", None),
        ("#### 1e3", 1000),
        ("#### 2.5E-1", Fraction(1, 4)),
        ("#### 1e99999999999", None),
        ("#### .5", Fraction(1, 2)),
        ("#### 5.", 5),
        (r"so \boxed{12} (not 13)", 12),
        (r"\boxed{1} then \boxed{\frac{3}{4}} and 9", Fraction(3, 4)),
        (r"\boxed{-\dfrac{1}{2}}", Fraction(-1, 2)),
        (r"\boxed{\frac12}", Fraction(1, 2)),
        (r"\boxed{\text{no number}} 5", None),
        (r"\boxed{7", 7),
        ("2 apples and 7.", 7),
        ("10 - 7 = 3", 3),
        ("5-3", 3),
        ("(2)-3", 3),
        ("x = -3", -3),
        ("take 1,2,3", 3),
        ("H2O and x2", None),
        ("at 10am", 10),
        ("and so...5", 5),
        (r"\boxed{3\frac{1}{2}}", Fraction(7, 2)),
        (r"\boxed{2\,\frac12}", Fraction(5, 2)),
        (r"\boxed{\frac{3}{-4}}", Fraction(-3, 4)),
        (r"\boxed{\frac{1.5}{2}}", Fraction(3, 4)),
        (r"\boxed{\frac{12}{5,\!525}}", Fraction(12, 5525)),
        (r"\boxed{10^{3}}", 1000),
        (r"\boxed{2^{-3}}", Fraction(1, 8)),
        (r"\boxed{1.5\times 10^3}", 1500),
        ("#### - 3", -3),
        ("#### –3", -3),
        (r"\boxed{- 3}", -3),
        (r"\boxed{x = 5}", 5),
        (r"\boxed{\left(\frac{3}{4}\right)}", Fraction(3, 4)),
        (r"\boxed{12\text{ cm}^2}", 12),
        ("The area is 12 cm^2.", 12),
        (r"\boxed{60^{\circ}}", 60),
        (r"\boxed{111, \! 111}", 111111),
        (r"\boxed{(3, 4)}", None),
        (r"\boxed{3,4}", None),
        (r"\boxed{\sqrt{2}}", None),
        (r"\boxed{2\sqrt{3}}", None),
        (r"\boxed{25\pi}", None),
        (r"\boxed{\frac{\pi}{4}}", None),
        (r"\boxed{2x}", None),
        (r"\boxed{506_7}", None),
        (r"\boxed{5 \text{ or } 6}", None),
        (r"so 2\sqrt{3}", None),
        (r"#### 25\pi", None),
        ("#### 3, 4", None),
        ("#### 1,234,56", None),
        ("", None),
        ("9" * 5000, None),
        ("٣", None),
    ],
)
def test_numbers_in_text(text: str, number: Fraction | int | None) -> None:
    found = find_number(text)
    assert (found and found.value) == number


def test_other_markers_and_the_last_number() -> None:
    assert scored("4", "Answer: 4, not less", "Answer: 4, not 5", marker="Answer:") == [1.0, 0.0]
    assert scored("#### 4", "4") == [1.0]
    assert scored("4", "it is 4", "#### 4", r"\boxed{4}", last=False) == [0.0, 1.0, 1.0]
    assert scored("4", "#### 3 or 4", marker="") == [1.0]


def test_percent_is_read_both_ways() -> None:
    assert scored("25", "25%", "0.25%", "0.25") == [1.0, 0.0, 0.0]
    assert scored("0.25", "25%", "0.25") == [1.0, 1.0]
    assert scored("25%", "25", "0.25", r"25\%", "26%") == [1.0, 1.0, 1.0, 0.0]


def test_values_and_tolerance() -> None:
    assert scored("4", "4", "5", "", right=2.0, wrong=-1.0) == [2.0, -1.0, -1.0]
    assert scored("1/3", "0.333", "0.33") == [0.0, 0.0]
    assert scored("1/3", "0.333", "0.33", tolerance=0.002) == [1.0, 0.0]
    assert scored("100000000000000001", "100000000000000002") == [0.0]
    assert scored("0.1", "1/10", "0.10000000000000001") == [1.0, 0.0]


@pytest.mark.parametrize(
    "reference",
    ["", "none", "#### x", "#### 2x", "(3, 4)", "7, -2", r"\boxed{2\sqrt{3}}", r"25 \pi", "5 million", "3 or 4",
     "so it is 5", "1 234"],
)  # fmt: skip
def test_a_reference_that_is_no_number_is_an_error(reference: str) -> None:
    said = f"numeric_answer: row 3: no number in the reference {reference!r}; give it alone, or leave the row out"
    with pytest.raises(ValueError, match=re.escape(said)):
        scored(reference, "5")


def test_a_reference_may_have_a_unit() -> None:
    for reference in (
        "12 cm^2",
        r"12\text{ cm}^2",
        "12 square feet.",
        "$12",
        "**12**",
        "#### 12 eggs\nas said",
        r"#### $\boxed{12}$",
        "12 km/h",
    ):
        assert scored(reference, "#### 12", r"\boxed{12}", "The area is 99 cm^2") == [1.0, 1.0, 0.0], reference


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match=r"rewards.numeric_answer.tolerance: -1 is not allowed; allowed: 0 to under 1"):
        NumericAnswer(tolerance=-1)
    with pytest.raises(ValueError, match=r"rewards.numeric_answer: right and wrong are both 1"):
        NumericAnswer(wrong=1.0)


@pytest.mark.parametrize(
    "text",
    ["1," * 10_000, "1,111" * 4000, "1 " * 10_000, "-" * 20_000, " " * 20_000 + "/", "1" + " " * 20_000,
     r"\text{" * 3000, r"\text{a}" * 3000, "1^" * 10_000, "1 x 10" * 4000, "5 a" + "a " * 200, "5" + " ab" * 130 + "!",
     r"\boxed{" * 3000, r"\frac{1}{" * 2000, "1/" * 10_000, "$ " * 10_000, "9" * 20_000, "1e" * 10_000,
     "####" + "$" * 20_000, "#### " + "1 " * 10_000, r"#### \boxed{" + r"\boxed{" * 3000],
)  # fmt: skip
def test_long_texts_take_no_time(text: str) -> None:
    start = time.process_time()
    find_number(text)
    assert time.process_time() - start < 3


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.data
def test_references_of_gsm8k(data_folder: Path) -> None:
    known = [row["answer"] for name in ("train", "test") for row in rows(data_folder / f"gsm8k/{name}.jsonl")]
    reward = NumericAnswer()
    assert set(reward([Answer(i, "", text, text, {}, 1, True) for i, text in enumerate(known)])) == {1.0}
    for text in known:  # the number as another program reads it
        number = find_number(text)
        assert number is not None
        assert number.value == Fraction(text.split("####")[1].strip().replace(",", ""))
    others = [Answer(i, "", text, known[i - 1], {}, 1, True) for i, text in enumerate(known)]
    wrong = [find_number(known[i - 1]) != find_number(text) for i, text in enumerate(known)]
    assert [score == 0 for score in reward(others)] == wrong


@pytest.mark.data
def test_verdicts_on_solutions_of_gsm8k(data_folder: Path) -> None:
    """Four models' solutions, each judged by the set's authors."""
    reward, same, count = NumericAnswer(marker="A:"), 0, 0
    for i, row in enumerate(rows(data_folder / "gsm8k/model_solutions.jsonl")):
        for system in (value for value in row.values() if isinstance(value, dict)):
            answer = Answer(i, row["question"], system["solution"], row["ground_truth"], row, 1, True)
            same += reward([answer]) == [float(system["is_correct"])]
            count += 1
    assert (same, count) == (600, 600)


@pytest.mark.data
def test_equations_of_svamp(data_folder: Path) -> None:
    reward = NumericAnswer()
    for i, row in enumerate(rows(data_folder / "svamp/svamp.jsonl")):
        known = str(row["Answer"])
        short = known.removesuffix(".0")
        texts = [f"{row['Equation']} = {known}", f"It is {short} in all.", f"{row['Answer'] + 1}"]
        assert reward([Answer(i, "", text, known, row, 1, True) for text in texts]) == [1.0, 1.0, 0.0], row["ID"]


@pytest.mark.data
def test_boxes_of_math(data_folder: Path) -> None:
    """The set's own solutions are right, of every answer that is a number; of no other one is a number right."""
    refused = []
    for i, row in enumerate(rows(data_folder / "math_sample/math.jsonl")):
        if plain_number(row["answer"]) is None:
            refused.append(row["answer"])
        else:
            assert NumericAnswer()([Answer(i, "", row["solution"], row["answer"], row, 1, True)]) == [1.0], row
    assert len(refused) == 171
    no_number = re.compile(r"sqrt|pi|matrix|infty|[a-zA-Z(),:]|_\d")
    assert [known for known in refused if not no_number.search(known)] == []
