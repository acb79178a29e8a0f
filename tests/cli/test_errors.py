"""Whose mistake it is: one line and status 2 for the user's, a traceback and status 1 for a bug, 130 for Ctrl-C."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import recipes.list
from llm_modules.schedules import WarmupCosine
from recipes.__main__ import main
from recipes.errors import UserError, nearest, user_message


def caught(action: Callable[[], object]) -> BaseException:
    try:
        action()
    except BaseException as error:  # noqa: BLE001
        return error
    raise AssertionError("nothing was raised")


def raise_here(error: BaseException) -> None:
    raise error


def test_a_value_error_of_ours_is_the_users() -> None:
    import torch

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    error = caught(lambda: WarmupCosine(optimizer, warmup=-1))
    assert type(error) is ValueError
    assert user_message(error) == str(error)


def test_a_value_error_of_the_trainer_is_the_users() -> None:
    error = caught(lambda: Trainer(barebones=True, log_every_n_steps=3, logger=False))
    assert "barebones" in (user_message(error) or "")


def test_a_full_disk_is_no_bug_of_ours() -> None:
    error = caught(lambda: raise_here(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a/file")))
    assert user_message(error) == "/a/file: No space left on device"
    error = caught(lambda: raise_here(OSError(errno.EROFS, os.strerror(errno.EROFS))))
    assert user_message(error) == "Read-only file system"


@pytest.mark.parametrize(
    "error",
    [
        ValueError("in a user's own code, or in a library"),
        KeyError("x"),
        OSError("x"),
        RuntimeError("x"),
        AssertionError("x"),
    ],
)
def test_others_are_bugs(error: Exception) -> None:
    assert user_message(caught(lambda: raise_here(error))) is None


def test_a_value_error_that_was_never_raised() -> None:
    assert user_message(ValueError("x")) is None


def test_messages_are_one_line_each() -> None:
    assert user_message(UserError("a\n\nb\n")) == "a\nb"
    assert user_message(MisconfigurationException("x\n   y")) == "x y"


def test_nearest() -> None:
    assert nearest("tokeniser", ["tokenizer", "trainer"]) == " (did you mean `tokenizer`?)"
    assert nearest("zzz", ["tokenizer"]) == ""


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (UserError("one\ntwo"), 2, "recipes: one\nrecipes: two\n"),
        (KeyboardInterrupt(), 130, "recipes: interrupted\n"),
        (SystemExit(3), 3, ""),
        (SystemExit(None), 0, ""),
        (SystemExit("said"), 1, "said\n"),
    ],
)
def test_status(
    error: BaseException,
    status: int,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(recipes.list, "run", lambda args: raise_here(error))
    assert main(["list"]) == status
    assert capsys.readouterr().err == text


def test_a_bug(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(recipes.list, "run", lambda args: raise_here(KeyError("whose?")))
    assert main(["list"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_debug_by_the_environment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(recipes.list, "run", lambda args: raise_here(UserError("mine")))
    monkeypatch.setenv("RECIPES_DEBUG", "1")
    assert main(["list"]) == 2
    text = capsys.readouterr().err
    assert "Traceback" in text
    assert text.endswith("recipes: mine\n")


def test_a_reader_that_stops_reading(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [sys.executable, "-m", "recipes", "list", "--parts"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    os.close(writer)
    assert result.stderr == ""
    assert result.returncode == 0
