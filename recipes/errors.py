"""Users' mistakes and how they are told apart from bugs of ours."""

from __future__ import annotations

import difflib
import errno
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

OUR_PACKAGES = ("recipes", "llm_modules", "callbacks")

_OF_THE_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


class UserError(ValueError):
    """A mistake of the user's; each line of the message is one problem: where, key, value, what is allowed, the fix."""


class RankError(UserError):
    """A mistake that only this rank can see, and that names it: said at once, where others wait for rank 0's word."""


def near(word: str, choices: Iterable[str]) -> str | None:
    """The choice most like the word, if one is."""
    return next(iter(difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)), None)


def nearest(word: str, choices: Iterable[str]) -> str:
    """`` (did you mean `x`?)`` for the choice most like the word, or nothing where none is near."""
    found = near(word, choices)
    return f" (did you mean `{found}`?)" if found else ""


def one_line(message: object) -> str:
    """A message of a library's with its line breaks and indents taken out."""
    return " ".join(str(message).split())


def user_message(error: BaseException) -> str | None:
    """What to tell the user where the error is a mistake of theirs; None where it is a bug (a traceback is due).

    One rule: a ``ValueError`` raised by a line of our own packages is said to a user, and so is one of Lightning's
    (the Trainer's arguments contradict one another, mostly). A disk that is full or read-only, and a folder that may
    not be written, are the machine's, whoever meets them. Whatever is raised deeper, in another library or in the
    user's own code, is a bug of whoever wrote the line, and shows where it is.
    """
    if isinstance(error, UserError):
        return "\n".join(line for line in str(error).splitlines() if line.strip())
    if isinstance(error, ValueError) and raised_in(error.__traceback__, OUR_PACKAGES):
        return one_line(error)
    if type(error) is ValueError and raised_in(error.__traceback__, ("lightning",)):
        return one_line(error)
    if isinstance(error, ModuleNotFoundError) and raised_in(error.__traceback__, ("lightning",)):
        return one_line(error)  # a package that a strategy, precision or logger needs; it says which
    if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
        return one_line(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    if type(error).__name__ == "MisconfigurationException" and type(error).__module__.startswith("lightning"):
        return one_line(error)
    return None


def raised_in(trace: TracebackType | None, packages: tuple[str, ...]) -> bool:
    """Whether the line that raised is one of these packages'."""
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    return str(trace.tb_frame.f_globals.get("__name__", "")).split(".")[0] in packages


def own_place(error: BaseException) -> str | None:
    """``my_loss.py:12, in losses``: the deepest line of the working directory's own files that an error came through;
    None where there is none."""
    here, found = Path.cwd(), None
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = Path(frame.f_code.co_filename)
        ours = str(frame.f_globals.get("__name__", "")).split(".")[0] in OUR_PACKAGES
        if not ours and file.is_relative_to(here) and "site-packages" not in file.parts:
            found = f"{file.relative_to(here)}:{line}, in {frame.f_code.co_name}"
    return found
