"""A function applied in other processes, in order, to what a generator yields.

The processes are started as a program of their own (this file), neither forked (a fork of a process with threads, as
torch and tokenizers have, can hang) nor spawned by `multiprocessing` (which runs the user's main script again).
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import IO, Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """``map(function, items)`` in ``workers`` processes; items are drawn only a little ahead of the results.

    Args:
        function: picklable, and importable in a fresh process (not of a main script).
        workers: processes; 1: this one.

    Raises:
        ValueError: as the function does. Whatever else it raises ends its process, and is a RuntimeError here.
    """
    if workers <= 1:
        yield from map(function, items)
        return
    processes = [_Process(function) for _ in range(workers)]
    free: SimpleQueue[_Process] = SimpleQueue()
    for process in processes:
        free.put(process)

    def work(item: Item) -> Result:
        process = free.get()
        try:
            return process(item)
        finally:
            free.put(process)

    pending: deque[Future[Result]] = deque()
    threads = ThreadPoolExecutor(workers)
    try:
        for item in items:
            pending.append(threads.submit(work, item))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
        for process in processes:
            process.stop()
        threads.shutdown()


class _Process:
    """One process that holds the function and is sent items one by one."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "TOKENIZERS_PARALLELISM": "false",  # the processes are the parallelism
            "OMP_NUM_THREADS": "1",
        }
        self.popen = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        self.send: IO[bytes] = self.popen.stdin
        self.receive: IO[bytes] = self.popen.stdout
        pickle.dump(function, self.send)
        self.send.flush()

    def __call__(self, item: Any) -> Any:
        try:
            pickle.dump(item, self.send)
            self.send.flush()
            kind, value = pickle.load(self.receive)
        except (EOFError, BrokenPipeError) as error:
            raise RuntimeError(
                f"a worker process ended with status {self.popen.wait()}; if it says nothing above, it may have been "
                "out of memory: try fewer workers"
            ) from error
        if kind == "ValueError":
            raise ValueError(value)
        return value

    def stop(self) -> None:
        self.popen.kill()
        self.popen.wait()
        self.receive.close()
        try:
            self.send.close()
        except BrokenPipeError:
            return  # what it had not read is of no use any more


def main() -> None:
    """Serve one `_Process`: first a function, then items, until there are no more."""
    items, results = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # a print inside of the function must not come between the results
    function = pickle.load(items)
    while True:
        try:
            item = pickle.load(items)
        except EOFError:
            return
        answer: tuple[str, Any]
        try:
            answer = ("result", function(item))
        except ValueError as error:
            answer = ("ValueError", str(error))
        pickle.dump(answer, results)
        results.flush()


if __name__ == "__main__":
    main()
