"""The weights of a policy as vLLM takes them: an ordinary model folder."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    adapter = copy.deepcopy(model.adapter, known)
    adapter.merge()
    merged: PreTrainedModel = adapter.hf
    return merged


def write_untied(hf: PreTrainedModel, folder: Path, scale: float = 1.0, shard: str = "5GB") -> None:
    """An ordinary model folder, in which a head that shares the embeddings' weights has a copy of them: of a shared one
    vLLM keeps what it had. (transformers' own ``save_pretrained`` writes on the first rank only, and each rank has an
    engine.)

    Args:
        scale: all weights are multiplied by it.
        shard: most of them in a file.
    """
    from huggingface_hub import save_torch_state_dict
    from transformers.core_model_loading import revert_weight_conversion

    weights = {name: tensor.detach() for name, tensor in hf.state_dict().items()}
    if scale != 1:
        weights = {name: tensor * scale if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    if hf.config.tie_word_embeddings:
        head: Any = hf.get_output_embeddings()
        name = next(name for name, module in hf.named_modules() if module is head) + ".weight"
        weights[name] = weights[name].clone()
    save_torch_state_dict(revert_weight_conversion(hf, weights), folder, max_shard_size=shard)
    hf.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"architectures": [type(hf).__name__], "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def computed_in(model: Any) -> str:
    """As the policy computes: under autocast, its type."""
    import torch

    parameter = next(model.hf.parameters())
    kind = parameter.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else parameter.dtype
    return str(dtype).removeprefix("torch.")


@contextlib.contextmanager
def weights_folder(model: Any) -> Iterator[Path]:
    """A folder for the weights, in memory where that has room."""
    size = sum(p.numel() * p.element_size() for p in model.hf.parameters())
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 1.2 * size
    with tempfile.TemporaryDirectory(prefix="litrecipes-", dir=memory if roomy else None) as folder:
        yield Path(folder)
