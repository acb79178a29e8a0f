"""Answers to a file of prompts, row by row, in a file that a killed job goes on with."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.errors import UserError
from recipes.yaml_tree import display

if TYPE_CHECKING:
    from llm_modules.data.sources import Row
    from llm_modules.generation import Completion, Generator, Prompt

NOT_THE_ANSWER = ("batch_size",)
"""Settings that a job may go on with after they were changed: what is generated does not depend on them."""

NOT_GENERATED = ("row", "prompt", "tools", "reference", "prompt_sha256", "settings_sha256")
"""What a row of the answers has from the input and the job."""

_SAMPLED_BYTES, _SAMPLES = 65536, 64


class FileJob:
    """Reads prompts, appends answers as batches are done, and at the end puts the rows in order.

    A row of the answers holds ``row`` (its number in the input, from 0), ``prompt`` (under the system message, without
    the preprompt), ``tools`` (if the input has them), ``completion``, ``finish_reason``, ``prompt_tokens``,
    ``completion_tokens``, ``truncated`` (tokens of the prompt that were cut off), ``logprob`` (if asked for),
    ``reference`` (the answer that the input has), and two digests that tell whether a row still belongs to this job:
    ``prompt_sha256`` (of the input's prompt and tools) and ``settings_sha256`` (settings and model).

    The batches are cut from the whole input, whatever is done already, so a job that was killed and started again
    leaves the same file as one that was not.

    Args:
        source: JSON lines.
        out: JSON lines; kept where it has rows of this job.
        column: the column that holds the prompt (default: ``prompt`` or ``messages``).
        overwrite: begin ``out`` anew.
        samples: answers to each row, which stand one after another: then ``row`` counts answers.
        system: a system message for prompts without one.
    """

    def __init__(
        self,
        source: Path,
        out: Path,
        column: str | None,
        overwrite: bool,
        samples: int = 1,
        system: str | None = None,
    ) -> None:
        self.source = source
        self.out = out
        self.column = column
        self.overwrite = overwrite
        self.samples = samples
        self.system = system
        self.prompts: list[Prompt] = []
        self.references: list[str | None] = []
        self.tools: list[list[Any] | None] = []
        self.places: list[str] = []
        self.done: set[int] = set()
        self.settings = ""
        self._whole = 0  # bytes of ``out`` that are whole rows

    @property
    def missing(self) -> int:
        return len(self.prompts) - len(self.done)

    # --- before anything is loaded or written ---

    def read_prompts(self) -> None:
        """All prompts of the source.

        Raises:
            ValueError: no such file, no JSON, no prompt in a row; with file and line.
        """
        from llm_modules.data.chat import tools_of
        from llm_modules.data.readers import read_file

        if not self.source.is_file():
            raise UserError(f"--file {self.source}: no such file")
        if self.out.exists() and self.out.samefile(self.source):
            raise UserError(f"--out {self.out}: the same file as --file")
        for row in read_file(self.source, "jsonl", None):
            place = f"{display(self.source)}:{row.number}"
            prompt, reference = self._prompt(row, place)
            self.prompts += [prompt] * self.samples
            self.references += [reference] * self.samples
            self.tools += [tools_of(row)] * self.samples
            self.places += [place] * self.samples
        if not self.prompts:
            raise UserError(f"--file {self.source}: the file is empty")

    def _prompt(self, row: Row, place: str) -> tuple[Prompt, str | None]:
        from llm_modules.data.chat import with_system

        columns = row.columns
        names = [self.column] if self.column else ["prompt", "messages"]
        name = next((name for name in names if name in columns), None)
        if name is None:
            there = ", ".join(map(str, columns)) or "none"
            raise UserError(f"{place}: no column {' or '.join(names)}; there are: {there}; name one with --column")
        value = columns[name]
        row = row._replace(columns={other: said for other, said in columns.items() if other != name})
        if isinstance(value, str):
            talk = with_system(row, [{"role": "user", "content": value}])
            return value if len(talk) == 1 else talk, None
        good = isinstance(value, list) and value and all(isinstance(m, dict) and "role" in m for m in value)
        if not good:
            raise UserError(f"{place}: column {name} must hold text, or messages with role and content")
        if value[-1]["role"] != "assistant":
            return with_system(row, value), None
        if len(value) == 1:
            raise UserError(f"{place}: the conversation starts with the assistant; there is nothing to answer")
        return with_system(row, value[:-1]), str(value[-1].get("content"))

    def check_rows(self, models: list[Path | str], generator: Generator, args: dict[str, Any]) -> None:
        """Finds the rows that ``out`` already has; nothing is written yet.

        Args:
            models: folders of the model, and of the adapter in it that answers, if there are several.

        Raises:
            UserError: ``out`` holds something else than rows of this job.
        """
        settings = {k: v for k, v in vars(generator).items() if k not in NOT_THE_ANSWER}
        settings |= {name: args[name] for name in ("raw", "system", "dtype")}
        settings |= {} if args["preprompt"] is None else {"preprompt": args["preprompt"]}
        self.settings = digest([settings, *map(fingerprint, models)])
        if self.overwrite or not self.out.exists():
            return
        for number, line in enumerate(self._whole_lines(), 1):
            place = f"{display(self.out)}:{number}"
            try:
                row = json.loads(line)
                place_of, prompt, settings_of = row["row"], row["prompt_sha256"], row["settings_sha256"]
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(
                    f"{place}: not a row of `recipes generate`; name another --out, or --overwrite"
                ) from error
            if settings_of != self.settings:
                raise UserError(f"{place}: made by other settings or another model; name another --out, or --overwrite")
            if place_of not in range(len(self.prompts)) or prompt != self._digest(place_of):
                raise UserError(
                    f"{place}: answers another prompt than row {place_of} of this job on {display(self.source)}; name "
                    f"another --out, or --overwrite"
                )
            self.done.add(place_of)

    def _whole_lines(self) -> Iterator[bytes]:
        """The lines that were written to their end; a process that is killed leaves half a line, the last."""
        self._whole = 0
        with self.out.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._whole += len(line)
                yield line

    # --- the work ---

    def run(
        self,
        generator: Generator,
        model: Any,
        tokenizer: Any,
        chat: bool,
        preprompt: str | None = None,
    ) -> None:
        """Generates what is missing."""
        from llm_modules.data.chat import with_preprompt
        from llm_modules.data.masks import shows_tools
        from recipes.generate import as_prompt

        place = next((place for place, tools in zip(self.places, self.tools, strict=True) if tools), None)
        if place is not None and not (chat and shows_tools(tokenizer)):
            left_out = "the chat template leaves them out" if chat else "they need a chat template (and no --raw)"
            raise UserError(f"{place}: has tools, and {left_out}: the model would not see them")
        prompts: list[Prompt] = []
        for number in range(len(self.prompts)):
            prompt = self._asked(number)
            if not chat and not isinstance(prompt, str):
                raise UserError(
                    f"row {number // self.samples} of {display(self.source)}: messages, a system message too, need a "
                    "chat template (and no --raw)"
                )
            prompts.append(as_prompt(prompt, chat, None) if isinstance(prompt, str) else prompt)
        if preprompt is not None:
            talks = [prompt for prompt in prompts if not isinstance(prompt, str)]
            assert len(talks) == len(prompts)  # a preprompt without a chat template was refused before
            prompts = [with_preprompt(talk, preprompt) for talk in talks]
        batches = generator.iterate(model, tokenizer, prompts, skip=frozenset(self.done), tools=self.tools)
        started = time.monotonic()
        first = next(batches)  # whatever is wrong with a prompt is said before the file is touched
        self.out.parent.mkdir(parents=True, exist_ok=True)
        with (
            self.out.open("wb" if self.overwrite else "ab") as file,
            Progress(len(prompts), len(self.done), started) as progress,
        ):
            file.truncate(self._whole)
            for batch in chain([first], batches):
                new = {place: c for place, c in batch.items() if place not in self.done}
                file.write(b"".join(self._line(place, _answer(completion)) for place, completion in new.items()))
                file.flush()
                os.fsync(file.fileno())
                self.done.update(new)
                progress.add(len(new), sum(len(completion.token_ids) for completion in new.values()))
        self.finish()

    def _asked(self, place: int) -> Prompt:
        """The prompt under the system message, if there is one and it has none."""
        from recipes.generate import as_prompt, system_message

        prompt = self.prompts[place]
        if self.system and isinstance(prompt, str):
            return as_prompt(prompt, True, self.system)
        if isinstance(prompt, str) or prompt[0]["role"] == "system":
            return prompt
        return [*system_message(self.system), *prompt]

    def _digest(self, place: int) -> str:
        prompt, tools = self.prompts[place], self.tools[place]
        return digest(prompt if tools is None else [prompt, tools])

    def _line(self, place: int, answer: dict[str, Any]) -> bytes:
        row = {
            "row": place,
            "prompt": self._asked(place),
            **({} if self.tools[place] is None else {"tools": self.tools[place]}),
            **answer,
            **({} if self.references[place] is None else {"reference": self.references[place]}),
            "prompt_sha256": self._digest(place),
            "settings_sha256": self.settings,
        }
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"

    def finish(self) -> None:
        """Puts the rows in the order of the input, with the references that it has now, in one step."""
        lines = {}
        for row in map(json.loads, self._whole_lines()):
            answer = {name: value for name, value in row.items() if name not in NOT_GENERATED}
            lines[row["row"]] = self._line(row["row"], answer)
        temporary = self.out.with_name(f".{self.out.name}-partial")
        with temporary.open("wb") as file:
            file.writelines(lines[place] for place in sorted(lines))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.out)
        print(f"{display(self.out.absolute())}: {len(lines)} rows", file=sys.stderr)


def _answer(completion: Completion) -> dict[str, Any]:
    return {
        "completion": completion.text,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": len(completion.token_ids),
        "truncated": completion.truncated,
        **({} if completion.logprob is None else {"logprob": completion.logprob}),
    }


def digest(value: Any) -> str:
    """Of a JSON value; 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def fingerprint(model: Path | str) -> list[Any]:
    """Names, sizes and contents of a model folder's files; of large ones 64 samples, as training moves every weight."""
    if isinstance(model, str):
        return [model]
    patterns = ("*.json", "*.jinja", "*.model", "*.txt", "*.safetensors")
    found = []
    for path in sorted({path for pattern in patterns for path in model.glob(pattern)}):
        size, content = path.stat().st_size, hashlib.sha256()
        with path.open("rb") as file:
            for start in range(0, size, max(_SAMPLED_BYTES, size // _SAMPLES)):
                file.seek(start)
                content.update(file.read(_SAMPLED_BYTES))
        found.append([path.name, size, content.hexdigest()])
    return found


class Progress:
    """Rows, tokens per second and the time that is left: a bar on a terminal, lines elsewhere; on standard error.

    Args:
        rows: of the whole job.
        done: those that were there before.
        start: when the first batch was begun (``time.monotonic``).
        every: seconds between lines.
    """

    def __init__(self, rows: int, done: int, start: float, every: float = 10.0) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        console = Console(stderr=True)
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
        self.bar = Bar(*columns, console=console) if console.is_terminal else None
        self.task = self.bar.add_task("rows", total=rows, completed=done, rate="") if self.bar else None
        self.rows, self.done, self.before, self.tokens, self.every = rows, done, done, 0, every
        self.start = self.said = start

    def __enter__(self) -> Progress:
        if self.bar is not None:
            self.bar.start()
        elif self.done:
            print(f"{self.done} of {self.rows} rows are there already", file=sys.stderr)
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def add(self, rows: int, tokens: int) -> None:
        self.done += rows
        self.tokens += tokens
        now = time.monotonic()
        seconds = max(now - self.start, 1e-9)
        rate = f"{self.tokens / seconds:,.0f} tokens/s"
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=self.done, rate=rate)
        elif now - self.said >= self.every or self.done == self.rows:
            self.said = now
            left = seconds / (self.done - self.before) * (self.rows - self.done)
            print(f"{self.done}/{self.rows} rows, {rate}, {left:.0f} s left", file=sys.stderr, flush=True)
