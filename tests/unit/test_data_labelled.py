"""Answers labelled one by one: the formats, what is refused, the batches, and what each is compared with."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_modules.batch import IGNORE_INDEX, LabelledBatch, TokenBatch
from llm_modules.data import LabelledDataModule
from llm_modules.data.labelled import labelled_answer
from llm_modules.data.preferences import preference_pair
from llm_modules.data.sources import Row, Source
from llm_modules.data.tokenization import content_hash

USER, GOOD = {"role": "user", "content": "2 + 2?"}, "4"
SAID = {"role": "assistant", "content": GOOD}


def row(**columns: Any) -> Row:
    return Row(columns, "rows.jsonl", 7)


@pytest.mark.parametrize(
    "columns",
    [
        {"prompt": "2 + 2?", "completion": GOOD},
        {"prompt": "2 + 2?", "answer": GOOD},
        {"prompt": [USER], "completion": [SAID]},
        {"prompt": [USER], "completion": SAID},
        {"messages": [USER], "completion": GOOD},
        {"messages": [USER, SAID]},
        {"prompt": [USER], "completion": [USER, SAID]},
        {"prompt": "2 + 2?\n", "completion": [USER, SAID]},
        {"messages": [USER, SAID], "completion": [USER, SAID]},
        {"prompt": "\n\nHuman: 2 + 2?\n\nAssistant:", "completion": " 4"},
        {"completion": "\n\nHuman: 2 + 2?\n\nAssistant: 4"},
    ],
)
@pytest.mark.parametrize("label", [True, False, 1, 0])
def test_formats(columns: dict[str, Any], label: bool | int) -> None:
    found = labelled_answer(row(**columns, label=label))
    assert (found.prompt, found.answer, found.desirable) == ([USER], SAID, bool(label))
    assert type(found.desirable) is bool


@pytest.mark.parametrize(("text", "label"), [("true", 1), ("False", 0), ("1", 1), (" 0", 0), ("TRUE", 1)])
def test_a_label_may_be_text_as_all_of_csv_is(text: str, label: int, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(f"prompt,completion,label\n2 + 2?,4,{text}\n3 + 3?,5,{text}\n")
    found = data(tmp_path, [], sources=[{"path": str(tmp_path / "rows.csv")}], batch_size=2)
    assert found.label_counts() == (2 * label, 2 - 2 * label)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"prompt": "a", "completion": "b"}, "no label; an answer needs label, true or false; columns: prompt, "),
        ({"prompt": "a", "completion": "b", "label": None}, "no label; an answer needs label"),
        ({"prompt": "a", "completion": "b", "label": ""}, "no label; an answer needs label"),
        ({"prompt": "a", "completion": "b", "label": 2}, "label is 2; it must be true or false, or 1 or 0"),
        ({"prompt": "a", "completion": "b", "label": "yes"}, "label is 'yes'; it must be true or false"),
        ({"prompt": "a", "completion": "", "label": True}, "no answer: completion (or answer) is empty or not there"),
        ({"prompt": "a", "completion": " ", "label": True}, "the answer is empty"),
        ({"completion": "b", "label": True}, "no prompt; a column prompt or messages is needed"),
        ({"messages": [USER], "label": True}, "messages ends with the user"),
        ({"prompt": [USER, SAID], "completion": "b", "label": True}, "the prompt ends with the assistant"),
        (
            {"prompt": "3 + 3?", "completion": [USER, SAID], "label": True},
            "prompt (or messages) and the messages of completion are two different prompts",
        ),
    ],
)
def test_what_holds_no_answer_is_said_with_its_place(columns: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=r"rows\.jsonl:7: ") as caught:
        labelled_answer(row(**columns))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_stands_beside_a_pair_may_be_text_as_all_of_csv_is(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(
        "prompt,chosen,rejected,margin,chosen_safe,rejected_safe\n"
        "2 + 2?,4,5,1.5,True,false\n3 + 3?,6,5,-2e1,1,0\n4 + 4?,8,5,,,\n5 + 5?,8,5,nan,,\n6 + 6?,12,5,,yes,\n"
    )
    rows = list(Source(str(tmp_path / "rows.csv")).rows())
    found = [preference_pair(row).values for row in rows[:3]]
    assert found[:2] == [(1.5, 1.0, 0.0), (-20.0, 1.0, 0.0)]
    assert all(map(math.isnan, found[2]))
    for row, said in zip(
        rows[3:], ("margin is 'nan'; it must be a finite", "chosen_safe is 'yes'; it must be true or"), strict=True
    ):
        with pytest.raises(ValueError, match=said):
            preference_pair(row)


LINES = [
    {"prompt": f"q{i} " * (1 + i % 4), "completion": "yes " * (i + 1) + str(i), "label": i % 3 > 0} for i in range(8)
]


def data(folder: Path, rows: list[dict[str, Any]] = LINES, **settings: Any) -> LabelledDataModule:
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    made = LabelledDataModule(
        tokenizer="builtin:bytes",
        chat_template="chatml",
        cache_dir=str(folder / "cache"),
        **{
            "sources": [{"path": str(folder / "rows.jsonl")}],
            "sequence_length": 128,
            "batch_size": 8,
            "validation_fraction": 0.0,
        }
        | settings,
    )
    made.prepare_data()
    made.setup("fit")
    return made


def texts(module: LabelledDataModule, batch: TokenBatch) -> list[tuple[str, str]]:
    """Of each document: what comes before the answer, and the answer."""
    owner = batch.answer_of(torch.arange(batch.input_ids.numel()))
    real = torch.ones(batch.input_ids.shape, dtype=torch.bool)
    if batch.lengths is not None:
        real = torch.arange(batch.input_ids.shape[1])[None] < batch.lengths[:, None]
    found = []
    for number in range(len(batch.rows)):
        mine = (owner == number) & real.flatten()
        ids, labels = batch.input_ids.flatten()[mine], batch.labels.flatten()[mine]
        positions = batch.position_ids.flatten()[mine]
        assert positions.tolist() == list(range(len(ids)))
        first = int((labels != IGNORE_INDEX).int().argmax())
        decode = module.prepared_tokenizer.decode
        found.append((str(decode(ids[:first])), str(decode(ids[labels != IGNORE_INDEX]))))
    return found


@pytest.mark.parametrize("packing", ["batch", "none"])
def test_each_prompt_comes_with_the_answer_of_the_row_before(packing: str, tmp_path: Path) -> None:
    module = data(tmp_path, packing=packing)
    (batch,) = module.train_dataloader()
    contents = [([{"role": "user", "content": o["prompt"]}], o["completion"], o["label"]) for o in LINES]
    assert module.corpus.hashes.tolist() == [content_hash(repr(content).encode()) for content in contents]
    assert isinstance(batch, LabelledBatch)
    own = texts(module, batch)
    assert batch.desirable.tolist() == [LINES[row]["label"] for row in batch.rows]
    for number, (prompt, answer) in zip(batch.rows, own, strict=True):
        assert prompt == f"<|im_start|>user\n{LINES[number]['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        assert answer == f"{LINES[number]['completion']}<|im_end|>"
    order = [int(row[0]) for row in module.epoch_plan(0).segments]  # of the window, before any sorting
    before = dict(zip(order, np.roll(order, 1).tolist(), strict=True))
    (mismatched,) = batch.mismatched
    prompts, answers = ({number: text[i] for number, text in zip(batch.rows, own, strict=True)} for i in (0, 1))
    expected = [(prompts[number], answers[before[number]]) for number in batch.rows]
    assert texts(module, mismatched) == expected
    assert mismatched.rows == batch.rows


def test_the_windows_first_batch_has_all_that_is_mismatched(tmp_path: Path) -> None:
    from types import SimpleNamespace

    whole = data(tmp_path)
    (one,) = whole.train_dataloader()
    cut = data(tmp_path, batch_size=2)
    cut.trainer = SimpleNamespace(  # type: ignore[assignment]
        accumulate_grad_batches=4, limit_train_batches=None, distributed_sampler_kwargs=None
    )
    first, *others = cut.train_dataloader()
    assert [len(batch.mismatched) for batch in (first, *others)] == [4, 0, 0, 0]
    found = [text for part in first.mismatched for text in texts(cut, part)]
    assert found == texts(whole, one.mismatched[0])


def test_held_out_rows_are_mismatched_in_one_ring(tmp_path: Path) -> None:
    wholes = []
    for size in (8, 3):
        module = data(tmp_path, batch_size=1, validation_fraction=0.6, validation_batch_size=size)
        batches = list(module.val_dataloader())
        wholes.append(sorted(text for batch in batches for part in batch.mismatched for text in texts(module, part)))
        assert len(wholes[-1]) == len(module.corpus.documents["validation"]) > 3
    assert wholes[0] == wholes[1]


def test_a_mismatched_answer_is_cut_where_its_document_ends(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a" * 60, "completion": "b", "label": True},
        {"prompt": "a", "completion": "b" * 60, "label": False},
    ]
    for packing in ("batch", "none"):
        module = data(tmp_path, rows, sequence_length=108, batch_size=2, packing=packing)
        (batch,) = module.train_dataloader()
        assert module.corpus.counts["longer than the sequence length"] == 0
        (mismatched,) = batch.mismatched
        found = dict(zip(mismatched.rows, texts(module, mismatched), strict=True))
        assert found[1][1] == "b<|im_end|>"
        prompt = len(module.prepared_tokenizer(found[0][0])["input_ids"])
        assert found[0][1] == "b" * (108 - prompt)


def test_pairs_are_two_answers(tmp_path: Path) -> None:
    pairs = [{"prompt": f"{i}?", "chosen": f"well {i}", "rejected": f"no {i}"} for i in range(3)]
    module = data(tmp_path, [*pairs, *LINES[:2]])
    (batch,) = module.train_dataloader()
    found = dict(zip((answer for _, answer in texts(module, batch)), batch.desirable.tolist(), strict=True))
    expected = {f"well {i}<|im_end|>": True for i in range(3)} | {f"no {i}<|im_end|>": False for i in range(3)}
    assert found == expected | {f"{line['completion']}<|im_end|>": line["label"] for line in LINES[:2]}
    assert module.label_counts() == (4, 4)
    held = data(tmp_path, [*pairs, *LINES], batch_size=1, validation_fraction=0.4)
    groups = [set(held.corpus.groups[held.corpus.documents[part]]) for part in ("train", "validation")]
    assert not groups[0] & groups[1]  # both answers to a prompt are held out, or none
    assert {prompt[0]["content"] for _, prompt, _ in held.prompts("train")} <= {
        *(pair["prompt"] for pair in pairs),
        *(line["prompt"] for line in LINES),
    }


def test_a_pair_is_one_whatever_its_label_is(tmp_path: Path) -> None:
    pair = {"chosen": [USER, SAID], "rejected": "no", "messages": [USER, SAID]}
    for label in ("harmful", True, None):
        found = data(tmp_path, [{**pair, "label": label}], batch_size=2)
        assert found.label_counts() == (1, 1)
        assert sorted(answer for _, answer in texts(found, next(iter(found.train_dataloader())))) == [
            f"{GOOD}<|im_end|>",
            "no<|im_end|>",
        ]
    gaps = {"chosen": None, "rejected": "", "prompt": "2 + 2?", "completion": GOOD, "label": True}
    assert data(tmp_path, [gaps, {**gaps, "completion": "5", "label": False}], batch_size=2).label_counts() == (1, 1)


def test_a_pair_and_an_answer_in_one_row_are_refused(tmp_path: Path) -> None:
    both = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5", "answer": "3", "label": True}
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: it has chosen and rejected, which are a pair, and answer, w"):
        data(tmp_path, [both])
    others = [both, {**both, "prompt": "3 + 3?", "label": False}]
    for columns, expected in (({"chosen": "chosen"}, (2, 2)), ({"label": "label"}, (1, 1))):
        made = {"path": str(tmp_path / "rows.jsonl"), "columns": columns}
        assert data(tmp_path, others, batch_size=2, sources=[made]).label_counts() == expected


def test_the_built_in_safety_pairs_are_labelled_answers(tmp_path: Path) -> None:
    found = data(tmp_path, [], sources=[{"path": "builtin:safety-preferences", "limit": 10}], sequence_length=512)
    assert found.label_counts() == (10, 10)


def test_rows_without_an_answer_can_be_dropped_and_are_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": " ", "label": True}, {"prompt": "?", "chosen": "a", "rejected": "a"}, *LINES]
    module = data(tmp_path, rows, bad_rows="drop")
    assert sorted(row for batch in module.train_dataloader() for row in batch.rows) == list(range(3, 11))
    assert "rows dropped that hold no answer: 3" in module.audit().lines
    with pytest.raises(ValueError, match=r"rows.jsonl:1: the answer is empty \(data.bad_rows is 'error'; allowed too"):
        data(tmp_path, rows)
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: no label"):
        data(tmp_path, [{"prompt": "a", "completion": "b"}], bad_rows="drop")


def test_system_messages_tools_and_calls_are_kept(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    said = {"role": "assistant", "content": None, "tool_calls": [call]}
    about = {"prompt": "2 + 2?", "system": "Be short.", "tools": [{"name": "add"}]}
    lines = [about | {"completion": [said], "label": True}, about | {"chosen": [said], "rejected": GOOD}]
    module = data(tmp_path, lines, sequence_length=300, batch_size=3)
    (batch,) = module.train_dataloader()
    found = texts(module, batch)
    (prompt,) = {prompt for prompt, _ in found}
    assert prompt == (
        f"<|im_start|>system\n# Tools\n{json.dumps(about['tools'])}<|im_end|>\n"
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    )
    called = f"\n<tool_call>\n{json.dumps(call['function'])}\n</tool_call><|im_end|>"
    assert sorted(answer for _, answer in found) == [called, called, f"{GOOD}<|im_end|>"]
    prompts = [prompt for _, prompt, _ in module.prompts("train")]
    assert prompts == [[{"role": "system", "content": "Be short."}, USER]] * 3


def test_labels_that_are_all_the_same_stop_a_run(tmp_path: Path) -> None:
    (line,) = data(tmp_path, [{**line, "label": False} for line in LINES]).audit().fatal
    assert line.startswith("data: all 8 labels are false; desirable and undesirable answers are needed")
    report = data(tmp_path, LINES).audit()
    assert report.fatal == []
    assert {"desirable answers: 5", "undesirable answers: 3"} <= set(report.lines)


def test_a_rank_without_rows_counts_no_answer(tmp_path: Path) -> None:
    empty = data(tmp_path)._collator().empty()
    counts = {"tokens": 0.0, "positions": 0.0, "answers": 0.0, "desirable": 0.0, "undesirable": 0.0}
    assert empty.counts() == counts
    (mismatched,) = empty.mismatched
    assert mismatched.rows == []


def test_a_batch_moves_with_what_is_mismatched(tmp_path: Path) -> None:
    from lightning.fabric.utilities.apply_func import move_data_to_device

    (batch,) = data(tmp_path).train_dataloader()
    moved = move_data_to_device(batch, torch.device("meta"))
    assert moved.desirable.device.type == "meta"
    assert moved.mismatched[0].input_ids.device.type == "meta"
