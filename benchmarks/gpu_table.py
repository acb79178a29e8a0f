"""The results of ``gpu`` as Markdown, to be put into README.md."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu_cases import CASES

TITLES = {
    "pretrain": "Pre-training, 1.24 B Llama, rows of 2,048, micro-batch 4, bf16-mixed, without checkpointing",
    "lora": "LoRA (rank 16, all linear layers) on 8 B in bf16, rows of 2,048, micro-batch 1, without checkpointing",
    "qlora": "QLoRA (nf4, scales quantized too) on 8 B, rows of 2,048, micro-batch 1, without checkpointing",
    "checkpointed": "LoRA on 8 B in bf16, rows of 2,048, micro-batch 8, with activation checkpointing",
    "strategies": "Strategies at world size 1, 135 M Llama, rows of 1,024, micro-batch 4, bf16-mixed",
}
_HEAD = "| case | tokens/s | s/step | MFU | peak GiB allocated | reserved | trained | loss first, last | seconds | |"
_RULE = "|---|---|---|---|---|---|---|---|---|---|"


def markdown(report: dict[str, Any]) -> str:
    """All tables, with what they were measured on."""
    machine, cases = report["machine"], report["cases"]
    where = machine.get("gpu") or f"no GPU: {machine['cpu']}"
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    lines = [f"{machine['date'][:10]}, {where}; Python {machine['python']}, {versions}."]
    if report["tiny"]:
        lines.append("\nTiny models, to see that everything runs: the numbers mean nothing.")
    for group, title in TITLES.items():
        rows = [name for name, case in CASES.items() if case.group == group and name in cases]
        if rows:
            lines += [f"\n### {title}\n", _HEAD, _RULE]
            lines += [_row(name, cases) for name in rows]
    lines.append("\nSeconds are of the whole process, loading included; loss and memory those of its training.")
    return "\n".join(lines) + "\n"


def _row(name: str, cases: dict[str, Any]) -> str:
    result = cases[name]
    if result["status"] != "done":
        note = " ".join(str(result.get("note", "")).replace("|", "\\|").split())
        said = f"{result['status']}: {note}" if note else result["status"]
        return f"| {name} |" + " - |" * 7 + f" {result['seconds']:.0f} | {said} |"
    trained = result["facts"].get("trained_parameters")
    cells = [
        f"{result['tokens_per_second']:,.0f}",
        f"{result['seconds_a_step']:.3f}",
        _number(result["mfu"], "{:.1%}"),
        _number(result["device_allocated_gib"], "{:.1f}"),
        _number(result["device_reserved_gib"], "{:.1f}"),
        _number(trained, "{:,}"),
        f"{result['first_loss']:.3f}, {result['final_loss']:.3f}",
        f"{result['seconds']:.0f}",
        remark(name, cases),
    ]
    return f"| {name} | " + " | ".join(cells) + " |"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def remark(name: str, cases: dict[str, Any]) -> str:
    """Whether it trained what the first of its group did: the same rows, to the same loss."""
    group = [other for other, case in CASES.items() if case.group == CASES[name].group]
    first = next(other for other in group if cases.get(other, {}).get("status") == "done")
    mine, theirs = cases[name], cases[first]
    if name == first:
        return ""
    if mine["rows"] != theirs["rows"]:
        return f"other rows than {first}!"
    # Peers draw other first values for an adapter; of our own runs the last loss is to be the same.
    which = "first_loss" if CASES[name].kind != CASES[first].kind else "final_loss"
    off = abs(mine[which] - theirs[which]) / abs(theirs[which])
    return f"same rows, {which.replace('_', ' ')} {off:.2%} off {first}'s"
