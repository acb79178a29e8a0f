"""How likely a language model finds texts: a zoo ``CausalLM`` or a model of transformers, many texts at a time.

Rows are sorted by length, cut into batches and padded on the right, which a causal model never sees: a row's numbers
are those that it would get alone.

Shape legend: B rows, T positions, K last positions that are needed, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llm_modules.batch import IGNORE_INDEX
from llm_modules.logprobs import next_token_targets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_TOKENS = 4096
"""Tokens of a batch, padding included."""


def transformers_model(model: Any) -> Any:
    """transformers' (or, where there are virtual tokens, peft's) model in one of the zoo; any other as it is."""
    return getattr(model, "generation_model", None) or getattr(model, "hf", model)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode; then each of its modules is in its own again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text after the token that begins (or, where there is none, ends) every text, so that its first token is
    scored, too.

    Raises:
        ValueError: the tokenizer has neither.
    """
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise ValueError("tokenizer: it has no bos_token and no eos_token to begin a text with; set one in its files")
    return [start, *tokenizer(text, add_special_tokens=False)["input_ids"]]


def continuation(tokenizer: PreTrainedTokenizerBase, context: str, text: str) -> tuple[list[int], int]:
    """Ids of ``context + text`` and the place of the first one that ``context`` alone does not have."""
    before, whole = encode(tokenizer, context), encode(tokenizer, context + text)
    same = (a == b for a, b in zip(before, whole, strict=False))
    return whole, next((place for place, equal in enumerate(same) if not equal), min(len(before), len(whole)))


@torch.no_grad()
def token_logprobs(
    model: Any, rows: Sequence[Sequence[int]], first: Sequence[int] | int = 1, batch_tokens: int = BATCH_TOKENS
) -> list[Tensor]:
    """Of each row log p(token | the tokens before it) from place ``first`` on, fp64 on the CPU.

    Only these positions go through the head. (Of a plain model, the last K of each batch do, with K that of the row
    that needs most.) The sums over a row equal transformers' own loss times its tokens.

    Args:
        rows: ids; each begins with a token that is not scored.
        first: place of the first token that is scored, at least 1, of each row or of all.
        batch_tokens: most tokens of a batch, padding included.

    Raises:
        ValueError: as ``check_rows``; the model gives numbers that are not finite.
    """
    first = [first] * len(rows) if isinstance(first, int) else first
    check_rows(model, rows)
    found: dict[int, Tensor] = {}
    score = _zoo_logprobs if hasattr(model, "hf") else _plain_logprobs
    with undisturbed(model):
        for places in batches([len(row) for row in rows], batch_tokens):
            ids, labels = _padded(model, [rows[p] for p in places], [first[p] for p in places])
            values = score(model, ids, labels, [len(rows[p]) for p in places]).double().cpu()
            counts = [max(0, len(rows[p]) - first[p]) for p in places]
            for place, row in zip(places, values.split(counts), strict=True):
                _check_said(place, row)
                found[place] = row
    return [found[place] for place in range(len(rows))]


@torch.no_grad()
def likeliest(
    model: Any, rows: Sequence[Sequence[int]], first: Sequence[int], batch_tokens: int = BATCH_TOKENS
) -> list[bool]:
    """Of each row whether greedy decoding, given the tokens before place ``first``, goes on with exactly the others.

    Raises:
        ValueError: as ``token_logprobs``.
    """
    check_rows(model, rows)
    found: dict[int, bool] = {}
    with undisturbed(model):
        for places in batches([len(row) for row in rows], batch_tokens):
            ids, labels = _padded(model, [rows[p] for p in places], [first[p] for p in places])
            lengths = [len(rows[p]) for p in places]
            logits_BKV, targets_BK = _needed_logits(transformers_model(model), ids, labels, lengths)
            wanted_BK, (best_BK, said_BK) = targets_BK != IGNORE_INDEX, logits_BKV.max(-1)
            for place, best, wanted in zip(places, best_BK, wanted_BK, strict=True):
                _check_said(place, best[wanted])
            right = (said_BK == targets_BK) | ~wanted_BK
            found.update(zip(places, right.all(-1).tolist(), strict=True))
    return [found[place] for place in range(len(rows))]


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Places of the rows of each batch, the longest first."""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def embedding_device(model: Any) -> torch.device:
    device = transformers_model(model).get_input_embeddings().weight.device
    assert isinstance(device, torch.device)
    return device


def check_rows(model: Any, rows: Sequence[Sequence[int]]) -> None:
    """Raise a ValueError for a row that is longer than the model's positions or has ids outside of its vocabulary."""
    hf = transformers_model(model)
    most = getattr(hf.config.get_text_config(), "max_position_embeddings", None)
    vocabulary = hf.get_input_embeddings().weight.shape[0]
    for place, row in enumerate(rows):
        if most is not None and len(row) > most:
            raise ValueError(f"text {place}: {len(row)} tokens, but the model has {most} positions; shorten it")
        if max(row) >= vocabulary:
            raise ValueError(
                f"text {place}: token id {max(row)} is outside the model's vocabulary of {vocabulary}; the tokenizer "
                "belongs to another model"
            )


def _check_said(place: int, values: Tensor) -> None:
    """Raise a ValueError for numbers of a broken model, which would be compared, and counted, like any others."""
    if not (finite := values.isfinite()).all():
        raise ValueError(
            f"text {place}: the model gives {float(values[~finite][0])} where a log-probability is needed; its "
            "training diverged, or it needs a wider precision"
        )


def _padded(model: Any, rows: Sequence[Sequence[int]], first: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(B, T) ids padded on the right with zeros, and labels."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    labels = torch.full_like(ids, IGNORE_INDEX)
    for number, (row, start) in enumerate(zip(rows, first, strict=True)):
        ids[number, : len(row)] = torch.tensor(row)
        labels[number, start : len(row)] = ids[number, start : len(row)]
    device = embedding_device(model)
    return ids.to(device), labels.to(device)


def _zoo_logprobs(model: Any, ids: Tensor, labels: Tensor, lengths: list[int]) -> Tensor:
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    scores = model(ids, positions, next_token_targets(labels, positions))
    assert isinstance(scores.logprobs, Tensor)
    return scores.logprobs


def _plain_logprobs(model: Any, ids: Tensor, labels: Tensor, lengths: list[int]) -> Tensor:
    logits_BKV, targets_BK = _needed_logits(model, ids, labels, lengths)
    wanted = targets_BK != IGNORE_INDEX
    return -nn.functional.cross_entropy(logits_BKV[wanted].float(), targets_BK[wanted], reduction="none")


def _needed_logits(hf: Any, ids: Tensor, labels: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """(B, K, V) logits of the last K positions, and (B, K) what they are to predict."""
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    targets = next_token_targets(labels, positions)
    needed = (targets != IGNORE_INDEX).any(0).nonzero()
    keep = ids.shape[1] - int(needed[0]) if len(needed) else 1
    mask = (positions < torch.tensor(lengths, device=ids.device)[:, None]).long()
    return last_logits(hf, keep, input_ids=ids, attention_mask=mask), targets[:, -keep:]


def last_logits(hf: Any, keep: int, **inputs: Any) -> Tensor:
    """(B, K, V) logits of the last ``keep`` positions; others are not computed where the model can leave them out."""
    named = signature(hf.forward).parameters
    inputs |= {"logits_to_keep": keep} if "logits_to_keep" in named else {}
    logits = hf(**inputs, use_cache=False).logits
    assert isinstance(logits, Tensor)
    return logits[:, -keep:]
