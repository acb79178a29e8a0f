"""Floor 3: one forward pass a step: pre-training, supervised fine-tuning, safety fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from llm_modules.base import LLMModule
from llm_modules.batch import ObjectiveOutput, TokenBatch
from llm_modules.generation import Generator
from llm_modules.logprobs import next_token_targets
from llm_modules.objectives.language import LanguageObjective, NextToken
from llm_modules.zoo import Backbone


class LanguageModelModule(LLMModule):
    """Language modelling; which tokens are trained is the data's affair, what is done with them the objective's.

    Args:
        backbone: the model: where it comes from and how it is built.
        objective: a function of the trained tokens' log-probabilities; None: ``NextToken``.
        optimizer: class of the optimizer (``class_path`` and its arguments).
        schedule: class of the learning-rate schedule, stepped once per optimizer step; None: constant.
        generator: how `predict` generates; None: greedy.
        tokenizer: folder, hub id or ``builtin:bytes`` (set once, at the top of the recipe).
        sequence_length: longest row in tokens (set once, at the top of the recipe).
        seed: of random weights and dropout (``seed_everything``).
    """

    def __init__(
        self,
        backbone: Backbone,
        objective: LanguageObjective | None = None,
        optimizer: Callable[[Iterable], Optimizer] = AdamW,
        schedule: Callable[[Optimizer], LRScheduler] | None = None,
        generator: Generator | None = None,
        tokenizer: str = "builtin:bytes",
        sequence_length: int = 512,
        seed: int = 0,
    ) -> None:
        super().__init__(backbone, optimizer, schedule, tokenizer, sequence_length, seed)
        self.objective = objective or NextToken()
        self.generator = generator or Generator()

    def objective_step(self, batch: TokenBatch) -> ObjectiveOutput:
        assert self.model is not None
        scores = self.model(
            batch.input_ids,
            batch.position_ids,
            next_token_targets(batch.labels, batch.position_ids),
            batch.document_offsets,
            batch.max_document,
            statistics=self.objective.needs_statistics,
            uniform=self.objective.uniform,
        )
        return self.objective(scores)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """Completions of ``batch["prompts"]``, as rows of the predictions file."""
        if getattr(self.trainer.strategy, "spreads_weights", False):
            raise ValueError("predict: not while the strategy spreads the weights; use -c strategies/ddp or single")
        return self.generator.predict(self.model, self.tokenizer, batch)
