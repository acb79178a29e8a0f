"""Adapters in a model: peft's, and bottlenecks; what of them is trained, kept, saved and merged.

peft puts its layers into transformers' model in place, so that the model stays what it is for attention, generation and
export; what peft's own forward does beyond that (AdaLoRA's penalty, virtual tokens) is done here.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llm_modules.zoo import adalora, bottleneck
from llm_modules.zoo.adapter_config import (
    LIBRARY_ERRORS,
    adapter_config,
    changes_base,
    kind_of,
    name_targets,
    one_line,
    unmergeable,
    virtual_tokens,
)
from llm_modules.zoo.weights import fixed_seed

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_NAME = "default"
"""peft's name of the adapter: it is written without a folder of its own."""


class Adapter:
    """An adapter that is in a model.

    Args:
        hf: gets the adapter's layers, in place; all else is frozen.
        config: of peft or ours.
        seed: of the adapter's first weights.
        dtype: of the trained weights.

    Attributes:
        config: of peft or ours.
        kind: peft's name of the method, or ``BOTTLENECK``.
        peft_model: peft's model around ``hf``; None for a bottleneck.

    Raises:
        ValueError: the method does not go with the model.
    """

    def __init__(self, hf: PreTrainedModel, config: Any, *, seed: int, dtype: torch.dtype) -> None:
        self.hf, self.config, self.kind = hf, config, kind_of(config)
        self.peft_model: Any = None
        self._first: dict[str, Tensor] = {}
        with fixed_seed(seed), _quiet():
            if isinstance(config, bottleneck.BottleneckConfig):
                bottleneck.insert(hf, config)
            else:
                self.peft_model = _peft_model(hf, config)
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype)
        if changes_base(config):
            self._first = {name: p.detach().clone() for name, p in hf.named_parameters() if ".lora_" in name}

    def parameters(self) -> list[nn.Parameter]:
        """What is trained, each once."""
        encoder = self.prompt_encoder
        modules = [self.hf] if encoder is None else [self.hf, encoder]
        found = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
        return list(found.values())

    @property
    def prompt_encoder(self) -> Any:
        """What makes the virtual tokens; None for methods without."""
        return self.peft_model.prompt_encoder[_NAME] if virtual_tokens(self.config) else None

    @property
    def description(self) -> dict[str, Any]:
        """The arguments that decide what the trained weights mean."""
        skipped = {
            "base_model_name_or_path",
            "inference_mode",
            "peft_version",
            "revision",
            "auto_mapping",
            "total_step",
        }
        skipped |= {"rank_pattern"} if self.kind == "ADALORA" else set()
        values = {key: value for key, value in self.config.to_dict().items() if key not in skipped}
        return {key: _plain(value) for key, value in values.items()}

    @property
    def recipe(self) -> dict[str, Any]:
        """What a recipe would say of it: ``class_path`` and ``init_args``."""
        kind = type(self.config)
        skipped = {"peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
        fields = {field.name for field in dataclasses.fields(kind) if field.init} - skipped
        values = {key: _plain(value) for key, value in self.config.to_dict().items() if key in fields}
        values = {key: value for key, value in values.items() if value is not None}
        return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": values}

    # --- training

    @property
    def prunes(self) -> bool:
        """Whether ``begin`` must be told the run's length."""
        return self.kind == "ADALORA"

    def penalty(self) -> Tensor | None:
        """AdaLoRA's orthogonality term (arXiv 2303.10512, equation 4), once per optimizer step; None for others."""
        if self.kind != "ADALORA" or not self.config.orth_reg_weight:
            return None
        return self.config.orth_reg_weight * adalora.orthogonality(adalora.penalized(self.hf))

    def with_penalty(self, closure: Callable[[], Any], precision: Any) -> Callable[[], Any]:
        """The backward passes of an optimizer step, and after them the gradient of the penalty, once.

        Args:
            closure: the backward passes.
            precision: the trainer's plugin: in 16-mixed the gradients are scaled.
        """
        if self.kind != "ADALORA" or not self.config.orth_reg_weight:
            return closure

        def both() -> Any:
            result, scaler = closure(), getattr(precision, "scaler", None)
            scale = 1.0 if scaler is None else scaler.get_scale()
            adalora.add_penalty(self.hf, scale * self.config.orth_reg_weight)
            return result

        return both

    def begin(self, steps: int, *, flat: bool = False) -> None:
        """Tell AdaLoRA the run's length in optimizer steps, and whether the strategy hands out flat pieces of weights.

        Raises:
            ValueError: its phases do not fit in, or it would see pieces of the gradients.
        """
        if self.kind != "ADALORA":
            return
        if flat:
            raise ValueError(
                "backbone.adapter: AdaLoRA prunes by whole weights and gradients, and this strategy hands out flat "
                "pieces of them; use strategies/fsdp2 or ddp, or adapters/lora"
            )
        if self.config.tinit + self.config.tfinal >= steps:
            raise ValueError(
                f"backbone.adapter: tinit {self.config.tinit} and tfinal {self.config.tfinal} leave none of the run's "
                f"{steps} steps for pruning; lower them"
            )
        self.peft_model.base_model.rankallocator.set_total_step(steps)

    def after_step(self, step: int) -> None:
        """Let AdaLoRA prune, after the optimizer's step and before its gradients are freed. ``step`` counts from 0."""
        if self.kind == "ADALORA":
            adalora.prune(self.peft_model, step)

    # --- checkpoints

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold beside the trained weights."""
        if self.kind == "ADALORA":
            allocator = self.peft_model.base_model.rankallocator
            tables = {name: dict(getattr(allocator, name)) for name in ("ipt", "exp_avg_ipt", "exp_avg_unc")}
            return {"tables": tables, "rank_pattern": self.config.rank_pattern}
        return {"first": self._first} if self._first else {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what ``state`` gave."""
        if self.kind == "ADALORA":
            places = {name: p.device for name, p in self.hf.named_parameters()}
            for table, values in state["tables"].items():
                moved = {name: value.to(places[name]) for name, value in values.items()}
                setattr(self.peft_model.base_model.rankallocator, table, moved)
            self.config.rank_pattern = state["rank_pattern"]
        elif self._first:
            self._restore_base(state["first"])

    @torch.no_grad()
    def _restore_base(self, first: dict[str, Tensor]) -> None:
        """The same rest of the base's weights as where the checkpoint was made, whatever this machine decomposes."""
        for name, a_now in self._first.items():
            name_b = name.replace(".lora_A.", ".lora_B.")
            if ".lora_A." not in name:
                continue
            b_now, a_then, b_then = self._first[name_b], first[name], first[name_b]
            if torch.equal(a_now, a_then) and torch.equal(b_now, b_then):
                continue
            layer: Any = self.hf.get_submodule(name.split(".lora_A.")[0])
            change = b_now.double() @ a_now.double() - b_then.double() @ a_then.double()
            change = change * layer.scaling[_NAME]
            weight = layer.get_base_layer().weight
            change = change.T if layer.fan_in_fan_out else change
            if weight.shape != change.shape:
                raise ValueError(
                    "ckpt_path: the base was decomposed otherwise where the checkpoint was made, and this strategy "
                    "hands out flat pieces of it; resume with strategies/fsdp2 or ddp"
                )
            change = adalora.part_of(change.to(weight.device), weight)
            weight.data.copy_((weight.data.double() + change).to(weight.dtype))
        self._first = {name: value.clone() for name, value in first.items()}

    # --- folders

    def save(self, folder: Path, base: str | None) -> None:
        """Write ``adapter_config.json`` and ``adapter_model.safetensors`` as peft reads them.

        A LoRA that changed the base (PiSSA, OLoRA) is written as the LoRA of twice the rank that gives the same model
        on the unchanged base.

        Args:
            base: folder or hub id of the base's weights.
        """
        config = self.config
        config.base_model_name_or_path = base
        if isinstance(config, bottleneck.BottleneckConfig):
            bottleneck.save(self.hf, config, folder)
            return
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        config = copy.deepcopy(config)
        with self._whole_ranks():
            state = get_peft_model_state_dict(self.peft_model, adapter_name=_NAME, save_embedding_layers=False)
        if self._first:
            state = self._on_the_unchanged_base(state, config)
        if self.kind == "ADALORA":
            config.rank_pattern = None
        config.inference_mode = True
        folder.mkdir(parents=True, exist_ok=True)
        whole = {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}
        save_file(whole, folder / bottleneck.WEIGHTS_FILE, metadata={"format": "pt"})
        config.save_pretrained(str(folder))

    @contextlib.contextmanager
    def _whole_ranks(self) -> Iterator[None]:
        """AdaLoRA would cut by its last pattern; between two prunings the ranks it names have weights again."""
        pattern = getattr(self.config, "rank_pattern", None)
        if self.kind == "ADALORA":
            self.config.rank_pattern = None
        try:
            yield
        finally:
            if self.kind == "ADALORA":
                self.config.rank_pattern = pattern

    def _on_the_unchanged_base(self, state: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
        """``W - B0 A0 + B A`` is ``W + [B, -B0] [A; A0]`` (docs of peft's ``subtract_mutated_init``)."""
        if config.use_rslora and (config.rank_pattern or config.alpha_pattern):
            raise ValueError(
                "backbone.adapter: use_rslora with rank_pattern or alpha_pattern cannot leave PiSSA or OLoRA"
            )
        double = dict(state)
        for name, value in state.items():
            first = self._first.get(_in_model(name))
            if first is None:
                continue
            first = first.to(value)
            double[name] = torch.cat([value, first]) if ".lora_A." in name else torch.cat([value, -first], dim=1)
        config.init_lora_weights = True
        config.r *= 2
        config.lora_alpha *= 2**0.5 if config.use_rslora else 2
        config.rank_pattern = {key: 2 * value for key, value in config.rank_pattern.items()}
        config.alpha_pattern = {key: 2 * value for key, value in config.alpha_pattern.items()}
        return double

    def load(self, folder: Path) -> None:
        """Take the weights of a folder that ``save`` or peft wrote.

        Raises:
            ValueError: weights of another shape or layout.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            state = load_file(folder / bottleneck.WEIGHTS_FILE)
            if self.peft_model is None:
                self.hf.load_state_dict(state, strict=False)
                missing = sorted(bottleneck.adapter_state(self.hf).keys() ^ state.keys())
            else:
                from peft import get_peft_model_state_dict, set_peft_model_state_dict

                with _quiet():
                    set_peft_model_state_dict(self.peft_model, state, adapter_name=_NAME)
                    own = get_peft_model_state_dict(self.peft_model, adapter_name=_NAME, save_embedding_layers=False)
                missing = sorted(own.keys() - state.keys())
        except (*LIBRARY_ERRORS, SafetensorError) as error:
            raise ValueError(f"backbone.adapter: {str(folder)!r} does not fit this base: {one_line(error)}") from error
        if missing:
            raise ValueError(f"backbone.adapter: {str(folder)!r} is of another layout; it differs in {missing[0]}")

    def merge(self) -> None:
        """Put what was learnt into the base's weights, in place; the model is an ordinary one again.

        Raises:
            ValueError: the method cannot be merged.
        """
        if (reason := unmergeable(self.config)) is None:
            try:
                with _quiet():
                    self.peft_model.merge_and_unload()
            except LIBRARY_ERRORS as error:
                reason = one_line(error)
        if reason is not None:
            raise ValueError(f"--merge: {type(self.config).__name__} cannot be merged: {reason}; export without it")
        for flag in {"peft_config", "peft_type"} & vars(self.hf).keys():
            delattr(self.hf, flag)


def check_adapter(given: dict[str, Any] | str, config: PretrainedConfig, quantized: bool) -> tuple[int, int]:
    """Try an adapter on a model without memory.

    Returns:
        Number of all and of trained parameters.

    Raises:
        ValueError: one line: what is wrong, and what is allowed.
    """
    from llm_modules.zoo.estimate import meta_model, parameter_count

    wanted: Any = adapter_config(given)
    hf = meta_model(config)
    name_targets(wanted, hf)
    if changes_base(wanted):
        if quantized:
            raise ValueError(
                f"backbone.adapter: init_lora_weights {wanted.init_lora_weights!r} changes the base's weights, which "
                "backbone.quantization rounds; leave one out"
            )
        wanted.init_lora_weights = True  # decomposes weights, which there are none of
    adapter = Adapter(hf, wanted, seed=0, dtype=torch.float32)
    trained = adapter.parameters()
    if not trained:
        raise ValueError(f"backbone.adapter: {type(wanted).__name__} with these arguments trains nothing")
    count = parameter_count(hf)
    if adapter.prompt_encoder is not None:
        count += parameter_count(adapter.prompt_encoder)
    return count, sum(p.numel() for p in trained)


def make_adapter(given: dict[str, Any] | str, hf: PreTrainedModel, *, seed: int, dtype: torch.dtype) -> Adapter:
    """The adapter of a recipe, in ``hf``; with the weights of the folder, where it is one.

    Raises:
        ValueError: it does not go with the model.
    """
    config = adapter_config(given)
    name_targets(config, hf)
    adapter = Adapter(hf, config, seed=seed, dtype=dtype)
    if isinstance(given, str) and Path(given).expanduser().is_dir():
        adapter.load(Path(given).expanduser())
    return adapter


def _peft_model(hf: PreTrainedModel, config: Any) -> Any:
    from peft import get_peft_model

    for parameter in hf.parameters():
        parameter.requires_grad_(False)
    try:
        return get_peft_model(hf, config, adapter_name=_NAME)
    except LIBRARY_ERRORS as error:
        stacked = ", ".join(sorted(getattr(config, "target_parameters", None) or ()))
        rule = "peft adapts stacked experts by plain LoRA only, without dropout"
        hint = f" ({stacked}: {rule})" if stacked else ""
        raise ValueError(f"backbone.adapter: {type(config).__name__}: {one_line(error)}{hint}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """peft's advice is for people who call it themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _in_model(name: str) -> str:
    """A weight's name in the model, from that in peft's file."""
    return name.removeprefix("base_model.model.").replace(".weight", f".{_NAME}.weight")


def _plain(value: Any) -> Any:
    """Plain and in a fixed order: peft keeps names in sets."""
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    value = getattr(value, "value", value)
    return value if isinstance(value, bool | int | float | str | type(None)) else str(value)
