"""`predict`: rows of a module's Generator, merged over ranks into one file."""

from __future__ import annotations

import json

import pytest
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from callbacks.predictions import PredictionsWriter
from llm_modules.generation import Generator
from llm_modules.language_model import LanguageModelModule
from llm_modules.zoo import Backbone


class Echo(LightningModule):
    """Predicts rows without a model."""

    def predict_step(self, batch, batch_idx):
        return [{"row": row, "text": f"é {row}", "rank": self.global_rank} for row in batch]


def trainer(folder, **options):
    return Trainer(
        default_root_dir=str(folder),
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[PredictionsWriter()],
        **options,
    )


def as_it_is(batch):
    return batch


def predict(trainer, module, batches):
    # A bare list would be taken for several loaders.
    trainer.predict(module, DataLoader(batches, batch_size=None, collate_fn=as_it_is))


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rows_are_written_in_order_and_once(tmp_path):
    predict(trainer(tmp_path / "run"), Echo(), [[4, 1], [3, 0], [1, 2]])
    (path,) = (tmp_path / "run").iterdir()
    assert [row["row"] for row in rows_of(path)] == [0, 1, 2, 3, 4]
    assert "é 0" in path.read_text(encoding="utf-8")


def test_an_earlier_file_is_kept(tmp_path):
    for rows in ([[0]], [[0, 1]], [[0, 1, 2]]):
        predict(trainer(tmp_path), Echo(), rows)
    sizes = {path.name: len(rows_of(path)) for path in tmp_path.iterdir()}
    assert sizes == {"predictions.0.jsonl": 1, "predictions.1.jsonl": 2, "predictions.jsonl": 3}


def test_a_run_that_fails_leaves_the_earlier_file(tmp_path):
    class Fails(Echo):
        def predict_step(self, batch, batch_idx):
            if batch_idx == 1:
                raise RuntimeError("out of luck")
            return super().predict_step(batch, batch_idx)

    predict(trainer(tmp_path), Echo(), [[0]])
    with pytest.raises(RuntimeError, match="out of luck"):
        predict(trainer(tmp_path), Fails(), [[0], [1]])
    assert len(rows_of(tmp_path / "predictions.jsonl")) == 1
    (tmp_path / "predictions.jsonl.part-00007").write_text("left over by more ranks")
    predict(trainer(tmp_path), Echo(), [[0], [1]])
    assert len(rows_of(tmp_path / "predictions.jsonl")) == 2
    assert not list(tmp_path.glob("*.part-*"))


@pytest.mark.slow
def test_two_processes_write_one_file(tmp_path):
    predict(trainer(tmp_path, strategy="ddp_spawn", devices=2, use_distributed_sampler=False), Shares(), [[0], [1]])
    rows = rows_of(tmp_path / "predictions.jsonl")
    assert [(row["row"], row["rank"]) for row in rows] == [(0, 0), (1, 1), (2, 0), (3, 1)]
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.jsonl"]


class Shares(Echo):
    """Each rank's own rows: 0 and 2, or 1 and 3."""

    def predict_step(self, batch, batch_idx):
        return super().predict_step([2 * batch[0] + self.global_rank], batch_idx)


def test_a_module_predicts_with_its_generator(tmp_path):
    preset = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    generator = Generator(strategy="sample", seed=3, max_new_tokens=8, logprobs=True)
    module = LanguageModelModule(
        Backbone(config={"model_type": "llama", **preset}), generator=generator, sequence_length=64
    )
    batches = [
        {"prompts": ["b", "long prompt"], "references": ["x", None], "rows": [5, 2]},
        {"prompts": ["b"], "references": ["z"], "rows": [3]},
    ]
    predict(trainer(tmp_path), module, batches)
    rows = rows_of(tmp_path / "predictions.jsonl")
    assert [(row["row"], row["prompt"], row["reference"]) for row in rows] == [
        (2, "long prompt", None),
        (3, "b", "z"),
        (5, "b", "x"),
    ]
    expected = generator.generate(module.model, module.tokenizer, ["long prompt", "b", "b"], rows=[2, 3, 5])
    assert [row["completion"] for row in rows] == [c.text for c in expected]
    assert [row["logprob"] for row in rows] == pytest.approx([c.logprob for c in expected], abs=1e-4)
    assert rows[1]["completion"] != rows[2]["completion"]  # the row decides, not the prompt alone
