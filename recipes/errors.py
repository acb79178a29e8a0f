"""Users' mistakes and how they are told apart from bugs of ours."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

OUR_PACKAGES = ("recipes", "llm_modules", "callbacks")
_ROOTS = tuple(Path(__file__).resolve().parent.parent / name for name in OUR_PACKAGES)


class UserError(ValueError):
    """A mistake of the user's; each line of the message is one problem: where, key, value, what is allowed, the fix."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """`` (did you mean `x`?)`` for the choice most like the word, or nothing where none is near."""
    found = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f" (did you mean `{found[0]}`?)" if found else ""


def one_line(message: object) -> str:
    """A message of a library's with its line breaks and indents taken out."""
    return " ".join(str(message).split())


def user_message(error: BaseException) -> str | None:
    """What to tell the user where the error is a mistake of theirs; None where it is a bug (a traceback is due).

    One rule: a ``ValueError`` raised by a line of our own packages is said to a user; so is Lightning's
    ``MisconfigurationException``. Whatever is raised deeper, in a library or in the user's own code, is a bug of
    whoever wrote the line, and shows where it is.
    """
    if isinstance(error, UserError):
        return "\n".join(line for line in str(error).splitlines() if line.strip())
    if isinstance(error, ValueError) and _raised_by_us(error.__traceback__):
        return one_line(error)
    if type(error).__name__ == "MisconfigurationException" and type(error).__module__.startswith("lightning"):
        return one_line(error)
    return None


def _raised_by_us(traceback: TracebackType | None) -> bool:
    if traceback is None:
        return False
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    file = Path(traceback.tb_frame.f_code.co_filename).resolve()
    return any(file.is_relative_to(root) for root in _ROOTS)
