"""The built-in corpus: what is held out stays held out, signatures are true, nothing is run by reading it."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from llm_modules.data import python_docs
from llm_modules.data.python_questions import first_sentence


def paragraphs(texts: list[str]) -> set[str]:
    parts = (" ".join(part.split()) for text in texts for part in text.split("\n\n"))
    return {part for part in parts if len(part) >= 80}


def test_same_documents_every_time_with_ids_of_their_own() -> None:
    for split in python_docs.SPLITS:
        first, second = list(python_docs.documents(split)), list(python_docs.documents(split))
        assert first == second
        assert len({row["id"] for row in first}) == len(first)
        assert all(row["text"].strip() for row in first)


def test_is_a_corpus_worth_training_on() -> None:
    sizes = {split: sum(len(row["text"]) for row in python_docs.documents(split)) for split in python_docs.SPLITS}
    assert sizes["train"] > 5e6
    assert 0.03 < sizes["validation"] / sum(sizes.values()) < 0.25


def test_no_paragraph_of_a_held_out_module_is_trained() -> None:
    train, validation = ([row["text"] for row in python_docs.documents(split)] for split in python_docs.SPLITS)
    assert len(paragraphs(validation)) > 500
    assert not paragraphs(train) & paragraphs(validation)


def test_a_module_is_on_one_side_with_its_submodules_and_accelerators() -> None:
    sides: dict[str, set[str]] = {}
    for split in python_docs.SPLITS:
        for row in python_docs.documents(split):
            kind, _, name = row["id"].partition("/")
            if kind != "topic":
                sides.setdefault(name.split(".")[0].lstrip("_").removeprefix("py"), set()).add(split)
    assert all(len(found) == 1 for found in sides.values())
    assert {found for names in sides.values() for found in names} == set(python_docs.SPLITS)


def test_reading_the_corpus_runs_none_of_it() -> None:
    """antigravity opens a browser, this prints, tkinter needs a display, idlelib changes hooks."""
    code = (
        "import sys; from llm_modules.data import python_docs as d; before = set(sys.modules)\n"
        "n = sum(1 for s in d.SPLITS for _ in d.documents(s)) + sum(1 for s in d.SPLITS for _ in d.conversations(s))\n"
        "print(n > 100, sorted(m for m in set(sys.modules) - before if not m.startswith('llm_modules')))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr == ""
    count, _, imported = result.stdout.strip().partition(" ")
    assert count == "True"
    allowed = {*python_docs.COMPILED, "pydoc_data", "pydoc_data.topics"}
    # sysconfig, which knows where the library is, has a generated module of its own.
    assert {name for name in ast.literal_eval(imported) if not name.startswith("_sysconfig")} <= allowed


@pytest.mark.parametrize("name", ["textwrap", "shutil", "json", "statistics", "heapq", "bisect"])
def test_signatures_are_those_of_inspect(name: str) -> None:
    real = importlib.import_module(name)
    module = next(module for module in python_docs.modules() if module.name == name)
    functions = [definition for definition in module.definitions if definition.kind == "function"]
    assert functions
    for definition in functions:
        target = getattr(real, definition.name.rpartition(".")[2])
        if inspect.isbuiltin(target):
            continue  # replaced by C code, whose signature is another
        shown = [
            ("*" * {inspect.Parameter.VAR_POSITIONAL: 1, inspect.Parameter.VAR_KEYWORD: 2}.get(p.kind, 0) + p.name)
            for p in inspect.signature(target).parameters.values()
        ]
        assert [p.name for p in definition.parameters or () if p.name not in ("*", "/")] == shown, definition.name


@pytest.mark.parametrize(
    ("doc", "sentence"),
    [
        ("Return the sum.\n\nMore text.", "Return the sum."),
        ("Return the sum of a\nlist. It is fast.", "Return the sum of a list."),
        ("S.split(sep) -> list of strings\n\nReturn a list of the words in S.", "Return a list of the words in S."),
        ("Use :func:`open` for ``text`` files.", "Use `open` for `text` files."),
        ("Read a .netrc file, e.g. of the user.", "Read a .netrc file, e.g. of the user."),
        ("Return the answer", "Return the answer."),
        ("helper", ""),
        (">>> f(1)\n2", ""),
        ("An unclosed (bracket.", ""),
        ("", ""),
    ],
)
def test_first_sentence(doc: str, sentence: str) -> None:
    assert first_sentence(doc) == sentence


def test_conversations_are_well_formed_and_follow_the_split() -> None:
    seen: dict[str, set[str]] = {}
    for split in python_docs.SPLITS:
        found = list(python_docs.conversations(split))
        assert len(found) > 300
        assert len({row["id"] for row in found}) == len(found)
        for row in found:
            roles = [message["role"] for message in row["messages"]]
            turns = roles[1:] if roles[0] == "system" else roles
            assert turns == ["user", "assistant"] * (len(turns) // 2)
            assert turns
            assert all(message["content"].strip() for message in row["messages"])
            assert len(row["messages"][-1]["content"]) < 500
        seen[split] = {row["id"].split("/")[0].split(".")[0] for row in found}
    assert not seen["train"] & seen["validation"]


def test_a_sentence_of_a_held_out_docstring_is_never_an_answer_in_training() -> None:
    held_out = [module for module in python_docs.modules() if python_docs.is_held_out(module.family)]
    own = {first_sentence(definition.doc) for module in held_out for definition in module.definitions}
    answers = {m["content"] for row in python_docs.conversations("train") for m in row["messages"]}
    assert not {sentence for sentence in own if len(sentence) >= 40} & answers


def test_defaults_are_answered_truly() -> None:
    rows = {row["id"]: row["messages"] for s in python_docs.SPLITS for row in python_docs.conversations(s)}
    answers = [messages[-1]["content"] for name, messages in rows.items() if name == "timeit.timeit/arguments"]
    assert answers == [
        "It takes five arguments: `stmt` (default `'pass'`), `setup` (default `'pass'`), `timer` (default "
        "`default_timer`), `number` (default `default_number`) and `globals` (default `None`)."
    ]


def test_unknown_split_is_named() -> None:
    with pytest.raises(ValueError, match="split: 'valid' is not one of train, validation"):
        list(python_docs.documents("valid"))
    with pytest.raises(ValueError, match="split: 'valid' is not one of train, validation"):
        list(python_docs.conversations("valid"))


def test_without_topics_there_is_still_a_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    kinds = {row["id"].split("/")[0] for row in python_docs.documents("train")}
    assert kinds == {"reference", "source"}


def test_a_python_without_source_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "python311.zip"))
    python_docs.modules.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"no standard library source in .*python311\.zip"):
            list(python_docs.documents("train"))
    finally:
        python_docs.modules.cache_clear()
        python_docs._held_out_paragraphs.cache_clear()


def test_what_is_no_text_is_left_out(tmp_path: Path) -> None:
    good = '"""A module."""\n\ndef f(a, b=1, *, c):\n    """Return a."""\n'
    (tmp_path / "good.py").write_text(good)
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "empty.py").write_text("\n")
    (tmp_path / "table.py").write_text("TABLE = [\n" + "    1,\n" * 500 + "]\n")
    for folder in ("test", "site-packages", "package/tests", "lib2to3"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "module.py").write_text(good)
    files = list(python_docs._source_files(tmp_path))
    assert {path.stem for path in files} == {"good", "latin", "broken", "empty", "table"}
    read = [module for path in files if (module := python_docs._read(path, tmp_path))]
    assert [(module.name, module.doc) for module in read] == [("good", "A module.")]
    assert [definition.signature for definition in read[0].definitions] == ["good.f(a, b=1, *, c)"]
