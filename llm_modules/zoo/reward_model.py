"""A decoder that says one number of a text: reward and cost models (saved, ``...ForSequenceClassification``).

Shape legend: B rows, T positions, A answers, H hidden size.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llm_modules.zoo.causal_lm import CausalLM
from llm_modules.zoo.configuration import local_folder
from llm_modules.zoo.estimate import meta_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from llm_modules.zoo.adapters import Adapter

SCORE = "score.weight"
"""What transformers calls the head."""


class RewardModel(CausalLM):
    """A language model whose head is one row: its "logit" at the last token of a text is the text's score.

    Everything that is built around a language model (strategies, checkpoints, attention of packed rows) finds the head
    where it looks for the vocabulary's.

    Args:
        hf: transformers' ``...ForCausalLM``; its head is replaced.
        score: (1, H) the head's weight; None: normal, of spread 1 / sqrt(H + 1) (arXiv 2009.01325, appendix B).
        packing_problem: as of ``CausalLM``.
    """

    def __init__(self, hf: PreTrainedModel, score: Tensor | None = None, *, packing_problem: str | None = None) -> None:
        output: Any = hf.get_output_embeddings()
        size, dtype = output.weight.shape[1], output.weight.dtype
        head = nn.Linear(size, 1, bias=False, dtype=torch.float32)
        with torch.no_grad():
            head.weight.normal_(0.0, (size + 1) ** -0.5) if score is None else head.weight.copy_(score)
        hf.config = copy.deepcopy(hf.config)
        hf.config.tie_word_embeddings = False
        head = head.to(dtype)
        hf.set_output_embeddings(head)
        super().__init__(hf, packing_problem=packing_problem)
        self._description["score"] = next(name for name, module in hf.named_modules() if module is head)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        last: Tensor,
        document_offsets: Tensor | None = None,
        max_document: int = 0,
        *,
        shared_keys: Tensor | None = None,
        key_offsets: Tensor | None = None,
    ) -> Tensor:
        """(A,) fp32 scores.

        Args:
            input_ids, position_ids, document_offsets, max_document: as of ``CausalLM``.
            last: (A,) int64 places, in the flattened (B * T) batch, of the texts' last tokens.
            shared_keys, key_offsets: as of ``PreferenceBatch``.
        """
        keys = {} if shared_keys is None else {"shared_keys": shared_keys, "cu_seq_lens_k": key_offsets}
        outputs = self._decode(input_ids, position_ids, document_offsets, max_document, keys)
        hidden_AH = outputs.last_hidden_state.flatten(0, 1).index_select(0, last)
        head: Any = self.hf.get_output_embeddings()
        return head(hidden_AH.to(head.weight.dtype)).squeeze(-1).float()

    def adapt(self, adapter: Adapter, base: dict[str, Any]) -> None:
        """As of ``CausalLM``; the head, which nobody has trained yet, is trained whole.

        Raises:
            ValueError: the adapter wants the head, too.
        """
        head: Any = self.hf.get_output_embeddings()
        if type(head) is not nn.Linear:
            name = self._description["score"].rpartition(".")[2]
            raise ValueError(
                f"backbone.adapter: {name} is a reward model's head, which is trained whole; take it out of "
                "target_modules and modules_to_save"
            )
        head.to(adapter.parameters()[0].dtype).requires_grad_(True)
        super().adapt(adapter, base)

    def split_positions(self, group: Any, tensor: int = 1) -> None:
        raise ValueError("strategy.context_parallel: not for reward models; set it to 1")

    def save_pretrained(self, folder: str | Path) -> None:
        """A folder that ``AutoModelForSequenceClassification`` opens, whose one logit is the score."""
        classifier(self.hf.config, self.hf.state_dict(), self._description["score"]).save_pretrained(folder)


def classifier(config: PretrainedConfig, state: dict[str, Tensor], head: str) -> PreTrainedModel:
    """transformers' classifier of one label with the weights of a ``RewardModel``'s ``hf``; nothing is initialized.

    Args:
        head: the name of the module there that gives the score.

    Raises:
        RuntimeError: the weights do not fit.
    """
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(config)
    config.num_labels = 1
    dtype = state[f"{head}.weight"].dtype
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
    named = {SCORE if name == f"{head}.weight" else name: value for name, value in state.items()}
    model.load_state_dict(named, assign=True)
    model.config.dtype = dtype
    return model.eval()


def is_classifier(config: Any) -> bool:
    """Whether a folder's config is of a model with such a head."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def check_family(config: PretrainedConfig) -> None:
    """Raises a ValueError for a family of which transformers has no classifier that a reward model can be saved as."""
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ValueError(
            f"backbone: no reward model of {config.model_type!r}: transformers has no classifier of this family, as "
            "which it would be saved"
        )
    hf = meta_model(config)
    output: Any = hf.get_output_embeddings()
    head = next(name for name, module in hf.named_modules() if module is output)
    state = {name: value for name, value in hf.state_dict().items() if not name.startswith(f"{head}.")}
    try:
        classifier(config, state | {f"{head}.weight": output.weight[:1]}, head)
    except RuntimeError as error:  # encoders' classifiers have a pooler or a head of another name
        raise ValueError(
            f"backbone: no reward model of {config.model_type!r}: transformers' classifier of this family, as which it "
            f"would be saved, is not its language model with {SCORE!r} for a head"
        ) from error


def stored_score(source: str) -> Tensor:
    """(1, H) the head of a saved reward model: a folder, or a hub id.

    Raises:
        ValueError: there is none, or it has several labels.
    """
    from huggingface_hub import snapshot_download
    from safetensors import safe_open

    folder = local_folder(source) or Path(snapshot_download(source, allow_patterns="*.safetensors"))
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            if SCORE in tensors.keys():  # noqa: SIM118 - no dictionary
                score = tensors.get_tensor(SCORE)
                if score.shape[0] != 1:
                    raise ValueError(f"backbone.source: {source!r} has {score.shape[0]} labels; a reward has one")
                return score
    raise ValueError(f"backbone.source: {source!r} says that it is a classifier, but has no {SCORE!r}")
