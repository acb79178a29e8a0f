"""Context parallelism: the positions of a row are dealt over a group of ranks (Ulysses, arXiv 2309.14509, section 3).

Each rank of the group has the same rows and computes one slice of their positions. Only attention looks at other
positions: there, an all-to-all gives each rank all positions of some of the heads, and another one gives it back all
heads of its positions. So the operator for packed documents stays as it is, with every rank at the same amount of work
whatever the documents' lengths. In the end the ranks share their tokens' scores: each has those of the whole rows, so
objectives, counts and logs need not know of it, and ranks of a group are to the loss what tensor-parallel ranks are.

Shape legend: B rows, T positions, C ranks of the group, S = ceil(T / C) positions of a slice, H query heads,
K key/value heads, D head size, M trained positions of the whole rows, m those of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import gcd
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as collectives
from torch.nn import functional

from llm_modules.batch import IGNORE_INDEX, TokenScores
from llm_modules.zoo.attention import NAME

_MOVING_FREQUENCIES = ("dynamic", "longrope")
"""Rotary embeddings whose frequencies depend on the longest position of the call: it is another one in each slice."""


_SHARED = ("logprobs", "index", "log_normalizer", "mean_logprob", "entropy")
"""The fields of ``TokenScores`` that ``ContextParallel.share`` knows how to put together."""


class Slice(NamedTuple):
    """One rank's positions (B, S) of a micro-batch; the offsets are those of the whole padded row."""

    input_ids: Tensor
    position_ids: Tensor
    targets: Tensor
    document_offsets: Tensor | None


class ContextParallel:
    """What the ranks of one group exchange.

    Args:
        group: the process group.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def slice(self, input_ids: Tensor, position_ids: Tensor, targets: Tensor, document_offsets: Tensor | None) -> Slice:
        """This rank's part of rows (B, T), of whose end padding is made, one more document in a packed row.

        The targets are those of the whole row: that of a slice's last position lies in the next slice.
        """
        length = input_ids.shape[1]
        each = -(-length // self.size)
        if missing := each * self.size - length:
            input_ids, position_ids = (functional.pad(t, (0, missing)) for t in (input_ids, position_ids))
            targets = functional.pad(targets, (0, missing), value=IGNORE_INDEX)
            if document_offsets is not None:
                document_offsets = functional.pad(document_offsets, (0, 1), value=length + missing)
        part = slice(self.rank * each, (self.rank + 1) * each)
        return Slice(input_ids[:, part], position_ids[:, part], targets[:, part], document_offsets)

    def share(self, scores: TokenScores, targets: Tensor) -> TokenScores:
        """The scores of the whole rows (M,) from those of this rank's slice (m,), on every rank.

        Each rank goes on to compute the same loss. The gradient that comes back is summed over the group, as the
        adjoint of a sum is: it is the gradient of the sum of all ranks' losses, of which data-parallel ranks take the
        mean.

        Args:
            targets: (B, T) of the whole rows.
        """
        assert all(value is None or name in _SHARED for name, value in scores._asdict().items())
        length = targets.shape[1]
        index = (targets.flatten() != IGNORE_INDEX).nonzero().squeeze(-1)
        if not len(index):  # on every rank of the group
            return scores
        kinds = [scores.logprobs, scores.log_normalizer, scores.mean_logprob, scores.entropy]
        values_Km = torch.stack([kind for kind in kinds if kind is not None])
        own_M = index % length // -(-length // self.size) == self.rank
        whole_KM = values_Km.new_zeros(len(values_Km), len(index))
        whole_KM = whole_KM.masked_scatter(own_M.expand_as(whole_KM), values_Km)
        parts = iter(_Sum.apply(whole_KM, self.group))
        logprobs, log_normalizer, mean_logprob, entropy = (None if kind is None else next(parts) for kind in kinds)
        assert logprobs is not None
        return TokenScores(logprobs, index, log_normalizer, mean_logprob, entropy=entropy)

    def to_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From all heads (B, H or K, S, D) of this rank's positions to all positions (B, H / C or K / C, C * S, D).

        Fewer heads of keys and values than ranks are copied first.

        Raises:
            ValueError: the ranks do not divide the heads.
        """
        if query.shape[1] % self.size:
            raise ValueError(_heads(self.size, query.shape[1]))
        copies = self.size // gcd(self.size, key.shape[1])
        if copies > 1:
            key, value = (t.repeat_interleave(copies, 1) for t in (key, value))
        return self._heads(query), self._heads(key), self._heads(value)

    def to_positions(self, heads: Tensor) -> Tensor:
        """From all positions (B, C * S, H / C, D) of some heads to all heads (B, S, H, D) of this rank's positions."""
        received = self._exchange(heads.unflatten(1, (self.size, -1)).movedim(1, 0))
        return received.movedim(0, 2).flatten(2, 3)

    def _heads(self, heads: Tensor) -> Tensor:
        received = self._exchange(heads.unflatten(1, (self.size, -1)).movedim(1, 0))
        return received.movedim(0, 2).flatten(2, 3)

    def _exchange(self, parts: Tensor) -> Tensor:
        """Part c (of the first dimension) goes to rank c, and from rank c comes part c of the result."""
        return collectives.all_to_all_single_autograd(parts.contiguous(), None, None, self.group)

    @contextmanager
    def own_random_numbers(self, device: torch.device) -> Iterator[None]:
        """Inside, dropout differs between the ranks of the group; after it, their random states are equal again."""
        seed = int(torch.randint(2**40, (), device="cpu")) * self.size + self.rank
        cpu = device.type == "cpu"
        with torch.random.fork_rng([] if cpu else [device.index], device_type="cuda" if cpu else device.type):
            torch.manual_seed(seed)
            yield


class _Sum(torch.autograd.Function):
    """The sum over a group, and of its gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def check_context_parallel(model: Any, size: int, tensor: int = 1) -> None:
    """Find out whether a model's rows can be split over ``size`` ranks, each of them of ``tensor`` devices.

    Args:
        model: a ``CausalLM``, not spread yet.

    Raises:
        ValueError: one line that says why not.
    """
    config = model.hf.config
    text, kind, attention = config.get_text_config(), config.model_type, config._attn_implementation
    if attention != NAME:
        raise ValueError(
            f"strategy.context_parallel: {size}, but backbone.attention {attention!r} sees only the positions of one "
            f"device; set backbone.attention to {NAME!r}"
        )
    if model.virtual is not None:
        raise ValueError(
            f"strategy.context_parallel: {size}, but the adapter puts virtual tokens before each document; use another "
            "adapter (LoRA, ...), or context_parallel: 1"
        )
    if model.routing is not None and model.routing.coefficient:
        raise ValueError(
            f"strategy.context_parallel: {size}, but the load-balancing loss of {kind!r} is not taken over slices; "
            "set its coefficient to 0 (backbone.config.router_aux_loss_coef), or context_parallel to 1"
        )
    heads = getattr(text, "num_attention_heads", None)
    if isinstance(heads, int) and heads % (size * tensor):
        raise ValueError(_heads(size, heads, tensor))
    if moving := _rotary_kinds(getattr(text, "rope_parameters", None)).intersection(_MOVING_FREQUENCIES):
        raise ValueError(
            f"strategy.context_parallel: {size}, but the rotary embeddings of this {kind!r} ({', '.join(moving)}) "
            "depend on the longest position that a device sees; set context_parallel to 1"
        )
    from llm_modules.zoo.probe import slicing_problem

    if problem := slicing_problem(config):
        raise ValueError(f"strategy.context_parallel: {size} is not for {kind!r}: {problem}; set it to 1")


def _rotary_kinds(parameters: Any) -> set[str]:
    """Kinds of rotary embeddings in a config, of all kinds of layers."""
    if not isinstance(parameters, dict):
        return set()
    kinds = {str(parameters.get("rope_type", parameters.get("type", "default")))}
    return kinds.union(*(_rotary_kinds(value) for value in parameters.values()))


def _heads(size: int, heads: int, tensor: int = 1) -> str:
    of_each = f" x tensor_parallel {tensor}" if tensor > 1 else ""
    return f"strategy: context_parallel {size}{of_each} does not divide the model's {heads} attention heads"
