"""A model's first weights: random from a seed, or read from safetensors; the same under every strategy and rank."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)


@contextmanager
def fixed_seed(seed: int) -> Iterator[None]:
    """Inside, tensors are made on the CPU in fp32 from ``seed`` alone; the global random state is left as it was.

    A Trainer calls ``configure_model`` under another default device and dtype for each strategy and precision.
    """
    state, dtype = torch.get_rng_state(), torch.get_default_dtype()
    torch.default_generator.manual_seed(seed)
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_rng_state(state)


def random_model(
    config: PretrainedConfig, *, dtype: torch.dtype, attention: str, seed: int, trust_remote_code: bool
) -> PreTrainedModel:
    """The family's own initialization, made in fp32 on the CPU, then rounded to ``dtype``.

    Raises:
        ValueError: the attention is not installed, or the family does not have it.
    """
    from transformers import AutoModelForCausalLM

    with fixed_seed(seed):
        try:
            hf = AutoModelForCausalLM.from_config(
                config, attn_implementation=attention, dtype=torch.float32, trust_remote_code=trust_remote_code
            )
        except ImportError as error:
            raise ValueError(f"backbone.attention: {attention!r}: {str(error).strip().splitlines()[0]}") from error
    if dtype != torch.float32:
        cast_parameters(hf, dtype)
    return hf


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """Weights to ``dtype``; buffers stay: rotary frequencies in bf16 would put tokens at wrong positions."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    if hasattr(module, "config"):
        module.config.dtype = dtype  # type: ignore[assignment]


@torch.no_grad()
def weights_digest(hf: nn.Module) -> str:
    """A short digest of all weights: names, shapes, dtypes, the sum of all bits, and some values spread over each.

    It tells one base from another, at the speed of memory; it is not meant against somebody who wants it to be equal.
    """
    digest = hashlib.blake2b(digest_size=12)
    for name, parameter in sorted(hf.named_parameters()):
        flat = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8)
        flat = flat.clone() if flat.storage_offset() % 8 else flat
        whole = len(flat) // 8 * 8
        words, rest = flat[:whole].view(torch.int64), flat[whole:].tolist()
        some = words[:: max(1, len(words) // 256)].tolist()
        about = (name, tuple(parameter.shape), str(parameter.dtype), int(words.sum()), some, rest)
        digest.update(repr(about).encode())
    return digest.hexdigest()


@contextmanager
def _without_report() -> Iterator[None]:
    """Inside, transformers does not tell of missing weights."""
    from transformers.utils import logging as theirs

    before = theirs.get_verbosity()
    theirs.set_verbosity_error()
    try:
        yield
    finally:
        theirs.set_verbosity(before)


def pretrained_model(
    source: str,
    config: PretrainedConfig,
    *,
    dtype: torch.dtype,
    attention: str,
    seed: int,
    trust_remote_code: bool,
    headless: bool = False,
) -> PreTrainedModel:
    """The weights of a folder or hub id, in ``dtype`` on the CPU.

    Args:
        headless: the head may be missing (it is not used).

    Raises:
        ValueError: no safetensors, or weights that are missing or of another shape.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    load: Any = AutoModelForCausalLM.from_pretrained
    with fixed_seed(seed), _without_report() if headless else nullcontext():
        try:
            hf, report = load(
                source,
                config=config,
                dtype=dtype,
                attn_implementation=attention,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
        except ImportError as error:
            raise ValueError(f"backbone.attention: {attention!r}: {str(error).strip().splitlines()[0]}") from error
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"backbone.source: cannot load weights of {source!r}: {reason}") from error
    heads = [f"{name}." for name, module in hf.named_modules() if headless and module is hf.get_output_embeddings()]
    if missing := sorted(name for name in report["missing_keys"] if not name.startswith(tuple(heads))):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(f"backbone.source: {source!r} lacks weights: {', '.join(missing[:3])}{more}")
    return hf
