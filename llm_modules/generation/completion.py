"""What comes out of generation: ids cut at the end token or stop string, and the text that they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from transformers import PreTrainedTokenizerBase

Prompt = str | list[dict[str, Any]]
"""Raw text that is continued, or a list of chat messages that is answered."""

FinishReason = Literal["stop", "length", "interrupted"]

INCOMPLETE = "\ufffd"
"""What a decoder shows for bytes that are not (yet) a whole character."""


class PromptTooLong(ValueError):
    """The prompt and its answer do not fit into the model's positions."""


@dataclass
class Completion:
    """The answer to one prompt.

    Attributes:
        row: index of the prompt: with the seed, it decides what is sampled.
        text: what was generated, without special tokens, cut before the stop string.
        token_ids: what was generated, including the end token, or the token that completes the stop string.
        finish_reason: ``stop`` (end token or stop string), ``length`` (max_new_tokens), ``interrupted`` (Ctrl-C).
        prompt_tokens: tokens of the prompt that the model saw.
        truncated: tokens of the prompt that were cut off on its left.
        logprob: sum over ``token_ids`` of log p under the model itself (no temperature, no penalty), if asked for.
    """

    row: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    truncated: int = 0
    logprob: float | None = None


class Detokenizer:
    """From the ids generated after one prompt to their text.

    The ids are decoded together with the last token of the prompt, because SentencePiece decoders drop the space in
    front of what they take for the first word of a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.context = list(prompt_ids[-1:])
        self.before = self._decode(self.context)

    def text(self, ids: Sequence[int]) -> str:
        whole = self._decode([*self.context, *ids])
        # A character cut in two by the end of the prompt changes what stands before: then the ids stand alone.
        return whole[len(self.before) :] if whole.startswith(self.before) else self._decode(ids)

    def _decode(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        assert isinstance(text, str)
        return text


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the earliest stop string begins in ``text``, or None."""
    places = [place for place in (text.find(string) for string in stop) if place >= 0]
    return min(places, default=None)


def possible_stop(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of ``text`` with which a stop string could begin."""
    sizes = (
        size for string in stop for size in range(1, min(len(string), len(text)) + 1) if text.endswith(string[:size])
    )
    return max(sizes, default=0)


def cut(
    ids: Sequence[int], detokenizer: Detokenizer, end_ids: Collection[int], stop: Sequence[str]
) -> tuple[list[int], str, bool]:
    """(ids, text, stopped): what counts of the generated ``ids``, which may go on with padding after the end."""
    end = next((place for place, token in enumerate(ids) if token in end_ids or token < 0), None)
    stopped = end is not None
    kept = list(ids) if end is None else list(ids[: end + 1])
    if kept and kept[-1] < 0:  # beam search without an end token fills up with -1
        kept.pop()
    text = detokenizer.text(kept)
    place = first_stop(text, stop)
    if place is None:
        return kept, text, stopped
    low, high = 1, len(kept)  # the fewest ids whose text holds a stop string
    while low < high:
        middle = (low + high) // 2
        if first_stop(detokenizer.text(kept[:middle]), stop) is None:
            low = middle + 1
        else:
            high = middle
    return kept[:low], text[:place], True
