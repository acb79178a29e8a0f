"""What an answer is worth: the interface of rewards, plugged in by ``class_path``, and a reward of any function."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from traceback import walk_tb
from typing import Any, TypeVar

Result = TypeVar("Result")

WORDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
SHOWN = 8
"""Rows that an error names."""
LARGEST = 3.4028234663852886e38
"""The largest number of fp32, in which rewards become advantages."""


@dataclass(frozen=True)
class Answer:
    """What a reward, or a judge, sees of an answer.

    Attributes:
        row: the prompt's number in the data, from 0.
        prompt: raw text, or chat messages (role, content).
        text: the answer.
        reference: the row's known answer; empty if there is none.
        fields: the data row's own columns.
        tokens: length of the answer in tokens.
        finished: whether it ended by itself; False: cut at ``max_new_tokens``.
        origin: file and line of the row, which errors name; empty where the rows are of no file.
    """

    row: int
    prompt: str | list[dict[str, Any]]
    text: str
    reference: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    tokens: int = 0
    finished: bool = True
    origin: str = ""

    @property
    def place(self) -> str:
        """How errors name its row."""
        return self.origin or f"row {self.row}"

    @property
    def request(self) -> str:
        """What the user said last."""
        return self.prompt if isinstance(self.prompt, str) else str(self.prompt[-1]["content"])


class RowError(ValueError):
    """Something is wrong with one answer; the reward's name is put before it.

    Args:
        row: of the answer.
        problem: one line.
    """

    def __init__(self, row: int, problem: str) -> None:
        super().__init__(f"row {row}: {problem}")
        self.row, self.problem = row, problem


class Reward:
    """One number for each answer; override ``score``.

    Args:
        weight: factor in the sum of rewards; negative: a penalty; 0: logged, and counts for nothing.
        name: under which it is logged; None: the class's name, ``NumericAnswer`` as ``numeric_answer``.
        unfinished: what an answer gets that did not end by itself, in place of its score, for which it is not asked;
            None: its score. Not yet weighted; a ``weight`` below 0 makes of it the opposite.
    """

    def __init__(self, weight: float = 1.0, name: str | None = None, unfinished: float | None = None) -> None:
        self.name = name or WORDS.sub("_", type(self).__name__).lower()
        if not math.isfinite(weight):
            raise ValueError(f"rewards.{self.name}.weight: {weight} is not allowed; allowed: a finite number")
        if type(self).score is Reward.score and type(self).__call__ is Reward.__call__:
            raise ValueError(f"rewards.{self.name}: {type(self).__name__} has no score(answers), which a Reward needs")
        if unfinished is not None and not math.isfinite(unfinished):
            raise ValueError(
                f"rewards.{self.name}.unfinished: {unfinished} is not allowed; allowed: a finite number, or null"
            )
        self.weight, self.unfinished = weight, unfinished

    def score(self, answers: Sequence[Answer]) -> Sequence[float]:
        """A number for each answer, in their order; not yet weighted."""
        raise NotImplementedError

    def check(self, asked: Answer) -> None:
        """Raises a ``RowError`` if no answer to a row could be scored; called with each row, its text empty, before
        training. Overriding it is optional."""

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """What ``score`` says, checked.

        Raises:
            ValueError: one line that names the reward and the row: ``score`` raised (with the line that did), or gave
                NaN, what is infinite in fp32, no number, or not one number for each answer.
        """
        if self.unfinished is None:
            return self._all(answers)
        scores = iter(self._all([answer for answer in answers if answer.finished]))
        return [next(scores) if answer.finished else self.unfinished for answer in answers]

    def _all(self, answers: Sequence[Answer]) -> list[float]:
        """The score of each, finished or not."""
        if not answers:
            return []
        try:
            given: Any = self.score(answers)
            scores = None if isinstance(given, Mapping | str | bytes) else list(given)
        except (Exception, SystemExit) as error:
            raise self._blamed(answers, error) from error
        if scores is None:
            raise ValueError(
                f"reward {self.name}: gave a {type(given).__name__}; a list of numbers, one for each answer, is needed"
            )
        if len(scores) != len(answers):
            raise ValueError(
                f"reward {self.name}: {_rows(answers)}: gave {len(scores)} numbers for {len(answers)} answers"
            )
        return [self._checked(answer, score) for answer, score in zip(answers, scores, strict=True)]

    def _checked(self, answer: Answer, score: Any) -> float:
        try:
            if isinstance(score, (str, bytes)):
                raise TypeError("text")
            number = float(score)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(
                f"reward {self.name}: {answer.place}: gave {_line(repr(score))}, which is no number"
            ) from error
        if not math.isfinite(number):
            raise ValueError(f"reward {self.name}: {answer.place}: gave {number}; a reward must be finite")
        if abs(number) > LARGEST:
            raise ValueError(
                f"reward {self.name}: {answer.place}: gave {number}, which is infinite in fp32; allowed: up to 3.4e38"
            )
        return number

    def _blamed(self, answers: Sequence[Answer], error: BaseException) -> ValueError:
        """The error with its row, which is found, where ``score`` does not say it, by scoring each answer alone."""
        if isinstance(error, RowError):
            place = next((answer.place for answer in answers if answer.row == error.row), f"row {error.row}")
            return ValueError(f"reward {self.name}: {place}: {error.problem}")
        for answer in answers:
            try:
                list(self.score([answer]))
            except (Exception, SystemExit) as own:  # noqa: BLE001 - the same failure is looked for, and told
                return ValueError(f"reward {self.name}: {answer.place}: {told(own)}")
        return ValueError(f"reward {self.name}: {_rows(answers)}: {told(error)}")


class FunctionReward(Reward):
    """Any Python function of one answer.

    Args:
        function: import path of a function that takes an ``Answer`` and returns a number, as ``my_rewards.length``
            for ``length`` in my_rewards.py of the working directory.
        weight: as of ``Reward``.
        name: as of ``Reward``; None: the function's name.
    """

    def __init__(self, function: Callable[[Answer], float], weight: float = 1.0, name: str | None = None) -> None:
        super().__init__(weight, name or getattr(function, "__name__", None))
        self.function = function

    def score(self, answers: Sequence[Answer]) -> list[float]:
        return each(self.function, answers)


def each(function: Callable[[Answer], Result], answers: Sequence[Answer]) -> list[Result]:
    """``function`` of every answer.

    Raises:
        RowError: it raised; names the row.
    """
    scores = []
    for answer in answers:
        try:
            scores.append(function(answer))
        except RowError:
            raise
        except (Exception, SystemExit) as error:
            raise RowError(answer.row, told(error)) from error
    return scores


def told(error: BaseException) -> str:
    """Type and message of an exception in one line, and where in the user's own file it was raised."""
    message = _line(str(error))
    return (f"{type(error).__name__}: {message}" if message else type(error).__name__) + _own_line(error)


def _own_line(error: BaseException) -> str:
    """The line of the file that the reward is in, as `` (my_rewards.py:4)``; nothing where the reward is ours."""
    file, number = "", 0
    for frame, line in walk_tb(error.__traceback__):
        module, name = str(frame.f_globals.get("__name__")), frame.f_code.co_filename
        if not file and module != __name__:
            if module.startswith("llm_modules."):
                return ""
            file = name
        number = line if name == file else number
    if not file:
        return ""
    path = Path(file)
    return f" ({path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path.name}:{number})"


def _line(text: str, longest: int = 200) -> str:
    text = " ".join(text.split())
    return text if len(text) <= longest else f"{text[:longest]}..."


def _rows(answers: Sequence[Answer]) -> str:
    """ "row 3" or "rows 3, 4, ...", or their places in files."""
    places = list(dict.fromkeys(answer.place for answer in answers))
    if len(places) == 1:
        return places[0]
    shown = ", ".join(places[:SHOWN]) + (", ..." if len(places) > SHOWN else "")
    return shown if answers[0].origin else f"rows {shown.replace('row ', '')}"
