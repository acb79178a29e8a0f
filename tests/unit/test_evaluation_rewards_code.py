"""Code is scored by its tests; what passes between the two; what of a recipe and of data is refused."""

from __future__ import annotations

import re
import sys
import threading
import time
from typing import Any

import pytest

from llm_modules.evaluation import Answer, CodeTests
from llm_modules.evaluation.code_tests import containment_problem, extract_code
from tests.unit.test_evaluation_rewards_contained import ADD, TESTS, kernel_has_landlock, passed

pytestmark = pytest.mark.skipif(not kernel_has_landlock(), reason="the kernel has no Landlock")


def answer(text: str, row: int = 7, **fields: Any) -> Answer:
    return Answer(row, "", text, "", {"test_list": TESTS} | fields, 1, True)


def test_this_system_contains_code() -> None:
    assert containment_problem() is None


def test_right_and_wrong_and_half_right() -> None:
    half = "def add(a, b):\n    return 3\n"
    answers = [answer(ADD), answer(half), answer("def add(a, b): return a - b"), answer("no code at all")]
    assert CodeTests()(answers) == [1.0, 0.5, 0.0, 0.0]
    assert CodeTests(score="all")(answers) == [1.0, 0.0, 0.0, 0.0]


def test_a_program_of_tests_with_an_entry_point_goes_on_with_the_prompt() -> None:
    fields = {"prompt": "import math\ndef root(x):\n    '''The root.'''\n", "entry_point": "root"}
    fields["test_list"] = "def check(candidate):\n    assert candidate(9) == 3\n"
    whole = "```python\ndef root(x):\n    return x ** 0.5\n```"
    texts = ["    return math.sqrt(x)", whole, "    return x"]
    assert CodeTests()([answer(text, **fields) for text in texts]) == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("x = 1", "x = 1"),
        ("Look:\n```python\nx = 1\n```\nand\n```\n1\n```", "x = 1\n"),
        ("```py\nx = 1\n```\n```Python\ny = 2\n```", "x = 1\n\ny = 2\n"),
        ("```\n    x = 1\n```", "    x = 1\n"),
        ("```python\nx = 1", "x = 1"),
        ("```python title=a.py\nx = '```'\n```", "x = '```'\n"),
    ],
)
def test_code_is_found_in_fences(text: str, code: str) -> None:
    assert extract_code(text) == code


def test_values_pass_between_code_and_tests_as_they_are() -> None:
    code = """
import re, collections, decimal, enum
Point = collections.namedtuple("Point", "x y")
class Colour(enum.IntEnum):
    RED = 1
class Node:
    def __init__(self, value): self.value, self.next = value, None
    def __eq__(self, other): return self.value == other.value
def echo(*values, **named): return values[0] if values else named
def count(text): return collections.Counter(text)
def point(): return Point(1, 2)
def colour(): return [Colour.RED]
def numbers(n):
    for i in range(n): yield i
def sort(values): values.sort()
def chain(node):
    while node.next: node = node.next
    return node.value
def apply(function, value): return function(value)
def broken(x): raise KeyError(x)
def node(value): return Node(value)
"""
    tests = [
        "for value in (1, 1.5, 'a', b'a', None, True, [1, [2]], (1,), {1: {2}}, {1, 2}, frozenset([1]), range(3)):\n"
        "    assert echo(value) == value and type(echo(value)) is type(value)",
        "assert count('aab') == {'a': 2, 'b': 1}",
        "assert point() == (1, 2)",
        "assert colour() == [1]",
        "assert list(numbers(3)) == [0, 1, 2] and next(numbers(1)) == 0",
        "values = [3, 1, 2]\nsort(values)\nassert values == [1, 2, 3]",
        "a = Node(1)\na.next = Node(2)\nassert chain(a) == 2 and a.next.value == 2",
        "assert apply(lambda x: x + 1, 2) == 3",
        "try:\n    broken('x')\nexcept KeyError:\n    pass\nelse:\n    raise AssertionError",
        "assert re.fullmatch('a', echo('a'))",
        "assert node(3) == Node(3) and node(3) != Node(4)",
        "assert echo(key=2) == {'key': 2}",
    ]
    assert passed(code, tests) == [True] * len(tests)


def test_several_run_at_once() -> None:
    answers = [answer(f"import time\ntime.sleep(2)\n{ADD}") for _ in range(4)]
    before = threading.active_count()
    start = time.monotonic()
    assert CodeTests(workers=4)(answers) == [1.0] * 4
    assert time.monotonic() - start < 4 * 2
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"test_list": []}, "row 7: no tests in column 'test_list'"),
        ({"test_list": None}, "row 7: no tests in column 'test_list'"),
        ({"test_list": ["assert ("]}, "row 7: column 'test_list' is no Python"),
        ({"test_setup_code": "def"}, "row 7: column 'test_setup_code' is no Python"),
    ],
)
def test_data_without_tests_is_an_error(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)) as caught:
        CodeTests()([answer(ADD, **fields)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [("seconds", 0), ("seconds", float("nan")), ("memory", 1), ("disk", 0), ("workers", -1), ("score", "most")],
)
def test_options_are_checked(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"rewards.code_tests.{option}: .* is not allowed; allowed: "):
        CodeTests(**{option: value})


def test_where_code_cannot_be_contained_it_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_modules.evaluation.code_tests.containment_problem", lambda: "the kernel has no Landlock")
    with pytest.raises(ValueError, match=r"cannot be contained here: the kernel has no Landlock; .* set unsafe: true"):
        CodeTests()
    assert CodeTests(unsafe=True)([answer(ADD)]) == [1.0]


def test_a_python_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    reward = CodeTests()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ValueError, match="code_tests: row 7: the tests could not be run: "):
        reward([answer(ADD)])
