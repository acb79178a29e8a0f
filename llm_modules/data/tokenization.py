"""Rows to tokens: in parallel, with progress, once; the result is found again by what it was made of."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from llm_modules.data.parallel import ordered_map
from llm_modules.data.sources import Row, Source, require
from llm_modules.data.store import META, Encoded, TokenStore, write_store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK_ROWS = 256
CHUNK_CHARACTERS = 1 << 20
SMALL_CHUNKS = 32
"""Sources of so few chunks are tokenized in this process: starting others takes longer than the work."""

PROGRESS_SECONDS = 5.0


class Encoder(Protocol):
    """Rows to tokens. It is sent to other processes, so it must be picklable and importable."""

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, rows: Sequence[Row]) -> Encoded: ...

    def description(self) -> dict[str, Any]:
        """Its settings, as JSON: part of the name under which the result is kept."""
        ...


class TextEncoder:
    """Plain text: the document's tokens and the end-of-text token; all are predicted.

    Args:
        tokenizer: a tokenizer with an end-of-text token.
        add_bos: put the beginning-of-text token first; None: as the tokenizer does on its own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, add_bos: bool | None = None) -> None:
        self.tokenizer = tokenizer
        if add_bos and tokenizer.bos_token_id is None:
            raise ValueError(
                "data.add_bos: the tokenizer has no beginning-of-text token; leave it out or set it to false"
            )
        self.add_bos = adds_bos(tokenizer) if add_bos is None else add_bos

    def description(self) -> dict[str, Any]:
        return {"kind": "text", "add_bos": self.add_bos}

    def __call__(self, rows: Sequence[Row]) -> Encoded:
        texts = [self._text(row) for row in rows]
        start = [self.tokenizer.bos_token_id] if self.add_bos else []
        end = [self.tokenizer.eos_token_id]
        documents = [np.array([*start, *ids, *end], dtype=np.uint32) for ids in self._ids(texts)]
        data = [text.encode() for text in texts]
        hashes = np.array([content_hash(text) for text in data], dtype=np.uint64)
        return Encoded(
            tokens=np.concatenate(documents),
            trained=None,
            lengths=np.array([len(document) for document in documents], dtype=np.int64),
            sizes=np.array([len(text) for text in data], dtype=np.int64),
            hashes=hashes,
            groups=hashes,
            places=np.array([(0, row.number) for row in rows], dtype=np.int64),
        )

    def _ids(self, texts: list[str]) -> Iterator[list[int]]:
        if not self.tokenizer.is_fast:
            return iter(self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])
        # Twice as fast as a call of the tokenizer, because nothing but the ids is made.
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        return (encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False))

    @staticmethod
    def _text(row: Row) -> str:
        text = require(row, "text")
        if not isinstance(text, str):
            raise ValueError(f"{row.origin}: column 'text' must be a string, not {type(text).__name__}")
        return text


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer begins every text with its beginning-of-text token."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and len(ids) > 1 and ids[0] == tokenizer.bos_token_id


def highest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest token id: a vocabulary with gaps has larger ones than it has tokens."""
    return max(tokenizer.get_vocab().values())


def content_hash(data: bytes) -> int:
    """64 bits that are the same for the same content, on every machine."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of everything that decides about the tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = [
        backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True),
        type(tokenizer).__name__,
        repr(sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())),
        repr(tokenizer.chat_template),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _code_fingerprint() -> str:
    """A digest of the code between the files and the tokens: a change there must not find old results."""
    names = [
        "sources.py",
        "readers.py",
        "store.py",
        "tokenization.py",
        "chat.py",
        "masks.py",
        "conversation_encoding.py",
        "preferences.py",
        "prompts.py",
        "preprompts.py",
        "labelled.py",
    ]
    folder = Path(__file__).parent
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in names)).hexdigest()


def store_folder(source: Source, encoder: Encoder, cache_dir: Path) -> Path:
    """Where the tokens of a source are kept: a name made of all that they depend on."""
    made_of = [
        source.fingerprint(),
        tokenizer_fingerprint(encoder.tokenizer),
        json.dumps(encoder.description(), sort_keys=True),
        _code_fingerprint(),
    ]
    return cache_dir / "tokens" / hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:32]


def tokenize(source: Source, encoder: Encoder, cache_dir: Path, workers: int | None) -> TokenStore:
    """The tokens of a source, from the cache or made now.

    Args:
        workers: processes; 1: in this one; None: as many as there are cores (at most 8) where there is enough to do.
    """
    folder = store_folder(source, encoder, cache_dir)
    if (folder / META).is_file():
        return TokenStore(folder)
    files: list[str] = []
    parts = _encoded(source, encoder, workers, files)
    try:
        return write_store(folder, parts, vocabulary=highest_id(encoder.tokenizer) + 1, files=files)
    except OSError as error:
        if error.filename is not None and cache_dir not in Path(error.filename).parents:
            raise  # of reading a source
        reason = error.strerror or f"the disk is full, it seems ({error})"  # numpy says how much was written, not why
        raise ValueError(
            f"data.cache_dir: {cache_dir}: tokens cannot be written: {reason}; make room, or name another folder"
        ) from error


def _chunks(source: Source, files: list[str]) -> Iterator[tuple[list[Row], list[int]]]:
    """Rows, some at a time, with the number of each one's file in ``files``, which grows as they are read."""
    rows: list[Row] = []
    numbers: list[int] = []
    size = 0
    for row in source.rows():
        if len(rows) >= CHUNK_ROWS or size >= CHUNK_CHARACTERS:
            yield rows, numbers
            rows, numbers, size = [], [], 0
        if not files or files[-1] != row.file:
            files.append(row.file)
        rows.append(row)
        numbers.append(len(files) - 1)
        size += sum(len(value) for value in row.columns.values() if isinstance(value, str))
    if rows:
        yield rows, numbers


def _encoded(source: Source, encoder: Encoder, workers: int | None, files: list[str]) -> Iterator[Encoded]:
    chunks = _chunks(source, files)
    first = list(itertools.islice(chunks, SMALL_CHUNKS))
    if workers is None:
        workers = min(os.cpu_count() or 1, 8) if len(first) == SMALL_CHUNKS else 1
    progress = _Progress(source.path)
    in_files: deque[list[int]] = deque()

    def rows() -> Iterator[list[Row]]:
        for chunk, numbers in itertools.chain(first, chunks):
            in_files.append(numbers)
            yield chunk

    for part in ordered_map(encoder, rows(), workers):
        # An encoder knows the rows' numbers; of which file they are is known here, in the same order.
        part.places[:, 0] = in_files.popleft()
        progress.add(part)
        yield part
    progress.done()


class _Progress:
    """A line now and then, which a log file can hold as well as a terminal; nothing for what is done at once."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.start = self.last = time.monotonic()
        self.documents = self.tokens = self.bytes = 0
        self.said = False

    def add(self, part: Encoded) -> None:
        self.documents += len(part.lengths)
        self.tokens += len(part.tokens)
        self.bytes += int(part.sizes.sum())
        if time.monotonic() - self.last >= PROGRESS_SECONDS:
            self.last = time.monotonic()
            self.said = True
            self._say("tokenizing")

    def done(self) -> None:
        if self.said:
            self._say("tokenized")

    def _say(self, verb: str) -> None:
        seconds = max(time.monotonic() - self.start, 1e-9)
        print(
            f"{verb} {self.name}: {self.documents:,} documents, {self.tokens:,} tokens, {self.bytes / 1e6:,.1f} MB, "
            f"{self.tokens / seconds / 1e6:.2f} M tokens/s, {seconds:.0f} s",
            file=sys.stderr,
            flush=True,
        )
