"""Floor 0: the only place that shifts labels, gathers log-probabilities and sums over a mask.

Shape legend: B rows, T positions, M target tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llm_modules.batch import IGNORE_INDEX, TaughtScores, TokenBatch
from llm_modules.fused_logprobs import chunk_gradient, chunk_scores, compiled
from llm_modules.head_transform import HeadTransform

DEFAULT_CHUNK = 1024
"""Targets scored at once: what bounds the memory. The weight's gradient is added up once a chunk."""

_TILE = 128
"""Targets whose fp32 probabilities a CPU holds at once: few enough to stay in its cache (docs/decisions.md)."""


def next_token_targets(labels_BT: Tensor, position_ids_BT: Tensor) -> Tensor:
    """What each position is to predict: ``targets[b, t] = labels[b, t + 1]``, or ``IGNORE_INDEX``.

    The last position of a row predicts nothing, and neither does the last of a packed document: the next token starts
    another document (its position is 0).
    """
    targets_BT = torch.full_like(labels_BT, IGNORE_INDEX)
    starts = position_ids_BT[:, 1:] == 0
    targets_BT[:, :-1] = labels_BT[:, 1:].masked_fill(starts, IGNORE_INDEX)
    return targets_BT


def score_batch(model: Any, batch: TokenBatch, **what: Any) -> Any:
    """What a model says of a batch's labels, each at the position before it; answers may share a prompt.

    Args:
        model: a ``CausalLM``.
        what: further arguments of its ``forward``.
    """
    shared = {name: getattr(batch, name) for name in ("shared_keys", "key_offsets") if hasattr(batch, name)}
    return model(
        batch.input_ids,
        batch.position_ids,
        next_token_targets(batch.labels, batch.position_ids),
        batch.document_offsets,
        batch.max_document,
        lengths=batch.lengths,
        **shared,
        **what,
    )


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of ``values`` where ``mask`` holds; a NaN outside of the mask does not spread."""
    return values.masked_fill(~mask.bool(), 0).sum()


def sums_by_answer(values_M: Tensor, answer_M: Tensor, answers: int) -> tuple[Tensor, Tensor]:
    """Of each answer the sum of its tokens' values, and how many they are; both (answers,) fp64: an answer's
    log-probability is some hundreds, of which the difference between two models is a small part.

    Args:
        answer_M: (M,) int64 the answer that each token belongs to.
    """
    zeros = values_M.new_zeros(answers, dtype=torch.float64)  # bincount would wait for a GPU
    counts = zeros.index_add(0, answer_M, torch.ones_like(values_M, dtype=torch.float64))
    return zeros.index_add(0, answer_M, values_M.double()), counts


def linear_logprobs(
    hidden_MH: Tensor,
    weight_VH: Tensor,
    targets_M: Tensor,
    bias_V: Tensor | None = None,
    *,
    transform: HeadTransform = HeadTransform(),
    uniform: bool = False,
    statistics: bool = False,
    chunk: int = DEFAULT_CHUNK,
    fused: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Log-probabilities of the targets under a linear head, without ever holding all the logits.

    Computed in chunks of ``chunk`` targets, in autocast's dtype with an fp32 softmax; the backward computes the logits
    again. With ``uniform``, the caller expects that every target gets the same upstream gradient (a sum or a mean of
    all): the gradient is then made in the forward pass, which saves one of four matrix products. If the expectation
    proves wrong, the logits are computed again: the result is right either way.

    Args:
        hidden_MH: (M, H) final hidden states at the predicting positions.
        weight_VH: (V, H) weight of the head.
        targets_M: (M,) token ids, none of them ``IGNORE_INDEX``.
        bias_V: (V,) bias of the head.
        statistics: also return the log-normalizer and the mean log-probability.
        fused: compile what is done beside the matrix products (see ``fused_logprobs``).

    Returns:
        logprobs (M,), and, with ``statistics``, logsumexp of the logits (M,) and mean log p over V (M,); all fp32.
    """
    dtype = _product_dtype(hidden_MH)
    # In fp16 a gradient made before the loss scale is applied would underflow.
    uniform = uniform and not statistics and dtype != torch.float16 and torch.is_grad_enabled()
    logprobs, log_normalizer, mean_logprob = _LinearLogprobs.apply(
        hidden_MH,
        weight_VH,
        bias_V,
        targets_M,
        transform,
        dtype,
        chunk,
        uniform,
        statistics,
        fused,
    )
    return (logprobs, log_normalizer, mean_logprob) if statistics else (logprobs, None, None)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def linear_logits(hidden_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None = None) -> Tensor:
    """(C, V) fp32 logits of a linear head before the model's own transform, multiplied in autocast's dtype."""
    dtype = _product_dtype(hidden_CH)
    return _logits(hidden_CH.to(dtype), weight_VH.to(dtype), bias_V)


def compared(
    logits_CV: Tensor, teacher_logits_CV: Tensor, targets_C: Tensor, compare: Callable[[Tensor, Tensor], Tensor]
) -> TaughtScores:
    """What two models say of C target tokens, and how far their distributions are apart; logits in fp32.

    Args:
        compare: as of ``Teaching``.
    """
    student, teacher = logits_CV.log_softmax(-1), teacher_logits_CV.log_softmax(-1)
    of_target, of_teacher = (values.gather(-1, targets_C[:, None]).squeeze(-1) for values in (student, teacher))
    with torch.no_grad():
        kl = (teacher.exp() * (teacher - student)).sum(-1)
    return TaughtScores(of_target, of_teacher, compare(student, teacher), kl)


@torch.no_grad()
def linear_entropies(
    hidden_MH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None = None,
    *,
    transform: HeadTransform = HeadTransform(),
    chunk: int = DEFAULT_CHUNK,
) -> Tensor:
    """(M,) fp32 entropies, in nats, of the distributions under a linear head, in chunks, without a gradient.

    Args:
        hidden_MH, weight_VH, bias_V, transform, chunk: as of ``linear_logprobs``.
    """
    device = hidden_MH.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_MH.dtype
    weight = weight_VH.to(dtype)
    parts = hidden_MH.to(dtype).split(chunk)
    return torch.cat([entropies(transform(_logits(hidden, weight, bias_V))) for hidden in parts]).float()


def entropies(logits: Tensor) -> Tensor:
    """(...,) entropies, in nats, of the distributions that (..., V) logits give."""
    logprobs = logits.log_softmax(-1)
    return -logprobs.exp().mul_(logprobs).sum(-1)


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_MH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_M: Tensor,
        transform: HeadTransform,
        dtype: torch.dtype,
        chunk: int,
        uniform: bool,
        statistics: bool,
        fused: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        weight = weight_VH.to(dtype)
        outputs = torch.empty(3, len(targets_M), dtype=torch.float32, device=hidden_MH.device)
        grads = _Gradients(ctx.needs_input_grad, hidden_MH, weight_VH, bias_V) if uniform else None
        for start in range(0, len(targets_M), chunk):
            part = slice(start, start + chunk)
            hidden = hidden_MH[part].to(dtype)
            if fused:
                product, targets = hidden @ weight.T, targets_M[part]
                outputs[:, part] = compiled(chunk_scores)(product, bias_V, targets, transform, statistics)
                if grads is not None:
                    ones, zeros = torch.ones_like(outputs[1, part]), torch.zeros_like(outputs[1, part])
                    settings = bias_V, targets, outputs[1, part], (ones, zeros, zeros), transform
                    grads.add(part, compiled(chunk_gradient)(product, *settings), hidden, weight)
                continue
            if grads is not None:
                outputs[:2, part], grad = _scores_and_gradient(hidden, weight, bias_V, targets_M[part], transform)
                grads.add(part, grad, hidden, weight)
                continue
            logits = transform(_logits(hidden, weight, bias_V))
            log_normalizer = logits.logsumexp(-1)
            outputs[0, part] = logits.gather(-1, targets_M[part, None]).squeeze(-1) - log_normalizer
            outputs[1, part] = log_normalizer
            if statistics:
                outputs[2, part] = logits.mean(-1) - log_normalizer
        ctx.settings = transform, dtype, chunk, fused
        ctx.grads = grads
        ctx.save_for_backward(hidden_MH, weight_VH, bias_V, targets_M, outputs[1])
        return outputs[0], outputs[1], outputs[2]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        hidden_MH, weight_VH, bias_V, targets_M, log_normalizer_M = ctx.saved_tensors
        transform, dtype, chunk, fused = ctx.settings
        on_logprob, on_normalizer, on_mean = upstream
        if ctx.grads is not None and len(on_logprob) and bool((on_logprob == on_logprob[0]).all()):
            gradients, ctx.grads = ctx.grads, None  # scaled in place: a second backward must compute its own
            return *gradients.scaled(on_logprob[0]), *[None] * 7
        grads = _Gradients(ctx.needs_input_grad, hidden_MH, weight_VH, bias_V)
        weight = weight_VH.to(dtype)
        for start in range(0, len(targets_M), chunk):
            part = slice(start, start + chunk)
            hidden = hidden_MH[part].to(dtype)
            if fused:
                on_part = tuple(gradient[part] for gradient in upstream)
                settings = bias_V, targets_M[part], log_normalizer_M[part], on_part, transform
                grads.add(part, compiled(chunk_gradient)(hidden @ weight.T, *settings), hidden, weight)
                continue
            logits = transform(_logits(hidden, weight, bias_V))
            grad = _probabilities(logits, log_normalizer_M[part], keep=transform.softcap is not None)
            on_log_p, on_mean_p = on_logprob[part, None], on_mean[part, None]
            grad.mul_(on_normalizer[part, None] - on_log_p - on_mean_p).add_(on_mean_p / grad.shape[-1])
            grad.scatter_add_(-1, targets_M[part, None], on_log_p)
            grads.add(part, transform.backward_(grad, logits).to(dtype), hidden, weight)
        return *grads.scaled(None), *[None] * 7


class _Gradients:
    """The gradients of a linear head, summed over chunks; the weight's in its own precision (fp32 under autocast)."""

    def __init__(self, needed: tuple[bool, ...], hidden_MH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> None:
        self.hidden = torch.empty_like(hidden_MH) if needed[0] else None
        self.weight = torch.zeros_like(weight_VH) if needed[1] else None
        self.bias = torch.zeros_like(bias_V) if bias_V is not None and needed[2] else None

    def add(self, part: slice, grad_MV: Tensor, hidden_MH: Tensor, weight_VH: Tensor) -> None:
        if self.hidden is not None:
            self.hidden[part] = grad_MV @ weight_VH
        if self.weight is not None:
            if self.weight.dtype == grad_MV.dtype:
                self.weight.addmm_(grad_MV.T, hidden_MH)
            else:
                self.weight.add_(grad_MV.T @ hidden_MH)
        if self.bias is not None:
            self.bias.add_(grad_MV.sum(0))

    def scaled(self, factor: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if factor is not None:
            for gradient in (self.hidden, self.weight, self.bias):
                if gradient is not None:
                    gradient.mul_(factor.to(gradient.dtype))
        return self.hidden, self.weight, self.bias


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = (hidden @ weight.T).float()
    return logits if bias is None else logits + bias.float()


def _scores_and_gradient(
    hidden_MH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_M: Tensor, transform: HeadTransform
) -> tuple[Tensor, Tensor]:
    """(2, M) log-probabilities and log-normalizers, and (M, V) the gradient of the former's sum on the raw logits.

    Beside the matrix products, this is what costs time: each tile is read from memory once, one exponential serves the
    normalizer and the probabilities, and the result is narrowed at once.
    """
    rows, in_tiles = len(hidden_MH), hidden_MH.device.type == "cpu" and hidden_MH.dtype == torch.bfloat16
    scores = torch.empty(2, rows, dtype=torch.float32, device=hidden_MH.device)
    grad_MV = hidden_MH.new_empty(rows, len(weight_VH)) if in_tiles else None
    for start in range(0, rows, _TILE if in_tiles else rows):
        part = slice(start, start + _TILE) if in_tiles else slice(None)
        targets = targets_M[part, None]
        logits = transform(_logits(hidden_MH[part], weight_VH, bias_V))
        of_target, largest = logits.gather(-1, targets), logits.amax(-1, keepdim=True)
        shifted = logits - largest if transform.softcap is not None else logits.sub_(largest)
        exponentials = shifted.exp_()
        total = exponentials.sum(-1, keepdim=True)
        log_normalizer = total.log() + largest
        scores[:, part] = torch.cat((of_target - log_normalizer, log_normalizer), -1).T
        grad = exponentials.mul_(-total.reciprocal())
        grad.scatter_add_(-1, targets, torch.ones_like(of_target))
        grad = transform.backward_(grad, logits)
        if grad_MV is None:
            return scores, grad.to(hidden_MH.dtype)
        grad_MV[part] = grad
    assert grad_MV is not None
    return scores, grad_MV


def _probabilities(logits: Tensor, log_normalizer: Tensor, keep: bool) -> Tensor:
    """softmax from the log-normalizer; in place of the logits unless they are still needed (``keep``)."""
    return (logits - log_normalizer[:, None]).exp_() if keep else logits.sub_(log_normalizer[:, None]).exp_()
