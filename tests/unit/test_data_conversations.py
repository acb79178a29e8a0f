"""Conversations through the DataModule: formats, columns, tools, templates; every mistake as one line."""

from __future__ import annotations

import numpy as np
import pytest
import test_data_modules
from test_data_modules import conversations, refused, write

from llm_modules.data import Source
from llm_modules.data.chat import conversation
from llm_modules.data.sources import Row
from llm_modules.data.store import Encoded, write_store
from llm_modules.tokenizer import byte_tokenizer

qa = test_data_modules.qa


@pytest.mark.parametrize(
    "columns",
    [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"messages": [{"role": "human", "content": [{"type": "text", "text": "q"}]}, {"role": "gpt", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"instruction": "q", "response": "a"},
        {"instruction": "q", "input": "", "output": "a"},
        {"prompt": "q", "completion": "a"},
        {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
    ],
)
def test_formats_are_one_conversation(columns):
    talk = conversation(Row(columns, "file", 1))
    assert talk.messages == [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert talk.prompt() == talk.messages[:1]
    assert talk.reference() == "a"
    talk = conversation(Row(columns | {"system": "be kind"}, "file", 1))
    assert talk.messages[0] == {"role": "system", "content": "be kind"}


def test_a_column_that_is_named_goes_before_others_that_could_be_meant(tmp_path):
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    row = {"messages": messages, "instruction": "i", "prompt": "p", "response": "bad", "output": "worse", "best": "a"}
    path = write(tmp_path / "a.jsonl", [row])

    def meant(**columns):
        (found,) = Source(path, columns=columns).rows()
        return [message["content"] for message in conversation(found).messages]

    assert meant() == ["?", "!"]
    assert meant(prompt="instruction", completion="best") == ["i", "a"]
    assert meant(instruction="prompt", answer="best") == ["p", "a"]
    assert meant(messages="messages", answer="best") == ["?", "!"]


def test_tools_that_the_template_does_not_show_are_refused(tmp_path):
    rows = [{"instruction": f"q {i}", "response": "a", "tools": [{"name": "f"}] if i == 3 else []} for i in range(9)]
    path = write(tmp_path / "tools.jsonl", rows)
    message = refused(conversations, path, chat_template="llama3")
    assert message.startswith(f"{path}:4: has tools, and the chat template leaves them out")
    conversations(path, chat_template="chatml")


def test_ids_of_a_vocabulary_with_gaps_are_kept_whole(tmp_path):
    """In two bytes an id above 65,535 would come back as another one."""
    one = np.ones(1, dtype=np.int64)
    part = Encoded(
        tokens=np.array([70_000], dtype=np.uint32), trained=None, lengths=one, sizes=one,
        hashes=one.astype(np.uint64), groups=one.astype(np.uint64), places=np.zeros((1, 2), dtype=np.int64),
    )  # fmt: skip
    with pytest.raises(ValueError, match="token id 70000 is outside of the vocabulary 300"):
        write_store(tmp_path / "small", [part], vocabulary=300, files=["f"])
    assert write_store(tmp_path / "large", [part], vocabulary=70_001, files=["f"]).tokens.tolist() == [70_000]


def test_context_tools_and_calls():
    talk = conversation(Row({"instruction": "q", "context": "c", "response": "a"}, "file", 1))
    assert talk.messages[0]["content"] == "q\n\nc"
    messages = [
        {"role": "user", "content": "q"},
        {"role": "tool_call", "content": "{}"},
        {"role": "observation", "content": "3"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]},
    ]
    talk = conversation(Row({"messages": messages, "tools": '[{"name": "f"}]', "system": ""}, "file", 1))
    assert [message["role"] for message in talk.messages] == ["user", "assistant", "tool", "assistant"]
    assert talk.tools == [{"name": "f"}]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"text": "t"},
            "f:3: no conversation in the columns text; needed are messages, conversations, instruction and",
        ),
        ({"messages": []}, "f:3: the conversation has no messages"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "f:3: the conversation starts with the assistant"),
        ({"messages": [{"role": "user", "content": "q"}]}, "f:3: the conversation has no answer of the assistant"),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "robot", "content": "a"}]},
            "f:3: message 2 has the unknown role 'robot'; allowed: system, user, assistant, tool",
        ),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "\n"}]},
            "f:3: message 2 is an empty answer",
        ),
        (
            {"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]},
            "f:3: message 1 (user) has no 'content'",
        ),
        ({"messages": [{"role": "user", "content": 3}]}, "f:3: message 1: content must be text, not int"),
        ({"messages": ["q", "a"]}, "f:3: message 1 is no object with 'role' and 'content'"),
        ({"conversations": [{"value": "q"}]}, "f:3: message 1 is no object with 'from' and 'value'"),
        ({"instruction": "q", "response": None}, "f:3: column 'response' must be a string, not NoneType"),
        ({"instruction": "q", "answer": "a", "tools": "{"}, "f:3: column 'tools' is no JSON"),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "system", "content": "s"}]},
            "f:3: message 2 is a system message; it may only be the first",
        ),
    ],
)
def test_conversations_that_are_refused(columns, message):
    assert refused(conversation, Row(columns, "f", 3)).startswith(message)


# Settings


def test_a_tokenizer_without_template(qa):
    message = refused(conversations, qa, chat_template=None)
    assert message.startswith("data.chat_template: the tokenizer has none; set it to one of chatml, llama3, gemma")
    assert "neither a file nor one of chatml" in refused(conversations, qa, chat_template="chatlm")


def test_a_template_file_and_the_tokenizers_own(tmp_path, qa):
    (tmp_path / "own.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    datamodule = conversations(qa, chat_template=str(tmp_path / "own.jinja"), require_turn_end=False)
    assert datamodule.prepared_tokenizer.chat_template.startswith("{% for m in messages %}[")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    own = conversations(qa, tokenizer=str(tmp_path / "tokenizer"), chat_template=None)
    batch = next(iter(own.train_dataloader()))
    assert own.prepared_tokenizer.decode(batch.input_ids[0]).startswith("<Question")


def test_markers_that_are_no_tokens_are_said(qa, capsys):
    conversations(qa, chat_template="gemma", sequence_length=256)
    assert "<start_of_turn>, <end_of_turn> are no tokens of this tokenizer" in capsys.readouterr().err
