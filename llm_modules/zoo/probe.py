"""What is proved of a model when it is built: that our head and our attention compute what the model itself does.

Shape legend: M positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llm_modules.zoo.attention import NAME
from llm_modules.zoo.configuration import SPECIAL_IDS

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from llm_modules.zoo.causal_lm import CausalLM

PROVED = frozenset({
    "cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "gpt2", "granite", "llama", "mistral", "mixtral", "olmo",
    "olmo2", "olmo3", "olmoe", "phi", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3", "starcoder2",
})  # fmt: skip
"""Families for which the tests prove packed attention; of others, a small copy is tried when the model is built."""

_DOCUMENTS = (3, 11, 1, 9)
"""Lengths of the documents of the trial, in tokens: longer than the trial's sliding window, and shorter."""

_WINDOW = 4


def check_head(model: CausalLM) -> None:
    """The model's own logits of random hidden states equal those of our head.

    Raises:
        ValueError: they do not: this family does something to its logits that ``head.head_transform`` does not know.
    """
    hf, output = model.hf, model.hf.get_output_embeddings()
    if output is None:
        raise ValueError(f"backbone: {type(hf).__name__} has no output head; it is not a causal language model")
    weight, bias = output.weight, getattr(output, "bias", None)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(4, weight.shape[1], generator=generator).to(weight)
        # Large logits, so that a soft-cap shows.
        hidden = hidden * (60 / nn.functional.linear(hidden, weight).abs().max().clamp(min=1e-6))
        with _stubbed_base(hf, hidden[None]):
            logits = hf(input_ids=torch.zeros(1, 4, dtype=torch.long, device=weight.device), use_cache=False).logits[0]
        ours = model.head.transform(nn.functional.linear(hidden, weight, bias))
    scale = logits.float().abs().max()
    if logits.shape != ours.shape or not (logits.float() - ours.float()).abs().max() <= 1e-2 * scale:
        raise ValueError(
            f"backbone: {type(hf).__name__} does something to its logits that our head does not know "
            "(llm_modules/zoo/head.py); training it would be silently wrong"
        )


def packing_problem(config: PretrainedConfig, attention: str) -> str | None:
    """Why packed documents of this family would see each other, or None.

    A copy of few layers is run with packed documents and with each by itself. (A family may not pass the documents'
    lengths on to its attention, or have layers that mix positions without attention.)

    Raises:
        ValueError: even rows by themselves are not computed as the family's own attention does.
    """
    if config.model_type in PROVED:
        return None
    if attention.startswith("flash"):  # cannot be tried on a CPU; it gets the same keyword arguments as ours
        attention = NAME
    reference, trial = _trial_model(config, "eager"), _trial_model(config, attention)
    trial.hf.load_state_dict(reference.hf.state_dict())
    ids = torch.arange(sum(_DOCUMENTS))[None] * 7 % 61 + 1
    ends = torch.tensor([0, *_DOCUMENTS]).cumsum(0).int()
    positions = torch.cat([torch.arange(n) for n in _DOCUMENTS])[None]
    with torch.no_grad():
        alone = _each_alone(reference, ids, positions, ends)
        if not _close(_each_alone(trial, ids, positions, ends), alone):
            raise ValueError(
                f"attention: {attention!r} does not compute what {config.model_type!r} does; set attention: eager"
            )
        try:
            packed = trial.hidden_states(ids, positions, ends, max(_DOCUMENTS))
        except (ValueError, RuntimeError, TypeError) as error:
            return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return None if _close(packed, alone) else "its layers let documents of one row see each other"


def slicing_problem(config: PretrainedConfig) -> str | None:
    """Why slices of a row cannot be computed on several devices that exchange keys and values, or None.

    In a small copy whose attention lets each position see nothing but itself, slices of a row must give what the whole
    row gives: nothing else may look at other positions (as convolutions and recurrent layers do), or at a position's
    place in the row instead of ``position_ids``.
    """
    return None if config.model_type in PROVED else try_slices(config)


def try_slices(config: PretrainedConfig) -> str | None:
    """See ``slicing_problem``; also tries families that the tests vouch for."""
    trial = _trial_model(config, NAME)
    trial.context = _Alone()  # type: ignore[assignment]
    ids = torch.arange(sum(_DOCUMENTS))[None] * 7 % 61 + 1
    positions = torch.arange(sum(_DOCUMENTS))[None]
    try:
        with torch.no_grad():
            whole = trial.hidden_states(ids, positions)
            slices = [
                trial.hidden_states(one, places)
                for one, places in zip(ids.chunk(2, 1), positions.chunk(2, 1), strict=True)
            ]
    except (ValueError, RuntimeError, TypeError) as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return None if _close(torch.cat(slices, 1), whole) else "its layers see other positions by more than attention"


def sharing_problem(config: PretrainedConfig) -> str | None:
    """Why two documents of this family cannot share what they begin with, or None; a small copy is tried."""
    return None if config.model_type in PROVED else try_sharing(config)


def try_sharing(config: PretrainedConfig) -> str | None:
    """See ``sharing_problem``; also tries families that the tests vouch for."""
    trial = _trial_model(config, NAME)
    shared, rests = 7, (9, 5)
    ids = torch.arange(shared + sum(rests))[None] * 7 % 61 + 1
    wholes = [torch.cat([torch.arange(shared), part]) for part in torch.arange(shared, ids.shape[1]).split(rests)]
    positions = torch.cat([torch.arange(shared), *(shared + torch.arange(n) for n in rests)])[None]
    ends = torch.tensor([0, shared, *rests]).cumsum(0).int()
    keys = {
        "shared_keys": torch.cat([torch.arange(shared), *wholes]),
        "cu_seq_lens_k": torch.tensor([0, shared, *(len(whole) for whole in wholes)]).cumsum(0).int(),
    }
    try:
        with torch.no_grad():
            once = trial._decode(ids, positions, ends, shared + max(rests), keys).last_hidden_state
            alone = [trial.hidden_states(ids[:, whole], positions[:, whole])[:, shared:] for whole in wholes]
    except (ValueError, RuntimeError, TypeError) as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    same = _close(once[:, shared:], torch.cat(alone, 1))
    return None if same else "its layers see other positions by more than attention"


class _Alone:
    """In the place of ``ContextParallel``: each position's attention is its own value."""

    def to_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.value = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
        return query, key, value

    def to_positions(self, heads: Tensor) -> Tensor:
        return self.value.transpose(1, 2)


def adapter_problem(
    config: PretrainedConfig, attention: str, adapter: dict[str, Any] | str, quantization: Any
) -> str | None:
    """Why a method of peft does not compute in our model what it does in peft's, or None; a small copy is tried."""
    from llm_modules.zoo.adapters import make_adapter
    from llm_modules.zoo.quantization import quantize

    trial = _trial_model(config, NAME if attention.startswith("flash") else attention)
    ids = torch.arange(sum(_DOCUMENTS))[None] * 7 % 61 + 1
    ends = torch.tensor([0, *_DOCUMENTS]).cumsum(0).int()
    positions = torch.cat([torch.arange(n) for n in _DOCUMENTS])[None]
    try:
        if quantization is not None:
            quantize(trial.hf, quantization, torch.float32)
        made = make_adapter(adapter, trial.hf, seed=0, dtype=torch.float32)
        trial.adapt(made, {})
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
            ours = _each_alone(trial, ids, positions, ends)
            theirs = [made.peft_model(input_ids=ids[:, a:b]).logits[:, a - b :] for a, b in pairwise(ends.tolist())]
            packed = trial.hidden_states(ids, positions, ends, max(_DOCUMENTS))
            head = trial.hf.get_output_embeddings()
            same = _close(trial.head.transform(head(ours)), torch.cat(theirs, 1))  # type: ignore[operator]
    except (ValueError, RuntimeError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if not same:
        return "it does more than put layers into the model"
    packs = config.model_type not in PROVED or _close(packed, ours)  # a family that does not pack is told of elsewhere
    return None if packs else "it lets documents of one row see each other"


def _each_alone(model: CausalLM, ids: Tensor, positions: Tensor, ends: Tensor) -> Tensor:
    return torch.cat([model.hidden_states(ids[:, a:b], positions[:, a:b]) for a, b in pairwise(ends.tolist())], 1)


def _close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-3 * other.abs().max())


def _trial_model(config: PretrainedConfig, attention: str) -> CausalLM:
    """A model of the same family and width, of few layers, few tokens and a short window, with lively weights."""
    from transformers import AutoModelForCausalLM

    from llm_modules.zoo.causal_lm import CausalLM
    from llm_modules.zoo.weights import fixed_seed

    small = copy.deepcopy(config)
    text = small.get_text_config()
    kinds = getattr(text, "layer_types", None) or []
    before, layers = text.num_hidden_layers, max([2, *(kinds.index(kind) + 1 for kind in set(kinds))])
    for key, value in vars(text).items():
        if isinstance(value, list) and len(value) == before:
            setattr(text, key, value[:layers])
    text.num_hidden_layers, text.vocab_size = min(layers, before), 64
    for key in SPECIAL_IDS:
        setattr(text, key, None)
    if getattr(text, "sliding_window", None):
        text.sliding_window = _WINDOW
    with fixed_seed(0):
        try:
            hf = AutoModelForCausalLM.from_config(small, attn_implementation=attention, dtype=torch.float32)
        except (ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
            raise ValueError(
                f"attention: {attention!r} does not work for {config.model_type!r} ({type(error).__name__}: "
                f"{(str(error).splitlines() or [''])[0]}); set attention: eager"
            ) from error
        for parameter in hf.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return CausalLM(hf.eval())


@contextmanager
def _stubbed_base(hf: PreTrainedModel, hidden: Tensor) -> Iterator[None]:
    """Inside, the base model says ``hidden`` whatever it is asked."""
    base = hf.base_model
    base.forward = lambda *args, **kwargs: _Hidden(hidden)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del base.forward


class _Hidden:
    """A base model's output that has nothing but hidden states."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, index: Any) -> Any:
        return self.last_hidden_state if index == 0 else ()
