"""Prompts for reinforcement learning: their tokens, their order, what is left out; the built-in task."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llm_modules.data import PromptDataModule, Source
from llm_modules.evaluation import Answer, ExactAnswer


def module(folder: Path, rows: list[dict[str, Any]] | None = None, **arguments: Any) -> PromptDataModule:
    rows = rows or [{"prompt": f"number {i}", "reference": i} for i in range(20)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = PromptDataModule(
        **{
            "sources": [{"path": str(folder / "prompts.jsonl")}],
            "tokenizer": "builtin:bytes",
            "chat_template": "chatml",
            "sequence_length": 128,
            "batch_size": 4,
            "validation_fraction": 0.0,
            "cache_dir": str(folder / "cache"),
        }
        | arguments
    )
    data.prepare_data()
    data.setup("fit")
    return data


def trainer(updates: int, accumulate: int = 1, world: int = 1, rank: int = 0) -> Any:
    return SimpleNamespace(
        lightning_module=SimpleNamespace(updates=updates),
        accumulate_grad_batches=accumulate,
        limit_train_batches=None,
        overfit_batches=0,
        distributed_sampler_kwargs={"num_replicas": world, "rank": rank},
        fit_loop=None,
    )


def test_a_prompt_ends_where_the_assistant_begins(tmp_path: Path) -> None:
    data = module(tmp_path, instruction="Be brief.")
    batch = next(iter(data.train_dataloader()))
    tokenizer = data.prepared_tokenizer
    for ids, record, row in zip(batch.prompts, batch.records, batch.rows, strict=True):
        content = record["fields"]["prompt"]
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
        assert record["prompt"] == messages
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert ids.tolist() == expected
        assert record["reference"] == content.split()[1] == str(row)
    assert len({*batch.rows}) == 4


def test_a_row_may_have_its_own_system_message(tmp_path: Path) -> None:
    own, talk = {"role": "system", "content": "be kind"}, [{"role": "user", "content": "two"}]
    rows = [
        {"prompt": "one", "system": "be terse"},
        {"messages": talk, "system_prompt": "be terse"},
        {"prompt": [own, *talk], "system": "be terse"},
        {"prompt": "one", "system": ""},
    ]
    batch = next(iter(module(tmp_path, rows).train_dataloader()))
    terse = {"role": "system", "content": "be terse"}
    asked = [[terse, {"role": "user", "content": "one"}], [terse, *talk], [own, *talk]]
    found = [batch.records[batch.rows.index(number)]["prompt"] for number in range(4)]
    assert found == [*asked, [{"role": "user", "content": "one"}]]
    with pytest.raises(ValueError, match=r"prompts.jsonl:1: the prompt has a system message, and data.instruction"):
        module(tmp_path, rows, instruction="Be brief.")
    with pytest.raises(ValueError, match=r"prompts.jsonl:1: column 'system' must be a string, not int"):
        module(tmp_path, [{"prompt": "one", "system": 3}])


def test_tools_are_shown_or_refused(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    rows = [{"prompt": f"number {i}", "tools": given} for i, given in enumerate((tools, json.dumps(tools), None, ""))]
    data = module(tmp_path, rows, sequence_length=512)
    batch = next(iter(data.train_dataloader()))
    for ids, record, row in zip(batch.prompts, batch.records, batch.rows, strict=True):
        expected = data.prepared_tokenizer.apply_chat_template(
            record["prompt"], tools=tools if row < 2 else None, add_generation_prompt=True
        )["input_ids"]
        assert ids.tolist() == expected
        assert record["fields"]["tools"] == (tools if row < 2 else rows[row]["tools"])
    with pytest.raises(ValueError, match=r"prompts\.jsonl:1: has tools, and the chat template leaves them out"):
        module(tmp_path, rows, chat_template="zephyr")


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (1, 3), (2, 2)])
def test_every_rank_and_micro_batch_is_given_all_prompts_of_an_iteration(
    world: int, accumulate: int, tmp_path: Path
) -> None:
    data = module(tmp_path)
    orders = []
    for rank in range(world):
        data.trainer = trainer(3, accumulate, world, rank)
        batches = list(data.train_dataloader())
        assert len(batches) == 5 * 3 * accumulate  # 20 prompts, 4 an iteration, 3 steps each
        assert [batch.micro_step for batch in batches] == [*range(accumulate)] * 15
        assert [batch.update for batch in batches[::accumulate]] == [0, 1, 2] * 5
        orders.append([batch.rows for batch in batches[:: 3 * accumulate]])
        for i, batch in enumerate(batches):
            assert batch.rows == orders[-1][i // (3 * accumulate)]
    assert all(order == orders[0] for order in orders)
    assert sorted(row for rows in orders[0] for row in rows) == list(range(20))
    data.trainer = None


def test_the_position_is_inside_of_an_iteration(tmp_path: Path) -> None:
    data = module(tmp_path)
    data.trainer = trainer(3)
    loader = data.train_dataloader()
    batches = iter(loader)
    for _ in range(5):
        next(batches)
    state = loader.state_dict()
    other = data._new_loader(workers=0)
    other.load_state_dict(state)
    left, again = list(batches), list(iter(other))
    assert [(batch.rows, batch.update) for batch in left] == [(batch.rows, batch.update) for batch in again]
    assert again[0].update == 2
    data.trainer = trainer(2)
    with pytest.raises(ValueError, match="the checkpoint's position belongs to other data"):
        data._new_loader(workers=0).load_state_dict(state)
    data.trainer = None


def test_long_prompts_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "x" * (10 * i)} for i in range(1, 11)]
    data = module(tmp_path, rows, batch_size=2)
    lines = data.audit().lines
    assert "dropped as too long: 6" in lines
    assert any(line.startswith("prompt tokens: ") for line in lines)
    assert not any("trained" in line for line in lines)
    assert data.longest <= 64
    with pytest.raises(ValueError, match="more than sequence_length 64"):
        module(tmp_path, rows, too_long="error")


def test_the_built_in_task(tmp_path: Path) -> None:
    parts = {split: list(Source("builtin:letters", split=split).rows()) for split in ("train", "validation")}
    words = {}
    for split, rows in parts.items():
        words[split] = {re.fullmatch(r"Which letter does `(\w+)` begin with\?", r.columns["prompt"])[1] for r in rows}  # type: ignore[index]
        for row in rows:
            assert f"`{row.columns['reference']}" in row.columns["prompt"]
    assert len(words["train"]) > 1000
    assert len(words["validation"]) > 100
    assert not words["train"] & words["validation"]
    right = asked = 0
    for row in Source("builtin:letters-chat").rows():
        question, answer = (message["content"] for message in row.columns["messages"])
        word = re.search(r"`(\w+)`", question)[1]  # type: ignore[index]
        assert answer in word
        if question.startswith("First"):
            assert answer == word[0]
        else:
            asked, right = asked + 1, right + (answer == word[0])
    assert 0.1 < right / asked < 0.2


def test_pairs_of_the_built_in_task() -> None:
    for about in ("better", "safer"):
        found = list(Source(f"builtin:letters-{about}").rows())
        assert len(found) > 3000
        for row in found:
            chosen, rejected = row.columns["chosen"], row.columns["rejected"]
            word = re.search(r"`(\w+)`", row.columns["prompt"])[1]  # type: ignore[index]
            assert chosen in word
            if about == "better":
                assert (chosen == word[0]) > (rejected == word[0])
            else:
                assert rejected in word
                assert (chosen in "aeiou") < (rejected in "aeiou")
                assert (row.columns["chosen_safe"], row.columns["rejected_safe"]) == (True, False)
    held_out = {row.columns["prompt"] for row in Source("builtin:letters-better", split="validation").rows()}
    assert held_out
    assert not held_out & {row.columns["prompt"] for row in Source("builtin:letters-better").rows()}


def test_a_known_answer_is_compared_word_for_word() -> None:
    def scored(text: str, reference: str = "h", finished: bool = True, **settings: Any) -> float:
        return ExactAnswer(**settings)([Answer(3, "?", text, reference, finished=finished)])[0]

    assert scored(" h\n") == 1.0
    assert scored("H") == 0.0
    assert scored("H", ignore_case=True) == 1.0
    assert scored("h", finished=False) == 0.0
    assert scored("h", finished=False, must_end=False) == 1.0
    assert scored("house") == 0.0
    with pytest.raises(ValueError, match="reward exact_answer: row 3: it has no reference"):
        scored("h", reference=" ")
