"""Distillation by the command: it learns, goes on exactly, leaves a model; answers under a preprompt; mistakes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from recipes.__main__ import main

TINY = """{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2,
               num_key_value_heads: 1, max_position_embeddings: 256}"""
RECIPE = f"""\
tokenizer: builtin:bytes
sequence_length: 128
seed_everything: 3
model:
  class_path: llm_modules.DistillationModule
  init_args:
    backbone:
      config: {TINY}
    optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 1.0e-2, weight_decay: 0.0}}}}
data:
  class_path: llm_modules.data.ConversationDataModule
  init_args: {{sources: [{{path: rows.jsonl}}], chat_template: chatml, batch_size: 4, validation_fraction: 0.2}}
trainer: {{max_steps: 12, accelerator: cpu, devices: 1, log_every_n_steps: 1, val_check_interval: 12,
          check_val_every_n_epoch: null, enable_progress_bar: false}}
checkpoint: {{every_n_steps: 6, keep_last: 3}}
"""
CONTEXT = """\
data:
  class_path: llm_modules.data.PrepromptDataModule
  init_args: {preprompt: Count in French., sources: [{path: rows.jsonl}], chat_template: chatml, batch_size: 4,
              validation_fraction: 0.2}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write("rows.jsonl", [{"prompt": f"number {i}?", "completion": f"yes, {i}"} for i in range(60)])
    Path("kd.yaml").write_text(RECIPE)
    Path("context.yaml").write_text(CONTEXT)
    return tmp_path


def write(name: str, rows: list[dict[str, Any]]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def column(run: int, name: str) -> list[float]:
    with Path(f"runs/kd/{run}/metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def teacher(seed: int = 8) -> list[str]:
    """A model of another seed and size; the words that name it."""
    from llm_modules.language_model import LanguageModelModule
    from llm_modules.zoo import Backbone
    from tests.invariance.gradients import LLAMA

    module = LanguageModelModule(Backbone(config=LLAMA), sequence_length=128, seed=seed)
    module.configure_model()
    assert module.model is not None
    for parameter in module.model.parameters():
        parameter.data.mul_(3.0 if parameter.ndim > 1 else 1.0)
    module.export("teacher")
    return ["--model.teacher.source", "teacher"]


def test_a_student_learns_from_its_teacher_goes_on_exactly_and_leaves_a_model(
    capfd: pytest.CaptureFixture[str],
) -> None:
    from transformers import AutoModelForCausalLM

    words = teacher()
    assert main(["fit", "-c", "kd", *words]) == 0
    kl = column(0, "train/kl")
    assert column(0, "train/loss") == pytest.approx(kl, rel=1e-6)
    assert column(0, "val/kl")[0] < 0.5 * kl[0]
    assert column(0, "val/perplexity")[0] > column(0, "val/teacher_nll")[0] > 0
    AutoModelForCausalLM.from_pretrained("runs/kd/0/export")
    (checkpoint,) = Path("runs/kd/0/checkpoints").glob("step-*6.ckpt")
    assert main(["fit", "-c", "kd", *words, "--ckpt_path", str(checkpoint)]) == 0
    assert column(1, "train/loss") == column(0, "train/loss")[6:]
    teacher(seed=9)
    assert main(["fit", "-c", "kd", *words, "--ckpt_path", str(checkpoint)]) == 2
    assert "another one than when the run began: model.teacher.source was changed" in capfd.readouterr().err


def test_a_preprompt_is_taken_in_with_and_without_an_adapter(capfd: pytest.CaptureFixture[str]) -> None:
    teacher()  # which hears the preprompt, as a tiny model of random weights would not
    whole = ["-c", "context.yaml", "--model.backbone.source", "teacher", "--model.backbone.config", "null"]
    words = [*whole, "-c", "adapters/lora", "--model.optimizer.lr", "1e-3"]
    assert main(["fit", "-c", "kd", *whole, "--model.optimizer.lr", "1e-4"]) == 0
    assert main(["fit", "-c", "kd", *words]) == 0
    assert main(["fit", "-c", "kd", *words, "--model.reference", "copy"]) == 0
    for run in (0, 1):
        assert column(run, "train/kl")[-1] < 0.5 * column(run, "train/kl")[0]
    assert column(2, "train/loss") == pytest.approx(column(1, "train/loss"), abs=1e-6)
    (checkpoint,) = Path("runs/kd/1/checkpoints").glob("step-*6.ckpt")
    assert main(["fit", "-c", "kd", *words, "--ckpt_path", str(checkpoint)]) == 0
    assert column(3, "train/loss") == column(1, "train/loss")[6:]  # against the same base as before


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [[], ["-c", "adapters/lora"], ["--model.objective", "llm_modules.objectives.ReverseKL"]]
)
def test_the_gradient_does_not_depend_on_how_rows_are_cut(words: list[str]) -> None:
    assert main(["check", "invariance", "-c", "kd", "-c", "context.yaml", *words]) == 0


def test_answers_under_a_preprompt_are_written_without_it() -> None:
    from llm_modules.data.chat import conversation
    from llm_modules.data.sources import Row

    assert main(["fit", "-c", "kd", "-c", "context.yaml", "--trainer.max_steps", "2"]) == 0
    asked = [{"role": "system", "content": "short"}, {"role": "user", "content": "two"}]
    write("prompts.jsonl", [{"prompt": "one"}, {"prompt": asked}])
    flags = ["generate", "-m", "runs/kd/0", "--file", "prompts.jsonl", "--max_new_tokens", "5", "--logprobs"]
    Path("french.txt").write_text("Count in French.\n")
    for out, preprompt in (("a.jsonl", "Count in French."), ("b.jsonl", "french.txt"), ("c.jsonl", None)):
        assert main([*flags, "--out", out, *(["--preprompt", preprompt] if preprompt else [])]) == 0
    under, same, plain = rows("a.jsonl"), rows("b.jsonl"), rows("c.jsonl")
    assert under == same
    assert [row["prompt"] for row in under] == ["one", asked]
    longer = [row["prompt_tokens"] - other["prompt_tokens"] for row, other in zip(under, plain, strict=True)]
    assert longer == [len("?system\nCount in French.?\n"), len("Count in French.\n\n")]
    assert all(row["logprob"] != other["logprob"] for row, other in zip(under, plain, strict=True))
    assert conversation(Row(under[1] | {"completion": "ok"}, "a.jsonl", 2)).prompt() == asked  # what a recipe reads


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "model.teacher: there is none, and the data have no preprompt"),
        (["-c", "context.yaml", "--data.preprompt", "''"], "data.preprompt: empty; a text is asked for"),
        (["-c", "context.yaml", "--data.preprompt", "null"], "`data.init_args.preprompt` is None; allowed: a text"),
        (["-c", "context.yaml", "--data.preprompt", "no.txt"], "data.preprompt: no file 'no.txt'"),
        (["-c", "context.yaml", "--model.reference", "base"], "model.reference: base, but there is no adapter"),
        (
            ["-c", "context.yaml", "--sequence_length", "16"],
            "no token is trained (rows without labels: 60, longer than",
        ),
        (["TEACHER", "--model.reference", "copy"], "model.reference: copy, but there is a teacher"),
        (
            ["TEACHER", "--model.backbone.config.vocab_size", "512"],
            "model.teacher: its vocabulary has 320 rows, the stu",
        ),
        (["--model.teacher.source", "runs/none/export"], "model.teacher: backbone.source: "),
        (["TEACHER", "--tokenizer", "other"], "model.teacher: 'teacher' has another tokenizer"),
        (
            ["--model.objective", "llm_modules.objectives.ForwardKL", "--model.objective.temperature", "0"],
            "temperature: 0",
        ),
        (["--model.objective", "llm_modules.objectives.GeneralizedJSD", "--model.objective.beta", "1"], "beta: 1"),
    ],
)
def test_mistakes(words: list[str], line: str, capfd: pytest.CaptureFixture[str]) -> None:
    if "TEACHER" in words:
        words = [*teacher(), *words[1:]]
    if "other" in words:
        from llm_modules.tokenizer import byte_tokenizer

        tokenizer = byte_tokenizer()
        tokenizer.add_tokens(["<|more|>"])
        tokenizer.save_pretrained("other")
    assert main(["fit", "-c", "kd", *words]) == 2
    said = [text for text in capfd.readouterr().err.splitlines() if text.startswith("recipes: ")]
    assert len(said) == 1, said
    assert line in said[0]
    assert not list(Path("runs").rglob("metrics.csv"))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--preprompt", ""], "--preprompt: empty"),
        (["--preprompt", "a", "--system", "b"], "--system and --preprompt: one or the other"),
        (["--preprompt", "a", "--raw"], "--preprompt: needs a chat template"),
    ],
)
def test_mistakes_of_generate(words: list[str], line: str, capfd: pytest.CaptureFixture[str]) -> None:
    teacher()
    write("prompts.jsonl", [{"prompt": "one"}])
    assert main(["generate", "-m", "teacher", "--file", "prompts.jsonl", "--out", "a.jsonl", *words]) == 2
    assert line in capfd.readouterr().err
    assert not Path("a.jsonl").exists()
