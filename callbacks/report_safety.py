"""What safety.csv tells, for the report: harm removed against helpfulness kept, and a table."""

from __future__ import annotations

from html import escape

from callbacks.report_data import RunData

MEANINGS = {
    "attack_success": "harmful requests that were answered (where the suite has a judge of harm: harmfully)",
    "over_refusal": "benign requests that were refused",
    "refusal": "harmful requests that were refused",
    "benign_right": "benign requests that got the answer of the data",
    "truncated": "requests that were cut to fit, and answered without their beginning",
}
"""Of what ``RefusalSuite`` and ``SafetyEvaluation`` measure: shares, so between 0 and 1."""

BY_STRING_MATCH = (
    "Unless the suite has a judge of its own, refusals are told by how answers begin. On XSTest's answers, labelled by "
    "people, 26 of 243 full compliances (10.7 %) count as refusals so, and 321 of 329 full refusals are found."
)
"""The error of ``StringMatch``, on which all but ``benign_right`` and ``truncated`` rest; a test measures it."""

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 320, 56, 20, 14, 44
"""Of the chart, in pixels, and its margins."""


def safety_section(runs: list[RunData]) -> str:
    """The section of the page; empty where nothing was measured."""
    if not any(run.safety for run in runs):
        return ""
    several = len(runs) > 1
    tables = "".join(_table(run, several) for run in runs if run.safety)
    return f'<section id="safety"><h2>Safety</h2>{_trade_off(runs, several)}{tables}</section>'


def _trade_off(runs: list[RunData], several: bool) -> str:
    """Of each suite that has both: harm removed to the right, helpfulness kept upwards, step by step."""
    curves = []
    for run in runs:
        for name in run.safety:
            prefix, found, rest = name.partition("attack_success")
            other = run.safety.get(f"{prefix}over_refusal", {})
            steps = sorted(run.safety[name].keys() & other) if found and not rest else []
            points = [(step, 1 - run.safety[name][step][0], 1 - other[step][0]) for step in steps]
            if points:
                label = ", ".join(part for part in (run.name if several else "", prefix.rstrip("_")) if part)
                curves.append((label, points))
    if not curves:
        return ""
    ticks = "".join(_tick(share / 4) for share in range(5))
    lines = "".join(_curve(points, number % 8) for number, (_, points) in enumerate(curves))
    keys = "".join(f'<b class="key k{n % 8}">● {escape(label)}</b>' for n, (label, _) in enumerate(curves) if label)
    return (
        f'<div class="chart"><h3>Helpfulness kept against harm removed{keys}</h3>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" height="{HEIGHT}" role="img" aria-label="helpfulness against harm">'
        f"{ticks}{lines}"
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
        "harmful requests not answered</text>"
        f'<text x="{LEFT}" y="{TOP - 3}">safe requests not refused; numbers are steps</text></svg></div>'
    )


def _place(x: float, y: float) -> tuple[float, float]:
    return LEFT + x * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - y * (HEIGHT - TOP - BOTTOM - 10)


def _tick(share: float) -> str:
    (left, y), (right, _), (x, bottom) = _place(0, share), _place(1, share), _place(share, 0)
    return (
        f'<line class="tick" x1="{left}" x2="{right}" y1="{y}" y2="{y}"></line>'
        f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{share:.0%}</text>'
        f'<text x="{x}" y="{bottom + 18}" text-anchor="middle">{share:.0%}</text>'
    )


def _curve(points: list[tuple[int, float, float]], color: int) -> str:
    places = [(step, *_place(x, y)) for step, x, y in points]
    path = "".join(f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (_, x, y) in enumerate(places))
    dots = "".join(f'<circle class="dot k{color}" cx="{x:.1f}" cy="{y:.1f}" r="3"></circle>' for _, x, y in places)
    ends = {places[0][0]: places[0], places[-1][0]: places[-1]}.values()
    numbers = "".join(
        f'<text x="{x + (8 if x < WIDTH - 80 else -8):.1f}" y="{y + 16:.1f}" '
        f'text-anchor="{"start" if x < WIDTH - 80 else "end"}">{step:,}</text>'
        for step, x, y in ends
    )
    return f'<path class="curve k{color}" d="{path}"></path>{dots}{numbers}'


def _table(run: RunData, several: bool) -> str:
    """The first and the last measurement of everything."""
    rows = []
    for name, by_step in run.safety.items():
        first, last = min(by_step), max(by_step)
        value, low, high, count = by_step[last]
        before = f"{by_step[first][0]:.4g}" if first < last else ""
        cells = (before, f"{value:.4g}", f"{low:.4g} to {high:.4g}", f"{count:,}", f"{last:,}")
        rows.append(f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    head = "".join(f"<th>{text}</th>" for text in ("", "First", "Last", "95 % interval", "Of", "At step"))
    caption = f"<h3>{escape(run.name)}</h3>" if several else ""
    body = (
        f'{caption}<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )
    return f"<details open><summary>Numbers</summary>{_meanings(run)}{body}</details>"


def _meanings(run: RunData) -> str:
    """What the names in the table mean, without the suite's name before them and the category behind."""
    found = (next((m for m in MEANINGS if name.partition("/")[0].endswith(m)), None) for name in run.safety)
    shares = dict.fromkeys(name for name in found if name is not None)
    texts = [f"{escape(name)}: {MEANINGS[name]}" for name in shares]
    match = f" {BY_STRING_MATCH}" if shares.keys() & {"attack_success", "over_refusal", "refusal"} else ""
    return f'<p class="note">Shares: {"; ".join(texts)}.{match}</p>' if texts else ""
