"""Greedy coordinate gradient (arXiv 2307.15043): a suffix under which a model is likely to begin as one wants.

Shape legend: B candidates, S suffix tokens, T positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llm_modules.evaluation.asking import encode_prompts, rendered
from llm_modules.evaluation.likelihood import check_rows, embedding_device, last_logits, transformers_model, undisturbed
from llm_modules.evaluation.rows import check_least

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Slot:
    """One request with a place for the suffix, as ids: ``before``, the suffix, ``after``, and the wanted answer."""

    request: str
    before: list[int]
    after: list[int]
    target: list[int]

    def row(self, suffix: Sequence[int]) -> list[int]:
        return [*self.before, *suffix, *self.after, *self.target]

    def rows(self, suffixes_BS: Tensor) -> Tensor:
        """(B, T) ids, all of one length: nothing is padded."""
        count = (len(suffixes_BS), 1)
        before, rest = (suffixes_BS.new_tensor(part).repeat(count) for part in (self.before, self.after + self.target))
        return torch.cat([before.long(), suffixes_BS, rest.long()], 1)


@dataclass(frozen=True)
class Budget:
    """How long and how widely a suffix is searched (algorithm 1).

    Args:
        steps: exchanges of a token.
        top_k: most promising tokens, by the gradient, at each place of the suffix.
        candidates: exchanges that are drawn from these and tried in a step.
        batch_tokens: most tokens computed at once.
    """

    steps: int = 500
    top_k: int = 256
    candidates: int = 512
    batch_tokens: int = 16384

    def __post_init__(self) -> None:
        check_least(**{key: (getattr(self, key), 1) for key in ("steps", "top_k", "candidates", "batch_tokens")})


@dataclass
class Found:
    """What a search found.

    Attributes:
        text: of the suffix, what is put after a request.
        ids: its tokens.
        losses: the lowest loss so far, before the first step and after each: nats per token of the wanted answer, the
            mean over the requests.
    """

    text: str
    ids: list[int]
    losses: list[float]


class SuffixSearch:
    """One suffix for one or several requests.

    Args:
        model: of the zoo, or transformers' own; left as it was found.
        tokenizer: a fast one.
        pairs: (request, wanted beginning of the answer).
        start: text that the search begins with; its tokens are exchanged one by one, so it gives the suffix's length.

    Raises:
        ValueError: the tokenizer does not give the start back, or other tokens after different requests; a request is
            too long.
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], start: str
    ) -> None:
        self.model, self.tokenizer = transformers_model(model), tokenizer
        self.whole, self.device = model, embedding_device(model)
        laid = [lay_out(tokenizer, request, start, target) for request, target in pairs]
        self.slots, self.start = [slot for slot, _ in laid], laid[0][1]
        if different := next((slot for slot, ids in laid if ids != self.start), None):
            raise ValueError(
                f"start: {start!r} is not the same tokens after {different.request!r} as after "
                f"{self.slots[0].request!r}; choose another start, or universal: false"
            )
        check_rows(model, [slot.row(self.start) for slot in self.slots])
        # The space before the suffix is either in its first token, or a token of its own.
        self.glue = "" if self._decoded(self.start).startswith(" ") else " "
        if not self.kept(torch.tensor([self.start])).all():
            raise ValueError(f"start: the tokenizer makes other tokens of {start!r} as it stands; choose another start")
        self.allowed = allowed_tokens(tokenizer, self.model.get_input_embeddings().weight.shape[0])

    def text(self, suffix: Sequence[int]) -> str:
        """What stands after a request where the suffix is these tokens."""
        return self.glue + self._decoded(suffix)

    def _decoded(self, suffix: Sequence[int]) -> str:
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        last = self.slots[0].before[-1:]  # SentencePiece drops the space of what it takes for a text's first word
        alone, both = (str(self.tokenizer.decode([*ids], **options)) for ids in (last, [*last, *suffix]))
        return both[len(alone) :] if both.startswith(alone) else str(self.tokenizer.decode([*suffix], **options))

    def kept(self, suffixes_BS: Tensor) -> Tensor:
        """(B,) whether the suffix's text, after every request, is tokenized into the same tokens again."""
        rows = suffixes_BS.tolist()
        shown = [self.text(row) for row in rows]
        kept = [True] * len(rows)
        for slot in self.slots:
            again = encode_prompts(self.tokenizer, [slot.request + text for text in shown])
            wanted = ([*slot.before, *row, *slot.after] for row in rows)
            kept = [k and a == w for k, a, w in zip(kept, again, wanted, strict=True)]
        return torch.tensor(kept)

    def search(self, budget: Budget, seed: int) -> Found:
        """Algorithm 1. With several requests the sum of their gradients, each of norm 1, proposes, as in algorithm 2,
        and the mean of their losses decides, from the first step on (the paper adds requests one by one).

        A candidate replaces the suffix even where it is worse, as in the paper; what is found is the best of all.
        """
        draw = torch.Generator().manual_seed(seed)
        # Lightning validates in inference mode, in which there are no gradients.
        with torch.inference_mode(False), torch.enable_grad(), undisturbed(self.whole):
            table_VH = self._table()
            current = torch.tensor(self.start)
            best, losses = current, [float(self.losses(current[None], budget.batch_tokens)[0])]
            for _ in range(budget.steps):
                gradient_SV = sum(self._unit(token_gradient(self.model, s, current, table_VH)) for s in self.slots)
                assert isinstance(gradient_SV, Tensor)
                candidates = self.candidates(gradient_SV.cpu(), current, budget, draw)
                least = losses[-1]
                if len(candidates):
                    tried = self.losses(candidates, budget.batch_tokens)
                    place = int(tried.argmin())
                    current = candidates[place]
                    if float(tried[place]) < least:
                        best, least = current, float(tried[place])
                losses.append(least)
        return Found(self.text(best.tolist()), best.tolist(), losses)

    def candidates(self, gradient_SV: Tensor, current: Tensor, budget: Budget, draw: torch.Generator) -> Tensor:
        """(B, S) suffixes with one token exchanged, each once, those whose text gives other tokens left out."""
        promise_SV = (-gradient_SV).masked_fill(~self.allowed[: gradient_SV.shape[1]], -torch.inf)
        top = promise_SV.topk(min(budget.top_k, int(self.allowed.sum()))).indices
        places = torch.randint(len(current), (budget.candidates,), generator=draw)
        picks = torch.randint(top.shape[1], (budget.candidates,), generator=draw)
        suffixes = current.repeat(budget.candidates, 1)
        suffixes[torch.arange(budget.candidates), places] = top[places, picks]
        suffixes = suffixes[(suffixes != current).any(1)].unique(dim=0)
        return suffixes[self.kept(suffixes)] if len(suffixes) else suffixes

    @torch.no_grad()
    def losses(self, suffixes_BS: Tensor, batch_tokens: int) -> Tensor:
        """(B,) mean over the requests of the wanted answer's loss, nats per token."""
        total = torch.zeros(len(suffixes_BS), dtype=torch.float64)
        for slot in self.slots:
            rows = slot.rows(suffixes_BS).to(self.device)
            parts = rows.split(max(1, batch_tokens // rows.shape[1]))
            total += torch.cat([target_losses(self.model, len(slot.target), input_ids=part).cpu() for part in parts])
        return total / len(self.slots)

    @torch.no_grad()
    def _table(self) -> Tensor:
        """(V, H) what the model makes of each token, its own factor or adapter on the embeddings included."""
        embed = self.model.get_input_embeddings()
        return embed(torch.arange(embed.weight.shape[0], device=self.device))  # type: ignore[no-any-return]

    @staticmethod
    def _unit(gradient: Tensor) -> Tensor:
        return gradient / gradient.norm().clamp_min(torch.finfo(gradient.dtype).tiny)


def token_gradient(model: Any, slot: Slot, suffix: Tensor, table_VH: Tensor) -> Tensor:
    """(S, V) gradient of the wanted answer's loss on the suffix's one-hot rows: that on the embeddings, times the
    embeddings of all tokens."""
    ids = slot.rows(suffix[None]).to(table_VH.device)
    start, end = len(slot.before), len(slot.before) + len(suffix)
    embeddings = model.get_input_embeddings()(ids).detach()
    own = embeddings[:, start:end].clone().requires_grad_()
    embeddings = torch.cat([embeddings[:, :start], own, embeddings[:, end:]], 1)
    loss = target_losses(model, len(slot.target), inputs_embeds=embeddings, ids=ids)
    (gradient,) = torch.autograd.grad(loss.sum(), own)
    return _at_least_fp32(gradient[0]) @ _at_least_fp32(table_VH).T


def target_losses(model: Any, targets: int, ids: Tensor | None = None, **inputs: Tensor) -> Tensor:
    """(B,) loss of the last ``targets`` tokens of each row, nats per token.

    Args:
        model: transformers' own.
        ids: (B, T) what the rows are, where ``inputs`` does not have them as ``input_ids``.
        inputs: ``input_ids`` or ``inputs_embeds``.
    """
    wanted = (inputs["input_ids"] if ids is None else ids)[:, -targets:]
    logits = _at_least_fp32(last_logits(model, targets + 1, **inputs)[:, :-1])
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="none")
    return losses.double().mean(1)


def _at_least_fp32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def lay_out(tokenizer: PreTrainedTokenizerBase, request: str, suffix: str, target: str) -> tuple[Slot, list[int]]:
    """A request's slot, and the tokens of the suffix in it.

    Raises:
        ValueError: a slow tokenizer, a suffix that the chat template does not show, an empty target.
    """
    if not tokenizer.is_fast:
        raise ValueError("tokenizer: it does not say where its tokens stand in a text; a fast one is needed")
    text, added = rendered(tokenizer, f"{request} {suffix}")
    start = text.rfind(suffix)
    if start < 0:
        raise ValueError(f"start: the chat template changes {suffix!r}; choose another start")
    (ids,) = encode_prompts(tokenizer, [f"{request} {suffix}"])
    offsets = tokenizer(text, add_special_tokens=added, return_offsets_mapping=True)["offset_mapping"][: len(ids)]
    inside = [n for n, (a, b) in enumerate(offsets) if a < start + len(suffix) and b > start and a < b]
    # Without a template the answer goes on with a new word.
    wanted = tokenizer(target if tokenizer.chat_template else f" {target}", add_special_tokens=False)["input_ids"]
    if not wanted:
        raise ValueError(f"target: {target!r} has no tokens; give the words that the answer should begin with")
    first, last = inside[0], inside[-1] + 1
    return Slot(request, ids[:first], ids[last:], wanted), ids[first:last]


def allowed_tokens(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Tensor:
    """(V,) the tokens that a suffix may have: printable ASCII, none that is special or was added."""
    allowed = torch.zeros(vocabulary, dtype=torch.bool)
    added = set(tokenizer.added_tokens_decoder)
    ids = [token for token in range(min(len(tokenizer), vocabulary)) if token not in added]
    for token, text in zip(ids, tokenizer.batch_decode([[token] for token in ids]), strict=True):
        allowed[token] = bool(text) and text.isascii() and text.isprintable()
    return allowed
