"""Tokenized documents on disk: written once, whole or not at all, and read through memory maps."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

META = "meta.json"
SPLITS, VALUES = "splits.npy", "values.npy"
RECORDS, RECORD_OFFSETS = "records.bin", "record_offsets.npy"
ARRAYS = {"lengths": np.int64, "sizes": np.int64, "hashes": np.uint64, "groups": np.uint64, "places": np.int64}


@dataclass
class Encoded:
    """Some documents as tokens.

    Attributes:
        tokens: (N,) uint32, the documents one after another.
        trained: (N,) bool, which of them are to be predicted; None: all.
        lengths: (D,) int64 tokens of each document.
        sizes: (D,) int64 UTF-8 bytes of the trained text of each document (for bits per byte).
        hashes: (D,) uint64 digest of each document's content.
        groups: (D,) uint64, the same for documents that must fall on one side of the split.
        places: (D, 2) int64 number of the file, and number of the row in it.
        counts: name of a thing that was counted -> how often (for the audit).
        splits: (D,) int64, of documents that are two sequences one after another, where the second begins; None: they
            are one.
        values: (D, ...) float32 numbers that come with each document (NaN: not given); None: there are none.
        records: (D) a value of JSON that comes with each document; None: there are none.
    """

    tokens: NDArray[np.uint32]
    trained: NDArray[np.bool_] | None
    lengths: NDArray[np.int64]
    sizes: NDArray[np.int64]
    hashes: NDArray[np.uint64]
    groups: NDArray[np.uint64]
    places: NDArray[np.int64]
    counts: dict[str, int] = field(default_factory=dict)
    splits: NDArray[np.int64] | None = None
    values: NDArray[np.float32] | None = None
    records: list[Any] | None = None


class TokenStore:
    """The documents of one source.

    Attributes:
        lengths, sizes, hashes, groups, places, splits, values: see `Encoded`.
        offsets: (D + 1,) int64 where each document starts.
        meta: what is known of the whole: files, counts.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta: dict[str, Any] = json.loads((folder / META).read_text())
        self.lengths: NDArray[np.int64] = np.load(folder / "lengths.npy", mmap_mode="r")
        self.sizes: NDArray[np.int64] = np.load(folder / "sizes.npy", mmap_mode="r")
        self.hashes: NDArray[np.uint64] = np.load(folder / "hashes.npy", mmap_mode="r")
        self.groups: NDArray[np.uint64] = np.load(folder / "groups.npy", mmap_mode="r")
        self.places: NDArray[np.int64] = np.load(folder / "places.npy", mmap_mode="r")
        self.offsets: NDArray[np.int64] = np.concatenate([[0], np.cumsum(self.lengths)])
        self.tokens: NDArray[Any] = np.memmap(folder / "tokens.bin", dtype=self.meta["dtype"], mode="r")
        self.splits: NDArray[np.int64] | None = None
        if (folder / SPLITS).is_file():
            self.splits = np.load(folder / SPLITS, mmap_mode="r")
        self.values: NDArray[np.float32] | None = None
        if (folder / VALUES).is_file():
            self.values = np.load(folder / VALUES, mmap_mode="r")
        if (folder / RECORD_OFFSETS).is_file():
            self.record_offsets: NDArray[np.int64] = np.load(folder / RECORD_OFFSETS, mmap_mode="r")
            self.records: NDArray[np.uint8] = np.memmap(folder / RECORDS, dtype=np.uint8, mode="r")
        self.trained: NDArray[np.bool_] | None = None
        if self.meta["masked"]:
            self.trained = np.memmap(folder / "trained.bin", dtype=np.bool_, mode="r")

    def __len__(self) -> int:
        return len(self.lengths)

    def record(self, document: int) -> Any:
        """The JSON value that came with a document."""
        start, stop = self.record_offsets[document : document + 2]
        return json.loads(self.records[start:stop].tobytes())

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickled memory map would carry all of its data to a spawned worker.
        return TokenStore, (self.folder,)

    def origin(self, document: int) -> str:
        """`file:row` of a document."""
        file, number = self.places[document]
        return f"{self.meta['files'][file]}:{number}"


def write_store(folder: Path, parts: Iterable[Encoded], *, vocabulary: int, files: list[str]) -> TokenStore:
    """Write a store, or open the one that another run has put there in the meantime.

    Args:
        folder: where it goes; it appears there by one rename, complete.
        parts: the documents, some at a time.
        vocabulary: the largest token id and one more, which decides between two and four bytes a token.
        files: names of the files that `places` counts; may still grow while `parts` are drawn.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    dtype = "uint16" if vocabulary <= 2**16 else "uint32"
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        columns: dict[str, list[NDArray[Any]]] = {name: [] for name in ARRAYS}
        counts: dict[str, int] = {}
        splits: list[NDArray[np.int64]] = []
        values: list[NDArray[np.float32]] = []
        records: list[bytes] = []
        masked = False
        with (temporary / "tokens.bin").open("wb") as tokens, (temporary / "trained.bin").open("wb") as trained:
            for part in parts:
                if len(part.tokens) and int(part.tokens.max()) > np.iinfo(dtype).max:
                    raise ValueError(
                        f"data: token id {int(part.tokens.max())} is outside of the vocabulary {vocabulary}"
                    )
                part.tokens.astype(dtype).tofile(tokens)
                if part.trained is not None:
                    masked = True
                    part.trained.astype(np.bool_).tofile(trained)
                for name, arrays in columns.items():
                    arrays.append(getattr(part, name))
                splits += [] if part.splits is None else [part.splits]
                values += [] if part.values is None else [part.values]
                records += [json.dumps(record, ensure_ascii=False).encode() for record in part.records or ()]
                for name, count in part.counts.items():
                    counts[name] = counts.get(name, 0) + count
        for name, arrays in columns.items():
            np.save(temporary / f"{name}.npy", np.concatenate(arrays).astype(ARRAYS[name]))
        if splits:
            np.save(temporary / SPLITS, np.concatenate(splits))
        if values:
            np.save(temporary / VALUES, np.concatenate(values))
        if records:
            (temporary / RECORDS).write_bytes(b"".join(records))
            np.save(temporary / RECORD_OFFSETS, np.cumsum([0, *map(len, records)]))
        meta = {"dtype": dtype, "masked": masked, "files": files, "counts": counts}
        (temporary / META).write_text(json.dumps(meta, indent=1))
        _publish(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return TokenStore(folder)


def _publish(temporary: Path, folder: Path) -> None:
    for file in temporary.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    temporary.chmod(0o755)
    try:
        temporary.rename(folder)
    except OSError:
        # Another run was faster; its content is the same, because the folder's name is a digest of it.
        if not (folder / META).is_file():
            raise
