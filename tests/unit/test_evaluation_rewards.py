"""Rewards: what comes of each is checked and named; any function; an answer's form; a recipe's YAML names them all."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from llm_modules.evaluation import Answer, ExactAnswer, Format, FunctionReward, Reward

ROOT = Path(__file__).parents[2]


def answers(*texts: str, first: int = 10) -> list[Answer]:
    return [Answer(first + i, "p", text, "", {}, len(text), True) for i, text in enumerate(texts)]


class Given(Reward):
    """Gives what it is told to."""

    def __init__(self, scores: Any, weight: float = 1.0, name: str | None = None) -> None:
        super().__init__(weight, name)
        self.scores = scores

    def score(self, answers: Sequence[Answer]) -> Any:
        return self.scores


@pytest.mark.parametrize(
    "scores",
    [
        [1, -2.5],
        (True, 0),
        np.array([1.0, 2.0], np.float32),
        torch.tensor([1.0, 2.0]),
        [torch.tensor(1), np.float64(2)],
    ],
)
def test_numbers_of_every_kind(scores: Any) -> None:
    found = Given(scores)(answers("a", "b"))
    assert found == [float(score) for score in scores]
    assert all(type(score) is float for score in found)


def test_no_answers_no_numbers() -> None:
    assert Given(None)([]) == []


@pytest.mark.parametrize(
    ("scores", "problem"),
    [
        ([1.0, float("nan")], "reward given: row 11: gave nan; a reward must be finite"),
        ([float("-inf"), 1.0], "reward given: row 10: gave -inf; a reward must be finite"),
        ([1.0, None], "reward given: row 11: gave None, which is no number"),
        ([1.0, "2"], "reward given: row 11: gave '2', which is no number"),
        ([[1.0, 2.0], 1.0], "reward given: row 10: gave [1.0, 2.0], which is no number"),
        ([10**400, 1.0], "reward given: row 10: gave 1000"),
        ([1.0, -1e300], "reward given: row 11: gave -1e+300, which is infinite in fp32"),
        ({"a": 1.0, "b": 2.0}, "reward given: gave a dict; a list of numbers, one for each answer, is needed"),
        ("12", "reward given: gave a str; a list of numbers, one for each answer, is needed"),
        ([1.0], "reward given: rows 10, 11: gave 1 numbers for 2 answers"),
        ([1.0] * 3, "reward given: rows 10, 11: gave 3 numbers for 2 answers"),
        (1.0, "reward given: row 10: TypeError: 'float' object is not iterable"),
    ],
)
def test_what_comes_is_checked(scores: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)) as caught:
        Given(scores)(answers("a", "b"))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


class Picky(Reward):
    """Scores all at once, and refuses one text."""

    def score(self, answers: Sequence[Answer]) -> list[float]:
        texts = {answer.text for answer in answers}
        if "bad" in texts:
            raise KeyError("what\nis this")
        return [1.0] * len(answers)


def test_the_row_is_found_that_a_reward_of_many_fails_at() -> None:
    with pytest.raises(ValueError, match=r"^reward picky: row 12: KeyError: 'what\\nis this' \(.*:\d+\)$") as caught:
        Picky()(answers("a", "b", "bad", "c"))
    assert isinstance(caught.value.__cause__, KeyError)


class Crowded(Reward):
    def score(self, answers: Sequence[Answer]) -> list[float]:
        if len(answers) > 1:
            raise MemoryError
        return [1.0]


def test_a_reward_without_a_score_is_refused() -> None:
    class Forgot(Reward):
        def scores(self, answers: Sequence[Answer]) -> list[float]:
            return [1.0] * len(answers)

    with pytest.raises(ValueError, match=r"^rewards.forgot: Forgot has no score\(answers\), which a Reward needs$"):
        Forgot()


def test_an_exit_is_no_end_of_the_run() -> None:
    def leaves(answer: Answer) -> float:
        sys.exit(3)

    class Leaves(Reward):
        def score(self, answers: Sequence[Answer]) -> list[float]:
            sys.exit("gone")

    with pytest.raises(
        ValueError, match=r"^reward leaves: row 10: SystemExit: 3 \(.*test_evaluation_rewards.py:\d+\)$"
    ):
        FunctionReward(leaves)(answers("a", "b"))
    with pytest.raises(ValueError, match=r"^reward leaves: row 10: SystemExit: gone \("):
        Leaves()(answers("a", "b"))


def test_rows_are_named_by_file_and_line() -> None:
    given = [Answer(7 + i, "p", "a", reference, origin=f"q.jsonl:{i + 1}") for i, reference in enumerate(("a", ""))]
    with pytest.raises(ValueError, match=r"^reward exact_answer: q.jsonl:2: it has no reference"):
        ExactAnswer()(given)
    with pytest.raises(ValueError, match=r"^reward given: q.jsonl:2: gave nan"):
        Given([1.0, float("nan")])(given)
    with pytest.raises(ValueError, match=r"^reward given: q.jsonl:1, q.jsonl:2: gave 3 numbers for 2 answers"):
        Given([1.0] * 3)(given)
    with pytest.raises(ValueError, match=r"^reward picky: q.jsonl:1: KeyError: 'what"):
        Picky()([replace(answer, text="bad") for answer in given])


def test_where_no_row_fails_alone_all_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"^reward crowded: rows 10, 11, 12, 13, 14, 15, 16, 17, \.\.\.: MemoryError \("
    ):
        Crowded()(answers(*"abcdefghij"))


def test_an_interruption_is_no_mistake_of_the_reward() -> None:
    def interrupted(answer: Answer) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FunctionReward(interrupted)(answers("a"))


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_weight_that_says_nothing_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match=r"rewards.given.weight: .* is not allowed; allowed: a finite number"):
        Given([], weight=weight)


def test_names() -> None:
    assert Given([]).name == "given"
    assert Given([], name="mine").name == "mine"
    assert Format("a").name == "format"

    class HTTPStatusOf2Pages(Given):
        pass

    assert HTTPStatusOf2Pages([]).name == "http_status_of2_pages"


def length(answer: Answer) -> float:
    return len(answer.text) / answer.tokens


def test_a_function_is_called_once_for_each_answer() -> None:
    seen: list[Answer] = []
    reward = FunctionReward(lambda answer: seen.append(answer) or 1.0, name="seen")
    given = answers("a", "bb")
    assert reward(given) == [1.0, 1.0]
    assert seen == given
    assert FunctionReward(length).name == "length"


def test_a_function_that_raises_is_named_with_its_row() -> None:
    calls = []

    def fails(answer: Answer) -> float:
        calls.append(answer.row)
        return 1 / (answer.row - 11)

    line = fails.__code__.co_firstlineno + 2
    where = rf"\(.*test_evaluation_rewards.py:{line}\)$"
    with pytest.raises(
        ValueError, match=rf"^reward fails: row 11: ZeroDivisionError: division by zero {where}"
    ) as caught:
        FunctionReward(fails)(answers("a", "b", "c"))
    assert calls == [10, 11]
    assert isinstance(caught.value.__cause__.__cause__, ZeroDivisionError)  # type: ignore[union-attr]


CONFIG = """
rewards:
- class_path: llm_modules.evaluation.FunctionReward
  init_args:
    function: my_own_rewards.length
    weight: 0.5
- class_path: llm_modules.evaluation.Format
  init_args:
    pattern: '<think>.*</think>.*'
- class_path: my_own_rewards.Short
- class_path: llm_modules.evaluation.NumericAnswer
- class_path: llm_modules.evaluation.CodeTests
  init_args: {score: all, unsafe: true, workers: 2}
- class_path: llm_modules.evaluation.JudgeReward
  init_args: {base_url: http://localhost:1/v1, model: m}
- class_path: llm_modules.evaluation.ModelReward
  init_args: {model: runs/reward/hh/0/export, dtype: bfloat16}
"""
OWN = """
from llm_modules.evaluation import Reward

def length(answer):
    return len(answer.text)

class Short(Reward):
    def score(self, answers):
        return [-len(answer.text) for answer in answers]
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_own_rewards.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_a_recipe_names_functions_and_classes_of_the_working_directory(own: Path) -> None:
    parser = ArgumentParser()
    parser.add_argument("--rewards", type=list[Reward])
    (own / "config.yaml").write_text(CONFIG)
    config = parser.parse_path("config.yaml")
    again = parser.parse_string(parser.dump(config))
    for parsed in (config, again):
        rewards = parser.instantiate_classes(parsed).rewards
        names = ["length", "format", "short", "numeric_answer", "code_tests", "judge_reward", "model_reward"]
        assert [reward.name for reward in rewards] == names
        assert [reward.weight for reward in rewards] == [0.5, *[1.0] * 6]
        text = "<think>\n1\n</think>\n2"
        assert [reward(answers(text))[0] for reward in rewards[:3]] == [len(text), 1.0, -len(text)]
    assert "my_own_rewards.length" in parser.dump(config)


def test_a_function_that_is_not_there_is_refused(own: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--rewards", type=list[Reward])
    (own / "config.yaml").write_text(CONFIG.replace("rewards.length", "rewards.lenght"))
    with pytest.raises(Exception, match="lenght"):
        parser.parse_path("config.yaml")


def test_an_answer_has_the_form_or_not() -> None:
    reward = Format(r"<think>.*</think>\s*<answer>(.*)</answer>")
    right = "<think>a\nb</think>\n<answer>3</answer>"
    assert reward(answers(right, "x" + right, right + "x", "")) == [1.0, 0.0, 0.0, 0.0]


def test_a_bad_expression_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rewards.format.pattern: '\(a' is no regular expression: missing \)"):
        Format("(a")


def test_an_expression_that_never_ends_is_an_error_in_time() -> None:
    reward = Format(r"(a|aa)+$")
    start = time.process_time()
    with pytest.raises(ValueError, match=r"reward format: row 11: the pattern .* takes over 1 s on 3001 characters"):
        reward(answers("b", "a" * 3000 + "!"))
    assert time.process_time() - start < 3


def test_the_package_opens_without_torch() -> None:
    names = "Answer, CodeTests, Format, FunctionReward, JudgeReward, ModelReward, NumericAnswer, Reward"
    program = (
        f"import sys; from llm_modules.evaluation import {names}; "
        "sys.exit(len({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_name_that_is_not_there() -> None:
    import llm_modules.evaluation

    with pytest.raises(AttributeError, match="has no attribute 'Numeric'"):
        _ = llm_modules.evaluation.Numeric


@pytest.mark.parametrize("name", ["safe-rlhf-quickstart", "safe-rlhf-models"])
def test_what_safe_rlhf_calls_a_vowel_is_what_is_right_as_one(name: str) -> None:
    """A right vowel is costly however much space is around it: the reward looks past it, so the cost must."""
    recipe = yaml.safe_load((ROOT / f"configs/safety/{name}.yaml").read_text())
    (cost,) = (c for c in recipe["model"]["init_args"]["costs"] if c["class_path"].endswith("Format"))
    answers = [Answer(i, "", text, "a") for i, text in enumerate(("a", " a", "a\n", " \ta ", "b", "a b", ""))]
    assert Format(**cost["init_args"])(answers) == ExactAnswer()(answers) == [1.0] * 4 + [0.0] * 3
