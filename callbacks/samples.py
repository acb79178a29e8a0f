"""What the model writes while it learns."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from callbacks.run_files import append_lines, cut_lines, run_folder
from callbacks.undisturbed import undisturbed
from llm_modules.generation import Generator
from llm_modules.strategies.whole import whole_models


class Samples(Callback):
    """Generates from the same prompts before the first step, after validations and every n steps, and at the end.

    Written to ``samples.jsonl`` in the run's folder (rows with ``step``, ``row``, ``prompt``, ``text``, ``finish``) and
    to TensorBoard. Training is not disturbed: random states are put back. All ranks generate, under a strategy
    that spreads the weights each with whole ones (for which there must be room, for that long); rank 0 writes.

    Args:
        prompts: texts to continue, or lists of chat messages (`{role, content}`) to answer.
        generator: how to generate; default: greedy, 64 new tokens.
        every_n_steps: optimizer steps between samples; 0: not counted.
        at_validation: whether to generate after each validation.
    """

    FILE_NAME = "samples.jsonl"
    asks_model = True

    def __init__(
        self,
        prompts: list[str | list[dict[str, Any]]],
        generator: Generator | None = None,
        every_n_steps: int = 0,
        at_validation: bool = True,
    ) -> None:
        if not prompts:
            raise ValueError("Samples.prompts: empty; give at least one text or list of messages")
        if every_n_steps < 0:
            raise ValueError(f"Samples.every_n_steps: {every_n_steps} is not allowed; 0 (off) or more")
        self.prompts = prompts
        self.generator = generator or Generator(max_new_tokens=64, too_long="truncate")
        self.every_n_steps = every_n_steps
        self.at_validation = at_validation
        self._last_step = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._path = run_folder(trainer) / self.FILE_NAME
        self._last_step = -1
        if trainer.global_step > 0:
            self._last_step = trainer.global_step
            if trainer.is_global_zero:
                cut_lines(self._path, trainer.global_step)
        else:
            self._sample(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        due = self.every_n_steps > 0 and trainer.global_step % self.every_n_steps == 0
        if due and not trainer.fit_loop._should_accumulate():
            self._sample(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.at_validation and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._sample(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._sample(trainer, pl_module)

    def _sample(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step = trainer.global_step
        if step == self._last_step:
            return
        model: Any = pl_module
        first, self._last_step = self._last_step < 0, step
        whole = whole_models(model)
        if (problem := whole.problem(model)) is not None:
            if first:
                rank_zero_warn(f"Samples: none are generated: {problem}")
            return
        with whole.in_place(model), undisturbed(trainer, pl_module):
            completions = self.generator.generate(model.model, model.tokenizer, self.prompts)
        if trainer.is_global_zero:
            rows = [
                {"step": step, "row": row, "prompt": prompt, "text": done.text, "finish": done.finish_reason}
                for row, (prompt, done) in enumerate(zip(self.prompts, completions, strict=True))
            ]
            append_lines(self._path, rows)
            _to_tensorboard(trainer, rows)


def _to_tensorboard(trainer: pl.Trainer, rows: list[dict[str, Any]]) -> None:
    for logger in trainer.loggers:
        writer: Any = getattr(logger, "experiment", None)
        if hasattr(writer, "add_text"):
            for row in rows:
                # Indented by four, Markdown shows it as it is.
                text = "\n".join(
                    "    " + line for line in f"{prompt_text(row['prompt'])}\n---\n{row['text']}".split("\n")
                )
                writer.add_text(f"samples/{row['row']}", text, row["step"])


def prompt_text(prompt: str | list[dict[str, Any]]) -> str:
    """A prompt as people read it."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
