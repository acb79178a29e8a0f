"""What is done to the scores of the next token, and when a row stops: plug-ins of transformers' ``generate``.

Shape legend: B rows (prompts, or prompts x beams), T tokens so far with left padding, S steps, V vocabulary.
"""

from __future__ import annotations

import hashlib
import signal
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase, StoppingCriteria


class RepetitionPenalty(LogitsProcessor):
    """CTRL's penalty (arXiv 1909.05858, section 4.1) on what the row has seen, padding excepted.

    transformers' own also punishes the pad token of padded rows, which often is the end token: the answer would then
    depend on the batch.
    """

    def __init__(self, penalty: float, attention_mask_BT: Tensor) -> None:
        self.penalty = penalty
        self.mask_BT = attention_mask_BT.bool()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        prompts, length = self.mask_BT.shape
        mask_BT = self.mask_BT.repeat_interleave(len(input_ids) // prompts, dim=0)  # beams of a prompt are neighbours
        seen_BV = torch.zeros_like(scores, dtype=torch.int32)
        counted = torch.cat([mask_BT, mask_BT.new_ones(len(input_ids), input_ids.shape[1] - length)], dim=1)
        seen_BV.scatter_add_(1, input_ids, counted.int())
        penalized = torch.where(scores > 0, scores / self.penalty, scores * self.penalty)
        return torch.where(seen_BV > 0, penalized, scores)


class SeededSampler(LogitsProcessor):
    """Draws a token for each row from the row's own random numbers, and leaves it alone above -inf.

    Greedy search then takes it. transformers draws all rows from one generator, so what a prompt gets depends on its
    place and on its neighbours; here it depends on (seed, row, step). One uniform number a step goes through the
    inverse of the cumulative distribution, in float64.
    """

    def __init__(self, seed: int, rows: Sequence[int], steps: int, prompt_length: int, device: torch.device) -> None:
        self.uniform_BS = torch.stack([uniform_numbers(seed, row, steps) for row in rows])
        if device.type != "mps":  # which has no float64
            self.uniform_BS = self.uniform_BS.to(device)
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cumulative_BV = scores.to(self.uniform_BS.device).double().softmax(-1).cumsum(-1)
        cumulative_BV /= cumulative_BV[:, -1:].clone()  # ends at exactly 1, which no uniform number reaches
        step = input_ids.shape[1] - self.prompt_length
        drawn_B1 = torch.searchsorted(cumulative_BV, self.uniform_BS[:, step, None].contiguous(), right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn_B1.to(scores.device), 0.0)


def uniform_numbers(seed: int, row: int, steps: int) -> Tensor:
    """(S,) float64 in [0, 1): a function of (seed, row) alone; fewer steps give a prefix."""
    digest = hashlib.blake2b(f"{seed}:{row}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return torch.rand(steps, dtype=torch.float64, generator=generator)


class Interruption(StoppingCriteria):
    """Ctrl-C ends the rows after the present token, for the length of a ``with`` block; a second one at once.

    A KeyboardInterrupt is raised wherever the program is, and lost where Python cannot hand an exception on: in a
    finalizer, or in a weak reference's callback, of which a forward pass has many.

    Attributes:
        pressed: whether it was.
    """

    def __init__(self) -> None:
        self.pressed = False
        self._before: Any = None

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # only there can signals be handled
            self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _press(self, *event: object) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.pressed, dtype=torch.bool, device=input_ids.device)


class StopStrings(StoppingCriteria):
    """Ends a row as soon as its generated text holds a stop string.

    transformers' own matches a table of token strings, which knows neither characters made of several tokens nor what
    a decoder does between tokens; here the last tokens are decoded. ``completion.cut`` finds the exact place later.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], prompt_length: int) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.prompt_length = prompt_length
        # A token that is seen in the text is at least one byte of it; some more for what is not seen.
        self.window = max(len(string.encode()) for string in stop) + 16

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        tail = input_ids[:, max(self.prompt_length, input_ids.shape[1] - self.window) :]
        texts = self.tokenizer.batch_decode(tail.tolist(), skip_special_tokens=True)
        ended = [any(string in text for string in self.stop) for text in texts]
        return torch.tensor(ended, dtype=torch.bool, device=input_ids.device)
