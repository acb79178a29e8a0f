"""Several answers to each prompt, sampled together, for reinforcement learning.

A prompt is computed once for all of its answers, and a row that has ended leaves the batch. What is drawn is what
``Generator.generate`` draws for the same seed and row.

Shape legend: B rows, T positions with left padding, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llm_modules.generation.completion import Detokenizer, cut
from llm_modules.generation.decoding import Decoder
from llm_modules.generation.processors import RepetitionPenalty, SeededSampler
from llm_modules.generation.steps import FixedSteps, GrowingSteps, fixed_problem, read, repeatable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llm_modules.generation.generator import Generator

LEAVING = 0.25
"""Share of the rows that have ended at which they leave: each time, the cache of the others is copied."""


@dataclass
class Sampled:
    """One answer.

    Attributes:
        text: as of ``Completion``.
        token_ids: with the end token, or the token that completes a stop string.
        logprobs: of each token at the temperature it was drawn at, before top_k, top_p, min_p and penalties.
        finished: whether it ended by itself.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finished: bool


class GroupSampler(Decoder):
    """A model made ready to answer, for the length of a ``with`` block.

    Args:
        settings: how; ``batch_size`` counts answers.
        model: a language model of the zoo, or transformers' own.
        tokenizer: its tokenizer.

    Raises:
        ValueError: the model, or a setting, does not go with this.
    """

    def __init__(self, settings: Generator, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(settings, model, tokenizer)
        problem = None
        if settings.strategy == "beam":
            problem = "strategy: beam finds likely answers, it does not sample; use sample"
        elif self.virtual:
            problem = "the model has virtual tokens in front, which are not sampled from in groups; use another adapter"
        elif "position_ids" not in inspect.signature(self.hf.forward).parameters:
            problem = f"{type(self.hf).__name__} takes no position_ids; use another family"
        elif getattr(self.hf, "_is_stateful", False) or not repeatable(self.hf):
            problem = f"{type(self.hf).__name__} keeps a state that is no cache of keys and values; use another family"
        elif settings.cache == "static" and (found := fixed_problem(self.hf)) is not None:
            problem = f"cache: static: {found}; use dynamic"
        if problem is not None:
            raise ValueError(f"generation: {problem}")

    def __enter__(self) -> GroupSampler:
        super().__enter__()
        return self

    def sample(self, prompts: Sequence[list[int]], rows: Sequence[Sequence[int]]) -> list[list[Sampled]]:
        """Answers to each prompt.

        Args:
            prompts: token ids.
            rows: of each prompt the numbers of its answers, which with the seed decide what is drawn; as many of each.
        """
        size = len(rows[0]) if rows else 1
        assert all(len(numbers) == size for numbers in rows)
        order = sorted(range(len(prompts)), key=lambda place: (-len(prompts[place]), place))
        together = max(1, self.settings.batch_size // size)
        found: dict[int, list[Sampled]] = {}
        for start in range(0, len(order), together):
            places = order[start : start + together]
            numbers = [number for place in places for number in rows[place]]
            answers = self._sample([prompts[place] for place in places], numbers, size)
            for i, place in enumerate(places):
                found[place] = [self._sampled(prompts[place], *answer) for answer in answers[i * size : (i + 1) * size]]
        return [found[place] for place in range(len(prompts))]

    def _sampled(self, prompt: list[int], ids: list[int], logprobs: list[float]) -> Sampled:
        kept, text, stopped = cut(ids, Detokenizer(self.tokenizer, prompt), self.end_ids, self.stop)
        return Sampled(text, kept, logprobs[: len(kept)], stopped)

    @torch.no_grad()
    def _sample(self, prompts: list[list[int]], rows: Sequence[int], size: int) -> list[tuple[list[int], list[float]]]:
        """(ids, log-probabilities) of each answer, those to a prompt next to one another."""
        steps, mask, seen, logits = self._read(prompts, size)
        length = seen.shape[1]
        processors = self._processors(mask, rows)
        criteria = self._criteria(length, None)
        temperature = self.settings.temperature if self.settings.strategy == "sample" else 1.0
        ends = torch.tensor(self.end_ids, dtype=torch.int64, device=seen.device)
        answers: list[tuple[list[int], list[float]]] = [([], []) for _ in rows]
        alive = torch.arange(len(rows), device=seen.device)  # the answer of each row of the batch
        ended = torch.zeros(len(rows), dtype=torch.bool, device=seen.device)
        scores: list[Tensor] = []
        for step in range(self.settings.max_new_tokens):
            logits = logits.float()
            token = processors(seen, logits).argmax(-1)  # type: ignore[arg-type]
            drawn = (logits / temperature).log_softmax(-1).gather(-1, token[:, None])
            scores.append(drawn.squeeze(-1))
            seen = torch.cat([seen, token[:, None]], dim=1)
            ended |= torch.isin(token, ends)
            if criteria:
                ended |= criteria(seen, None)
            gone, last = int(ended.sum()), step + 1 == self.settings.max_new_tokens
            if last or gone >= LEAVING * len(ended):
                keep = (~ended).nonzero().flatten()
                leaving = torch.arange(len(ended), device=seen.device) if last else ended.nonzero().flatten()
                self._write(answers, alive, seen[:, length:], scores, leaving)
                if last or not len(keep):
                    break
                alive, ended, seen, token = alive[keep], ended[keep], seen[keep], token[keep]
                scores = [column[keep] for column in scores]
                steps.keep(keep)
                _keep(processors, keep)
            logits = steps(token)
        return answers

    def _read(self, prompts: list[list[int]], size: int) -> tuple[GrowingSteps | FixedSteps, Tensor, Tensor, Tensor]:
        """(steps, mask, ids, next logits) of the prompts, each read once and then repeated for its answers."""
        ids, mask = self._padded(prompts)
        cache, logits = read(self.hf, ids, mask)
        kind: type[GrowingSteps | FixedSteps] = FixedSteps if self.settings.cache == "static" else GrowingSteps
        steps = kind(self.hf, cache, mask, size, self.settings.max_new_tokens - 1)
        mask, ids, logits = (tensor.repeat_interleave(size, 0) for tensor in (mask, ids, logits))
        return steps, mask, ids, logits

    @staticmethod
    def _write(answers: list[Any], alive: Tensor, ids: Tensor, scores: list[Tensor], leaving: Tensor) -> None:
        logprobs = torch.stack(scores, dim=1)[leaving].tolist()
        for answer, tokens, row in zip(alive[leaving].tolist(), ids[leaving].tolist(), logprobs, strict=True):
            answers[answer] = (tokens, row)


def _keep(processors: Any, rows: Tensor) -> None:
    """What processors know of rows, of those that stay."""
    for processor in processors:
        if isinstance(processor, SeededSampler):
            processor.uniform_BS = processor.uniform_BS[rows.to(processor.uniform_BS.device)]
        elif isinstance(processor, RepetitionPenalty):
            processor.mask_BT = processor.mask_BT[rows]
