"""From a batch of prompt ids to completions with transformers' ``generate``; the model is left as it was found.

Shape legend: B rows, T prompt tokens with left padding, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from llm_modules.generation.completion import (
    INCOMPLETE,
    Completion,
    Detokenizer,
    Prompt,
    PromptTooLong,
    cut,
    first_stop,
    possible_stop,
)
from llm_modules.generation.processors import Interruption, RepetitionPenalty, SeededSampler, StopStrings
from llm_modules.generation.prompts import encode_prompt, end_token_ids, positions_of, stop_tokens

if TYPE_CHECKING:
    from llm_modules.generation.generator import Generator


class Decoder:
    """A model made ready to generate, for the length of a ``with`` block."""

    def __init__(self, settings: Generator, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        self.settings = settings
        self.hf = getattr(model, "generation_model", None) or getattr(model, "hf", model)
        peft = getattr(self.hf, "active_peft_config", None)  # of peft's own model, where there are virtual tokens
        self.virtual = 0 if peft is None else int(getattr(peft, "num_virtual_tokens", None) or 0)
        self.tokenizer = tokenizer
        special, self.stop = stop_tokens(tokenizer, settings.stop)
        self.end_ids = sorted({*end_token_ids(self.hf, tokenizer), *special})
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.pad_id = int(pad if pad is not None else 0)  # any id will do: padding is masked
        positions = positions_of(self.hf.config)
        self.positions = None if positions is None else positions - self.virtual
        if self.positions is not None and settings.max_new_tokens >= self.positions:
            raise ValueError(
                f"max_new_tokens={settings.max_new_tokens} leaves no room for a prompt in the model's {self.positions} "
                f"positions; lower it"
            )
        self._restore = ExitStack()

    def __enter__(self) -> Decoder:
        hf, restore = self.hf, self._restore
        for module in hf.modules():  # one by one: some may be in eval mode for good
            restore.callback(setattr, module, "training", module.training)
        hf.eval()
        # A folder's own defaults (Qwen's repetition penalty, a temperature) must not mix into the settings.
        for owner in [hf, hf.get_base_model()] if self.virtual else [hf]:
            restore.callback(setattr, owner, "generation_config", owner.generation_config)
            owner.generation_config = GenerationConfig()
        if any(module._compiled_call_impl is not None for module in hf.modules()):
            # Caches would have blocks that were compiled for training compiled again and again, up to the limit after
            # which training, too, is no longer compiled.
            restore.enter_context(torch.compiler.set_stance("force_eager"))
        return self

    def __exit__(self, *error: object) -> None:
        self._restore.close()

    def encode(self, prompt: Prompt, place: int, tools: Sequence[Any] | None = None) -> tuple[list[int], int]:
        """(ids that the model is given, number of ids cut off on the left)."""
        try:
            ids = encode_prompt(self.tokenizer, prompt, tools)
        except ValueError as error:
            raise ValueError(f"prompt {place}: {str(error).removeprefix('prompt: ')}") from error
        vocabulary = self.hf.get_input_embeddings().weight.shape[0]
        if max(ids) >= vocabulary:
            raise ValueError(
                f"prompt {place}: token id {max(ids)} is outside the model's vocabulary of {vocabulary}; the tokenizer "
                f"belongs to another model"
            )
        new = self.settings.max_new_tokens
        room = len(ids) if self.positions is None else self.positions - new
        if len(ids) > room and self.settings.too_long == "error":
            raise PromptTooLong(
                f"prompt {place}: {len(ids)} tokens and max_new_tokens={new} exceed the model's {self.positions} "
                f"positions; shorten it, lower max_new_tokens, or set too_long: truncate"
            )
        return ids[-room:], max(0, len(ids) - room)

    def decode(self, prompts: Sequence[tuple[list[int], int]], rows: Sequence[int]) -> list[Completion]:
        """One completion a prompt of the batch."""
        generated = self._generate([ids for ids, _ in prompts], rows, None)
        return [self._complete(*arguments) for arguments in zip(prompts, rows, generated, strict=True)]

    def stream(self, prompt: tuple[list[int], int], row: int, write: Callable[[str], None]) -> Completion:
        """One completion, whose text is written as it comes."""
        streamer = TextStream(Detokenizer(self.tokenizer, prompt[0]), self.end_ids, self.stop, write)
        with Interruption() as interruption:
            try:
                shown = streamer if self.settings.strategy != "beam" else None
                (ids,) = self._generate([prompt[0]], [row], shown, interruption)
            except KeyboardInterrupt:
                ids, interruption.pressed = streamer.ids, True
        completion = self._complete(prompt, row, ids)
        if interruption.pressed and completion.finish_reason == "length":
            completion.finish_reason = "interrupted"
        streamer.finish(completion.text)
        return completion

    def _complete(self, prompt: tuple[list[int], int], row: int, generated: Sequence[int]) -> Completion:
        prompt_ids, truncated = prompt
        ids, text, stopped = cut(generated, Detokenizer(self.tokenizer, prompt_ids), self.end_ids, self.stop)
        logprob = self.logprob(prompt_ids, ids) if self.settings.logprobs else None
        reason: Any = "stop" if stopped else "length"
        return Completion(row, text, ids, reason, len(prompt_ids), truncated, logprob)

    @torch.no_grad()
    def _generate(
        self, prompts: list[list[int]], rows: Sequence[int], streamer: Any, interruption: Interruption | None = None
    ) -> list[list[int]]:
        input_ids, attention_mask = self._padded(prompts)
        length = input_ids.shape[1]
        sequences = self.hf.generate(
            input_ids,
            attention_mask=attention_mask,  # the positions are counted from it
            generation_config=self._config(),
            logits_processor=self._processors(attention_mask, rows),
            stopping_criteria=self._criteria(length, interruption),
            streamer=streamer,
        )
        return sequences[:, length:].tolist()

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """(B, T) ids with padding on the left, and (B, T) 1 where there is none."""
        device = self.hf.get_input_embeddings().weight.device
        length = max(map(len, prompts))
        input_ids = torch.full((len(prompts), length), self.pad_id, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(prompts):
            input_ids[row, length - len(ids) :] = torch.tensor(ids)
            attention_mask[row, length - len(ids) :] = 1
        return input_ids.to(device), attention_mask.to(device)

    def _config(self) -> GenerationConfig:
        settings = self.settings
        beam = {"num_beams": settings.num_beams, "length_penalty": settings.length_penalty}
        return GenerationConfig(
            do_sample=False,  # SeededSampler draws
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=self.end_ids or None,
            pad_token_id=self.pad_id,
            use_cache=True,
            cache_implementation="static" if settings.cache == "static" else None,
            **(beam if settings.strategy == "beam" else {}),
        )

    def _processors(self, attention_mask: Tensor, rows: Sequence[int]) -> LogitsProcessorList:
        settings, processors = self.settings, LogitsProcessorList()
        if settings.repetition_penalty != 1.0:
            processors.append(RepetitionPenalty(settings.repetition_penalty, attention_mask))
        if settings.strategy == "sample":
            if settings.temperature != 1.0:
                processors.append(TemperatureLogitsWarper(settings.temperature))
            if settings.top_k:
                processors.append(TopKLogitsWarper(settings.top_k))
            if settings.top_p < 1.0:
                processors.append(TopPLogitsWarper(settings.top_p))
            if settings.min_p > 0.0:
                processors.append(MinPLogitsWarper(settings.min_p))
            length, device = attention_mask.shape[1], attention_mask.device
            processors.append(SeededSampler(settings.seed, rows, settings.max_new_tokens, length, device))
        return processors

    def _criteria(self, prompt_length: int, interruption: Interruption | None) -> StoppingCriteriaList:
        criteria = StoppingCriteriaList([StopStrings(self.tokenizer, self.stop, prompt_length)] if self.stop else [])
        if interruption is not None:
            criteria.append(interruption)
        return criteria

    @torch.no_grad()
    def logprob(self, prompt_ids: list[int], ids: list[int]) -> float:
        """Sum of log p of ``ids`` after the prompt. One row at a time: logits of a batch could fill the memory."""
        if not ids:
            return 0.0
        device = self.hf.get_input_embeddings().weight.device
        tokens = torch.tensor([prompt_ids + ids], device=device)
        logits = self.hf(tokens, use_cache=False).logits[0, -tokens.shape[1] :][len(prompt_ids) - 1 : -1]
        targets = tokens[0, len(prompt_ids) :, None]
        return float(logits.float().log_softmax(-1).gather(-1, targets).double().sum())


class TextStream(BaseStreamer):
    """Writes text as soon as it is sure to be part of the completion."""

    def __init__(
        self, detokenizer: Detokenizer, end_ids: Sequence[int], stop: Sequence[str], write: Callable[[str], None]
    ) -> None:
        self.detokenizer = detokenizer
        self.end_ids = frozenset(end_ids)
        self.stop = stop
        self.write = write
        self.ids: list[int] = []
        self.written = 0
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        if not self._prompt_seen:  # the first call brings the prompt
            self._prompt_seen = True
            return
        self.ids.extend(value.flatten().tolist())
        _, text, _ = cut(self.ids, self.detokenizer, self.end_ids, [])
        if (place := first_stop(text, self.stop)) is not None:
            text = text[:place]
        else:
            text = text.rstrip(INCOMPLETE)
            text = text[: len(text) - possible_stop(text, self.stop)]
        self._advance(text)

    def end(self) -> None:
        """Called by ``generate``; the caller finishes with the completion's exact text instead."""

    def finish(self, text: str) -> None:
        """Write what was held back of the final ``text``."""
        self._advance(text)

    def _advance(self, text: str) -> None:
        if len(text) > self.written:
            self.write(text[self.written :])
            self.written = len(text)
