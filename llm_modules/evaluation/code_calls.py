"""Calls between the process of the answer's code and that of the tests, so that neither sees the other's memory.

What passes is plain data; anything else stays where it is, and the other side gets a ``Remote`` that stands for it.
Runs on the standard library alone.
"""

from __future__ import annotations

import builtins
import io
import operator
import os
import pickle
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from typing import Any

LONGEST = 1 << 24
"""Bytes of one message."""

BASES: tuple[type, ...] = (bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset)
PLAIN: tuple[type, ...] = (
    *BASES, bytearray, range, slice, type(None), Counter, OrderedDict, defaultdict, deque, date,
    datetime, time, timedelta, timezone, Decimal, Fraction,
)  # fmt: skip
"""What is handed over as it is; of other classes nothing is ever loaded."""
CLASSES = {(kind.__module__, kind.__qualname__): kind for kind in PLAIN if kind.__name__ in dir(builtins)} | {
    (kind.__module__, kind.__qualname__): kind for kind in PLAIN if kind.__module__ != "builtins"
}
CHANGEABLE = (list, dict, set, bytearray, deque, Counter, OrderedDict, defaultdict)


class Gone(Exception):
    """The other process ended, or its message is too long."""


class Failed(Exception):
    """The other process raised what is no exception of Python's own."""


class Calls:
    """One end.

    Args:
        source, target: file descriptors to read from and write to.
        whole: whether the other side may do anything with this side's objects, or only call those it was given.
    """

    def __init__(self, source: int, target: int, *, whole: bool) -> None:
        self._source, self._target, self._whole = source, target, whole
        self._kept: list[Any] = []
        self._handles: dict[int, int] = {}

    def send(self, *message: Any) -> None:
        data = self._dumps(message)
        left = memoryview(struct.pack("=I", len(data)) + data)
        while left:
            left = left[os.write(self._target, left) :]

    def receive(self) -> Any:
        (size,) = struct.unpack("=I", self._read(4))
        if size > LONGEST:
            raise Gone(f"a message of {size} bytes")
        return self._loads(self._read(size))

    def ask(self, operation: str, handle: int, *arguments: Any) -> Any:
        """What the other side's object answers; its exceptions are raised here."""
        self.send("ask", operation, handle, arguments)
        while True:
            kind, *content = self.receive()
            if kind == "ask":
                self.answer(*content)
            elif kind == "raised":
                name, text = map(str, content)
                known = getattr(builtins, name, None)
                own = isinstance(known, type) and issubclass(known, Exception)
                raise known(text) if own else Failed(f"{name}: {text}")  # type: ignore[misc]
            else:
                value, changed = content
                for place, now in changed.items():
                    _change(arguments[place], now)
                return value

    def answer(self, operation: str, handle: int, arguments: tuple[Any, ...]) -> None:
        """Does what the other side asks for."""
        before = {i: self._dumps(value) for i, value in enumerate(arguments) if type(value) in CHANGEABLE}
        try:
            if not self._whole and operation != "call":
                raise TypeError(f"no {operation}")
            value = _OPERATIONS[operation](self._kept[handle], *arguments)
            changed = {i: arguments[i] for i, data in before.items() if self._dumps(arguments[i]) != data}
            self.send("value", value, changed)
        except BaseException as error:  # noqa: BLE001 - it is told to who asked
            self.send("raised", type(error).__name__, str(error)[:1000])

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = os.read(self._source, min(size - len(data), 1 << 20))
            if not part:
                raise Gone("no more messages")
            data += part
        return bytes(data)

    def _dumps(self, value: Any) -> bytes:
        file = io.BytesIO()
        _Writer(file, self).dump(value)
        return file.getvalue()

    def _loads(self, data: bytes) -> Any:
        return _Reader(io.BytesIO(data), self).load()

    def handle(self, value: Any) -> int:
        if id(value) not in self._handles:
            self._handles[id(value)] = len(self._kept)
            self._kept.append(value)
        return self._handles[id(value)]

    def kept(self, handle: int) -> Any:
        return self._kept[handle]


class _Writer(pickle.Pickler):
    def __init__(self, file: io.BytesIO, calls: Calls) -> None:
        super().__init__(file, 5)
        self._calls = calls

    def persistent_id(self, value: Any) -> Any:
        if type(value) is Remote:
            return "yours", object.__getattribute__(value, "_handle")
        if type(value) in PLAIN or isinstance(value, BASES) or _is_number(value):
            return None
        if isinstance(value, type) and value in CLASSES.values():
            return None
        return "mine", self._calls.handle(value)

    def reducer_override(self, value: Any) -> Any:
        """Of a class that derives from a plain one goes what it derives from: a named tuple is a tuple."""
        kind = type(value)
        if kind in PLAIN or kind is type:
            return NotImplemented
        if _is_number(value):
            return type(value.item()), (value.item(),)
        base = next(base for base in BASES if isinstance(value, base))
        return base, (base(value),)


class _Reader(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, calls: Calls) -> None:
        super().__init__(file)
        self._calls = calls

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in CLASSES:
            raise pickle.UnpicklingError(f"{module}.{name} is no plain data")
        return CLASSES[module, name]

    def persistent_load(self, pid: Any) -> Any:
        side, handle = pid
        return Remote(self._calls, handle) if side == "mine" else self._calls.kept(handle)


class Remote:
    """An object of the other process: functions, classes, their instances, iterators.

    It equals only another ``Remote`` (which the other process compares): an answer cannot return what equals anything.
    """

    __slots__ = ("_calls", "_handle")

    def __init__(self, calls: Calls, handle: int) -> None:
        object.__setattr__(self, "_calls", calls)
        object.__setattr__(self, "_handle", handle)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if named:
            return _ask(self, "call named", named, *arguments)
        return _ask(self, "call", *arguments)

    def __getattr__(self, name: str) -> Any:
        return _ask(self, "get", name)

    def __setattr__(self, name: str, value: Any) -> None:
        _ask(self, "set", name, value)

    def __iter__(self) -> Iterator[Any]:
        iterator = _ask(self, "iterate")
        while True:
            more, value = _ask(iterator, "next")
            if not more:
                return
            yield value

    def __next__(self) -> Any:
        more, value = _ask(self, "next")
        if not more:
            raise StopIteration
        return value

    def __len__(self) -> int:
        return _ask(self, "length")

    def __bool__(self) -> bool:
        return _ask(self, "truth")

    def __getitem__(self, key: Any) -> Any:
        return _ask(self, "item", key)

    def __contains__(self, value: Any) -> bool:
        return _ask(self, "contains", value)

    def __eq__(self, other: object) -> bool:
        return type(other) is Remote and _ask(self, "equal", other) is True

    def __hash__(self) -> int:
        return hash(object.__getattribute__(self, "_handle"))

    def __str__(self) -> str:
        return _ask(self, "text")

    __repr__ = __str__


def _ask(remote: Any, operation: str, *arguments: Any) -> Any:
    handle = object.__getattribute__(remote, "_handle")
    return object.__getattribute__(remote, "_calls").ask(operation, handle, *arguments)


def _next(iterator: Any) -> tuple[bool, Any]:
    try:
        return True, next(iterator)
    except StopIteration:
        return False, None


_OPERATIONS: dict[str, Any] = {
    "call": lambda value, *arguments: value(*arguments),
    "call named": lambda value, named, *arguments: value(*arguments, **named),
    "get": getattr,
    "set": setattr,
    "iterate": iter,
    "next": _next,
    "length": len,
    "truth": bool,
    "item": operator.getitem,
    "contains": operator.contains,
    "equal": operator.eq,
    "text": str,
}


def _change(value: Any, now: Any) -> None:
    """What the other side did to a list, dictionary or set that it was given."""
    if isinstance(value, (list, bytearray)):
        value[:] = now
    elif isinstance(value, (dict, set, deque)):
        value.clear()
        value.extend(now) if isinstance(value, deque) else value.update(now)


def _is_number(value: Any) -> bool:
    """Whether numpy's: a scalar."""
    return type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0 and hasattr(value, "item")
