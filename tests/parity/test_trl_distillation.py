"""Divergences and their gradients: those of TRL's GKDTrainer and torch's kl_div on all logits at once, in fp64."""

from __future__ import annotations

import json
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from torch.utils._python_dispatch import TorchDispatchMode

from llm_modules.batch import IGNORE_INDEX, TaughtBatch, TaughtScores, Teaching
from llm_modules.data import PrepromptDataModule
from llm_modules.distillation import DistillationModule
from llm_modules.logprobs import next_token_targets
from llm_modules.objectives import DistillationObjective, ForwardKL, GeneralizedJSD, ReverseKL
from llm_modules.zoo import Backbone
from llm_modules.zoo.causal_lm import CausalLM
from tests.invariance.gradients import LLAMA
from tests.parity.test_zoo_families import LENGTHS, packed, pair

OBJECTIVES: dict[str, tuple[DistillationObjective, float]] = {
    "forward": (ForwardKL(), 0.0),
    "reverse": (ReverseKL(), 1.0),
    "JSD": (GeneralizedJSD(0.1), 0.1),
    "forward, T=2": (ForwardKL(temperature=2.0), 0.0),
    "reverse, T=0.7": (ReverseKL(temperature=0.7), 1.0),
    "JSD, T=3": (GeneralizedJSD(0.7, temperature=3.0), 0.7),
}
FAMILIES = ("llama", "gemma2", "granite", "cohere", "phi")
"""A plain head, a soft-cap, two scales, a bias."""


def jsd(student: Tensor, teacher: Tensor, labels: Tensor, beta: float, temperature: float) -> Tensor:
    """TRL's sum over the labels of full logits (1, T, V)."""
    trainer = pytest.importorskip("trl.experimental.gkd.gkd_trainer").GKDTrainer
    found: Tensor = trainer.generalized_jsd_loss(student, teacher, labels, beta, temperature, reduction="sum")
    return found


def mixed_up(model: CausalLM) -> CausalLM:
    """Another model of the family, far enough from it that rounding is small beside the divergence."""
    other, apart = deepcopy(model), 1.0 if model.head.transform.scale == 1 else 4.0
    with torch.no_grad():
        for number, parameter in enumerate(other.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.add_(apart * parameter.std(unbiased=False) * noise)
    return other.eval().requires_grad_(False)


def taught(student: CausalLM, teacher: CausalLM, objective: DistillationObjective) -> tuple[TaughtScores, Tensor]:
    """The scores of packed rows, chunk by chunk, and the targets; every third token is trained."""
    _, ids, positions, offsets = packed()
    labels = ids.masked_fill(torch.arange(ids.shape[1])[None] % 3 != 1, IGNORE_INDEX)
    targets = next_token_targets(labels, positions)
    with torch.no_grad():
        hidden = teacher(ids, positions, targets, offsets, max(LENGTHS), states=True)
    teaching = Teaching(hidden, teacher.logits, objective.compare)
    return student(ids, positions, targets, offsets, max(LENGTHS), teaching=teaching), targets


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradient_are_those_of_all_logits(family: str, name: str) -> None:
    objective, beta = OBJECTIVES[name]
    student, theirs = pair(family)
    student.head.chunk = 7
    teacher = mixed_up(student)
    scores, targets = taught(student, teacher, objective)
    scores.divergence.mean().backward()

    reference, frozen = theirs.double(), deepcopy(theirs).double()
    frozen.load_state_dict({name: value.double() for name, value in teacher.hf.state_dict().items()})
    documents = packed()[0]
    sides: list[Tensor] = []
    for model in (reference, frozen):
        with torch.set_grad_enabled(model is reference):
            sides.append(torch.cat([model(d[None], use_cache=False).logits for d in documents], dim=1))
    expected = jsd(*sides, targets, beta, objective.temperature) / len(scores.divergence)
    expected.backward()
    assert float(expected.detach()) > 1e-3
    assert float(scores.divergence.detach().mean()) == pytest.approx(float(expected.detach()), rel=1e-6, abs=1e-6)
    logs = [side.log_softmax(-1)[targets != IGNORE_INDEX] for side in sides]
    kl = kl_div(logs[0], logs[1], reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(scores.kl.double(), kl.detach(), rtol=1e-5, atol=1e-6)
    found = {name: p.grad for name, p in student.hf.named_parameters() if p.grad is not None}
    wanted = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    whole = torch.cat([g.flatten() for g in wanted.values()]).norm()
    assert torch.cat([(found[key] - g).flatten() for key, g in wanted.items()]).norm() <= 1e-5 * whole


def test_chunks_and_the_plain_head_say_the_same() -> None:
    student, _ = pair("llama")
    teacher = mixed_up(student)
    kept = []
    for kind, chunk in (("chunked", 5), ("chunked", 1000), ("plain", 5)):
        student.head.kind, student.head.chunk = kind, chunk  # type: ignore[assignment]
        student.zero_grad()
        scores, _ = taught(student, teacher, ForwardKL())
        scores.divergence.sum().backward()
        kept.append([*scores, *(p.grad.clone() for p in student.parameters() if p.grad is not None)])
    for other in kept[1:]:
        for one, same in zip(kept[0], other, strict=True):
            torch.testing.assert_close(one, same, rtol=1e-5, atol=1e-5)


class Largest(TorchDispatchMode):
    """The most rows of a tensor (rows, vocabulary) that any operator makes, but for the weight's own shape."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.width, self.hidden, self.rows = width, hidden, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor) and tensor.ndim == 2 and tensor.shape[1] == self.width:
                self.rows = max(self.rows, tensor.shape[0] if tensor.shape[0] != self.hidden else 0)
        return made


@pytest.mark.parametrize(("kind", "rows"), [("chunked", 4), ("plain", 33)])
def test_never_all_logits_at_once(kind: Any, rows: int) -> None:
    student, _ = pair("llama")
    teacher = mixed_up(student)
    student.head.kind, student.head.chunk = kind, 4
    with Largest(student.hf.config.vocab_size, student.hf.config.hidden_size) as seen:
        scores, _ = taught(student, teacher, GeneralizedJSD())
        scores.divergence.sum().backward()
    assert len(scores.divergence) == 33
    assert seen.rows == rows


def test_the_cross_entropys_share() -> None:
    student, _ = pair("llama")
    objective = ForwardKL(temperature=2.0, cross_entropy=0.25)
    scores, _ = taught(student, mixed_up(student), objective)
    loss = objective(scores).terms["loss"].sum
    torch.testing.assert_close(loss, 0.75 * 4 * scores.divergence.sum() - 0.25 * scores.logprobs.sum())


@pytest.mark.parametrize("packing", ["batch", "none"])
def test_a_preprompt_that_only_the_teacher_reads(packing: Any, tmp_path: Path) -> None:
    """Each conversation alone, with and without it, through transformers, is what the module computes of a batch."""
    talks = [(f"{i} " + "what? " * (i % 3), "so it is " * (1 + i % 4) + str(i)) for i in range(6)]
    rows = [{"prompt": asked, "completion": said} for asked, said in talks]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    module = DistillationModule(Backbone(config=LLAMA), Backbone(config=LLAMA | {"rms_norm_eps": 0.1}), seed=3)
    module.sequence_length = 160
    module.configure_model()
    data = PrepromptDataModule(
        sources=[{"path": str(tmp_path / "rows.jsonl")}],  # type: ignore[list-item]
        preprompt="Be brief.",
        tokenizer="builtin:bytes",
        chat_template="chatml",
        sequence_length=160,
        batch_size=6,
        packing=packing,
        validation_fraction=0.0,
        cache_dir=str(tmp_path / "cache"),
    )
    data.prepare_data()
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert isinstance(batch, TaughtBatch)
    output = module.objective_step(batch)
    (output.terms["loss"].sum / batch.counts()["tokens"]).backward()
    assert module.model is not None
    found = {name: p.grad for name, p in module.model.hf.named_parameters() if p.grad is not None}
    module.zero_grad()

    tokenizer = data.prepared_tokenizer
    total, tokens, nll = torch.zeros(()), 0, 0.0
    for asked, said in talks:
        logits = []
        answer = tokenizer(f"{said}<|im_end|>", add_special_tokens=False)["input_ids"]
        for preprompt in ("", "<|im_start|>system\nBe brief.<|im_end|>\n"):
            before = f"{preprompt}<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
            ids = tokenizer(before, add_special_tokens=False)["input_ids"] + answer
            model = module._copy[0].hf if preprompt else module.model.hf
            whole = model(torch.tensor([ids]), use_cache=False).logits[0]
            logits.append(whole[-1 - len(answer) : -1].log_softmax(-1))
        total = total + kl_div(logits[0], logits[1].detach(), reduction="sum", log_target=True)
        nll += float(cross_entropy(logits[0].detach(), torch.tensor(answer), reduction="sum"))
        tokens += len(answer)
    assert batch.counts()["tokens"] == tokens
    assert float(output.terms["loss"].sum) == pytest.approx(float(total), rel=1e-5)
    assert float(output.metrics["nll"][0]) == pytest.approx(nll, rel=1e-5)
    (total / tokens).backward()
    wanted = {name: p.grad for name, p in module.model.hf.named_parameters() if p.grad is not None}
    whole = torch.cat([g.flatten() for g in wanted.values()]).norm()
    assert torch.cat([(found[key] - g).flatten() for key, g in wanted.items()]).norm() <= 1e-5 * whole


def test_a_base_under_an_adapted_head_is_the_base() -> None:
    """LoRA on the head, too: the teacher's logits are those of the head without it."""
    from llm_modules.tokenizer import byte_tokenizer
    from llm_modules.zoo.reference import as_reference, base_logits

    adapter = {"class_path": "peft.LoraConfig", "init_args": {"r": 2, "target_modules": ["q_proj", "lm_head"]}}
    built = {"tokenizer": byte_tokenizer(), "sequence_length": 128, "seed": 3}
    adapted, plain = Backbone(config=LLAMA, adapter=adapter).build(**built), Backbone(config=LLAMA).build(**built)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    ids = torch.randint(3, 160, (1, 40), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(40)[None]
    targets = next_token_targets(ids, positions)
    with as_reference(adapted, None) as base:
        hidden = base(ids, positions, targets, states=True)
    scores = adapted(
        ids, positions, targets, teaching=Teaching(hidden, partial(base_logits, adapted), ForwardKL().compare)
    )
    expected = plain(ids, positions, targets).logprobs
    torch.testing.assert_close(scores.teacher_logprobs, expected, rtol=1e-6, atol=1e-6)
    own = adapted(ids, positions, targets).logprobs
    torch.testing.assert_close(scores.logprobs, own, rtol=1e-6, atol=1e-6)
    assert (own - expected).abs().max() > 1e-3
    scores.divergence.sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapted.parameters() if p.requires_grad)
