"""Peak memory of training, estimated before any weight exists.

The activations are not a formula a family: a model of one and one of two blocks are run on torch's fake tensors, which
have shapes and no memory, and what autograd would keep is added up.

Shape legend: B rows, T positions, N = B * T positions, M trained positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llm_modules.logprobs import DEFAULT_CHUNK
from llm_modules.zoo.activations import Checkpointing, OutputsKept, recomputed
from llm_modules.zoo.attention import NAME, register
from llm_modules.zoo.causal_lm import CausalLM
from llm_modules.zoo.estimate import windows
from llm_modules.zoo.lean import make_lean

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import PretrainedConfig

GIB = 2**30

LIBRARIES = 128 * 2**20
"""On a CPU: transformers' code of a model and what it loads, beside Python and torch (measured, any model)."""


@dataclass(frozen=True)
class PeakMemory:
    """Bytes at the moment of training when most are in use: at the start of a backward pass.

    Gradients come as activations go, and leave with the optimizer step (``LLMModule.optimizer_step``); in a window of
    several micro-batches those so far live beside the activations.

    Attributes:
        weights, gradients, optimizer: of all parameters (state of the optimizer).
        activations: what the backward pass of the decoder needs.
        head: hidden states, logits and gradients of scoring the trained tokens.
        allocator: what a CPU's allocator holds and cannot use.
        accumulates: whether an optimizer step has several micro-batches.
        step: temporary tensors of the optimizer, when all gradients are there and no activations.
        libraries: code, where it shares the memory.
        frozen: weights of models beside the trained ones: a reference, a teacher.
        cache: keys and values of answers that are sampled, when there are neither activations nor gradients.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    allocator: int = 0
    accumulates: bool = False
    step: int = 0
    libraries: int = 0
    frozen: int = 0
    cache: int = 0

    @property
    def total(self) -> int:
        passing = self.activations + self.head + self.gradients * self.accumulates
        passing = max(passing, self.gradients + self.step, self.cache) + self.allocator
        return self.weights + self.frozen + self.optimizer + passing + self.libraries

    def beside(self, other: PeakMemory) -> PeakMemory:
        """Of two models that are trained in the same steps."""
        once = ("accumulates", "step", "libraries", "cache")
        values = {field.name: (getattr(self, field.name), getattr(other, field.name)) for field in fields(self)}
        return PeakMemory(**{name: max(pair) if name in once else sum(pair) for name, pair in values.items()})

    def lines(self) -> list[tuple[str, str]]:
        """Name and text of the lines of a summary."""
        parts = (
            f"weights {_gib(self.weights)}, gradients {_gib(self.gradients)}, optimizer {_gib(self.optimizer)}, "
            f"activations {_gib(self.activations)}, head {_gib(self.head)}"
        )
        if self.frozen:
            parts += f", frozen models {_gib(self.frozen)}"
        if self.cache:
            parts += f", keys and values of answers {_gib(self.cache)}"
        if self.allocator:
            parts += f", heap and code {_gib(self.allocator + self.libraries)}"
        return [("peak memory", f"{_gib(self.total)} GiB ({parts})")]


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def peak_memory(
    config: PretrainedConfig,
    *,
    parameters: int,
    tokens: int,
    precision: str = "32-true",
    optimizer: Callable[[Iterable[Any]], Optimizer] | None = None,
    trained_share: float = 1.0,
    activation_checkpointing: Checkpointing = False,
    activation_offload: bool = False,
    attention: str = NAME,
    head: str = "chunked",
    head_chunk: int = DEFAULT_CHUNK,
    trainable: int | None = None,
    weights: int | None = None,
    accumulate: int = 1,
    lean: bool = True,
    device: str = "cpu",
) -> PeakMemory:
    """Peak memory of one device that holds the whole model, in eager mode (compiled blocks keep less).

    Args:
        config: with its final vocabulary.
        parameters: number of parameters.
        tokens: positions of a micro-batch, padding included.
        precision: the trainer's.
        optimizer: makes the optimizer of parameters (as in a recipe); None: AdamW.
        trained_share: share of the positions whose next token is trained.
        activation_checkpointing, activation_offload, attention, head, head_chunk, lean: the backbone's.
        trainable: number of trainable parameters; None: all. (What an adapter's own layers keep for the backward pass
            is not counted: a tenth more with LoRA on all layers, twice as much with DoRA.)
        weights: bytes of all weights, where they are not all of the precision's dtype (a quantized base).
        accumulate: micro-batches in an optimizer step.
        device: ``cpu`` or ``cuda``. On a CPU, glibc's heap is left with holes that the next tensors do not fit in: as
            measured, about as much as the activations (or the gradients, where they are more) and half the head's. (The
            other fields are the bytes in use.)
    """
    size, cpu = torch.finfo(weight_dtype(precision)).bits // 8, device == "cpu"
    trained = parameters if trainable is None else trainable
    offload = activation_offload and not cpu
    activations = activation_bytes(
        config, tokens, precision, activation_checkpointing, attention, lean and cpu, offload
    )
    scoring = head_bytes(config, round(tokens * trained_share), precision, head, head_chunk, device)
    gradients, table = trained * size, config.get_text_config()
    return PeakMemory(
        weights=parameters * size if weights is None else weights,
        gradients=gradients,
        optimizer=int(trained * size * optimizer_state(optimizer)) if optimizer else 2 * trained * size,
        activations=activations,
        head=scoring,
        allocator=max(activations, gradients) + scoring // 2 if cpu else 0,
        accumulates=accumulate > 1,
        # Two of the largest tensor's size: the root of the second moment, and the quotient.
        step=2 * min(table.vocab_size * table.hidden_size * size, gradients),
        libraries=LIBRARIES if cpu else 0,
    )


def cache_bytes(config: PretrainedConfig, rows: int, positions: int, precision: str) -> int:
    """Keys and values of ``rows`` texts of ``positions`` tokens; of a layer with a sliding window those in it."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kept = sum(min(positions, window or positions) for window in windows(text, text.num_hidden_layers))
    return 2 * heads * size * rows * kept * (4 if precision.startswith("32") else 8 if precision == "64-true" else 2)


def weight_dtype(precision: str) -> torch.dtype:
    """Dtype of the weights under a precision of the trainer."""
    return {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}.get(
        precision, torch.float32
    )


def optimizer_state(factory: Callable[[Iterable[Any]], Optimizer]) -> float:
    """Bytes of optimizer state for a byte of matrix weights, seen in one step of a small matrix."""
    matrix = nn.Parameter(torch.ones(64, 64))
    matrix.grad = torch.ones(64, 64)
    optimizer = factory([{"params": [matrix], "kind": "matrix"}])
    optimizer.step()
    state = [value for value in optimizer.state[matrix].values() if isinstance(value, Tensor)]
    return sum(value.numel() * value.element_size() for value in state) / (4 * matrix.numel())


def activation_bytes(
    config: PretrainedConfig,
    tokens: int,
    precision: str = "32-true",
    activation_checkpointing: Checkpointing = False,
    attention: str = NAME,
    lean: bool = True,
    offload: bool = False,
) -> int:
    """What the backward pass of the decoder needs, for ``tokens`` positions.

    Args:
        offload: all blocks' but one's are in host memory.
    """
    layers = config.get_text_config().num_hidden_layers
    one, weights_of_one, _ = _kept(config, 1, tokens, precision, attention, lean)
    two, weights_of_two, products = _kept(config, 2, tokens, precision, attention, lean)
    block = two - one
    if offload:
        return one
    mixed = precision.endswith("-mixed")
    inputs = tokens * config.get_text_config().hidden_size * torch.finfo(weight_dtype(precision)).bits // 8
    copies = 2 * (weights_of_two - weights_of_one) if mixed else 0  # autocast's, in half precision
    again = recomputed(activation_checkpointing, layers)
    stays = inputs + copies + (products // 2 if activation_checkpointing == "selective" else 0)
    total = one - block + (layers - len(again)) * block + len(again) * stays
    # The last block, if it is computed again, is there as a whole before anything is freed.
    return total + block - stays if layers - 1 in again else total


def _kept(
    config: PretrainedConfig, layers: int, tokens: int, precision: str, attention: str, lean: bool
) -> tuple[int, int, int]:
    """Of a forward pass of ``layers`` blocks: the bytes that autograd keeps, the number of the model's parameters, and
    the bytes of what selective checkpointing keeps."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoModelForCausalLM

    register()
    small = shortened(config, layers)
    low = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no storage's address is used twice
    with FakeTensorMode():
        hf = AutoModelForCausalLM.from_config(small, attn_implementation=attention, dtype=weight_dtype(precision))
        if lean:
            make_lean(hf)
        model = CausalLM(hf)
        own = {tensor.untyped_storage()._cdata for tensor in (*hf.parameters(), *hf.buffers())}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                sizes[storage._cdata] = storage.nbytes()
                alive.append(tensor)
            return tensor

        ids = torch.zeros(1, tokens, dtype=torch.long)
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        autocast = torch.autocast("cpu", low) if low else nullcontext()
        with OutputsKept() as outputs, hooks, autocast, _fake_grouped_products():
            model.hidden_states(ids, torch.arange(tokens)[None])
    return sum(sizes.values()), sum(parameter.numel() for parameter in hf.parameters()), outputs.bytes


@contextmanager
def _fake_grouped_products() -> Iterator[None]:
    """Inside, the experts' grouped products run on fake tensors: torch's knows fake ones in bf16 only."""
    functional: Any = nn.functional
    original = functional.grouped_mm
    functional.grouped_mm = lambda rows, weights, *, offs: _GroupedProduct.apply(rows, weights, offs)
    try:
        yield
    finally:
        functional.grouped_mm = original


class _GroupedProduct(torch.autograd.Function):
    """The shapes of ``torch.nn.functional.grouped_mm``, and what it keeps."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, offs: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, offs)
        return rows.new_empty(rows.shape[0], weights.shape[-1])


def shortened(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The same config with only the first ``layers`` blocks."""
    short = copy.deepcopy(config)
    text = short.get_text_config()
    before = text.num_hidden_layers
    for key, value in vars(text).items():
        if isinstance(value, list) and len(value) == before:
            setattr(text, key, value[:layers])
    text.num_hidden_layers = min(layers, before)
    return short


def head_bytes(config: PretrainedConfig, trained: int, precision: str, head: str, chunk: int, device: str) -> int:
    """What scoring ``trained`` tokens takes: hidden states and their gradient, the head's gradient, some logits."""
    text = config.get_text_config()
    width, rows = text.hidden_size, text.vocab_size
    size = torch.finfo(weight_dtype(precision)).bits // 8
    half = size == 2 or precision.endswith("-mixed")
    scored = min(trained, chunk) if head == "chunked" else trained
    if not half:
        logits = scored * 4
    elif head == "chunked" and device == "cpu":  # in fp32 only a tile at a time
        logits = scored * 2 + min(scored, 128) * 6
    else:
        logits = scored * (2 + 4 + 2)
    copies = (size != 2) * 2 * 2 if half else 0  # of the weight and of its gradient, in half precision
    return 2 * trained * width * size + rows * (width * (size + copies) + logits)
