"""Bottleneck adapters (Houlsby et al. 2019, arXiv 1902.00751), which peft lacks.

Behind each sub-layer's last projection, before the residual is added: ``y + up(activation(down(y)))`` (figure 2). They
are not linear in ``y``, so they cannot be merged into the base's weights.

Shape legend: H width of the projection's output, S bottleneck size.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
KIND = "BOTTLENECK"
"""``peft_type`` in the config file: peft has none of this name, and so refuses the folder instead of misreading it."""

_LAST_PROJECTIONS = ("o_proj", "down_proj", "c_proj", "dense", "fc2", "out_proj", "dense_4h_to_h")
"""What families call the last projection of attention and of the MLP."""

_ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh}


@dataclass
class BottleneckConfig:
    """What ``adapter:`` in a recipe says.

    Args:
        size: width of the bottleneck.
        activation: gelu, relu, silu or tanh.
        dropout: of the bottleneck's output, in [0, 1).
        target_modules: names of the projections that get an adapter; null: the last ones of attention and MLP.
        init_std: standard deviation of the first projection's weights (section 3.6 of the paper: 1e-2 or less). The
            second begins at zero, so that the model begins as the base (the paper: near it).
        base_model_name_or_path: where the base is; filled in on saving.
    """

    size: int = 64
    activation: str = "gelu"
    dropout: float = 0.0
    target_modules: list[str] | None = None
    init_std: float = 1e-2
    base_model_name_or_path: str | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size: {self.size} is not allowed; 1 or more")
        if self.activation not in _ACTIVATIONS:
            raise ValueError(f"activation: {self.activation!r} is not allowed; {', '.join(_ACTIVATIONS)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: {self.dropout} is not allowed; 0 or more and below 1")

    def to_dict(self) -> dict[str, Any]:
        return {"peft_type": KIND, **asdict(self)}


class BottleneckLayer(nn.Module):
    """A projection with an adapter behind it."""

    def __init__(self, base_layer: nn.Module, width: int, config: BottleneckConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._disable_adapters = False  # peft's name: see CausalLM.as_base
        self.adapter_down = nn.Linear(width, config.size)
        self.adapter_up = nn.Linear(config.size, width)
        self.activation = _ACTIVATIONS[config.activation]()
        self.dropout = nn.Dropout(config.dropout)
        nn.init.normal_(self.adapter_down.weight, std=config.init_std)
        for parameter in (self.adapter_down.bias, self.adapter_up.weight, self.adapter_up.bias):
            nn.init.zeros_(parameter)

    def forward(self, hidden: Tensor) -> Tensor:
        output_H = self.base_layer(hidden)
        if self._disable_adapters:
            return output_H
        inner_S = self.activation(self.adapter_down(output_H.to(self.adapter_down.weight.dtype)))
        return output_H + self.dropout(self.adapter_up(inner_S)).to(output_H.dtype)


def targets_of(hf: nn.Module, config: BottleneckConfig) -> list[str]:
    """Names of the modules that get an adapter."""
    wanted = config.target_modules or _LAST_PROJECTIONS
    return [
        name
        for name, module in hf.named_modules()
        if _width(module) is not None and any(name == w or name.endswith(f".{w}") for w in wanted)
    ]


def insert(hf: nn.Module, config: BottleneckConfig) -> None:
    """Put adapters into a model, in place, and freeze all else."""
    for parameter in hf.parameters():
        parameter.requires_grad_(False)
    for name in targets_of(hf, config):
        owner, _, leaf = name.rpartition(".")
        base = hf.get_submodule(name)
        width = _width(base)
        assert width is not None
        with torch.device(next(base.parameters()).device):
            layer = BottleneckLayer(base, width, config).train(base.training)
        setattr(hf.get_submodule(owner), leaf, layer)


def _width(module: nn.Module) -> int | None:
    """Output width of a projection; transformers' Conv1D calls it ``nf``."""
    if isinstance(module, nn.Linear):
        return module.out_features
    return module.nf if type(module).__name__ == "Conv1D" else None  # type: ignore[return-value]


def save(hf: nn.Module, config: BottleneckConfig, folder: Path) -> None:
    """Write the folder's two files."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(adapter_state(hf), folder / WEIGHTS_FILE, metadata={"format": "pt"})
    text = json.dumps(config.to_dict(), indent=2, sort_keys=True)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def adapter_state(hf: nn.Module) -> dict[str, Tensor]:
    """The adapters' weights by name."""
    return {
        f"{name}.{key}": value.detach().contiguous()
        for name, module in hf.named_modules()
        if isinstance(module, BottleneckLayer)
        for key, value in module.state_dict().items()
        if key.startswith("adapter_")
    }
