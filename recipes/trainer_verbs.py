"""fit, validate, test and predict: from the command's words to the Trainer; nothing is written before all is good."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.checks import check_values
from recipes.command_line import Command, parse_command
from recipes.compose import Composed, compose
from recipes.errors import UserError, user_message
from recipes.precision_rules import check_precision
from recipes.ranks import first_on_each_machine, part_from_the_others, tell_folder, told_folder
from recipes.requeue import how_to_go_on, requeued_when_told
from recipes.run_changes import changes
from recipes.run_folder import (
    FINISHED,
    RunFolder,
    checkpoint_of,
    find_run,
    new_run,
    run_of_job,
    write_config,
    write_environment,
)
from recipes.yaml_tree import display

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
    if command.help is not None:
        from recipes.fit_help import show_help

        return show_help(command)
    if not command.configs:
        raise UserError(f"-c: a recipe must be named, such as recipes {verb} -c pretrain/quickstart; see recipes list")
    composed = compose(command.configs, command.overrides)
    check_values(composed)
    with requeued_when_told(command.job):
        return _run(command, composed)


def _run(command: Command, composed: Composed) -> int:
    verb = command.verb
    if command.preflight is not None:
        from recipes.check_cluster import preflight

        preflight(composed, command.preflight)
    resumed, checkpoint = find_checkpoint(command, composed)

    from recipes.cli import RecipeCLI

    cli = RecipeCLI(composed)
    if command.print_config:
        print(cli.config_text(), end="")
        return 0
    check_precision(composed, training=verb == "fit")
    cli.instantiate()
    if told_folder() is None:
        _prepare(command, cli)
        if command.dry_run:
            return 0
    if verb != "fit" and checkpoint is None and cli.trainer.is_global_zero:
        _say_if_untrained(cli, verb)
    if cli.trainer.fast_dev_run:  # type: ignore[attr-defined]  # Lightning's trial: a few batches, nothing is written
        _work(command, cli, checkpoint)
        return 0
    with _folder(command, cli, resumed, checkpoint) as owned:
        _work(command, cli, checkpoint)
        if owned is not None and verb == "fit" and cli.came_to_its_end():
            owned.mark_finished()
    part_from_the_others()
    return 0


def _prepare(command: Command, cli: RecipeCLI) -> None:
    """Prepares the data, which may take hours, before the processes are connected: no collective waits for it."""
    from recipes.cluster_world import find_world, wait_for_nodes
    from recipes.preview import check_before_training

    with first_on_each_machine(cli.trainer.local_rank) as chosen:
        if not chosen:
            return
        if command.verb == "fit":
            check_before_training(cli, verbose=cli.trainer.is_global_zero, full=command.dry_run)
        elif cli.datamodule is not None:
            cli.datamodule.prepare_data()
        if not command.dry_run:
            wait_for_nodes(find_world())


def find_checkpoint(command: Command, composed: Composed) -> tuple[RunFolder | None, Path | None]:
    """The run to go on in (None: a new one) and the checkpoint to begin from (None: from the first step).

    Raises:
        UserError: there is no such run or checkpoint.
    """
    which = command.ckpt_path
    if command.job is not None:
        return _of_job(command, composed)
    if which is None and command.run is None:
        return None, None
    if which in (None, "last", "best"):
        told = told_folder()
        if told is not None:
            run = RunFolder(told, composed.name)
        else:
            runs_dir = Path(composed.values.get("runs_dir") or "runs")
            run = find_run(
                runs_dir, composed.name, command.run, unfinished=command.verb == "fit", which=which or "last"
            )
        if command.verb == "fit" and which != "best" and run.newest_checkpoint() is None:
            return run, None  # killed before its first checkpoint: nothing is lost by beginning it again
        return run, checkpoint_of(run, which or "last")
    if command.run is not None:
        raise UserError(f"--run {command.run}: goes with --ckpt_path last or best, not with a path")
    path = Path(str(which)).expanduser()
    if not path.exists():
        raise UserError(f"--ckpt_path {which}: no such file; `last` continues the newest run that was not finished")
    return None, path


def _say_if_untrained(cli: RecipeCLI, verb: str) -> None:
    """Numbers of random weights look like any others."""
    backbone = getattr(cli.model, "backbone", None)
    if backbone is not None and not backbone.pretrained:
        print(
            f"recipes: no --ckpt_path, so this is a model of random weights; recipes {verb} ... --ckpt_path best takes "
            "those of the newest run",
            file=sys.stderr,
        )


def _of_job(command: Command, composed: Composed) -> tuple[RunFolder | None, Path | None]:
    """The run that a job began when it was started first, with its newest checkpoint."""
    if command.verb != "fit" or command.ckpt_path is not None or command.run is not None:
        raise UserError(f"--job {command.job}: is for fit, and without --ckpt_path and --run: it finds the run itself")
    told, runs_dir = told_folder(), Path(composed.values.get("runs_dir") or "runs")
    run = RunFolder(told, composed.name) if told is not None else run_of_job(runs_dir, composed.name, str(command.job))
    return run, None if run is None else run.newest_checkpoint()


@contextmanager
def _folder(
    command: Command, cli: RecipeCLI, resumed: RunFolder | None, checkpoint: Path | None
) -> Iterator[RunFolder | None]:
    """Gives the run a folder, and yields it to the process that owns it (rank 0); one that never began is removed."""
    told, zero = told_folder(), cli.trainer.is_global_zero
    cli.trains = command.verb == "fit"
    needed = command.verb in ("fit", "predict") or resumed is not None
    if not needed:
        yield None
        return
    if told is not None or not zero:
        # Beside rank 0 (torchrun, Slurm) the folder is not known yet: rank 0 tells it when they are connected.
        cli.use_folder(told, None)
        yield None
        return
    runs_dir = Path(cli.config.runs_dir)
    existed = [path for path in (runs_dir, *(runs_dir / cli.composed.name).parents) if path.exists()]
    owned = resumed or new_run(runs_dir, cli.composed.name)
    notes: dict[Path, bytes] = {}
    if command.verb == "fit" and resumed is not None:
        owned.acquire()
        notes = _notes(owned)
        owned.mark_unfinished()
        if checkpoint is None:
            owned.begin_again()
            print(f"{display(owned.path)}: no checkpoint yet, beginning it again", file=sys.stderr)
        else:
            print(f"continuing {display(owned.path)} from {checkpoint.name}", file=sys.stderr)
    elif resumed is None:
        owned.note_job(command.job)
        print(f"run: {display(owned.path)}", file=sys.stderr)
    try:
        if command.verb == "fit" or resumed is None:
            earlier = write_config(owned, text := cli.config_text())
            if earlier is not None and checkpoint is not None:
                _say_changes(earlier, text)
            write_environment(owned, command.words, cli.composed.values)
        if command.verb != "fit" and resumed is None:
            owned.mark_finished()  # it will never be one to continue
        tell_folder(owned.path)
        cli.use_folder(owned.path, owned)
        yield owned
    except (Exception, KeyboardInterrupt) as error:
        mistake = isinstance(error, KeyboardInterrupt) or user_message(error) is not None
        if resumed is None and mistake and not cli.began:
            _remove(owned, existed)
        elif command.verb == "fit" and resumed is not None and not cli.began:
            _put_back(owned, notes)
        raise
    finally:
        tell_folder(None)
        owned.release()


def _say_changes(earlier: Path, text: str) -> None:
    """A loss, a model or data that are not those the run began with: allowed, and easily not meant."""
    if found := changes(earlier.read_text(encoding="utf-8"), text):
        print(f"continuing with other settings: {', '.join(found)} (before: {earlier.name})", file=sys.stderr)


def _notes(run: RunFolder) -> dict[Path, bytes]:
    """What a run's folder says of it: small files that are written before it is known that it can go on."""
    names = ("config.yaml", "config.*.yaml", "environment.json", "audit.json", "report.html", FINISHED)
    return {path: path.read_bytes() for name in names for path in run.path.glob(name)}


def _put_back(run: RunFolder, notes: dict[Path, bytes]) -> None:
    """The run is what it was: a resume that never began has not changed it."""
    for path in _notes(run).keys() - notes.keys():
        path.unlink()
    for path, content in notes.items():
        temporary = path.with_name(f".{path.name}-partial")
        temporary.write_bytes(content)
        temporary.replace(path)


def _remove(run: RunFolder, existed: list[Path]) -> None:
    """Takes a folder away in which nothing has happened, and the folders above it that were made for it."""
    shutil.rmtree(run.path)
    for parent in run.path.parents:
        if parent in [path.absolute() for path in existed] or any(parent.iterdir()):
            return
        parent.rmdir()


def _work(command: Command, cli: RecipeCLI, checkpoint: Path | None) -> None:
    trainer = cli.trainer
    method = getattr(trainer, command.verb)
    arguments = {"return_predictions": False} if command.verb == "predict" else {}
    path = None if checkpoint is None else str(checkpoint)
    try:
        results = method(cli.model, datamodule=cli.datamodule, ckpt_path=path, **arguments)
    except SystemExit as stop:
        # Lightning ends the process like this after Ctrl-C, when it has taken everything down.
        if stop.code == 1 and trainer.state.status == "interrupted":
            raise KeyboardInterrupt from stop
        if type(stop) is not SystemExit:  # a signal, after its checkpoint
            print(f"recipes: {stop}; {how_to_go_on(command.job)}", file=sys.stderr)
        raise
    if command.verb in ("validate", "test") and cli.folder is not None and trainer.is_global_zero:
        text = json.dumps({"checkpoint": path, "metrics": results}, indent=2)
        (cli.folder / f"{command.verb}.json").write_text(text + "\n", encoding="utf-8")
