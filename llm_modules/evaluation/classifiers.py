"""Classifiers of texts, as transformers has them."""

from __future__ import annotations

from typing import Any

from llm_modules.evaluation.rows import nearest
from llm_modules.folders import local_folder


def open_classifier(source: str, label: str, source_key: str, label_key: str) -> tuple[Any, Any, int]:
    """(tokenizer, model in eval mode, place of the label among its classes); weights from safetensors only.

    Args:
        source: folder or hub id.
        label: a name in its config's ``id2label``.
        source_key, label_key: the config's keys, which errors name.

    Raises:
        ValueError: one line: it cannot be opened, or has no such class.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        opened = str(local_folder(source) or source)
        tokenizer = AutoTokenizer.from_pretrained(opened)
        model = AutoModelForSequenceClassification.from_pretrained(opened, use_safetensors=True).eval()
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{source_key}: {source!r} cannot be opened as a classifier: {reason}") from error
    names = {str(name): int(place) for place, name in model.config.id2label.items()}
    if label not in names:
        raise ValueError(
            f"{label_key}: {label!r} is not a class of {source}: {', '.join(names)}{nearest(label, names)}"
        )
    return tokenizer, model, names[label]
