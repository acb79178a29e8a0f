"""What each process of a job says of its machine, and what is wrong when they are laid side by side."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipes.cluster_world import World, own_address, spans
from recipes.compose import Composed, is_class_name
from recipes.errors import OUR_PACKAGES, one_line
from recipes.run_folder import PACKAGES

Report = dict[str, Any]
# What must be the same everywhere: the report's part, what it is called, what is done about it.
_SAME = (
    ("versions", "package versions differ", "install the same on all nodes"),
    ("code", "the code differs", "put the same checkout on all nodes"),
    ("recipe", "the recipe differs", "start all nodes with the same files and flags"),
)
_MOST = 5  # differences that are named


def describe(world: World, composed: Composed | None, device: str) -> Report:
    """What this process has to say, as plain values."""
    address, interface = own_address(world)
    name, identity = _device(device, world.local_rank)
    return {
        "host": socket.gethostname(),
        "address": address,
        "interface": interface,
        "device": name,
        "device_id": identity if name else "",
        "versions": versions(),
        "code": code_digests(composed),
        "recipe": {} if composed is None else {"recipe": _digest(repr(composed.root.plain()).encode())},
        "problem": import_problem(composed) if name else _too_few(world, identity),
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that a run is made of."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def code_digests(composed: Composed | None) -> dict[str, str]:
    """Of every source file of ours, and of the user's own modules that the recipe names."""
    root = Path(__file__).resolve().parent.parent
    files = [file for package in OUR_PACKAGES for file in sorted((root / package).rglob("*.py"))]
    found = {str(file.relative_to(root)): _digest(file.read_bytes()) for file in files}
    for name in sorted({path.split(".")[0] for path in _modules({} if composed is None else composed.values)}):
        if name in OUR_PACKAGES or name in sys.stdlib_module_names:
            continue
        spec = importlib.util.find_spec(name)
        if spec is None:
            found[f"module {name}"] = "missing"
        elif spec.origin and Path(spec.origin).is_relative_to(Path.cwd()) and Path(spec.origin).is_file():
            found[f"module {name}"] = _digest(Path(spec.origin).read_bytes())
    return found


def import_problem(composed: Composed | None) -> str:
    """What is wrong with a module of the user's that the recipe names: mostly, that it imports what is not here."""
    for name in dict.fromkeys(_modules({} if composed is None else composed.values)):
        top = name.split(".")[0]
        if top in OUR_PACKAGES or top in sys.stdlib_module_names:
            continue
        spec = importlib.util.find_spec(top)
        if spec is None or not spec.origin or not Path(spec.origin).is_relative_to(Path.cwd()):
            continue  # missing, or a library: those are compared by what they are
        try:
            importlib.import_module(name)
        except Exception as error:  # noqa: BLE001  # whatever a user's file does when it is read
            return f"module {name} cannot be imported: {one_line(error)}"
    return ""


def _modules(value: Any) -> Iterator[str]:
    """The modules whose classes a config names, by class_path or by the name alone."""
    if is_class_name(value) and "." in value:
        yield value.rpartition(".")[0]
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _modules(item)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def _too_few(world: World, count: int) -> str:
    """The same words on all ranks of a machine, so that one line says it."""
    if count == 0:
        return "no GPU is visible to torch; fewer --devices, other nodes, or --trainer.accelerator cpu"
    return f"{count} GPU{'s' * (count > 1)} visible to torch, fewer than its processes, {world.local_size}"


def _device(kind: str, local_rank: int) -> tuple[str, Any]:
    """The device of this process and what tells it from others; ("", how many there are) where it has none."""
    if kind == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return f"CPU, {cores} cores", ""
    import torch

    count = torch.cuda.device_count()
    # Slurm may show each task its own GPU only, as number 0.
    index = 0 if count == 1 and "SLURM_STEP_ID" in os.environ else local_rank
    if index >= count:
        return "", count
    properties = torch.cuda.get_device_properties(index)
    return properties.name, str(getattr(properties, "uuid", ""))


# --- side by side ---------------------------------------------------------------------------------------------------


def problems(reports: dict[int, Report]) -> list[str]:
    """What is wrong, one line each: what a process found itself, then what is not the same everywhere."""
    found = [
        f"rank{'s' * (len(ranks) > 1)} {spans(ranks)} on {host}: {text}"
        for (host, text), ranks in _grouped(reports, lambda report: (report["host"], report["problem"]))
        if text
    ]
    for part, title, fix in _SAME:
        lines = _differences(reports, part)
        more = f"; and {len(lines) - _MOST} more" if len(lines) > _MOST else ""
        if lines:
            found.append(f"{title}: {'; '.join(lines[:_MOST])}{more}; {fix}")
    for (host, identity), ranks in _grouped(reports, lambda report: (report["host"], report["device_id"])):
        if identity and len(ranks) > 1:
            found.append(f"ranks {spans(ranks)} on {host}: all have the same GPU; give each task its own")
    return found


def _differences(reports: dict[int, Report], part: str) -> list[str]:
    """``safetensors is 0.6.2 on ranks 0-7 (a), missing on ranks 8-15 (b)`` for each name that differs."""
    names = sorted({name for report in reports.values() for name in report[part]})
    lines = []
    for name in names:
        groups = _grouped(reports, lambda report, name=name: report[part].get(name, "missing"))
        if len(groups) > 1:
            each = [f"{value} on rank{'s' * (len(ranks) > 1)} {_places(reports, ranks)}" for value, ranks in groups]
            lines.append(f"{name} is {', '.join(each)}")
    return lines


def _grouped(reports: dict[int, Report], key: Any) -> list[tuple[Any, list[int]]]:
    groups: dict[Any, list[int]] = {}
    for rank, report in sorted(reports.items()):
        groups.setdefault(key(report), []).append(rank)
    return list(groups.items())


def _places(reports: dict[int, Report], ranks: list[int]) -> str:
    hosts = sorted({reports[rank]["host"] for rank in ranks})
    return f"{spans(ranks)} ({', '.join(hosts[:3])}{', ...' if len(hosts) > 3 else ''})"


def machines(reports: dict[int, Report]) -> list[str]:
    """A line a machine: its ranks, devices, and how it is reached."""
    lines = []
    for host, ranks in _grouped(reports, lambda report: report["host"]):
        devices = [f"{name} x {len(own)}" for name, own in _grouped({r: reports[r] for r in ranks}, _of("device"))]
        ways = [f"{way} {address}" for (way, address), _ in _grouped({r: reports[r] for r in ranks}, _way)]
        lines.append(f"{host}: rank{'s' * (len(ranks) > 1)} {spans(ranks)}; {', '.join(devices)}; {', '.join(ways)}")
    return lines


def _of(name: str) -> Any:
    return lambda report: report[name]


def _way(report: Report) -> tuple[str, str]:
    return report["interface"], report["address"]
