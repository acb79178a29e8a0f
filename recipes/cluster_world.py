"""Which process of how many this is, by what torchrun or Slurm told it, and the place where all of them meet."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from recipes.errors import RankError, UserError
from recipes.ranks import under_srun

if TYPE_CHECKING:
    from torch.distributed import TCPStore

_PATIENCE = 60.0  # seconds of one try to reach rank 0
_NEWS = 60.0  # seconds between two lines about a wait
_PORT_KEY = "litrecipes/preflight/port"


@dataclass(frozen=True)
class World:
    """The processes of a job.

    Attributes:
        rank: of this process.
        size: how many there are to be.
        local_rank: of this process on its machine.
        local_size: processes of its machine.
        address: of rank 0's machine.
        port: MASTER_PORT, where torch's own rendezvous will be; 0: none was told (one process).
        agent: whether torchrun's agent keeps a store open at that port.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    port: int
    agent: bool = False

    def names(self, ranks: list[int]) -> str:
        """``ranks 2, 3 of 4 (node 1)``: nodes are counted as launchers deal ranks out to them."""
        nodes = sorted({rank // self.local_size for rank in ranks})
        where = f" (node {', '.join(map(str, nodes))})" if self.local_size < self.size else ""
        return f"rank{'s' * (len(ranks) > 1)} {spans(ranks)} of {self.size}{where}"


def spans(numbers: list[int]) -> str:
    """``0-3, 6`` for [0, 1, 2, 3, 6]."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    return ", ".join(f"{span[0]}-{span[-1]}" if len(span) > 1 else str(span[0]) for span in found)


def find_world() -> World:
    """Reads the launcher's variables.

    Raises:
        UserError: some of them are there and others are not.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in env:
                raise UserError(f"{name}: not set, although RANK and WORLD_SIZE are; a launcher sets all four")
        return World(
            int(env["RANK"]),
            int(env["WORLD_SIZE"]),
            int(env.get("LOCAL_RANK", "0")),
            int(env.get("LOCAL_WORLD_SIZE", "1")),
            env["MASTER_ADDR"],
            int(env["MASTER_PORT"]),
            env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )
    if under_srun():
        from lightning.fabric.plugins.environments import SLURMEnvironment

        slurm = SLURMEnvironment(auto_requeue=False)
        size = slurm.world_size()
        nodes = int(env.get("SLURM_NNODES", "1"))
        return World(
            slurm.global_rank(), size, slurm.local_rank(), max(1, size // nodes), slurm.main_address, slurm.main_port
        )
    return World(0, 1, 0, 1, "127.0.0.1", int(env.get("MASTER_PORT", "0")))


def open_store(world: World, seconds: float) -> TCPStore:
    """The store of this check, which rank 0 keeps; the others wait for it.

    Where torchrun keeps a store, ours is beside it, and its port is told there: theirs outlives a restart of the
    processes, with what the killed ones had written.

    Raises:
        UserError: rank 0's port is taken, or rank 0 was not reached in time.
    """
    from torch.distributed import TCPStore

    wait = timedelta(seconds=seconds)
    if world.rank == 0:
        port = 0 if world.agent else world.port
        try:
            store = TCPStore("0.0.0.0", port, None, True, wait, wait_for_workers=False)
        except RuntimeError as error:  # torch's DistNetworkError is one
            raise UserError(
                f"MASTER_PORT {port}: not free on {socket.gethostname()}, where rank 0 is; choose another "
                f"({' '.join(str(error).split())[:120]})"
            ) from error
        if world.agent:
            TCPStore(world.address, world.port, None, False, wait).set(_PORT_KEY, str(store.port))
        return store
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        port = _told_port(world, end - time.monotonic()) if world.agent else world.port
        if port and _answers(world.address, port):
            with contextlib.suppress(RuntimeError):  # of a process that was just killed: look again
                return TCPStore(world.address, port, None, False, timedelta(seconds=max(1.0, end - time.monotonic())))
        time.sleep(0.2)
    raise RankError(
        f"rank 0 at {world.address}:{world.port} was not reached within {seconds:.0f} s by rank {world.rank} on "
        f"{socket.gethostname()}: it never started, or a firewall or the wrong network interface is between them"
    )


def _told_port(world: World, seconds: float) -> int:
    from torch.distributed import TCPStore

    agent = TCPStore(world.address, world.port, None, False, timedelta(seconds=max(1.0, seconds)))
    return int(agent.get(_PORT_KEY)) if agent.check([_PORT_KEY]) else 0


def _answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=2.0).close()
    except OSError:
        return False
    return True


def wait_until_closed(world: World, seconds: float = 10.0) -> None:
    """Until rank 0 has closed its store at MASTER_PORT, so that nobody takes it for the one that torch opens next."""
    end = time.monotonic() + seconds
    while not world.agent and world.port and time.monotonic() < end and _answers(world.address, world.port):
        time.sleep(0.05)


def wait_for_nodes(world: World) -> None:
    """Until the first process of every node is here, however long that takes: each may have data to prepare.

    The processes' own connection would wait for half an hour. Who dies is noticed by the launcher, which ends all.
    Called by the first process of each node, before there is that connection; of no effect in others.
    """
    if world.local_size >= world.size or world.rank % world.local_size:
        return
    others = list(range(world.local_size, world.size, world.local_size))
    if world.rank == 0:
        store = open_store(world, _PATIENCE)
        _wait_for(store, world, "prepared", others)
        store.set("all/0", "")
        _wait_for(store, world, "left", others)
        return
    while True:
        with contextlib.suppress(RankError):  # rank 0 has not opened it: it is busy
            store = open_store(world, _PATIENCE)
            break
    store.set(f"prepared/{world.rank}", "")
    _wait_for(store, world, "all", [0])
    store.set(f"left/{world.rank}", "")
    del store
    wait_until_closed(world)


def _wait_for(store: TCPStore, world: World, kind: str, ranks: list[int]) -> None:
    begin = news = time.monotonic()
    while not store.check([f"{kind}/{rank}" for rank in ranks]):
        if time.monotonic() > news + _NEWS:
            news = time.monotonic()
            missing = world.names([rank for rank in ranks if not store.check([f"{kind}/{rank}"])])
            print(f"waiting for {missing} to prepare data, {news - begin:.0f} s", file=sys.stderr, flush=True)
        time.sleep(0.2)


def own_address(world: World) -> tuple[str, str]:
    """This machine's address towards rank 0, and the network interface that has it."""
    import fcntl
    import struct

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # connecting it sends nothing
        try:
            probe.connect((world.address, world.port or 1))
        except OSError:
            return "unknown", "unknown"
        address = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name.encode()[:15]))  # SIOCGIFADDR
            except OSError:
                continue  # it has no address
            if socket.inet_ntoa(answer[20:24]) == address:
                return address, name
    return address, "unknown"
