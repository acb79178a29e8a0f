"""Floor 3: pairs of answers, each given a score by a scalar head: reward and cost models."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from llm_modules.base import LLMModule
from llm_modules.batch import ObjectiveOutput, PreferenceBatch, RewardScores
from llm_modules.objectives.reward import BradleyTerry, RewardObjective
from llm_modules.zoo import Backbone
from llm_modules.zoo.adapter_config import adapter_config, unmergeable

BINS = 10
"""Of the calibration error, which is of probabilities from 0.5 to 1 and, the pair turned round, from 0 to 0.5."""

HISTOGRAM = 24
"""Bins of the histogram of scores, over four standard deviations to both sides of the mean; what is outside is in the
outermost."""


class RewardModule(LLMModule):
    """A reward model: a language model with a head of one number, which the better of two answers gets more of.

    What is exported opens with transformers' ``AutoModelForSequenceClassification``; its one logit is the score. With
    an adapter the head is trained whole beside it, and what is exported has the adapter merged into it.

    Args:
        backbone: the model: where it comes from and how it is built; a language model, or a reward model to go on with.
        objective: a function of the pairs' scores; None: ``BradleyTerry``.
        optimizer: class of the optimizer (``class_path`` and its arguments).
        schedule: class of the learning-rate schedule, stepped once per optimizer step; None: constant.
        tokenizer: folder, hub id or ``builtin:bytes`` (set once, at the top of the recipe).
        sequence_length: longest prompt with an answer in tokens (set once, at the top of the recipe).
        seed: of random weights (the head's, too) and dropout (``seed_everything``).
    """

    scalar = True
    """What the backbone is built with: a head of one number."""

    def __init__(
        self,
        backbone: Backbone,
        objective: RewardObjective | None = None,
        optimizer: Callable[[Iterable], Optimizer] = AdamW,
        schedule: Callable[[Optimizer], LRScheduler] | None = None,
        tokenizer: str = "builtin:bytes",
        sequence_length: int = 512,
        seed: int = 0,
    ) -> None:
        super().__init__(backbone, optimizer, schedule, tokenizer, sequence_length, seed)
        self.objective = objective or BradleyTerry()
        self._calibration: Any = None
        self._scores: list[Tensor] = []
        self.score_histogram: list[list[float]] = []
        """(low, high, chosen, rejected) of each bin: how many of the answers that were last held out it has."""

    def _built_with(self) -> dict[str, Any]:
        return super()._built_with() | {"scalar": self.scalar}

    def configure_model(self) -> None:
        self.check_before_training(None, "")
        super().configure_model()

    def check_before_training(self, data: Any, precision: str) -> None:
        """Raises a ValueError for an adapter that could not be merged into what is exported."""
        if self.backbone.adapter is None:
            return
        config = adapter_config(self.backbone.adapter)
        if reason := unmergeable(config):
            raise ValueError(
                f"backbone.adapter: {type(config).__name__} cannot be merged into the reward model that is exported: "
                f"{reason}; use -c adapters/lora"
            )

    def scores(self, batch: PreferenceBatch) -> RewardScores:
        """Of each answer, at its last token."""
        assert self.model is not None
        batch = self.model.computable(batch)
        scores: Tensor = self.model(
            batch.input_ids,
            batch.position_ids,
            batch.last,
            batch.document_offsets,
            batch.max_document,
            shared_keys=batch.shared_keys,
            key_offsets=batch.key_offsets,
        )
        pairs = scores[: 2 * batch.pairs].view(-1, 2)  # a batch of no pairs has a row that says nothing
        assert batch.values is not None or not batch.pairs
        return RewardScores(pairs[:, 0], pairs[:, 1], pairs.new_zeros(0, 3) if batch.values is None else batch.values)

    def objective_step(self, batch: PreferenceBatch) -> ObjectiveOutput:
        scores = self.scores(batch)
        if not self.training:
            self._calibrate(self.objective.better(scores).detach())
            self._scores.append(torch.stack([scores.chosen, scores.rejected]).detach().double())
        return self.objective(scores)

    def predict_step(self, batch: Any, batch_idx: int) -> list[dict[str, Any]]:
        raise ValueError("predict: a reward model answers nothing; `recipes validate` measures it")

    def export(
        self, folder: str | Path, info: dict[str, Any] | None = None, weights: dict[str, Tensor] | None = None
    ) -> None:
        super().export(folder, {"score": True, **(info or {})}, weights)

    def _calibrate(self, better: Tensor) -> None:
        """Every pair both ways round: the share of a bin's pairs that are right should be their probability."""
        from torchmetrics.classification import BinaryCalibrationError

        if self._calibration is None:  # in a tuple, so that it is no submodule of what is trained
            self._calibration = (BinaryCalibrationError(BINS),)
        probability = torch.cat([better, -better]).sigmoid()
        right = torch.cat([torch.ones_like(better), torch.zeros_like(better)]).long()
        self._calibration[0].to(better.device).update(probability, right)

    def _log_evaluation(self, stage: str) -> None:
        super()._log_evaluation(stage)
        if self._calibration is not None:
            self.log(f"{stage}/calibration_error", self._calibration[0].compute(), on_step=False, on_epoch=True)
            self._calibration = None
        if self._scores:
            scores, self._scores = torch.cat(self._scores, dim=1), []
            self.score_histogram = self._histogram(scores)

    def _histogram(self, scores: Tensor) -> list[list[float]]:
        """From (2, P) scores of this rank to the histogram of all."""
        moments = torch.stack([scores.sum(), scores.square().sum(), self._exact(scores.numel())])
        total, squares, count = self.sum_over_ranks(moments).tolist()
        mean = total / max(count, 1)
        reach = 4 * max(squares / max(count, 1) - mean**2, 1e-12) ** 0.5
        edges = torch.linspace(mean - reach, mean + reach, HISTOGRAM + 1, dtype=torch.float64, device=scores.device)
        places = torch.bucketize(scores, edges[1:-1])
        counts = torch.stack([torch.bincount(side, minlength=HISTOGRAM) for side in places]).double()
        chosen, rejected = self.sum_over_ranks(counts).tolist()
        lows, highs = edges[:-1].tolist(), edges[1:].tolist()
        return [list(row) for row in zip(lows, highs, chosen, rejected, strict=True)]
