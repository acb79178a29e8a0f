"""Whole models beside those that a strategy has spread, for forward passes that ranks do not make together."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn

from llm_modules.strategies.full_state import clean_name


class WholeModels:
    """Models of a LightningModule as they were before a strategy spread them, filled with its weights when asked.

    A forward pass of spread weights gathers them, so that all ranks have to make it together. To answer prompts a rank
    needs as many as its answers are long: it has a copy of its own, which costs the memory of the whole weights for as
    long as it is there. Where nothing is spread, nothing is done.

    Args:
        names: of the LightningModule's children.
    """

    def __init__(self, *names: str) -> None:
        self.names = names
        self._empty: nn.Module | None = None
        self._filled: Any = None

    def before_spreading(self, owner: nn.Module) -> None:
        self._empty = _without_weights(self._models(owner))

    def fill(self, owner: Any) -> None:
        """All ranks call it."""
        if self._empty is None:
            return
        weights = owner.trainer.strategy.whole_weights()
        whole = _without_weights(self._empty)
        buffers = {clean_name(name): b for name, b in self._models(owner).named_buffers(remove_duplicate=False)}
        made = {id(p): nn.Parameter(weights[name], requires_grad=False) for name, p in whole.named_parameters()}
        for place, module in whole.named_modules():
            for name, parameter in module._parameters.items():
                module._parameters[name] = None if parameter is None else made[id(parameter)]
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffers[f"{place}.{name}"]
        self._filled = whole

    def free(self) -> None:
        self._filled = None

    def problem(self, owner: Any) -> str | None:
        """Why the models cannot answer by themselves on a rank, or None."""
        if self._empty is not None or not getattr(owner.trainer.strategy, "spreads_weights", False):
            return None
        return "the strategy spreads weights that cannot be copied (quantized ones); use -c strategies/ddp or single"

    @contextmanager
    def in_place(self, owner: nn.Module) -> Iterator[None]:
        """Inside, they stand in the place of the spread ones; all ranks enter it, unless they are filled already."""
        if self._empty is None:
            yield
            return
        filled, spread = self._filled, self._models(owner)
        if filled is None:
            self.fill(owner)
        self._put(owner, self._filled)
        try:
            yield
        finally:
            self._put(owner, spread)
            self._filled = filled

    def _models(self, owner: nn.Module) -> nn.ModuleDict:
        return nn.ModuleDict({name: owner.get_submodule(name) for name in self.names})

    def _put(self, owner: nn.Module, models: nn.ModuleDict) -> None:
        for name in self.names:
            setattr(owner, name, models[name])


def _without_weights(models: nn.Module) -> nn.Module:
    """A copy with the same buffers, and parameters that take no memory (shared ones stay shared)."""
    known: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in models.parameters()
    }
    known |= {id(buffer): buffer for buffer in models.buffers()}
    scales = [getattr(module, "quant_state", None) for module in models.modules()]  # of bitsandbytes' layers
    return copy.deepcopy(models, known | {id(state): state for state in scales if state is not None})


def whole_models(module: Any) -> WholeModels:
    """Those of an ``Answering`` module; of another one such as do nothing, where nothing is spread."""
    found: WholeModels = getattr(module, "whole", None) or WholeModels("model")
    return found


class Answering:
    """What a LightningModule has that answers prompts: where a strategy spreads the weights, and something in the run
    asks it (a policy; `predict`; a callback with ``asks_model``), each rank makes a copy of its own for that.

    Attributes:
        answering: names of the models.
        always: whether training itself asks.
        whole: the copies, to be entered with ``whole.in_place(module)`` by all ranks.
    """

    answering: ClassVar[tuple[str, ...]] = ("model",)
    always: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.whole = WholeModels(*self.answering)

    def keep_whole(self) -> None:
        """Called when the models are built, before they are spread."""
        module: Any = self
        trainer = module._trainer
        spread = trainer is not None and getattr(trainer.strategy, "spreads_weights", False)
        if not spread or module.backbone.quantization is not None:
            return
        asked = self.always or trainer.state.fn == "predict"
        if asked or any(getattr(callback, "asks_model", False) for callback in trainer.callbacks):
            self.whole.before_spreading(module)

    def on_predict_start(self) -> None:
        self.whole.fill(self)

    def on_predict_end(self) -> None:
        self.whole.free()

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """Completions of ``batch["prompts"]``, as rows of the predictions file."""
        module: Any = self
        if (problem := self.whole.problem(self)) is not None:
            raise ValueError(f"predict: {problem}")
        with self.whole.in_place(module):
            rows: list[dict[str, Any]] = module.generator.predict(module.model, module.tokenizer, batch)
            return rows
