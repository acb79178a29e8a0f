"""What the Trainer iterates: micro-batches in one global order, with the counts of their accumulation window.

The order is made of *rows*. Optimizer step ``s`` of an epoch uses the ``G = world * batch_size * accumulate`` rows
``[s * G, (s + 1) * G)``; micro-batch ``m`` of rank ``r`` is ``[s * G + m * world * B + r * B, + B)``. How a step is cut
into micro-batches and ranks therefore never changes what is in it. The whole state is one position in that order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader

from llm_modules.batch import CountedBatch
from llm_modules.data.packing import EpochPlan, Indices


class BatchMaker(Protocol):
    """Makes a micro-batch of rows; runs in worker processes and must not keep anything between calls.

    Attributes:
        beside: whether each row comes with the row before it in the window (the segments of both, its own first).
    """

    beside: bool

    def __call__(self, batch: Sequence[Indices]) -> CountedBatch: ...

    def empty(self) -> CountedBatch: ...


@dataclass(frozen=True)
class Slicing:
    """How an optimizer step is cut.

    Attributes:
        batch_size: rows in a micro-batch of one rank.
        accumulate: micro-batches in an optimizer step.
        world, rank: number of processes, and which one this is.
        sort: longest rows of an optimizer step first (for padded batches: rows of similar length meet).
    """

    batch_size: int
    accumulate: int = 1
    world: int = 1
    rank: int = 0
    sort: bool = False

    @property
    def rows_per_step(self) -> int:
        return self.world * self.batch_size * self.accumulate

    def micro_batches(self, rows: Indices, lengths: Indices | None) -> list[Indices]:
        """This rank's micro-batches of the rows of one optimizer step."""
        if self.sort and lengths is not None:
            rows = rows[np.argsort(-lengths[rows], kind="stable")]
        return list(rows.reshape(self.accumulate, self.world, self.batch_size)[:, self.rank])


def _segments(plan: EpochPlan, order: Indices, beside: bool) -> Callable[[int], Indices]:
    """A row's segments by its number; if asked for, with those of the row before it in ``order``, which is a ring."""
    if not beside:
        return plan.row
    before = dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))
    return lambda row: np.concatenate([plan.row(row), plan.row(before[row])])


class _Specs:
    """A batch sampler whose list changes with the epoch: a worker is told all it needs with each micro-batch."""

    def __init__(self) -> None:
        self.batches: Iterable[list[Indices]] = []

    def __iter__(self) -> Iterator[list[Indices]]:
        return iter(self.batches)


class _Reader:
    """A torch DataLoader over a changing list of micro-batches; its workers live as long as it does."""

    def __init__(self, dataset: Any, maker: BatchMaker, workers: int, pin_memory: bool) -> None:
        self.specs = _Specs()
        self.loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=self.specs,  # type: ignore[arg-type]
            collate_fn=maker,  # type: ignore[arg-type]
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=pin_memory and torch.cuda.is_available(),
            # Of its own: an iterator draws a seed, and would move the global generator on, in which resume must not
            # differ.
            generator=torch.Generator(),
        )

    def read(self, batches: Iterable[list[Indices]]) -> Iterator[Any]:
        self.specs.batches = batches
        return iter(self.loader)


class _Closing:
    """Lets Lightning end the worker processes when a run ends, which it does through a DataLoader's ``_iterator``.

    Left to the garbage collector, each of them is waited for in vain for five seconds.
    """

    _reader: _Reader

    @property
    def _iterator(self) -> Any:
        return self._reader.loader._iterator

    @_iterator.setter
    def _iterator(self, iterator: Any) -> None:
        self._reader.loader._iterator = iterator


class WindowLoader(_Closing):
    """The training loader: full windows only, an epoch after another, resumable at every optimizer step.

    Args:
        plan: epoch -> its rows in order; a pure function.
        dataset: indexed by a row's segments.
        maker: rows -> micro-batch.
        slicing: how a step is cut.
        workers: processes that make micro-batches; 0: this one.
        pin_memory: copy batches to page-locked memory (where there is CUDA).
        limit: micro-batches in an epoch, as Lightning's ``limit_train_batches`` means it; None: all.
        repeat: train on the first epoch's rows again and again (Lightning's ``overfit_batches``).
        identity: digest of all that the order depends on; a position of another order is refused.

    Raises:
        ValueError: an epoch does not fill one optimizer step, or ``limit`` is inside of one.
    """

    def __init__(
        self,
        plan: Callable[[int], EpochPlan],
        dataset: Any,
        maker: BatchMaker,
        slicing: Slicing,
        *,
        workers: int = 0,
        pin_memory: bool = False,
        limit: int | float | None = None,
        repeat: bool = False,
        identity: str = "",
    ) -> None:
        self.plan = plan
        self.maker = maker
        self.slicing = slicing
        self.identity = identity
        self.repeat = repeat
        self.epoch = 0
        self.rows = 0
        self._touched = False
        self._plan: tuple[int, EpochPlan] = (0, plan(0))
        self._reader = _Reader(dataset, maker, workers, pin_memory)
        size = slicing.rows_per_step
        self.rows_in_epoch = len(self._plan[1])
        self.steps_in_epoch = self.rows_in_epoch // size
        if self.steps_in_epoch == 0:
            raise ValueError(
                f"data: an epoch has {self.rows_in_epoch} rows, fewer than the {size} of one optimizer step "
                f"({slicing.world} processes x batch_size {slicing.batch_size} x accumulate_grad_batches "
                f"{slicing.accumulate}); lower one of them, or add data"
            )
        self.dropped_rows = self.rows_in_epoch - self.steps_in_epoch * size
        self._length = self.steps_in_epoch * slicing.accumulate
        if limit is not None:
            limited = min(limit, self._length) if isinstance(limit, int) else int(self._length * limit)
            if limited % slicing.accumulate:
                raise ValueError(
                    f"trainer.limit_train_batches: {limit} makes {limited} micro-batches an epoch, which is no "
                    f"multiple of accumulate_grad_batches {slicing.accumulate}; the last optimizer step would "
                    "be incomplete"
                )
            self.steps_in_epoch = limited // slicing.accumulate
        unlimited = self.steps_in_epoch * slicing.accumulate == self._length
        self._usable_rows = self.rows_in_epoch if unlimited else self.steps_in_epoch * size

    def __len__(self) -> int:
        """Micro-batches of this rank in an epoch, before Lightning's own limit."""
        return self._length

    @property
    def step(self) -> int:
        """Optimizer steps of this epoch that are behind the position: all but those that still fit after it."""
        # The position may have been reached with other batch sizes, and then be no multiple of this step's rows.
        return self.steps_in_epoch - max(0, self._usable_rows - self.rows) // self.slicing.rows_per_step

    def __iter__(self) -> Iterator[Any]:
        """Micro-batches from the position to the end of its epoch."""
        # Lightning asks for an iterator more than once before it takes a batch: nothing may happen until it does.
        if self._touched:
            self._finish_epoch()  # an epoch was left before its end
        self._touched = False
        return self._windows()

    def _windows(self) -> Iterator[Any]:
        accumulate, size = self.slicing.accumulate, self.slicing.rows_per_step
        starts = [self.rows + i * size for i in range(self.steps_in_epoch - self.step)]
        micro_batches = self._reader.read(self._specs(self._epoch_plan(), starts))
        for start in starts:
            window = [next(micro_batches) for _ in range(accumulate)]
            counts = _total(window)
            window[0].look_ahead(window)
            for micro_step, batch in enumerate(window):
                batch.window = dict(counts)
                batch.micro_step = micro_step
                self._touched = True
                if micro_step == accumulate - 1:
                    # From here on a checkpoint belongs after this step; before, it repeats the whole window.
                    self.rows = start + size
                    if start == starts[-1]:
                        self._finish_epoch()
                yield batch

    def _finish_epoch(self) -> None:
        self.epoch, self.rows, self._touched = self.epoch + 1, 0, False

    def _specs(self, plan: EpochPlan, starts: Sequence[int]) -> Iterator[list[Indices]]:
        lengths = plan.lengths() if self.slicing.sort else None
        if not len(plan):
            raise ValueError(f"data: epoch {self.epoch} has no rows: the weights of all sources are too small for them")
        for start in starts:
            # An epoch with fewer rows than the first (weights below 1) goes on with its own beginning.
            rows = np.arange(start, start + self.slicing.rows_per_step) % len(plan)
            segments = _segments(plan, rows, self.maker.beside)
            for micro_batch in self.slicing.micro_batches(rows, lengths):
                yield [segments(i) for i in micro_batch.tolist()]

    def _epoch_plan(self) -> EpochPlan:
        wanted = 0 if self.repeat else self.epoch
        if self._plan[0] != wanted:
            self._plan = (wanted, self.plan(wanted))
        return self._plan[1]

    def state_dict(self) -> dict[str, Any]:
        """The position after the last complete optimizer step: ``epoch``, ``rows`` of it, and of which order."""
        return {"epoch": self.epoch, "rows": self.rows, "identity": self.identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position.

        Raises:
            ValueError: it belongs to another order of rows.
        """
        if state["identity"] != self.identity:
            raise ValueError(
                "data: the checkpoint's position belongs to other data: continue with the same sources, tokenizer, "
                "packing, sequence_length and seed as it was made with, or start a new run from its weights"
            )
        self.epoch, self.rows, self._touched = int(state["epoch"]), int(state["rows"]), False
        if self.rows and self.step >= self.steps_in_epoch:
            self._finish_epoch()  # what is left of the epoch does not fill a step of the present size


def _total(window: Sequence[CountedBatch]) -> dict[str, float]:
    total: dict[str, float] = {}
    for batch in window:
        for name, count in batch.counts().items():
            total[name] = total.get(name, 0.0) + count
    return total


class EvaluationLoader(_Closing):
    """Every row exactly once over all ranks, which all make the same number of steps.

    Rows come longest first, so that a padded batch holds rows of similar length and memory is at its highest at once.
    A rank without rows for its last micro-batches gets empty ones, which count nothing.
    """

    def __init__(
        self,
        plan: EpochPlan,
        dataset: Any,
        maker: BatchMaker,
        slicing: Slicing,
        *,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.maker = maker
        self._reader = _Reader(dataset, maker, workers, pin_memory)
        order = np.argsort(-plan.lengths(), kind="stable")
        size, world = slicing.batch_size, slicing.world
        starts = range(slicing.rank * size, len(plan), size * world)
        segments = _segments(plan, np.arange(len(plan)), maker.beside)
        self._batches = [[segments(i) for i in order[start : start + size].tolist()] for start in starts]
        self._length = -(-len(plan) // (size * world))

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        yield from self._reader.read(self._batches)
        for _ in range(self._length - len(self._batches)):
            yield self.maker.empty()
