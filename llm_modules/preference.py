"""Floor 3: pairs of answers, or labelled ones, scored by the policy and by a reference: preference tuning."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from llm_modules.base import CHECKPOINT_KEY, LLMModule
from llm_modules.batch import (
    LabelledBatch,
    LabelledScores,
    ObjectiveOutput,
    PairScores,
    PreferenceBatch,
    TokenBatch,
)
from llm_modules.generation import Generator
from llm_modules.logprobs import score_batch, sums_by_answer
from llm_modules.objectives.labelled import LabelledObjective
from llm_modules.objectives.preference import DPO, PreferenceObjective
from llm_modules.zoo import Backbone, CausalLM
from llm_modules.zoo.reference import as_reference, check_identity, identity, needs_copy, place_frozen, still
from llm_modules.zoo.weights import weights_digest

Reference = Literal["auto", "base", "copy", "cached"]

SAY_EVERY = 10.0
"""Seconds between lines about long work."""


class PreferenceModule(LLMModule):
    """Preference tuning: makes chosen answers likelier than rejected ones, held to a reference by the objective.

    Args:
        backbone: the model: where it comes from and how it is built.
        objective: a function of the log-probabilities of pairs, or of labelled answers (``KTO``, ``BCO``); None:
            ``DPO``.
        optimizer: class of the optimizer (``class_path`` and its arguments).
        schedule: class of the learning-rate schedule, stepped once per optimizer step; None: constant.
        reference: what the objective compares with, where it needs that: ``base``: the model without its adapter (no
            memory); ``copy``: a frozen copy of the model as the backbone describes it, whole on each device;
            ``cached``: what such a copy says of all pairs, computed once before the first step and kept on disk beside
            the tokens (under the digest of its weights and config, so it is never another model's); ``auto``: the base
            where there is a new adapter that leaves it as it is, else a copy (also of an adapter that was trained
            before: ``backbone.adapter`` is its folder).
        log_entropy: log the entropy of the policy on the answers' tokens also in training, where it is one product with
            the head more; in validation it always is.
        generator: how `predict` generates; None: greedy.
        tokenizer: folder, hub id or ``builtin:bytes`` (set once, at the top of the recipe).
        sequence_length: longest prompt with an answer in tokens (set once, at the top of the recipe).
        seed: of random weights and dropout (``seed_everything``).
    """

    def __init__(
        self,
        backbone: Backbone,
        objective: PreferenceObjective | LabelledObjective | None = None,
        optimizer: Callable[[Iterable], Optimizer] = AdamW,
        schedule: Callable[[Optimizer], LRScheduler] | None = None,
        reference: Reference = "auto",
        log_entropy: bool = False,
        generator: Generator | None = None,
        tokenizer: str = "builtin:bytes",
        sequence_length: int = 512,
        seed: int = 0,
    ) -> None:
        super().__init__(backbone, optimizer, schedule, tokenizer, sequence_length, seed)
        if reference not in get_args(Reference):
            raise ValueError(f"model.reference: {reference!r} is not one of {', '.join(get_args(Reference))}")
        self.objective = objective or DPO()
        if reference == "cached" and isinstance(objective, LabelledObjective) and objective.needs_mismatched:
            raise ValueError(
                f"model.reference: cached, but {type(objective).__name__} compares answers under other prompts, which "
                "are others in each step; allowed: auto, base, copy"
            )
        self.reference = reference
        self.log_entropy = log_entropy
        self.generator = generator or Generator()
        # In a tuple, so that it is no submodule: neither trained, nor spread, nor in a checkpoint.
        self._copy: tuple[CausalLM, ...] = ()
        self._copied = ""
        self._cached: tuple[Any, Tensor] | None = None  # the DataModule, and what the reference says of its rows
        self._point: Tensor | float = 0.0
        self._rewards: Tensor | None = None
        self._held_out: list[tuple[LabelledScores, Mapping[str, float], Tensor]] = []

    @property
    def unread(self) -> list[str]:
        """What is said of settings that nothing reads."""
        if self.objective.needs_reference or self.reference == "auto":
            return []
        name = type(self.objective).__name__
        return [f"model.reference: {self.reference} is not read: {name} compares with no reference"]

    def check_before_training(self, data: Any, precision: str) -> None:
        """Raises a ValueError for a reference that cannot be had, before weights are loaded."""
        if self.objective.needs_reference:
            needs_copy(self.backbone.adapter, self.reference)

    def configure_model(self) -> None:
        built = self.model is not None
        super().configure_model()
        assert self.model is not None
        if built or not self.objective.needs_reference:
            return
        if needs_copy(self.backbone.adapter, self.reference):
            self._copy = (self._frozen(),)
            self._copied = identity(self._copy[0])

    def _frozen(self) -> CausalLM:
        """The model as it begins."""
        copy = self.backbone.build(sequence_length=self.sequence_length, **self._built_with())
        return copy.requires_grad_(False).eval()

    @property
    def frozen_copies(self) -> int:
        """How many models are held beside the trained one, as far as that is known before any is built."""
        kept = self.objective.needs_reference and self.reference != "cached"
        return int(kept and needs_copy(self.backbone.adapter, self.reference))

    def on_fit_start(self) -> None:
        self._place_copy()
        counts = getattr(getattr(self.trainer, "datamodule", None), "label_counts", None)
        if counts is not None and isinstance(self.objective, LabelledObjective):
            line = self.objective.balance(*counts())
            if line is not None and self.trainer.is_global_zero:
                print(line, file=sys.stderr)

    def on_validation_start(self) -> None:
        self._place_copy()

    def on_test_start(self) -> None:
        self._place_copy()

    def _place_copy(self) -> None:
        if self.reference == "cached" and self.objective.needs_reference:
            self._recall()
        elif self._copy:
            place_frozen(self._copy[0], self.trainer, self.device)

    def _recall(self) -> None:
        """What the reference says of the data at hand: kept on disk, or else computed."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if self._cached is not None and self._cached[0] is data:
            return
        if not hasattr(data, "pair_values"):
            raise ValueError(f"model.reference: cached, but {type(data).__name__} keeps nothing; allowed: copy, auto")
        copy = self._copy[0] if self._copy else self._frozen()  # given away when other data were scored
        identity = self._identity(copy)
        count, values = data.pair_values(identity)
        lacking = torch.tensor(float(values is None), device=self.device)  # on one node, maybe: then all compute
        if float(self.sum_over_ranks(lacking)):
            values = self._score_all(copy.to(self.device), data, count).cpu().numpy()
            if self.local_rank == 0:
                data.keep_pair_values(identity, values)
        self._cached, self._copy = (data, torch.from_numpy(values)), ()

    def _identity(self, copy: CausalLM) -> str:
        """All of a reference that its log-probabilities depend on."""
        built = [getattr(self.backbone, name) for name in ("attention", "fp8", "quantization")]
        built.append(None if copy.adapter is None else copy.adapter.description)  # a folder's config may change
        config = copy.hf.config.to_json_string(use_diff=False)
        return f"reference {weights_digest(copy)} {config} {built} {self.trainer.precision}"

    @torch.no_grad()
    def _score_all(self, copy: CausalLM, data: Any, count: int) -> Tensor:
        """(D, 2) what the reference says of each stored pair, or (D, 1) of each labelled answer, on all ranks; zero of
        those that are left out."""
        kind, width = ("answers", 1) if isinstance(self.objective, LabelledObjective) else ("pairs", 2)
        found = torch.zeros(count, width, dtype=torch.float64, device=self.device)
        began = said = time.monotonic()
        done = 0
        if self.trainer.is_global_zero:
            print(f"model.reference: scoring all {kind} once", file=sys.stderr)
        for batch in data.every_pair():
            moved = batch.apply(lambda tensor: tensor.to(self.device))
            moved = copy.computable(moved) if isinstance(moved, PreferenceBatch) else moved
            with self.trainer.precision_plugin.forward_context():
                sums, *_ = self._sums_of(copy, moved)
            found[batch.rows] = sums.view(-1, width)
            done += len(batch.rows) * self.replicas[0]
            if self.trainer.is_global_zero and time.monotonic() - said > SAY_EVERY:
                said = time.monotonic()
                print(f"model.reference: {done:,} {kind}, {done / (said - began):.1f} a second", file=sys.stderr)
        return self.sum_over_ranks(found)

    # --- a step

    def objective_step(self, batch: Any) -> ObjectiveOutput:
        assert self.model is not None
        if isinstance(self.objective, LabelledObjective):
            output = self._labelled_step(self.objective, batch)
        else:
            output = self.objective(self._pair_scores(self.model.computable(batch)))
        output = _loss_is_the_total(output, self.objective)
        for term in output.terms.values():
            term.sum = term.sum.float()  # which loss scales and strategies expect
        return output

    def _add_sums(self, output: ObjectiveOutput, batch: Any) -> None:
        """Of several terms also the total: what is minimized is what callbacks go by."""
        if "loss" not in output.terms:
            count = next(iter(output.terms.values())).count
            total = _total((term.weight, term.sum.detach(), self._window[term.count]) for term in output.terms.values())
            output.metrics["loss"] = (total * self._window[count], count)
        super()._add_sums(output, batch)

    def _pair_scores(self, batch: PreferenceBatch) -> PairScores:
        assert self.model is not None
        sums, tokens, entropy = self._sums_of(self.model, batch, self.log_entropy or not batch.window)
        scores = PairScores(sums[::2], sums[1::2], tokens[::2], tokens[1::2], entropy=entropy)
        if self.objective.needs_reference:
            reference = self._reference_sums(batch)
            scores = scores._replace(reference_chosen=reference[::2], reference_rejected=reference[1::2])
        return scores

    def _labelled_step(self, objective: LabelledObjective, batch: Any) -> ObjectiveOutput:
        """The point is the step's own: the first micro-batch brings what it is made of for the whole window."""
        batch = _labelled(objective, batch)
        if not batch.window:
            self._point = objective.point()
        elif batch.micro_step == 0:
            self._rewards = None
            self._point = self._point_of(objective, self._mismatched(objective, batch))
        scores = self._labelled_scores(batch)
        if batch.window:
            self._follow(objective, scores, last=batch.micro_step == self.trainer.accumulate_grad_batches - 1)
        return objective(scores, self._point)

    def _labelled_scores(self, batch: LabelledBatch) -> LabelledScores:
        assert self.model is not None
        sums, tokens, entropy = self._sums_of(self.model, batch, self.log_entropy or not batch.window)
        return LabelledScores(sums, self._reference_sums(batch), tokens, batch.desirable, entropy)

    def _point_of(self, objective: LabelledObjective, mismatched: Tensor) -> Tensor | float:
        """From (2,) log p - log p' of mismatched answers, summed over those of this rank, and their number."""
        if not objective.needs_mismatched:
            return objective.point()
        total, count = self.sum_over_ranks(mismatched)
        if count == 1:
            raise ValueError(
                f"data.batch_size: {type(objective).__name__} compares each answer with that to another prompt of its "
                "step, and there is 1; raise it, or trainer.accumulate_grad_batches"
            )
        return objective.point(total / count)

    def _mismatched(self, objective: LabelledObjective, batch: LabelledBatch) -> Tensor:
        found = torch.zeros(2, dtype=torch.float64, device=self.device)
        if objective.needs_mismatched:
            assert self.model is not None
            for part in batch.mismatched:
                with still(self.model):
                    own, *_ = self._sums_of(self.model, part)
                found[0] += (own - self._reference_sums(part)).sum()
                found[1] += len(part.rows)
        return found

    def _follow(self, objective: LabelledObjective, scores: LabelledScores, last: bool) -> None:
        """Gives the objective the rewards of the window, over all ranks, when it is over."""
        kinds = torch.stack([scores.desirable, ~scores.desirable]).double()
        sums = torch.cat([kinds @ objective.rewards(scores).detach(), kinds.sum(-1)])
        self._rewards = sums if self._rewards is None else self._rewards + sums
        if last and objective.follows:
            objective.follow(self.sum_over_ranks(self._rewards))

    def _sums_of(
        self, model: CausalLM, batch: TokenBatch, entropy: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(A,) log p(answer | prompt), of pairs the chosen and the rejected in turn, (A,) the answers' tokens, and ()
        the entropy summed over all of them, if asked for."""
        answers = 2 * batch.pairs if isinstance(batch, PreferenceBatch) else len(batch.rows)
        scores = score_batch(model, batch, entropy=entropy)
        sums, tokens = sums_by_answer(scores.logprobs, batch.answer_of(scores.index), answers)
        return sums, tokens, None if scores.entropy is None else scores.entropy.double().sum()

    def _reference_sums(self, batch: TokenBatch) -> Tensor:
        """(A,) as of ``_sums_of``."""
        assert self.model is not None
        if self._cached is not None:
            return self._cached[1][batch.rows].flatten().to(self.device)
        with as_reference(self.model, self._copy[0] if self._copy else None) as reference:
            return self._sums_of(reference, batch)[0]

    # --- what is held out

    def _evaluate(self, stage: str, batch: Any) -> None:
        """A point that is made of all that is held out is known when all of it was seen."""
        objective = self.objective
        if not (isinstance(objective, LabelledObjective) and objective.needs_mismatched):
            super()._evaluate(stage, batch)
        else:
            batch = _labelled(objective, batch)
            found = self._labelled_scores(batch), batch.counts(), self._mismatched(objective, batch)
            self._held_out.append(found)

    def _log_evaluation(self, stage: str) -> None:
        held_out, self._held_out = self._held_out, []
        if held_out:
            assert isinstance(self.objective, LabelledObjective)
            point = self._point_of(self.objective, torch.stack([mismatched for _, _, mismatched in held_out]).sum(0))
            for scores, counts, _ in held_out:
                output = _loss_is_the_total(self.objective(scores, point), self.objective)
                self._add_evaluation(stage, output, counts)
        self._add_total(stage)
        super()._log_evaluation(stage)

    def _add_total(self, stage: str) -> None:
        """As ``_add_sums``: the terms have denominators of their own, which are known of all ranks only now."""
        sums = self._validation.get(stage, {})
        parts = {name: name.split("|") for name in sums if not name.startswith("|")}
        if not parts or any(name == "loss" for name, _, _ in parts.values()):
            return
        names = sorted(name for name in sums if name.startswith("|"))
        counts = dict(zip(names, self.sum_over_ranks(torch.stack([sums[name] for name in names])), strict=True))
        terms = {key: (count, float(weight)) for key, (_, count, weight) in parts.items() if weight != "0"}
        total = _total((weight, sums[key], counts[f"|{count}|count"]) for key, (count, weight) in terms.items())
        count = "pairs" if "|pairs|count" in counts else "answers"
        sums[f"loss|{count}|0"] = total * counts[f"|{count}|count"]

    # --- the objective's state

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[CHECKPOINT_KEY]["reference"] = self._copied or None
        if isinstance(self.objective, LabelledObjective):
            checkpoint[CHECKPOINT_KEY]["objective"] = self.objective.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self._copied:
            check_identity(checkpoint[CHECKPOINT_KEY].get("reference"), self._copied)
        if isinstance(self.objective, LabelledObjective) and "objective" in checkpoint[CHECKPOINT_KEY]:
            self.objective.load_state(checkpoint[CHECKPOINT_KEY]["objective"])


def _loss_is_the_total(output: ObjectiveOutput, objective: object) -> ObjectiveOutput:
    """``loss`` is the name of what is minimized: a term of that name beside others is called ``preference``."""
    terms = output.terms
    if len(terms) == 1 and "loss" in terms:
        return output
    if {"loss", "preference"} <= terms.keys():
        name = f"{type(objective).__module__}.{type(objective).__qualname__}"
        raise ValueError(
            f"objective {name}: it has the terms loss and preference; loss is the total of all terms: give that term "
            "another name"
        )
    named = {"preference" if name == "loss" else name: term for name, term in terms.items()}
    return ObjectiveOutput(named, {name: metric for name, metric in output.metrics.items() if name != "loss"})


def _total(terms: Iterable[tuple[float, Tensor, Tensor]]) -> Tensor:
    """() from each term's weight, sum and count."""
    return torch.stack([weight * value.double() / count.double() for weight, value, count in terms]).sum()


def _labelled(objective: LabelledObjective, batch: Any) -> LabelledBatch:
    if not isinstance(batch, LabelledBatch):
        name = type(objective).__name__
        raise ValueError(
            f"data: {name} learns from labelled answers; use llm_modules.data.LabelledDataModule, as the recipe "
            "preference/kto-quickstart does (it takes pairs, too)"
        )
    return batch
