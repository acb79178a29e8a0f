"""Floor 3: a policy that answers prompts, has its answers scored, and learns from them: reinforcement learning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from llm_modules.base import CHECKPOINT_KEY, LLMModule
from llm_modules.batch import ObjectiveOutput, Term
from llm_modules.evaluation.rewards import Reward
from llm_modules.generation import VLLM, Generator
from llm_modules.logprobs import score_batch
from llm_modules.objectives.policy import GRPO, PolicyObjective
from llm_modules.policy.answers import VALIDATION, Group, Respondent
from llm_modules.policy.checks import Reference, check_settings, check_start
from llm_modules.policy.critics import Critics
from llm_modules.policy.resuming import check_resume, described
from llm_modules.rollouts import PolicyBatch, PromptBatch, Rollouts, policy_batch
from llm_modules.strategies import spread
from llm_modules.strategies.together import together
from llm_modules.zoo import Backbone, CausalLM
from llm_modules.zoo.reference import as_reference, check_identity, identity, needs_copy, place_frozen


class PolicyModule(LLMModule):
    """Reinforcement learning: at the first micro-batch of an iteration the policy answers its prompts; all optimizer
    steps of the iteration learn from these answers.

    An iteration has ``data.batch_size`` prompts over all processes, ``group_size`` answers to each, and ``epochs *
    minibatches`` optimizer steps, each of which learns from its share of the prompts. What is sampled depends on the
    seed, the iteration and the prompt's place in it, not on processes or micro-batches.

    Args:
        backbone: the model: where it comes from and how it is built.
        rewards: what answers are worth, added up with their weights.
        objective: how answers become a loss; None: ``GRPO``.
        costs: what answers do harm, added up with their weights, for objectives that hold it under a limit.
        group_size: answers to a prompt.
        epochs: times that each answer is learned from in an iteration.
        minibatches: optimizer steps in each of these.
        dynamic_sampling: so many times ``data.batch_size / dynamic_sampling`` prompts are at hand in an iteration: they
            are answered until there are enough of which the rewards differ (arXiv 2503.14476); 1: all are taken. The
            others are not asked in this epoch. If fewer are found than ``minibatches``, some are in two of these steps.
        drop_unfinished: leave out answers that did not end by themselves.
        old_logprobs: of the policy that answered: ``recomputed`` as training computes them, or as they were in the
            ``rollout``, which saves a forward pass.
        generator: how answers are sampled; None: at temperature 1, half of sequence_length long at most.
        engine: what samples them; None: the model itself, by transformers.
        critic: the model that expects rewards, where the objective has one; None: the backbone, with a head of one
            number that is trained whole, and with an adapter of the same kind where the backbone has one.
        cost_critic: the same of costs; None: as ``critic``.
        reference: what the objective compares with, where it needs that: ``base``: the model without its adapter;
            ``copy``: a frozen copy of the model; ``auto``: the base where there is a new adapter that leaves it as
            it is, else a copy (also of an adapter that was trained before: ``backbone.adapter`` is its folder).
        optimizer: class of the optimizer (``class_path`` and its arguments).
        schedule: class of the learning-rate schedule, stepped once per optimizer step; None: constant.
        tokenizer: folder, hub id or ``builtin:bytes`` (set once, at the top of the recipe).
        sequence_length: longest prompt with an answer in tokens (set once, at the top of the recipe).
        seed: of random weights, dropout, and what is sampled (``seed_everything``).
    """

    answering = ("model", "critics")
    always = True

    def __init__(
        self,
        backbone: Backbone,
        rewards: list[Reward],
        objective: PolicyObjective | None = None,
        costs: list[Reward] | None = None,
        group_size: int = 8,
        epochs: int = 1,
        minibatches: int = 1,
        dynamic_sampling: int = 1,
        drop_unfinished: bool = False,
        old_logprobs: Literal["recomputed", "rollout"] = "recomputed",
        generator: Generator | None = None,
        engine: VLLM | None = None,
        critic: Backbone | None = None,
        cost_critic: Backbone | None = None,
        reference: Reference = "auto",
        optimizer: Callable[[Iterable], Optimizer] = AdamW,
        schedule: Callable[[Optimizer], LRScheduler] | None = None,
        tokenizer: str = "builtin:bytes",
        sequence_length: int = 512,
        seed: int = 0,
    ) -> None:
        super().__init__(backbone, optimizer, schedule, tokenizer, sequence_length, seed)
        self.objective = objective or GRPO()
        self.group_size, self.epochs, self.minibatches = group_size, epochs, minibatches
        self.dynamic_sampling, self.drop_unfinished = dynamic_sampling, drop_unfinished
        self.old_logprobs = old_logprobs
        self.generator = generator or Generator(strategy="sample", max_new_tokens=sequence_length // 2, batch_size=64)
        self.engine = engine
        self._respondent = Respondent(self.generator, rewards, costs or [], seed, engine)
        self.reference = reference
        check_settings(self, critic, cost_critic)
        own = {"reward": ("critic", critic or backbone), "cost": ("cost_critic", cost_critic or critic or backbone)}
        self.critics = Critics(dict(own[name] for name in self.objective.critics))
        # In a tuple, so that it is no submodule: neither trained, nor in a checkpoint.
        self._copy: tuple[CausalLM, ...] = ()
        self._copied = ""
        self._rollouts: Rollouts | None = None
        self._micro_batches: list[PolicyBatch] = []
        self._facts: dict[str, float] = {}
        self._layout = ""

    # --- building

    @property
    def updates(self) -> int:
        """Optimizer steps of an iteration."""
        return self.epochs * self.minibatches

    @property
    def iteration(self) -> int:
        return self.global_step // self.updates

    @property
    def all_rewards(self) -> list[Reward]:
        """Rewards and costs."""
        return [*self._respondent.rewards, *self._respondent.costs]

    @property
    def frozen_copies(self) -> int:
        """How many models are held beside the trained one, as far as that is known before any is built."""
        return int(self.objective.needs_reference and needs_copy(self.backbone.adapter, self.reference))

    def check_before_training(self, data: Any, precision: str) -> None:
        """Raises a ValueError for critics or a reference that cannot be had, before weights are loaded."""
        if self.objective.needs_reference:
            needs_copy(self.backbone.adapter, self.reference)
        self.critics.check(vocabulary=len(self.tokenizer), sequence_length=self.sequence_length, precision=precision)

    def configure_model(self) -> None:
        if self.model is not None:
            return
        built = {"sequence_length": self.sequence_length, **self._built_with()}
        self.check_before_training(None, built["precision"])
        self.critics.build(**built)  # before the policy: base.py asks then what kinds of parameters there are
        super().configure_model()
        assert self.model is not None
        if self.objective.needs_reference and needs_copy(self.backbone.adapter, self.reference):
            self._copy = (self.backbone.build(**built).requires_grad_(False).eval(),)
            self._copied = identity(self._copy[0])
            self._set_temperature(self._copy[0])
        models: list[Any] = [self.model, *self.critics]
        apart = "padded" if any(model.packing_problem for model in models) else "packed"
        self._layout = apart if any(model.sharing_problem for model in models) else "shared"

    def _spread(self) -> None:
        assert self.model is not None
        self._set_temperature(self.model)
        super()._spread()
        if self._device_mesh is not None:
            for critic in self.critics:
                spread(critic, self._device_mesh, self.trainer.strategy)

    def _set_temperature(self, model: CausalLM) -> None:
        model.head.transform = replace(model.head.transform, temperature=self.generator.temperature)

    def on_fit_start(self) -> None:
        self._start()
        check_start(self, self.trainer.datamodule)  # type: ignore[attr-defined]

    def on_validation_start(self) -> None:
        self._start()
        self.whole.fill(self)
        with self.whole.in_place(self), self.trainer.precision_plugin.forward_context():
            self._hand_over()

    def on_validation_end(self) -> None:
        self.whole.free()

    on_test_start, on_test_end = on_validation_start, on_validation_end

    def teardown(self, stage: str) -> None:
        if self.engine is not None:
            self.engine.close()

    def _hand_over(self) -> None:
        """The weights as they are now, to the engine; all ranks call it."""
        if (engine := self.engine) is not None:
            together(lambda: engine.take(self.model, self.tokenizer, self.generator, self.sequence_length))

    def _start(self) -> None:
        """What was made for one device goes to this one.

        Raises:
            ValueError: data of another kind.
        """
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(data, "longest_prompt"):
            raise ValueError(f"data: {type(data).__name__} gives no prompts; use llm_modules.data.PromptDataModule")
        room = self.sequence_length - data.longest
        if self.generator.max_new_tokens > room:
            raise ValueError(
                f"model.generator.max_new_tokens: {self.generator.max_new_tokens}, but a prompt of {data.longest} "
                f"tokens leaves {room} of sequence_length {self.sequence_length}; lower it, or data.longest_prompt"
            )
        for model in self._copy:
            place_frozen(model, self.trainer, self.device)
        for reward in self.all_rewards:
            if hasattr(reward, "bind"):
                reward.bind(self.tokenizer)
            if hasattr(reward, "device"):
                reward.device = self.device

    # --- an iteration

    def on_train_batch_start(self, batch: PromptBatch, batch_idx: int) -> None:
        if batch.update == 0 and batch.micro_step == 0:
            with self.whole.in_place(self), self.trainer.precision_plugin.forward_context():
                self._hand_over()
                self.seed_micro_step(0)  # for rewards with chance in them: what ran before changes nothing
                np.random.seed(torch.randint(2**31, ()).item())
                self._rollouts = self._roll_out(batch)

    def clipped_apart(self) -> dict[str, list[Tensor] | None]:
        """The policy and each critic: they share nothing, and a critic far off must not shrink the policy's step."""
        if not self.critics:
            return super().clipped_apart()
        assert self.model is not None
        names = ["", *(f"_{name}" for name in self.critics.backbones)]
        models: list[Any] = [self.model, *self.critics]
        return {name: [p for p in m.parameters() if p.requires_grad] for name, m in zip(names, models, strict=True)}

    def training_step(self, batch: PromptBatch, batch_idx: int) -> Tensor:
        accumulate = self.trainer.accumulate_grad_batches
        if batch.micro_step == 0:
            self._micro_batches = self._deal(batch.update, accumulate)
            if batch.update == self.updates - 1:
                self._rollouts = None  # a checkpoint after this step has no need of them
        made = self._micro_batches[batch.micro_step]
        batch.work = made.tokens()
        loss = super().training_step(made.apply(self._here), batch_idx)
        if batch.micro_step == accumulate - 1:
            self.log_dict(self._facts, on_step=True, on_epoch=False)
        return loss

    def objective_step(self, batch: Any) -> ObjectiveOutput:
        if isinstance(batch, PromptBatch):
            return self._measure(batch)
        logprobs = score_batch(self.model, batch).logprobs
        values = self.critics.values(batch) if self.critics else None
        if batch.old_logprobs is None:
            batch.old_logprobs = logprobs.detach()
        output = self.objective(batch, logprobs, values)
        # At an iteration's first step all of it is between how tokens are sampled and how they are trained.
        assert batch.sampled_logprobs is not None
        difference = (logprobs.detach() - batch.sampled_logprobs).abs().double()
        output.metrics["sampling_difference"] = (difference.sum(), "tokens")
        return output

    def _deal(self, update: int, accumulate: int) -> list[PolicyBatch]:
        """This rank's micro-batches of an optimizer step, with the counts of their window."""
        rollouts = self._rollouts
        if rollouts is None:
            raise ValueError("ckpt_path: the checkpoint holds no answers, though it was made inside of an iteration")
        learned = self.objective.select(rollouts)
        if self.drop_unfinished:
            learned = learned[rollouts.finished[learned]]
        epoch, part = divmod(update, self.minibatches)
        order = np.random.default_rng([self.seed, self.iteration, epoch]).permutation(len(rollouts.prompts))
        order = np.resize(order, max(len(order), self.minibatches))  # a step without a gradient would move by momentum
        prompts = torch.from_numpy(order).tensor_split(self.minibatches)[part]
        groups = [learned[rollouts.prompt_of[learned] == prompt] for prompt in prompts.tolist()]
        world, rank = self.replicas
        if self.objective.whole_groups:
            shares = torch.arange(len(groups)).tensor_split(accumulate * world)
            parts = [[groups[number] for number in share.tolist()] for share in shares]
            dealt = [torch.cat([learned[:0], *groups]) for groups in parts]
        else:
            dealt = list(torch.cat([learned[:0], *groups]).tensor_split(accumulate * world))
        made = [policy_batch(rollouts, answers, self._layout, self.sequence_length) for answers in dealt[rank::world]]
        counts = [batch.counts() for batch in made]
        window = {name: sum(count[name] for count in counts) for name in counts[0]}
        for micro_step, batch in enumerate(made):
            batch.window, batch.micro_step = window, micro_step
        return made

    # --- answers

    @property
    def _ranks(self) -> tuple[int, int]:
        """How many share the prompts, and which one this is: all, for each has its models whole."""
        return self.trainer.world_size, self.global_rank

    def _ask(self, batch: PromptBatch, places: Sequence[int], size: int, iteration: int) -> list[Group]:
        return self._respondent.answer(self.model, self.tokenizer, batch, places, size, iteration)

    def _roll_out(self, batch: PromptBatch) -> Rollouts:
        """The answers of an iteration, scored; the same on every rank."""

        def ask(places: Sequence[int]) -> list[Group]:
            return self._ask(batch, places, self.group_size, self.iteration)

        rollouts, given = self._respondent.roll_out(ask, batch, self._ranks, self.dynamic_sampling)
        self._score(rollouts)
        compares = self.group_size > 1 and not self.critics
        self._facts = self._respondent.describe(given, self.iteration, len(rollouts.prompts), compares)
        self._facts |= {f"rollout/{name}": value for name, value in self.objective.prepare(rollouts).items()}
        return rollouts

    @torch.no_grad()
    def _score(self, rollouts: Rollouts) -> None:
        """What the policy, the reference and the critics say of each token."""
        asked = {}
        if self.old_logprobs == "rollout":
            rollouts.old_logprobs = rollouts.sampled_logprobs
        elif self.updates > 1 or self.objective.reads_old_logprobs:
            asked["old_logprobs"] = lambda batch: score_batch(self.model, batch).logprobs
        if self.objective.needs_reference:
            asked["reference_logprobs"] = self._reference_logprobs
        if self.critics:
            asked["values"] = lambda batch: self.critics.values(batch)
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            for name, say in asked.items():
                setattr(rollouts, name, self._said(rollouts, say))
        finally:
            for module, training in modes:
                module.training = training

    def _said(self, rollouts: Rollouts, say: Callable[[PolicyBatch], Tensor]) -> Tensor:
        """Of all tokens, each rank computing a part."""
        world, rank = self._ranks
        size = -(-len(rollouts) // (self.minibatches * self.trainer.accumulate_grad_batches * world))

        def work() -> list[Tensor]:
            mine = torch.arange(len(rollouts)).tensor_split(world)[rank]
            batches = (policy_batch(rollouts, part, self._layout, self.sequence_length) for part in mine.split(size))
            return [say(batch.apply(self._here)).float().cpu() for batch in batches if batch.answers]

        return torch.cat([tensor for part in together(work) for tensor in part])

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)

    def _reference_logprobs(self, batch: PolicyBatch) -> Tensor:
        assert self.model is not None
        with as_reference(self.model, self._copy[0] if self._copy else None) as model:
            logprobs: Tensor = score_batch(model, batch).logprobs
        return logprobs

    # --- validation, checkpoints

    def _measure(self, batch: PromptBatch) -> ObjectiveOutput:
        """One answer to each prompt of validation, sampled as in training; the loss is the reward, negated."""
        with self.whole.in_place(self):
            sums = self._respondent.measure(self._ask(batch, range(len(batch.prompts)), 1, VALIDATION))
        found = {name: (self._exact(value), "prompts") for name, value in sums.items()}
        return ObjectiveOutput({"loss": Term(-found["reward"][0], "prompts")}, found)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[CHECKPOINT_KEY]["policy"] = {
            "objective": self.objective.state_dict(),
            "objective_is": described(self.objective),
            "rollouts": None if self._rollouts is None else self._rollouts.state(),
            "facts": self._facts,
            "critics": self.critics.state(),
            "steps": [self.epochs, self.minibatches],
            "reference": self._copied or None,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint[CHECKPOINT_KEY].get("policy")
        if saved is None:
            raise ValueError("ckpt_path: a checkpoint of another kind of module; export it and name the folder instead")
        if self._copied:
            check_identity(saved.get("reference"), self._copied)
        if check_resume(saved, self):
            self.objective.load_state_dict(saved["objective"])
        self._rollouts = None if saved["rollouts"] is None else Rollouts(**saved["rollouts"])
        self._facts = saved["facts"]
        self.critics.load_state(saved["critics"])
