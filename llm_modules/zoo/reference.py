"""What a model was before it was trained, to be held against."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, get_args

import torch

from llm_modules.zoo.adapter_config import keeps_base
from llm_modules.zoo.backbone import Backbone
from llm_modules.zoo.causal_lm import CausalLM

ReferenceKind = Literal["auto", "base", "copy"]


class Reference:
    """The base under a model's adapter, or a frozen copy. No submodule: neither trained, nor spread, nor saved.

    Args:
        model: as it was just built.
        backbone: what it was built of.
        kind: ``base``: the model without its adapter; ``copy``: another one, whole on each device; ``auto``: the base
            where there is an adapter that leaves it as it is, else a copy.
        built_with: further arguments of ``Backbone.build``.

    Raises:
        ValueError: there is no base to go back to.
    """

    def __init__(self, model: CausalLM, backbone: Backbone, kind: ReferenceKind, **built_with: Any) -> None:
        if kind not in get_args(ReferenceKind):
            raise ValueError(f"model.reference: {kind!r} is not one of {', '.join(get_args(ReferenceKind))}")
        adapter = model.adapter
        kept = adapter is not None and keeps_base(adapter.config)
        if kind == "base" and not kept:
            why = "there is no adapter" if adapter is None else f"this {adapter.kind} changes what it is put into"
            raise ValueError(f"model.reference: base, but {why}; allowed: copy, auto")
        self.model, self.copy = model, None
        if kind == "copy" or not kept:
            self.copy = backbone.build(**built_with).requires_grad_(False).eval()

    def to(self, device: torch.device) -> None:
        if self.copy is not None:
            self.copy.to(device)

    @contextmanager
    def __call__(self) -> Iterator[CausalLM]:
        """The reference, in eval mode, without gradients."""
        model = self.copy or self.model
        training = model.training
        model.eval()
        try:
            with torch.no_grad(), nullcontext() if self.copy is not None else self.model.as_base():
                yield model
        finally:
            model.train(training)
