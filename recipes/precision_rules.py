"""Precisions that a device cannot do, or does silently as another one, said in one line before anything is built.

What Lightning itself refuses in a line (64-true under FSDP, 16-mixed under FSDP2, ...) is left to it.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from recipes.compose import Composed
from recipes.errors import UserError

_ALIASES = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}
_FP8 = (8, 9)  # compute capability from which on there are matrix products in fp8 (Ada, Hopper, Blackwell)


def check_precision(composed: Composed, *, training: bool) -> None:
    """Checks the trainer's precision, its precision plugins and fp8 against the device.

    Raises:
        UserError: what cannot be; one line a problem.
    """
    trainer = composed.values.get("trainer") or {}
    given = str(trainer.get("precision", "32-true"))
    precision, device = _ALIASES.get(given, given), _device(str(trainer.get("accelerator", "auto")))
    problems = []
    if reason := _wrong_precision(precision, device, training):
        place = composed.origin(("trainer", "precision"))
        problems.append(f"{place}: `trainer.precision` is {given}: {reason}")
    if reason := _wrong_plugin(trainer.get("plugins"), device):
        problems.append(f"{composed.origin(('trainer', 'plugins'))}: `trainer.plugins`: {reason}")
    backbone = ((composed.values.get("model") or {}).get("init_args") or {}).get("backbone")
    if isinstance(backbone, dict) and backbone.get("fp8"):
        tensor_parallel = _argument(trainer.get("strategy"), "tensor_parallel")
        if reason := _wrong_fp8(backbone["fp8"], precision, device, tensor_parallel):
            place = composed.origin(("model", "init_args", "backbone", "fp8"))
            problems.append(f"{place}: `model.backbone.fp8`: {reason}")
    if problems:
        raise UserError("\n".join(problems))


def _device(accelerator: str) -> str:
    """``cuda``, ``mps`` or ``cpu``: what a trainer with this accelerator computes on."""
    if accelerator in ("cpu", "mps"):
        return accelerator
    import torch

    if accelerator in ("gpu", "cuda") or torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _wrong_precision(precision: str, device: str, training: bool) -> str | None:
    if precision == "16-true" and device == "cpu" and training:
        return "training in fp16 alone becomes NaN at the second step on a CPU; write bf16-true or bf16-mixed"
    if precision == "16-mixed" and device == "cpu":
        return "a CPU has no fp16 autocast, and Lightning would use bf16-mixed in its place; write bf16-mixed"
    if precision == "64-true" and device == "mps":
        return "the mps device has no fp64; write 32-true, or trainer.accelerator cpu"
    if precision.startswith("transformer-engine"):
        if device != "cuda":
            return f"Transformer Engine needs a GPU, and this trains on {device}; write bf16-mixed"
        if find_spec("transformer_engine") is None:
            return "Transformer Engine is not installed; take -c precision/fp8 (torchao), or bf16-mixed"
    return None


def _wrong_plugin(plugins: Any, device: str) -> str | None:
    for plugin in plugins if isinstance(plugins, list) else [plugins]:
        name = plugin.get("class_path") if isinstance(plugin, dict) else plugin
        if str(name).rpartition(".")[2] == "BitsandbytesPrecision" and device != "cuda":
            return (
                f"BitsandbytesPrecision needs a GPU, and this trains on {device}; leave it out, and take "
                "-c adapters/lora -c precision/nf4 (or fp4, int8), which quantize on any device"
            )
    return None


def _wrong_fp8(kind: Any, precision: str, device: str, tensor_parallel: Any) -> str | None:
    if isinstance(tensor_parallel, int) and tensor_parallel > 1:
        return f"not with strategy.tensor_parallel {tensor_parallel}; take -c strategies/fsdp2 or ddp"
    if kind == "emulated":
        return None
    if precision not in ("bf16-mixed", "bf16-true"):
        return f"needs bf16 beside it, and trainer.precision is {precision}; write bf16-mixed"
    if device != "cuda":
        return f"needs a GPU with fp8 (Hopper or later), and this trains on {device}; write bf16-mixed, or fp8: false"
    import torch

    if torch.cuda.is_available() and torch.cuda.get_device_capability() < _FP8:
        name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        return (
            f"needs a GPU with fp8 (compute capability 8.9 or more: Hopper), and {name} has {major}.{minor}; "
            "write fp8: false"
        )
    return None


def _argument(chosen: Any, name: str) -> Any:
    return (chosen.get("init_args") or {}).get(name) if isinstance(chosen, dict) else None
