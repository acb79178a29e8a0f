"""Floor 3: a student and its teacher, compared over the whole vocabulary: knowledge and context distillation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, get_args

from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from llm_modules.base import CHECKPOINT_KEY, LLMModule
from llm_modules.batch import ObjectiveOutput, PreferenceBatch, TaughtBatch, Teaching, TokenBatch
from llm_modules.generation import Generator
from llm_modules.logprobs import score_batch
from llm_modules.objectives.distillation import DistillationObjective, ForwardKL
from llm_modules.tokenizer import load_tokenizer
from llm_modules.zoo import Backbone, CausalLM
from llm_modules.zoo.reference import as_reference, base_logits, check_identity, identity, needs_copy, place_frozen

Reference = Literal["auto", "base", "copy"]


class DistillationModule(LLMModule):
    """Distillation: at each trained token the student comes nearer to its teacher's whole distribution.

    Knowledge distillation: a teacher of its own, on any data. Context distillation: no teacher; then it is the model as
    it begins, which reads a preprompt that the student does not (``PrepromptDataModule``).

    Args:
        backbone: the student: where it comes from and how it is built.
        teacher: a model with the same tokenizer; frozen, whole on each device. None: the student as it begins.
        objective: a function of the two models' log-probabilities; None: ``ForwardKL``.
        optimizer: class of the optimizer (``class_path`` and its arguments).
        schedule: class of the learning-rate schedule, stepped once per optimizer step; None: constant.
        reference: where there is no teacher, what is asked in its place: ``base``: the model without its adapter (no
            memory); ``copy``: a frozen copy of the model as the backbone describes it, whole on each device; ``auto``:
            the base where there is a new adapter that leaves it as it is, else a copy (also of an adapter that was
            trained before: ``backbone.adapter`` is its folder).
        generator: how `predict` generates; None: greedy.
        tokenizer: folder, hub id or ``builtin:bytes`` (set once, at the top of the recipe).
        sequence_length: longest row in tokens (set once, at the top of the recipe).
        seed: of random weights and dropout (``seed_everything``).
    """

    def __init__(
        self,
        backbone: Backbone,
        teacher: Backbone | None = None,
        objective: DistillationObjective | None = None,
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
        if teacher is not None and reference != "auto":
            raise ValueError(f"model.reference: {reference}, but there is a teacher; leave one of them out")
        self.teacher = teacher
        self.objective = objective or ForwardKL()
        self.reference = reference
        self.generator = generator or Generator()
        # In a tuple, so that it is no submodule: neither trained, nor spread, nor in a checkpoint.
        self._copy: tuple[CausalLM, ...] = ()
        self._copied = ""

    def configure_model(self) -> None:
        if self.model is not None:
            return
        data = getattr(self._trainer, "datamodule", None)
        self.check_before_training(data, self._built_with()["precision"])
        super().configure_model()
        assert self.model is not None
        if self.model.context is not None:
            raise ValueError("strategy.context_parallel: not for distillation; set it to 1")
        if self.teacher is not None or needs_copy(self.backbone.adapter, self.reference):
            frozen = self.teacher or self.backbone
            copy = frozen.build(sequence_length=self.sequence_length, **self._built_with())
            self._copy = (copy.requires_grad_(False).eval(),)
            self._copied = identity(copy)

    def check_before_training(self, data: Any, precision: str) -> None:
        """Find out before weights are loaded whether student, teacher and data go together.

        Args:
            data: the DataModule; None: not known.
            precision: the trainer's.

        Raises:
            ValueError: one line that says why not.
        """
        if self.teacher is None:
            if data is not None and not hasattr(data, "preprompt"):
                raise ValueError(
                    "model.teacher: there is none, and the data have no preprompt: the student would be compared with "
                    "itself; name a teacher, or use llm_modules.data.PrepromptDataModule"
                )
            return
        own = self.tokenizer
        known: dict[str, Any] = {"sequence_length": self.sequence_length, "precision": precision}
        student = self.backbone.final_config(vocabulary=len(own), **known)
        try:
            teacher = self.teacher.final_config(vocabulary=len(own), **known)
            source = self.teacher.source
            other = source is not None and load_tokenizer(source).get_vocab() != own.get_vocab()
        except ValueError as error:
            raise ValueError(f"model.teacher: {error}") from error
        if other:
            raise ValueError(
                f"model.teacher: {source!r} has another tokenizer; distillation compares probabilities of the same "
                "tokens: set `tokenizer` to the teacher's, for a student that knows it"
            )
        rows, wanted = (config.get_text_config().vocab_size for config in (student, teacher))
        if rows != wanted:
            raise ValueError(
                f"model.teacher: its vocabulary has {wanted:,} rows, the student's {rows:,}; they must be as many "
                f"(of a new student: --model.backbone.config.vocab_size {wanted})"
            )
        if getattr(data, "flat", False):
            self.teacher.check_packing(teacher)

    @property
    def frozen_copies(self) -> int:
        """How many models like the trained one are held beside it, as far as that is known before any is built."""
        return int(self.teacher is None and needs_copy(self.backbone.adapter, self.reference))

    def on_fit_start(self) -> None:
        self._place_copy()

    def on_validation_start(self) -> None:
        self._place_copy()

    def on_test_start(self) -> None:
        self._place_copy()

    def _place_copy(self) -> None:
        for copy in self._copy:
            place_frozen(copy, self.trainer, self.device)

    def objective_step(self, batch: TokenBatch) -> ObjectiveOutput:
        assert self.model is not None
        if isinstance(batch, PreferenceBatch):
            raise ValueError(
                "data: pairs of answers are for PreferenceModule and RewardModule; distillation reads texts"
            )
        asked = batch.teacher if isinstance(batch, TaughtBatch) else batch
        assert asked is not None
        copy = self._copy[0] if self._copy else None
        with as_reference(self.model, copy) as teacher:
            hidden = score_batch(teacher, asked, states=True)
        logits = copy.logits if copy is not None else partial(base_logits, self.model)
        teaching = Teaching(hidden, logits, self.objective.compare)
        return self.objective(score_batch(self.model, batch, teaching=teaching))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[CHECKPOINT_KEY]["reference"] = self._copied or None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self._copied:
            key = "model.backbone.source" if self.teacher is None else "model.teacher.source"
            check_identity(checkpoint[CHECKPOINT_KEY].get("reference"), self._copied, key)
