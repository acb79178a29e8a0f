"""A reward of an answer's form."""

from __future__ import annotations

from collections.abc import Sequence

from llm_modules.evaluation.rewards import Answer, Reward, RowError, each

SECONDS = 1.0
"""Of processor time, the longest match; nested repetition can take for ever, and Python's ``re`` cannot be stopped."""


class Pattern:
    """A regular expression (the package ``regex``, which reads those of ``re``) whose search ends in time.

    Args:
        pattern: the expression; ``.`` matches line ends, too.
        key: the config's key, which errors name.
    """

    def __init__(self, pattern: str, key: str) -> None:
        import regex

        try:
            self._compiled = regex.compile(pattern, regex.DOTALL)
        except regex.error as error:
            raise ValueError(f"{key}: {pattern!r} is no regular expression: {error}") from error
        self.pattern, self.groups = pattern, self._compiled.groups

    def full_match(self, answer: Answer) -> bool:
        """Whether the whole answer matches.

        Raises:
            RowError: that takes longer than ``SECONDS``.
        """
        try:
            return self._compiled.fullmatch(answer.text, timeout=SECONDS) is not None
        except TimeoutError as error:
            raise self._too_slow(answer) from error

    def last(self, text: str, answer: Answer) -> str | None:
        """The first group of the last match in ``text``; None: there is no match.

        Raises:
            RowError: that takes longer than ``SECONDS``.
        """
        found = None
        try:
            for match in self._compiled.finditer(text, timeout=SECONDS):
                found = match.group(1)
        except TimeoutError as error:
            raise self._too_slow(answer) from error
        return found

    def _too_slow(self, answer: Answer) -> RowError:
        return RowError(
            answer.row,
            f"the pattern {self.pattern!r} takes over {SECONDS:g} s on {len(answer.text)} characters; write it without "
            "repetitions inside repetitions",
        )


class Format(Reward):
    """1 for an answer that matches a regular expression as a whole, else 0.

    A match that takes longer than a second ends the run with an error that names the row and the pattern: 0 would make
    the reward depend on the machine's speed.

    Args:
        pattern: the expression, in the syntax of Python's ``re``; ``.`` matches line ends, too.
        weight: as of ``Reward``.
        name: as of ``Reward``.
    """

    def __init__(self, pattern: str, weight: float = 1.0, name: str | None = None) -> None:
        super().__init__(weight, name)
        self.pattern = Pattern(pattern, f"rewards.{self.name}.pattern")

    def score(self, answers: Sequence[Answer]) -> list[float]:
        return each(self.pattern.full_match, answers)
