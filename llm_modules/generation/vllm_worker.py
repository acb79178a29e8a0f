"""vLLM in a process of its own: run by ``VLLM`` as a script, by a Python that need not have anything but vLLM.

A line of JSON comes in and one goes out: ``{"open": arguments of vllm.LLM}``, ``{"load": folder}``, or ``{"answer":
[[prompt ids, arguments of vllm.SamplingParams], ...]}``. It ends when its input does, so with whoever started it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any


class Engine:
    """What is asked of vLLM."""

    def __init__(self) -> None:
        self.llm: Any = None

    def open(self, arguments: dict[str, Any]) -> str:
        """Make it; returns vLLM's version."""
        import vllm

        self.llm = vllm.LLM(**arguments)
        return str(vllm.__version__)

    def load(self, folder: str) -> None:
        """Take the weights of a folder with the same config."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        if not self.llm.reset_prefix_cache():  # keys and values of the weights before
            raise RuntimeError("the cache of prompts could not be emptied")

    def answer(self, asked: list[tuple[list[int], dict[str, Any]]]) -> list[tuple[list[int], list[float], bool]]:
        """(ids, log-probability of each, whether it ended by itself), of each."""
        from vllm import SamplingParams

        outputs = self.llm.generate(
            [{"prompt_token_ids": ids} for ids, _ in asked],
            [SamplingParams(**arguments) for _, arguments in asked],
            use_tqdm=False,
        )
        found = []
        for (answer,) in (output.outputs for output in outputs):
            ids = list(answer.token_ids)
            logprobs = [step[token].logprob for step, token in zip(answer.logprobs, ids, strict=True)]
            found.append((ids, logprobs, answer.finish_reason == "stop"))
        return found


def main() -> None:
    """Until the input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no reply
    engine = Engine()
    verbs: dict[str, Callable[[Any], Any]] = {"open": engine.open, "load": engine.load, "answer": engine.answer}
    for line in sys.stdin:
        ((verb, argument),) = json.loads(line).items()
        try:
            reply = {"done": verbs[verb](argument)}
        except Exception as error:  # noqa: BLE001 - told to who asked, who stops
            import traceback

            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
