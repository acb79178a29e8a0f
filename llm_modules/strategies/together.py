"""Work that ranks share, and whose results all of them need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed

Result = TypeVar("Result")


def together(work: Callable[[], Result]) -> list[Result]:
    """What ``work`` gives on each rank, on every rank, in the order of the ranks.

    Raises:
        ValueError: that of the first rank on which ``work`` raised one; on all, so that none waits for another.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return [work()]
    own: tuple[bool, Any]
    try:
        own = (True, work())
    except ValueError as error:
        own = (False, str(error))
    results: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(results, own)
    for done, result in results:
        if not done:
            raise ValueError(result)
    return [result for _, result in results]
