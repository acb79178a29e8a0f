"""A real Trainer, stopped anywhere and continued, sees exactly the rows that it would have seen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from llm_modules.data import Source, TextDataModule

EPOCHS = 3


class Recorder(LightningModule):
    """Records what it is given; one parameter, so that there are optimizer steps to count."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[dict] = []
        self.validated: list[int] = []

    def training_step(self, batch, batch_idx):
        self.seen.append(
            {
                "step": self.trainer.global_step,
                "epoch": self.trainer.current_epoch,
                "tokens": batch.input_ids.flatten().tolist(),
                "window": batch.window,
                "micro_step": batch.micro_step,
                "own": batch.counts()["tokens"],
            }
        )
        return self.weight * 0.0

    def validation_step(self, batch, batch_idx):
        assert batch.window == {}
        self.validated += batch.rows

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Save(Callback):
    """A checkpoint after every micro-batch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.count += 1
        trainer.save_checkpoint(self.folder / f"{self.count}.ckpt")


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    # 23 rows, each recognisable, of different lengths.
    path.write_text("".join(json.dumps({"text": chr(97 + i) * (3 + i % 7)}) + "\n" for i in range(23)))
    return path


def data(rows_file: Path, **changes) -> TextDataModule:
    settings = {
        "sources": [Source(str(rows_file))],
        "tokenizer": "builtin:bytes",
        "sequence_length": 32,
        "batch_size": 2,
        "packing": "batch",
        "validation_fraction": 0.1,
        "cache_dir": str(rows_file.parent / "cache"),
    }
    return TextDataModule(**(settings | changes))


def fit(module: Recorder, datamodule: TextDataModule, checkpoint: Path | None = None, **settings) -> Recorder:
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        **({"accumulate_grad_batches": 2} | settings),
    )
    trainer.fit(module, datamodule=datamodule, ckpt_path=checkpoint, weights_only=False)
    return module


def tokens(module: Recorder) -> list[list[int]]:
    return [entry["tokens"] for entry in module.seen]


@pytest.mark.parametrize("stop", [{"max_epochs": EPOCHS}, {"max_steps": 14, "max_epochs": -1}], ids=["epochs", "steps"])
@pytest.mark.parametrize("packing", ["batch", "none", "documents"])
def test_resume_after_every_micro_batch(rows_file, tmp_path, stop, packing):
    changes = {"packing": packing} if packing != "documents" else {"packing": packing, "batch_size": 1}
    whole = fit(Recorder(), data(rows_file, **changes), callbacks=[Save(tmp_path)], **stop)
    steps_per_epoch = len([e for e in whole.seen if e["epoch"] == 0]) // 2
    assert steps_per_epoch >= 2
    for count in range(1, len(whole.seen)):
        part = fit(Recorder(), data(rows_file, **changes), tmp_path / f"{count}.ckpt", **stop)
        # A checkpoint inside an accumulation window repeats the window: the gradients of its beginning are lost.
        assert part.seen == whole.seen[count - count % 2 :], f"resumed after micro-batch {count}"


def test_resume_with_worker_processes(rows_file, tmp_path):
    whole = fit(Recorder(), data(rows_file), callbacks=[Save(tmp_path)], max_epochs=EPOCHS)
    for count in (2, 10, 12):
        part = fit(Recorder(), data(rows_file, workers=2), tmp_path / f"{count}.ckpt", max_epochs=EPOCHS)
        assert part.seen == whole.seen[count:]


def test_worker_processes_end_with_the_run(rows_file):
    import multiprocessing

    before = set(multiprocessing.active_children())
    datamodule = data(rows_file, workers=2)
    fit(Recorder(), datamodule, max_epochs=2)
    assert set(multiprocessing.active_children()) == before
    # They start again where the loader is used again.
    assert len(list(datamodule.val_dataloader())) == len(datamodule.val_dataloader())


def test_every_epoch_has_its_own_order_and_no_row_twice(rows_file):
    module = fit(Recorder(), data(rows_file), max_epochs=EPOCHS)
    epochs = [[e["tokens"] for e in module.seen if e["epoch"] == epoch] for epoch in range(EPOCHS)]
    assert epochs[0] != epochs[1] != epochs[2]
    for epoch in epochs:
        letters = [token for micro in epoch for token in set(micro)]
        letters = [token for token in letters if token != 256]
        assert len(letters) == len(set(letters)) == 2 * len(epoch)


def test_the_window_is_known_before_its_first_micro_batch(rows_file):
    module = fit(Recorder(), data(rows_file), max_epochs=1)
    for first, second in zip(module.seen[::2], module.seen[1::2], strict=True):
        assert (first["micro_step"], second["micro_step"]) == (0, 1)
        assert first["window"] == second["window"]
        assert first["window"]["tokens"] == first["own"] + second["own"]
    assert len({entry["window"]["tokens"] for entry in module.seen}) > 1


def test_steps_hold_the_same_rows_however_they_are_cut(rows_file):
    def steps(**cut) -> list[list[int]]:
        accumulate = cut.pop("accumulate")
        module = fit(Recorder(), data(rows_file, **cut), max_epochs=2, accumulate_grad_batches=accumulate)
        found: dict[int, list[int]] = {}
        for entry in module.seen:
            found.setdefault(entry["step"], []).extend(entry["tokens"])
        return [sorted(token for token in step if token != 257) for step in found.values()]

    for packing in ("batch", "none"):
        expected = steps(batch_size=4, accumulate=1, packing=packing)
        assert steps(batch_size=2, accumulate=2, packing=packing) == expected
        assert steps(batch_size=1, accumulate=4, packing=packing) == expected


@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 1), (1, 4), (1, 2), (2, 4), (1, 1)])
def test_resume_with_another_cut_goes_on_at_the_next_row(rows_file, tmp_path, batch_size, accumulate):
    whole = fit(Recorder(), data(rows_file), callbacks=[Save(tmp_path)], max_epochs=2)
    rows_before = 3 * 4  # after three optimizer steps of 2 x 2 rows
    changed = data(rows_file, batch_size=batch_size)
    part = fit(Recorder(), changed, tmp_path / "6.ckpt", max_epochs=2, accumulate_grad_batches=accumulate)
    order = [changed.epoch_plan(epoch) for epoch in range(2)]

    def read(epoch: int, first: int) -> list[list[int]]:
        plan, rows = order[epoch], changed.corpus.rows
        steps = (len(plan) - first) // (batch_size * accumulate)
        return [
            rows.read(*plan.row(first + i)[0, 1:].tolist())[0].tolist() for i in range(steps * batch_size * accumulate)
        ]

    found = [token for entry in part.seen for token in entry["tokens"]]
    assert found == [token for row in read(0, rows_before) + read(1, 0) for token in row]
    assert [entry["micro_step"] for entry in part.seen] == [i % accumulate for i in range(len(part.seen))]
    # Lightning's optimizer steps are those of the windows.
    steps = [entry["step"] for entry in part.seen]
    assert steps == [3 + i // accumulate for i in range(len(part.seen))]
    assert whole.seen[6]["step"] == 3


def test_resume_at_the_end_of_an_epoch_with_another_cut(rows_file, tmp_path):
    whole = fit(Recorder(), data(rows_file), callbacks=[Save(tmp_path)], max_epochs=2)
    last = len(whole.seen) // 2
    part = fit(Recorder(), data(rows_file, batch_size=1), tmp_path / f"{last}.ckpt", max_epochs=2)
    assert part.seen[0]["epoch"] == 1
    assert part.seen[0]["tokens"] + part.seen[1]["tokens"] == tokens(whole)[last]


def test_validations_come_between_steps_after_a_resume_with_another_cut(rows_file, tmp_path):
    class Look(Callback):
        def __init__(self):
            self.found = []

        def on_validation_start(self, trainer, pl_module):
            self.found.append((trainer.global_step, trainer.fit_loop._should_accumulate()))

    fit(Recorder(), data(rows_file), callbacks=[Save(tmp_path)], max_epochs=2)
    look, settings = Look(), {"check_val_every_n_epoch": None, "val_check_interval": 4, "accumulate_grad_batches": 4}
    fit(Recorder(), data(rows_file, batch_size=1), tmp_path / "6.ckpt", callbacks=[look], max_epochs=2, **settings)
    assert look.found
    assert not any(inside for _, inside in look.found)


def test_limited_epochs_resume_too(rows_file, tmp_path):
    settings = {"max_epochs": 3, "limit_train_batches": 4}
    whole = fit(Recorder(), data(rows_file), callbacks=[Save(tmp_path)], **settings)
    assert [entry["epoch"] for entry in whole.seen] == [0] * 4 + [1] * 4 + [2] * 4
    assert len({str(entry["tokens"]) for entry in whole.seen}) > 4
    for count in (2, 4, 6, 8):
        assert fit(Recorder(), data(rows_file), tmp_path / f"{count}.ckpt", **settings).seen == whole.seen[count:]


def test_a_limit_inside_a_window_is_refused(rows_file):
    with pytest.raises(ValueError, match=r"limit_train_batches: 3 .* accumulate_grad_batches 2"):
        fit(Recorder(), data(rows_file), max_epochs=1, limit_train_batches=3)


def test_overfitting_repeats_its_rows(rows_file):
    module = fit(Recorder(), data(rows_file), max_epochs=3, overfit_batches=2, limit_val_batches=0)
    assert tokens(module)[:2] == tokens(module)[2:4] == tokens(module)[4:]


def test_validation_in_between_changes_nothing_and_sees_every_row(rows_file):
    plain = fit(Recorder(), data(rows_file), max_epochs=2, limit_val_batches=0)
    datamodule = data(rows_file, validation_fraction=0.4)
    with_validation = fit(Recorder(), data(rows_file), max_epochs=2, val_check_interval=2)
    assert with_validation.seen == plain.seen
    module = fit(Recorder(), datamodule, max_epochs=1)
    held_out = datamodule.corpus.documents["validation"].tolist()
    assert len(held_out) >= 4
    assert sorted(module.validated) == sorted(held_out)


def test_without_validation_data(rows_file):
    module = fit(Recorder(), data(rows_file, validation_fraction=0.0), max_epochs=1)
    assert module.validated == []
    assert len(module.seen) == 10  # 23 rows: 5 steps of 4


def test_a_position_of_other_data_is_refused(rows_file, tmp_path):
    fit(Recorder(), data(rows_file), callbacks=[Save(tmp_path)], max_epochs=1)
    with pytest.raises(ValueError, match="belongs to other data"):
        fit(Recorder(), data(rows_file, seed=1), tmp_path / "4.ckpt", max_epochs=2)


def test_an_epoch_of_less_than_a_step_says_the_arithmetic(rows_file):
    with pytest.raises(ValueError, match=r"an epoch has \d+ rows, fewer than the 100 .*1 processes x batch_size 50 x"):
        fit(Recorder(), data(rows_file, batch_size=50), max_epochs=1)


def test_the_global_generator_is_left_alone(rows_file):
    datamodule = data(rows_file)
    datamodule.prepare_data()
    datamodule.setup("fit")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    list(datamodule.train_dataloader())
    assert torch.equal(before, torch.get_rng_state())
