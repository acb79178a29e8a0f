"""What the demo shows: a table and some answers in the terminal, and a page with all of it and the curves."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from recipes.demo import Answer, Number


def print_answers(answers: Sequence[Answer]) -> None:
    for answer in answers:
        print(f"Q: {answer.question}")
        for label, text in (("before", answer.before), ("after", answer.after), ("documented", answer.reference)):
            print(f"   {label:>10}: {' '.join(text.split())[:160]}")
        print()


def print_table(numbers: Sequence[Number]) -> None:
    widths = [max(len(row) for row in column) for column in zip(*map(_cells, numbers), strict=True)]
    for number in numbers:
        print("  ".join(cell.ljust(width) for cell, width in zip(_cells(number), widths, strict=True)).rstrip())


def _cells(number: Number) -> tuple[str, str, str, str]:
    return (number.name, number.measured, number.promised, "holds" if number.holds else "DOES NOT HOLD")


def write_page(
    path: Path,
    runs: Sequence[Path],
    numbers: Sequence[Number],
    answers: Sequence[Answer],
    commands: Sequence[tuple[str, float]],
    shown: int,
) -> None:
    """One file: the table, the commands, the answers before and after, then the two runs with their curves.

    Args:
        shown: answers that are open to the eye; the others are a click away.
    """
    from callbacks.report_data import read_run
    from callbacks.report_page import render
    from callbacks.run_files import write_whole

    page = render([read_run(run, status="finished") for run in runs])
    first = f"<header><h1>A language model's first life</h1>{_INTRODUCTION}{_table(numbers)}</header>"
    top = f"<main>\n{first}{_commands(commands)}{_answers(answers, shown)}"
    if "<main>\n" not in page:
        raise RuntimeError("callbacks/report_page.py: the page has no <main> to put the demo into")
    write_whole(path, page.replace("<main>\n", top, 1).replace("<title>2 runs</title>", "<title>Demo</title>", 1))


_INTRODUCTION = """<p>A tokenizer, a small Llama trained from nothing on the documentation and source of this machine's
Python, and the same model taught to answer questions. Every number and answer is about modules whose text was in none
of the training data.</p>"""


def _table(numbers: Sequence[Number]) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("", "measured", "promised", ""))
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(measured)}</td><td>{escape(promised)}</td><td>{held}</td></tr>"
        for name, measured, promised, held in map(_cells, numbers)
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _commands(commands: Sequence[tuple[str, float]]) -> str:
    lines = "\n".join(f"{escape(command)}  # {seconds:.0f} s" for command, seconds in commands)
    return f"<section><h2>Commands</h2><p>Each can be run by hand.</p><pre>{lines}</pre></section>"


def _answers(answers: Sequence[Answer], shown: int) -> str:
    cards = [
        f'<article><pre class="prompt">{escape(answer.question)}</pre><div class="columns">'
        f"{_figure('before fine-tuning', answer.before)}{_figure('after', answer.after)}"
        f"{_figure('the documentation', answer.reference)}</div></article>"
        for answer in answers
    ]
    more = f"<details><summary>{len(cards[shown:])} more</summary>{''.join(cards[shown:])}</details>"
    return f"<section><h2>The same questions before and after</h2>{''.join(cards[:shown])}{more}</section>"


def _figure(label: str, text: str) -> str:
    return f"<figure><figcaption>{escape(label)}</figcaption><pre>{escape(text.strip() or '(nothing)')}</pre></figure>"
