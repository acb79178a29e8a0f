"""fit, validate, test and predict: from the command's words to Lightning's Trainer, nothing written before all is good."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.checks import check_values
from recipes.command_line import Command, parse_command
from recipes.compose import Composed, compose
from recipes.errors import UserError
from recipes.run_folder import (
    FOLDER_VARIABLE,
    RunFolder,
    checkpoint_of,
    find_run,
    new_run,
    write_config,
    write_environment,
)

if TYPE_CHECKING:
    from recipes.cli import RecipeCLI

VERBS = {
    "fit": "train a recipe; resume with --ckpt_path last",
    "validate": "measure a recipe's model on its validation data",
    "test": "measure a recipe's model on its test data",
    "predict": "generate answers to a recipe's prompts, as JSONL",
}


def run(verb: str, words: Sequence[str]) -> int:
    """Runs one of the verbs; returns the exit status."""
    command = parse_command(verb, words)
    if command.debug:
        os.environ["RECIPES_DEBUG"] = "1"
    if command.help is not None:
        from recipes.fit_help import show_help

        return show_help(command)
    if not command.configs:
        raise UserError(f"-c: a recipe must be named, such as recipes {verb} -c pretrain/quickstart; see recipes list")
    composed = compose(command.configs, command.overrides)
    check_values(composed)
    resumed, checkpoint = find_checkpoint(command, composed)

    from recipes.cli import RecipeCLI

    cli = RecipeCLI(composed)
    if command.print_config:
        print(cli.config_text(), end="")
        return 0
    cli.instantiate()
    if verb == "fit":
        cli.check_before_training()
        if command.dry_run:
            return 0
    return _run(command, cli, resumed, checkpoint)


def find_checkpoint(command: Command, composed: Composed) -> tuple[RunFolder | None, Path | None]:
    """The run to go on in (None: a new one) and the checkpoint to begin from (None: none)."""
    which = command.ckpt_path
    if which is None and command.run is None:
        return None, None
    runs_dir = Path(composed.values.get("runs_dir") or "runs")
    if which in (None, "last", "best"):
        fit = command.verb == "fit"
        run = find_run(runs_dir, composed.name, command.run, unfinished=fit)
        return run, checkpoint_of(run, which or "last")
    if command.run is not None:
        raise UserError(f"--run {command.run}: goes with --ckpt_path last or best, not with a path")
    path = Path(str(which)).expanduser()
    if not path.exists():
        raise UserError(f"--ckpt_path {which}: no such file; `last` continues the newest run that was not finished")
    return None, path


def _run(command: Command, cli: RecipeCLI, resumed: RunFolder | None, checkpoint: Path | None) -> int:
    """Takes the run's folder, hands it to loggers and callbacks, and lets the Trainer work."""
    trainer = cli.trainer
    run = None
    if not trainer.fast_dev_run:
        folder, run = _take_folder(command, cli, resumed)
        trainer.loggers = cli.loggers(folder)
        trainer._default_root_dir = str(folder)
    method = getattr(trainer, command.verb)
    try:
        method(cli.model, datamodule=cli.datamodule, ckpt_path=None if checkpoint is None else str(checkpoint))
    except SystemExit as stop:
        # Lightning ends the process so after Ctrl-C, when it has taken everything down.
        if str(trainer.state.status) == "interrupted":
            raise KeyboardInterrupt from stop
        raise
    if run is not None and command.verb == "fit" and _came_to_its_end(trainer):
        run.mark_finished()
    return 0


def _take_folder(command: Command, cli: RecipeCLI, resumed: RunFolder | None) -> tuple[Path, RunFolder | None]:
    """The run's folder, and the run where this process owns it (rank 0 does)."""
    told = os.environ.get(FOLDER_VARIABLE)
    if told is not None and int(os.environ.get("LOCAL_RANK", "0")) > 0:
        return Path(told), None
    if cli.trainer.global_rank > 0:
        # Started beside rank 0, not by it (torchrun, Slurm): only rank 0 writes, and it tells the others in `setup`.
        return Path(cli.config.runs_dir).absolute(), None
    run = resumed if resumed is not None else new_run(Path(cli.config.runs_dir), cli.composed.name)
    if resumed is not None:
        run.acquire()
        run.mark_unfinished()
    os.environ[FOLDER_VARIABLE] = str(run.path)
    write_config(run, cli.config_text())
    write_environment(run, command.words, cli.composed.values)
    return run.path, run


def _came_to_its_end(trainer: Any) -> bool:
    return str(trainer.state.status) == "finished"
