"""Policy losses and gradients: those of TRL's GRPOTrainer, RLOOTrainer and OnlineDPOTrainer on the same answers.

TRL's side is in fp64: in fp32 its sums over tokens are too far from the truth to say something of 1e-6.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_modules import PolicyModule
from llm_modules.evaluation.rewards import Reward
from llm_modules.language_model import LanguageModelModule
from llm_modules.logprobs import score_batch
from llm_modules.objectives import GRPO, RLOO, OnlineDPO, PolicyObjective
from llm_modules.rollouts import Rollouts, policy_batch
from llm_modules.tokenizer import byte_tokenizer
from llm_modules.zoo import Backbone
from tests.parity.test_trl_sft import LLAMA, TEMPLATE

PROMPTS, GROUP, LONGEST = 3, 4, 14
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "GRPO": (partial(GRPO, kl=0.2), {"loss_type": "grpo", "beta": 0.2, "use_bias_correction_kl": False}),
    "weighted KL": (
        partial(GRPO, kl=0.2, weighted_kl=True, aggregate="tokens"),
        {"loss_type": "dapo", "beta": 0.2, "use_bias_correction_kl": True},
    ),
    "Dr. GRPO": (
        partial(GRPO, scale="none", aggregate="constant", longest=LONGEST),
        {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.0},
    ),
    "DAPO": (
        partial(GRPO, clip=0.02, clip_high=0.03, aggregate="tokens"),
        {"loss_type": "dapo", "epsilon": 0.02, "epsilon_high": 0.03, "beta": 0.0},
    ),
    "GSPO": (
        partial(GRPO, ratio="sequence", clip=0.003, clip_high=0.004),
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon": 0.003,
            "epsilon_high": 0.004,
            "beta": 0.0,
        },
    ),
    "batch": (partial(GRPO, scale="batch"), {"loss_type": "grpo", "scale_rewards": "batch", "beta": 0.0}),
    "RLOO": (partial(RLOO, kl=0.1), {"beta": 0.1}),
    "RLOO, normalized": (partial(RLOO, kl=0.1, normalize=True), {"beta": 0.1, "normalize_advantages": True}),
}


class Nothing(Reward):
    def score(self, answers: Any) -> list[float]:
        return [0.0 for _ in answers]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trl")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    for seed, name in enumerate(("policy", "reference", "old"), 3):
        made = LanguageModelModule(Backbone(config=LLAMA), sequence_length=64, seed=seed)
        made.configure_model()
        assert made.model is not None
        with torch.no_grad():
            for parameter in made.model.parameters():
                parameter.mul_(1.5)
        made.export(path / name)
        tokenizer.save_pretrained(path / name)
    return path


def answers(folder: Path) -> Rollouts:
    """Answers of random tokens with rewards; log-probabilities of the old policy a little beside the present one's."""
    from transformers import AutoModelForCausalLM

    random = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 250, (size,), generator=random) for size in (5, 1, 8)]
    lengths = torch.randint(2, LONGEST + 1, (PROMPTS * GROUP,), generator=random)
    ids = torch.randint(3, 250, (int(lengths.sum()),), generator=random)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    prompt_of = torch.arange(PROMPTS).repeat_interleave(GROUP)

    def said(name: str) -> Tensor:
        model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float64)
        parts = []
        for number, prompt in enumerate(prompt_of.tolist()):
            answer = ids[offsets[number] : offsets[number + 1]]
            row = torch.cat([prompts[prompt], answer])
            with torch.no_grad():
                logits = model(row[None]).logits[0, len(prompts[prompt]) - 1 : -1]
            parts.append(logits.log_softmax(-1).gather(-1, answer[:, None]).squeeze(-1))
        return torch.cat(parts)

    now = said("policy")
    old = now + 0.1 * torch.randn(len(now), generator=random, dtype=torch.float64)
    return Rollouts(
        prompts=prompts,
        rows=torch.arange(PROMPTS),
        prompt_of=prompt_of,
        answer_ids=ids,
        offsets=offsets,
        finished=torch.ones(len(lengths), dtype=torch.bool),
        rewards=torch.zeros(len(lengths), 1),
        reward=torch.rand(len(lengths), generator=random, dtype=torch.float64),
        sampled_logprobs=old.float(),
        old_logprobs=old.float(),
        reference_logprobs=said("reference").float(),
    )


def ours(folder: Path, objective: PolicyObjective, rollouts: Rollouts, layout: str) -> tuple[Tensor, dict[str, Tensor]]:
    objective.prepare(rollouts)
    module = PolicyModule(
        Backbone(source=str(folder / "policy")),
        [Nothing()],
        objective,
        tokenizer=str(folder / "policy"),
        sequence_length=64,
    )
    module.configure_model()
    assert module.model is not None
    batch = policy_batch(rollouts, objective.select(rollouts), layout, 64)
    counts = batch.counts()
    output = objective(batch, score_batch(module.model, batch).logprobs)
    loss = sum(term.weight * term.sum / counts[term.count] for term in output.terms.values())
    assert isinstance(loss, Tensor)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in module.model.hf.named_parameters() if p.grad is not None}


def padded(rows: list[Tensor], left: bool, value: float = 0) -> tuple[Tensor, Tensor]:
    side = "left" if left else "right"
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_side=side)
    return pad(rows, padding_value=value), pad([torch.ones(len(row), dtype=torch.int64) for row in rows])


def trainer(folder: Path, kind: str, **arguments: Any) -> Any:
    import datasets
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if kind == "GRPO":
        arguments["max_completion_length"] = LONGEST
    return getattr(trl, f"{kind}Trainer")(
        model=AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float64),
        reward_funcs=lambda completions, **rest: [0.0 for _ in completions],
        args=getattr(trl, f"{kind}Config")(
            output_dir=str(folder / "peer"),
            per_device_train_batch_size=PROMPTS * GROUP,
            num_generations=GROUP,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            report_to=[],
            **arguments,
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": "a"}] * 8),
        processing_class=AutoTokenizer.from_pretrained(folder / "policy"),
    )


def theirs(folder: Path, kind: str, rollouts: Rollouts, arguments: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    peer = trainer(folder, kind, **arguments)
    split = partial(torch.split, split_size_or_sections=rollouts.lengths.tolist())
    prompts, prompt_mask = padded([rollouts.prompts[p] for p in rollouts.prompt_of.tolist()], left=True)
    completions, mask = padded(list(split(rollouts.answer_ids)), left=False)
    assert rollouts.old_logprobs is not None
    assert rollouts.reference_logprobs is not None
    old, _ = padded(list(split(rollouts.old_logprobs.double())), left=False)
    reference, _ = padded(list(split(rollouts.reference_logprobs.double())), left=False)
    groups = rollouts.reward.view(PROMPTS, GROUP)
    if kind == "GRPO":
        # As its _generate_and_score_completions has it, which needs its own generation.
        advantages = groups - groups.mean(1, keepdim=True)
        scale = arguments.get("scale_rewards", "group")
        if scale != "none":
            spread = groups.std(1, keepdim=True) if scale == "group" else groups.std()
            advantages = advantages / (spread + 1e-4)
        more = {"old_per_token_logps": old, "ref_per_token_logps": reference}
    else:
        groups = (rollouts.reward - arguments["beta"] * ((old - reference) * mask).sum(1)).view(PROMPTS, GROUP)
        advantages = groups - (groups.sum(1, keepdim=True) - groups) / (GROUP - 1)
        if arguments.get("normalize_advantages"):
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-4)
        more = {"old_logps": (old * mask).sum(1)}
    batch = {
        "prompt_ids": prompts,
        "prompt_mask": prompt_mask,
        "completion_ids": completions,
        "completion_mask": mask,
        "advantages": advantages.flatten(),
        "num_items_in_batch": mask.sum(),
    } | more
    peer.model.eval()
    loss = peer._compute_loss(peer.model, batch)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in peer.model.named_parameters() if p.grad is not None}


def assert_same(own: tuple[Tensor, dict[str, Tensor]], peer: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert float(own[0]) == pytest.approx(float(peer[0]), abs=1e-6, rel=1e-6)
    assert own[1].keys() == peer[1].keys()
    difference = torch.cat([(own[1][name].double() - peer[1][name].double()).flatten() for name in own[1]]).norm()
    whole = torch.cat([value.double().flatten() for value in peer[1].values()]).norm()
    assert whole > 1e-4
    assert float(difference / whole) <= 1e-5


@pytest.mark.parametrize("layout", ["shared", "padded"])
@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_trl(name: str, layout: str, folder: Path) -> None:
    objective, arguments = CASES[name]
    kind = "RLOO" if name.startswith("RLOO") else "GRPO"
    rollouts = answers(folder)
    assert_same(ours(folder, objective(), rollouts, layout), theirs(folder, kind, answers(folder), arguments))


def test_online_dpo_is_that_of_trl_on_the_best_and_the_worst(folder: Path) -> None:
    """Its trainer takes two answers, here those, and finds out itself which is better."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    rollouts = answers(folder)
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float64) for name in ("policy", "reference")
    )
    peer = OnlineDPOTrainer(
        model=policy,
        ref_model=reference,
        reward_funcs=lambda completions, **rest: [0.0 for _ in completions],
        args=OnlineDPOConfig(
            output_dir=str(folder / "peer"), per_device_train_batch_size=PROMPTS, beta=0.3, max_new_tokens=LONGEST,
            gradient_checkpointing=False, use_cpu=True, bf16=False, report_to=[],
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": "a"}] * 8),
        processing_class=AutoTokenizer.from_pretrained(folder / "policy"),
    )  # fmt: skip
    groups = rollouts.reward.view(PROMPTS, GROUP)
    both = torch.stack([groups.argmax(1), groups.argmin(1)]) + GROUP * torch.arange(PROMPTS)
    both[:, 1] = both[:, 1].flip(0)  # of one prompt the worst comes first
    numbers = both.flatten()
    parts = rollouts.answer_ids.split(rollouts.lengths.tolist())
    prompts = padded([rollouts.prompts[p] for p in rollouts.prompt_of[numbers].tolist()], left=True)
    completions = padded([parts[n] for n in numbers.tolist()], left=False)
    peer._generate = lambda *given: (*prompts, *completions, None)
    peer._calculate_rewards_from_functions = lambda **given: rollouts.reward[numbers]
    loss = peer.training_step(policy, {"prompt": ["a"] * PROMPTS})
    gradients = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
    assert_same(ours(folder, OnlineDPO(beta=0.3), rollouts, "shared"), (loss, gradients))
