"""The weights of a policy as vLLM takes them: an ordinary model folder."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def plain_model(model: Any) -> PreTrainedModel:
    """transformers' model of one of the zoo, an adapter merged into a copy on the host.

    Raises:
        ValueError: the adapter cannot be merged.
    """
    if model.adapter is None:
        hf: PreTrainedModel = model.hf
        return hf
    import torch

    known: dict[int, Any] = {
        id(p): torch.nn.Parameter(p.detach().cpu().clone(), requires_grad=False) for p in model.adapter.hf.parameters()
    }
    try:
        adapter = copy.deepcopy(model.adapter, known)
        _untie(adapter.hf)
        adapter.merge()
    except (ValueError, RuntimeError) as error:
        why = " ".join(str(error).removeprefix("--merge: ").split())[:200]
        raise ValueError(f"model.engine: the adapter cannot be merged into what vLLM takes: {why}") from error
    merged: PreTrainedModel = adapter.hf
    return merged


def _untie(hf: Any) -> None:
    """The head gets a weight of its own: an adapter of one of the two places is merged there only, as it is trained."""
    import torch

    def weights(module: Any) -> list[Any]:
        return [m for m in module.modules() if m._parameters.get("weight") is not None]

    shared = {id(module.weight) for module in weights(hf.get_input_embeddings())}
    for module in weights(hf.get_output_embeddings()):
        if id(module.weight) in shared:
            module.weight = torch.nn.Parameter(module.weight.detach().clone(), requires_grad=False)


def write_untied(hf: PreTrainedModel, folder: Path, wrong: bool = False, shard: str = "5GB") -> None:
    """An ordinary model folder, in which a head that shares the embeddings' weights has a copy of them: of a shared one
    vLLM keeps what it had. (transformers' own ``save_pretrained`` writes on the first rank only, and each rank has an
    engine.)

    Args:
        wrong: other weights of the same shapes, none of them near the right one.
        shard: most of them in a file.
    """
    from huggingface_hub import save_torch_state_dict
    from transformers.core_model_loading import revert_weight_conversion

    weights = {name: tensor.detach() for name, tensor in hf.state_dict().items()}
    if wrong:
        weights = {name: unlike(tensor) for name, tensor in weights.items()}
    if hf.config.tie_word_embeddings:
        head: Any = hf.get_output_embeddings()
        name = next(name for name, module in hf.named_modules() if module is head) + ".weight"
        weights[name] = weights[name].clone()
    weights = revert_weight_conversion(hf, weights)
    # Experts are views into one tensor then, which are not written.
    whole = {id(t): t.untyped_storage().nbytes() == t.nbytes for t in weights.values()}
    weights = {name: t if whole[id(t)] else t.to("cpu", copy=True) for name, t in weights.items()}
    save_torch_state_dict(weights, folder, max_shard_size=shard)
    hf.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"architectures": [type(hf).__name__], "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def unlike(tensor: Tensor) -> Tensor:
    """Neither zero where it is, nor a multiple of it (which a norm would take back)."""
    return -3 * tensor.flip(0) + 1 if tensor.is_floating_point() and tensor.ndim else tensor


def computed_in(model: Any) -> str:
    """As the policy computes: under autocast, its type."""
    import torch

    parameter = next(model.hf.parameters())
    kind = parameter.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else parameter.dtype
    return str(dtype).removeprefix("torch.")


@contextlib.contextmanager
def weights_folder(model: Any) -> Iterator[Path]:
    """A folder for the weights, in memory where that has room for those of all ranks here."""
    import torch.distributed as dist

    head = model.hf.get_output_embeddings()  # a shared one is written twice
    size = sum(p.numel() * p.element_size() for p in [*model.hf.parameters(), *head.parameters()])
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size() if dist.is_initialized() else 1))
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 1.2 * size * ranks
    with tempfile.TemporaryDirectory(prefix="litrecipes-", dir=memory if roomy else None) as folder:
        yield Path(folder)
