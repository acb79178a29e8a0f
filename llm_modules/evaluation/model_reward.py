"""A reward that a reward model gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llm_modules.evaluation.plain_answers import encode_conversation
from llm_modules.evaluation.rewards import Answer, Reward, RowError, each
from llm_modules.folders import local_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Precision = Literal["auto", "float32", "bfloat16", "float16"]


class ModelReward(Reward):
    """The score of a reward model for the conversation that the answer ends, under the model's own chat template.

    The model is opened by transformers' ``AutoModelForSequenceClassification`` at the first score, moves to ``device``,
    is in evaluation mode, has no gradients, and is in nobody's state dict. ``recipes score`` gives the same numbers.
    Special tokens that an answer spells stay text, so that no answer ends its turn and praises itself.

    Args:
        model: folder (as ``RewardModule`` exports), its run, or hub id of a classifier with one label.
        batch_size: conversations at once; the longest of all go first, so that memory suffices or fails at once.
        dtype: of its weights; `auto`: as they are stored.
        weight: as of ``Reward``.
        name: as of ``Reward``.
        unfinished: as of ``Reward``; the model cannot see that an answer was cut, since its template ends each.

    Attributes:
        device: where it scores; set by whoever trains.
    """

    def __init__(
        self,
        model: str,
        batch_size: int = 16,
        dtype: Precision = "auto",
        weight: float = 1.0,
        name: str | None = None,
        unfinished: float | None = None,
    ) -> None:
        super().__init__(weight, name, unfinished)
        if batch_size < 1:
            raise ValueError(f"rewards.{self.name}.batch_size: {batch_size} is not allowed; allowed: 1 or more")
        run = Path(model).expanduser()
        is_run = not (run / "config.json").is_file() and (run / "export" / "config.json").is_file()
        self.source = str(run / "export") if is_run else str(run) if run.is_dir() else model
        self.batch_size, self.dtype = batch_size, dtype
        self.device: Any = "cpu"
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._model: Any = None

    @property
    def stored_bytes(self) -> int:
        """Of its weights, as they are stored; 0 where the model is not a folder here."""
        return sum(file.stat().st_size for file in Path(self.source).expanduser().glob("*.safetensors"))

    def bind(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Checks the model, before any weight is read, against the tokenizer of the policy that is trained.

        Raises:
            ValueError: there is no model, it is no classifier with one label, has no chat template, or its tokenizer
                gives tokens other ids.
        """
        from llm_modules.tokenizer import load_tokenizer

        key = f"rewards.{self.name}.model: {self.source!r}"
        self._check_config(key)
        try:
            own = load_tokenizer(self.source)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
        if not own.is_fast:
            raise ValueError(
                f"{key} has a tokenizer that does not tell where its tokens stand in a text, which is needed to keep "
                "special tokens out of answers; save it with a tokenizer.json"
            )
        if not own.chat_template:
            raise ValueError(f"{key} has no chat template, under which it was trained; save its tokenizer with one")
        mine, other = own.get_vocab(), tokenizer.get_vocab()
        differ = [token for token in mine.keys() | other.keys() if mine.get(token) != other.get(token)]
        if differ:
            token = min(differ)
            raise ValueError(
                f"{key} has another tokenizer than the policy: {len(differ)} tokens have other ids, {token!r} is "
                f"{mine.get(token, 'none')} there and {other.get(token, 'none')} here; train both with one tokenizer"
            )
        self._tokenizer = own

    def _check_config(self, key: str) -> None:
        from transformers import AutoConfig

        try:
            local_folder(self.source)
            config = AutoConfig.from_pretrained(self.source)
        except (OSError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{key} cannot be opened: {reason}") from error
        if not any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
            raise ValueError(
                f"{key} is no reward model ({', '.join(config.architectures or ['unknown'])}); make one with "
                "`recipes fit -c reward/quickstart`"
            )
        if config.num_labels != 1:
            raise ValueError(f"{key} has {config.num_labels} labels; a reward model has one")

    def score(self, answers: Sequence[Answer]) -> list[float]:
        import torch

        if self._tokenizer is None:
            raise ValueError("bind(tokenizer) has not been called")
        model = self._opened()
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        ids = each(self._encoded, answers)
        for answer, tokens in zip(answers, ids, strict=True):
            if positions is not None and len(tokens) > positions:
                raise RowError(
                    answer.row,
                    f"{len(tokens)} tokens, more than the reward model's {positions} positions",
                )
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        scores = [0.0] * len(ids)
        device = torch.device(self.device).type
        with torch.no_grad(), torch.autocast(device, enabled=False):  # not in the precision of the run that asks
            for start in range(0, len(order), self.batch_size):
                part = order[start : start + self.batch_size]
                for place, score in zip(part, self._scores(model, [ids[i] for i in part]), strict=True):
                    scores[place] = score
        return scores

    def _encoded(self, answer: Answer) -> list[int]:
        """The conversation's ids."""
        prompt = answer.prompt
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        assert self._tokenizer is not None
        talk = [*messages, {"role": "assistant", "content": answer.text}]
        return encode_conversation(self._tokenizer, talk, answer.fields.get("tools") or None)

    def _scores(self, model: Any, ids: list[list[int]]) -> list[float]:
        """Of rows padded on the right. A classifier finds a row's end as the last id that is not the padding's, so the
        padding is an id that ends no row: an end-of-text token that serves as padding, too, would be passed over."""
        import torch

        longest, ends = max(map(len, ids)), {tokens[-1] for tokens in ids}
        padding = next(i for i in range(len(ends) + 1) if i not in ends)
        model.config.get_text_config().pad_token_id = model.config.pad_token_id = padding
        rows = torch.tensor([tokens + [padding] * (longest - len(tokens)) for tokens in ids], device=self.device)
        lengths = torch.tensor([len(tokens) for tokens in ids], device=self.device)
        mask = (torch.arange(longest, device=self.device)[None] < lengths[:, None]).long()
        logits = model(input_ids=rows, attention_mask=mask, use_cache=False).logits
        return logits.squeeze(-1).float().tolist()

    def _opened(self) -> Any:
        """The model, on ``device``."""
        if self._model is None:
            import torch
            from transformers import AutoModelForSequenceClassification

            dtype = "auto" if self.dtype == "auto" else getattr(torch, self.dtype)
            self._model = AutoModelForSequenceClassification.from_pretrained(
                self.source, dtype=dtype, use_safetensors=True
            ).eval()
            self._model.requires_grad_(False)
        return self._model.to(self.device)
