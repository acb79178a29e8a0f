"""A reward of answers that are known word for word."""

from __future__ import annotations

from collections.abc import Sequence

from llm_modules.evaluation.rewards import Answer, Reward, RowError


class ExactAnswer(Reward):
    """1 where the answer is the row's reference, spaces around it aside, and 0 elsewhere.

    Args:
        ignore_case: whether large and small letters are the same.
        must_end: 0, too, for an answer that did not end by itself.
        weight: as of ``Reward``.
        name: as of ``Reward``.

    Raises:
        ValueError: a row has no reference.
    """

    def __init__(
        self, ignore_case: bool = False, must_end: bool = True, weight: float = 1.0, name: str | None = None
    ) -> None:
        super().__init__(weight, name)
        self.ignore_case, self.must_end = ignore_case, must_end

    def score(self, answers: Sequence[Answer]) -> list[float]:
        return [self._score(answer) for answer in answers]

    def check(self, asked: Answer) -> None:
        if not asked.reference.strip():
            raise RowError(asked.row, "it has no reference to compare with (column `reference`)")

    def _score(self, answer: Answer) -> float:
        self.check(answer)
        said, known = answer.text.strip(), answer.reference.strip()
        same = said.casefold() == known.casefold() if self.ignore_case else said == known
        return float(same and (answer.finished or not self.must_end))
