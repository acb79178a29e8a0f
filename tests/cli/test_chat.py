"""`recipes generate` as a conversation: on a terminal, from a pipe, with a model that knows no chat format."""

from __future__ import annotations

import os
import re
import signal
import sys
import time

import pytest
import test_generate
from test_generate import save_model, user

from llm_modules.generation import Generator
from recipes.__main__ import main

folder, opened = test_generate.folder, test_generate.opened


class Terminal:
    """A process that believes it talks to a person."""

    def __init__(self, *words):
        import pty

        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"}
        self.pid, self.handle = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's job in the background ignores it
            os.execve(sys.executable, [sys.executable, "-m", "recipes", "generate", *words], environment)
        self.text = ""

    def until(self, pattern, seconds=90.0):
        import select

        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self.text)):
            ready, _, _ = select.select([self.handle], [], [], max(0, end - time.monotonic()))
            assert ready, f"no {pattern!r} in {self.text!r}"
            try:
                self.text += os.read(self.handle, 65536).decode(errors="replace")
            except OSError:  # the other side is gone
                assert re.search(pattern, self.text), f"ended without {pattern!r}: {self.text!r}"
        seen, self.text = self.text[: match.end()], self.text[match.end() :]
        return seen

    def say(self, line):
        os.write(self.handle, (line + "\n").encode())

    def interrupt(self):
        os.write(self.handle, b"\x03")

    def interrupt_prompt(self, pattern, seconds=90.0):
        """As a person would: a key, where nothing happens. (Python's input() with readline sees the signal only once it
        waits for a key, which is a moment after the prompt is there; one that comes before waits for the next key, and
        so do those that follow it.)"""
        end = time.monotonic() + seconds
        while True:
            self.interrupt()
            try:
                return self.until(pattern, 2.0)
            except AssertionError:
                if time.monotonic() > end:
                    raise
                os.write(self.handle, b" ")

    def ended(self):
        import contextlib

        with contextlib.suppress(OSError):
            while os.read(self.handle, 65536):
                pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.mark.slow
def test_a_conversation_on_a_terminal(tmp_path):
    folder = save_model(tmp_path / "model", positions=4096)
    terminal = Terminal("-m", folder, "--max_new_tokens", "3000", "--system", "be kind")
    terminal.until(r"parameters; greedy, at most 3000 new tokens; a conversation\. /help lists commands\.")
    terminal.until("you> ")
    terminal.say("hello")
    terminal.until(r"model> .{20}")  # it streams
    terminal.interrupt()  # ends the answer, not the program
    terminal.until(r"\[interrupted\]")
    terminal.until("you> ")
    terminal.say("/history")
    seen = terminal.until("you> ")
    assert "system: be kind" in seen
    assert "user: hello" in seen
    assert "assistant: " in seen
    terminal.say("/system be brief")
    terminal.until(r"\(system: be brief\)")
    terminal.say("/history")
    assert "hello" not in terminal.until(r"/history\r\n(?s:.*)you> ")
    terminal.interrupt_prompt(r"/quit or Ctrl-D ends")
    terminal.say("/nonsense")
    terminal.until("/nonsense: no such command")
    terminal.say("/quit")
    assert terminal.ended() == 0


def test_a_conversation_without_a_terminal(folder, opened, monkeypatch, capsys):
    """The second answer knows of the first; what no longer fits is forgotten and said."""
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n/reset\none\n"))
    assert main(["generate", "-m", folder, "--max_new_tokens", "20"]) == 0
    out = capsys.readouterr().out
    generator = Generator(max_new_tokens=20)
    (first,) = generator.generate(*opened, [user("one")])
    conversation = [*user("one"), {"role": "assistant", "content": first.text}, *user("two")]
    (second,) = generator.generate(*opened, [conversation])
    assert out.count(f"model> {first.text}") == 2
    assert f"model> {second.text}" in out

    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{'a' * 90}\n{'b' * 90}\n{'c' * 300}\nd\n"))
    assert main(["generate", "-m", folder, "--max_new_tokens", "20"]) == 0
    out = capsys.readouterr().out
    assert "its first question and answer are forgotten" in out
    assert "exceed the model's 256 positions" in out
    assert out.count("model> ") == 3


def test_lines_are_continued_where_there_is_no_chat_template(tmp_path, monkeypatch, capsys):
    import io

    folder = save_model(tmp_path / "plain", template=None)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n/system x\n"))
    assert main(["generate", "-m", folder, "--max_new_tokens", "5"]) == 0
    out = capsys.readouterr().out
    assert "no chat template: each line is continued" in out
    assert "without a chat template there is no system message" in out
