"""What is found out before training: the model's size, what the data hold, and whether they go together."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from recipes.compose import Composed
from recipes.errors import UserError

if TYPE_CHECKING:
    from recipes.cli import RecipeCLI


def preview(composed: Composed, *, model: bool, data: bool) -> None:
    """Builds what `recipes show --model` and `--data` ask for, and prints it."""
    from recipes.cli import RecipeCLI

    cli = RecipeCLI(composed)
    cli.instantiate()
    if model:
        _print(model_lines(cli))
    if data:
        _print(data_lines(cli))


def check_before_training(cli: RecipeCLI, *, verbose: bool) -> None:
    """Prepares and audits the data, checks the model against them, and prints both.

    Raises:
        UserError: what is fatal, a line each.
    """
    model, data = model_lines(cli), data_lines(cli)
    if verbose:
        _print([*model, "", *data], sys.stderr)


def model_lines(cli: RecipeCLI) -> list[str]:
    """The model's size, after a check that needs no weights."""
    backbone = getattr(cli.model, "backbone", None)
    if backbone is None:
        return [f"model: {type(cli.model).__name__}"]
    vocabulary = len(cli.model.tokenizer)
    config = backbone.check(
        vocabulary=vocabulary, sequence_length=cli.model.sequence_length, precision=str(cli.trainer.precision)
    )
    return [f"model: {config.model_type}"]


def data_lines(cli: RecipeCLI) -> list[str]:
    """The audit of the training data.

    Raises:
        UserError: what is fatal about them.
    """
    data = cli.datamodule
    if data is None:
        return ["data: none"]
    data.prepare_data()
    if not hasattr(data, "audit"):
        return [f"data: {type(data).__name__}"]
    data.setup("fit")
    report = data.audit(vocabulary=_model_vocabulary(cli))
    if report.fatal:
        raise UserError("\n".join(report.fatal))
    return [*report.lines, "", "first row, what is trained marked:", report.sample]


def _model_vocabulary(cli: RecipeCLI) -> int | None:
    """The number of token ids that the model will have; None where it is not one of ours."""
    backbone = getattr(cli.model, "backbone", None)
    if backbone is None:
        return None
    tokens = len(cli.model.tokenizer)
    config = backbone.model_config(vocabulary=tokens)
    return max(tokens, int(config.get_text_config().vocab_size))


def _print(lines: list[str], file=None) -> None:  # type: ignore[no-untyped-def]
    print("\n".join(lines), file=file or sys.stdout)
