"""What is measured on a GPU, in the order of worth: a run that is cut off has the first ones.

This module imports no library, so that every side can, in whatever environment it lives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["recipe", "trl", "litgpt"]
Group = Literal["pretrain", "lora", "qlora", "checkpointed", "strategies"]

RANK, ALPHA = 16, 32
"""Of LoRA, on every linear layer of the blocks, without dropout: configs/adapters/lora.yaml."""

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Case:
    """One process of one side.

    Attributes:
        name: in the table and in file names.
        kind: who trains.
        group: rows of a table; all of one group train the same tokens.
        model: of ``gpu_inputs.MODELS``.
        words: added to the recipe's command line.
        steps: optimizer steps, the first ``warmup`` of them untimed.
        limit: seconds that the process may take, loading included.
        needs: modules without which it is "not installed".
        on_cpu: whether it can run without a GPU at all.
    """

    name: str
    kind: Kind
    group: Group
    model: str
    words: tuple[str, ...] = ()
    steps: int = 10
    warmup: int = 3
    limit: float = 120.0
    needs: tuple[str, ...] = ()
    on_cpu: bool = True

    @property
    def quantized(self) -> bool:
        return self.group == "qlora"

    @property
    def checkpointed(self) -> bool:
        return self.group == "checkpointed"


_COMPILE = ("--model.init_args.backbone.compile", "true")
_LORA = ("-c", "adapters/lora", "--model.init_args.backbone.dtype", "bfloat16")
_CHECKPOINTED = ("--model.init_args.backbone.activation_checkpointing", "true")
_TRL = ("trl", "peft", "datasets")


def _pretrain(name: str, *words: str, limit: float, needs: tuple[str, ...] = ()) -> Case:
    return Case(name, "recipe", "pretrain", "1b", words, steps=20, warmup=5, limit=limit, needs=needs)


def _strategy(name: str, *needs: str) -> Case:
    words = () if name == "single" else ("-c", f"strategies/{name}", "--trainer.devices", "1")
    return Case(name, "recipe", "strategies", "small", words, steps=6, warmup=2, limit=100, needs=needs)


_ALL = (
    _pretrain("pretrain-1b", limit=110),
    _pretrain("pretrain-1b-compile", *_COMPILE, limit=150),
    _pretrain("pretrain-1b-fp8-compile", "-c", "precision/fp8", *_COMPILE, limit=150, needs=("torchao",)),
    Case("lora-8b-recipe", "recipe", "lora", "8b", _LORA, needs=("peft",)),
    Case("lora-8b-trl", "trl", "lora", "8b", needs=_TRL),
    Case("lora-8b-litgpt", "litgpt", "lora", "8b", needs=("litgpt",)),
    # The base is quantized on the processor: most of the time that this takes.
    Case(
        "qlora-8b-recipe", "recipe", "qlora", "8b", ("-c", "adapters/qlora"), limit=240, needs=("peft", "bitsandbytes")
    ),
    Case("qlora-8b-trl", "trl", "qlora", "8b", needs=(*_TRL, "bitsandbytes")),
    # Lightning's plugin for bitsandbytes, which it uses, wants a GPU.
    Case("qlora-8b-litgpt", "litgpt", "qlora", "8b", needs=("litgpt", "bitsandbytes"), on_cpu=False),
    _strategy("single"),
    _strategy("fsdp2"),
    _strategy("fsdp1"),
    _strategy("zero3", "deepspeed"),
    _strategy("zero2", "deepspeed"),
    _strategy("zero1", "deepspeed"),
    _pretrain("pretrain-1b-fp8", "-c", "precision/fp8", limit=110, needs=("torchao",)),
    # litgpt's has none on one device.
    Case("checkpointed-8b-recipe", "recipe", "checkpointed", "8b-batch", (*_LORA, *_CHECKPOINTED), needs=("peft",)),
    Case("checkpointed-8b-trl", "trl", "checkpointed", "8b-batch", needs=_TRL),
)

CASES = {case.name: case for case in _ALL}
