"""Floor 3: LLMModule builds, optimizes, normalizes, logs and exports; what is left to a module is its forward passes.

The gradient of an optimizer step is that of ``sum over terms of weight * (sum over the window and all ranks) / (count
over the window and all ranks)``. The counts are known before the window's first backward (the loader sends them with
each batch), so each micro-batch's part is exact by itself, whatever the micro-batch, packing or number of ranks.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from llm_modules import optimizers
from llm_modules.batch import MAY_LACK, CountedBatch, ObjectiveOutput
from llm_modules.generation import set_end_tokens
from llm_modules.model_card import write_model_card
from llm_modules.objectives.shapes import differentiable
from llm_modules.schedules import RunSchedule, run_length
from llm_modules.strategies import Answering, spread
from llm_modules.strategies.gradients import allow_mixed_layouts, clip_gradients, gradient_norm, unscale_gradients
from llm_modules.tokenizer import load_tokenizer
from llm_modules.zoo import Backbone, CausalLM, describe_difference, save_adapted, unbalanced

CHECKPOINT_KEY = "litrecipes"
CHECKPOINT_FORMAT = 1


class LLMModule(Answering, LightningModule):
    """What all modules share.

    Args:
        backbone: the model: where it comes from and how it is built.
        optimizer: class of the optimizer (``class_path`` and its arguments).
        schedule: class of the learning-rate schedule, stepped once per optimizer step; None: constant.
        tokenizer: folder, hub id or ``builtin:bytes`` (set once, at the top of the recipe).
        sequence_length: longest row in tokens (set once, at the top of the recipe).
        seed: of random weights and dropout (``seed_everything``).
    """

    def __init__(
        self,
        backbone: Backbone,
        optimizer: Callable[[Iterable], Optimizer],
        schedule: Callable[[Optimizer], LRScheduler] | None,
        tokenizer: str,
        sequence_length: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.optimizer_factory = optimizer
        self.schedule_factory = schedule
        self.tokenizer_source = tokenizer
        self.sequence_length = sequence_length
        self.seed = seed
        self.model: CausalLM | None = None
        self._tokens_seen: Tensor | int = 0
        self.flops_per_token: float | None = None
        self.gradient_norm: Tensor | None = None
        self._tokenizer: Any = None
        self._kinds: dict[str, str] = {}
        self.vocabulary: int | None = None  # token ids that the model knows, once it is built
        self._optimizer: dict[str, Any] = {}
        self._ways_to_step: list[dict[str, Any]] = []
        self._earlier_optimizer: dict[str, Any] | None = None
        self._window: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._validation: dict[str, dict[str, Tensor]] = {}

    @property
    def tokens_seen(self) -> int:
        """Positions trained on so far over all ranks, without padding."""
        return int(self._tokens_seen)

    # --- building

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the data where there is any (with its chat template), else that of the config."""
        data = getattr(self._trainer, "datamodule", None) if self._trainer is not None else None
        if (prepared := getattr(data, "prepared_tokenizer", None)) is not None:
            return prepared  # not kept here: what was asked before there was a trainer had no chat template
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.tokenizer_source)
        return self._tokenizer

    def configure_model(self) -> None:
        """Builds the model, once; the weights do not depend on the strategy or the rank."""
        if self.model is not None:
            return
        self.model = self.backbone.build(sequence_length=self.sequence_length, **self._built_with())
        self.flops_per_token = self.model.flops_per_token(self.sequence_length)
        # Now: a strategy that spreads the weights leaves them without their shapes.
        self.vocabulary = len(self.model.hf.get_input_embeddings().weight)  # type: ignore[arg-type]
        self._kinds = optimizers.parameter_kinds(self)
        self._spread()

    def _spread(self) -> None:
        """Under a strategy with a mesh of devices; who has more models spreads those, too."""
        self.keep_whole()
        if self._device_mesh is not None:
            spread(self.model, self._device_mesh, self.trainer.strategy)

    def _built_with(self) -> dict[str, Any]:
        precision = str(self._trainer.precision) if self._trainer is not None else "32-true"
        return {"tokenizer": self.tokenizer, "seed": self.seed, "precision": precision}

    def configure_optimizers(self) -> Any:
        groups = optimizers.parameter_groups(self, self._kinds)
        if not groups:
            raise ValueError("model: no parameter is trainable; a quantized one needs backbone.adapter, to be trained")
        if self.model is not None and self.model.adapter is not None and self.model.adapter.prunes:
            self.model.adapter.begin(self.run_steps(), flat=getattr(self.trainer.strategy, "flattens", False))
        optimizer = self.optimizer_factory(groups)
        if isinstance(optimizer, optimizers.MuonAdamW) and getattr(self.trainer.strategy, "flattens", False):
            raise ValueError(optimizers.FLAT)
        allow_mixed_layouts(optimizer)
        self._ways_to_step = optimizers.ways_to_step(optimizer)
        self._optimizer = {"class": optimizers.class_name(optimizer), "groups": optimizers.group_settings(optimizer)}
        if self._earlier_optimizer is not None and self._earlier_optimizer["class"] != self._optimizer["class"]:
            raise ValueError(
                f"ckpt_path: made with the optimizer {self._earlier_optimizer['class']}, whose state is of no use to "
                f"{self._optimizer['class']}; resume with the same one, or export the model and begin a new run from it"
            )
        if self.schedule_factory is None:
            return optimizer
        schedule = self.schedule_factory(optimizer)
        if isinstance(schedule, RunSchedule):
            schedule.bind(self.run_steps())
        plateau = isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau)
        when = {"monitor": "val/loss"} if plateau else {"interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, **when}}

    def run_steps(self) -> int:
        """The run's length in optimizer steps; a ValueError if it has none."""
        return run_length(self.trainer)

    def on_train_start(self) -> None:
        """A resumed run goes by the config: of the optimizer's settings, the checkpoint brought those of its own."""
        if self.trainer.is_global_zero and (line := unbalanced(self)):
            print(line, file=sys.stderr)
        earlier, self._earlier_optimizer = self._earlier_optimizer, None
        optimizer: Any = self.trainer.strategy.optimizers[0]
        for group, ways in zip(optimizer.param_groups, self._ways_to_step, strict=True):
            group.update(ways)
        if earlier is None:
            return
        schedules = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        for line in optimizers.apply_changes(
            optimizer, earlier["groups"], self._optimizer["groups"], schedules[0] if schedules else None
        ):
            if self.trainer.is_global_zero:
                print(f"model.optimizer: {line}", file=sys.stderr)

    # --- one optimizer step

    def objective_step(self, batch: Any) -> ObjectiveOutput:
        """The forward passes of one micro-batch and its terms; what a module is about."""
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seed_micro_step(batch.micro_step)
        if batch.micro_step == 0:
            self._window = self.global_counts(batch)
        output = self.objective_step(batch)
        total = sum(term.weight * term.sum / self._window[term.count] for term in output.terms.values())
        total = differentiable(total, getattr(self, "objective", self))
        self._add_sums(output, batch)
        if batch.micro_step == self.trainer.accumulate_grad_batches - 1:
            self._log_window()
        return total * self.cancel_averaging()

    def cancel_averaging(self) -> float:
        """The factor that undoes what Lightning and the strategy do to a loss that is already normalized.

        Lightning divides by the number of micro-batches; data-parallel strategies take the mean over ranks, and
        DeepSpeed divides by the number of micro-batches once more.
        """
        windows = 2 if self.trainer.strategy.handles_gradient_accumulation else 1
        return float(self.trainer.accumulate_grad_batches**windows * self.replicas[0])

    @property
    def replicas(self) -> tuple[int, int]:
        """How many parts the batch is dealt in, and which one is this rank's (shared by tensor-parallel ranks)."""
        dealt = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        return dealt["num_replicas"], dealt["rank"]

    def global_counts(self, batch: CountedBatch) -> dict[str, Tensor]:
        """The window's denominators over all ranks; those of losses at least 1: an empty window has a zero gradient."""
        if not (names := sorted(batch.window)):
            raise ValueError("data: training batches carry no window counts; use a loader of llm_modules.data")
        for name in names:
            if batch.window[name] == 0 and name not in MAY_LACK:
                where = f"step {self.global_step}, rank {self.global_rank}"
                warnings.warn(f"{where}: no {name} to learn from", stacklevel=2)
        counts = torch.tensor([batch.window[name] for name in names], dtype=torch.float32, device=self.device)
        least = counts.new_tensor([name not in MAY_LACK for name in names])
        return dict(zip(names, self.sum_over_ranks(counts).maximum(least), strict=True))

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        if self.trainer.world_size == 1:
            return values
        total: Any = self.trainer.strategy.reduce(values, reduce_op="sum")
        return total / (self.trainer.world_size // self.replicas[0])  # ranks that share the same rows count once

    def seed_micro_step(self, micro_step: int) -> None:
        """Random numbers (dropout) are a function of seed, step and rank, so that no random state need be saved."""
        place = f"{self.seed},{self.global_step},{micro_step},{self.replicas[1]}"
        number = int.from_bytes(hashlib.blake2b(place.encode(), digest_size=6).digest(), "big")
        random.seed(number)
        torch.manual_seed(number)

    def _add_sums(self, output: ObjectiveOutput, batch: Any) -> None:
        parts = {f"{name}|{term.count}": term.sum.detach() for name, term in output.terms.items()}
        parts |= {f"{name}|{count}": value for name, (value, count) in output.metrics.items()}
        parts["|tokens_seen"] = self._exact(batch.tokens()[1])
        for name, value in parts.items():
            self._sums[name] = self._sums[name] + value.double() if name in self._sums else value.double()

    def _exact(self, value: float | Tensor) -> Tensor:
        """A number as a tensor. (Inside a step the default dtype is the precision's: bf16 would round 1001 to 1000.)"""
        return (
            value.double()
            if isinstance(value, Tensor)
            else torch.full((), value, dtype=torch.float64, device=self.device)
        )

    def _log_window(self) -> None:
        """One reduction a step: the window's means over all ranks, and the tokens seen."""
        names = sorted(self._sums)
        totals = dict(zip(names, self.sum_over_ranks(torch.stack([self._sums[n] for n in names])), strict=True))
        self._sums = {}
        self._tokens_seen = self._tokens_seen + totals.pop("|tokens_seen")  # stays on the device: no wait for it
        values = {key.split("|")[0]: value / self._window[key.split("|")[1]] for key, value in totals.items()}
        self.log_dict({f"train/{name}": value for name, value in values.items()}, on_step=True, on_epoch=False)
        rate = self._exact(self.trainer.strategy.optimizers[0].param_groups[0]["lr"])
        self.log_dict({"lr": rate, "tokens_seen": self._tokens_seen}, on_step=True, on_epoch=False)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Steps, and frees the gradients at once: Lightning would keep them until the next backward pass, beside all
        the activations of the next forward pass."""
        step, adapter = self.global_step, None if self.model is None else self.model.adapter
        if adapter is not None:
            optimizer_closure = adapter.with_penalty(optimizer_closure, self.trainer.precision_plugin)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if adapter is not None:
            adapter.after_step(step)
        if not self.trainer.strategy.handles_gradient_accumulation:  # DeepSpeed comes here once a micro-batch
            optimizer.zero_grad()
        elif (norm := getattr(self.trainer.strategy, "gradient_norm", None)) is not None:
            self.log("train/grad_norm", norm, on_step=True, on_epoch=False)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clips, and logs the norm of the gradient before it (that a callback may have computed just now): of each
        part that is clipped on its own. (DeepSpeed clips in its own step, by one norm of all there is.)"""
        norm, self.gradient_norm = self.gradient_norm, None
        if self.trainer.strategy.handles_gradient_accumulation:
            return
        unscale_gradients(optimizer, getattr(self.trainer.precision_plugin, "scaler", None))
        by_norm = gradient_clip_algorithm in (None, "norm")
        shard_group = getattr(self.trainer.strategy, "shard_group", None)
        for name, parameters in self.clipped_apart().items():
            if norm is None or parameters is not None:
                norm = gradient_norm(optimizer, shard_group, parameters)
            self.log(f"train/grad_norm{name}", norm, on_step=True, on_epoch=False)
            if gradient_clip_val and by_norm:
                clip_gradients(optimizer, float(gradient_clip_val), norm, parameters)
        if gradient_clip_val and not by_norm:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def clipped_apart(self) -> dict[str, list[Tensor] | None]:
        """Trained parameters (None: all) that have a norm and a clip of their own, by the end of the norm's name."""
        return {"": None}

    # --- validation

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate("test", batch)

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def _evaluate(self, stage: str, batch: Any) -> None:
        self._add_evaluation(stage, self.objective_step(batch), batch.counts())

    def _add_evaluation(self, stage: str, output: ObjectiveOutput, found: Mapping[str, float]) -> None:
        sums = self._validation.setdefault(stage, {})
        parts = {f"{name}|{t.count}|{t.weight}": t.sum for name, t in output.terms.items()}
        parts |= {f"{name}|{count}|0": value for name, (value, count) in output.metrics.items()}
        parts |= {f"|{n}|count": self._exact(value) for n, value in found.items()}
        for name, value in parts.items():
            sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64, device=self.device)) + value.double()

    def _log_evaluation(self, stage: str) -> None:
        """Means over every row of every rank, each with its own denominator."""
        if not (sums := self._validation.pop(stage, {})):
            return
        names = sorted(sums)
        totals = dict(zip(names, self.sum_over_ranks(torch.stack([sums[n] for n in names])).tolist(), strict=True))
        counts = {name.split("|")[1]: total for name, total in totals.items() if name.endswith("|count")}
        for key, total in totals.items():
            name, count, _ = key.split("|")
            if not name or (counts[count] == 0 and count in MAY_LACK):
                continue
            if counts[count] == 0:
                raise ValueError(f"data: the {stage} rows hold no {count} to measure; see `recipes show NAME --data`")
            value = total / counts[count]
            self.log(f"{stage}/{name}", value, on_step=False, on_epoch=True, prog_bar=name == "loss")
            if name == "nll":
                self.log(f"{stage}/perplexity", math.exp(min(value, 700.0)), on_step=False, on_epoch=True)

    # --- checkpoints and export

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert self.model is not None
        checkpoint[CHECKPOINT_KEY] = {
            "format": CHECKPOINT_FORMAT,
            "module": f"{type(self).__module__}.{type(self).__qualname__}",
            "backbone": self.model.description(),
            "config": json.loads(self.model.hf.config.to_json_string(use_diff=False)),
            "tokenizer": self.tokenizer_source,
            "chat_template": self.tokenizer.chat_template,
            "sequence_length": self.sequence_length,
            "tokens_seen": self.tokens_seen,
            "optimizer": self._optimizer,
        }
        if self.model.adapter is not None:
            checkpoint[CHECKPOINT_KEY]["adapter"] = {
                "state": self.model.adapter.state(),
                # What `recipes export` builds the base of again.
                "backbone": {**json.loads(json.dumps(asdict(self.backbone))), "adapter": self.model.adapter.recipe},
                "seed": self.seed,
                "precision": str(self.trainer.precision),
            }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get(CHECKPOINT_KEY)
        if saved is None:
            raise ValueError("ckpt_path: not a checkpoint of LitRecipes (no 'litrecipes' entry in it)")
        if saved["format"] > CHECKPOINT_FORMAT:
            raise ValueError(f"ckpt_path: made by a newer LitRecipes (format {saved['format']}); update the package")
        assert self.model is not None
        if difference := describe_difference(saved["backbone"], self.model.description()):
            raise ValueError(f"ckpt_path: a checkpoint of another model: {difference}")
        if self.model.adapter is not None:
            self.model.adapter.load_state(saved["adapter"]["state"])
        self._tokens_seen = saved["tokens_seen"]
        self._earlier_optimizer = saved.get("optimizer") if self.trainer.state.fn == "fit" else None

    def export(
        self, folder: str | Path, info: dict[str, Any] | None = None, weights: dict[str, Tensor] | None = None
    ) -> None:
        """Writes an ordinary Hugging Face folder: weights, tokenizer, chat template, generation config, model card.

        Of a model with an adapter, a folder that peft opens: the adapter alone, unmerged.

        Args:
            folder: made if missing.
            info: facts for the model card: recipe, data, metrics, ...; ``place``: where the folder will lie in the end,
                if it is renamed.
            weights: the whole state dict to write, where a strategy has spread the model's own; None: as they are.
        """
        assert self.model is not None
        built, model = self._built_with(), self.model
        if weights is not None:
            model = self.backbone.build(sequence_length=self.sequence_length, **built)
            model.load_state_dict({n[len("model.") :]: w for n, w in weights.items() if n.startswith("model.")})
        set_end_tokens(model.hf, self.tokenizer)
        if model.adapter is None:
            model.save_pretrained(folder)
        else:
            info = {"adapter": model.adapter.kind, "base": model.base_name, **(info or {})}
            save_adapted(model, self.backbone, folder, info.get("place"), **built)
        self.tokenizer.save_pretrained(str(folder))
        write_model_card(Path(folder), {"tokens_seen": self.tokens_seen, **(info or {})})
