"""The gradients that `recipes check gradients` gathers under one strategy after another, in one group of
processes, each of which calls ``main``: rank 0 writes ``OUT/<cell>.pt``, what ``KeepGradients`` keeps.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from llm_modules.data import TextDataModule
from llm_modules.language_model import LanguageModelModule
from llm_modules.strategies import ShardedStrategy
from llm_modules.zoo import Backbone
from recipes.gradient_run import KeepGradients, prepare
from tests.distributed.strategy_cells import MODELS, STRATEGIES

ROWS_PER_STEP = 8


def keep(cell: dict[str, Any], world: int, out: Path) -> None:
    strategy = STRATEGIES[cell["strategy"]]()
    tensor = strategy.tensor_parallel if isinstance(strategy, ShardedStrategy) else 1
    accumulate = cell.get("accumulate", 2)
    config = MODELS[cell.get("model", "llama")]
    module = LanguageModelModule(Backbone(config=config, **cell.get("backbone", {})), sequence_length=128, seed=1)
    prepare(module)
    data = TextDataModule(
        sources=[{"path": cell["rows"]}],
        batch_size=ROWS_PER_STEP // (accumulate * max(1, world // tensor)),
        packing="batch",
        validation_fraction=0.0,
        tokenizer="builtin:bytes",
        sequence_length=128,
        seed=1,
        cache_dir=cell["cache"],
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=world,
        strategy=strategy,
        max_steps=2,
        accumulate_grad_batches=accumulate,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        callbacks=[KeepGradients(out / f"{cell['name']}.pt")],
    )
    trainer.fit(module, datamodule=data)


def main(cells: list[dict[str, Any]], out: str) -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        torch.distributed.init_process_group("gloo")
    for cell in cells:
        keep(cell, world, Path(out))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # gloo aborts a process that still listens to one that has gone
        torch.distributed.destroy_process_group()
