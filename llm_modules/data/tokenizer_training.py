"""Trains a byte-level BPE tokenizer (Sennrich et al., arXiv 1508.07909; on bytes: Radford et al., GPT-2)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_modules.data.templates import set_template
from llm_modules.tokenizer import SPECIAL_TOKENS, byte_tokenizer, wrap_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SMALLEST = 256 + len(SPECIAL_TOKENS)
"""Every byte is a token of its own, so that no text is unknown."""


@dataclass
class Trained:
    """A trained tokenizer and what it was trained on.

    Attributes:
        tokenizer: with special tokens and chat template.
        documents: number of texts read.
        characters: their characters.
    """

    tokenizer: PreTrainedTokenizerBase
    documents: int
    characters: int


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, chat_template: str = "chatml", min_frequency: int = 2
) -> Trained:
    """A byte-level BPE tokenizer of exactly ``vocab_size`` tokens, special ones included; the same for the same texts.

    Args:
        texts: the documents to learn from.
        vocab_size: bytes, merges and special tokens together.
        chat_template: name of a shipped template, a file, or the template itself.
        min_frequency: a pair that occurs less often is not merged.

    Raises:
        ValueError: ``vocab_size`` is below the 256 bytes and the special tokens, or above what the texts can fill, or
            there is no text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < SMALLEST:
        raise ValueError(f"vocab_size: {vocab_size} is below {SMALLEST} (256 bytes and {len(SPECIAL_TOKENS)} marks)")
    set_template(byte_tokenizer(), chat_template)  # a wrong one is said before the work, not after it
    counted = _Counted(texts)
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        min_frequency=min_frequency,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bare.train_from_iterator(counted, trainer)
    if not counted.characters:
        raise ValueError("source: there is no text to train a tokenizer on")
    tokenizer = wrap_tokenizer(bare)
    if len(tokenizer) < vocab_size:
        raise ValueError(
            f"vocab_size: {vocab_size} is more than these texts can fill ({counted.characters} characters have "
            f"{len(tokenizer)} tokens that occur {min_frequency} times); write {len(tokenizer)} or less, or add text"
        )
    set_template(tokenizer, chat_template)
    return Trained(tokenizer, counted.documents, counted.characters)


class _Counted:
    """Passes texts on and counts them."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = texts
        self.documents = 0
        self.characters = 0

    def __iter__(self) -> Any:
        for text in self.texts:
            self.documents += 1
            self.characters += len(text)
            yield text


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, *, overwrite: bool = False) -> None:
    """Writes tokenizer.json, its config and chat_template.jinja into ``folder``, which is made if missing.

    Raises:
        ValueError: the folder holds something, and ``overwrite`` is not set.
    """
    check_folder(folder, overwrite=overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(folder))


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Whether ``save_tokenizer`` may write there: asked before the work is done.

    Raises:
        ValueError: it may not.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out: {str(folder)!r} is a file; name a folder")
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"out: the folder {str(folder)!r} is not empty; name another, or add --overwrite")
