"""What a model is and costs, known before any weight exists: parameters, FLOPs a token, peak memory of training.

Shape legend: B rows, T positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from llm_modules.zoo.memory import PeakMemory


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model without memory for its weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)


def parameter_count(model: nn.Module) -> int:
    """Number of parameters; tied ones count once."""
    return sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())


@dataclass(frozen=True)
class TokenFlops:
    """FLOPs of one token, a multiplication and an addition counting as two.

    As usual for model FLOPs (and in torch's counter) attention counts every position of the document, also those that
    causality hides; training is three forward passes; what is computed again to save memory does not count.

    Attributes:
        weights: of one forward pass, all matrices but the head.
        head: of one forward pass, for a token whose next token is trained.
        attention: of one forward pass, for each position of the document: one entry a layer.
        windows: the layers' sliding windows in positions, None where a layer has none.
        trained: share of the weights whose gradient is computed; with an adapter nearly none.
    """

    weights: float
    head: float
    attention: tuple[float, ...]
    windows: tuple[int | None, ...]
    trained: float = 1.0

    def forward(self, length: float, trained_share: float = 1.0) -> float:
        """One forward pass, for a token of a document of ``length`` tokens of which ``trained_share`` are trained."""
        seen = [length if window is None else min(length, window) for window in self.windows]
        scores = sum(cost * positions for cost, positions in zip(self.attention, seen, strict=True))
        return self.weights + self.head * trained_share + scores

    def training(self, length: float, trained_share: float = 1.0) -> float:
        """Forward and backward pass (twice the forward's; once for weights that are frozen)."""
        frozen = (1 - self.trained) * (self.weights + self.head * trained_share)
        return 3 * self.forward(length, trained_share) - frozen


def token_flops(model: PreTrainedModel) -> TokenFlops:
    """Counts the matrices of a model (also one on the meta device) and reads its heads from the config."""
    config = model.config.get_text_config()
    output = model.get_output_embeddings()
    skipped = {id(output.weight)}
    skipped |= {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0
    active = (getattr(config, "num_experts_per_tok", None) or experts) / experts if experts else 1.0
    weights = 0.0
    for parameter in {id(p): p for p in model.parameters()}.values():
        if id(parameter) in skipped:
            continue
        if parameter.ndim == 2:
            weights += 2 * parameter.numel()
        elif parameter.ndim == 3 and parameter.shape[0] == experts:
            weights += 2 * parameter.numel() * active
    layers = config.num_hidden_layers
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    sizes = (getattr(config, "qk_head_dim", None) or size) + (getattr(config, "v_head_dim", None) or size)
    return TokenFlops(
        weights=weights,
        head=2.0 * output.weight.numel(),
        attention=(2.0 * heads * sizes,) * layers,
        windows=windows(config, layers),
    )


def windows(config: PretrainedConfig, layers: int) -> tuple[int | None, ...]:
    """The layers' sliding windows in positions, None where a layer has none."""
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return (None,) * layers
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


@dataclass(frozen=True)
class ModelSummary:
    """What is said of a model before it is trained.

    Attributes:
        family: transformers' model type.
        parameters: number of parameters, tied ones once.
        embedding: those of them that are rows of the vocabulary (input and head).
        vocabulary: rows of the embedding.
        layers: decoder blocks.
        hidden: hidden size.
        positions: longest row that the model can take in tokens; None: unbounded.
        flops: FLOPs a token.
        sequence_length: longest row of the run in tokens.
        memory: peak memory of training; None where it was not asked for.
        trained: number of the parameters that are trained; None: all.
        linear: those that are weights of linear layers, beside the head.
    """

    family: str
    parameters: int
    embedding: int
    vocabulary: int
    layers: int
    hidden: int
    positions: int | None
    flops: TokenFlops
    sequence_length: int
    memory: PeakMemory | None = None
    trained: int | None = None
    linear: int = 0

    def __str__(self) -> str:
        """A few aligned lines."""
        training = self.flops.training(self.sequence_length)
        lines = [
            ("model", f"{self.family}, {self.layers} layers of {self.hidden}, {self.vocabulary:,} tokens"),
            ("parameters", f"{self.parameters:,} ({self.embedding:,} of the vocabulary)"),
            ("FLOPs", f"{si(training)} a trained token, at documents of {self.sequence_length:,} tokens"),
        ]
        if self.trained is not None:
            lines.insert(2, ("trained", f"{self.trained:,} ({self.trained / self.parameters:.2%})"))
        if self.memory is not None:
            lines += self.memory.lines()
        return "\n".join(f"{name:<11} {text}" for name, text in lines)


def si(number: float) -> str:
    """``1.23 G``: three digits and a decimal prefix."""
    for limit, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g} {prefix}"
    return f"{number:.3g}"


def narrowed_layers(model: PreTrainedModel) -> list[nn.Linear]:
    """Layers whose weights autocast narrows, and nobody else reads: all linear ones whose weight is not the head's."""
    kept = {id(p) for m in (model.get_input_embeddings(), model.get_output_embeddings()) for p in m.parameters()}
    return [module for module in model.modules() if type(module) is nn.Linear and id(module.weight) not in kept]


def summarize(config: PretrainedConfig, *, sequence_length: int) -> ModelSummary:
    """Parameters and FLOPs of a config with its final vocabulary, from a model on the meta device."""
    model, text = meta_model(config), config.get_text_config()
    rows = {
        id(p): p
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
        for p in module.parameters(recurse=False)
    }
    return ModelSummary(
        family=config.model_type,
        parameters=parameter_count(model),
        embedding=sum(p.numel() for p in rows.values()),
        vocabulary=len(model.get_input_embeddings().weight),  # type: ignore[arg-type]
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        positions=getattr(text, "max_position_embeddings", None),
        flops=token_flops(model),
        sequence_length=sequence_length,
        linear=sum(layer.weight.numel() for layer in narrowed_layers(model)),
    )
