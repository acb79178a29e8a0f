"""vLLM (arXiv 2309.06180) answers for a policy: fast where answers are long, beside the model that learns.

Its draws are its own: what is sampled depends on the seed and the answer's number as it does without it, but the same
seed gives other answers.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_modules.generation.completion import Detokenizer, cut
from llm_modules.generation.prompts import end_token_ids, stop_tokens
from llm_modules.generation.vllm_weights import computed_in, plain_model, weights_folder, write_untied

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from llm_modules.generation.generator import Generator
    from llm_modules.generation.rollout import Sampled

OURS = frozenset(
    "model tokenizer skip_tokenizer_init dtype seed max_model_len max_num_seqs logprobs_mode gpu_memory_utilization "
    "generation_config load_format".split()
)
"""Arguments of vllm.LLM that are decided here."""
NOT_ITS = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "NODE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
"""Of the training's processes, which it would take for its own."""


class VLLM:
    """The engine of a ``PolicyModule`` that answers by vLLM; each process of the training has one.

    It holds the weights once more, and takes those of the policy before each iteration, an adapter merged into them.
    Where the policy trains in mixed precision, it holds them as narrow as that computes. (In 16 bits a merged weight is
    rounded: of an adapter that has hardly begun most is lost on the way, which ``train/sampling_difference`` shows.)

    Args:
        python: an interpreter that has vLLM, which asks for a torch and a transformers of its own; None: this one.
        memory: share of the device's memory that it takes, weights included (vLLM's ``gpu_memory_utilization``).
        settings: more arguments of ``vllm.LLM``: ``enforce_eager``, ``kv_cache_memory_bytes``, ...

    Raises:
        ValueError: an argument of another type, or one that is decided elsewhere.
    """

    def __init__(self, python: str | None = None, memory: float = 0.3, settings: dict[str, Any] | None = None) -> None:
        self.python, self.memory, self.settings = python or sys.executable, memory, dict(settings or {})
        if not 0 < memory <= 1:
            raise ValueError(f"engine: memory={memory!r} must be above 0 and at most 1")
        if taken := sorted(OURS & self.settings.keys()):
            raise ValueError(
                f"engine: settings: {taken[0]} is decided elsewhere (model.generator, sequence_length, memory)"
            )
        if shutil.which(self.python) is None:
            raise ValueError(f"engine: python: {self.python!r} is no program")
        self._process: subprocess.Popen[str] | None = None
        self._log = ""
        self._opened: Any = None

    # --- settings

    def problem(self, settings: Generator) -> str | None:
        """Why answers cannot be sampled by these settings, or None."""
        narrows = settings.top_k or settings.top_p < 1 or settings.min_p or settings.repetition_penalty != 1
        if settings.cache == "static":
            return "cache: static is of the model's own steps; leave it out"
        if settings.temperature != 1 and narrows:
            return (
                "vLLM tells log-probabilities at a temperature only where nothing else changes them; leave out "
                "temperature, or top_k, top_p, min_p and repetition_penalty"
            )
        look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
        if subprocess.run([self.python, "-P", "-c", look], env=self._environment()).returncode:
            return f"{self.python} has no vLLM; install it there, or name another Python: model.engine.python"
        return None

    # --- weights

    def take(self, model: Any, tokenizer: PreTrainedTokenizerBase, settings: Generator, longest: int) -> None:
        """The policy's weights from now on; the first time, the engine starts.

        Args:
            model: of the zoo, whole.
            longest: a prompt with an answer in tokens.

        Raises:
            ValueError: vLLM is not there, does not take the model, or says something else with its weights.
        """
        asked = (replace(settings), longest, computed_in(model))
        if asked != self._opened:
            self.close()
        starts, self._opened = self._process is None, asked
        try:
            plain = plain_model(model)
            with weights_folder(model) as folder:
                if starts:
                    # Other weights: one that the engine does not take later on cannot be right by chance.
                    write_untied(plain, folder, wrong=True)
                    tokenizer.save_pretrained(str(folder))
                    self._open(model, folder, settings, longest)
                write_untied(plain, folder)
                self._ask("load", str(folder))
        except OSError as error:  # no room; a ValueError is told on all ranks
            self.close()
            raise ValueError(f"model.engine: the weights cannot be handed over: {error}") from error
        if starts:
            self._check(model, tokenizer, settings)

    def _open(self, model: Any, folder: Path, settings: Generator, longest: int) -> None:
        device = next(model.parameters()).device
        self._start(device)
        # On a CPU vLLM cannot step back in a seeded answer's draws, as it does where a prompt is read in pieces.
        whole = {"enable_chunked_prefill": False} if device.type == "cpu" else {}
        decided = {
            "model": str(folder),
            "skip_tokenizer_init": not settings.stop,
            "dtype": computed_in(model),
            "seed": settings.seed,
            "max_model_len": longest,
            "max_num_seqs": settings.batch_size,
            # Before top_k and the like, at the temperature: see `problem`.
            "logprobs_mode": "raw_logprobs" if settings.temperature == 1 else "processed_logprobs",
            "gpu_memory_utilization": self.memory,
            "generation_config": "vllm",  # none of a folder's own defaults
        }
        self._ask("open", whole | self.settings | decided)

    def _check(self, model: Any, tokenizer: PreTrainedTokenizerBase, settings: Generator) -> None:
        """Whether it says what the model says: vLLM only mentions in its log which weights it did not take."""
        from llm_modules.generation.decoding import Decoder

        plain = replace(settings, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, stop=[])
        prompt = list(range(8))
        (answers,) = self.sample(plain, model, tokenizer, [prompt], [list(range(4))])
        with Decoder(plain, model, tokenizer) as decoder:
            found = [
                abs(decoder.logprob(prompt, answer.token_ids) - sum(answer.logprobs)) / len(answer.token_ids)
                for answer in answers
            ]
        limit = 0.01 if computed_in(model) == "float32" else 0.1
        difference = max(found, key=lambda off: (math.isnan(off), off))
        if not difference <= limit:  # nor NaN
            self.close()
            raise ValueError(
                f"model.engine: vLLM does not take all weights of a {model.hf.config.model_type} from the policy: it "
                f"is {difference:.2g} nats a token off ({limit:.2g} are rounding); leave the engine out"
            )

    def sample(
        self,
        settings: Generator,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[list[int]],
        rows: Sequence[Sequence[int]],
    ) -> list[list[Sampled]]:
        """Answers to each prompt, by the weights that were taken last. Arguments as of ``GroupSampler``."""
        import numpy as np

        special, stop = stop_tokens(tokenizer, settings.stop)
        ends = sorted({*end_token_ids(model.hf, tokenizer), *special})
        same = {
            "temperature": settings.temperature,
            "top_k": settings.top_k,
            "top_p": settings.top_p,
            "min_p": settings.min_p,
            "repetition_penalty": settings.repetition_penalty,
            "max_tokens": settings.max_new_tokens,
            "stop_token_ids": ends,
            "ignore_eos": True,  # what ends an answer is in the line above
            "logprobs": 0,
            "detokenize": bool(stop),
            "skip_special_tokens": True,
            **({"stop": stop} if stop else {}),
        }
        asked = [
            (prompt, {**same, "seed": int(np.random.SeedSequence([settings.seed, row]).generate_state(1)[0])})
            for prompt, numbers in zip(prompts, rows, strict=True)
            for row in numbers
        ]
        answers = iter(self._ask("answer", asked))
        return [
            [_sampled(tokenizer, prompt, next(answers), ends, stop) for _ in numbers]
            for prompt, numbers in zip(prompts, rows, strict=True)
        ]

    # --- the process

    def _environment(self) -> dict[str, str]:
        environment = {name: value for name, value in os.environ.items() if name not in NOT_ITS}
        environment = {name: value for name, value in environment.items() if not name.startswith("TORCHELASTIC_")}
        for name, value in {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}.items():
            environment.setdefault(name, value)
        if self.python != sys.executable:
            for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
                environment.pop(name, None)
        return environment

    def _start(self, device: torch.device) -> None:
        environment = self._environment()
        if device.type == "cuda":
            seen = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
            environment["CUDA_VISIBLE_DEVICES"] = seen[device.index] if seen != [""] else str(device.index)
        with tempfile.NamedTemporaryFile("w", prefix="litrecipes-vllm-", suffix=".log", delete=False) as log:
            self._log = log.name
            self._process = subprocess.Popen(
                [self.python, "-P", str(Path(__file__).with_name("vllm_worker.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                start_new_session=True,  # a Ctrl-C is for the training, which ends its step first
            )

    def _ask(self, verb: str, argument: Any) -> Any:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps({verb: argument}) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        except BaseException:  # a reply that nobody has read would be taken for the next one
            os.killpg(process.pid, signal.SIGKILL)
            self.close()
            raise
        reply = json.loads(line) if line else {"error": f"it ended with status {process.wait()}"}
        if "error" not in reply:
            return reply["done"]
        log, self._log = self._log, ""
        self.close()
        raise ValueError(f"model.engine: vLLM: {' '.join(reply['error'].split())[:300]} (log {log})")

    def close(self) -> None:
        """End the process, which frees its memory."""
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if self._log:
            Path(self._log).unlink(missing_ok=True)
            self._log = ""


def _sampled(
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    answer: tuple[list[int], list[float], bool],
    ends: Sequence[int],
    stop: Sequence[str],
) -> Sampled:
    from llm_modules.generation.rollout import Sampled

    ids, logprobs, ended = answer
    kept, text, stopped = cut(ids, Detokenizer(tokenizer, prompt), ends, stop)
    return Sampled(text, kept, logprobs[: len(kept)], stopped or ended)
