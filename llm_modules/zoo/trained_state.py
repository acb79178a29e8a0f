"""A model whose state dict is what is trained of it: with an adapter, a few MB instead of the base."""

from __future__ import annotations

from typing import Any

from torch import nn


def keep_trained_only(model: nn.Module) -> None:
    """From now on ``state_dict`` holds the trainable parameters alone; ``load_state_dict`` wants these and no others.

    Works for whoever calls them (Lightning, DDP, sharded strategies), with any prefix. FSDP1 insists on finding every
    parameter: while ``model.whole_state`` is set, nothing is left out.
    """
    trained = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    kept = {name for name in model.state_dict() if name in trained}  # shared ones: as state_dict names them
    prefixes: list[str] = []
    switch: Any = model
    switch.whole_state = False

    def leave_out(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        if switch.whole_state:
            return
        for name in [name for name in state if name.startswith(prefix) and _own(name[len(prefix) :]) not in kept]:
            del state[name]

    def note_prefix(module: nn.Module, state: Any, prefix: str, *others: Any) -> None:
        prefixes.append(prefix)

    def excuse(module: nn.Module, result: Any) -> None:
        prefix = prefixes.pop()
        result.missing_keys[:] = [
            name for name in result.missing_keys if not name.startswith(prefix) or _own(name[len(prefix) :]) in kept
        ]

    model.register_state_dict_post_hook(leave_out)
    model.register_load_state_dict_pre_hook(note_prefix)
    model.register_load_state_dict_post_hook(excuse)


def _own(name: str) -> str:
    """A name without what wrappers (FSDP1, checkpointed or compiled modules) put into it."""
    for wrapper in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod."):
        name = name.replace(wrapper, "")
    return name
