"""The words after `recipes fit` (or validate, test, predict), taken apart; nothing is looked up yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from recipes.errors import UserError, nearest

FLAGS = {
    "-c": ("NAME", "the recipe; given again: an overlay to put on top (a path, or a name below configs/)"),
    "--ckpt_path": ("PATH", "a checkpoint, or `last` or `best` of the newest run"),
    "--run": ("N", "the run that --ckpt_path is about: runs/<recipe>/N"),
    "--job": ("NAME", "a launcher's job: goes on with the run that it began, or begins one; asked to stop, requeues"),
    "--preflight": ("SECONDS", "check the cluster first (recipes check cluster), waiting so long for every process"),
}
SWITCHES = {
    "--dry-run": "build everything, show memory, model and data, and stop before training",
    "--print_config": "print the whole config, with all defaults, and stop",
    "--debug": "show a traceback for every error",
}


@dataclass
class Command:
    """What was asked for.

    Attributes:
        verb: fit, validate, test or predict.
        configs: the recipe and its overlays.
        overrides: dotted keys with their values as YAML text, in order.
        job: the launcher's job, whose run is continued wherever there is one.
        preflight: seconds that the check of the cluster waits; None: no check.
        help: the key that help is asked about; "" for the short help; None where none is asked for.
        words: the command as given.
    """

    verb: str
    words: list[str]
    configs: list[str] = field(default_factory=list)
    overrides: list[tuple[str, str]] = field(default_factory=list)
    ckpt_path: str | None = None
    run: int | None = None
    job: str | None = None
    preflight: int | None = None
    dry_run: bool = False
    print_config: bool = False
    debug: bool = False
    help: str | None = None


def parse_command(verb: str, words: Sequence[str]) -> Command:
    """Takes the words apart.

    Raises:
        UserError: a word is neither a flag nor a flag's value, or a flag has no value.
    """
    command = Command(verb, ["recipes", verb, *words])
    rest = list(words)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        if flag in ("-h", "--help"):
            command.help = rest.pop(0) if rest and not rest[0].startswith("-") else value
        elif "." not in flag and (switch := flag.replace("_", "-").lstrip("-")) in ("dry-run", "print-config", "debug"):
            if equals:
                raise UserError(f"{flag}: a switch, it takes no value")
            setattr(command, switch.replace("-", "_"), True)
        elif not flag.startswith("-"):
            verbs = nearest(f"--{flag}", [*FLAGS, *SWITCHES])
            raise UserError(f"{word}: not a flag{verbs}; a recipe is named by -c, a value is set by --key value")
        else:
            if not equals:
                if not rest or _is_flag(rest[0]):
                    raise UserError(f"{flag}: a value must follow (write {flag}=VALUE where it begins with a dash)")
                value = rest.pop(0)
            _set(command, flag, value)
    return command


def _is_flag(word: str) -> bool:
    return word.startswith("--") or (word.startswith("-") and word[1:2].isalpha() and word != "-inf")


def _set(command: Command, flag: str, value: str) -> None:
    if flag in ("-c", "--config"):
        command.configs.append(value)
    elif flag in ("--ckpt_path", "--ckpt-path"):
        command.ckpt_path = value
    elif flag == "--run":
        if not value.isdigit():
            raise UserError(f"--run {value}: the number of a run is asked for, such as --run 3")
        command.run = int(value)
    elif flag == "--job":
        command.job = value
    elif flag == "--preflight":
        if not value.isdigit() or int(value) < 1:
            raise UserError(f"--preflight {value}: a number of seconds is asked for, such as --preflight 60")
        command.preflight = int(value)
    elif flag.startswith("--"):
        command.overrides.append((flag[2:], value))
    else:
        raise UserError(f"{flag}: no such flag{nearest(flag, [*FLAGS, *SWITCHES])}; see recipes {command.verb} --help")
