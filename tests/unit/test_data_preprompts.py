"""Conversations with a preprompt that only the teacher reads: their tokens, their batches, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_modules.batch import IGNORE_INDEX, TaughtBatch, TokenBatch
from llm_modules.data import PrepromptDataModule
from llm_modules.data.chat import conversation, with_preprompt
from llm_modules.data.preprompts import PrepromptEncoder
from llm_modules.data.sources import Row
from llm_modules.data.templates import set_template
from llm_modules.tokenizer import byte_tokenizer

USER, ANSWER = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "four"}
SYSTEM = {"role": "system", "content": "You add."}


def encoder(length: int = 300, template: str = "chatml", **settings: Any) -> PrepromptEncoder:
    tokenizer = byte_tokenizer()
    set_template(tokenizer, template)
    return PrepromptEncoder(tokenizer, "Be kind.", length, **settings)


def row(*messages: dict[str, str]) -> Row:
    return Row({"messages": list(messages)}, "talks.jsonl", 7)


def texts(made: PrepromptEncoder, rows: list[Row]) -> list[tuple[str, str, str, str]]:
    """Of each row what the student reads and what it is trained on, and the same of the teacher."""
    found = made(rows)
    assert found.splits is not None
    assert found.trained is not None
    decoded = []
    starts = np.cumsum(found.lengths) - found.lengths
    for start, length, split in zip(starts, found.lengths, found.splits, strict=True):
        said: list[str] = []
        for part in (slice(start, start + split), slice(start + split, start + length)):
            ids, mask = found.tokens[part], found.trained[part]
            said += [str(made.tokenizer.decode(ids)), str(made.tokenizer.decode(ids[mask]))]
        decoded.append((said[0], said[1], said[2], said[3]))
    return decoded


def test_the_teacher_alone_reads_it_above_a_system_message_of_the_rows_own() -> None:
    plain, own = texts(encoder(), [row(USER, ANSWER), row(SYSTEM, USER, ANSWER)])
    talk = "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\nfour<|im_end|>\n"
    kind = "<|im_start|>system\nBe kind."
    assert plain == (talk, "four<|im_end|>", f"{kind}<|im_end|>\n{talk}", "four<|im_end|>")
    adds = "<|im_start|>system\nYou add.<|im_end|>\n"
    assert own == (adds + talk, plain[1], f"{kind}\n\nYou add.<|im_end|>\n{talk}", plain[1])


@pytest.mark.parametrize("template", ["chatml", "llama3", "gemma", "zephyr", "alpaca", "raw"])
@pytest.mark.parametrize("train_on", ["assistant", "last"])
def test_every_template_trains_the_same_tokens_of_several_turns(template: str, train_on: Any) -> None:
    talk = row(USER, ANSWER, {"role": "user", "content": "and 3 + 3?"}, {"role": "assistant", "content": "six"})
    ((student, own, teacher, teachers),) = texts(encoder(template=template, train_on=train_on), [talk])
    assert own == teachers
    assert ("four" in own) == (train_on == "assistant")
    assert "six" in own
    assert "Be kind." in teacher.replace(student, "")
    assert "Be kind." not in student


@pytest.mark.parametrize("length", [44, 48])
def test_what_does_not_fit_under_the_preprompt_is_cut_off_in_both(length: int) -> None:
    """With the preprompt what comes before the answer has 43 bytes and marks: 1 or 5 tokens of the answer fit."""
    made = encoder(length)
    ((student, own, teacher, teachers),) = texts(made, [row(USER, {"role": "assistant", "content": "abcdefghij"})])
    fits = length - 43
    assert own == teachers == "abcdefghij"[:fits]
    assert student.endswith(f"assistant\n{own}")
    assert teacher.endswith(f"assistant\n{own}")
    counts = made([row(USER, {"role": "assistant", "content": "abcdefghij"})]).counts
    assert counts["longer than the sequence length with the preprompt"] == 1
    assert counts["turns"] == 1


def test_too_long() -> None:
    for settings in ({"length": 43}, {"length": 44, "too_long": "drop"}):
        found = encoder(**settings)([row(USER, {"role": "assistant", "content": "abcdefghij"})])
        assert found.trained is not None
        assert not found.trained.any()
        assert found.counts["dropped as too long"] == 1
    with pytest.raises(ValueError, match=r"^talks.jsonl:7: 55 tokens with the preprompt, more than sequence_length 48"):
        encoder(48, too_long="error")([row(USER, {"role": "assistant", "content": "abcdefghij"})])


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            "{%- for m in messages if m.role != 'system' %}{%- if m.role == 'user' %}{{- m.content + '\n' }}{%- else %}"
            "{% generation %}{{- m.content + eos_token }}{% endgeneration %}{%- endif %}{%- endfor %}",
            "the chat template leaves out the preprompt",
        ),
        (
            "{%- for m in messages %}{%- if m.role != 'assistant' %}{{- m.content + '\n' }}{%- else %}{% generation %}"
            "{{- (m.content | upper if messages[0].role == 'system' else m.content) + eos_token }}{% endgeneration %}"
            "{%- endif %}{%- endfor %}",
            "the chat template writes the answers otherwise under the preprompt",
        ),
    ],
)
def test_templates_that_do_not_do(template: str, said: str) -> None:
    with pytest.raises(ValueError, match=f"^talks.jsonl:7: {said}"):
        encoder(template=template)([row(USER, ANSWER)])


def test_a_prompt_of_messages_may_have_a_completion_that_is_text() -> None:
    """As `recipes generate` writes it."""
    talk = conversation(Row({"prompt": [SYSTEM, USER], "completion": "four"}, "answers.jsonl", 1))
    assert talk.messages == [SYSTEM, USER, ANSWER]
    assert with_preprompt(talk.messages, "Be kind.")[0]["content"] == "Be kind.\n\nYou add."


def data(tmp_path: Path, **settings: Any) -> PrepromptDataModule:
    path = tmp_path / "rows.jsonl"
    if not path.exists():
        rows = [{"prompt": f"{i}? " * (1 + i % 3), "completion": "no " * (1 + i % 4) + str(i)} for i in range(8)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = PrepromptDataModule(
        **{
            "sources": [{"path": str(path)}],
            "preprompt": "Be kind.",
            "tokenizer": "builtin:bytes",
            "chat_template": "chatml",
            "sequence_length": 128,
            "batch_size": 4,
            "validation_fraction": 0.0,
            "cache_dir": str(tmp_path / "cache"),
        }
        | settings
    )
    made.prepare_data()
    made.setup("fit")
    return made


def trained(batch: TokenBatch) -> list[int]:
    labels = batch.labels[batch.labels != IGNORE_INDEX]
    return [int(label) for label in labels]


@pytest.mark.parametrize("packing", ["batch", "none"])
def test_batches_pair_the_two_in_order(packing: Any, tmp_path: Path) -> None:
    made = data(tmp_path, packing=packing)
    batches = list(made.train_dataloader())
    assert len(batches) == 2
    for batch in batches:
        assert isinstance(batch, TaughtBatch)
        assert batch.teacher is not None
        assert trained(batch) == trained(batch.teacher)
        assert batch.counts()["tokens"] == batch.teacher.counts()["tokens"] == len(trained(batch))
        assert batch.teacher.tokens()[1] == batch.tokens()[1] + 4 * len("?system\nBe kind.?\n")
        doubled = batch.apply(lambda tensor: tensor * 2)
        assert torch.equal(doubled.teacher.input_ids, 2 * batch.teacher.input_ids)
        assert doubled.rows == batch.rows
    empty = made._collator().empty()
    assert empty.counts() == empty.teacher.counts() == {"tokens": 0.0, "positions": 0.0}
    report = made.audit(color=False)
    assert report.trained == sum(len(trained(batch)) for batch in batches)
    assert "⟦" in report.sample


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"preprompt": "  "}, "data.preprompt: empty; a text is asked for"),
        ({"preprompt": "nowhere.txt"}, "data.preprompt: no file 'nowhere.txt'"),
        ({"packing": "documents"}, "data.packing: 'documents' is not one of batch, none"),
        ({"train_on": "all"}, "data.train_on: 'all' is not one of assistant, last"),
        ({"too_long": "split"}, "data.too_long: 'split' is not one of truncate, drop, error"),
    ],
)
def test_mistakes(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{said}"):
        data(tmp_path, **settings)


def test_a_file_holds_the_preprompt(tmp_path: Path) -> None:
    (tmp_path / "kind.txt").write_text("Be kind.\n")
    assert data(tmp_path, preprompt=str(tmp_path / "kind.txt")).preprompt == "Be kind."
    (tmp_path / "kind.txt").write_text("\n")
    with pytest.raises(ValueError, match="is empty; a text is asked for"):
        data(tmp_path, preprompt=str(tmp_path / "kind.txt"))
