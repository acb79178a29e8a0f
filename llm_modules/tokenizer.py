"""Floor 0: the one place that opens a tokenizer, so that data, model and export cannot disagree about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_modules.folders import local_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BYTES = "builtin:bytes"
"""A tokenizer of the 256 bytes and the special tokens: no file, no training; for tests and first steps."""

SPECIAL_TOKENS = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder, of a hub id, or ``builtin:bytes``.

    Raises:
        ValueError: there is none at ``source``, or it has neither a pad nor an end-of-text token.
    """
    if source == BYTES:
        return byte_tokenizer()
    from transformers import AutoTokenizer

    try:
        folder = local_folder(source)
    except ValueError as error:
        raise ValueError(
            f"tokenizer: {error}; allowed: a folder with tokenizer files (make one with `recipes prepare tokenizer`), "
            f"a hub id, or {BYTES!r}"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder or source))
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"tokenizer: cannot open {source!r}: {reason}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer: {source!r} has no end-of-text token (eos_token); set one in its files")
    if tokenizer.pad_token_id is None:
        # Labels mask padding by position, never by id, so that sharing the id cannot hide a trained end token.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """``builtin:bytes``: byte-level BPE without merges, 256 bytes + 4 special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return wrap_tokenizer(tokenizer)


def wrap_tokenizer(tokenizer: object) -> PreTrainedTokenizerBase:
    """A ``tokenizers.Tokenizer`` with the project's special tokens, as a transformers fast tokenizer (no template)."""
    from transformers import PreTrainedTokenizerFast

    end, pad, *chat = SPECIAL_TOKENS
    tokenizer.add_special_tokens(SPECIAL_TOKENS)  # type: ignore[attr-defined]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=end,
        bos_token=end,
        pad_token=pad,
        additional_special_tokens=chat,
        clean_up_tokenization_spaces=False,
    )
