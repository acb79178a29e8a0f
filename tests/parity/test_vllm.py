"""vLLM as the engine of a policy: it says what the model says, with the weights that the policy has now.

It runs in an environment of its own: ``make vllm``, or LITRECIPES_VLLM, the Python of one.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from llm_modules import PolicyModule
from llm_modules.data import PromptDataModule
from llm_modules.evaluation.rewards import Answer, Reward
from llm_modules.generation import VLLM, Generator
from llm_modules.generation.decoding import Decoder
from llm_modules.tokenizer import load_tokenizer
from llm_modules.zoo import Backbone
from tests.invariance.test_policy_invariance import write_prompts

ROOT = Path(__file__).parents[2]
MADE = ROOT / ".vllm" / "bin" / "python" if (ROOT / ".vllm" / ".installed").exists() else Path("none")
PYTHON = os.environ.get("LITRECIPES_VLLM", str(MADE))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path(PYTHON).exists(), reason="needs vLLM: make vllm, or set LITRECIPES_VLLM"),
]
SETTINGS = {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 27}
TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 32,
    "num_key_value_heads": 1, "max_position_embeddings": 128, "vocab_size": 264, "tie_word_embeddings": True,
}  # fmt: skip
LORA = {"class_path": "peft.LoraConfig", "init_args": {"r": 4, "target_modules": "all-linear"}}
PROMPTS = [list(b"hello"), list(b"a much longer prompt than the other two"), list(b"x y z")]


@pytest.fixture
def engine() -> Iterator[VLLM]:
    made = VLLM(PYTHON, settings=SETTINGS)
    yield made
    made.close()


def built(scale: float = 4.0, **arguments: Any) -> tuple[Any, Any]:
    tokenizer = load_tokenizer("builtin:bytes")
    arguments.setdefault("config", TINY | {"model_type": "llama"})
    model = Backbone(**arguments).build(tokenizer=tokenizer, sequence_length=96, seed=0)
    change(model, scale)
    return model, tokenizer


@torch.no_grad()
def change(model: Any, scale: float) -> None:
    generator = torch.Generator().manual_seed(int(scale))
    for parameter in model.parameters():
        parameter.mul_(scale).add_(0.02 * torch.randn(parameter.shape, generator=generator))


def differences(model: Any, tokenizer: Any, settings: Generator, engine: VLLM) -> float:
    """Largest difference of an answer's summed log-probability from transformers'."""
    groups = engine.sample(settings, model, tokenizer, PROMPTS, [[3 * i + j for j in range(3)] for i in range(3)])
    found = []
    with Decoder(Generator(max_new_tokens=1), model, tokenizer) as decoder:
        for prompt, group in zip(PROMPTS, groups, strict=True):
            assert len(group) == 3
            for answer in group:
                assert len(answer.logprobs) == len(answer.token_ids) <= settings.max_new_tokens
                found.append(abs(decoder.logprob(prompt, answer.token_ids) - sum(answer.logprobs)))
    return max(found)


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_it_has_the_weights_of_now(family: str, engine: VLLM) -> None:
    config = {key: value for key, value in TINY.items() if key != "head_dim"} | {"model_type": family}
    if family == "gpt2":
        dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        config = {"model_type": "gpt2", "n_embd": 64, "n_head": 2, "n_layer": 2, "n_positions": 128, "vocab_size": 264}
        config |= dropout
    model, tokenizer = built(config=config)
    settings = Generator(strategy="sample", max_new_tokens=24, batch_size=4)
    engine.take(model, tokenizer, settings, 96)
    assert differences(model, tokenizer, settings, engine) < 1e-3
    for scale in (0.7, 1.2):
        change(model, scale)
        assert differences(model, tokenizer, settings, engine) > 0.1  # the check can fail
        engine.take(model, tokenizer, settings, 96)
        assert differences(model, tokenizer, settings, engine) < 1e-3


def test_an_adapter_is_merged_into_them_and_stays_as_it_is(engine: VLLM) -> None:
    model, tokenizer = built(1.0, adapter=LORA)
    change(model, 3.0)
    before = {name: tensor.clone() for name, tensor in model.hf.state_dict().items()}
    settings = Generator(strategy="sample", max_new_tokens=24)
    engine.take(model, tokenizer, settings, 96)
    assert differences(model, tokenizer, settings, engine) < 1e-3
    with model.as_base():
        assert differences(model, tokenizer, settings, engine) > 0.01
    after = model.hf.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_draws_are_from_the_model_and_only_the_seed_and_the_row_decide(engine: VLLM) -> None:
    model, tokenizer = built()
    one = Generator(strategy="sample", max_new_tokens=1, batch_size=64, temperature=0.8)
    engine.take(model, tokenizer, one, 96)
    ((*draws,),) = engine.sample(one, model, tokenizer, PROMPTS[:1], [list(range(3000))])
    logits = model.hf(torch.tensor(PROMPTS[:1])).logits[0, -1].detach().double()
    expected = (logits / 0.8).softmax(-1)
    counts = Counter(answer.token_ids[0] for answer in draws)
    likely = [token for token in range(264) if expected[token] * 3000 >= 5]
    seen = [*(counts[token] for token in likely), 3000 - sum(counts[token] for token in likely)]
    wanted = [*(3000 * float(expected[token]) for token in likely), 0.0]
    wanted[-1] = 3000 - sum(wanted)
    chi = sum((s - w) ** 2 / w for s, w in zip(seen, wanted, strict=True) if w > 0)
    degrees = len(wanted) - 1
    assert degrees > 10
    assert chi < degrees + 4 * math.sqrt(2 * degrees)
    for answer in draws[:50]:  # at the temperature it was drawn at
        assert answer.logprobs[0] == pytest.approx(math.log(float(expected[answer.token_ids[0]])), abs=1e-4)

    long = Generator(strategy="sample", max_new_tokens=16, batch_size=64, seed=5, temperature=0.8)
    rows = [[0, 1], [2, 3], [4, 5]]
    first = engine.sample(long, model, tokenizer, PROMPTS, rows)
    again = engine.sample(long, model, tokenizer, PROMPTS[::-1], rows[::-1])[::-1]
    assert [[a.token_ids for a in group] for group in first] == [[a.token_ids for a in group] for group in again]
    other = engine.sample(
        Generator(strategy="sample", max_new_tokens=16, batch_size=64, seed=6, temperature=0.8),
        model, tokenizer, PROMPTS, rows,
    )  # fmt: skip
    assert first[0][0].token_ids != other[0][0].token_ids
    assert len({tuple(a.token_ids) for group in first for a in group}) == 6


def test_stop_strings_and_top_k(engine: VLLM) -> None:
    model, tokenizer = built()
    settings = Generator(strategy="sample", max_new_tokens=60, stop=["a", "e"], top_k=50)
    engine.take(model, tokenizer, settings, 128)
    answers = [a for g in engine.sample(settings, model, tokenizer, PROMPTS, [[*range(20)]] * 3) for a in g]
    ended = [a for a in answers if a.finished]
    assert len(ended) > 20
    assert not any("a" in answer.text or "e" in answer.text for answer in answers)
    for answer in ended:
        assert tokenizer.decode(answer.token_ids).rstrip()[-1:] in ("a", "e") or answer.token_ids[-1] > 255
    # Of what may be drawn the likeliest fifty; the log-probabilities are of all tokens.
    answer = max(answers, key=lambda a: len(a.token_ids))
    with Decoder(Generator(max_new_tokens=1), model, tokenizer) as decoder:
        place = answers.index(answer) // 20
        assert decoder.logprob(PROMPTS[place], answer.token_ids) == pytest.approx(sum(answer.logprobs), abs=1e-3)
        logits = model.hf(torch.tensor([[*PROMPTS[place], *answer.token_ids]])).logits[0, len(PROMPTS[place]) - 1 : -1]
    ranks = (logits > logits.gather(-1, torch.tensor(answer.token_ids)[:, None])).sum(-1)
    assert int(ranks.max()) < 50


class Vowels(Reward):
    def score(self, answers: list[Answer]) -> list[float]:
        return [sum(c in "aeiou" for c in answer.text) / max(1, answer.tokens) for answer in answers]


class Watch(Callback):
    def __init__(self, keep: Path | None) -> None:
        self.keep = keep
        self.differences: list[float] = []
        self.answers: list[list[int]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *rest: Any) -> None:
        self.differences.append(float(trainer.callback_metrics["train/sampling_difference"]))
        if pl_module._rollouts is not None:
            self.answers.append(pl_module._rollouts.answer_ids.tolist())
        if self.keep is not None and trainer.global_step == 3:
            trainer.save_checkpoint(self.keep)


def fit(folder: Path, *, ckpt: Path | None = None, keep: Path | None = None) -> Any:
    watch = Watch(keep)
    data = PromptDataModule(
        tokenizer="builtin:bytes", sequence_length=64, sources=[{"path": str(write_prompts(folder))}],
        chat_template="chatml", batch_size=4, longest_prompt=56,
        validation_fraction=0.2,
    )  # fmt: skip
    module = PolicyModule(
        Backbone(config=TINY | {"model_type": "llama"}),
        [Vowels()],
        group_size=4,
        minibatches=2,
        generator=Generator(strategy="sample", max_new_tokens=8, batch_size=32),
        engine=VLLM(PYTHON, settings=SETTINGS),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        sequence_length=64,
        seed=3,
    )
    trainer = Trainer(
        max_steps=8, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, callbacks=[watch],
        enable_progress_bar=False, enable_model_summary=False, val_check_interval=4, check_val_every_n_epoch=None,
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=ckpt, weights_only=False)
    return module, watch


def test_a_policy_learns_from_its_answers_and_goes_on_exactly(tmp_path: Path) -> None:
    checkpoint = tmp_path / "three.ckpt"  # inside of an iteration
    whole, watched = fit(tmp_path, keep=checkpoint)
    # The first step of each iteration learns from answers of the weights that it has.
    assert max(watched.differences[::2]) < 1e-5
    assert max(watched.differences[1::2]) > 0.01  # the second from those that it had
    assert whole.engine._process is None  # ended with the run
    resumed, rest = fit(tmp_path, ckpt=checkpoint)
    assert rest.answers[-1] == watched.answers[-1]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_a_killed_training_leaves_no_engine(tmp_path: Path) -> None:
    program = """
from tests.parity.test_vllm import *
engine = VLLM(PYTHON, settings=SETTINGS)
model, tokenizer = built()
engine.take(model, tokenizer, Generator(strategy="sample", max_new_tokens=8), 64)
print("group", engine._process.pid, flush=True)
time.sleep(300)
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    group = next(int(line.split()[1]) for line in process.stdout if line.startswith("group "))
    members = running(group)
    assert members
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 60
    while running(group) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert running(group) == []


def running(session: int) -> list[str]:
    found = subprocess.run(["ps", "-o", "pid=,stat=", "-s", str(session)], capture_output=True, text=True).stdout
    return [line for line in found.splitlines() if "Z" not in line]


def test_an_engine_that_dies_ends_the_training_in_one_line(engine: VLLM) -> None:
    model, tokenizer = built()
    settings = Generator(strategy="sample", max_new_tokens=8)
    engine.take(model, tokenizer, settings, 64)
    assert engine._process is not None
    os.killpg(engine._process.pid, signal.SIGKILL)
    with pytest.raises(ValueError, match=r"^model.engine: vLLM: it ended with status -9 \(log .*\)$"):
        engine.sample(settings, model, tokenizer, PROMPTS, [[0], [1], [2]])


def test_what_vllm_says_is_told_in_one_line() -> None:
    engine = VLLM(PYTHON, settings=SETTINGS | {"no_such_argument": 1})
    model, tokenizer = built()
    with pytest.raises(ValueError, match=r"^model.engine: vLLM: TypeError: .*no_such_argument.*\(log .*\)$") as caught:
        engine.take(model, tokenizer, Generator(strategy="sample", max_new_tokens=8), 64)
    assert "\n" not in str(caught.value)
