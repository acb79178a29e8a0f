"""`recipes demo`: a language model's first life in minutes: tokenizer, pre-training, fine-tuning, answers, a report."""

from __future__ import annotations

import argparse
import csv
import json
import math
import resource
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_modules.data import TokenDataModule

FOLDER = Path("runs/demo")
"""What the recipes pretrain/demo and sft/demo name too."""

VOCABULARY = 4096

PERPLEXITY_SHARE = 1 / 3
"""Promised: the validation perplexity is at most this share of a unigram model's."""

ANSWER_LOSS_SHARE = 0.8
"""Promised: fine-tuning brings the loss on held-out answers down to this share of the base model's, or lower."""

FORMAT_SHARE = 0.9
"""Promised: so many of the held-out questions get an answer that ends its turn."""

MINUTES, MEMORY_GIB = 6.0, 6.0
"""Promised, on two cores."""

PROMPTS = {"arguments": 6, "optional": 4, "where": 4, "which": 4, "what": 6}
"""Held-out questions to answer, by kind."""

SHOWN = 5
"""Answers that the terminal shows, and the page before it is asked for more."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    steps = "optimizer steps of {}; default: the recipe's, or fewer where this machine would need too long"
    parser.add_argument("--pretrain_steps", type=int, metavar="N", help=steps.format("pre-training"))
    parser.add_argument("--sft_steps", type=int, metavar="N", help=steps.format("fine-tuning"))
    parser.add_argument(
        "--precision", choices=("bf16-mixed", "32-true"), help="default: bf16-mixed where this processor computes in it"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the demo; returns 0, or 1 where a promised number does not hold."""
    from recipes.demo_machine import choose_precision, describe_machine
    from recipes.processor import share_the_cores

    share_the_cores()
    demo = Demo()
    FOLDER.mkdir(parents=True, exist_ok=True)
    precision = args.precision or choose_precision()
    print(f"machine: {describe_machine()}; precision {precision}\n")
    demo.train_tokenizer()
    pretrain_steps, sft_steps = args.pretrain_steps, args.sft_steps
    if pretrain_steps is None and sft_steps is None:
        pretrain_steps, sft_steps = time_for(precision)
    demo.pretrain(precision, pretrain_steps)
    demo.finetune(precision, sft_steps)
    demo.answer()
    demo.finish()
    return 0 if all(number.holds for number in demo.numbers if number.binding) else 1


@dataclass
class Number:
    """One row of the table: what was promised, what was measured. Time depends on the machine and does not bind."""

    name: str
    measured: str
    promised: str
    holds: bool
    binding: bool = True


@dataclass
class Answer:
    """One held-out question, its answer in the documentation, and those of the model before and after fine-tuning."""

    question: str
    reference: str
    before: str
    after: str
    ended: bool


@dataclass
class Demo:
    """The state of one demo.

    Attributes:
        commands: (command as it can be typed, its seconds).
        numbers: rows of the table.
        runs: folders of the two training runs.
        answers: to the held-out questions.
    """

    commands: list[tuple[str, float]] = field(default_factory=list)
    numbers: list[Number] = field(default_factory=list)
    runs: list[Path] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def train_tokenizer(self) -> None:
        self.command(
            *("prepare", "tokenizer", "--source", "builtin:python-docs", "--vocab_size", str(VOCABULARY)),
            *("--out", str(FOLDER / "tokenizer"), "--overwrite"),
        )

    def pretrain(self, precision: str, steps: int | None) -> None:
        """The base model; its perplexity against that of a model that knows tokens' frequencies only."""
        flags = ["--trainer.precision", precision, *length(steps)]
        self.fit("pretrain/demo", flags)
        self.command("export", str(self.runs[-1]), str(FOLDER / "base"), "--which", "last", "--overwrite")
        perplexity = last_value(self.runs[-1] / "metrics.csv", "val/perplexity")
        unigram = unigram_perplexity(data_of("pretrain/demo"))
        self.numbers.append(
            Number(
                "perplexity on held-out modules",
                f"{perplexity:.1f}; unigram {unigram:.1f}",
                f"at most {unigram * PERPLEXITY_SHARE:.1f}",
                perplexity <= unigram * PERPLEXITY_SHARE,
            )
        )

    def finetune(self, precision: str, steps: int | None) -> None:
        """The chat model; its loss on held-out answers against the base model's."""
        flags = ["--trainer.precision", precision, *length(steps)]
        before = self.validate("sft/demo", ["--trainer.precision", precision])["val/loss"]
        self.fit("sft/demo", flags)
        self.command("export", str(self.runs[-1]), str(FOLDER / "chat"), "--which", "last", "--overwrite")
        after = last_value(self.runs[-1] / "metrics.csv", "val/loss")
        self.numbers.append(
            Number(
                "loss on held-out answers",
                f"{after:.3f}; before {before:.3f} ({after / before - 1:+.0%})",
                f"at most {before * ANSWER_LOSS_SHARE:.3f}",
                after <= before * ANSWER_LOSS_SHARE,
            )
        )

    def answer(self) -> None:
        """The same held-out questions, before and after."""
        questions = FOLDER / "questions.jsonl"
        write_questions(questions)
        rows: dict[str, list[dict[str, Any]]] = {}
        for model in ("base", "chat"):
            out = FOLDER / f"answers-{model}.jsonl"
            self.command(
                *("generate", "-m", str(FOLDER / model), "--file", str(questions), "--out", str(out)),
                *("--max_new_tokens", "64", "--batch_size", "24", "--overwrite"),
            )
            rows[model] = read_rows(out)
        for before, after in zip(rows["base"], rows["chat"], strict=True):
            ended = after["finish_reason"] == "stop" and bool(after["completion"].strip())
            question = after["prompt"][-1]["content"]
            self.answers.append(Answer(question, after["reference"], before["completion"], after["completion"], ended))
        count = sum(answer.ended for answer in self.answers)
        self.numbers.append(
            Number(
                "answers that end their turn",
                f"{count} of {len(self.answers)}",
                f"at least {FORMAT_SHARE:.0%}",
                count >= FORMAT_SHARE * len(self.answers),
            )
        )

    def finish(self) -> None:
        """The table, some answers, the page."""
        from recipes.demo_report import print_answers, print_table, write_page

        minutes, memory = (time.monotonic() - self.began) / 60, peak_memory_gib()
        self.numbers += [
            Number("peak memory", f"{memory:.2f} GiB", f"below {MEMORY_GIB:.0f} GiB", memory < MEMORY_GIB),
            Number(
                *("time", f"{minutes:.1f} minutes", f"at most {MINUTES:.0f} minutes on two idle cores"),
                holds=minutes <= MINUTES,
                binding=False,
            ),
        ]
        page = FOLDER / "report.html"
        write_page(page, self.runs, self.numbers, self.answers, self.commands, shown=SHOWN)
        print_answers(self.answers[:SHOWN])
        print_table(self.numbers)
        print(f"\nreport: {page}\ntalk to it: recipes generate -m {FOLDER / 'chat'}")

    # --- commands

    def command(self, *words: str) -> None:
        """Prints a command and runs it; what it exits with other than 0 ends the demo."""
        from recipes.__main__ import main

        self._say(words)
        began = time.monotonic()
        status = main(words)
        if status != 0:
            raise SystemExit(status)
        self.commands.append((shlex.join(("recipes", *words)), time.monotonic() - began))
        print(f"  {self.commands[-1][1]:.0f} s\n", flush=True)

    def fit(self, recipe: str, flags: Sequence[str]) -> None:
        self.command("fit", "-c", recipe, *flags)
        self.runs.append(newest_run(Path("runs") / recipe))

    def validate(self, recipe: str, flags: Sequence[str]) -> dict[str, float]:
        """`recipes validate`, of which the numbers are wanted here."""
        words = ("validate", "-c", recipe, *flags)
        self._say(words)
        began = time.monotonic()
        cli = built(recipe, flags)
        (numbers,) = cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
        self.commands.append((shlex.join(("recipes", *words)), time.monotonic() - began))
        print(f"  val/loss {numbers['val/loss']:.4f}; {self.commands[-1][1]:.0f} s\n", flush=True)
        return dict(numbers)

    def _say(self, words: Sequence[str]) -> None:
        print(f"$ {shlex.join(('recipes', *words))}", flush=True)


def time_for(precision: str) -> tuple[int | None, int | None]:
    """Steps of the two runs, by the time that one takes here."""
    from recipes.demo_machine import choose_steps, step_seconds

    cli = built("pretrain/demo")
    steps = choose_steps(step_seconds(cli.model, precision, cli.datamodule.batch_size))
    print(f"steps: {steps.reason}\n")
    return steps.pretrain, steps.sft


def length(steps: int | None) -> list[str]:
    """Flags for another length than the recipe's: validated at the end only, to save time."""
    if steps is None:
        return []
    return ["--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(steps)]


# --- measures -------------------------------------------------------------------------------------------------------


def built(recipe: str, flags: Sequence[str] = ()) -> Any:
    """Trainer, model and data of a recipe."""
    from recipes.checks import check_values
    from recipes.command_line import parse_command
    from recipes.compose import compose

    command = parse_command("validate", ["-c", recipe, *flags])
    composed = compose(command.configs, command.overrides)
    check_values(composed)

    from recipes.cli import RecipeCLI

    cli = RecipeCLI(composed)
    cli.instantiate()
    return cli


def data_of(recipe: str) -> TokenDataModule:
    """A recipe's data, prepared (from the cache, after a run)."""
    data: TokenDataModule = built(recipe).datamodule
    data.prepare_data()
    data.setup("fit")
    return data


def unigram_perplexity(data: TokenDataModule) -> float:
    """The validation perplexity of the model p(token) = (count in training + 1) / (tokens in training + vocabulary).

    Over exactly the targets that the language model's perplexity is taken over.
    """
    import numpy as np

    from llm_modules.batch import IGNORE_INDEX
    from llm_modules.logprobs import next_token_targets

    corpus = data.corpus
    counts = np.ones(len(data.prepared_tokenizer), dtype=np.int64)
    for document in corpus.documents["train"]:
        tokens, _ = corpus.rows.read(corpus.starts[document], corpus.stops[document])
        counts += np.bincount(tokens, minlength=len(counts))
    log_probabilities = np.log(counts / counts.sum())
    total, number = 0.0, 0
    for batch in data.val_dataloader():
        targets = next_token_targets(batch.labels, batch.position_ids)
        found = targets[targets != IGNORE_INDEX].numpy()
        total += float(log_probabilities[found].sum())
        number += len(found)
    return math.exp(-total / number)


def write_questions(path: Path) -> None:
    """Held-out questions, kind after kind, spread over the held-out modules, with the documentation's answers."""
    from llm_modules.data.python_docs import conversations

    kinds: dict[str, list[Any]] = {kind: [] for kind in PROMPTS}
    for conversation in conversations("validation"):
        kind = conversation["id"].rpartition("/")[2]
        if kind in kinds and len(conversation["messages"]) == 2:
            kinds[kind].append(conversation)
    rounds = range(max(PROMPTS.values()))
    chosen = [kinds[kind][len(kinds[kind]) * i // n] for i in rounds for kind, n in PROMPTS.items() if i < n]
    path.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def last_value(metrics: Path, column: str) -> float:
    """The last value of a column of metrics.csv."""
    with metrics.open(encoding="utf-8", newline="") as file:
        values = [row[column] for row in csv.DictReader(file) if row.get(column)]
    return float(values[-1])


def newest_run(folder: Path) -> Path:
    return max((path for path in folder.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))


def peak_memory_gib() -> float:
    """The largest that this process, or one of its children, has been."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes or KiB
    most = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return most * unit / 2**30
