"""An all-reduce between the processes of a job: is the sum right, how fast is it, and who does not come through."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from typing import Any

import torch
from torch import distributed
from torch.distributed import PrefixStore, TCPStore

from recipes.cluster_world import World, spans
from recipes.errors import one_line

_REPEATS = 3
_MOST = 5  # problems that are named


class Reduction:
    """One all-reduce in a thread of its own, so that a hang in it does not hold the process.

    Args:
        world: the processes.
        store: where they meet.
        device: ``cuda`` (NCCL) or ``cpu`` (Gloo).
        mebibytes: size of the tensor.
        seconds: after which it counts as hung.

    Attributes:
        backend: nccl or gloo.
        hangs: whether the thread is stuck in it.
    """

    def __init__(self, world: World, store: TCPStore, device: str, mebibytes: int, seconds: float) -> None:
        self.world = world
        self.backend = "nccl" if device == "cuda" else "gloo"
        self.hangs = False
        self._device = torch.device(device, _index(world)) if device == "cuda" else torch.device("cpu")
        self._elements = mebibytes * 2**20 // 4
        self._seconds = seconds
        # A connection of its own: a wait in the collective's set-up would hold the other one.
        address = world.address if world.rank else "127.0.0.1"
        own = TCPStore(address, store.port, None, False, timedelta(seconds=seconds))
        self._store = PrefixStore("reduction", own)

    def run(self) -> dict[str, Any]:
        """Returns ``problem`` ("" if none) and ``seconds`` of one all-reduce."""
        result: dict[str, Any] = {}
        thread = threading.Thread(target=self._work, args=(result,), daemon=True)
        thread.start()
        thread.join(self._seconds)
        self.hangs = thread.is_alive()
        if self.hangs:
            return {"problem": "", "hangs": True}
        return result

    def _work(self, result: dict[str, Any]) -> None:
        try:
            result.update(self._reduce())
        except Exception as error:  # noqa: BLE001  # whatever it is, it is what this rank has to report
            result["problem"] = one_line(error)[:200] or type(error).__name__

    def _reduce(self) -> dict[str, Any]:
        rank, size = self.world.rank, self.world.size
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        # Longer than this check waits, so that it is this check that says who is missing.
        wait = timedelta(seconds=2 * self._seconds)
        distributed.init_process_group(self.backend, store=self._store, rank=rank, world_size=size, timeout=wait)
        try:
            pattern = torch.arange(self._elements, device=self._device).remainder_(251).float()
            expected = pattern * size + size * (size - 1) / 2  # small whole numbers: exact in any order
            took = []
            for _ in range(_REPEATS + 1):  # the first opens connections
                tensor = pattern + rank
                distributed.barrier()
                begin = time.perf_counter()
                distributed.all_reduce(tensor)
                if self._device.type == "cuda":
                    torch.cuda.synchronize(self._device)
                took.append(time.perf_counter() - begin)
                if not torch.equal(tensor, expected):
                    wrong = int((tensor != expected).sum())
                    return {"problem": f"the all-reduce over {self.backend} gave {wrong} wrong sums"}
        finally:
            distributed.destroy_process_group()
        return {"problem": "", "seconds": min(took[1:])}

    def problems(self, results: dict[int, dict[str, Any]], hosts: dict[int, str]) -> list[str]:
        """What is wrong, one line each; the first few where many say something."""
        told = [(rank, result["problem"]) for rank, result in sorted(results.items()) if result["problem"]]
        if told:
            lines = [f"rank {rank} on {hosts[rank]}: {text}" for rank, text in told[:_MOST]]
            return lines + ([f"and {len(told) - _MOST} ranks more"] if len(told) > _MOST else [])
        stuck = [rank for rank, result in results.items() if result.get("hangs")]
        if not stuck:
            return []
        where = ", ".join(sorted({hosts[rank] for rank in stuck}))
        return [
            f"the all-reduce over {self.backend} did not end within {self._seconds:.0f} s on ranks {spans(stuck)} "
            f"({where}); is it the right network interface ({self.backend.upper()}_SOCKET_IFNAME)?"
        ]

    def summary(self, result: dict[str, Any]) -> str:
        """``all-reduce over gloo: right; 64 MiB in 35 ms, 1.8 GB/s``; the bandwidth is that of each process's link."""
        size, seconds = self.world.size, result["seconds"]
        speed = 2 * (size - 1) / size * self._elements * 4 / seconds / 1e9
        return (
            f"all-reduce over {self.backend}: right; {self._elements * 4 // 2**20} MiB in {seconds * 1e3:.0f} ms, "
            f"{speed:.2f} GB/s (bus bandwidth)"
        )


def _index(world: World) -> int:
    # Slurm may show each task its own GPU only, as number 0.
    return world.local_rank if torch.cuda.device_count() > world.local_rank else 0
