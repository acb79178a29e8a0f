"""Floor 3: one forward pass a step: pre-training, supervised fine-tuning, safety fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from llm_modules.base import LLMModule
from llm_modules.batch import LabelledBatch, ObjectiveOutput, PreferenceBatch, TaughtBatch, TokenBatch, TokenScores
from llm_modules.generation import Generator
from llm_modules.logprobs import score_batch
from llm_modules.objectives.balance import LoadBalance
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
        self._balance = LoadBalance()

    def objective_step(self, batch: TokenBatch) -> ObjectiveOutput:
        assert self.model is not None
        if isinstance(batch, PreferenceBatch | LabelledBatch):
            pairs = "pairs of answers are for PreferenceModule and RewardModule"
            kind = pairs if isinstance(batch, PreferenceBatch) else "labelled answers are for PreferenceModule"
            raise ValueError(f"data: {kind}; a language model learns from ConversationDataModule or TextDataModule")
        if isinstance(batch, TaughtBatch):
            raise ValueError("data: a preprompt is for DistillationModule; fine-tuning reads ConversationDataModule")
        kinds = {"statistics": self.objective.needs_statistics, "uniform": self.objective.uniform}
        scores = score_batch(self.model, batch, **kinds)
        output = self.objective(scores)
        if scores.router_load is not None:
            self._add_balance(output, scores, batch)
        return output

    def _add_balance(self, output: ObjectiveOutput, scores: TokenScores, batch: TokenBatch) -> None:
        """The load-balancing loss of a mixture of experts; only logged where its coefficient is 0."""
        assert self.model is not None
        assert scores.router_load is not None
        assert scores.router_probability is not None
        assert self.model.routing is not None
        if "positions" not in batch.window:
            raise ValueError("data: batches do not count positions, over which the load-balancing loss is a mean")
        coefficient, top_k = self.model.routing
        load, first = self.sum_over_ranks(scores.router_load), batch.micro_step == 0
        term = self._balance.term(load, scores.router_probability, top_k, coefficient, first=first)
        if coefficient:
            output.terms["router_aux_loss"] = term
        else:
            output.metrics["router_aux_loss"] = (term.sum.detach(), term.count)
        if batch.micro_step == self.trainer.accumulate_grad_batches - 1:
            self.log("train/expert_load", self._balance.busiest(), on_step=True, on_epoch=False)
