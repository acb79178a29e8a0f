"""What is found out before training: the model's size, what the data hold, and whether they go together."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llm_modules.optimizers import multiplies_bfloat16
from llm_modules.policy import PolicyModule
from llm_modules.policy.size import answers_together, step_tokens
from llm_modules.zoo.memory import cache_bytes, optimizer_state
from recipes.compose import Composed
from recipes.errors import UserError, one_line, user_message
from recipes.yaml_tree import dotted

if TYPE_CHECKING:
    from llm_modules.zoo.estimate import ModelSummary
    from recipes.cli import RecipeCLI


def preview(composed: Composed, *, model: bool, data: bool) -> None:
    """Builds what `recipes show --model` and `--data` ask for, and prints it."""
    from recipes.cli import RecipeCLI

    cli = RecipeCLI(composed)
    cli.instantiate()
    report = audit(cli) if data else None
    lines = model_lines(cli, report) if model else []
    print("\n".join([*lines, *([""] if model and data else []), *(report_lines(report) if data else [])]))


def check_before_training(cli: RecipeCLI, *, verbose: bool, full: bool) -> None:
    """Checks the model, prepares and audits the data, and says on standard error what will be trained.

    Args:
        verbose: whether this process is the one that speaks.
        full: say what the data hold, too. (A run's own MaskAudit says it.)

    Raises:
        UserError, ValueError: what is fatal.
    """
    config = check_model(cli)
    if hasattr(cli.model, "check_before_training"):  # what goes over the model, its data and other models
        cli.model.check_before_training(cli.datamodule, str(cli.trainer.precision))
    _check_optimizer(cli)
    backbone: Any = getattr(cli.model, "backbone", None)
    if config is not None and backbone.quantization is not None and backbone.adapter is None:
        raise UserError(
            f"`model.init_args.backbone.quantization` is {backbone.quantization}, whose weights cannot be trained; "
            "add an adapter (-c adapters/lora), or set it to null"
        )
    if config is not None and getattr(cli.datamodule, "flat", False):
        backbone.check_packing(config)
    if config is not None and (tensor := getattr(cli.trainer.strategy, "tensor_parallel", 1)) > 1:
        from llm_modules.strategies.parallel_plan import check_tensor_parallel

        check_tensor_parallel(config, config.get_text_config().base_model_tp_plan, tensor)
    report = audit(cli)
    if report is not None and report.fatal:
        raise UserError("\n".join(report.fatal))
    if report is not None:
        _check_windows(cli)
    if verbose:
        lines = [*model_lines(cli, report), *getattr(cli.model, "unread", [])]
        print("\n".join([*lines, "", *report_lines(report)] if full else lines), file=sys.stderr)


def _check_optimizer(cli: RecipeCLI) -> None:
    """An optimizer says what it thinks of its arguments when it is made, which is after the model otherwise."""
    factory = getattr(cli.model, "optimizer_factory", None)
    if factory is None:
        return
    try:
        optimizer_state(factory)
    except ValueError as error:
        if user_message(error) is not None:
            raise
        key: tuple[str, ...] = ("model", "init_args", "optimizer")
        value: Any = cli.composed.values
        for part in (*key, "init_args"):
            value = value.get(part) if isinstance(value, dict) else None
        # torch names the value, in words of its own: `Invalid learning rate: -1.0`.
        named = [n for n, v in (value or {}).items() if type(v) in (int, float) and str(error).endswith(f" {float(v)}")]
        key = (*key, "init_args", named[0]) if len(named) == 1 else key
        raise UserError(f"{cli.composed.origin(key)}: `{dotted(key)}`: {one_line(error)}") from error


def _check_windows(cli: RecipeCLI) -> None:
    """An epoch must hold an optimizer step's rows over all devices."""
    data: Any = cli.datamodule
    data.trainer = cli.trainer  # as the Trainer itself will set it
    _ = data.steps_per_epoch


def check_model(cli: RecipeCLI) -> Any:
    """The checked config of a model of ours, with its final vocabulary; None where it is not one of ours.

    Raises:
        ValueError: model, tokenizer and sequence length do not go together.
    """
    backbone = getattr(cli.model, "backbone", None)
    if backbone is None:
        return None
    return backbone.final_config(
        vocabulary=len(cli.model.tokenizer),
        sequence_length=cli.model.sequence_length,
        precision=str(cli.trainer.precision),
    )


def model_lines(cli: RecipeCLI, report: Any) -> list[str]:
    """Parameters, FLOPs a token and the estimated peak memory."""
    backbone, length = getattr(cli.model, "backbone", None), getattr(cli.model, "sequence_length", 0)
    if backbone is None:
        return [f"model: {type(cli.model).__name__}"]
    from lightning.pytorch.plugins.precision import MixedPrecision

    trainer = cli.trainer
    tokens = getattr(cli.datamodule, "micro_batch_tokens", getattr(cli.datamodule, "batch_size", 1) * length)
    trained_share = 1.0 if report is None else report.trained_share
    if isinstance(cli.model, PolicyModule):  # of answers, which there are none of yet
        parts = trainer.accumulate_grad_batches * trainer.world_size
        tokens, trained_share = step_tokens(cli.model, cli.datamodule, parts)
    known = {
        "vocabulary": len(cli.model.tokenizer),
        "sequence_length": length,
        "tokens": tokens,
        "precision": str(trainer.precision),
    }
    training = {
        "optimizer": cli.model.optimizer_factory,
        "trained_share": trained_share,
        "accumulate": trainer.accumulate_grad_batches,
        "device": trainer.strategy.root_device.type,
    }
    autocast = isinstance(trainer.precision_plugin, MixedPrecision)
    summary = whole_summary(cli.model, cli.datamodule, known, training, trainer.world_size, autocast)
    return [*str(summary).splitlines(), *slow_precision(trainer)]


def whole_summary(
    module: Any, data: Any, known: dict[str, Any], training: dict[str, Any], devices: int = 1, autocast: bool = False
) -> ModelSummary:
    """What the trained model is, with the memory of all models of the run.

    Args:
        module: of ours.
        data: its DataModule.
        known: arguments of ``Backbone.summary`` that are the same for each of the models.
        training: those that are of the trained ones.
        devices: between which prompts are dealt.
        autocast: whether the precision is that, which frozen models are narrowed for (see ``place_frozen``).
    """
    summary = module.backbone.summary(**known, **training, scalar=getattr(module, "scalar", False))
    memory = summary.memory
    frozen = frozen_bytes(summary, module.backbone, autocast) * getattr(module, "frozen_copies", 0)
    if (teacher := getattr(module, "teacher", None)) is not None:
        frozen += frozen_bytes(teacher.summary(**known), teacher, autocast)
    cache = 0
    if isinstance(module, PolicyModule):
        frozen += sum(getattr(reward, "stored_bytes", 0) for reward in module.all_rewards)
        for critic in module.critics.backbones.values():
            memory = memory.beside(critic.summary(**known, **training, scalar=True).memory)
        if module.engine is None:  # else it has them, in the share of the device that it is given
            config = module.backbone.final_config(**{name: known[name] for name in known if name != "tokens"})
            cache = cache_bytes(config, *answers_together(module, data, devices), known["precision"])
    return replace(summary, memory=replace(memory, frozen=frozen, cache=cache))


def frozen_bytes(summary: ModelSummary, backbone: Any, autocast: bool) -> int:
    """Of a model that is asked and not trained."""
    assert summary.memory is not None
    whole = summary.memory.weights
    narrowed = autocast and backbone.adapter is None and not backbone.fp8 and whole == 4 * summary.parameters
    return whole - 2 * summary.linear if narrowed else whole


def slow_precision(trainer: Any) -> list[str]:
    """A line where the precision is far slower than fp32 would be."""
    precision, device = str(trainer.precision), trainer.strategy.root_device
    if device.type != "cpu" or not precision.startswith("bf16") or multiplies_bfloat16():
        return []
    return [f"precision   {precision}: this processor has no bf16 instructions; --trainer.precision 32-true is faster"]


def audit(cli: RecipeCLI) -> Any:
    """Prepares the data and counts what will be trained; None where the data are not ours."""
    data = cli.datamodule
    if data is None:
        return None
    data.prepare_data()
    if not hasattr(data, "audit"):
        return None
    data.setup("fit")
    config = check_model(cli)
    return data.audit(vocabulary=None if config is None else config.get_text_config().vocab_size)


def report_lines(report: Any) -> list[str]:
    """The audit, and the first row with what is trained marked."""
    if report is None:
        return ["data: of another kind than ours, not audited"]
    return [*report.lines, *report.fatal, "first row, what is trained marked:", report.sample]
