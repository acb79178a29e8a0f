"""torchrun, which does not try a user's mistake again, and says in a line that nodes do not meet or have ended.

`python -m recipes.elastic` takes the arguments of torchrun. A process that ends with status 2 has said what is to be
mended; each restart would find the same, and torchrun itself would end with a page about it and status 1.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence
from typing import Any

from torch.distributed.elastic.agent.server.api import WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousError
from torch.distributed.launcher import api
from torch.distributed.run import get_args_parser
from torch.distributed.run import main as torchrun

from recipes.__main__ import MISTAKE, OK
from recipes.errors import UserError


class _Agent(LocalElasticAgent):
    def _monitor_workers(self, worker_group: Any) -> Any:
        result = super()._monitor_workers(worker_group)
        if any(failure.exitcode == MISTAKE for failure in result.failures.values()):
            self._remaining_restarts = 0
        if result.state == WorkerState.HEALTHY and worker_group.spec.rdzv_handler.is_closed():
            # torchrun would go on, and its processes wait for those of the other node.
            self._stop_workers(worker_group)
            raise UserError(f"node {socket.gethostname()}: another node has ended; see its log, which says why")
        return result

    def _rendezvous(self, worker_group: Any) -> None:
        try:
            super()._rendezvous(worker_group)
        except RendezvousError as error:
            there = ", ".join(_there(worker_group.spec.rdzv_handler))
            raise UserError(
                f"node {socket.gethostname()}: the {_asked_for().nnodes} nodes did not meet ({type(error).__name__}); "
                f"at the end there were {there}; the others were not started, have died, or were not reached"
            ) from error


def _there(handler: Any) -> list[str]:
    """Addresses of this node, which a rendezvous that has failed has left, and of those that are in it."""
    state = handler._state_holder.state
    return sorted({node.addr for node in [handler._this_node, *state.participants, *state.wait_list]})


def _asked_for() -> Any:
    return get_args_parser().parse_args(sys.argv[1:])


def main(words: Sequence[str]) -> int:
    """Runs torchrun; returns the exit status: 0, 2 for a user's mistake. Other failures are torchrun's own errors."""
    api.LocalElasticAgent = _Agent  # type: ignore[misc, attr-defined]
    try:
        torchrun(list(words))
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        if first.exitcode != MISTAKE:
            raise
        return MISTAKE
    except RendezvousConnectionError as error:
        place, conf = _asked_for().rdzv_endpoint, _asked_for().rdzv_conf
        if "is_host=1" in conf:
            text = f"its port cannot be opened here ({error.__cause__ or error})"
        else:
            text = "not reached: the master is not up, or a firewall or the wrong network interface is between"
        print(f"recipes: node {socket.gethostname()}: master {place}: {' '.join(text.split())}", file=sys.stderr)
        return MISTAKE
    except UserError as error:
        print(f"recipes: {error}", file=sys.stderr)
        return MISTAKE
    return OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
