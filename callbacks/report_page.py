"""report.html: one file that shows a run, or compares several; no network, nothing in it is executed but our script."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from callbacks.report_data import RunData, differing_settings
from callbacks.report_safety import safety_section

_HERE = Path(__file__).parent
_COLORED = re.compile(r"\x1b\[32m(.*?)\x1b\[0m|⟦(.*?)⟧", re.DOTALL)


def render(runs: list[RunData]) -> str:
    """The page. All text of the runs is escaped; the browser is told to run no script but the page's own."""
    script = (_HERE / "report_page.js").read_text(encoding="utf-8")
    style = (_HERE / "report_page.css").read_text(encoding="utf-8")
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    policy = f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:"
    data = json.dumps([{"name": run.name, "columns": run.columns} for run in runs], separators=(",", ":"))
    sections = [
        _summary(runs),
        '<section id="charts"><noscript><p class="note">The curves need JavaScript.</p></noscript></section>',
        safety_section(runs),
        *(_histogram(run, len(runs) > 1) for run in runs),
        _samples(runs),
        *_audits(runs),
        _differences(runs),
        *(_details(run, len(runs) > 1) for run in runs),
    ]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
<main>
{"".join(section for section in sections if section)}
<footer>LitRecipes. This page is one file and loads nothing.</footer>
</main>
<script type="application/json" id="data">{data.replace("<", chr(92) + "u003c")}</script>
<script>{script}</script>
</body>
</html>
"""


def _hash(text: str) -> str:
    """The source expression by which a Content-Security-Policy knows an inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


# --- the run in numbers -----------------------------------------------------------------------------------------------


def _summary(runs: list[RunData]) -> str:
    if len(runs) == 1:
        run = runs[0]
        figures = "".join(
            f'<div class="figure"><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>'
            for label, value in _figures(run)
            if value
        )
        return f"<header><h1>{escape(run.name)}</h1>{_chip(run)}{_problems(run)}<dl>{figures}</dl></header>"
    labels = [label for label, _ in _figures(runs[0])]
    table = [dict(_figures(run)) for run in runs]
    shown = [label for label in labels if any(row[label] for row in table)]
    head = "".join(f"<th>{escape(label)}</th>" for label in ("Run", "", *shown))
    body = "".join(
        f'<tr><th class="run-{index % 8}"><i></i>{escape(run.name)}</th><td>{_chip(run)}</td>'
        + "".join(f"<td>{escape(row[label])}</td>" for label in shown)
        + "</tr>"
        for index, (run, row) in enumerate(zip(runs, table, strict=True))
    )
    problems = "".join(_problems(run) for run in runs)
    return (
        f'<header><h1>{len(runs)} runs</h1>{problems}<div class="wide"><table class="runs"><thead><tr>{head}</tr>'
        f"</thead><tbody>{body}</tbody></table></div></header>"
    )


def _figures(run: RunData) -> list[tuple[str, str]]:
    """The run's key figures: (label, value as text, empty where unknown)."""

    def number(name: str, form: Callable[[float], str], choose: Callable[[list[float]], float]) -> str:
        values = run.values(name)
        return form(choose(values)) if values else ""

    def last(values: list[float]) -> float:
        return values[-1]

    def median(values: list[float]) -> float:
        return sorted(values)[len(values) // 2]

    return [
        ("Steps", number("step", lambda v: f"{v:,.0f}", last)),
        ("Tokens seen", number("tokens_seen", _short, last)),
        ("Train loss", number("train/loss", lambda v: f"{v:.4g}", last)),
        ("Best val loss", number("val/loss", lambda v: f"{v:.4g}", min)),
        ("Best perplexity", number("val/perplexity", lambda v: f"{v:,.4g}", min)),
        ("Tokens/s", number("throughput/tokens_per_second", _short, median)),
        ("MFU", number("throughput/mfu", lambda v: f"{v:.1%}", median)),
        ("Peak memory", number("memory/peak_gib", lambda v: f"{v:.2f} GiB", max)),
        ("Training time", number("elapsed", _duration, last)),
    ]


def _short(value: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if letter == 'k' else size):.3g} {letter}"
    return f"{value:,.0f}"


def _duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def _chip(run: RunData) -> str:
    return f'<span class="chip {escape(run.status)}">{escape(run.status)}</span>'


def _problems(run: RunData) -> str:
    return "".join(f'<p class="problem">{escape(run.name)}: {escape(text)}</p>' for text in run.problems)


def _histogram(run: RunData, several: bool) -> str:
    """The held-out answers' scores, the chosen and the rejected as bars side by side."""
    if not run.histogram:
        return ""
    most = max(max(row[2:]) for row in run.histogram) or 1.0
    width, height, bars = 20 * len(run.histogram), 120, []
    for place, (low, high, *counts) in enumerate(run.histogram):
        for kind, (name, count) in enumerate(zip(("chosen", "rejected"), counts, strict=True)):
            size = height * count / most
            bars.append(
                f'<rect class="bar k{kind}" x="{20 * place + 10 * kind}" y="{height - size:.1f}" width="9" '
                f'height="{size:.1f}"><title>{name}, {low:.3g} to {high:.3g}: {count:,.0f}</title></rect>'
            )
    ends = f"from {run.histogram[0][0]:.3g} to {run.histogram[-1][1]:.3g}"
    legend = '<span class="k0 key">■</span> chosen <span class="k1 key">■</span> rejected'
    return (
        f'<section id="scores"><h2>Scores of held-out answers{_of(run.name, several)}</h2><p class="note">{legend}, '
        f'{ends}</p><div class="chart"><svg viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="Scores of held-out answers">{"".join(bars)}</svg></div></section>'
    )


# --- samples ----------------------------------------------------------------------------------------------------------


def _samples(runs: list[RunData]) -> str:
    """Before and after, prompt by prompt; of several runs the last text of each."""
    cards = []
    prompts: dict[str, None] = {}
    for run in runs:
        prompts |= dict.fromkeys(_prompt(row["prompt"]) for row in run.samples)
    for prompt in prompts:
        columns, history = [], []
        for run in runs:
            rows = [row for row in run.samples if _prompt(row["prompt"]) == prompt]
            label = f"{run.name}, " if len(runs) > 1 else ""
            ends = rows[-1:] if len(runs) > 1 else rows[:1] + rows[1:][-1:]
            columns += [_sample(f"{label}step {row['step']:,}", row["text"]) for row in ends]
            history += [_sample(f"{label}step {row['step']:,}", row["text"]) for row in rows if row not in ends]
        between = f"<details><summary>{len(history)} more</summary>{''.join(history)}</details>" if history else ""
        cards.append(
            f'<article><pre class="prompt">{escape(prompt)}</pre><div class="columns">{"".join(columns)}</div>'
            f"{between}</article>"
        )
    return f'<section id="samples"><h2>Samples</h2>{"".join(cards)}</section>' if cards else ""


def _sample(label: str, text: Any) -> str:
    return f"<figure><figcaption>{escape(label)}</figcaption><pre>{escape(str(text))}</pre></figure>"


def _prompt(prompt: Any) -> str:
    if not isinstance(prompt, list):
        return str(prompt)
    return "\n".join(f"{m.get('role')}: {m.get('content')}" if isinstance(m, dict) else str(m) for m in prompt)


# --- audit, config, environment ---------------------------------------------------------------------------------------


def _of(name: str, several: bool) -> str:
    return f" <small>{escape(name)}</small>" if several else ""


def _audits(runs: list[RunData]) -> list[str]:
    """One section for each data that the runs were trained on."""
    groups: dict[str, list[RunData]] = {}
    for run in runs:
        if run.audit:
            groups.setdefault(json.dumps(run.audit, sort_keys=True), []).append(run)
    return [_audit(group, len(groups) > 1) for group in groups.values()]


def _audit(runs: list[RunData], several: bool) -> str:
    run = runs[0]
    names = ", ".join(run.name for run in runs)
    lines = "".join(f"<li>{escape(str(line))}</li>" for line in run.audit.get("lines", []))
    fatal = "".join(f'<p class="problem">{escape(str(line))}</p>' for line in run.audit.get("fatal", []))
    sample = _marked(str(run.audit.get("sample") or ""))
    shown = (
        f'<p class="note">A row as the model sees it; <mark>marked</mark> is what is trained.</p><pre>{sample}</pre>'
    )
    return f"<section><h2>Data{_of(names, several)}</h2>{fatal}<ul>{lines}</ul>{shown if sample else ''}</section>"


def _marked(sample: str) -> str:
    """Escaped, with what is trained in <mark>."""
    parts, end = [], 0
    for match in _COLORED.finditer(sample):
        text = match[1] if match[1] is not None else match[2]
        parts.append(f"{escape(sample[end : match.start()])}<mark>{escape(text)}</mark>")
        end = match.end()
    return "".join(parts) + escape(sample[end:])


def _differences(runs: list[RunData]) -> str:
    rows = differing_settings(runs) if len(runs) > 1 else []
    if not rows:
        return ""
    head = "".join(f'<th class="run-{i % 8}"><i></i>{escape(run.name)}</th>' for i, run in enumerate(runs))
    body = "".join(
        f"<tr><th>{escape(key)}</th>{''.join(f'<td>{escape(value)}</td>' for value in values)}</tr>"
        for key, values in rows
    )
    return (
        '<section><h2>What differs in the settings</h2><div class="wide"><table>'
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div></section>"
    )


def _details(run: RunData, several: bool) -> str:
    parts = []
    if run.config:
        opened = "" if several else " open"
        parts.append(f"<details{opened}><summary>Configuration</summary><pre>{escape(run.config)}</pre></details>")
    if run.environment:
        rows = "".join(
            f"<tr><th>{escape(key)}</th><td>{escape(text)}</td></tr>" for key, text in _environment(run.environment)
        )
        parts.append(f'<details><summary>Environment</summary><div class="wide"><table>{rows}</table></div></details>')
    heading = f"<h2>Setup{_of(run.name, several)}</h2>"
    return f"<section>{heading}{''.join(parts)}</section>" if parts else ""


def _environment(environment: dict[str, Any]) -> list[tuple[str, str]]:
    """Lines of the table; versions and lists are spelled out."""
    rows = []
    for key, value in environment.items():
        if key == "command" and isinstance(value, list):
            text = " ".join(str(word) for word in value)
        elif isinstance(value, dict):
            text = ", ".join(f"{name} {item}" for name, item in value.items())
        elif isinstance(value, list):
            simple = [item if isinstance(item, str) else json.dumps(item, ensure_ascii=False) for item in value]
            text = ", ".join(simple)
        else:
            text = "" if value is None else str(value)
        if text:
            rows.append((key, text))
    return rows
