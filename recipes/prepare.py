"""`recipes prepare`: train a tokenizer, or tokenize a recipe's data ahead of a run."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.errors import UserError

if TYPE_CHECKING:
    from llm_modules.data.sources import Row, Source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = """examples:
  recipes prepare tokenizer --source builtin:python-docs --vocab_size 8192 --out tokenizers/python
  recipes prepare tokenizer --source data:books my_notes/ --out tokenizers/mine
  recipes prepare data -c pretrain/books --sequence_length 1024"""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="{tokenizer,data}")
    tokenizer = kinds.add_parser(
        "tokenizer", help="train a byte-level BPE tokenizer", description="Trains a byte-level BPE tokenizer."
    )
    tokenizer.add_argument(
        "--source",
        nargs="+",
        action="extend",
        required=True,
        metavar="PATH",
        help="file, folder, glob, hub id, data:NAME (below LITRECIPES_DATA), builtin:python-docs or builtin:python-qa",
    )
    tokenizer.add_argument("--out", type=Path, required=True, help="folder to write")
    tokenizer.add_argument(
        "--vocab_size", type=int, default=8192, help="tokens, special ones included (default: %(default)s)"
    )
    tokenizer.add_argument(
        "--columns", nargs="+", default=[], metavar="NAME", help="columns to read (default: `text` or `messages`)"
    )
    tokenizer.add_argument(
        "--chat_template", default="chatml", help="a shipped template or a .jinja file (default: %(default)s)"
    )
    tokenizer.add_argument(
        "--min_frequency", type=int, default=2, help="rarer pairs are not merged (default: %(default)s)"
    )
    tokenizer.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")
    # Its words are those of `recipes fit`; a prefix that nobody types hands them over untouched.
    data = kinds.add_parser(
        "data", help="tokenize a recipe's data; takes what `recipes fit` takes", prefix_chars="\0", add_help=False
    )
    data.add_argument("words", nargs="*")


def run(args: argparse.Namespace) -> int:
    return _tokenizer(args) if args.kind == "tokenizer" else _data(args.words)


def _tokenizer(args: argparse.Namespace) -> int:
    from llm_modules.data.sources import Source
    from llm_modules.data.tokenizer_training import check_folder, save_tokenizer, train_tokenizer

    check_folder(args.out, overwrite=args.overwrite)
    sources = [Source(path) for path in args.source]
    for source in sources:
        source.files()  # what is missing is said before the work begins
    trained = train_tokenizer(_texts(sources, args.columns), args.vocab_size, args.chat_template, args.min_frequency)
    save_tokenizer(trained.tokenizer, args.out, overwrite=args.overwrite)
    sample = "\n".join(text for text, _ in zip(_texts(sources, args.columns), range(50), strict=False))[:100_000]
    tokens = len(trained.tokenizer(sample, add_special_tokens=False, verbose=False)["input_ids"])
    print(
        f"{args.out}: {len(trained.tokenizer):,} tokens from {trained.documents:,} documents, "
        f"{trained.characters / 1e6:.1f} M characters; {len(sample) / max(tokens, 1):.2f} characters a token"
    )
    return 0


def _texts(sources: Sequence[Source], columns: Sequence[str]) -> Iterator[str]:
    for source in sources:
        for row in source.rows():
            yield _text(row, columns)


def _text(row: Row, columns: Sequence[str]) -> str:
    """What of a row is learned from.

    Raises:
        UserError: the row has none of the columns.
    """
    found = row.columns
    if columns:
        if missing := [name for name in columns if name not in found]:
            raise UserError(f"{row.origin}: no column {missing[0]!r} (--columns); there are: {', '.join(found)}")
        return "\n".join(str(found[name]) for name in columns)
    if isinstance(found.get("text"), str):
        return str(found["text"])
    if isinstance(found.get("messages"), list):
        return "\n".join(str(message.get("content") or "") for message in found["messages"])
    raise UserError(
        f"{row.origin}: neither a column `text` nor `messages`; name some with --columns: {', '.join(found)}"
    )


def _data(words: Sequence[str]) -> int:
    from recipes.checks import check_values
    from recipes.command_line import parse_command
    from recipes.compose import compose

    command = parse_command("prepare data", words)
    if command.help is not None or not command.configs:
        print("usage: recipes prepare data -c NAME [-c OVERLAY ...] [--dotted.key value ...]")
        print("Tokenizes what a recipe trains and validates on, so that `recipes fit` finds it in the cache.")
        return 0 if command.help is not None else 2
    composed = compose(command.configs, command.overrides)
    check_values(composed)

    from recipes.cli import RecipeCLI

    cli = RecipeCLI(composed)
    cli.instantiate()
    if cli.datamodule is None:
        raise UserError(f"{composed.name}: the recipe has no `data` to prepare")
    cli.datamodule.prepare_data()
    cli.datamodule.setup("fit")
    for part, documents in cli.datamodule.corpus.documents.items():
        print(f"{part}: {len(documents):,} documents")
    print(f"tokenized data: {cli.datamodule.cache_dir}")
    return 0
