"""The command `recipes`: finds the verb, imports its file only, and turns what happens into an exit status."""

from __future__ import annotations

import argparse
import ast
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn

import recipes
from recipes.command_line import parse_command
from recipes.errors import RankError, UserError, nearest, one_line, own_place, user_message
from recipes.processor import prepare_processor
from recipes.ranks import own_rank, word_of_this_rank
from recipes.trainer_verbs import VERBS as TRAINER_VERBS

OK, BUG, MISTAKE, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the words after `recipes`; default: those of this process.

    Returns:
        0; 1 for a bug (a traceback was printed); 2 for a mistake of the user's (a line was printed); 130 for Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    prepare_processor()
    # Last, so that a user's my_loss.py is found and a folder of theirs named `datasets` hides no library.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        status = _dispatch(words)
        sys.stdout.flush()  # here, where a reader that is gone is no error, and not when the interpreter ends
        return status
    except KeyboardInterrupt:
        if own_rank()[0] == 0:
            print("recipes: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `recipes list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except SystemExit as stop:
        return _status(stop.code)
    except Exception as error:  # noqa: BLE001
        message = user_message(error)
        debug = "--debug" in words or os.environ.get("RECIPES_DEBUG", "0") not in ("", "0")
        if message is None or debug:
            traceback.print_exception(error)
        if message is None:
            if (place := own_place(error)) is not None:
                print(f"recipes: {place}: {type(error).__name__}: {one_line(error)}", file=sys.stderr)
            return BUG
        sys.stderr.flush()
        who = "" if isinstance(error, RankError) else word_of_this_rank()
        for line in message.splitlines() if who is not None else ():
            print(f"recipes: {who}{line}", file=sys.stderr)
        return MISTAKE


def _dispatch(words: list[str]) -> int:
    verb, rest = (words[0], words[1:]) if words else ("--help", [])
    if verb in ("-h", "--help", "help"):
        print(help_text())
        return OK
    if verb in ("-V", "--version"):
        print(f"litrecipes {recipes.__version__}")
        return OK
    if verb in TRAINER_VERBS:
        from recipes.trainer_verbs import run

        return run(verb, rest)
    files = verb_files()
    if verb not in files:
        raise UserError(f"{verb}: no such verb{nearest(verb, [*TRAINER_VERBS, *files])}; `recipes --help` lists them")
    module = import_module(f"recipes.{verb}")
    parser = _OneLineParser(prog=f"recipes {verb}", description=_summary(files[verb]), allow_abbrev=False)
    module.add_arguments(parser)
    arguments, unknown = parser.parse_known_args(rest)
    if getattr(module, "TAKES_OVERRIDES", False):
        arguments.overrides = parse_command(verb, unknown).overrides
    elif unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        raise UserError(f"{unknown[0]}: not understood{nearest(unknown[0], known)}; see recipes {verb} --help")
    run_verb: Callable[[argparse.Namespace], int] = module.run
    return run_verb(arguments)


class _OneLineParser(argparse.ArgumentParser):
    """argparse with errors that are one line, and raised."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _status(code: object) -> int:
    if code is None:
        return OK
    if isinstance(code, int):
        return code
    print(code, file=sys.stderr)
    return BUG


def verb_files() -> dict[str, Path]:
    """Our own verbs: the files of this folder that define `add_arguments` (read, not imported)."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return {path.stem: path for path in files if "\ndef add_arguments(" in path.read_text(encoding="utf-8")}


def _summary(path: Path) -> str:
    """A verb in one line: its file's first line, without the verb's name."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    line = docstring.partition("\n")[0]
    return line.partition(": ")[2] or line


def help_text() -> str:
    """`recipes --help`."""
    verbs = dict(TRAINER_VERBS)
    for verb, path in verb_files().items():
        verbs[verb] = _summary(path).rstrip(".")
    lines = "\n".join(f"  {verb:<11} {text}" for verb, text in verbs.items())
    return f"""usage: recipes VERB [-c NAME [-c OVERLAY ...]] [--dotted.key value ...]

Recipes that carry a language model through its whole life.

verbs:
{lines}

examples:
  recipes list                                        what there is
  recipes show pretrain/quickstart                    a recipe, and what it resolves to
  recipes fit -c pretrain/quickstart                  train it
  recipes fit -c pretrain/quickstart --ckpt_path last continue where it was stopped
  recipes fit -c sft/dolly -c precision/bf16-mixed --trainer.max_steps 100

`recipes VERB --help` tells more of a verb; `recipes --version` prints the version;
`eval "$(recipes completion bash)"` completes verbs, recipes and flags (also zsh, fish)."""


if __name__ == "__main__":
    sys.exit(main())
