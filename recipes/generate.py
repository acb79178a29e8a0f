"""`recipes generate`: talk to a model, answer one prompt, or answer a file of prompts."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.errors import UserError

if TYPE_CHECKING:
    from llm_modules.generation import Generator, Prompt

EPILOG = """examples:
  recipes generate -m runs/sft/quickstart/0                      talk (Ctrl-C stops an answer, /help lists commands)
  recipes generate -m FOLDER --prompt "What is a list?"          one answer on standard output
  recipes generate -m FOLDER --file in.jsonl --out out.jsonl     all rows; the same command goes on where it stopped
  recipes generate -m FOLDER --file in.jsonl --out out.jsonl --strategy sample --samples 8      for `recipes score`
  recipes generate -m FOLDER --file in.jsonl --out out.jsonl --preprompt safety.txt      for context distillation
  recipes generate -m FOLDER -c generate/sample --temperature 0.5
  recipes generate -m BASE --adapter terse=runs/a --adapter kind=runs/b --use kind      two adapters in one base"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags; the settings of the `Generator` are read off its docstring."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("-m", "--model", required=True, metavar="FOLDER", help="model folder, run folder or hub id")
    parser.add_argument(
        "-c",
        "--config",
        action="append",
        default=[],
        metavar="NAME",
        help="settings from YAML, such as generate/sample",
    )
    what = parser.add_argument_group("what to answer (nothing: talk)")
    what.add_argument("--prompt", metavar="TEXT", help="answer this, on standard output")
    what.add_argument(
        "--file",
        metavar="JSONL",
        help="answer each row: its `prompt` (text or messages) or `messages`, under its `system` message, with its "
        "`tools`",
    )
    what.add_argument("--out", metavar="JSONL", help="where the answers to --file go; rows that are there are kept")
    what.add_argument("--column", metavar="NAME", help="the column of --file that holds the prompt")
    what.add_argument("--samples", type=int, default=1, metavar="N", help="answers to each row of --file (default: 1)")
    what.add_argument("--overwrite", action="store_true", help="begin --out anew")
    what.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")
    what.add_argument(
        "--system", metavar="TEXT", help="system message that stands before each conversation, and in --out"
    )
    what.add_argument(
        "--preprompt",
        metavar="TEXT",
        help="as --system, also above a row's own system message; a .txt file is read. The rows of --out are without "
        "it: what is trained on them learns to answer as if it were there (context distillation)",
    )
    several = parser.add_argument_group(
        "several adapters in one base (-m: the base, or the adapter `default` with its base)"
    )
    several.add_argument(
        "--adapter", action="append", default=[], metavar="NAME=FOLDER", help="an adapter's folder or run, and its name"
    )
    several.add_argument("--use", metavar="NAME", help="the one that answers (default: the first; /adapter changes it)")
    where = parser.add_argument_group("how the model is loaded")
    where.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    where.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the weights; auto: as they are stored",
    )
    _add_settings(parser.add_argument_group("settings (they go over those of -c)"))


def _add_settings(group: argparse._ArgumentGroup) -> None:
    import docstring_parser

    from llm_modules.generation import Generator

    described = {item.arg_name: item.description for item in docstring_parser.parse(Generator.__doc__ or "").params}
    hints = typing.get_type_hints(Generator)
    for item in dataclasses.fields(Generator):
        text = " ".join((described[item.name] or "").split()).replace("%", "%%")
        flags = sorted({f"--{item.name}", f"--{item.name.replace('_', '-')}"}, reverse=True)
        if item.name == "stop":
            text = f"{text} (give it several times for several)"
            group.add_argument(*flags, action="append", metavar="TEXT", help=text, default=None)
        elif hints[item.name] is bool:
            group.add_argument(*flags, action="store_true", help=text, default=None)
        else:
            choices = typing.get_args(hints[item.name]) or None
            kind = str if choices else hints[item.name]
            group.add_argument(
                *flags,
                type=kind,
                choices=choices,
                metavar=None if choices else kind.__name__.upper(),
                help=f"{text} (default: {item.default})",
            )


def run(args: argparse.Namespace) -> int:
    """Runs the verb; returns the exit status."""
    generator = make_generator(args)
    _check(args)
    if args.samples > 1 and generator.strategy != "sample":
        raise UserError(
            f"--samples {args.samples}: all the same under strategy {generator.strategy!r}; set --strategy sample"
        )
    from recipes.open_model import find_adapters, find_model, open_model

    source = find_model(args.model)
    adapters = find_adapters(source, args.adapter, args.use)
    if args.file:
        from recipes.generate_file import FileJob

        job = FileJob(Path(args.file), Path(args.out), args.column, args.overwrite, args.samples, args.system)
        job.read_prompts()
        job.check_rows([source, *adapters.values()][: 1 + bool(adapters)], generator, vars(args))
        if not job.missing:
            job.finish()
            return 0
    model, tokenizer = open_model(source, args.dtype, args.device, adapters)
    chat = bool(tokenizer.chat_template) and not args.raw
    for flag in ("system", "preprompt"):
        if getattr(args, flag) and not chat:
            raise UserError(f"--{flag}: needs a chat template, which this tokenizer has not (or --raw passes over)")
    if args.file:
        job.run(generator, model, tokenizer, chat, args.preprompt)
    elif args.prompt is not None:
        answer(generator, model, tokenizer, as_prompt(args.prompt, chat, args.system))
    else:
        from recipes.chat import Chat

        Chat(generator, model, tokenizer, chat, args.system, list(adapters)).talk()
    return 0


def make_generator(args: argparse.Namespace) -> Generator:
    """The settings of `-c`, and the flags over them.

    Raises:
        UserError, ValueError: one of them is wrong.
    """
    from llm_modules.generation import Generator

    names = [item.name for item in dataclasses.fields(Generator)]
    values: dict[str, Any] = {}
    if args.config:
        from recipes.compose import compose

        values = compose(args.config, allowed=names).values
    values |= {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return Generator(**values)


def _check(args: argparse.Namespace) -> None:
    if args.prompt is not None and args.file:
        raise UserError("--prompt and --file: one or the other")
    if bool(args.file) != bool(args.out):
        raise UserError("--file and --out go together: a file of prompts, and one for their answers")
    if args.preprompt is not None:
        from llm_modules.data.chat import preprompt_text

        if args.system:
            raise UserError("--system and --preprompt: one or the other")
        args.preprompt = preprompt_text(args.preprompt, "--preprompt")
    for flag in ("column", "overwrite", "preprompt"):
        if getattr(args, flag) and not args.file:
            raise UserError(f"--{flag}: goes with --file")
    if args.samples < 1 or (args.samples > 1 and not args.file):
        raise UserError(f"--samples {args.samples}: 1 or more, and goes with --file")


def as_prompt(text: str, chat: bool, system: str | None) -> Prompt:
    """Text as a conversation that begins with it, or as it is."""
    if not chat:
        return text
    return [*system_message(system), {"role": "user", "content": text}]


def system_message(system: str | None) -> list[dict[str, Any]]:
    return [{"role": "system", "content": system}] if system else []


def answer(generator: Generator, model: Any, tokenizer: Any, prompt: Prompt) -> None:
    """One answer on standard output, as it comes."""

    def write(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    completion = generator.stream(model, tokenizer, prompt, write)
    write("\n")
    if completion.truncated:
        print(f"recipes: the first {completion.truncated} tokens of the prompt were cut off", file=sys.stderr)
    if completion.finish_reason == "length":
        print(f"recipes: stopped after max_new_tokens={generator.max_new_tokens}", file=sys.stderr)
    if completion.logprob is not None:
        print(f"recipes: log p = {completion.logprob:.4f} ({len(completion.token_ids)} tokens)", file=sys.stderr)
    if completion.finish_reason == "interrupted":
        raise KeyboardInterrupt
