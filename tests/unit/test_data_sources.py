"""Reading rows: every format, and one line for whatever is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm_modules.data.sources import Source, require

ROWS = [{"text": "one", "n": 1}, {"text": 'zwei\n"zwei", é', "n": 2}, {"text": "three\u2028 3", "n": 3}]


def write(path: Path, content: str | bytes) -> Source:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return Source(str(path))


def texts(source: Source) -> list[str]:
    return [row.columns["text"] for row in source.rows()]


def refused(source: Source) -> str:
    with pytest.raises(ValueError) as error:
        list(source.rows())
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_format_gives_the_same_rows(tmp_path):
    import csv

    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n")
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    (tmp_path / "b.json").write_text(json.dumps({"version": 1, "data": ROWS}))
    with (tmp_path / "a.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["text", "n"])
        writer.writeheader()
        writer.writerows(ROWS)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.json", "b.json", "a.csv", "a.parquet"):
        assert texts(Source(str(tmp_path / name))) == [row["text"] for row in ROWS], name


def test_what_arrow_fills_in_is_no_data(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"calls": [{"name": "f", "arguments": {name: 1}}], "note": None} for name in "ab"]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows)).path
    found = [[row.columns for row in Source(name).rows()] for name in (str(tmp_path / "a.parquet"), path)]
    assert found == [rows, rows]


def test_byte_order_marks_are_no_text(tmp_path):
    assert texts(write(tmp_path / "a.txt", "\ufeffone")) == ["one"]
    assert texts(write(tmp_path / "a.jsonl", '\ufeff{"text": "one"}')) == ["one"]
    assert texts(write(tmp_path / "a.csv", "\ufefftext\none\n")) == ["one"]


def test_text_documents(tmp_path):
    source = write(tmp_path / "a.txt", "one\n\ntwo\nlines\n\n\n\n \n\nthree")
    assert texts(source) == ["one\n\ntwo\nlines\n\n\n\n \n\nthree"]
    assert texts(Source(source.path, document_separator=r"\n\n+")) == ["one", "two\nlines", "three"]
    assert texts(Source(source.path, document_separator=r"(\n)(\n)+")) == ["one", "two\nlines", "three"]


def test_folders_globs_and_limits(tmp_path):
    for name in ("b/2.txt", "a/1.txt", "a/3.jsonl", ".hidden/no.txt", "a/LICENSE.txt", "a/notes.pdf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": "row"}) if name.endswith("l") else name)
    assert texts(Source(str(tmp_path))) == ["a/1.txt", "row", "b/2.txt"]
    assert texts(Source(str(tmp_path / "*" / "*.txt"))) == ["a/1.txt", "a/LICENSE.txt", "b/2.txt"]
    assert texts(Source(str(tmp_path), limit=2)) == ["a/1.txt", "row"]
    assert "no file matches" in refused(Source(str(tmp_path / "*.csv")))


def test_columns_are_renamed(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"body": "b", "text": "t", "n": 1}').path
    (row,) = Source(path, columns={"text": "body"}).rows()
    assert row.columns == {"text": "b", "n": 1}
    message = refused(Source(path, columns={"text": "boddy"}))
    assert message == f"{path}:1: no column 'boddy' (`columns`); there are: body, text, n"


def test_a_missing_column_names_those_there_are(tmp_path):
    (row,) = write(tmp_path / "a.jsonl", '{"body": "b", "n": 1}').rows()
    with pytest.raises(ValueError, match=r"a\.jsonl:1: no column 'text'; there are: body, n \(name another with"):
        require(row, "text")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "one"}\n{"text": two}\n', "a.jsonl:2: no JSON: Expecting value at column 10"),
        ("a.jsonl", '{"text": "one"}\n\n["two"]\n', "a.jsonl:3: a row must be a JSON object, not list"),
        ("a.jsonl", "\n\n", "there are no rows in it"),
        ("a.jsonl", b'{"text": "one"}\n{"text": "\xe9"}\n', "a.jsonl: not UTF-8: byte 0xe9 at offset 26"),
        ("a.json", '{"text": "one"}\n{"text": "two"}', "a.json:2: no JSON: Extra data at column 1; is it JSON Lines?"),
        ("a.jsonl", '{"text": "\\ud83d\\ude00"}\n{"text": "\\uD83D"}', "a.jsonl:2: half a surrogate pair"),
        ("a.json", '[{"text": "\\ud83d\\ude00"}, {"a": [{"\\ude00": 1}]}]', "a.json:2: half a surrogate pair"),
        ("a.json", "[1]", "a.json:1: a row must be a JSON object, not int"),
        ("a.json", '{"a": 1}', "a list of objects, or an object with one list in it, is needed"),
        ("a.json", '"a"', "a list of objects is needed, not str"),
        ("a.txt", "", "a.txt: the file is empty"),
        ("a.txt", " \n\n", "there are no rows in it"),
        ("a.txt", b"caf\xe9", "a.txt: not UTF-8: byte 0xe9 at offset 3"),
        ("a.csv", "text,n\na,1\nb\n", "a.csv:2: broken CSV: row 2 (up to line 3) has 1 fields, the header has 2"),
        ("a.csv", "text,n\na,1,2\n", "a.csv:1: broken CSV: row 1 (up to line 2) has 3 fields, the header has 2"),
        ("a.csv", "text,n,text\na,1,b\n", "a.csv: broken CSV: the header has 'text' twice"),
        ("a.csv", 'text,n\n"a"b,1\n', "a.csv:1: broken CSV in row 1: ',' expected after"),
        ("a.csv", "text,n\n", "there are no rows in it"),
        ("a.parquet", b"PAR1 no", "a.parquet: broken Parquet: "),
        ("a.pdf", "x", "format '.pdf' is not known; allowed: .txt .jsonl .json .csv .parquet"),
        ("a", "x", "format 'without suffix' is not known"),
    ],
)
def test_broken_files(tmp_path, name, content, message):
    assert message in refused(write(tmp_path / name, content))


def test_a_missing_file_names_the_nearest(tmp_path):
    write(tmp_path / "train.jsonl", "{}")
    message = refused(Source(str(tmp_path / "trian.jsonl")))
    assert message.endswith(f"no such file or folder; did you mean {str(tmp_path / 'train.jsonl')!r}?")
    assert f"did you mean {str(tmp_path)!r}" in refused(Source(str(tmp_path) + "x/train.jsonl"))
    (tmp_path / "empty").mkdir()
    assert "file in this folder" in refused(Source(str(tmp_path / "empty")))


def test_the_data_folder_is_a_setting(tmp_path, monkeypatch):
    write(tmp_path / "a.txt", "one")
    monkeypatch.delenv("LITRECIPES_DATA", raising=False)
    assert "the environment variable LITRECIPES_DATA is not set; set it to the folder that holds 'a.txt'" in refused(
        Source("data:a.txt")
    )
    monkeypatch.setenv("LITRECIPES_DATA", str(tmp_path / "no"))
    assert "which is no folder" in refused(Source("data:a.txt"))
    monkeypatch.setenv("LITRECIPES_DATA", str(tmp_path))
    assert texts(Source("data:a.txt")) == ["one"]
    assert "did you mean" in refused(Source("data:b.txt"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 0.0}, "weight 0.0 is not above 0"),
        ({"weight": float("nan")}, "weight nan is not above 0"),
        ({"limit": 0}, "limit 0 is below 1"),
        ({"document_separator": "("}, "is no regular expression"),
        ({"document_separator": r"\n*"}, "matches the empty string"),
    ],
)
def test_settings_of_a_source(settings, message):
    with pytest.raises(ValueError, match=message):
        Source("a.txt", **settings)


def test_unknown_builtin_and_split():
    assert "built in are 'builtin:python-docs'" in refused(Source("builtin:python"))
    assert "no split 'dev'; there are train and validation" in refused(Source("builtin:python-docs", split="dev"))


def test_hub_errors_are_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    assert "`datasets` cannot load it as a hub id" in refused(Source("nobody-x/nothing-y"))


def test_a_local_hub_folder_is_read_through_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    write(tmp_path / "train.jsonl", '{"text": "one"}\n{"text": "two"}\n')
    source = Source(str(tmp_path), format="hub")
    assert texts(source) == ["one", "two"]
    assert source.fingerprint() == source.fingerprint()
    assert datasets is not None


def test_the_fingerprint_is_of_the_content(tmp_path):
    import os

    source = write(tmp_path / "a.txt", "one")
    first = source.fingerprint()
    os.utime(tmp_path / "a.txt", (1, 1))
    assert source.fingerprint() == first
    (tmp_path / "b.txt").write_text("one")
    assert Source(str(tmp_path / "b.txt")).fingerprint() == first
    (tmp_path / "a.txt").write_text("two")
    assert source.fingerprint() != first
    assert Source(source.path, limit=1).fingerprint() != source.fingerprint()


def test_what_a_folder_holds_beside_its_rows_is_counted(tmp_path):
    """Told by the audit, not left out silently."""
    from llm_modules.data import TextDataModule

    for name in ("a.txt", "b.txt", "c.md", "d/e.md", "README.txt", "Makefile", ".hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"some text of {name}, long enough")
    path = str(tmp_path)
    found = {"(.md)": 2, "(Makefile)": 1, "(README.txt)": 1}
    expected = {f"files left out of {path} {what}": count for what, count in found.items()}
    assert Source(path).left_out() == expected
    assert Source(path + "/a.txt").left_out() == {}
    assert Source("builtin:python-docs").left_out() == {}
    data = TextDataModule(
        sources=[{"path": path}], batch_size=1, tokenizer="builtin:bytes", sequence_length=64,
        validation_fraction=0.0, cache_dir=str(tmp_path / ".cache"),
    )  # fmt: skip
    data.prepare_data()
    data.setup("fit")
    assert expected.items() <= data.audit().counts.items()
    assert f"files left out of {path} (.md): 2" in data.audit().lines
