"""Twenty optimizer steps of `recipes fit`'s parts and of TRL's SFTTrainer: the same rows, the same losses, in fp32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from llm_modules.data import ConversationDataModule
from llm_modules.language_model import LanguageModelModule
from llm_modules.tokenizer import byte_tokenizer
from llm_modules.zoo import Backbone

STEPS, BATCH, LENGTH, LR, CLIP = 20, 4, 96, 3e-3, 0.5
LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": LENGTH,
}  # fmt: skip
# With generation marks, and nothing after a turn's end, so that both train the same tokens.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model/`` (weights, tokenizer with template) and ``rows.jsonl``: rows of unequal lengths, some truncated."""
    path = tmp_path_factory.mktemp("trl")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    made = LanguageModelModule(Backbone(config=LLAMA), sequence_length=LENGTH, seed=3)
    made.configure_model()
    made.export(path / "model")
    tokenizer.save_pretrained(path / "model")
    words = "the quick brown fox jumps over a lazy dog and runs away".split()
    rows = [
        {
            "instruction": f"{i}: " + " ".join(words[i % 7 :][: 1 + i % 5]),
            "response": " ".join(words[i % 3 :][: 1 + (7 * i) % 11]) + f" {i}",
        }
        for i in range(STEPS * BATCH)
    ]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Record(Callback):
    """The losses that are logged, and the tokens of each row that is trained, in order."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.rows: list[list[int]] = []

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch.document_offsets is not None:
            self.rows += [part.tolist() for part in batch.input_ids[0].split(batch.document_offsets.diff().tolist())]

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self.losses.append(float(trainer.callback_metrics["train/loss"]))
        self.norms.append(float(trainer.callback_metrics["train/grad_norm"]))


def fit(folder: Path, packing: str, accumulate: int = 1) -> Record:
    """Our side: a Trainer on a DataModule and LanguageModelModule, as `recipes fit` builds them."""
    record = Record()
    data = ConversationDataModule(
        sources=[{"path": str(folder / "rows.jsonl")}],  # type: ignore[list-item]
        tokenizer=str(folder / "model"), sequence_length=LENGTH, batch_size=BATCH // accumulate, seed=3,
        validation_fraction=0.0, packing=packing, cache_dir=str(folder / "cache"),
    )  # fmt: skip
    module = LanguageModelModule(
        Backbone(source=str(folder / "model")), tokenizer=str(folder / "model"), sequence_length=LENGTH, seed=3,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0),
    )  # fmt: skip
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=STEPS, gradient_clip_val=CLIP, log_every_n_steps=1, logger=False,
        accumulate_grad_batches=accumulate, use_distributed_sampler=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[record],
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return record


@pytest.fixture(scope="module")
def packed(folder: Path) -> Record:
    return fit(folder, "batch")


@pytest.fixture(scope="module")
def peer(folder: Path, packed: Record) -> list[dict[str, float]]:
    """TRL's side: its log of each step, on the rows in the order that our side trained them."""
    pytest.importorskip("trl")
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    by_tokens = {}
    for line in (folder / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = [{"role": "user", "content": row["instruction"]}]
        answer = [{"role": "assistant", "content": row["response"]}]
        ids = tokenizer.apply_chat_template([*prompt, *answer])["input_ids"][:LENGTH]
        by_tokens[tuple(ids)] = {"prompt": prompt, "completion": answer}
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model"),
        args=SFTConfig(
            output_dir=str(folder / "peer"),
            max_length=LENGTH,
            per_device_train_batch_size=BATCH,
            max_steps=STEPS,
            learning_rate=LR,
            lr_scheduler_type="constant",
            max_grad_norm=CLIP,
            weight_decay=0.0,
            bf16=False,
            use_cpu=True,
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=3,
        ),
        train_dataset=datasets.Dataset.from_list([by_tokens[tuple(row)] for row in packed.rows]),
        processing_class=tokenizer,
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
def test_the_rows_are_really_unequal_and_some_are_truncated(packed: Record) -> None:
    lengths = [len(row) for row in packed.rows]
    assert len(lengths) == STEPS * BATCH
    assert max(lengths) == LENGTH
    assert min(lengths) < LENGTH // 2


@pytest.mark.slow
def test_twenty_steps_follow_trl(packed: Record, peer: list[dict[str, float]]) -> None:
    expected = [entry["loss"] for entry in peer]
    assert len(expected) == STEPS
    assert expected[-1] < expected[0] - 1.0  # it learns, so that following means something
    assert packed.losses == pytest.approx(expected, abs=1e-4)
    assert packed.norms == pytest.approx([entry["grad_norm"] for entry in peer], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("packing", "accumulate"), [("none", 1), ("batch", 2), ("none", 4)])
def test_so_do_padded_rows_and_smaller_micro_batches(
    folder: Path, peer: list[dict[str, float]], packing: str, accumulate: int
) -> None:
    assert fit(folder, packing, accumulate).losses == pytest.approx([e["loss"] for e in peer], abs=1e-4)
