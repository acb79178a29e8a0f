"""Where rows come from: files, folders, globs, hub ids and the built-in corpora, with errors of one line.

A row is a dict of columns with the place it was read from (file and line), so that whatever is wrong with it later can
be named. Nothing here knows about tokens.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

DATA_VARIABLE = "LITRECIPES_DATA"
"""Environment variable: the folder that paths beginning with ``data:`` are in."""

BUILTIN_TEXT = "builtin:python-docs"
BUILTIN_CHAT = "builtin:python-qa"
BUILTIN_PAIRS = "builtin:python-preferences"
BUILTIN_SAFETY = (
    "builtin:safety",
    "builtin:safety-refusals",
    "builtin:safety-twins",
    "builtin:safety-compliances",
    "builtin:safety-preferences",
)
BUILTIN_LETTERS = ("builtin:letters", "builtin:letters-chat", "builtin:letters-better", "builtin:letters-safer")
BUILTIN = (BUILTIN_TEXT, BUILTIN_CHAT, BUILTIN_PAIRS, *BUILTIN_LETTERS, *BUILTIN_SAFETY)

SUFFIXES = {".txt": "text", ".jsonl": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet"}

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")


class Row(NamedTuple):
    """One row: its columns, the file it is in and its number there (line of a .jsonl; row or document otherwise).

    ``mapped`` are the columns that the source's ``columns`` gave: they go before others that could be meant.
    """

    columns: dict[str, Any]
    file: str
    number: int
    mapped: frozenset[str] = frozenset()

    @property
    def origin(self) -> str:
        return f"{self.file}:{self.number}"


@dataclass
class Source:
    """One place that rows come from.

    Args:
        path: A file (.txt .jsonl .json .csv .parquet), a folder or a glob of such files, a hub id of `datasets`,
            `builtin:python-docs` (text), `builtin:python-qa` (conversations), `builtin:python-preferences` (pairs of
            answers), `builtin:safety` or a part of it (see the README of `llm_modules/data`). `data:NAME` is NAME below
            the folder named by the environment variable LITRECIPES_DATA.
        columns: Our column name -> the name in the files, e.g. `{text: body}`, or a place in it: `instances.0.output`.
        format: How a file is read; `auto` goes by its suffix.
        weight: How often a document is seen per epoch: 1 once, 2 twice, 0.5 half of them, the other half in the next.
        split: Split of a hub data set or of a built-in corpus.
        subset: Configuration name of a hub data set.
        revision: Commit or tag of a hub data set, to hold it fixed.
        limit: Only the first so many rows (all if not given).
        document_separator: For .txt: a regular expression between documents, e.g. `\\n\\n+`; not given, a file is one.
    """

    path: str
    columns: dict[str, str] = field(default_factory=dict)
    format: Literal["auto", "text", "jsonl", "json", "csv", "parquet", "hub"] = "auto"
    weight: float = 1.0
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    limit: int | None = None
    document_separator: str | None = None

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"source {self.path!r}: weight {self.weight} is not above 0; leave the source out instead")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"source {self.path!r}: limit {self.limit} is below 1; leave it out to read every row")
        if self.document_separator is not None:
            try:
                pattern = re.compile(self.document_separator)
            except re.error as error:
                raise ValueError(
                    f"source {self.path!r}: document_separator {self.document_separator!r} is no regular expression: "
                    f"{error}"
                ) from error
            if pattern.match(""):
                raise ValueError(
                    f"source {self.path!r}: document_separator {self.document_separator!r} matches the empty string; "
                    "use + instead of *"
                )

    @property
    def builtin(self) -> bool:
        return self.path.startswith("builtin:")

    def files(self) -> list[tuple[Path, str]] | None:
        """(file, format) in a fixed order; None where there are no files (a built-in corpus, a hub id).

        Raises:
            ValueError: nothing is there, it is empty, or its format is not known.
        """
        if self.builtin:
            if self.path not in BUILTIN:
                raise ValueError(f"source {self.path!r} is not known; built in are {', '.join(map(repr, BUILTIN))}")
            return None
        if self.format == "hub":
            return None
        path = _located(self.path)
        if path.is_file():
            found = [path]
        elif path.is_dir():
            found = [p for p in _visible(path) if self._takes(p)]
            if not found:
                raise ValueError(f"source {self.path!r}: no {' '.join(SUFFIXES)} file in this folder")
        elif glob.has_magic(str(path)):
            found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
            if not found:
                raise ValueError(f"source {self.path!r}: no file matches")
        elif _HUB_ID.match(self.path) and Path(self.path).suffix not in SUFFIXES and not path.parent.is_dir():
            return None
        else:
            raise ValueError(f"source {self.path!r}: no such file or folder{_nearest(path)}")
        for file in found:
            if self._format(file) is None:
                raise ValueError(
                    f"{file}: format {file.suffix or 'without suffix'!r} is not known; allowed: {' '.join(SUFFIXES)} "
                    "(or name it with `format`)"
                )
            if file.stat().st_size == 0:
                raise ValueError(f"{file}: the file is empty")
        return [(file, self._format(file) or "") for file in found]

    def left_out(self) -> dict[str, int]:
        """What a folder holds and `files` leaves out: ``{"files left out of notes/ (.md)": 3}``, by suffix."""
        path = Path() if self.builtin or self.format == "hub" else _located(self.path)
        if self.builtin or self.format == "hub" or not path.is_dir():
            return {}
        others = Counter(
            p.name if self._format(p) or not p.suffix else p.suffix for p in _visible(path) if not self._takes(p)
        )
        return {f"files left out of {self.path} ({suffix})": count for suffix, count in sorted(others.items())}

    def _takes(self, file: Path) -> bool:
        """Of a folder's files. (One of data often holds its licence as text beside its rows.)"""
        about = self.format == "auto" and file.stem.upper() in ("LICENSE", "LICENCE", "README", "NOTICE")
        return self._format(file) is not None and not about

    def _format(self, file: Path) -> str | None:
        return SUFFIXES.get(file.suffix.lower()) if self.format == "auto" else self.format

    def rows(self) -> Iterator[Row]:
        """Every row, in order. A column is there under our name where `columns` maps it.

        Raises:
            ValueError: one line: what is wrong with which file and line.
        """
        from llm_modules.data import readers

        files = self.files()
        if files is None:
            rows = readers.read_builtin(self.path, self.split) if self.builtin else readers.read_hub(self)
        else:
            rows = (row for file, kind in files for row in readers.read_file(file, kind, self.document_separator))
        count = 0
        for row in rows:
            if self.limit is not None and count >= self.limit:
                return
            count += 1
            yield self._renamed(row)
        if count == 0:
            raise ValueError(f"source {self.path!r}: there are no rows in it")

    def _renamed(self, row: Row) -> Row:
        if not self.columns:
            return row
        taken = set(self.columns.values())
        renamed = {name: value for name, value in row.columns.items() if name not in taken}
        renamed |= {ours: _looked_up(row, theirs) for ours, theirs in self.columns.items()}
        return row._replace(columns=renamed, mapped=frozenset(self.columns))

    def fingerprint(self) -> str:
        """A digest of what `rows` will give: of the files' bytes, never of their names' dates."""
        digest = hashlib.sha256(repr((self.columns, self.split, self.limit, self.document_separator)).encode())
        files = self.files()
        if files is not None:
            for file, kind in files:
                with file.open("rb") as stream:
                    digest.update(f"{kind} {hashlib.file_digest(stream, 'sha256').hexdigest()}".encode())
            return digest.hexdigest()
        from llm_modules.data import readers

        digest.update((readers.builtin_version(self.path) if self.builtin else readers.hub_version(self)).encode())
        return digest.hexdigest()


def _visible(folder: Path) -> list[Path]:
    """The files in a folder and below it, without hidden ones, in a fixed order."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _looked_up(row: Row, name: str) -> Any:
    """The value of a column, or of a place inside of one: `instances.0.output`."""
    if name in row.columns:
        return row.columns[name]
    value: Any = row.columns
    for part in name.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise ValueError(f"{row.origin}: no column {name!r} (`columns`); there are: {_names(row.columns)}")
    return value


def require(row: Row, column: str) -> Any:
    """The value of a column.

    Raises:
        ValueError: names the columns that there are.
    """
    if column not in row.columns:
        raise ValueError(
            f"{row.origin}: no column {column!r}; there are: {_names(row.columns)} "
            f"(name another with `columns: {{{column}: NAME}}`)"
        )
    return row.columns[column]


def _names(columns: dict[str, Any]) -> str:
    return ", ".join(map(str, columns)) or "none"


def _located(path: str) -> Path:
    """The path with `data:` resolved.

    Raises:
        ValueError: `data:` without the variable, or a variable that names no folder.
    """
    if not path.startswith("data:"):
        return Path(path).expanduser()
    folder = os.environ.get(DATA_VARIABLE)
    if not folder:
        raise ValueError(
            f"source {path!r}: the environment variable {DATA_VARIABLE} is not set; set it to the folder that holds "
            f"{path.removeprefix('data:')!r}"
        )
    if not Path(folder).is_dir():
        raise ValueError(f"source {path!r}: {DATA_VARIABLE} is {folder!r}, which is no folder")
    return Path(folder) / path.removeprefix("data:").lstrip("/")


def _nearest(path: Path) -> str:
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent:
        path, parent = parent, parent.parent
    if not parent.is_dir():
        return ""
    near = difflib.get_close_matches(path.name, [p.name for p in parent.iterdir()], n=1, cutoff=0.5)
    return f"; did you mean {str(parent / near[0])!r}?" if near else f" (there is a folder {str(parent)!r})"
