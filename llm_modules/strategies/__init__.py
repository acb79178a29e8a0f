"""What Lightning's strategies lack: one form of checkpoint, CPUs, tensor-parallel plans, exact norms of gradients."""

from llm_modules.strategies.fsdp1 import FSDP1Strategy
from llm_modules.strategies.parallel_plan import spread
from llm_modules.strategies.sharded import ShardedStrategy
from llm_modules.strategies.whole import Answering
from llm_modules.strategies.zero import ZeroStrategy

__all__ = ["Answering", "FSDP1Strategy", "ShardedStrategy", "ZeroStrategy", "spread"]
