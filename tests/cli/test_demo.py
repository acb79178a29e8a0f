"""The demo: its measures by hand, its page, and a short run of the whole."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from recipes import demo, demo_machine
from recipes.__main__ import main
from recipes.demo import Answer, Demo, Number, length, unigram_perplexity, write_questions
from recipes.demo_report import print_table, write_page


def text_data(tmp_path: Path, train: list[str], validation: list[str]) -> Any:
    from llm_modules.data import Source, TextDataModule

    for name, rows in (("train", train), ("validation", validation)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    data = TextDataModule(
        sources=[Source(str(tmp_path / "train.jsonl"))],
        validation_sources=[Source(str(tmp_path / "validation.jsonl"))],
        tokenizer="builtin:bytes",
        sequence_length=16,
        batch_size=2,
    )
    data.prepare_data()
    data.setup("fit")
    return data


def test_unigram_perplexity_by_hand(tmp_path: Path) -> None:
    """Counts of the training bytes plus one, over all targets: each document's first token is none, its end is one."""
    train, validation = ["aab", "abc"], ["aba"]
    data = text_data(tmp_path, train, validation)
    end = "<end>"
    counts = Counter([*"aab", end, *"abc", end])
    total, vocabulary = sum(counts.values()), 260
    targets = ["b", "a", end]
    loss = -sum(math.log((counts[target] + 1) / (total + vocabulary)) for target in targets) / len(targets)
    assert unigram_perplexity(data) == pytest.approx(math.exp(loss), rel=1e-9)


def test_questions_are_held_out_of_every_kind_and_have_answers(tmp_path: Path) -> None:
    from llm_modules.data.python_docs import conversations

    write_questions(tmp_path / "questions.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert Counter(row["id"].rpartition("/")[2] for row in rows) == Counter(demo.PROMPTS)
    assert len({row["id"] for row in rows}) == len(rows)
    assert {row["id"] for row in rows} <= {row["id"] for row in conversations("validation")}
    assert all([m["role"] for m in row["messages"]] == ["user", "assistant"] for row in rows)


def test_length_is_validated_at_its_end() -> None:
    assert length(None) == []
    assert length(30) == ["--trainer.max_steps", "30", "--trainer.val_check_interval", "30"]


def test_a_slow_machine_gets_fewer_steps() -> None:
    machine = demo_machine
    fast = machine.choose_steps(0.01)
    assert (fast.pretrain, fast.sft) == (None, None)
    for seconds in (0.4, 0.7):
        slow = machine.choose_steps(seconds)
        assert slow.pretrain is not None
        assert slow.sft is not None
        steps = slow.pretrain + slow.sft * machine.SFT_STEP + machine.VALIDATION_STEPS
        assert steps * seconds * machine.STEP_FACTOR == pytest.approx(machine.BUDGET_SECONDS, rel=0.02)
    slowest = machine.choose_steps(60)
    assert slowest.pretrain == machine.PRETRAIN_STEPS * machine.FEWEST_PRETRAIN
    assert slowest.sft == machine.SFT_STEPS * machine.FEWEST_SFT


def test_the_steps_are_those_of_the_recipes() -> None:
    from recipes.compose import compose

    for recipe, steps in (
        ("pretrain/demo", demo_machine.PRETRAIN_STEPS),
        ("sft/demo", demo_machine.SFT_STEPS),
    ):
        assert compose([recipe]).values["trainer"]["max_steps"] == steps


def test_a_step_is_timed(tmp_path: Path) -> None:
    from llm_modules import LanguageModelModule
    from llm_modules.zoo import Backbone

    tiny = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    backbone = Backbone(config={"model_type": "llama", "num_key_value_heads": 1, "vocab_size": 1024, **tiny})
    module = LanguageModelModule(backbone=backbone, tokenizer="builtin:bytes", sequence_length=16, seed=0)
    began = time.perf_counter()
    seconds = demo_machine.step_seconds(module, "32-true", rows=2)
    assert 0 < seconds < time.perf_counter() - began


def test_time_does_not_bind_but_the_rest_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "time_for", lambda precision: (None, None))
    for name in ("pretrain", "finetune"):
        monkeypatch.setattr(Demo, name, lambda self, precision, steps: None)
    for name in ("train_tokenizer", "answer"):
        monkeypatch.setattr(Demo, name, lambda self: None)
    for numbers, status in (
        ([Number("time", "9", "6", holds=False, binding=False)], 0),
        ([Number("loss", "1", "2", holds=True)], 0),
        ([Number("loss", "2", "1", holds=False)], 1),
    ):
        monkeypatch.setattr(Demo, "finish", lambda self, numbers=numbers: self.numbers.extend(numbers))
        assert main(["demo"]) == status


def test_table_says_what_does_not_hold(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([Number("a", "1", "at most 2", holds=True), Number("long name", "3", "at most 2", holds=False)])
    assert capsys.readouterr().out.splitlines() == [
        "a          1  at most 2  holds",
        "long name  3  at most 2  DOES NOT HOLD",
    ]


def test_page_shows_all_and_executes_nothing_of_it(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_text("step,time,train/loss\n0,1.0,2.5\n1,2.0,2.0\n")
    answer = Answer("<b>What</b>?", "documented", "before <script>alert(1)</script>", "after", ended=True)
    number = Number("perplexity", "<i>3</i>", "at most 4", holds=True)
    page = tmp_path / "report.html"
    write_page(page, [tmp_path / "one", tmp_path / "two"], [number], [answer], [("recipes fit -c x", 3.2)], shown=1)
    text = page.read_text()
    for shown in (
        "&lt;b&gt;What&lt;/b&gt;?",
        "before &lt;script&gt;",
        "&lt;i&gt;3&lt;/i&gt;",
        "recipes fit -c x  # 3 s",
    ):
        assert shown in text
    assert "<script>alert" not in text
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")


@pytest.mark.slow
def test_the_whole_of_it_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A few steps: everything is made and measured, and a model that has learned nothing is found out."""
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--pretrain_steps", "2", "--sft_steps", "2", "--precision", "32-true"]) == 1
    out = capsys.readouterr().out
    commands = [line.removeprefix("$ ") for line in out.splitlines() if line.startswith("$ ")]
    assert [command.split()[1] for command in commands] == [
        *("prepare", "fit", "export", "validate", "fit", "export", "generate", "generate")
    ]
    assert "DOES NOT HOLD" in out
    folder = tmp_path / "runs" / "demo"
    assert "A language model" in (folder / "report.html").read_text()
    answers = [json.loads(line) for line in (folder / "answers-chat.jsonl").read_text().splitlines()]
    assert len(answers) == sum(demo.PROMPTS.values())
    # Each can be run by hand, in the same folder.
    assert main(commands[-1].split()[1:]) == 0
