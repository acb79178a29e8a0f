"""recipes completion: a script for bash, zsh or fish that completes verbs, recipe names, flags and keys."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable
from importlib import import_module

from recipes.command_line import FLAGS, SWITCHES
from recipes.compose import TOP_LEVEL, compose
from recipes.config_names import all_recipes, part_names
from recipes.errors import UserError

_BASH = """_recipes_complete() {
    local IFS=$'\\n'
    COMPREPLY=($(recipes completion words -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == */ ]] && compopt -o nospace
}
complete -o default -F _recipes_complete recipes
"""
_ZSH = """#compdef recipes
_recipes() {
    local -a found
    found=(${(f)"$(recipes completion words -- "${(@)words[2,CURRENT]}" 2>/dev/null)"})
    if (( ${#found} )); then compadd -a found; else _files; fi
}
compdef _recipes recipes
"""
_FISH = """function __recipes_complete
    set -l words (commandline -opc) (commandline -ct)
    recipes completion words -- $words[2..-1] 2>/dev/null
end
complete -c recipes -a '(__recipes_complete)'
"""
SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=[*SCRIPTS, "words"], help='for bash: eval "$(recipes completion bash)"')
    parser.add_argument("words", nargs="*", help="(for `words`) what has been typed; the last word is completed")


def run(args: argparse.Namespace) -> int:
    if args.shell == "words":
        print(*candidates(args.words or [""]), sep="\n")
    else:
        print(SCRIPTS[args.shell], end="")
    return 0


def candidates(words: list[str]) -> list[str]:
    """What the last of the words, those typed after `recipes`, may become."""
    *before, last = words
    return sorted({word for word in _all_candidates(before, last) if word.startswith(last)})


def _all_candidates(before: list[str], last: str) -> Iterable[str]:
    from recipes.__main__ import verb_files
    from recipes.trainer_verbs import VERBS

    if not before:
        return [*VERBS, *verb_files(), "--help", "--version"]
    verb, previous = before[0], before[-1]
    if previous in ("-c", "--config"):
        return [*(recipe.name for recipe in all_recipes()), *part_names()]
    if verb == "completion":
        return list(SCRIPTS)
    if verb in VERBS:
        if previous == "--ckpt_path":
            return ["last", "best"]
        return [*FLAGS, *SWITCHES, "--help", *_keys(before)] if last.startswith("-") or not last else []
    if verb not in verb_files():
        return []
    if last.startswith("-"):
        return [*_flags_of(verb), *(_keys(["-c", *before[1:2]]) if verb == "show" else [])]
    if verb == "show" and len(before) == 1:
        return [recipe.name for recipe in all_recipes()]
    return sorted({recipe.stage for recipe in all_recipes()}) if verb == "list" else []


def _keys(before: list[str]) -> list[str]:
    """The keys that the recipe on the line sets, as flags; the top-level ones where none is named yet."""
    names = [word for flag, word in itertools.pairwise(before) if flag in ("-c", "--config")]
    try:
        composed = compose(names) if names else None
    except UserError:
        composed = None  # a name half typed: there is nothing to complete from
    if composed is None:
        return [f"--{key}" for key in TOP_LEVEL]
    keys = (key for key, node in composed.root.walk() if key and not isinstance(node.value, dict | list))
    return [
        f"--{'.'.join(str(p) for p in key if p != 'init_args')}"
        for key in keys
        if not any(isinstance(p, int) for p in key)
    ]


def _flags_of(verb: str) -> list[str]:
    parser = argparse.ArgumentParser(add_help=True)
    import_module(f"recipes.{verb}").add_arguments(parser)
    parsers, options = [parser], []
    for one in parsers:  # those of its own verbs (launch slurm, check cluster) are added on the way
        for action in one._actions:
            options += [option for option in action.option_strings if option.startswith("--")]
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
    return options
