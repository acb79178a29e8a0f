"""Tokens on disk: made once, found by content, whole or not at all."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from llm_modules.data import store as store_module
from llm_modules.data.conversation_encoding import ConversationEncoder
from llm_modules.data.parallel import ordered_map
from llm_modules.data.sources import Row, Source
from llm_modules.data.store import TokenStore, write_store
from llm_modules.data.templates import CHATML, ZEPHYR
from llm_modules.data.tokenization import CHUNK_ROWS, TextEncoder, store_folder, tokenize
from llm_modules.tokenizer import byte_tokenizer

CHATS = [{"prompt": f"What is {i}?", "completion": f"It is {i}{'!' * (i % 5)}"} for i in range(3 * CHUNK_ROWS + 7)]


def rows_file(folder: Path, rows: list[dict], name: str = "rows.jsonl") -> Source:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(str(folder / name))


def chat_encoder(template: str = CHATML) -> ConversationEncoder:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return ConversationEncoder(tokenizer)


def test_documents_are_found_again(tmp_path):
    texts = ["one", "zwei é", "three " * 100]
    tokenizer = byte_tokenizer()
    source = rows_file(tmp_path, [{"text": text} for text in texts])
    store = tokenize(source, TextEncoder(tokenizer), tmp_path / "cache", None)
    assert len(store) == 3
    for i, text in enumerate(texts):
        ids = store.tokens[store.offsets[i] : store.offsets[i + 1]]
        assert tokenizer.decode(ids.tolist()) == text + "<|endoftext|>"
        assert store.origin(i) == f"{source.path}:{i + 1}"
    assert store.sizes.tolist() == [len(text.encode()) for text in texts]
    assert store.trained is None
    assert store.tokens.dtype == np.uint16


def test_the_beginning_token(tmp_path):
    tokenizer = byte_tokenizer()
    bos = tokenizer.bos_token_id
    row = Row({"text": "a"}, "file", 1)
    assert TextEncoder(tokenizer)([row]).tokens.tolist()[0] != bos
    assert TextEncoder(tokenizer, add_bos=True)([row]).tokens.tolist()[0] == bos


@pytest.mark.parametrize("encoder", ["text", "chat"])
def test_worker_processes_make_the_same_files(tmp_path, encoder):
    rows = [chat | {"text": chat["prompt"] * 3} for chat in CHATS]
    source = rows_file(tmp_path, rows)
    made = TextEncoder(byte_tokenizer()) if encoder == "text" else chat_encoder()
    one = tokenize(source, made, tmp_path / "one", 1)
    two = tokenize(source, made, tmp_path / "two", 2)
    names = sorted(path.name for path in one.folder.iterdir())
    assert names == sorted(path.name for path in two.folder.iterdir())
    for name in names:
        assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes(), name


def test_a_mistake_in_a_worker_is_the_same_line(tmp_path):
    rows = [*CHATS, {"prompt": "no answer", "completion": " "}]
    source = rows_file(tmp_path, rows)
    messages = []
    for workers in (1, 2):
        with pytest.raises(ValueError) as error:
            tokenize(source, chat_encoder(), tmp_path / "cache", workers)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert messages[0] == f"{source.path}:{len(rows)}: message 2 is an empty answer of the assistant"
    # Nothing of the attempt is left.
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []


def test_a_worker_that_dies_is_no_hang():
    with pytest.raises(RuntimeError, match="ended with status 7"):
        list(ordered_map(os._exit, [7, 7, 7], 2))


def test_results_come_in_order_and_items_are_drawn_lazily():
    drawn = []

    def items():
        for i in range(100):
            drawn.append(i)
            yield i

    results = ordered_map(str, items(), 2)
    assert next(results) == "0"
    assert len(drawn) < 10
    assert list(results) == [str(i) for i in range(1, 100)]


def test_a_script_without_a_main_guard_is_not_run_again(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from llm_modules.data.parallel import ordered_map\nprint('ran')\nprint(list(ordered_map(str, range(3), 2)))\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "ran\n['0', '1', '2']\n"


def test_it_is_done_once_and_again_when_something_changes(tmp_path, monkeypatch):
    calls = []
    original = TextEncoder.__call__

    def counting(self, rows):
        calls.append(len(rows))
        return original(self, rows)

    monkeypatch.setattr(TextEncoder, "__call__", counting)
    cache = tmp_path / "cache"
    source = rows_file(tmp_path, [{"text": "one", "body": "eins"}])
    tokenizer = byte_tokenizer()

    def made(*arguments) -> bool:
        calls.clear()
        tokenize(*arguments, cache, 1)
        return bool(calls)

    assert made(source, TextEncoder(tokenizer))
    assert not made(source, TextEncoder(tokenizer))
    os.utime(source.path, (1, 1))
    assert not made(source, TextEncoder(byte_tokenizer()))
    assert made(source, TextEncoder(tokenizer, add_bos=True))
    assert made(Source(source.path, columns={"text": "body"}), TextEncoder(tokenizer))
    tokenizer.add_tokens(["one"])
    assert made(source, TextEncoder(tokenizer))
    rows_file(tmp_path, [{"text": "two"}])
    assert made(source, TextEncoder(byte_tokenizer()))


def test_the_template_and_the_code_are_part_of_the_name(tmp_path, monkeypatch):
    source = rows_file(tmp_path, CHATS[:3])
    folder = store_folder(source, chat_encoder(), tmp_path)
    assert folder == store_folder(source, chat_encoder(), tmp_path)
    assert folder != store_folder(source, chat_encoder(ZEPHYR), tmp_path)
    monkeypatch.setattr("llm_modules.data.tokenization._code_fingerprint", lambda: "changed")
    assert folder != store_folder(source, chat_encoder(), tmp_path)


def test_two_runs_at_once_write_one_whole_store(tmp_path, monkeypatch):
    source = rows_file(tmp_path, [{"text": f"document {i}"} for i in range(50)])
    barrier = threading.Barrier(2, timeout=30)
    publish = store_module._publish

    def together(temporary, folder):
        barrier.wait()
        publish(temporary, folder)

    monkeypatch.setattr(store_module, "_publish", together)
    stores: list[TokenStore] = []
    threads = [
        threading.Thread(
            target=lambda: stores.append(tokenize(source, TextEncoder(byte_tokenizer()), tmp_path / "cache", 1))
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stores) == 2
    assert [len(store) for store in stores] == [50, 50]
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 1


def test_a_store_that_was_not_finished_is_not_seen(tmp_path):
    source = rows_file(tmp_path, [{"text": "one"}])
    encoder = TextEncoder(byte_tokenizer())
    folder = store_folder(source, encoder, tmp_path / "cache")

    def parts():
        yield encoder([Row({"text": "one"}, "file", 1)])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_store(folder, parts(), vocabulary=260, files=["file"])
    assert not folder.exists()
    assert list(folder.parent.iterdir()) == []


def test_large_vocabularies_take_four_bytes(tmp_path):
    part = TextEncoder(byte_tokenizer())([Row({"text": "a"}, "file", 1)])
    part.tokens[0] = 70000
    store = write_store(tmp_path / "store", [part], vocabulary=70001, files=["file"])
    assert store.tokens[0] == 70000


def _first_token(store: TokenStore) -> int:
    return int(store.tokens[0])


def test_a_store_is_reopened_in_another_process(tmp_path):
    source = rows_file(tmp_path, [{"text": "one"}])
    store = tokenize(source, TextEncoder(byte_tokenizer()), tmp_path / "cache", 1)
    import pickle

    assert len(pickle.dumps(store)) < 1000
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(_first_token, (store,)) == store.tokens[0]


def test_progress_is_plain_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("llm_modules.data.tokenization.PROGRESS_SECONDS", 0.0)
    source = rows_file(tmp_path, [{"text": "some text"}] * (CHUNK_ROWS + 1))
    tokenize(source, TextEncoder(byte_tokenizer()), tmp_path / "cache", 1)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(f"tokenizing {source.path}: 256 documents, 2,560 tokens, 0.0 MB, ")
    assert lines[-1].startswith(f"tokenized {source.path}: 257 documents, ")


def test_imports_are_light():
    # Lightning itself brings in parts of transformers.
    code = (
        "import sys, llm_modules.data, llm_modules.data.conversation_encoding, llm_modules.data.parallel;"
        "assert not {'lightning', 'datasets', 'transformers'} & set(sys.modules);"
        "from llm_modules.data import TextDataModule;"
        "assert not {'datasets', 'pyarrow', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("2000001 requested and 716800 written")  # all that numpy's tofile says

    monkeypatch.setattr(store_module, "_publish", full)
    source = rows_file(tmp_path / "in", [{"text": "a"}])
    with pytest.raises(ValueError, match=r"^data\.cache_dir: .*cache: tokens cannot be written: the disk is full, it"):
        tokenize(source, TextEncoder(byte_tokenizer()), tmp_path / "cache", 1)
    assert not list((tmp_path / "cache" / "tokens").iterdir())
