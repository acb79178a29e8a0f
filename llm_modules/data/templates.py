"""Chat templates that ship with the project, and how a tokenizer gets one.

Each marks what the assistant says with ``{% generation %}``, turn end included, and has a generation prompt. The forms
are the published ones of the model families that they are named after.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HEAD = "{%- for message in messages %}"
_TAIL = "{%- endfor %}"

CHATML = (
    "{%- if tools %}{{- '<|im_start|>system\n# Tools\n' + (tools | tojson) + '<|im_end|>\n' }}{%- endif %}"
    + _HEAD
    + "{%- if message.role == 'assistant' %}{{- '<|im_start|>assistant\n' }}{% generation %}"
    "{{- message.content or '' }}"
    "{%- for call in message.tool_calls or [] %}"
    "{{- '\n<tool_call>\n' + ((call.function or call) | tojson) + '\n</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>' }}{% endgeneration %}{{- '\n' }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\n' + (message.content or '') + '<|im_end|>\n' }}{%- endif %}"
    + _TAIL
    + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)

LLAMA3 = (
    "{{- bos_token }}" + _HEAD + "{%- set role = 'ipython' if message.role == 'tool' else message.role %}"
    "{{- '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}"
    "{%- if message.role == 'assistant' %}"
    "{% generation %}{{- message.content | trim + '<|eot_id|>' }}{% endgeneration %}"
    "{%- else %}{{- message.content | trim + '<|eot_id|>' }}{%- endif %}"
    + _TAIL
    + "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)

GEMMA = (
    "{{- bos_token }}"
    # Gemma has no system role: what it says stands before the first user turn.
    "{%- set ns = namespace(system='') %}"
    + _HEAD
    + "{%- if message.role == 'system' %}{%- set ns.system = message.content | trim + '\n\n' %}"
    "{%- elif message.role == 'assistant' %}{{- '<start_of_turn>model\n' }}"
    "{% generation %}{{- message.content | trim + '<end_of_turn>' }}{% endgeneration %}{{- '\n' }}"
    "{%- else %}{{- '<start_of_turn>user\n' + ns.system + message.content | trim + '<end_of_turn>\n' }}"
    "{%- set ns.system = '' %}{%- endif %}"
    + _TAIL
    + "{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}"
)

ZEPHYR = (
    _HEAD + "{%- if message.role == 'assistant' %}{{- '<|assistant|>\n' }}"
    "{% generation %}{{- message.content + eos_token }}{% endgeneration %}{{- '\n' }}"
    "{%- else %}{{- '<|' + message.role + '|>\n' + message.content + eos_token + '\n' }}{%- endif %}"
    + _TAIL
    + "{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- endif %}"
)

ALPACA = (
    _HEAD + "{%- if message.role == 'assistant' %}{{- '### Response:\n' }}"
    "{% generation %}{{- message.content + eos_token }}{% endgeneration %}{{- '\n\n' }}"
    "{%- elif message.role == 'user' %}{{- '### Instruction:\n' + message.content + '\n\n' }}"
    "{%- elif message.role == 'tool' %}{{- '### Result:\n' + message.content + '\n\n' }}"
    "{%- else %}{{- message.content + '\n\n' }}{%- endif %}"
    + _TAIL
    + "{%- if add_generation_prompt %}{{- '### Response:\n' }}{%- endif %}"
)

RAW = (
    _HEAD + "{%- if message.role == 'assistant' %}"
    "{% generation %}{{- message.content + eos_token }}{% endgeneration %}"
    "{%- else %}{{- message.content }}{%- endif %}" + _TAIL
)

TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "gemma": GEMMA, "zephyr": ZEPHYR, "alpaca": ALPACA, "raw": RAW}
"""Name -> template. `raw` puts nothing between prompt and completion and ends with the end-of-text token."""

MARKERS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
}
"""Tokens that a template is written with; spelled out in ordinary tokens they would still work, but badly."""


def set_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> list[str]:
    """Give the tokenizer a template: the name of a shipped one, a file, or the template itself; None: its own.

    Returns:
        lines that the user should see.

    Raises:
        ValueError: there is none, or its name is not known.
    """
    if template is None:
        if not tokenizer.chat_template:
            raise ValueError(
                f"data.chat_template: the tokenizer has none; set it to one of "
                f"{', '.join(TEMPLATES)}, or to a .jinja file"
            )
        if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
            raise ValueError(
                f"data.chat_template: the tokenizer has {', '.join(tokenizer.chat_template)} and no default; set one"
            )
        return []
    if template in TEMPLATES:
        tokenizer.chat_template = TEMPLATES[template]
        vocabulary = tokenizer.get_vocab()
        missing = [marker for marker in MARKERS.get(template, ()) if marker not in vocabulary]
        if not missing:
            return []
        return [
            f"chat_template {template!r}: {', '.join(missing)} are no tokens of this tokenizer and will be spelled out "
            "in several; another template, or a tokenizer with them, is cheaper"
        ]
    if "{" in template:
        tokenizer.chat_template = template
        return []
    path = Path(template).expanduser()
    if not path.is_file():
        raise ValueError(f"data.chat_template: {template!r} is neither a file nor one of {', '.join(TEMPLATES)}")
    tokenizer.chat_template = path.read_text(encoding="utf-8")
    return []
