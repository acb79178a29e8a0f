"""Floor 3: pairs of answers, scored by the policy and by a reference: preference tuning."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from llm_modules.base import LLMModule
from llm_modules.batch import ObjectiveOutput, PairScores, PreferenceBatch
from llm_modules.generation import Generator
from llm_modules.logprobs import next_token_targets, sums_by_answer
from llm_modules.objectives.preference import DPO, PreferenceObjective
from llm_modules.zoo import Backbone, CausalLM
from llm_modules.zoo.reference import as_reference, needs_copy
from llm_modules.zoo.weights import weights_digest

Reference = Literal["auto", "base", "copy", "cached"]

SAY_EVERY = 10.0
"""Seconds between lines about long work."""


class PreferenceModule(LLMModule):
    """Preference tuning: makes chosen answers likelier than rejected ones, held to a reference by the objective.

    Args:
        backbone: the model: where it comes from and how it is built.
        objective: a function of the pairs' log-probabilities; None: ``DPO``.
        optimizer: class of the optimizer (``class_path`` and its arguments).
        schedule: class of the learning-rate schedule, stepped once per optimizer step; None: constant.
        reference: what the objective compares with, where it needs that: ``base``: the model without its adapter (no
            memory); ``copy``: a frozen copy of the model as the backbone describes it, whole on each device;
            ``cached``: what such a copy says of all pairs, computed once before the first step and kept on disk beside
            the tokens (under the digest of its weights and config, so it is never another model's); ``auto``: the base
            where there is an adapter that leaves it as it is, else a copy.
        generator: how `predict` generates; None: greedy.
        tokenizer: folder, hub id or ``builtin:bytes`` (set once, at the top of the recipe).
        sequence_length: longest prompt with an answer in tokens (set once, at the top of the recipe).
        seed: of random weights and dropout (``seed_everything``).
    """

    def __init__(
        self,
        backbone: Backbone,
        objective: PreferenceObjective | None = None,
        optimizer: Callable[[Iterable], Optimizer] = AdamW,
        schedule: Callable[[Optimizer], LRScheduler] | None = None,
        reference: Reference = "auto",
        generator: Generator | None = None,
        tokenizer: str = "builtin:bytes",
        sequence_length: int = 512,
        seed: int = 0,
    ) -> None:
        super().__init__(backbone, optimizer, schedule, tokenizer, sequence_length, seed)
        if reference not in get_args(Reference):
            raise ValueError(f"model.reference: {reference!r} is not one of {', '.join(get_args(Reference))}")
        self.objective = objective or DPO()
        self.reference = reference
        self.generator = generator or Generator()
        # In a tuple, so that it is no submodule: neither trained, nor spread, nor in a checkpoint.
        self._copy: tuple[CausalLM, ...] = ()
        self._cached: Tensor | None = None

    def configure_model(self) -> None:
        built = self.model is not None
        super().configure_model()
        assert self.model is not None
        if built or not self.objective.needs_reference:
            return
        if needs_copy(self.model, self.reference):
            copy = self.backbone.build(sequence_length=self.sequence_length, **self._built_with())
            self._copy = (copy.requires_grad_(False).eval(),)

    @property
    def frozen_copies(self) -> int:
        """How many models are held beside the trained one, as far as that is known before any is built."""
        shared = self.reference != "copy" and self.backbone.adapter is not None
        return int(self.objective.needs_reference and not shared and self.reference != "cached")

    def on_fit_start(self) -> None:
        self._place_copy()

    def on_validation_start(self) -> None:
        self._place_copy()

    def on_test_start(self) -> None:
        self._place_copy()

    def _place_copy(self) -> None:
        if not self._copy:
            return
        if self.reference != "cached":
            self._copy[0].to(self.device)
            return
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(data, "pair_values"):
            raise ValueError(f"model.reference: cached, but {type(data).__name__} keeps nothing; allowed: copy, auto")
        identity = self._identity(self._copy[0])
        count, values = data.pair_values(identity)
        lacking = torch.tensor(float(values is None), device=self.device)  # on one node, maybe: then all compute
        if float(self.sum_over_ranks(lacking)):
            values = self._score_all(self._copy[0].to(self.device), data, count).cpu().numpy()
            if self.local_rank == 0:
                data.keep_pair_values(identity, values)
        self._cached, self._copy = torch.from_numpy(values), ()

    def _identity(self, copy: CausalLM) -> str:
        """All of a reference that its log-probabilities depend on."""
        built = [getattr(self.backbone, name) for name in ("attention", "fp8", "quantization", "adapter")]
        config = copy.hf.config.to_json_string(use_diff=False)
        return f"reference {weights_digest(copy)} {config} {built} {self.trainer.precision}"

    @torch.no_grad()
    def _score_all(self, copy: CausalLM, data: Any, count: int) -> Tensor:
        """(D, 2) what the reference says of each stored pair, on all ranks; zero of those that are left out."""
        found = torch.zeros(count, 2, dtype=torch.float64, device=self.device)
        began = said = time.monotonic()
        done = 0
        if self.trainer.is_global_zero:
            print("model.reference: scoring all pairs once", file=sys.stderr)
        for batch in data.every_pair():
            moved = batch.apply(lambda tensor: tensor.to(self.device))
            with self.trainer.precision_plugin.forward_context():
                sums, _ = self._sums_of(copy, copy.computable(moved))
            found[batch.rows] = sums[: 2 * batch.pairs].view(-1, 2)
            done += batch.pairs * self.replicas[0]
            if self.trainer.is_global_zero and time.monotonic() - said > SAY_EVERY:
                said = time.monotonic()
                print(f"model.reference: {done:,} pairs, {done / (said - began):.1f} a second", file=sys.stderr)
        return self.sum_over_ranks(found)

    def objective_step(self, batch: PreferenceBatch) -> ObjectiveOutput:
        assert self.model is not None
        batch = self.model.computable(batch)
        sums, tokens = self._sums_of(self.model, batch)
        scores = PairScores(sums[::2], sums[1::2], tokens[::2], tokens[1::2])
        if self.objective.needs_reference:
            reference = self._reference_sums(batch) if self._cached is None else self._cached_sums(batch)
            scores = scores._replace(reference_chosen=reference[::2], reference_rejected=reference[1::2])
        output = self.objective(scores)
        for term in output.terms.values():
            term.sum = term.sum.float()  # which loss scales and strategies expect
        return output

    def _sums_of(self, model: CausalLM, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        """(2P,) log p(answer | prompt), the chosen and the rejected in turn, and the answers' tokens."""
        scores = model(
            batch.input_ids,
            batch.position_ids,
            next_token_targets(batch.labels, batch.position_ids),
            batch.document_offsets,
            batch.max_document,
            lengths=batch.lengths,
            shared_keys=batch.shared_keys,
            key_offsets=batch.key_offsets,
        )
        return sums_by_answer(scores.logprobs, batch.answer_of(scores.index), 2 * batch.pairs)

    def _cached_sums(self, batch: PreferenceBatch) -> Tensor:
        assert self._cached is not None
        return self._cached[batch.rows].flatten().to(self.device)

    def _reference_sums(self, batch: PreferenceBatch) -> Tensor:
        assert self.model is not None
        with as_reference(self.model, self._copy[0] if self._copy else None) as reference:
            return self._sums_of(reference, batch)[0]

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """Completions of ``batch["prompts"]``, as rows of the predictions file."""
        if getattr(self.trainer.strategy, "spreads_weights", False):
            raise ValueError("predict: not while the strategy spreads the weights; use -c strategies/ddp or single")
        return self.generator.predict(self.model, self.tokenizer, batch)
