"""Secrets come from the environment and stay out of every file, log and screen."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from recipes.compose import Composed
from recipes.yaml_tree import Key

# `tokenizer`, `eos_token` and the like are no secrets.
_SECRET = re.compile(
    r"(?:^|[_.\-])(?:api_?key|secret|password|passwd|credentials?|(?:access|auth|hf|api)_?token)$", re.I
)
_ENVIRONMENT = re.compile(r"\$\{oc\.env:\s*([A-Za-z_]\w*)")
HIDDEN = "***"


def is_secret(name: str) -> bool:
    """Whether a config key or a variable of this name holds a secret."""
    return bool(_SECRET.search(name))


def redact_config(composed: Composed, values: dict[str, Any]) -> dict[str, Any]:
    """A copy of a config's values without secrets.

    What was taken from the environment is written as it was asked for (``${oc.env:API_KEY}``), so that the config
    still runs; a secret that stands in the config itself is hidden.
    """
    asked = {
        key: node.value
        for key, node in composed.root.walk()
        if isinstance(node.value, str)
        and any(is_secret(name) or is_secret(str(key[-1])) for name in _ENVIRONMENT.findall(node.value))
    }
    return _redact(values, (), asked)


def _redact(value: Any, key: Key, asked: dict[Key, str]) -> Any:
    if key in asked:
        return asked[key]
    if isinstance(value, dict):
        return {name: _redact(item, (*key, name), asked) for name, item in value.items()}
    if isinstance(value, list):
        return [_redact(item, (*key, index), asked) for index, item in enumerate(value)]
    secret = isinstance(value, str) and value and any(is_secret(str(part)) for part in key if isinstance(part, str))
    return HIDDEN if secret else value


def redact_command(command: Sequence[str]) -> list[str]:
    """A command without the values of its secret flags."""
    shown: list[str] = []
    for word in command:
        key, equals, _ = word.partition("=")
        if shown and "=" not in shown[-1] and shown[-1].startswith("--") and is_secret(shown[-1]):
            shown.append(HIDDEN)
        elif equals and key.startswith("--") and is_secret(key):
            shown.append(f"{key}={HIDDEN}")
        else:
            shown.append(word)
    return shown
