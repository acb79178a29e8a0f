"""Optimizer steps of a recipe of which only the gradients are kept: what `recipes check gradients` compares."""

from __future__ import annotations

import gc
import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from llm_modules.logprobs import score_batch
from llm_modules.strategies.full_gradients import full_gradients
from recipes.bare_run import as_overrides, bare
from recipes.compose import Composed
from recipes.errors import UserError
from recipes.ranks import first_on_each_machine, part_from_the_others, tell_folder, told_folder

_SMALL = 0.02  # standard deviation of what is put where a trained tensor is all zeros, and of a token's shift
_NATS = 1.0  # most that an answer is shifted by
_FAR = 12.9898  # radians from one answer's shift to the next one's


def settings(composed: Composed, steps: int) -> list[tuple[str, str]]:
    """What a recipe is overridden with: fp32, so many steps, nothing that writes, measures or changes gradients."""
    values: dict[str, Any] = {"trainer.precision": "32-true", "trainer.gradient_clip_val": None}
    if isinstance(composed.values["model"].get("init_args", {}).get("backbone"), dict):
        values |= {"model.backbone.dtype": None, "model.backbone.fp8": False}
    return [*bare(steps), *as_overrides(values)]


def alone(batch_size: int, accumulate: int) -> list[tuple[str, str]]:
    """What turns a recipe into one process that cuts a step in this way."""
    values = {
        "trainer.strategy": "auto",
        "trainer.devices": 1,
        "trainer.num_nodes": 1,
        "trainer.accumulate_grad_batches": accumulate,
        "data.batch_size": batch_size,
    }
    return as_overrides(values)


def keep_gradients(composed: Composed, out: Path) -> None:
    """Trains the merged recipe's steps, on as many ranks as it asks for; rank 0 writes ``out``.

    Raises:
        UserError: gradients of this recipe cannot be compared.
    """
    from recipes.cli import RecipeCLI

    cli = RecipeCLI(composed)
    cli.instantiate()
    data: Any = cli.datamodule
    if not hasattr(cli.model, "optimizer_factory") or not isinstance(getattr(data, "batch_size", None), int):
        raise UserError(
            f"gradients of {type(cli.model).__name__} with {type(data).__name__} cannot be compared: a model that "
            "derives from llm_modules.LLMModule and data with a batch_size are needed"
        )
    if told_folder() is None:
        from recipes.preview import check_before_training

        with first_on_each_machine(cli.trainer.local_rank) as chosen:
            if chosen:
                check_before_training(cli, verbose=False, full=False)
        tell_folder(out.parent)  # the ranks that Lightning starts know by it that this was done
    prepare(cli.model)
    cli.trainer.callbacks.append(KeepGradients(out))  # type: ignore[attr-defined]
    torch.set_float32_matmul_precision("highest")
    try:
        cli.trainer.fit(cli.model, datamodule=data)
    finally:
        tell_folder(None)
    part_from_the_others()
    del cli, data
    gc.collect()
    torch.cuda.empty_cache()  # where this process is a rank, the reference comes next, on the same device


def prepare(module: Any) -> None:
    """Makes a module's gradients comparable: it stays where it is, no trained tensor begins as zeros, and what is
    compared with the model is not what the model itself says.

    Where LoRA's B is zero, the gradient of A is, and could not be seen to be wrong; nor could what is made of margins,
    which are zero while the policy is its reference, or of ratios, which are 1 while it is the one that answered.
    """
    module.optimizer_factory = lambda groups: torch.optim.SGD(groups, lr=0.0)
    module.schedule_factory = None
    build = module.backbone.build

    def built(**arguments: Any) -> nn.Module:
        model: nn.Module = build(**arguments)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and not parameter.any():
                    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=6).digest(), "big")
                    noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
                    parameter.copy_(_SMALL * noise)
        return model

    module.backbone.build = built
    if hasattr(module, "_reference_sums"):
        _shift_references(module)
    if hasattr(module, "_score"):
        _shift_answers(module)


def _shift_references(module: Any) -> None:
    """Of each answer of preference tuning the reference says something else: a function of its row alone."""
    ask = module._reference_sums

    def asked(batch: Any) -> Tensor:
        sums: Tensor = ask(batch)
        width = len(sums) // len(batch.rows)  # answers of a row
        places = torch.tensor(batch.rows).to(sums)[:, None] * width + torch.arange(width).to(sums)
        return sums + _NATS * torch.sin(_FAR * places.flatten())

    module._reference_sums = asked


def _shift_answers(module: Any) -> None:
    """Of each token that a policy said, the policy that said it and the reference said something else."""
    score = module._score

    @torch.no_grad()
    def scored(rollouts: Any) -> None:
        score(rollouts)
        if rollouts.old_logprobs is None:  # an iteration of one step takes its own
            rollouts.old_logprobs = module._said(rollouts, lambda batch: score_batch(module.model, batch).logprobs)
        for number, name in enumerate(("old_logprobs", "reference_logprobs")):
            if (said := getattr(rollouts, name)) is not None:
                noise = torch.randn(said.shape, generator=torch.Generator().manual_seed(number))
                setattr(rollouts, name, said + _SMALL * noise)

    module._score = scored


class KeepGradients(Callback):
    """Gathers the gradient of each optimizer step and compares the ranks' own with that of rank 0.

    Writes ``{"steps": [{name: gradient}], "ranks": [{name: difference of each rank}], "losses", ...}``.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        self._steps: list[dict[str, Tensor]] = []
        self._ranks: list[dict[str, list[float]]] = []
        self._losses: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        for module in pl_module.modules():
            # Without dropout, whose numbers are each rank's own. A block that checkpoints does so in training only.
            if not getattr(module, "gradient_checkpointing", False):
                module.training = False

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if trainer.fit_loop._should_accumulate():
            return  # DeepSpeed comes here after each micro-batch
        gradients: dict[str, Tensor] = {}
        differences: dict[str, Tensor] = {}
        for name, gradient in full_gradients(trainer.strategy, pl_module):
            own = gradient.detach().to(trainer.strategy.root_device)
            if trainer.world_size > 1:
                first = own.clone()
                dist.broadcast(first, src=0)
                differences[name] = (own - first).norm()
            if trainer.is_global_zero:
                gradients[name] = own.float().cpu().clone()
        self._steps.append(gradients)
        self._ranks.append(_of_all_ranks(differences, trainer.world_size))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if not trainer.fit_loop._should_accumulate():
            self._losses.append(float(trainer.callback_metrics.get("train/loss", torch.nan)))

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        kept = {
            "steps": self._steps,
            "ranks": self._ranks,
            "losses": self._losses,
            "processes": trainer.world_size,
            "strategy": type(trainer.strategy).__name__,
            "device": trainer.strategy.root_device.type,
            "batch_size": data.batch_size,
            "accumulate": trainer.accumulate_grad_batches,
            "replicas": pl_module.replicas[0],
            "packing": getattr(data, "packing", None),
            "prompts": hasattr(data, "longest_prompt"),  # batch_size is of all ranks, and it is answers that are cut
        }
        torch.save(kept, self._out)


def _of_all_ranks(differences: dict[str, Tensor], world: int) -> dict[str, list[float]]:
    """For each tensor, how far each rank's is from rank 0's (absolute norms)."""
    if not differences:
        return {}
    own = torch.stack(list(differences.values()))
    table = [torch.empty_like(own) for _ in range(world)]
    dist.all_gather(table, own)
    return dict(zip(differences, torch.stack(table, dim=1).tolist(), strict=True))
