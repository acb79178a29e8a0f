"""The gradient of one optimizer step of a real run, as a user would start it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from llm_modules.data import ConversationDataModule, TextDataModule
from llm_modules.language_model import LanguageModelModule
from llm_modules.objectives import NextToken
from llm_modules.zoo import Backbone

LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip


class KeepGradients(Callback):
    """Copies the gradients of every optimizer step, as the optimizer would see them without clipping."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.losses: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        named = pl_module.named_parameters()
        self.steps.append({name: p.grad.detach().clone() for name, p in named if p.grad is not None})


def write_rows(folder: Path, stage: str, count: int = 8) -> Path:
    """Rows of very unequal lengths: a token mean over micro-batches or ranks is far from the mean over all."""
    words = "the quick brown fox jumps over the lazy dog and runs away from all of them".split()
    path = folder / f"{stage}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            text = " ".join(words[: 1 + (5 * i) % 14])
            user = {"role": "user", "content": " ".join(words[i % 5 :][: 2 + (3 * i) % 7])}
            messages = [user, {"role": "assistant", "content": f"{i} {text}"}]
            row = {"text": text + f" {i}"} if stage == "pretrain" else {"messages": messages}
            file.write(json.dumps(row) + "\n")
    return path


def run(settings: dict[str, Any], callbacks: Sequence[Callback] = ()) -> tuple[KeepGradients, Trainer]:
    """Trains ``settings["steps"]`` optimizer steps on the rows at ``settings["path"]``."""
    module = LanguageModelModule(
        Backbone(
            config=settings.get("model", LLAMA),
            adapter=settings.get("adapter"),
            activation_checkpointing=settings.get("activation_checkpointing", False),
            head=settings.get("head", "chunked"),
            head_chunk=7,
        ),
        objective=NextToken(**settings.get("objective", {})),
        sequence_length=settings.get("sequence_length", 128),
        seed=1,
    )
    common: dict[str, Any] = {
        "sources": [{"path": settings["path"]}],
        "batch_size": settings["batch_size"],
        "packing": settings["packing"],
        "validation_fraction": 0.0,
        "tokenizer": "builtin:bytes",
        "sequence_length": settings.get("sequence_length", 128),
        "seed": 1,
        "cache_dir": settings["cache"],
    }
    if settings["stage"] == "pretrain":
        data: Any = TextDataModule(**common)
    else:
        data = ConversationDataModule(**common, chat_template="chatml")
    gradients = KeepGradients()
    devices = settings.get("devices", 1)
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_steps=settings.get("steps", 1),
        accumulate_grad_batches=settings["accumulate"],
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        callbacks=[gradients, *callbacks],
    )
    trainer.fit(module, datamodule=data)
    return gradients, trainer


def save(settings: dict[str, Any], out: str) -> None:
    """For ranks: rank 0 saves ``{name: gradient}`` of each step, before clipping."""
    kept, trainer = run(settings)
    if trainer.is_global_zero:
        torch.save(kept.steps, out)
