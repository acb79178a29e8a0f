"""From one file (or corpus) to rows, a format each; every error is one line that names the file and the place."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_modules.data.sources import BUILTIN_CHAT, BUILTIN_LETTERS, BUILTIN_SAFETY, BUILTIN_TEXT, Row

if TYPE_CHECKING:
    from llm_modules.data.sources import Source

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_file(file: Path, kind: str, document_separator: str | None) -> Iterator[Row]:
    """The rows of one file of a known format."""
    if kind == "text":
        yield from _text(file, document_separator)
        return
    readers: dict[str, Callable[[Path], Iterator[Row]]]
    readers = {"jsonl": _jsonl, "json": _json, "csv": _csv, "parquet": _parquet}
    yield from readers[kind](file)


def _decoded(file: Path, data: bytes, offset: int = 0) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file}: not UTF-8: byte 0x{data[error.start]:02x} at offset {offset + error.start}; convert the file, "
            "e.g. with `iconv -f LATIN1 -t UTF-8`"
        ) from error


def _text(file: Path, separator: str | None) -> Iterator[Row]:
    text = _decoded(file, file.read_bytes().removeprefix(BYTE_ORDER_MARK))
    documents = re.split(separator, text) if separator else [text]
    # A group in the expression makes re.split return the separators too (or None): only every n-th part is text.
    step = re.compile(separator).groups + 1 if separator else 1
    for number, document in enumerate(documents[::step], 1):
        if document.strip():
            yield Row({"text": document}, str(file), number)


def _jsonl(file: Path) -> Iterator[Row]:
    offset = 0
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            start = offset
            offset += len(line)
            if number == 1 and line.startswith(BYTE_ORDER_MARK):
                line, start = line[3:], 3
            if not line.strip():
                continue
            try:
                value = json.loads(_decoded(file, line, start))
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}:{number}: no JSON: {error.msg} at column {error.colno}") from error
            yield _object(file, number, value, surrogates=_SURROGATE.search(line) is not None)


def _object(file: Path, number: int, value: Any, surrogates: bool) -> Row:
    """A row of JSON; ``surrogates``: whether escapes stand in it of which two make a character, and one makes none."""
    if not isinstance(value, dict):
        raise ValueError(f"{file}:{number}: a row must be a JSON object, not {type(value).__name__}")
    if surrogates:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{file}:{number}: half a surrogate pair (\\ud800 to \\udfff), which is no character, as where a text "
                "was cut in the middle of an emoji; take it out"
            ) from error
    return Row(value, str(file), number)


def _json(file: Path) -> Iterator[Row]:
    data = file.read_bytes().removeprefix(BYTE_ORDER_MARK)
    try:
        value = json.loads(_decoded(file, data))
    except json.JSONDecodeError as error:
        hint = "; is it JSON Lines? Then name it .jsonl" if error.msg == "Extra data" else ""
        raise ValueError(f"{file}:{error.lineno}: no JSON: {error.msg} at column {error.colno}{hint}") from error
    if isinstance(value, dict):
        lists = [name for name, content in value.items() if isinstance(content, list)]
        if len(lists) != 1:
            raise ValueError(
                f"{file}: a list of objects, or an object with one list in it, is needed; it has {len(lists)}"
            )
        value = value[lists[0]]
    if not isinstance(value, list):
        raise ValueError(f"{file}: a list of objects is needed, not {type(value).__name__}")
    surrogates = _SURROGATE.search(data) is not None
    for number, row in enumerate(value, 1):
        yield _object(file, number, row, surrogates)


def _csv(file: Path) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    text = _decoded(file, file.read_bytes().removeprefix(BYTE_ORDER_MARK))
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    number = 0
    try:
        names = list(reader.fieldnames or [])
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"{file}: broken CSV: the header has {twice!r} twice; give each column a name of its own")
        for number, row in enumerate(reader, 1):
            if None in row or None in row.values():
                found = len(row.get(None) or []) + sum(
                    value is not None for name, value in row.items() if name is not None
                )
                raise ValueError(
                    f"{file}:{number}: broken CSV: row {number} (up to line {reader.line_num}) has {found} fields, the "
                    f"header has {len(reader.fieldnames or [])}"
                )
            yield Row(dict(row), str(file), number)
    except csv.Error as error:
        raise ValueError(f"{file}:{number + 1}: broken CSV in row {number + 1}: {error}") from error


def _parquet(file: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield Row(_without_gaps(row), str(file), number)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file}: broken Parquet: {str(error).splitlines()[0]}") from error


def _without_gaps(row: dict[str, Any]) -> dict[str, Any]:
    """A row without the empty fields inside of its columns.

    Arrow gives every object of a column the keys of all: a call of ``f(a=1)`` comes back as ``f(a=1, b=None)`` because
    another row has a ``b``, and would be trained so.
    """

    def cleaned(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: cleaned(item) for name, item in value.items() if item is not None}
        return [cleaned(item) for item in value] if isinstance(value, list) else value

    return {name: cleaned(value) for name, value in row.items()}


def read_builtin(path: str, split: str) -> Iterator[Row]:
    """The rows of a built-in corpus: `text`, `messages`, or `messages` with `chosen` and `rejected`."""
    if split not in ("train", "validation"):
        raise ValueError(f"source {path!r}: no split {split!r}; there are train and validation")
    for number, row in enumerate(_builtin_rows(path, split), 1):
        yield Row(dict(row), f"{path}[{split}]", number)


def _builtin_rows(path: str, split: str) -> Iterable[Mapping[str, Any]]:
    from llm_modules.data import python_docs, safety_requests, word_letters

    if path in BUILTIN_LETTERS:
        if path.endswith(("better", "safer")):
            return word_letters.pairs(split, "better" if path.endswith("better") else "safer")
        return word_letters.conversations(split) if path.endswith("chat") else word_letters.questions(split)
    if path in BUILTIN_SAFETY:
        what = path.removeprefix("builtin:safety").removeprefix("-")
        if what in ("preferences", "compliances"):
            return safety_requests.preferences(split) if what == "preferences" else safety_requests.compliances(split)
        kinds: dict[str, safety_requests.Kind] = {"refusals": "harmful", "twins": "benign"}
        return safety_requests.requests(split, kinds.get(what))
    python = {BUILTIN_TEXT: python_docs.documents, BUILTIN_CHAT: python_docs.conversations}
    return python.get(path, python_docs.preferences)(split)


def builtin_version(path: str) -> str:
    """What a built-in corpus is made of: the code that makes it, and this Python where that is what it is about."""
    from llm_modules.data import python_docs, python_questions, safety_requests, safety_twins, word_letters

    safety = path in BUILTIN_SAFETY
    modules = (safety_requests, safety_twins) if safety else (python_docs, python_questions, word_letters)
    code = b"".join(Path(str(module.__file__)).read_bytes() for module in modules)
    return f"{path} {'' if safety else sys.version} {hashlib.sha256(code).hexdigest()}"


def _hub(source: Source) -> Any:
    import datasets

    try:
        return datasets.load_dataset(source.path, source.subset, split=source.split, revision=source.revision)
    except Exception as error:  # the hub client raises some forty unrelated types
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise ValueError(
            f"source {source.path!r}: no such file or folder, and `datasets` cannot load it as a hub id: {reason}"
        ) from error


def read_hub(source: Source) -> Iterator[Row]:
    """The rows of a split of a data set on the Hugging Face hub."""
    for number, row in enumerate(_hub(source), 1):
        yield Row(_without_gaps(dict(row)), f"{source.path}[{source.split}]", number)


def hub_version(source: Source) -> str:
    """`datasets`' own digest of the data."""
    return str(_hub(source)._fingerprint)
