"""Talking to a model on a terminal; with a model that knows no chat format, each line is continued."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from recipes.generate import as_prompt, system_message

if TYPE_CHECKING:
    from llm_modules.generation import Completion, Generator, Prompt

YOU, MODEL = "you> ", "model> "
COMMANDS = {
    "/help": "show these commands",
    "/reset": "forget the conversation (not the system message)",
    "/system TEXT": "set the system message and forget the conversation; without TEXT: show it",
    "/history": "show the conversation",
    "/adapter NAME": "let another adapter answer from here on; without NAME: show them",
    "/quit": "end (also Ctrl-D)",
}


class Chat:
    """One conversation, which lasts until it is reset.

    Args:
        chat: whether there is a chat template to use.
        system: the system message.
        adapters: names of those in the model that may take turns, the one that answers first.
    """

    def __init__(
        self,
        generator: Generator,
        model: Any,
        tokenizer: Any,
        chat: bool,
        system: str | None,
        adapters: list[str] | None = None,
    ) -> None:
        self.adapters = adapters or []
        self.generator = generator
        self.model = model
        self.tokenizer = tokenizer
        self.chat = chat
        self.system = system
        self.messages: list[dict[str, Any]] = []
        self.answers = 0

    def talk(self) -> None:
        """Reads and answers until the end of the input."""
        if sys.stdin.isatty():
            import readline  # noqa: F401 - input() then edits lines and remembers them
        kind = "a conversation" if self.chat else "no chat template: each line is continued, nothing is remembered"
        parameters = sum(p.numel() for p in self.model.parameters())
        settings = f"{self.generator.strategy}, at most {self.generator.max_new_tokens} new tokens"
        print(f"{parameters:,} parameters; {settings}; {kind}. /help lists commands.")
        while True:
            try:
                line = input(YOU)
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("\n(/quit or Ctrl-D ends)")
                continue
            if line.startswith("/"):
                if line.split()[0] in ("/quit", "/exit"):
                    return
                self._command(line.strip())
            elif line.strip():
                self._answer(line)

    def _command(self, line: str) -> None:
        word, _, text = line.partition(" ")
        if word == "/help":
            print("\n".join(f"  {name:<16}{what}" for name, what in COMMANDS.items()))
        elif word == "/reset":
            self.messages = []
            print("(forgotten)")
        elif word == "/system" and not self.chat:
            print("(without a chat template there is no system message)")
        elif word == "/system":
            if text:
                self.system, self.messages = text.strip(), []
            print(f"(system: {self.system or 'none'})")
        elif word == "/adapter" and text.strip() in self.adapters:
            self.model.set_adapter(text.strip())
            print(f"(adapter: {text.strip()})")
        elif word == "/adapter":
            print(f"(there are: {', '.join(self.adapters) or 'none; --adapter NAME=FOLDER gives them'})")
        elif word == "/history":
            for message in [*system_message(self.system), *self.messages]:
                print(f"  {message['role']}: {message['content']}")
        else:
            print(f"({word}: no such command; /help lists them)")

    def _answer(self, line: str) -> None:
        from llm_modules.generation import PromptTooLong

        self.messages.append({"role": "user", "content": line})
        while True:
            prompt = [*system_message(self.system), *self.messages] if self.chat else as_prompt(line, False, None)
            try:
                completion = self._stream(prompt)
                break
            except PromptTooLong as error:
                if not self.chat or len(self.messages) < 3:
                    print(f"({str(error).removeprefix('prompt 0: ')})")
                    self.messages.pop()
                    return
                self.messages = self.messages[2:]
                print("(the conversation grew too long: its first question and answer are forgotten)")
            except ValueError as error:  # a template may refuse a message
                print(f"({str(error).removeprefix('prompt 0: ')})")
                self.messages.pop()
                return
        self.messages.append({"role": "assistant", "content": completion.text})
        notes = {"length": f" [stopped after {self.generator.max_new_tokens} tokens]", "interrupted": " [interrupted]"}
        print(notes.get(completion.finish_reason, ""))

    def _stream(self, prompt: Prompt) -> Completion:
        started = False

        def write(piece: str) -> None:
            nonlocal started
            sys.stdout.write(piece if started else f"{MODEL}{piece}")
            sys.stdout.flush()
            started = True

        # Each answer has a number of its own, so that a question asked again is sampled anew.
        completion = self.generator.stream(self.model, self.tokenizer, prompt, write, row=self.answers)
        self.answers += 1
        if not started:
            write("")
        return completion
