"""Two network namespaces with a cable between them: two nodes on one machine, each with a name and an address."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CABLE = "cable0"  # the interface, by the same name on both nodes
_TRY = "litrecipes-try"
_APT = ("apt-get", "-q", "-o", "DPkg::Lock::Timeout=120")


class TwoNodes:
    """Makes and removes them. They share this machine's files.

    Attributes:
        addresses: of the two nodes.
    """

    def __init__(self) -> None:
        self.names = [f"lit{os.getpid()}{letter}" for letter in "ab"]
        self.addresses = ["10.91.7.1", "10.91.7.2"]

    def start(self) -> None:
        for name in self.names:
            _ip("netns", "add", name)
        ends = [["name", CABLE, "netns", name] for name in self.names]
        _ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for name, address in zip(self.names, self.addresses, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", CABLE)
            self.set_link(name, up=True)
            _ip("-n", name, "link", "set", "lo", "up")

    def stop(self) -> None:
        """The cable goes with its ends."""
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def set_link(self, node: str, *, up: bool) -> None:
        _ip("-n", node, "link", "set", CABLE, "up" if up else "down")

    def run(self, node: int, words: list[str], folder: Path, variables: Mapping[str, str]) -> subprocess.Popen[str]:
        """Starts a command on a node, whose host name is the node's there."""
        name = self.names[node]
        rename = f'echo {name} > /proc/sys/kernel/hostname && exec "$@"'
        return subprocess.Popen(
            ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", rename, "sh", *words],
            cwd=folder,
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def _ip(*words: str) -> subprocess.CompletedProcess[Any]:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30)


def install() -> str:
    """Installs iproute2 where it is missing; returns why there can be no namespaces, or nothing."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        if shutil.which("apt-get") is None:
            return "needs ip (iproute2)"
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for words in (["update"], ["install", "-y", "--no-install-recommends", "iproute2"]):
            done = subprocess.run(
                [*_APT, *words],
                env=environment,
                capture_output=True,
                text=True,
            )
            if done.returncode:
                return f"apt-get {words[0]}: {' '.join((done.stderr or done.stdout).split())[-300:]}"
    if shutil.which("unshare") is None:
        return "needs unshare (util-linux)"
    try:
        _ip("netns", "add", _TRY)
        _ip("-n", _TRY, "link", "add", "try0", "type", "veth", "peer", "name", "try1")
    except subprocess.CalledProcessError as error:
        return f"this machine allows no network namespaces: {error.stderr.strip()}"
    finally:
        subprocess.run(["ip", "netns", "del", _TRY], capture_output=True)
    return ""
