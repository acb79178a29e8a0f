"""How safe the model is while it learns: suites of requests, in one table of the run."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from callbacks.run_files import run_folder
from callbacks.safety_table import FILE_NAME, as_row, read_table, write_table
from callbacks.undisturbed import undisturbed
from llm_modules.evaluation.measurement import Measurement, Subject, Suite, share
from llm_modules.generation import Completion, Generator, Prompt
from llm_modules.strategies.together import together
from llm_modules.strategies.whole import whole_models


class SafetyEvaluation(Callback):
    """Runs suites before the first step, at validations, every n steps and at the end of a fit, and in
    `recipes validate`.

    A fit writes ``safety.csv`` into the run's folder, a row for each step and number: ``step``, ``name``, ``value``,
    ``low`` and ``high`` (the ends of its 95 % interval), ``count``. From it the report plots harm removed against
    helpfulness kept. The numbers are logged as ``safety/...``, too. Validate prints the table. Training is not
    disturbed: random states are put back. Ranks share the prompts; under a strategy that spreads the weights each has
    whole ones, for which there must be room, for as long as it answers (of quantized ones nothing is measured, which
    is said). Requests that a generator with ``too_long: truncate`` cuts to fit are counted for each suite, as
    ``NAME_truncated``, where there are any, and said.

    Args:
        suites: what is measured, by class_path: `llm_modules.evaluation.refusals.RefusalSuite`, or your own class with
            `measure(self, subject: Subject) -> list[Measurement]`.
        generator: how answers are generated; default: greedy, 64 new tokens, 32 prompts at a time.
        every_n_steps: optimizer steps between measurements; 0: not counted.
        at_validation: whether to measure at each validation.
    """

    asks_model = True

    def __init__(
        self,
        suites: list[Suite],
        generator: Generator | None = None,
        every_n_steps: int = 0,
        at_validation: bool = True,
    ) -> None:
        if not suites:
            raise ValueError("SafetyEvaluation.suites: empty; give at least one, by class_path")
        if every_n_steps < 0:
            raise ValueError(f"SafetyEvaluation.every_n_steps: {every_n_steps} is not allowed; 0 (off) or more")
        self.suites = suites
        self.generator = generator or Generator(max_new_tokens=64, batch_size=32, too_long="truncate")
        self.every_n_steps = every_n_steps
        self.at_validation = at_validation
        self._last_step = -1
        self._found: list[Measurement] = []  # at that step
        self._path: Path | None = None
        self._said: set[str] = set()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if getattr(pl_module, "scalar", False):
            raise ValueError("SafetyEvaluation: a reward model answers nothing; leave the callback out")
        self._said = set()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._path = run_folder(trainer) / FILE_NAME
        self._last_step, self._found = -1, []
        rows = read_table(self._path) if trainer.is_global_zero else []
        if (kept := [row for row in rows if int(row["step"]) <= trainer.global_step]) != rows:
            write_table(self._path, kept)
        if trainer.global_step == 0:
            self._measure(trainer, pl_module)
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        due = self.every_n_steps > 0 and trainer.global_step % self.every_n_steps == 0
        if due and not trainer.fit_loop._should_accumulate():
            self._to_loggers(trainer, self._measure(trainer, pl_module))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or (trainer.state.fn == "fit" and not self.at_validation):
            return
        self._measure(trainer, pl_module)
        for found in self._found:  # also where the step was measured before the validation, which is monitored
            pl_module.log(f"safety/{found.name}", found.value, on_step=False, on_epoch=True, rank_zero_only=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._to_loggers(trainer, self._measure(trainer, pl_module))

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[Measurement]:
        """Nothing where this step was measured, or cannot be."""
        step, fitting = trainer.global_step, trainer.state.fn == "fit"
        model: Any = pl_module
        if fitting and step == self._last_step:
            return []
        first, self._last_step, self._found = self._last_step < 0, step, []
        whole = whole_models(model)
        if (problem := whole.problem(model)) is not None:
            if first:
                rank_zero_warn(f"SafetyEvaluation: nothing is measured: {problem}")
            return []
        with whole.in_place(model), undisturbed(trainer, pl_module):
            found = self._asked(model, trainer)
        if twice := [name for name, count in Counter(m.name for m in found).items() if count > 1]:
            raise ValueError(
                f"SafetyEvaluation.suites: {twice[0]} is measured twice; give the suites names of their own"
            )
        if trainer.is_global_zero and fitting:
            assert self._path is not None
            rows = [as_row(step, measurement) for measurement in found]
            again = {(row["step"], row["name"]) for row in rows}  # of a run that is begun again
            write_table(self._path, [r for r in read_table(self._path) if (r["step"], r["name"]) not in again] + rows)
        elif trainer.is_global_zero:
            print("\n".join(lines(found)), file=sys.stderr, flush=True)
        self._found = found
        return found

    def _asked(self, model: Any, trainer: pl.Trainer) -> list[Measurement]:
        """What the suites measure, and of how many of their requests the beginning was cut off."""
        found, asked, cut = [], Counter[str](), Counter[str]()
        for suite in self.suites:
            generator = SharedGenerator(self.generator, trainer.world_size)
            found += suite.measure(Subject(model.model, model.tokenizer, generator))
            own = getattr(suite, "name", "")
            name = f"{own}_truncated" if own and isinstance(own, str) else "truncated"
            asked[name] += generator.asked
            cut[name] += generator.truncated
        for name in (name for name in cut if cut[name]):
            found.append(share(name, cut[name], asked[name]))
            if trainer.is_global_zero and name not in self._said:
                self._said.add(name)
                print(
                    f"SafetyEvaluation: {cut[name]:,} of {asked[name]:,} requests were cut to fit into the model's "
                    f"positions, and answered without their beginning ({name}); lower generator.max_new_tokens "
                    f"({self.generator.max_new_tokens}), or leave them out",
                    file=sys.stderr,
                    flush=True,
                )
        return found

    def _to_loggers(self, trainer: pl.Trainer, found: Sequence[Measurement]) -> None:
        """Into the row of the step that was just made. (``log`` would drop it between two steps that are logged.)"""
        for logger in trainer.loggers if found else []:
            logger.log_metrics({f"safety/{m.name}": m.value for m in found}, step=max(trainer.global_step - 1, 0))


class SharedGenerator:
    """A generator of which each rank generates a part, and all get everything.

    Args:
        generator: how.
        ranks: how many there are.

    Attributes:
        asked: prompts so far.
        truncated: of them those whose beginning was cut off.
    """

    def __init__(self, generator: Generator, ranks: int) -> None:
        self.generator = generator
        self.ranks = ranks
        self.asked = self.truncated = 0

    def generate(
        self, model: Any, tokenizer: Any, prompts: Sequence[Prompt], rows: Sequence[int] | None = None
    ) -> list[Completion]:
        """As ``Generator.generate``; all ranks call it with the same prompts."""
        rank = torch.distributed.get_rank() if self.ranks > 1 else 0
        numbers = list(range(len(prompts)) if rows is None else rows)

        def own() -> list[Completion]:
            return self.generator.generate(model, tokenizer, prompts[rank :: self.ranks], numbers[rank :: self.ranks])

        parts = together(own) if self.ranks > 1 else [own()]
        answers = [parts[place % self.ranks][place // self.ranks] for place in range(len(prompts))]
        self.asked += len(answers)
        self.truncated += sum(answer.truncated > 0 for answer in answers)
        return answers


def lines(found: Sequence[Measurement]) -> list[str]:
    """The measurements as people read them."""
    width = max((len(m.name) for m in found), default=0)
    return [f"{m.name:{width}}  {m.value:.4f}  [{m.low:.4f}, {m.high:.4f}]  of {m.count:,}" for m in found]
