"""What a launcher is to run: a checked recipe on so many nodes and devices, as the words of a `recipes fit`."""

from __future__ import annotations

import argparse
import re
import secrets
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from recipes.checks import check_values
from recipes.compose import Composed, compose, long_key
from recipes.errors import UserError

NODES, DEVICES = "trainer.num_nodes", "trainer.devices"
# torchrun says in these how many nodes came; an elastic job knows it only then.
ELASTIC = {NODES: "${oc.decode:${oc.env:GROUP_WORLD_SIZE,1}}", DEVICES: "${oc.decode:${oc.env:LOCAL_WORLD_SIZE,1}}"}


class Shell(str):
    """A word that the shell is to read as it stands, with its variables."""


@dataclass(frozen=True)
class Plan:
    """A job.

    Attributes:
        composed: the merged recipe, as it will be on the most nodes.
        configs: the recipe and its overlays, as they were named.
        overrides: dotted keys with their values, those of nodes, devices and accumulation among them.
        least: nodes without which the job does not begin.
        nodes: nodes that it takes at most.
        devices: processes, each with its device, on a node.
        accelerated: whether a device is a GPU.
        rows: rows of an optimizer step, over all nodes; None where the data do not say.
        preflight: seconds that the check before training waits; 0: no check.
        check_only: make the check and stop.
        directory: where the job works.
    """

    composed: Composed
    configs: list[str]
    overrides: list[tuple[str, str]]
    least: int
    nodes: int
    devices: int
    accelerated: bool
    rows: int | None
    preflight: int
    check_only: bool
    directory: str

    @property
    def elastic(self) -> bool:
        return self.least != self.nodes

    @property
    def slug(self) -> str:
        """The recipe's name as a part of a host's name."""
        return re.sub(r"[^a-z0-9]+", "-", self.composed.name.lower()).strip("-")[:40] or "recipe"

    def words(self, job: str, configs: Sequence[str] | None = None, more: Sequence[tuple[str, str]] = ()) -> list[str]:
        """The words behind `recipes`.

        Args:
            job: the name by which a restart knows the run that it goes on with.
            configs: other names for the recipe, where the job finds it elsewhere.
            more: dotted keys that this launcher adds.
        """
        named = [word for name in configs or self.configs for word in ("-c", name)]
        values = [word for key, value in [*self.overrides, *more] for word in _flag(f"--{key}", value)]
        if self.check_only:
            return ["check", "cluster", "--timeout", str(self.preflight or 60), *named, *values]
        checked = ["--preflight", str(self.preflight)] if self.preflight else []
        return ["fit", *named, *values, *checked, "--job", job]

    def summary(self) -> str:
        count = f"{self.least} to {self.nodes}" if self.elastic else str(self.nodes)
        kind = "GPUs" if self.accelerated else "processes"
        step = f"; {self.rows} rows an optimizer step" if self.rows else ""
        least = f" (on {self.nodes} nodes; on fewer, fewer: not the same training)" if step and self.elastic else ""
        return f"{self.composed.name}: {count} node(s) x {self.devices} {kind}{step}{least}"


def _flag(flag: str, value: str) -> list[str]:
    return [f"{flag}={value}"] if value.startswith("-") or isinstance(value, Shell) else [flag, value]


def new_job(plan: Plan) -> str:
    """A name that no other job has; with what Kubernetes adds to it, a name of a host (63 letters at most)."""
    return f"{plan.slug[:32].rstrip('-')}-{time.strftime('%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def shell_line(words: Sequence[str]) -> str:
    """Words as a line of a shell script."""
    return " ".join(word if isinstance(word, Shell) else shlex.quote(word) for word in words)


def folded(words: Sequence[str], width: int = 110) -> str:
    """The same, on several lines where it is long."""
    lines = [""]
    for index, word in enumerate(words):
        text = shell_line([word])
        # A flag and its value stay together.
        begins = word.startswith("-") or index == 0
        if begins and lines[-1] and len(lines[-1]) + len(text) > width:
            lines.append("   ")
        lines[-1] += f" {text}" if lines[-1] else text
    return " \\\n".join(lines)


def as_yaml(objects: Sequence[dict[str, Any]]) -> str:
    """Documents of YAML; texts of several lines stand there as they are."""

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Dumper.add_representer(str, text)
    return yaml.dump_all(objects, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


# --- checking -------------------------------------------------------------------------------------------------------


def add_common_arguments(parser: argparse.ArgumentParser, *, elastic: bool = False) -> None:
    """The flags that all launchers have."""
    parser.add_argument("-c", "--config", action="append", default=[], metavar="NAME", help="the recipe, then overlays")
    nodes = "machines; MIN:MAX: begin with MIN, go on with as many as there are" if elastic else "machines (default: 1)"
    parser.add_argument("--nodes", default="1", metavar="N[:M]" if elastic else "N", help=nodes)
    parser.add_argument(
        "--devices", type=_whole, required=True, metavar="M", help="GPUs, or processes, of each machine"
    )
    parser.add_argument(
        "--rows-per-step",
        type=_whole,
        metavar="ROWS",
        help="rows of an optimizer step over all devices: sets trainer.accumulate_grad_batches to what gives as many",
    )
    text = "seconds that the check of the cluster before training waits for a missing process (60; 0: no check)"
    parser.add_argument("--preflight", type=_seconds, default=60, metavar="S", help=text)
    parser.add_argument("--check-only", action="store_true", help="make that check on the nodes and stop")
    parser.add_argument("--interface", metavar="NAME", help="network interface of the collectives, such as ib0")
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted, and stop")


def _whole(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def _seconds(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of seconds")
    return int(text)


def make_plan(args: argparse.Namespace, directory: str) -> Plan:
    """Merges and checks the recipe for the machines that are asked for.

    Raises:
        UserError: anything about it is wrong; nothing was submitted.
    """
    if not args.config:
        raise UserError(f"-c: a recipe must be named, such as recipes launch {args.launcher} -c sft/dolly")
    least, nodes = _nodes(args.nodes, elastic=args.launcher == "torchrun")
    sizes = {NODES: str(nodes), DEVICES: str(args.devices)}
    given = _without_sizes(args.overrides, sizes)
    composed = compose(args.config, [*given, *sizes.items()])
    check_values(composed)
    values = _parsed(composed)
    world = nodes * args.devices
    replicas = world // _sharing_rows(composed, values, world)
    batch = ((values.get("data") or {}).get("init_args") or {}).get("batch_size")
    window = values["trainer"].get("accumulate_grad_batches") or 1
    if args.rows_per_step is not None:
        if least != nodes:
            raise UserError("--rows-per-step: cannot be kept while the number of nodes changes; give --nodes N")
        parts = f"{replicas} {'devices' if replicas == world else 'groups of devices'}"
        window = _window(args.rows_per_step, replicas, parts, batch)
        given = [*given, ("trainer.accumulate_grad_batches", str(window))]
        composed = compose(args.config, [*given, *sizes.items()])
        check_values(composed)
    return Plan(
        composed,
        list(args.config),
        [*given, *(ELASTIC if least != nodes else sizes).items()],
        least,
        nodes,
        args.devices,
        values["trainer"].get("accelerator") != "cpu",
        replicas * batch * window if isinstance(batch, int) else None,
        args.preflight,
        args.check_only,
        directory,
    )


def _nodes(text: str, *, elastic: bool) -> tuple[int, int]:
    least, colon, most = text.partition(":")
    if colon and not elastic:
        raise UserError(f"--nodes {text}: a number that changes is for torchrun; write --nodes {most or least}")
    numbers = [least, most] if colon else [least]
    if not all(number.isdigit() and int(number) > 0 for number in numbers):
        raise UserError(f"--nodes {text}: a number is asked for, such as 2{' or 1:4' if elastic else ''}")
    if int(numbers[-1]) < int(numbers[0]):
        raise UserError(f"--nodes {text}: the most, {most}, is less than the least, {least}")
    return int(numbers[0]), int(numbers[-1])


def _without_sizes(overrides: Sequence[tuple[str, str]], sizes: dict[str, str]) -> list[tuple[str, str]]:
    """The overrides without nodes and devices, which have flags of their own here."""
    for key, value in overrides:
        if key in sizes and value != sizes[key]:
            flag = "--nodes" if key == NODES else "--devices"
            raise UserError(f"--{key} {value}: contradicts {flag}, which is {sizes[key]}; leave the former out")
    return [(key, value) for key, value in overrides if key not in sizes]


def _parsed(composed: Composed) -> dict[str, Any]:
    """The config with all defaults, checked key by key as `fit` would. Nothing is built."""
    from recipes.cli import RecipeCLI

    values: dict[str, Any] = yaml.safe_load(RecipeCLI(composed).config_text())
    return values


def _sharing_rows(composed: Composed, values: dict[str, Any], world: int) -> int:
    """Devices that work on the same rows. The sides of a mesh of devices must multiply to their number."""
    strategy = values["trainer"].get("strategy")
    sides = (strategy.get("init_args") or {}) if isinstance(strategy, dict) else {}
    data, tensor = sides.get("data_parallel_size"), sides.get("tensor_parallel_size")
    if isinstance(data, int) and isinstance(tensor, int) and data * tensor != world:
        key = tuple(long_key(composed.root, "trainer.strategy.data_parallel_size").split("."))
        raise UserError(
            f"{composed.origin(key)}: `data_parallel_size` {data} x `tensor_parallel_size` {tensor} is "
            f"{data * tensor}, but there are {world} devices (--nodes x --devices)"
        )
    sharing = 1
    for name in ("tensor_parallel", "tensor_parallel_size", "context_parallel"):
        side = sides.get(name, 1)
        if not isinstance(side, int):
            continue
        sharing *= side
        if side < 1 or world % sharing:
            key = tuple(long_key(composed.root, f"trainer.strategy.{name}").split("."))
            what = f"is {side}" if side == sharing else f"makes groups of {sharing} devices"
            raise UserError(
                f"{composed.origin(key)}: `{name}` {what}, which does not divide the {world} devices "
                "(--nodes x --devices)"
            )
    return sharing


def _window(rows: int, replicas: int, parts: str, batch: Any) -> int:
    """Micro-batches of an accumulation window; `replicas`, called `parts`, is in how many the rows are dealt."""
    if not isinstance(batch, int):
        raise UserError("--rows-per-step: the recipe's data have no batch_size to reckon with; set the accumulation")
    at_once = replicas * batch
    if rows % at_once:
        below, above = rows // at_once * at_once, (rows // at_once + 1) * at_once
        near = f"{below} or {above}" if below else str(above)
        raise UserError(
            f"--rows-per-step {rows}: does not divide: {parts} x data.batch_size {batch} are {at_once} rows at "
            f"once; write {near}, or another --data.batch_size"
        )
    return rows // at_once
