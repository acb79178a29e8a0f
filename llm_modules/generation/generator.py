"""The `Generator`: every choice of decoding in one object that a config describes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from llm_modules.generation.completion import Completion, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

READ_BY = {
    "temperature": "sample",
    "top_k": "sample",
    "top_p": "sample",
    "min_p": "sample",
    "num_beams": "beam",
    "length_penalty": "beam",
}
"""Settings that only one strategy reads: given to another one, they are an error rather than ignored."""


@dataclass
class Generator:
    """How text is generated from prompts.

    What is sampled for a prompt depends on the seed, the prompt and its row, not on the prompts that share its batch
    (up to rounding in the model itself: a batch of another shape may add in another order).

    Args:
        strategy: greedy takes the likeliest token, sample draws one, beam searches for the likeliest sequence.
        max_new_tokens: most tokens to generate for one prompt.
        temperature: logits are divided by it before drawing (sample only); below 1 is safer, above 1 more varied.
        top_k: draw among the k likeliest tokens (sample only); 0 for all.
        top_p: draw among the likeliest tokens that together have this probability (sample only; arXiv 1904.09751).
        min_p: draw among tokens with at least this share of the likeliest one's probability (sample only; arXiv
            2407.01082).
        repetition_penalty: divides positive and multiplies negative logits of tokens that were seen, in the prompt or
            the answer (arXiv 1909.05858); 1 for none.
        seed: together with a prompt's row it decides what is drawn.
        num_beams: sequences kept per prompt (beam only).
        length_penalty: finished sequences are ranked by log p / length ** length_penalty (beam only).
        cache: keys and values grow with the text (dynamic), or are allocated once (static): then the step of a token is
            compiled on a GPU, or recorded as a CUDA graph where a policy answers in groups.
        stop: strings that end an answer; they are not part of it.
        batch_size: prompts decoded together.
        too_long: what to do with a prompt that leaves no room for max_new_tokens in the model's positions: error, or
            truncate (cut off its beginning).
        logprobs: also compute the log-probability of each answer (one more forward pass).
    """

    strategy: Literal["greedy", "sample", "beam"] = "greedy"
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    num_beams: int = 4
    length_penalty: float = 1.0
    cache: Literal["dynamic", "static"] = "dynamic"
    stop: list[str] = field(default_factory=list)
    batch_size: int = 8
    too_long: Literal["error", "truncate"] = "error"
    logprobs: bool = False

    def __post_init__(self) -> None:
        self._check_types()
        problems = [
            f"{name}={getattr(self, name)!r} must be {allowed}"
            for name, holds, allowed in (
                ("strategy", self.strategy in ("greedy", "sample", "beam"), "greedy, sample or beam"),
                ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
                ("temperature", self.temperature > 0, "above 0 (for the likeliest token use strategy: greedy)"),
                ("top_k", self.top_k >= 0, "at least 0 (0: all tokens)"),
                ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
                ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
                ("repetition_penalty", self.repetition_penalty > 0, "above 0 (1: none)"),
                ("num_beams", self.num_beams >= 2, "at least 2 (for one use strategy: greedy)"),
                ("cache", self.cache in ("dynamic", "static"), "dynamic or static"),
                (
                    "stop",
                    all(type(text) is str and text for text in self.stop),
                    "a list of strings, none of them empty",
                ),
                ("batch_size", self.batch_size >= 1, "at least 1"),
                ("too_long", self.too_long in ("error", "truncate"), "error or truncate"),
            )
            if not holds
        ]
        problems += [
            f"{item.name}={getattr(self, item.name)!r} is read by strategy {READ_BY[item.name]!r} only, not by "
            f"{self.strategy!r}"
            for item in fields(self)
            if READ_BY.get(item.name, self.strategy) != self.strategy and getattr(self, item.name) != item.default
        ]
        if problems:
            raise ValueError("generation: " + "; ".join(problems))

    def _check_types(self) -> None:
        """Whole numbers become floats where a float is meant, as YAML's 1 for 1.0 is; anything else is an error."""
        for item in fields(self):
            value = getattr(self, item.name)
            kind: type = list if item.name == "stop" else type(item.default)
            if kind is float and type(value) is int:
                setattr(self, item.name, float(value))
            elif type(value) is not kind:
                raise ValueError(f"generation: {item.name}={value!r} must be of type {kind.__name__}")

    def generate(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        rows: Sequence[int] | None = None,
    ) -> list[Completion]:
        """One completion a prompt, in the order of the prompts.

        Args:
            model: a transformers ``...ForCausalLM``, or an object with one as ``.hf``. It is left as it was found.
            prompts: raw texts to continue, or lists of chat messages to answer.
            rows: the number of each prompt, for its seed (default: 0, 1, ...).

        Raises:
            ValueError: a prompt is too long, empty, outside the vocabulary, or has no template; nothing is generated.
        """
        places: dict[int, Completion] = {}
        for batch in self.iterate(model, tokenizer, prompts, rows):
            places.update(batch)
        return [places[place] for place in range(len(prompts))]

    def iterate(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        rows: Sequence[int] | None = None,
        skip: frozenset[int] | set[int] = frozenset(),
        tools: Sequence[Sequence[Any] | None] | None = None,
    ) -> Iterator[dict[int, Completion]]:
        """Yield {place in ``prompts``: completion} for each batch, the longest prompts first.

        Batches are cut from all prompts, whatever ``skip`` holds; those whose places all are in ``skip`` are passed
        over. So a restarted job decodes the same batches as an undisturbed one, to the last bit.

        Args:
            model, tokenizer, prompts, rows: as of ``generate``.
            tools: of each prompt the functions that it offers.
        """
        from llm_modules.generation.decoding import Decoder

        with Decoder(self, model, tokenizer) as decoder:
            offered = [None] * len(prompts) if tools is None else tools
            encoded = [decoder.encode(*item) for item in zip(prompts, range(len(prompts)), offered, strict=True)]
            for places in self.batches([len(ids) for ids, _ in encoded]):
                if not skip.issuperset(places):
                    numbers = [place if rows is None else rows[place] for place in places]
                    completions = decoder.decode([encoded[place] for place in places], numbers)
                    yield dict(zip(places, completions, strict=True))

    def batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Places of the prompts of each batch, sorted by length, so that little padding is computed."""
        order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
        return [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]

    def predict(self, model: Any, tokenizer: PreTrainedTokenizerBase, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Rows of a predictions file for a batch of the data's predict loader.

        Args:
            batch: ``prompts``, their ``rows`` (numbers) and ``references`` (known answers), lists of one length.
        """
        completions = self.generate(model, tokenizer, batch["prompts"], batch["rows"])
        return [
            {
                "row": completion.row,
                "prompt": prompt,
                "completion": completion.text,
                "finish_reason": completion.finish_reason,
                "completion_tokens": len(completion.token_ids),
                "reference": reference,
                **({"logprob": completion.logprob} if self.logprobs else {}),
            }
            for prompt, reference, completion in zip(batch["prompts"], batch["references"], completions, strict=True)
        ]

    def stream(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Prompt,
        write: Callable[[str], None],
        row: int = 0,
    ) -> Completion:
        """Generate for one prompt and hand over pieces of text as they come; together they are the completion's text.

        A character, or what may become a stop string, is held back until it is whole. (A beam search knows its text at
        the end only.) A KeyboardInterrupt ends the answer, not the program: what was said so far is the completion,
        with finish_reason ``interrupted``.
        """
        from llm_modules.generation.decoding import Decoder

        with Decoder(self, model, tokenizer) as decoder:
            return decoder.stream(decoder.encode(prompt, 0), row, write)
