"""Floor 0: the README.md of an exported model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_model_card(folder: Path, info: dict[str, Any]) -> Path:
    """Writes ``folder/README.md`` with a YAML header and what is known of the training.

    Args:
        folder: the exported model.
        info: ``recipe`` (name), ``data`` (list of sources), ``tokens_seen``, ``step``, ``weights`` (of which step),
            ``base``, ``adapter`` (method), ``score`` (whether it is a reward model), ``metrics`` (name -> value),
            ``config`` (resolved YAML text); whatever is missing is left out.
    """
    library = "peft" if info.get("adapter") else "transformers"
    task = "text-classification" if info.get("score") else "text-generation"
    lines = ["---", f"library_name: {library}", f"pipeline_tag: {task}", "---", ""]
    lines += [f"# {info.get('recipe', 'Language model')}", "", "Trained with LitRecipes.", ""]
    facts = {"Recipe": "recipe", "Optimizer steps": "step", "Weights": "weights", "Tokens seen": "tokens_seen"}
    facts |= {"Adapter": "adapter", "Base model": "base"}
    for title, key in facts.items():
        if info.get(key) is not None:
            value = info[key]
            lines.append(f"- {title}: {value:,}" if isinstance(value, int) else f"- {title}: {value}")
    if info.get("data"):
        lines += ["", "## Data", "", *(f"- {json.dumps(source, ensure_ascii=False)}" for source in info["data"])]
    if info.get("metrics"):
        lines += ["", "## Metrics", "", "| metric | value |", "|---|---|"]
        lines += [f"| {name} | {value:.6g} |" for name, value in sorted(info["metrics"].items())]
    lines += ["", "## Use", "", "```python"]
    if info.get("adapter") == "BOTTLENECK":
        lines[-1:] = ["`recipes generate -m FOLDER`, or:", "", "```python", "from llm_modules.zoo import open_adapter"]
        lines += ["from transformers import AutoTokenizer", "", 'model = open_adapter("FOLDER")']
    elif info.get("adapter"):
        lines += ["from peft import AutoPeftModelForCausalLM", "from transformers import AutoTokenizer", ""]
        lines += ['model = AutoPeftModelForCausalLM.from_pretrained("FOLDER")']
    else:
        name = "AutoModelForSequenceClassification" if info.get("score") else "AutoModelForCausalLM"
        lines += [f"from transformers import {name}, AutoTokenizer", ""]
        lines += [f'model = {name}.from_pretrained("FOLDER")']
        lines += ["# of tokens of a rendered conversation: model(input_ids).logits[:, 0]"] * bool(info.get("score"))
    lines += ['tokenizer = AutoTokenizer.from_pretrained("FOLDER")', "```"]
    if info.get("config"):
        lines += ["", "## Configuration", "", "```yaml", info["config"].rstrip(), "```"]
    path = folder / "README.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
