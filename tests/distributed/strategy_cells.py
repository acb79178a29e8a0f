"""Short real runs under one strategy after another, in one group of processes, each of which calls ``main``.

Rank 0 writes ``OUT/<cell>.pt`` of each cell: the losses and gradient norms of the steps, and the whole weights after
the last, by name; or the one line that refuses the cell.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from callbacks import AtomicCheckpointIO, Throughput
from callbacks.checkpoint_writer import CheckpointWriter
from llm_modules import objectives
from llm_modules.base import LLMModule
from llm_modules.data import (
    ConversationDataModule,
    LabelledDataModule,
    PreferenceDataModule,
    PrepromptDataModule,
    TextDataModule,
)
from llm_modules.distillation import DistillationModule
from llm_modules.language_model import LanguageModelModule
from llm_modules.optimizers import MuonAdamW
from llm_modules.preference import PreferenceModule
from llm_modules.reward import RewardModule
from llm_modules.strategies import FSDP1Strategy, ShardedStrategy, ZeroStrategy
from llm_modules.zoo import Backbone

MODULES: dict[str, Any] = {
    "pretrain": LanguageModelModule,
    "sft": LanguageModelModule,
    "preference": PreferenceModule,
    "labelled": PreferenceModule,
    "reward": RewardModule,
    "distillation": DistillationModule,
}
DATA: dict[str, Any] = {
    "pretrain": TextDataModule,
    "sft": ConversationDataModule,
    "preference": PreferenceDataModule,
    "labelled": LabelledDataModule,
    "reward": PreferenceDataModule,
    "distillation": PrepromptDataModule,
}
ROWS_PER_STEP = 8
STEPS = 5
MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    },
    "qwen3": {
        "model_type": "qwen3", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": True,
    },
    "mixtral": {
        "model_type": "mixtral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "num_local_experts": 4,
    },
    "olmoe": {
        "model_type": "olmoe", "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "num_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "num_experts": 8,
        "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [1],
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256,
             "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
}  # fmt: skip
OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1),
    "muon": lambda groups: MuonAdamW(groups, lr=1e-3, weight_decay=0.1),
}
STRATEGIES: dict[str, Any] = {
    "single": lambda: "auto",
    "ddp": lambda: "ddp",
    "fsdp2": lambda: ShardedStrategy(),
    "fsdp2-keep": lambda: ShardedStrategy(reshard_after_forward=False),
    "tp": lambda: ShardedStrategy(tensor_parallel=max(2, int(os.environ.get("WORLD_SIZE", "1")))),
    "fsdp2-tp": lambda: ShardedStrategy(tensor_parallel=2),
    "context": lambda: ShardedStrategy(context_parallel=max(2, int(os.environ.get("WORLD_SIZE", "1")))),
    "fsdp2-context": lambda: ShardedStrategy(context_parallel=2),
    "tp-context": lambda: ShardedStrategy(context_parallel=2, tensor_parallel=2),
    "zero1": lambda: ZeroStrategy(stage=1),
    "zero2": lambda: ZeroStrategy(stage=2),
    "zero3": lambda: ZeroStrategy(stage=3),
    "zero2-offload": lambda: ZeroStrategy(stage=2, offload_optimizer=True),
    "zero3-offload": lambda: ZeroStrategy(stage=3, offload_optimizer=True, offload_parameters=True),
    "fsdp1": lambda: FSDP1Strategy(),
    "fsdp1-grad": lambda: FSDP1Strategy(sharding_strategy="SHARD_GRAD_OP"),
}
OPTIONS: dict[str, Any] = {
    "fsdp2-prefetch": lambda: ShardedStrategy(prefetch=2),
    "fsdp1-prefetch": lambda: FSDP1Strategy(forward_prefetch=True),
    "tp-prefetch": lambda: ShardedStrategy(tensor_parallel=2, prefetch=1),
    "zero": lambda **arguments: ZeroStrategy(**arguments),
}
"""Not in the tables: they change when something is done, not what."""


class Record(Callback):
    """The losses, norms and tokens of the steps, as they are logged (tokens from the second on)."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.tokens: list[float] = []
        self.balance: list[float] = []  # of mixtures of experts
        self.step = 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step > self.step:
            self.step = trainer.global_step
            self.losses.append(float(trainer.callback_metrics["train/loss"]))
            self.norms.append(float(trainer.callback_metrics["train/grad_norm"]))
            if (steps := trainer.callback_metrics.get("throughput/steps_per_second")) is not None:
                self.tokens.append(float(trainer.callback_metrics["throughput/tokens_per_second"] / steps))
            if "train/router_aux_loss" in trainer.callback_metrics:
                self.balance.append(float(trainer.callback_metrics["train/router_aux_loss"]))


def data_of(cell: dict[str, Any], batch_size: int) -> Any:
    kind = DATA[cell["stage"]]
    return kind(
        sources=[{"path": cell["rows"]}],
        batch_size=batch_size,
        packing=cell.get("packing", "batch"),
        validation_fraction=0.3 if cell.get("validate") else 0.0,
        tokenizer="builtin:bytes",
        sequence_length=128,
        seed=1,
        cache_dir=cell["cache"],
        **({} if kind is TextDataModule else {"chat_template": "chatml"}),
        **cell.get("data", {}),
    )


def train(cell: dict[str, Any], world: int) -> dict[str, Any]:
    arguments = cell.get("arguments", {})
    strategy = (STRATEGIES | OPTIONS)[cell["strategy"]](**arguments)
    # Ranks that share the same rows.
    sharing = strategy.tensor_parallel * strategy.context_parallel if isinstance(strategy, ShardedStrategy) else 1
    accumulate = 2
    config = MODELS[cell.get("model", "llama")] | cell.get("config", {})
    backbone = Backbone(config=config, **cell.get("backbone", {}))
    module: LLMModule = MODULES[cell["stage"]](
        backbone,
        optimizer=OPTIMIZERS[cell.get("optimizer", "adamw")],
        sequence_length=128,
        seed=1,
        **({"objective": getattr(objectives, cell["objective"])()} if "objective" in cell else {}),
    )
    data = data_of(cell, ROWS_PER_STEP // (accumulate * max(1, world // sharing)))
    record = Record()
    trainer = Trainer(
        accelerator="cpu",
        devices=world,
        strategy=strategy,
        max_steps=cell.get("steps", STEPS),
        accumulate_grad_batches=accumulate,
        gradient_clip_val=0.5,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        limit_val_batches=1.0 if cell.get("validate") else 0,
        plugins=[AtomicCheckpointIO()],
        callbacks=[Throughput(), record],
    )
    if cell.get("validate"):
        return {"losses": [trainer.validate(module, datamodule=data, verbose=False)[0]["val/loss"]]}
    trainer.fit(module, datamodule=data, ckpt_path=cell.get("resume"))
    if cell.get("save"):
        writer = CheckpointWriter(sharded=cell.get("sharded", False), asynchronous=False)
        writer.begin(trainer, cell["save"])
    swapped = Path(arguments["nvme_path"]) if "nvme_path" in arguments else None
    files = {str(f.relative_to(swapped)): f.stat().st_size for f in swapped.rglob("*.swp")} if swapped else {}
    parts = [p.ds_tensor for p in module.parameters() if hasattr(p, "ds_tensor")]
    absent = sum(part.ds_numel for part in parts if part.numel() < part.ds_numel)
    weights = trainer.strategy.lightning_module_state_dict()
    whole = {name: value.clone() for name, value in weights.items()}
    kept = {"losses": record.losses, "norms": record.norms, "tokens": record.tokens, "balance": record.balance}
    return kept | {"weights": whole, "files": files, "absent": absent}


def main(cells: list[dict[str, Any]], out: str) -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 or "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    for cell in cells:
        try:
            result: dict[str, Any] = train(cell, world)
        except ValueError as error:
            result = {"refused": str(error)}
        if int(os.environ.get("RANK", "0")) == 0:
            torch.save(result, Path(out) / f"{cell['name']}.pt")
            print(cell["name"], result.get("losses") or result["refused"], flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # gloo aborts a process that still listens to one that has gone
        torch.distributed.destroy_process_group()
