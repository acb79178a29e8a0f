"""Critics: models that expect, before each token of an answer, what the answer will get."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llm_modules.logprobs import next_token_targets
from llm_modules.rollouts import PolicyBatch
from llm_modules.zoo import Backbone, describe_difference
from llm_modules.zoo.adapter_config import adapter_config, kind_of


class Critics(nn.ModuleList):
    """One model of one number for each thing that is expected; empty until ``build``.

    Args:
        backbones: by the names that they have in a config (``critic``, ``cost_critic``), in the objective's order.
    """

    def __init__(self, backbones: Mapping[str, Backbone]) -> None:
        super().__init__()
        self.backbones = dict(backbones)

    def check(self, *, vocabulary: int, sequence_length: int, precision: str) -> None:
        """Find every mistake that can be found without weights. Arguments: as of ``Backbone.check``.

        Raises:
            ValueError: one line that names the critic.
        """
        for name, backbone in self.backbones.items():
            try:
                backbone.check(vocabulary=vocabulary, sequence_length=sequence_length, precision=precision)
            except ValueError as error:
                raise ValueError(f"model.{name}: {error}") from error
            if backbone.quantization is not None and backbone.adapter is None:
                raise ValueError(
                    f"model.{name}.quantization: {backbone.quantization} cannot be trained without an adapter; add "
                    "one, or set it to null"
                )
            if backbone.adapter is not None and kind_of(adapter_config(backbone.adapter)) == "ADALORA":
                raise ValueError(
                    f"model.{name}.adapter: AdaLoRA prunes the policy only; give model.{name} a backbone with another "
                    "adapter (peft.LoraConfig)"
                )

    def build(self, **built: Any) -> None:
        """Make the models. Arguments and errors: ``Backbone.build``."""
        self.extend(backbone.build(scalar=True, **built) for backbone in self.backbones.values())

    def values(self, batch: PolicyBatch) -> Tensor:
        """(M, C) what each of C critics expects before each of the answers' M tokens."""
        places = (next_token_targets(batch.labels, batch.position_ids).flatten() >= 0).nonzero().squeeze(-1)
        layout = (batch.document_offsets, batch.max_document)
        keys = {"shared_keys": batch.shared_keys, "key_offsets": batch.key_offsets}
        found = [critic(batch.input_ids, batch.position_ids, places, *layout, **keys) for critic in self]
        return torch.stack(found, dim=1)

    def state(self) -> list[dict[str, Any]]:
        """What a checkpoint must hold of each beside the trained weights."""
        models: list[Any] = list(self)
        return [
            {"model": model.description(), "adapter": model.adapter.state() if model.adapter is not None else None}
            for model in models
        ]

    def load_state(self, state: list[dict[str, Any]]) -> None:
        """Take back what ``state`` gave.

        Raises:
            ValueError: of other models.
        """
        for name, critic, saved in zip(self.backbones, self, state, strict=True):
            model: Any = critic
            if difference := describe_difference(saved["model"], model.description()):
                raise ValueError(f"ckpt_path: a checkpoint of another model.{name}: {difference}")
            if model.adapter is not None:
                model.adapter.load_state(saved["adapter"])
